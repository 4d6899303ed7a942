"""`hybrid` with the whole model run once per sequence."""

from dataclasses import dataclass

import mlx.core as mx
from mlx import nn
from mlx_lm.models.base import (
    BaseModelArgs,
    create_attention_mask,
    create_ssm_mask,
    scaled_dot_product_attention,
)
from mlxrewrite.runtime.caches import ArraysCache, CacheList, KVCache, RotatingKVCache
from mlxrewrite.runtime.sites import per_sequence_model


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str = "hybrid"
    width: int = 32
    heads: int = 4
    taps: int = 3
    window: int = 4
    vocab_size: int = 97


class Convolution(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.taps = args.taps
        self.conv = nn.Conv1d(args.width, args.width, args.taps, groups=args.width)

    def __call__(self, x, mask=None, cache=None):
        if mask is not None:
            x = mx.where(mask[..., None], x, 0)
        state = cache[0]
        if state is None:
            state = mx.zeros((x.shape[0], self.taps - 1, x.shape[2]), x.dtype)
        padded = mx.concatenate([state, x], axis=1)
        if isinstance(cache, ArraysCache):
            cache[0] = padded[:, 1 - self.taps :]
            cache.advance(x.shape[1])
        return self.conv(padded)


class Recurrence(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.gate = nn.Linear(args.width, args.width)
        self.value = nn.Linear(args.width, args.width)

    def __call__(self, x, first, cache=None):
        a, v = mx.sigmoid(self.gate(x)), self.value(x)
        first = v if first is None else first
        state, outputs = cache[1], []
        for t in range(x.shape[1]):
            state = v[:, t] if state is None else a[:, t] * state + (1 - a[:, t]) * v[:, t]
            outputs.append(state)
        cache[1] = state
        return mx.stack(outputs, axis=1) + 0.5 * first, first


class Attention(nn.Module):
    """Materialises its scores, so it cannot read pages."""

    def __init__(self, args):
        super().__init__()
        self.heads = args.heads
        self.qkv = nn.Linear(args.width, 3 * args.width, bias=False)
        self.rope = nn.RoPE(args.width // args.heads)

    def __call__(self, x, scale, mask=None, cache=None):
        B, L, D = x.shape
        q, k, v = mx.split(self.qkv(x), 3, axis=-1)
        q = q.reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3)
        k = k.reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3)
        v = v.reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3)
        q = self.rope(q, offset=cache[1].offset) * scale
        k = self.rope(k, offset=cache[1].offset)
        if cache[0][0] is None:
            cache[0][0] = mx.zeros((B, 1, D), x.dtype)
        x = mx.concatenate([cache[0][0], x], axis=1)
        cache[0][0] = x[:, -1:]
        k, v = cache[1].update_and_fetch(k, v)
        scores = q @ k.swapaxes(-1, -2)
        if mask is not None:
            scores = mx.where(mask, scores, -mx.inf)
        out = mx.softmax(scores, axis=-1) @ v
        return out.transpose(0, 2, 1, 3).reshape(B, L, D) + x[:, :-1]


class PlainAttention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.heads = args.heads
        self.qkv = nn.Linear(args.width, 3 * args.width, bias=False)
        self.rope = nn.RoPE(args.width // args.heads)

    def __call__(self, x, mask=None, cache=None):
        B, L, D = x.shape
        q, k, v = mx.split(self.qkv(x), 3, axis=-1)
        q = self.rope(q.reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3), offset=cache.offset)
        k = self.rope(k.reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3), offset=cache.offset)
        v = v.reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3)
        k, v = cache.update_and_fetch(k, v)
        out = scaled_dot_product_attention(q, k, v, cache=cache, scale=0.3, mask=mask)
        return out.transpose(0, 2, 1, 3).reshape(B, L, D)


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.embed = nn.Embedding(args.vocab_size, args.width)
        self.convolution = Convolution(args)
        self.recurrences = [Recurrence(args), Recurrence(args)]
        self.attention = Attention(args)
        self.plain = PlainAttention(args)
        self.norm = nn.RMSNorm(args.width)
        self.head = nn.Linear(args.width, args.vocab_size, bias=False)
        self.layers = []

    @per_sequence_model
    def __call__(self, inputs, cache=None):
        h = self.embed(inputs)
        state_mask = create_ssm_mask(h, cache[0])
        mask = create_attention_mask(
            h, cache[1][1], window_size=self.args.window, return_array=True
        )
        plain_mask = create_attention_mask(h, cache[3])
        offset = cache[1][1].offset
        scale = (1 + 0.1 * mx.arange(offset, offset + h.shape[1]))[:, None]
        h = h + self.convolution(self.norm(h), state_mask, cache[0])
        r, first = self.recurrences[0](self.norm(h), None, cache[0])
        h = h + r
        h = h + self.attention(self.norm(h), scale, mask, cache[1])
        h = h + self.plain(self.norm(h), plain_mask, cache[3])
        r, first = self.recurrences[1](self.norm(h), first, cache=cache[2])
        return self.head(self.norm(h + r))

    def make_cache(self):
        return [
            ArraysCache(2),
            CacheList(ArraysCache(size=1), RotatingKVCache(max_size=self.args.window)),
            ArraysCache(size=2),
            KVCache(),
        ]
