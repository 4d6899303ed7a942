"""Multi-head attention with the softmax written out, inside the block itself."""

from dataclasses import dataclass
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        dim = args.hidden_size
        self.n_heads = args.num_attention_heads
        self.head_dim = dim // self.n_heads

        self.att_norm = nn.LayerNorm(dim, eps=args.layer_norm_eps, bias=False)
        self.att_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.att_out = nn.Linear(dim, dim, bias=False)
        self.ff_norm = nn.LayerNorm(dim, eps=args.layer_norm_eps, bias=False)
        self.ff_proj = nn.Linear(dim, 2 * args.intermediate_size, bias=False)
        self.ff_out = nn.Linear(args.intermediate_size, dim, bias=False)
        self.rope = nn.RoPE(self.head_dim, base=args.rope_theta)

    def attend(
        self, x: mx.array, mask: Optional[mx.array] = None, cache: Optional[Any] = None
    ) -> mx.array:
        B, L, D = x.shape
        q, k, v = mx.split(self.att_proj(x), 3, axis=-1)
        q = q.reshape(B, L, self.n_heads, self.head_dim).transpose(0, 2, 1, 3)
        k = k.reshape(B, L, self.n_heads, self.head_dim).transpose(0, 2, 1, 3)
        v = v.reshape(B, L, self.n_heads, self.head_dim).transpose(0, 2, 1, 3)

        if cache is not None:
            q = self.rope(q, offset=cache.offset)
            k = self.rope(k, offset=cache.offset)
            k, v = cache.update_and_fetch(k, v)
        else:
            q = self.rope(q)
            k = self.rope(k)

        scores = (q @ k.transpose(0, 1, 3, 2)) * self.head_dim**-0.5
        if mask is not None:
            scores = mx.where(mask, scores, -mx.inf)
        # The sum over keys is taken in float32 whatever the weights are stored in.
        scores = mx.softmax(scores.astype(mx.float32), axis=-1).astype(scores.dtype)
        out = (scores @ v).transpose(0, 2, 1, 3).reshape(B, L, D)
        return self.att_out(out)

    def __call__(
        self, x: mx.array, mask: Optional[mx.array] = None, cache: Optional[Any] = None
    ) -> mx.array:
        h = x + self.attend(self.att_norm(x), mask, cache)
        up, gate = mx.split(self.ff_proj(self.ff_norm(h)), 2, axis=-1)
        return h + self.ff_out(nn.silu(gate) * up)


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_eps, bias=False)

    def __call__(self, inputs: mx.array, cache: Optional[Any] = None) -> mx.array:
        h = self.embed_tokens(inputs)
        if cache is None:
            cache = [None] * len(self.layers)
        mask = create_attention_mask(h, cache[0], return_array=True)
        for layer, c in zip(self.layers, cache):
            h = layer(h, mask, c)
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
