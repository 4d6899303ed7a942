"""The last layers read the cache of an earlier layer and write none."""

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
    vocab_size: int
    num_kv_shared_layers: int
    sliding_window: int
    layer_types: List[str]
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    rope_local_base_freq: float = 10000.0


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, layer_idx: int, reads_only: bool):
        super().__init__()
        self.n_heads = args.num_attention_heads
        self.n_kv_heads = args.num_key_value_heads
        self.head_dim = args.hidden_size // self.n_heads
        self.scale = self.head_dim**-0.5
        self.reads_only = reads_only

        self.q_proj = nn.Linear(args.hidden_size, self.n_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, args.hidden_size, bias=False)
        if not reads_only:
            rows = self.n_kv_heads * self.head_dim
            self.k_proj = nn.Linear(args.hidden_size, rows, bias=False)
            self.v_proj = nn.Linear(args.hidden_size, rows, bias=False)
        is_sliding = args.layer_types[layer_idx] == "sliding_attention"
        base = args.rope_local_base_freq if is_sliding else args.rope_theta
        self.rope = nn.RoPE(self.head_dim, base=base)

    def __call__(self, x: mx.array, mask: Optional[mx.array], cache: Any, offset: Any) -> mx.array:
        B, L, _ = x.shape
        queries = self.q_proj(x).reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)
        queries = self.rope(queries, offset=offset)

        if self.reads_only:
            keys, values = cache.keys_and_values()
        else:
            keys = self.k_proj(x).reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
            keys = self.rope(keys, offset=offset)
            values = self.v_proj(x).reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
            keys, values = cache.update_and_fetch(keys, values)

        output = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
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
    def __init__(self, args: ModelArgs, layer_idx: int, reads_only: bool):
        super().__init__()
        self.self_attn = Attention(args, layer_idx, reads_only)
        self.mlp = MLP(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Optional[mx.array], cache: Any, offset: Any) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), mask, cache, offset)
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.layer_types = args.layer_types
        self.window_size = args.sliding_window
        owners = args.num_hidden_layers - args.num_kv_shared_layers
        self.owner_types = args.layer_types[:owners]
        # A layer without a cache reads that of the last owner of its own kind.
        last = {kind: i for i, kind in enumerate(self.owner_types)}
        self.cache_index = [
            i if i < owners else last[kind] for i, kind in enumerate(args.layer_types)
        ]
        self.full_index = self.owner_types.index("full_attention")
        self.sliding_index = self.owner_types.index("sliding_attention")

        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, i, i >= owners) for i in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache: Any) -> mx.array:
        h = self.embed_tokens(inputs)
        full_mask = create_attention_mask(h, cache[self.full_index])
        sliding_mask = create_attention_mask(
            h, cache[self.sliding_index], window_size=self.window_size
        )
        # Taken once, before any owner counts on: readers come after their owner.
        offset = cache[0].offset
        for i, layer in enumerate(self.layers):
            mask = full_mask if self.layer_types[i] == "full_attention" else sliding_mask
            h = layer(h, mask, cache[self.cache_index[i]], offset)
        return self.norm(h)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Decoder(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Optional[Any] = None) -> mx.array:
        # The layers that only read need a cache to read from.
        if cache is None:
            cache = self.make_cache()
        return self.lm_head(self.model(inputs, cache))

    @property
    def layers(self):
        return self.model.layers

    def make_cache(self):
        caches = []
        for kind in self.model.owner_types:
            if kind == "full_attention":
                caches.append(KVCache())
            else:
                caches.append(RotatingKVCache(max_size=self.args.sliding_window))
        return caches
