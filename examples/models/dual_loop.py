"""The stack runs twice; the second time a gate mixes the first run's keys with a window."""

from dataclasses import dataclass
from typing import Any, Optional

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
    vocab_size: int
    loop_window_size: int
    rms_norm_eps: float = 1e-6
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

    def project(self, x: mx.array, offset: Any):
        B, L, _ = x.shape
        queries = self.q_proj(x).reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)
        keys = self.k_proj(x).reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
        values = self.v_proj(x).reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
        return self.rope(queries, offset=offset), self.rope(keys, offset=offset), values

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: Optional[mx.array] = None,
        cache: Optional[Any] = None,
    ) -> mx.array:
        return scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )

    def merge(self, heads: mx.array) -> mx.array:
        B, _, L, _ = heads.shape
        return self.o_proj(heads.transpose(0, 2, 1, 3).reshape(B, L, -1))


class Gate(nn.Module):
    """How much of the first run a head takes, from its query: [B, heads, L, 1]."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        head_dim = args.hidden_size // args.num_attention_heads
        self.weight = mx.zeros((args.num_attention_heads, head_dim))
        self.bias = mx.zeros((args.num_attention_heads,))

    def __call__(self, queries: mx.array) -> mx.array:
        score = (queries * self.weight[:, None, :]).sum(axis=-1, keepdims=True)
        return mx.sigmoid(score + self.bias[:, None, None])


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


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.window_size = args.loop_window_size
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.gates = [Gate(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache: Optional[Any] = None) -> mx.array:
        h = self.embed_tokens(inputs)
        n = len(self.layers)
        if cache is None:
            cache = [None] * (2 * n)

        mask = create_attention_mask(h, cache[0])
        window_mask = create_attention_mask(h, cache[n], window_size=self.window_size)

        first_run = []
        for layer, c in zip(self.layers, cache[:n]):
            offset = c.offset if c is not None else 0
            q, k, v = layer.self_attn.project(layer.input_layernorm(h), offset)
            if c is not None:
                k, v = c.update_and_fetch(k, v)
            first_run.append((k, v))
            h = h + layer.self_attn.merge(layer.self_attn.attend(q, k, v, mask, c))
            h = h + layer.mlp(layer.post_attention_layernorm(h))

        for layer, gate, c, (first_k, first_v) in zip(
            self.layers, self.gates, cache[n:], first_run
        ):
            offset = c.offset if c is not None else 0
            q, k, v = layer.self_attn.project(layer.input_layernorm(h), offset)
            # These keys are another cache's than the one passed along.
            far = layer.self_attn.attend(q, first_k, first_v, mask, c)
            if c is not None:
                k, v = c.update_and_fetch(k, v)
            near = layer.self_attn.attend(q, k, v, window_mask, c)
            share = gate(q)
            h = h + layer.self_attn.merge(share * far + (1 - share) * near)
            h = h + layer.mlp(layer.post_attention_layernorm(h))

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
        full = [KVCache() for _ in self.layers]
        window = [RotatingKVCache(max_size=self.args.loop_window_size) for _ in self.layers]
        return full + window
