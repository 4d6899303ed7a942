"""Positions are rows of a table, added to the embedding before the first layer."""

from dataclasses import dataclass
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int = 1024
    layer_norm_epsilon: float = 1e-5


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_head = args.num_attention_heads
        self.scale = (args.hidden_size // self.n_head) ** -0.5
        self.c_attn = nn.Linear(args.hidden_size, 3 * args.hidden_size, bias=True)
        self.c_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=True)

    def __call__(
        self, x: mx.array, mask: Optional[mx.array] = None, cache: Optional[Any] = None
    ) -> mx.array:
        B, L, D = x.shape
        queries, keys, values = mx.split(self.c_attn(x), 3, axis=-1)
        queries = queries.reshape(B, L, self.n_head, -1).transpose(0, 2, 1, 3)
        keys = keys.reshape(B, L, self.n_head, -1).transpose(0, 2, 1, 3)
        values = values.reshape(B, L, self.n_head, -1).transpose(0, 2, 1, 3)

        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)

        output = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )
        return self.c_proj(output.transpose(0, 2, 1, 3).reshape(B, L, D))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.fc_in = nn.Linear(args.hidden_size, args.intermediate_size)
        self.fc_out = nn.Linear(args.intermediate_size, args.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc_out(nn.gelu_approx(self.fc_in(x)))


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attn = Attention(args)
        self.mlp = MLP(args)
        self.ln_1 = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)
        self.ln_2 = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)

    def __call__(
        self, x: mx.array, mask: Optional[mx.array] = None, cache: Optional[Any] = None
    ) -> mx.array:
        h = x + self.attn(self.ln_1(x), mask, cache)
        return h + self.mlp(self.ln_2(h))


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.wte = nn.Embedding(args.vocab_size, args.hidden_size)
        self.wpe = nn.Embedding(args.max_position_embeddings, args.hidden_size)
        self.h = [Block(args) for _ in range(args.num_hidden_layers)]
        self.ln_f = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)

    def __call__(self, inputs: mx.array, cache: Optional[Any] = None) -> mx.array:
        _, L = inputs.shape
        if cache is None:
            cache = [None] * len(self.h)

        offset = mx.array(cache[0].offset if cache[0] is not None else 0)
        # One row of positions, or one per sequence if the cache counts each for itself.
        positions = offset[..., None] + mx.arange(L)
        x = self.wte(inputs) + self.wpe(positions)

        mask = create_attention_mask(x, cache[0])
        for block, c in zip(self.h, cache):
            x = block(x, mask, c)
        return self.ln_f(x)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Decoder(args)

    def __call__(self, inputs: mx.array, cache: Optional[Any] = None) -> mx.array:
        return self.model.wte.as_linear(self.model(inputs, cache))

    @property
    def layers(self):
        return self.model.h
