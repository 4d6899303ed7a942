"""`shared_windows` as the compiler rewrites it."""

from dataclasses import dataclass

import mlx.core as mx
from mlx import nn
from mlx_lm.models.base import BaseModelArgs
from mlxrewrite.runtime.caches import ChunkedKVCache, KVCache, RotatingKVCache
from mlxrewrite.runtime.sites import (
    chunked_mask,
    last_rows,
    paged_attention,
    paged_mask,
    row_positions,
)

KINDS = ("full", "window", "chunk")


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str = "shared_windows"
    width: int = 32
    heads: int = 4
    kv_heads: int = 2
    value_dim: int = 3
    window: int = 5
    chunk: int = 6
    vocab_size: int = 97


class Attention(nn.Module):
    def __init__(self, args, shares):
        super().__init__()
        self.heads, self.kv_heads, self.shares = args.heads, args.kv_heads, shares
        size = args.width // args.heads
        self.scale = size**-0.5
        self.q = nn.Linear(args.width, args.heads * size, bias=False)
        if not shares:
            self.k = nn.Linear(args.width, args.kv_heads * size, bias=False)
            self.v = nn.Linear(args.width, args.kv_heads * args.value_dim, bias=False)
        self.o = nn.Linear(args.heads * args.value_dim, args.width, bias=False)
        self.rope = nn.RoPE(size)
        self.sinks = mx.zeros((args.heads,))

    def __call__(self, x, mask=None, cache=None, offset=0):
        B, L, _ = x.shape
        queries = self.q(x).reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3)
        queries = self.rope(queries, offset=offset)
        queries = queries * (1 + 0.1 * row_positions(offset))
        if self.shares:
            keys, values = cache.keys_and_values()
        else:
            keys = self.k(x).reshape(B, L, self.kv_heads, -1).transpose(0, 2, 1, 3)
            values = self.v(x).reshape(B, L, self.kv_heads, -1).transpose(0, 2, 1, 3)
            keys, values = cache.update_and_fetch(self.rope(keys, offset=offset), values)
        out = paged_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask, sinks=self.sinks
        )
        return self.o(out.transpose(0, 2, 1, 3).reshape(B, L, -1))


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.embed = nn.Embedding(args.vocab_size, args.width)
        self.layers = [Attention(args, i >= len(KINDS)) for i in range(2 * len(KINDS))]
        self.norm = nn.RMSNorm(args.width)
        self.head = nn.Linear(args.width, args.vocab_size, bias=False)

    def __call__(self, inputs, cache=None):
        h = self.embed(inputs)
        cache[2].maybe_trim_front()
        offset = cache[2].offset
        masks = (
            paged_mask(h, cache[0]),
            paged_mask(h, cache[1], window_size=self.args.window),
            chunked_mask(cache[2], self.args.chunk),
        )
        for index, layer in enumerate(self.layers):
            kind = index % len(KINDS)
            h = h + layer(self.norm(h), masks[kind], cache[kind], offset=offset)
        return self.head(last_rows(h, cache))

    def make_cache(self):
        return [KVCache(), RotatingKVCache(self.args.window), ChunkedKVCache(self.args.chunk)]
