"""Selective state spaces: arrays, and what the rule makes of them in float64, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 6e-3}


@dataclass(frozen=True)
class Case:
    count: int = 2
    length: int = 1
    channels: int = 40
    states: int = 16
    dtype: str = "float32"
    weights: str = "float32"
    begun: bool = True
    hard: bool = False  # from all to nothing is kept

    def arrays(self) -> list[mx.array]:
        rng = np.random.default_rng(3)
        shape, inner = (self.count, self.length, self.channels), (self.count, self.length)
        x = rng.standard_normal(shape)
        delta = np.exp(rng.uniform(-7, 3 if self.hard else -1, shape))
        A = -np.exp(rng.uniform(-1, 3, (self.channels, self.states)))
        B, C = (rng.standard_normal((*inner, self.states)) for _ in range(2))
        D = rng.standard_normal(self.channels)
        kinds = [self.dtype] * 2 + [self.weights] + [self.dtype] * 2 + [self.weights]
        made = [
            mx.array(part.astype(np.float32)).astype(DTYPES[kind])
            for part, kind in zip((x, delta, A, B, C, D), kinds, strict=True)
        ]
        state = rng.standard_normal((self.count, self.channels, self.states))
        return [*made, mx.array(state.astype(np.float32)) if self.begun else None]


def exact(arrays: list[mx.array]) -> tuple[np.ndarray, np.ndarray]:
    x, delta, A, B, C, D = (np.array(p.astype(mx.float32)).astype(np.float64) for p in arrays[:6])
    shape = (x.shape[0], *A.shape)
    state = np.zeros(shape) if arrays[6] is None else np.array(arrays[6]).astype(np.float64)
    outputs = []
    for t in range(x.shape[1]):
        state = state * np.exp(delta[:, t, :, None] * A)
        state = state + (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
        outputs.append(np.einsum("nms,ns->nm", state, C[:, t]) + D * x[:, t])
    return np.stack(outputs, 1), state


def error(got: mx.array, want: np.ndarray) -> float:
    found = np.array(got.astype(mx.float32)).astype(np.float64)
    assert found.shape == want.shape
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))
