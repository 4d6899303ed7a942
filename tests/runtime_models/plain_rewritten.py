"""`plain` as the compiler rewrites it."""

from dataclasses import dataclass

from mlx import nn
from mlx_lm.models.base import BaseModelArgs
from mlxrewrite.runtime.sites import last_rows, paged_attention, paged_mask


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str = "plain"
    width: int = 32
    heads: int = 4
    kv_heads: int = 2
    num_layers: int = 3
    vocab_size: int = 97


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.heads, self.kv_heads = args.heads, args.kv_heads
        size = args.width // args.heads
        self.scale = size**-0.5
        self.q = nn.Linear(args.width, args.heads * size, bias=False)
        self.k = nn.Linear(args.width, args.kv_heads * size, bias=False)
        self.v = nn.Linear(args.width, args.kv_heads * size, bias=False)
        self.o = nn.Linear(args.heads * size, args.width, bias=False)
        self.rope = nn.RoPE(size)

    def __call__(self, x, mask=None, cache=None):
        B, L, _ = x.shape
        queries = self.q(x).reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3)
        keys = self.k(x).reshape(B, L, self.kv_heads, -1).transpose(0, 2, 1, 3)
        values = self.v(x).reshape(B, L, self.kv_heads, -1).transpose(0, 2, 1, 3)
        if cache is not None:
            queries = self.rope(queries, offset=cache.offset)
            keys = self.rope(keys, offset=cache.offset)
            keys, values = cache.update_and_fetch(keys, values)
        else:
            queries, keys = self.rope(queries), self.rope(keys)
        out = paged_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.o(out.transpose(0, 2, 1, 3).reshape(B, L, -1))


class Layer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.attention = Attention(args)
        self.up = nn.Linear(args.width, 2 * args.width)
        self.down = nn.Linear(2 * args.width, args.width)
        self.norms = [nn.RMSNorm(args.width), nn.RMSNorm(args.width)]

    def __call__(self, x, mask=None, cache=None):
        x = x + self.attention(self.norms[0](x), mask, cache)
        return x + self.down(nn.silu(self.up(self.norms[1](x))))


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.embed = nn.Embedding(args.vocab_size, args.width)
        self.layers = [Layer(args) for _ in range(args.num_layers)]
        self.head = nn.Linear(args.width, args.vocab_size, bias=False)

    def __call__(self, inputs, cache=None):
        h = self.embed(inputs)
        if cache is None:
            cache = [None] * len(self.layers)
        mask = paged_mask(h, cache[0])
        cache_ = cache
        for layer, c in zip(self.layers, cache, strict=True):
            h = layer(h, mask, cache=c)
        h = last_rows(h, cache_)
        return self.head(h)
