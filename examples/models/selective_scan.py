"""A selective state space that the model scans itself, one token after another."""

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
    inner_size: int
    num_hidden_layers: int
    state_size: int
    step_rank: int
    vocab_size: int
    conv_kernel: int = 4
    rms_norm_eps: float = 1e-5


class Mixer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.state_size = args.state_size
        self.step_rank = args.step_rank
        self.kernel_size = args.conv_kernel
        inner = args.inner_size

        self.in_proj = nn.Linear(args.hidden_size, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, args.conv_kernel, groups=inner)
        self.select = nn.Linear(inner, args.step_rank + 2 * args.state_size, bias=False)
        self.step_norm = nn.RMSNorm(args.step_rank, eps=args.rms_norm_eps)
        self.step_proj = nn.Linear(args.step_rank, inner)
        self.A_log = mx.zeros((inner, args.state_size))
        self.D = mx.ones((inner,))
        self.out_proj = nn.Linear(inner, args.hidden_size, bias=False)

    def token(self, x: mx.array, rates: mx.array, state: Optional[mx.array] = None):
        parts = [self.step_rank, self.step_rank + self.state_size]
        steps, B, C = mx.split(self.select(x), parts, axis=-1)
        steps = nn.softplus(self.step_proj(self.step_norm(steps)))
        new = mx.expand_dims(steps * x, -1) * mx.expand_dims(B, -2)
        if state is not None:
            new = state * mx.exp(mx.expand_dims(steps, -1) * rates) + new
        y = (new @ mx.expand_dims(C, -1)).squeeze(-1)
        return y + self.D * x, new

    def __call__(self, x: mx.array, cache: Optional[Any] = None) -> mx.array:
        B, L, _ = x.shape
        x, gate = mx.split(self.in_proj(x), 2, axis=-1)

        keep = self.kernel_size - 1
        window, state = (cache[0], cache[1]) if cache is not None else (None, None)
        if window is None:
            window = mx.zeros((B, keep, x.shape[-1]), dtype=x.dtype)
        padded = mx.concatenate([window, x], axis=1)
        x = nn.silu(self.conv1d(padded))

        rates = -mx.exp(self.A_log)
        outputs = []
        for t in range(L):
            y, state = self.token(x[:, t], rates, state)
            outputs.append(y)
        y = mx.stack(outputs, axis=1)

        if cache is not None:
            cache[0] = padded[:, -keep:]
            cache[1] = state
        return self.out_proj(y * nn.silu(gate))


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.mixer = Mixer(args)

    def __call__(self, x: mx.array, cache: Optional[Any] = None) -> mx.array:
        return x + self.mixer(self.norm(x), cache)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache: Optional[Any] = None) -> mx.array:
        h = self.embed_tokens(inputs)
        if cache is None:
            cache = [None] * len(self.layers)
        for layer, c in zip(self.layers, cache):
            h = layer(h, c)
        return self.embed_tokens.as_linear(self.norm(h))

    def make_cache(self):
        return [ArraysCache(size=2) for _ in self.layers]
