"""Cases for states with a transition that is diagonal plus a product, and the answer in float64."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
TOLERANCE = {"float32": 4e-6, "float16": 1e-3, "bfloat16": 6e-3}


@dataclass(frozen=True)
class Case:
    count: int = 2
    length: int = 1
    heads: int = 3
    key_dim: int = 32
    value_dim: int = 16
    dtype: str = "float32"
    hard: bool = False  # keys that are nearly equal, decays that are 0, 1, tiny or negative

    def arrays(self) -> list[mx.array]:
        rng = np.random.default_rng(3)
        shape = (self.count, self.length, self.heads, self.key_dim)
        kappa = rng.standard_normal(shape)
        kappa = 1 + 0.05 * kappa if self.hard else kappa
        kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
        rate = rng.random(shape)
        decay = np.exp(-0.606531 * rng.random(shape))
        if self.hard:
            decay = np.where(rng.random(shape) < 0.9, decay, rng.choice([0, 1, 1e-30, -0.5], shape))
        keys = kappa * rng.standard_normal(shape)
        queries = rng.standard_normal(shape) * self.key_dim**-0.5
        values = rng.standard_normal((*shape[:3], self.value_dim))
        state = rng.standard_normal((self.count, self.heads, self.value_dim, self.key_dim))
        rows = (queries, decay, keys, values, -kappa, kappa * rate)
        made = [mx.array(x.astype(np.float32)).astype(DTYPES[self.dtype]) for x in rows]
        return [*made, mx.array(state.astype(np.float32))]


def exact(arrays: list[mx.array]) -> tuple[np.ndarray, np.ndarray]:
    r, w, k, v, a, b, state = (np.array(x.astype(mx.float32)).astype(np.float64) for x in arrays)
    outputs = []
    for t in range(r.shape[1]):
        held = np.einsum("nhvk,nhk->nhv", state, a[:, t])
        state = state * w[:, t, :, None] + held[..., None] * b[:, t, :, None]
        state = state + v[:, t][..., None] * k[:, t, :, None]
        outputs.append(np.einsum("nhvk,nhk->nhv", state, r[:, t]))
    return np.stack(outputs, 1), state


def error(got: mx.array, want: np.ndarray) -> float:
    found = np.array(got.astype(mx.float32)).astype(np.float64)
    assert found.shape == want.shape
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))
