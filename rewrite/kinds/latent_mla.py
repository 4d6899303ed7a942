"""latent_mla: multi-head latent attention over a cache of latents.

Matches     a class that fetches a latent and a rope key, makes scores of the rope part by a matrix
            product with the fetched rope key, and passes those scores to attention as its mask.
            DeepSeek-V2, arXiv 2405.04434, section 2.1.
Refuses     a class that selects keys (sparse attention) or stores other state.
Becomes     the original code, once per sequence.
"""

from __future__ import annotations

from ..ir import Match, Miss
from ..match import Mixer, every_value
from ..per_sequence import per_sequence
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
    evidence = [mixer.evidence("latent and rope key fetched", f.call) for f in mixer.fetches]
    evidence += [mixer.evidence("rope scores as mask", a.mask or a.call) for a in scored]
    return per_sequence(mixer, NAME, evidence)


def _is_scores(mixer: Mixer, mask: object) -> bool:
    """The mask is computed by a matrix product with something fetched."""
    fetched = {id(f.call) for f in mixer.fetches}
    for method in mixer.methods:
        for value in every_value(method):
            if value is not mask:
                continue
            return any(
                part.op == "binary"
                and part.data == "@"
                and any(id(inner) in fetched for inner in part.walk())
                for part in value.walk()
            )
    return False


_MLA = """
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.down = nn.Linear(args.width, args.rank + args.rope)
        self.q = nn.Linear(args.width, args.heads * args.head)
        self.up = nn.Linear(args.rank, args.heads * args.value)

    def __call__(self, x, mask=None, cache=None):
        B, L, D = x.shape
        q, q_rope = mx.split(self.q(x).reshape(B, L, 4, -1).transpose(0, 2, 1, 3), [8], axis=-1)
        latent, k_rope = mx.split(self.down(x)[:, None], [8], axis=-1)
        if cache is not None:
            latent, k_rope = cache.update_and_fetch(latent, k_rope)
        scores = q_rope @ k_rope.swapaxes(-1, -2)
        if mask is not None:
            scores = mx.where(mask, scores, -1e9)
        y = scaled_dot_product_attention(q, latent, latent, cache=cache, scale=1.0, mask=scores)
        return self.up(y).transpose(0, 2, 1, 3).reshape(B, L, D)
"""

ACCEPTS = (Example("Mix", _MLA, "per-sequence"),)
REJECTS = (
    Counter("Mix", _MLA.replace("mask=scores)", "mask=mask)"), None),
    Counter(
        "Mix",
        _MLA.replace("        scores =", "        latent = cache.keys\n        scores ="),
        None,
    ),
)
