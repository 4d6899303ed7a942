"""A learned score per head joins the softmax and takes weight, but has no value."""

from dataclasses import dataclass
from typing import Any, List, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int
    layer_types: Optional[List[str]] = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150000.0

    def __post_init__(self):
        if self.layer_types is None:
            kinds = ["sliding_attention", "full_attention"]
            self.layer_types = [kinds[i % 2] for i in range(self.num_hidden_layers)]


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.num_heads = args.num_attention_heads
        self.num_kv_heads = args.num_key_value_heads
        self.sm_scale = args.head_dim**-0.5

        self.sinks = mx.zeros((self.num_heads,))
        self.q_proj = nn.Linear(args.hidden_size, self.num_heads * self.head_dim, bias=True)
        self.k_proj = nn.Linear(args.hidden_size, self.num_kv_heads * self.head_dim, bias=True)
        self.v_proj = nn.Linear(args.hidden_size, self.num_kv_heads * self.head_dim, bias=True)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, args.hidden_size, bias=True)
        self.rope = nn.RoPE(self.head_dim, base=args.rope_theta)

    def __call__(
        self, x: mx.array, mask: Optional[mx.array] = None, cache: Optional[Any] = None
    ) -> mx.array:
        B, L, _ = x.shape
        q = self.q_proj(x).reshape(B, L, -1, self.head_dim).swapaxes(1, 2)
        k = self.k_proj(x).reshape(B, L, -1, self.head_dim).swapaxes(1, 2)
        v = self.v_proj(x).reshape(B, L, -1, self.head_dim).swapaxes(1, 2)

        if cache is not None:
            q = self.rope(q, offset=cache.offset)
            k = self.rope(k, offset=cache.offset)
            k, v = cache.update_and_fetch(k, v)
        else:
            q = self.rope(q)
            k = self.rope(k)

        out = scaled_dot_product_attention(
            q, k, v, cache, self.sm_scale, mask=mask, sinks=self.sinks
        )
        return self.o_proj(out.swapaxes(1, 2).reshape(B, L, -1))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate_up_proj = nn.Linear(args.hidden_size, 2 * args.intermediate_size, bias=True)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=True)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        # The gate is clipped from above, the linear branch from both sides.
        gate = mx.minimum(gate, 7.0)
        up = mx.clip(up, -7.0, 7.0)
        return self.down_proj(gate * mx.sigmoid(1.702 * gate) * (up + 1))


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
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.layer_types = args.layer_types
        self.sliding_window = args.sliding_window
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in args.layer_types]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.swa_idx = args.layer_types.index("sliding_attention")
        self.full_idx = args.layer_types.index("full_attention")

    def __call__(self, inputs: mx.array, cache: Optional[Any] = None) -> mx.array:
        x = self.embed_tokens(inputs)
        if cache is None:
            cache = [None] * len(self.layers)

        full_mask = create_attention_mask(x, cache[self.full_idx])
        swa_mask = create_attention_mask(x, cache[self.swa_idx], window_size=self.sliding_window)

        for layer, c, layer_type in zip(self.layers, cache, self.layer_types):
            mask = full_mask if layer_type == "full_attention" else swa_mask
            x = layer(x, mask, c)
        return self.norm(x)


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
        return [
            KVCache()
            if layer_type == "full_attention"
            else RotatingKVCache(max_size=self.args.sliding_window)
            for layer_type in self.args.layer_types
        ]
