"""The last layers have no keys of their own and are handed those of an earlier layer."""

from dataclasses import dataclass
from typing import Any, Optional, Tuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    num_kv_shared_layers: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, layer_idx: int):
        super().__init__()
        self.n_heads = args.num_attention_heads
        self.n_kv_heads = args.num_key_value_heads
        self.head_dim = args.hidden_size // self.n_heads
        self.scale = self.head_dim**-0.5
        self.has_kv = layer_idx < args.num_hidden_layers - args.num_kv_shared_layers

        self.q_proj = nn.Linear(args.hidden_size, self.n_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, args.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=args.rms_norm_eps)
        if self.has_kv:
            rows = self.n_kv_heads * self.head_dim
            self.k_proj = nn.Linear(args.hidden_size, rows, bias=False)
            self.v_proj = nn.Linear(args.hidden_size, rows, bias=False)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=args.rms_norm_eps)
        self.rope = nn.RoPE(self.head_dim, base=args.rope_theta)

    def __call__(
        self,
        x: mx.array,
        mask: Optional[mx.array] = None,
        cache: Optional[Any] = None,
        shared_kv: Optional[Tuple[mx.array, mx.array]] = None,
        offset: Optional[Any] = None,
    ):
        B, L, _ = x.shape
        queries = self.q_proj(x).reshape(B, L, self.n_heads, self.head_dim)
        queries = self.q_norm(queries)

        if shared_kv is not None:
            keys, values = shared_kv
        else:
            # A copy: a cache that counts in place would move the offset under the layers that
            # come after it.
            offset = mx.array(cache.offset) if cache is not None else 0
            keys = self.k_proj(x).reshape(B, L, self.n_kv_heads, self.head_dim)
            keys = self.k_norm(keys).transpose(0, 2, 1, 3)
            keys = self.rope(keys, offset=offset)
            values = self.v_proj(x).reshape(B, L, self.n_kv_heads, self.head_dim)
            values = values.transpose(0, 2, 1, 3)
            if cache is not None:
                keys, values = cache.update_and_fetch(keys, values)

        queries = self.rope(queries.transpose(0, 2, 1, 3), offset=offset)
        output = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )
        output = output.transpose(0, 2, 1, 3).reshape(B, L, -1)
        return self.o_proj(output), (keys, values), offset


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, args: ModelArgs, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(args, layer_idx)
        self.mlp = MLP(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(
        self,
        x: mx.array,
        mask: Optional[mx.array] = None,
        cache: Optional[Any] = None,
        shared_kv: Optional[Tuple[mx.array, mx.array]] = None,
        offset: Optional[Any] = None,
    ):
        r, kv, offset = self.self_attn(self.input_layernorm(x), mask, cache, shared_kv, offset)
        h = x + r
        h = h + self.mlp(self.post_attention_layernorm(h))
        return h, kv, offset


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.num_owners = args.num_hidden_layers - args.num_kv_shared_layers
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, i) for i in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache: Optional[Any] = None) -> mx.array:
        h = self.embed_tokens(inputs)
        if cache is None:
            cache = [None] * self.num_owners
        # Only owners have a cache.
        cache = cache + [None] * (len(self.layers) - len(cache))
        mask = create_attention_mask(h, cache[0])

        kv, offset = None, None
        for i, (layer, c) in enumerate(zip(self.layers, cache)):
            shared = kv if i >= self.num_owners else None
            h, kv, offset = layer(h, mask, c, shared, offset)
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
        return [KVCache() for _ in range(self.model.num_owners)]
