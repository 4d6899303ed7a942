"""A gated causal convolution over a few tokens takes the place of most attention layers."""

from dataclasses import dataclass
from typing import Any, List, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import (
    BaseModelArgs,
    create_attention_mask,
    create_ssm_mask,
    scaled_dot_product_attention,
)
from mlx_lm.models.cache import ArraysCache, KVCache


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    layer_types: List[str]
    conv_kernel: int = 3
    conv_bias: bool = False
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0


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

    def __call__(
        self, x: mx.array, mask: Optional[mx.array] = None, cache: Optional[Any] = None
    ) -> mx.array:
        B, L, _ = x.shape
        queries = self.q_proj(x).reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)
        keys = self.k_proj(x).reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
        values = self.v_proj(x).reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)

        if cache is not None:
            queries = self.rope(queries, offset=cache.offset)
            keys = self.rope(keys, offset=cache.offset)
            keys, values = cache.update_and_fetch(keys, values)
        else:
            queries = self.rope(queries)
            keys = self.rope(keys)

        output = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )
        output = output.transpose(0, 2, 1, 3).reshape(B, L, -1)
        return self.o_proj(output)


class ShortConv(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        dim = args.hidden_size
        self.kernel_size = args.conv_kernel
        self.in_proj = nn.Linear(dim, 3 * dim, bias=args.conv_bias)
        self.conv = nn.Conv1d(dim, dim, args.conv_kernel, groups=dim, bias=args.conv_bias)
        self.out_proj = nn.Linear(dim, dim, bias=args.conv_bias)

    def __call__(
        self, x: mx.array, mask: Optional[mx.array] = None, cache: Optional[Any] = None
    ) -> mx.array:
        B, L, D = x.shape
        before, after, inner = mx.split(self.in_proj(x), 3, axis=-1)
        inner = before * inner
        if mask is not None:
            inner = mx.where(mask[..., None], inner, 0)

        keep = self.kernel_size - 1
        if cache is not None and cache[0] is not None:
            state = cache[0]
        else:
            state = mx.zeros((B, keep, D), dtype=inner.dtype)
        padded = mx.concatenate([state, inner], axis=1)

        if cache is not None:
            if cache.lengths is not None:
                # Rows end at different places: the state is what precedes each row's own end.
                ends = mx.clip(cache.lengths, 0, L)
                positions = ends[:, None] + mx.arange(keep)
                cache[0] = mx.take_along_axis(padded, positions[..., None], axis=1)
            else:
                cache[0] = padded[:, -keep:]
            cache.advance(L)

        return self.out_proj(after * self.conv(padded))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, args: ModelArgs, layer_idx: int):
        super().__init__()
        self.is_attention = args.layer_types[layer_idx] == "full_attention"
        if self.is_attention:
            self.self_attn = Attention(args)
        else:
            self.conv = ShortConv(args)
        self.mlp = MLP(args)
        self.operator_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.ffn_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(
        self, x: mx.array, mask: Optional[mx.array] = None, cache: Optional[Any] = None
    ) -> mx.array:
        operator = self.self_attn if self.is_attention else self.conv
        h = x + operator(self.operator_norm(x), mask, cache)
        return h + self.mlp(self.ffn_norm(h))


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, i) for i in range(args.num_hidden_layers)]
        self.embedding_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.attention_idx = args.layer_types.index("full_attention")
        self.conv_idx = args.layer_types.index("conv")

    def __call__(self, inputs: mx.array, cache: Optional[Any] = None) -> mx.array:
        h = self.embed_tokens(inputs)
        if cache is None:
            cache = [None] * len(self.layers)
        attention_mask = create_attention_mask(h, cache[self.attention_idx])
        conv_mask = create_ssm_mask(h, cache[self.conv_idx])
        for layer, c in zip(self.layers, cache):
            h = layer(h, attention_mask if layer.is_attention else conv_mask, c)
        return self.embedding_norm(h)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Decoder(args)

    def __call__(self, inputs: mx.array, cache: Optional[Any] = None) -> mx.array:
        return self.model.embed_tokens.as_linear(self.model(inputs, cache))

    def sanitize(self, weights):
        # Torch keeps a depthwise kernel as [channels, 1, width], MLX as [channels, width, 1].
        for name, value in weights.items():
            if "conv.conv.weight" in name and value.shape[-1] > value.shape[1]:
                weights[name] = value.transpose(0, 2, 1)
        return weights

    @property
    def layers(self):
        return self.model.layers

    def make_cache(self):
        return [KVCache() if layer.is_attention else ArraysCache(size=1) for layer in self.layers]
