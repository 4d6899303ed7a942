"""No attention at all: a convolution and a selective state space in every layer."""

from dataclasses import dataclass
from typing import Any, Optional, Tuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_ssm_mask
from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.ssm import ssm_update


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    head_dim: int
    n_groups: int
    state_size: int
    vocab_size: int
    conv_kernel: int = 4
    layer_norm_epsilon: float = 1e-5
    time_step_limit: Tuple[float, float] = (0.0, 100.0)


class GatedNorm(nn.Module):
    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        return mx.fast.rms_norm(x * nn.silu(gate), self.weight, self.eps)


class Mixer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.num_heads = args.num_heads
        self.head_dim = args.head_dim
        self.n_groups = args.n_groups
        self.state_size = args.state_size
        self.kernel_size = args.conv_kernel
        self.time_step_limit = args.time_step_limit
        self.inner = args.num_heads * args.head_dim
        self.conv_dim = self.inner + 2 * args.n_groups * args.state_size

        rows = self.inner + self.conv_dim + args.num_heads
        self.in_proj = nn.Linear(args.hidden_size, rows, bias=False)
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, self.kernel_size, groups=self.conv_dim, bias=True
        )
        self.A_log = mx.log(mx.arange(1, args.num_heads + 1, dtype=mx.float32))
        self.D = mx.ones((args.num_heads,))
        self.dt_bias = mx.ones((args.num_heads,))
        self.norm = GatedNorm(self.inner, args.layer_norm_epsilon)
        self.out_proj = nn.Linear(self.inner, args.hidden_size, bias=False)

    def convolve(self, x: mx.array, mask: Optional[mx.array], cache: Optional[Any]) -> mx.array:
        if mask is not None:
            x = mx.where(mask[..., None], x, 0)
        keep = self.kernel_size - 1
        if cache is None:
            x = mx.pad(x, [(0, 0), (keep, 0), (0, 0)])
        else:
            L = x.shape[1]
            state = cache[0]
            if state is None:
                state = mx.zeros((x.shape[0], keep, self.conv_dim), dtype=x.dtype)
            x = mx.concatenate([state, x], axis=1)
            if cache.lengths is not None:
                ends = mx.clip(cache.lengths, 0, L)
                rows = ends[:, None] + mx.arange(keep)
                cache[0] = mx.take_along_axis(x, rows[..., None], axis=1)
            else:
                cache[0] = x[:, -keep:, :]
        return nn.silu(self.conv1d(x))

    def __call__(
        self, x: mx.array, mask: Optional[mx.array] = None, cache: Optional[Any] = None
    ) -> mx.array:
        B, L, _ = x.shape
        gate, xBC, dt = mx.split(self.in_proj(x), [self.inner, self.inner + self.conv_dim], axis=-1)
        xBC = self.convolve(xBC, mask, cache)

        n = self.n_groups * self.state_size
        hidden, to_state, from_state = mx.split(xBC, [self.inner, self.inner + n], axis=-1)
        state = cache[1] if cache is not None else None
        lengths = cache.lengths if cache is not None else None
        y, state = ssm_update(
            hidden.reshape(B, L, self.num_heads, self.head_dim),
            self.A_log,
            to_state.reshape(B, L, self.n_groups, self.state_size),
            from_state.reshape(B, L, self.n_groups, self.state_size),
            self.D,
            dt,
            self.dt_bias,
            state,
            self.time_step_limit,
            mask,
            lengths,
        )
        if cache is not None:
            cache[1] = state
            cache.advance(L)

        return self.out_proj(self.norm(y.reshape(B, L, -1), gate))


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.mixer = Mixer(args)
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.layer_norm_epsilon)

    def __call__(
        self, x: mx.array, mask: Optional[mx.array] = None, cache: Optional[Any] = None
    ) -> mx.array:
        return x + self.mixer(self.norm(x), mask, cache)


class Backbone(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm_f = nn.RMSNorm(args.hidden_size, eps=args.layer_norm_epsilon)

    def __call__(self, inputs: mx.array, cache: Optional[Any] = None) -> mx.array:
        x = self.embeddings(inputs)
        if cache is None:
            cache = [None] * len(self.layers)
        mask = create_ssm_mask(x, cache[0])
        for layer, c in zip(self.layers, cache):
            x = layer(x, mask, c)
        return self.norm_f(x)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.backbone = Backbone(args)

    def __call__(self, inputs: mx.array, cache: Optional[Any] = None) -> mx.array:
        return self.backbone.embeddings.as_linear(self.backbone(inputs, cache))

    def sanitize(self, weights):
        for name, value in weights.items():
            if "conv1d.weight" in name and value.shape[-1] != 1:
                weights[name] = value.moveaxis(2, 1)
        return weights

    @property
    def layers(self):
        return self.backbone.layers

    def make_cache(self):
        return [ArraysCache(size=2) for _ in self.layers]
