"""latent_mla: multi-head latent attention over a cache of latents.

Matches     a class that fetches a latent and a rope key, makes scores of the rope part by a matrix
            product with the fetched rope key, masks them, and passes those scores to attention as
            its mask. DeepSeek-V2, arXiv 2405.04434, section 2.1.
Refuses     a class that selects keys (sparse attention) or stores other state.
Becomes     one page entry a position that holds latent and rope key side by side, without values,
            and one call of `paged_latent_attention` in the place of all forms that the file has.
            Where it is not proved that the two forms (absorbed, materialised) are one function,
            that the scores have no other term and that nothing else needs what the replaced
            statements make, the original code runs once per sequence.
"""

from __future__ import annotations

from ..ir import Evidence, Match, Miss, Value
from ..latents import paged_latents
from ..match import Mixer
from ..per_sequence import per_sequence
from ..rankings import ranks
from . import Counter, Example

NAME = "latent_mla"


def match(mixer: Mixer) -> Match | Miss:
    if not mixer.fetches or not mixer.attends:
        return Miss(NAME, 0, "a fetch and a fused attention call")
    if mixer.state_stores or mixer.cache_reads():
        return Miss(NAME, 1, "only latents are cached")
    scored = [a for a in mixer.attends if a.mask is not None and _is_scores(mixer, a.mask)]
    if not scored:
        return Miss(NAME, 1, "scores of the rope part are the mask of attention")
    if ranks(mixer):
        return Miss(NAME, 1, "keys are not ranked")
    evidence = [mixer.evidence("latent and rope key fetched", f.call) for f in mixer.fetches]
    evidence += [mixer.evidence("rope scores as mask", a.mask or a.call) for a in scored]
    paged = paged_latents(mixer, NAME, evidence)
    if isinstance(paged, Match):
        return paged
    place = paged.place or evidence[0].place
    evidence.append(Evidence(f"not paged, for it is not proved: {paged.missing}", place))
    return per_sequence(mixer, NAME, evidence)


def _is_scores(mixer: Mixer, mask: Value) -> bool:
    """The mask is computed by a matrix product with something fetched."""
    fetched = {id(f.call) for f in mixer.fetches}
    return any(
        part.op == "binary"
        and part.data == "@"
        and any(id(inner) in fetched for inner in part.walk())
        for part in mask.walk()
    )


_PROJECTION = """
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

class Heads(nn.Module):
    def __init__(self, inputs, outputs, heads):
        super().__init__()
        self.matrices = mx.zeros((heads, outputs, inputs))

    def __call__(self, x, transpose=True):
        if transpose:
            return x @ self.matrices.swapaxes(-1, -2)
        else:
            return x @ self.matrices
"""

_HEAD = (
    _PROJECTION
    + """
class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.scale = args.head**-0.5
        self.down = nn.Linear(args.width, args.rank + args.rope)
        self.q = nn.Linear(args.width, args.heads * args.head)
        self.up_k = Heads(args.content, args.rank, args.heads)
        self.up_v = Heads(args.rank, args.value, args.heads)

    def __call__(self, x, mask=None, cache=None):
        B, L, D = x.shape
        q, q_rope = mx.split(self.q(x).reshape(B, L, 4, -1).transpose(0, 2, 1, 3), [8], axis=-1)
        latent, k_rope = mx.split(self.down(x)[:, None], [8], axis=-1)
        if cache is not None:
            latent, k_rope = cache.update_and_fetch(latent, k_rope)
"""
)

_MLA = (
    _HEAD
    + """
        scores = (q_rope * self.scale) @ k_rope.swapaxes(-1, -2)
        if mask is not None:
            scores = mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
        if L == 1:
            q = self.up_k(q)
            k = v = latent
        else:
            k = self.up_k(latent, transpose=False)
            v = self.up_v(latent)
        y = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=scores)
        if L == 1:
            y = self.up_v(y)
        return y.transpose(0, 2, 1, 3).reshape(B, L, -1)
"""
)

_TWO_CALLS = (
    _HEAD
    + """
        if L == 1:
            scores = (q_rope * self.scale) @ k_rope.swapaxes(-1, -2)
            if mask is not None:
                scores = mx.where(mask, scores, -float("inf"))
            y = scaled_dot_product_attention(
                self.up_k(q), latent, latent, cache=cache, scale=self.scale, mask=scores
            )
            y = self.up_v(y)
        else:
            rope = mx.broadcast_to(k_rope, [B, 4, k_rope.shape[2], 8])
            y = scaled_dot_product_attention(
                mx.concatenate([q, q_rope], axis=-1),
                mx.concatenate([self.up_k(latent, transpose=False), rope], axis=-1),
                self.up_v(latent),
                cache=cache,
                scale=self.scale,
                mask=mask,
            )
        return y.transpose(0, 2, 1, 3).reshape(B, L, -1)
"""
)

_ABSORBED = (
    _HEAD
    + """
        scores = q_rope @ k_rope.transpose(0, 1, 3, 2)
        if mask is not None:
            scores = mx.where(mask, scores, -1e9)
        q = self.up_k(q)
        y = scaled_dot_product_attention(q, latent, latent, cache=cache, scale=1.0, mask=scores)
        return self.up_v(y).transpose(0, 2, 1, 3).reshape(B, L, D)
"""
)


def _changed(text: str, *changes: tuple[str, str]) -> Example:
    """An example that only the per-sequence route serves."""
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return Example("Mix", text, "per-sequence")


ACCEPTS = (
    Example("Mix", _MLA),
    Example("Mix", _TWO_CALLS),
    Example("Mix", _ABSORBED),
    Example("Mix", _MLA.replace("if L == 1:", "if L <= 4:")),
    # An added term, a factor of one part only, a mask that is computed here, one that bars softly.
    _changed(_MLA, ("        if mask is", "        scores = scores + 1.0\n        if mask is")),
    _changed(_MLA, ("(q_rope * self.scale)", "(q_rope * 0.5)")),
    _changed(_ABSORBED, ("mask, scores,", "mask == 0, scores,")),
    _changed(_ABSORBED, ("-1e9", "-1.0")),
    # Rows of another form: projections that are not one matrix, or not the same one.
    _changed(_MLA, ("x @ self.matrices.swapaxes", "2 * x @ self.matrices.swapaxes")),
    _changed(_MLA, ("k = self.up_k(latent, t", "k = self.up_v(latent, t")),
    _changed(
        _MLA,
        ("        if L == 1:\n            y = self", "        if L == 2:\n            y = self"),
    ),
    # What goes would be missed.
    _changed(_MLA, ("reshape(B, L, -1)", "reshape(B, L, -1) + k.sum()")),
    _changed(_MLA, ("        if mask is", "        self.last = scores\n        if mask is")),
    _changed(_MLA, ("        if mask is", "        print(scores)\n        if mask is")),
)
REJECTS = (
    Counter("Mix", _MLA.replace("mask=scores)", "mask=mask)"), None),
    Counter(
        "Mix",
        _MLA.replace("        scores =", "        latent = cache.keys\n        scores ="),
        None,
    ),
)
