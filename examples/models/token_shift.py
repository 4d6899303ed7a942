"""Token shift, and a matrix state whose transition is diagonal plus a product (arXiv 2503.14456)."""

from dataclasses import dataclass
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.cache import ArraysCache


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-6


def delayed(h: mx.array, last: Optional[mx.array] = None) -> mx.array:
    """The token before each: h [B, L, D], and the last token of before [B, 1, D]."""
    if last is None:
        last = mx.zeros((h.shape[0], 1, h.shape[2]), h.dtype)
    return mx.concatenate([last, h[:, :-1]], axis=1)


class TimeMix(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        dim = args.hidden_size
        self.heads = args.num_attention_heads
        self.amount = 0.1 * mx.ones((6, dim))
        self.query_proj = nn.Linear(dim, dim, bias=False)
        self.key_proj = nn.Linear(dim, dim, bias=False)
        self.value_proj = nn.Linear(dim, dim, bias=False)
        self.keep_proj = nn.Linear(dim, dim)
        self.rate_proj = nn.Linear(dim, dim)
        self.gate_proj = nn.Linear(dim, dim, bias=False)
        self.out_norm = nn.RMSNorm(dim // self.heads, eps=args.rms_norm_eps)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def scan(self, query, keep, key, value, erase, write, memory):
        """Rows [B, L, H, D] through memory [B, H, D, D], one after another."""
        batch, length, heads, width = query.shape
        if memory is None:
            memory = mx.zeros((batch, heads, width, width), dtype=query.dtype)
        found = []
        for t in range(length):
            erased = (memory @ erase[:, t][..., None]) @ write[:, t][..., None, :]
            added = value[:, t][..., None] @ key[:, t][..., None, :]
            memory = memory * keep[:, t][..., None, :] + erased + added
            found.append(memory @ query[:, t][..., None])
        return mx.stack(found, axis=1).astype(query.dtype), memory

    def __call__(self, x: mx.array, cache: Optional[Any] = None) -> mx.array:
        B, L, D = x.shape
        last, memory = (cache[0], cache[1]) if cache is not None else (None, None)
        change = delayed(x, last) - x
        q, k, v, w, a, g = (x + change * amount for amount in self.amount)
        query, key, value, rate = (
            part.reshape(B, L, self.heads, -1)
            for part in (
                self.query_proj(q),
                self.key_proj(k),
                self.value_proj(v),
                mx.sigmoid(self.rate_proj(a)),
            )
        )
        keep = mx.exp(-0.6 * mx.sigmoid(self.keep_proj(w))).reshape(B, L, self.heads, -1)
        unit = key / mx.maximum(mx.linalg.norm(key, axis=-1, keepdims=True), 1e-6)
        out, memory = self.scan(query, keep, key * rate, value, -unit, unit * rate, memory)
        if cache is not None:
            cache[0] = x[:, -1:]
            cache[1] = memory
        out = self.out_norm(out.reshape(B, L, self.heads, -1)).reshape(B, L, D)
        return self.out_proj(out * mx.sigmoid(self.gate_proj(g)))


class ChannelMix(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.amount = 0.1 * mx.ones((args.hidden_size,))
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array, cache: Optional[Any] = None) -> mx.array:
        last = cache[2] if cache is not None else None
        mixed = x + (delayed(x, last) - x) * self.amount
        if cache is not None:
            cache[2] = x[:, -1:, :]
        return self.down_proj(nn.relu(self.up_proj(mixed)) ** 2)


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.time = TimeMix(args)
        self.channel = ChannelMix(args)
        self.time_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.channel_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, x: mx.array, cache: Optional[Any] = None) -> mx.array:
        h = x + self.time(self.time_norm(x), cache)
        return h + self.channel(self.channel_norm(h), cache)


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache: Optional[Any] = None) -> mx.array:
        h = self.embed_tokens(inputs)
        if cache is None:
            cache = [None] * len(self.layers)
        for layer, c in zip(self.layers, cache):
            h = layer(h, c)
        return self.norm(h)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Decoder(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Optional[Any] = None) -> mx.array:
        return self.lm_head(self.model(inputs, cache))

    @property
    def layers(self):
        return self.model.layers

    def make_cache(self):
        return [ArraysCache(size=3) for _ in self.layers]
