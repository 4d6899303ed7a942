"""softmax_attention: queries attend cached keys through a fused attention call.

Matches     a class that writes keys and values with `update_and_fetch` (or is handed fetched ones,
            or fetches them for others) and passes what comes back, unchanged, to
            `scaled_dot_product_attention`. Heads, groups, norms, rope or none, packed projections,
            biases, sinks, gates, value widths, sharing between layers: all of it stays as written.
Refuses     keys or values that are computed with after the fetch; state kept beside them.
Becomes     the attention call reads the pages: `paged_attention`. The fetch stays as it is: a paged
            view answers it with handles.
"""

from __future__ import annotations

from ..attention import attend_sites, attention_match, fetched_flow
from ..ir import Match, Miss
from ..match import Mixer
from . import Counter, Example

NAME = "softmax_attention"


def match(mixer: Mixer) -> Match | Miss:
    if not mixer.attends and not mixer.fetches:
        return Miss(NAME, 0, "a fused attention call or a fetch from a cache")
    if mixer.state_stores:
        where = mixer.place(mixer.state_stores[0])
        return Miss(NAME, 1, "no state beside keys and values", where)
    reads = mixer.cache_reads()
    if reads:
        return Miss(NAME, 1, "caches are only fetched from", mixer.place(reads[0]))
    sites = []
    for method in mixer.methods:
        found = fetched_flow(mixer, method)
        if found.foreign:
            where = mixer.place(found.foreign[0])
            return Miss(NAME, 3, "fetched keys are not computed with", where)
        here = attend_sites(mixer, method, found, NAME)
        if isinstance(here, Miss):
            return here
        sites.append(here)
    return attention_match(mixer, NAME, sites)


_PLAIN = """
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.heads = args.heads
        self.qkv = nn.Linear(args.width, 3 * args.width)
        self.out = nn.Linear(args.width, args.width)
        self.rope = nn.RoPE(args.width // args.heads)

    def __call__(self, x, mask=None, cache=None):
        B, L, D = x.shape
        q, k, v = mx.split(self.qkv(x), 3, axis=-1)
        q = q.reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3)
        k = k.reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3)
        v = v.reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3)
        if cache is not None:
            q = self.rope(q, offset=cache.offset)
            k = self.rope(k, offset=cache.offset)
            k, v = cache.update_and_fetch(k, v)
        y = scaled_dot_product_attention(q, k, v, cache=cache, scale=1.0, mask=mask)
        return self.out(y.transpose(0, 2, 1, 3).reshape(B, L, D))
"""

_HELPED = """
import mlx.core as mx
import mlx.nn as nn
from mlx_vlm.models.base import scaled_dot_product_attention

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.qkv = nn.Linear(args.width, 3 * args.width)

    def __call__(self, x, mask=None, cache=None):
        q, k, v, mask = self.projected(x, mask, cache)
        return scaled_dot_product_attention(q, k, v, cache=cache, scale=1.0, mask=mask)

    def projected(self, x, mask, cache):
        q, k, v = (part[:, None] for part in mx.split(self.qkv(x), 3, axis=-1))
        if isinstance(mask, mx.array):
            mask = mask[..., : int(k.shape[-2])]
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        return q, k, v, mask
"""

ACCEPTS = (
    Example("Mix", _HELPED),
    Example("Mix", _PLAIN),
    Example("Mix", _PLAIN.replace("mask=mask)", "mask=mask, sinks=self.out.bias)")),
    Example("Mix", _PLAIN.replace("1.0, mask=mask)", "1.0, mask=mask).astype(v.dtype)")),
    Example(
        "Mix", _PLAIN.replace("q, k, v, cache=cache", "q, k.astype(mx.float32), v, cache=None")
    ),
)
REJECTS = (
    Counter("Mix", _HELPED.replace("return q, k, v, mask", "return q, 2 * k, v, mask"), None),
    Counter("Mix", _HELPED.replace("q, k, v, mask = self", "v, k, q, mask = self"), None),
    Counter(
        "Mix", _PLAIN.replace("        y = ", "        k = mx.roll(k, 1, 2)\n        y = "), None
    ),
    Counter("Mix", _PLAIN.replace("        y = ", "        k = cache.keys\n        y = "), None),
    Counter("Mix", _PLAIN.replace("mask=mask)", "mask=mask + 1)"), None),
)
