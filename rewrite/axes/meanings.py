"""Functions that are not followed but known by their text: what they compute, in other words.

Fused kernels of a library compute what mlx's own operations do. Their text was read, and run on the
CPU runner; it is known by its hash together with that of everything of its module that it names:
any other text is not known. In its place the proof follows the meaning written here, with the
assumption that both say the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from hashlib import sha256

from ..ir import Source
from .world import Binding, Text, text_of

_WORD = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class Meaning:
    """`text` defines a function `meaning`; `declines`: the fused function may also give None."""

    digest: str
    reason: str
    text: str
    declines: bool = False


# By the function's name, to know whose hash to take; the hash decides.
MEANINGS: dict[str, Meaning] = {
    "mlx_vlm.models.fast_ops.exact_affine_switch_gate_up": Meaning(
        "9ddabc998745589d",
        "products with each token's own experts; two tokens of one expert share its weights alone",
        """
def meaning(switch, x, indices):
    rows = mx.expand_dims(x, (-2, -3))
    up = switch.up_proj(rows, indices, sorted_indices=False)
    gate = switch.gate_proj(rows, indices, sorted_indices=False)
    return up.squeeze(-2), gate.squeeze(-2)
""",
        declines=True,
    ),
    "mlx_vlm.models.fast_ops.exact_affine_moe_down": Meaning(
        "536a63ad52adc8e4",
        "products with each token's own experts, weighed and added to the token's own row",
        """
def meaning(linear, x, indices, route_weights, shared):
    experts = linear(mx.expand_dims(x, -2), indices, sorted_indices=False).squeeze(-2)
    weighed = experts * route_weights[..., None].astype(experts.dtype)
    return weighed.sum(axis=-2) + shared
""",
        declines=True,
    ),
    "mlx_vlm.models.rope_utils._compiled_rotary_apply": Meaning(
        "f9ee642160cf1cbb",
        "a thread turns a pair of entries of one row by the cosine and sine of that row",
        """
def meaning(rotary_dim, pairing, cos_ndim, sectioned, cos_layout, mrope_section=()):
    def laid_out(x):
        if sectioned:
            ends, parts = [], []
            for size in (*mrope_section, *mrope_section):
                ends.append(ends[-1] + size if ends else size)
            for place, part in enumerate(mx.split(x, ends[:-1], axis=-1)):
                parts.append(part[place % 3])
            x = mx.concatenate(parts, axis=-1)
        elif cos_ndim == 4:
            x = x[0]
        if pairing == "even_odd" and cos_layout == "half":
            x = mx.repeat(x[..., : x.shape[-1] // 2], 2, axis=-1)
        return x[:, None].astype(mx.float32)

    def turned(x, cos, sin):
        front, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        wide = front.astype(mx.float32)
        if pairing == "even_odd":
            other = mx.flatten(mx.stack([-wide[..., 1::2], wide[..., 0::2]], axis=-1), -2, -1)
        else:
            half = rotary_dim // 2
            other = mx.concatenate([-wide[..., half:], wide[..., :half]], axis=-1)
        made = (wide * laid_out(cos) + other * laid_out(sin)).astype(x.dtype)
        return mx.concatenate([made, rest], axis=-1)

    def apply(q, k, cos, sin, position_selector):
        return turned(q, cos, sin), turned(k, cos, sin)

    return apply
""",
        declines=True,
    ),
    "mlx_vlm.models.rope_utils.MRoPERotaryEmbedding.apply_rotary": Meaning(
        "e6f65e9190b76a13",
        "where it is fused, a thread turns a pair of entries of one row by that row's positions; "
        "the fused function is kept by the rank of the positions",
        """
from mlx_vlm.models.rope_utils import apply_multimodal_rotary_pos_emb

def meaning(self, q, k, position_ids, *, unsqueeze_dim=1, cast_output=True):
    cos, sin = self(k, position_ids)
    return apply_multimodal_rotary_pos_emb(
        q,
        k,
        cos,
        sin,
        mrope_section=self.mrope_section,
        unsqueeze_dim=unsqueeze_dim,
        style=self.style,
        cast_output=cast_output,
    )
""",
    ),
    "mlx_vlm.kernels.qk_norm.qk_norm": Meaning(
        "f32d46f2348118f1",
        "a simdgroup reads the one head that it writes",
        """
def meaning(qkvg, *, n_heads, n_kv_heads, head_dim, eps, query_scale):
    end = (n_heads + n_kv_heads) * head_dim
    q, k = mx.split(qkvg[..., :end], [n_heads * head_dim], axis=-1)
    B, L = qkvg.shape[:2]
    q = mx.fast.rms_norm(q.reshape(B, L, n_heads, head_dim), None, eps) * query_scale
    return q, mx.fast.rms_norm(k.reshape(B, L, n_kv_heads, head_dim), None, eps)
""",
    ),
    "mlx_vlm.kernels.qk_norm_rope.qk_norm_rope": Meaning(
        "09762761229b505f",
        "a simdgroup reads the one head that it writes, and turns it by its row's own position",
        """
def meaning(qkvg, *, n_heads, n_kv_heads, head_dim, eps, query_scale, rope_base, offset):
    end = (n_heads + n_kv_heads) * head_dim
    q, k = mx.split(qkvg[..., :end], [n_heads * head_dim], axis=-1)
    B, L = qkvg.shape[:2]
    q = mx.fast.rms_norm(q.reshape(B, L, n_heads, head_dim), None, eps) * query_scale
    k = mx.fast.rms_norm(k.reshape(B, L, n_kv_heads, head_dim), None, eps)

    def turned(x):
        x = mx.fast.rope(
            x.swapaxes(1, 2), head_dim, traditional=True, base=rope_base, scale=1.0, offset=offset
        )
        return x.swapaxes(1, 2)

    return turned(q), turned(k)
""",
    ),
    "mlx_vlm.kernels.rms_norm_sigmoid_gate.rms_norm_sigmoid_gate": Meaning(
        "9169afacc60e893b",
        "a simdgroup reads the one head that it writes",
        """
def meaning(x, gate, *, eps):
    B, H, L, D = x.shape
    x = mx.fast.rms_norm(x, None, eps).swapaxes(1, 2).reshape(B, L, H * D)
    return x * mx.sigmoid(gate)
""",
    ),
    "mlx_vlm.kernels.norm_add_norm.norm_add_norm": Meaning(
        "eeae2efb32d786b2",
        "a threadgroup reads the one row that it writes",
        """
def meaning(branch, stream, *, alpha, beta, post_weight, post_eps, next_norm):
    scaled = branch if post_weight is None else branch * post_weight
    total = alpha * stream + beta * mx.fast.rms_norm(scaled, None, post_eps)
    if next_norm is None:
        return total, None
    return total, mx.fast.rms_norm(total, next_norm.weight, next_norm.eps)
""",
    ),
    "mlx_vlm.kernels.norm_add_norm.pre_norm": Meaning(
        "eeae2efb32d786b2",
        "a threadgroup reads the one row that it writes",
        """
def meaning(stream, norm, *, dtype):
    return mx.fast.rms_norm(stream, norm.weight, norm.eps).astype(dtype)
""",
    ),
    "mlx_vlm.kernels.expert_routing.expert_routing": Meaning(
        "f97329d708cd321e",
        "a simdgroup ranks the experts of the one row that it reads",
        """
def meaning(logits, expert_bias, *, top_k, multiplier, score_eps, route_scale):
    scores = mx.sigmoid(logits * multiplier)
    chosen = mx.argsort(-(scores + expert_bias), axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    weights = weights / (weights.sum(axis=-1, keepdims=True) + score_eps)
    return chosen, weights * route_scale
""",
    ),
    "mlx_vlm.kernels.post_expert_norm_combine.post_expert_norm_combine": Meaning(
        "1212d53b9ac1bb4f",
        "a threadgroup reads the experts of the one row that it writes",
        """
def meaning(experts, weights, *, norm_weight, eps):
    normed = mx.fast.rms_norm(experts * norm_weight, None, eps)
    return (normed * weights[..., None]).sum(axis=-2)
""",
    ),
}
# Calls another function for each position of an axis and puts the results behind each other.
TOKENWISE = {"mlx_vlm.models.linear.tokenwise": "d1d0b92d7a9d875a"}


def digest(text: Text, name: str) -> str:
    """The hash of a function's text and of everything of its module that it names."""
    found: dict[str, str] = {}
    queue = [name]
    while queue:
        current = queue.pop()
        if current in found:
            continue
        words = [_words(text, binding) for binding in text.names.get(current, ())]
        found[current] = "\0".join(words)
        queue += {word for words_ in words for word in _WORD.findall(words_)} & text.names.keys()
    together = "\0".join(f"{key}\0{value}" for key, value in sorted(found.items()))
    return sha256(together.encode()).hexdigest()[:16]


def _words(text: Text, binding: Binding) -> str:
    if isinstance(binding, str):
        return binding
    return text.module.source.text(binding.span)


@cache
def meaning_text(name: str) -> Text:
    """The syntax of a meaning, as a module of its own."""
    from ..passes.parse import parse

    data = f"import mlx.core as mx\n{MEANINGS[name].text}".encode()
    source = Source.of(f"meaning.{name}", "meaning", data)
    return text_of(parse(source), source)
