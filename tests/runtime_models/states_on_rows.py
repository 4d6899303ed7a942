"""A gated delta net and a state space dual as the compiler rewrites them to run on all rows.

Outside of steps their code runs as it is, on sequences of their own: `Alone` gives it such caches.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models import cache as upstream
from mlx_lm.models.base import BaseModelArgs
from mlxrewrite.runtime.caches import ArraysCache
from mlxrewrite.runtime.recurrences import convolve, delta_rule, state_space_dual
from mlxrewrite.runtime.row_states import on_rows, window_state, windows
from mlxrewrite.runtime.sites import last_rows, sequence_mask


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str = "states_on_rows"
    layers: int = 4
    width: int = 32
    heads: int = 4
    key_heads: int = 2
    head_width: int = 8
    taps: int = 4
    vocab_size: int = 61


class Convolution(nn.Module):
    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.taps = taps
        self.conv1d = nn.Conv1d(channels, channels, taps, groups=channels, bias=False)

    def __call__(self, x, cache):
        B, _, channels = x.shape
        keep = self.taps - 1
        if cache is not None and cache[0] is not None:
            state = cache[0]
        else:
            state = mx.zeros((B, keep, channels), x.dtype)
        joined = windows(state, x, keep)
        if cache is not None:
            if cache.lengths is not None:
                raise NotImplementedError
            cache[0] = window_state(joined, keep)
        return nn.silu(convolve(joined, self.conv1d))


class DeltaMixer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.keys, self.values = args.key_heads * args.head_width, args.heads * args.head_width
        self.conv = Convolution(2 * self.keys + self.values, args.taps)
        self.qkv = nn.Linear(args.width, 2 * self.keys + self.values, bias=False)
        self.gates = nn.Linear(args.width, 2 * args.heads, bias=False)
        self.out = nn.Linear(self.values, args.width, bias=False)
        self.A_log, self.dt_bias = mx.zeros(args.heads), mx.ones(args.heads)

    @on_rows
    def __call__(self, x, mask=None, cache=None):
        B, L, _ = x.shape
        mixed = self.conv(self.qkv(x), cache)
        q, k, v = mx.split(mixed, [self.keys, 2 * self.keys], axis=-1)
        q, k = (y.reshape(B, L, self.args.key_heads, -1) for y in (q, k))
        q, k = (mx.fast.rms_norm(y, None, 1e-6) / y.shape[-1] ** 0.5 for y in (q, k))
        a, b = mx.split(self.gates(x), 2, axis=-1)
        state = cache[1] if cache else None
        v = v.reshape(B, L, self.args.heads, -1)
        y, state = delta_rule(q, k, v, a, b, self.A_log, self.dt_bias, state, mask)
        if cache is not None:
            cache[1] = state
            cache.advance(L)
        return self.out(y.reshape(B, L, -1))


class DualMixer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.inner, self.shared = args.heads * args.head_width, 2 * args.key_heads * args.head_width
        self.conv = Convolution(self.inner + self.shared, args.taps)
        self.into = nn.Linear(args.width, self.inner + self.shared + args.heads, bias=False)
        self.out = nn.Linear(self.inner, args.width, bias=False)
        self.A_log, self.D, self.dt_bias = (mx.zeros(args.heads) for _ in range(3))

    @on_rows
    def __call__(self, x, mask=None, cache=None):
        B, L, _ = x.shape
        mixed, dt = mx.split(self.into(x), [self.inner + self.shared], axis=-1)
        mixed = self.conv(mixed, cache)
        x, b, c = mx.split(mixed, [self.inner, self.inner + self.shared // 2], axis=-1)
        b, c = (y.reshape(B, L, self.args.key_heads, -1) for y in (b, c))
        x = x.reshape(B, L, self.args.heads, -1)
        state, lengths = (cache[1], cache.lengths) if cache else (None, None)
        y, state = state_space_dual(
            x, self.A_log, b, c, self.D, dt, self.dt_bias, state, (0.001, 100.0), mask, lengths
        )
        if cache:
            cache[1] = state
        return self.out(y.reshape(B, L, -1))


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.embedding = nn.Embedding(args.vocab_size, args.width)
        self.norms = [nn.RMSNorm(args.width) for _ in range(args.layers)]
        self.layers = [(DeltaMixer, DualMixer)[i % 2](args) for i in range(args.layers)]
        self.head = nn.Linear(args.width, args.vocab_size, bias=False)

    def __call__(self, inputs, cache=None):
        h = self.embedding(inputs)
        h = self.mixed(h, sequence_mask(h, cache[0]), cache)
        return self.head(last_rows(h, cache))

    def mixed(self, h, mask, cache):
        for norm, layer, own in zip(self.norms, self.layers, cache, strict=True):
            h = h + layer(norm(h), mask=mask, cache=own)
        return h

    def make_cache(self):
        return [ArraysCache(size=2) for _ in self.layers]


class Alone:
    """The same model over mlx_lm's caches, one sequence at a time."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = model.layers

    def __call__(self, inputs: mx.array, cache: Any = None) -> Any:
        model = self.model
        return model.head(model.mixed(model.embedding(inputs), None, cache))

    def make_cache(self) -> list[Any]:
        return [upstream.ArraysCache(size=2) for _ in self.layers]
