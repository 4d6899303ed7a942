"""convolved_keys: softmax attention whose keys and values pass a causal convolution first.

Matches     a class that fetches keys and values and keeps the tail of a convolution over them.
            Baichuan-M1, arXiv 2502.12671.
Refuses     attention without that tail, and convolutions without attention.
Becomes     the original code, once per sequence.
"""

from __future__ import annotations

from ..ir import Match, Miss
from ..match import Mixer
from ..per_sequence import per_sequence
from . import Counter, Example

NAME = "convolved_keys"


def match(mixer: Mixer) -> Match | Miss:
    if not mixer.fetches or not mixer.attends:
        return Miss(NAME, 0, "a fetch and a fused attention call")
    if not mixer.state_stores:
        return Miss(NAME, 1, "state beside keys and values")
    evidence = [mixer.evidence("fetch", f.call) for f in mixer.fetches]
    evidence += [mixer.evidence("state stored", effect) for effect in mixer.state_stores]
    return per_sequence(mixer, NAME, evidence)


_KEYS = """
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.qkv = nn.Linear(args.width, 3 * args.width)

    def __call__(self, x, mask=None, cache=None):
        B, L, D = x.shape
        q, k, v = (p[:, None] for p in mx.split(self.qkv(x), 3, axis=-1))
        last = k[:, :, -1:]
        k = k + mx.concatenate([cache[0][0], k[:, :, :-1]], axis=2)
        cache[0][0] = last
        k, v = cache[1].update_and_fetch(k, v)
        y = scaled_dot_product_attention(q, k, v, cache=cache[1], scale=1.0, mask=mask)
        return y.reshape(B, L, D)
"""

ACCEPTS = (Example("Mix", _KEYS, "per-sequence"),)
REJECTS = (Counter("Mix", _KEYS.replace("        cache[0][0] = last\n", ""), "softmax_attention"),)
