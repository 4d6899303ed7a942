"""Linear attention with a fixed decay per head, as a loop over tokens."""

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


def recurrence(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, state: Optional[mx.array] = None
):
    """Decay the state, add one outer product and read it, token after token.

    q, k: [B, H, L, Dk]; v: [B, H, L, Dv]; decay: [H, 1, 1]; state: [B, H, Dk, Dv].
    """
    B, H, L, Dk = q.shape
    if state is None:
        state = mx.zeros((B, H, Dk, v.shape[-1]), dtype=mx.float32)
    outputs = []
    for t in range(L):
        write = k[:, :, t : t + 1].swapaxes(-1, -2) @ v[:, :, t : t + 1]
        state = state * decay + write
        outputs.append(q[:, :, t : t + 1] @ state)
    return mx.concatenate(outputs, axis=2), state


class LinearAttention(nn.Module):
    def __init__(self, args: ModelArgs, layer_idx: int):
        super().__init__()
        dim = args.hidden_size
        self.n_heads = args.num_attention_heads
        self.head_dim = dim // self.n_heads
        self.scale = self.head_dim**-0.5

        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.gate_proj = nn.Linear(dim, dim, bias=False)
        self.out_norm = nn.RMSNorm(dim, eps=args.rms_norm_eps)
        self.out_proj = nn.Linear(dim, dim, bias=False)

        # Heads forget at geometrically spaced rates, and later layers forget more slowly.
        slopes = 2.0 ** (-8.0 * mx.arange(1, self.n_heads + 1) / self.n_heads)
        slower = 1 - layer_idx / max(1, args.num_hidden_layers - 1) + 1e-5
        self._decay = mx.exp(-slopes * slower)[:, None, None]

    def __call__(self, x: mx.array, cache: Optional[Any] = None) -> mx.array:
        B, L, D = x.shape
        q, k, v = mx.split(self.qkv_proj(x), 3, axis=-1)
        q = nn.silu(q).reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)
        k = nn.silu(k).reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)
        v = v.reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)

        state = cache[0] if cache is not None else None
        out, state = recurrence(q * self.scale, k, v, self._decay, state)
        if cache is not None:
            cache[0] = state

        out = out.astype(x.dtype).transpose(0, 2, 1, 3).reshape(B, L, D)
        return self.out_proj(self.out_norm(out) * mx.sigmoid(self.gate_proj(x)))


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
        self.attention = LinearAttention(args, layer_idx)
        self.mlp = MLP(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, x: mx.array, cache: Optional[Any] = None) -> mx.array:
        h = x + self.attention(self.input_layernorm(x), cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, i) for i in range(args.num_hidden_layers)]
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
        return [ArraysCache(size=1) for _ in self.layers]
