"""Keys and values are mixed with those of the token before, with two weights for each head."""

from dataclasses import dataclass
from typing import Any, List, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import (
    BaseModelArgs,
    create_attention_mask,
    scaled_dot_product_attention,
)
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    window_layers: List[int]
    window: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads = args.num_attention_heads
        self.n_kv_heads = args.num_key_value_heads
        self.head_dim = args.hidden_size // self.n_heads
        self.scale = self.head_dim**-0.5

        self.q_proj = nn.Linear(args.hidden_size, self.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(args.hidden_size, self.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(args.hidden_size, self.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, args.hidden_size, bias=False)
        self.rope = nn.RoPE(self.head_dim, base=args.rope_theta)
        self.key_taps = mx.zeros((2, self.n_kv_heads, 1, 1))
        self.value_taps = mx.zeros((2, self.n_kv_heads, 1, 1))

    def mixed(self, rows: mx.array, taps: mx.array, before: Optional[mx.array]) -> mx.array:
        if before is None:
            before = mx.zeros_like(rows[:, :, :1])
        if rows.shape[2] > 1:
            before = mx.concatenate([before, rows[:, :, :-1]], axis=2)
        return before * taps[0] + rows * taps[1]

    def __call__(
        self, x: mx.array, mask: Optional[mx.array] = None, cache: Optional[Any] = None
    ) -> mx.array:
        B, L, _ = x.shape
        queries = self.q_proj(x).reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)
        keys = self.k_proj(x).reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
        values = self.v_proj(x).reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)

        offset, key_before, value_before = 0, None, None
        if cache is not None:
            offset = cache[1].offset
            key_before, value_before = cache[0][0], cache[0][1]
            cache[0][0] = keys[:, :, -1:]
            cache[0][1] = values[:, :, -1:]

        keys = self.mixed(keys, self.key_taps, key_before)
        values = self.mixed(values, self.value_taps, value_before)
        queries = self.rope(queries, offset=offset)
        keys = self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache[1].update_and_fetch(keys, values)

        output = scaled_dot_product_attention(
            queries, keys, values, cache=None, scale=self.scale, mask=mask
        )
        output = output.transpose(0, 2, 1, 3).reshape(B, L, -1)
        return self.o_proj(output)


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = MLP(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(
        self, x: mx.array, mask: Optional[mx.array] = None, cache: Optional[Any] = None
    ) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.window = args.window
        self.window_layers = args.window_layers
        self.full_layers = [i for i in range(len(self.layers)) if i not in args.window_layers]

    def __call__(self, inputs: mx.array, cache: Optional[Any] = None) -> mx.array:
        h = self.embed_tokens(inputs)
        if cache is None:
            cache = [(None, None)] * len(self.layers)
            given = [None] * len(self.layers)
        else:
            given = cache
        full = create_attention_mask(h, cache[self.full_layers[0]][1])
        near = create_attention_mask(h, cache[self.window_layers[0]][1], window_size=self.window)
        for i, (layer, c) in enumerate(zip(self.layers, given)):
            h = layer(h, near if i in self.window_layers else full, c)
        return self.norm(h)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Decoder(args)

    def __call__(self, inputs: mx.array, cache: Optional[Any] = None) -> mx.array:
        return self.model.embed_tokens.as_linear(self.model(inputs, cache))

    @property
    def layers(self):
        return self.model.layers

    def make_cache(self):
        caches = []
        for i in range(len(self.layers)):
            near = i in self.args.window_layers
            pages = RotatingKVCache(max_size=self.args.window) if near else KVCache()
            caches.append(CacheList(ArraysCache(size=2), pages))
        return caches
