"""The gated delta rule: plain form, chunks and kernels against float64, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from mlxrewrite.kernels import delta, launch, triangles
from mlxrewrite.kernels.delta_specs import delta_step_spec, supports

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 6e-3}


@dataclass(frozen=True)
class Case:
    count: int = 2
    length: int = 1
    key_heads: int = 2
    value_heads: int = 4
    key_dim: int = 32
    value_dim: int = 16
    per_channel: bool = False
    dtype: str = "float32"
    hard: bool = False  # keys that are nearly equal, decays from none to all

    def arrays(self) -> list[mx.array]:
        rng = np.random.default_rng(3)
        shape = (self.count, self.length)
        keys = rng.standard_normal((*shape, self.key_heads, self.key_dim))
        keys = 1 + 0.05 * keys if self.hard else keys
        keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
        queries = rng.standard_normal(keys.shape) * self.key_dim**-0.5
        values = rng.standard_normal((*shape, self.value_heads, self.value_dim))
        gate = (*shape, self.value_heads, *((self.key_dim,) if self.per_channel else ()))
        decay = -0.1 * np.abs(rng.standard_normal(gate))
        if self.hard:
            decay = np.where(rng.random(gate) < 0.9, 1e-4 * decay, 500 * decay)
        beta = rng.random((*shape, self.value_heads))
        state = rng.standard_normal((self.count, self.value_heads, self.value_dim, self.key_dim))
        rows = [mx.array(x.astype(np.float32)).astype(DTYPES[self.dtype]) for x in (queries, keys)]
        rows.append(mx.array(values.astype(np.float32)).astype(DTYPES[self.dtype]))
        return rows + [mx.array(x.astype(np.float32)) for x in (decay, beta, state)]


def exact(arrays: list[mx.array]) -> tuple[np.ndarray, np.ndarray]:
    q, k, v, g, b, state = (np.array(x.astype(mx.float32)).astype(np.float64) for x in arrays)
    q, k = (np.repeat(x, v.shape[2] // k.shape[2], axis=2) for x in (q, k))
    outputs = []
    for t in range(q.shape[1]):
        decay = np.exp(g[:, t])
        state = state * (decay[..., None, None] if decay.ndim == 2 else decay[:, :, None])
        given = (v[:, t] - np.einsum("nhvk,nhk->nhv", state, k[:, t])) * b[:, t, :, None]
        state = state + given[..., None] * k[:, t, :, None]
        outputs.append(np.einsum("nhvk,nhk->nhv", state, q[:, t]))
    return np.stack(outputs, 1), state


def error(got: mx.array, want: np.ndarray) -> float:
    found = np.array(got.astype(mx.float32)).astype(np.float64)
    assert found.shape == want.shape
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 65, 150])
def test_any_length_follows_the_rule(length, per_channel):
    arrays = Case(length=length, per_channel=per_channel).arrays()
    y, state = delta.delta_rule(*arrays)
    want, last = exact(arrays)
    assert error(y, want) < 1e-6 and error(state, last) < 1e-6


@pytest.mark.parametrize("per_channel", [False, True])
def test_hard_chunks_stay_exact(per_channel):
    """Equal keys make the system's powers explode, decays of e^-100 the quotients of decays."""
    arrays = Case(length=100, per_channel=per_channel, hard=True).arrays()
    y, state = delta.delta_rule(*arrays)
    want, last = exact(arrays)
    assert error(y, want) < 2e-5 and error(state, last) < 2e-5


@pytest.mark.parametrize("chunk", [1, 2, 16, 64])
def test_chunks_of_any_size_agree(chunk):
    arrays = Case(length=37).arrays()
    want, last = exact(arrays)
    y, state = delta.delta_rule(*arrays, chunk=chunk)
    assert error(y, want) < 1e-6 and error(state, last) < 1e-6


def test_a_prompt_may_come_in_pieces():
    arrays = Case(length=40, per_channel=True).arrays()
    whole, last = delta.delta_rule(*arrays)
    parts, state = [], arrays[5]
    for start, stop in ((0, 1), (1, 20), (20, 40)):
        y, state = delta.delta_rule(*(x[:, start:stop] for x in arrays[:5]), state)
        parts.append(y)
    assert mx.allclose(mx.concatenate(parts, axis=1), whole, atol=1e-6)
    assert mx.allclose(state, last, atol=1e-6)


def test_no_state_is_zeros():
    *rows, state = Case(length=5).arrays()
    assert mx.array_equal(
        delta.delta_rule(*rows)[0], delta.delta_rule(*rows, mx.zeros_like(state))[0]
    )


def test_the_inverse_is_one():
    mx.random.seed(0)
    matrix = mx.tril(mx.random.normal((3, 16, 16)), -1)
    found = triangles.inverse(triangles.squares_of(matrix), matrix[..., 0])
    assert mx.allclose(found @ (matrix + mx.eye(16)), mx.broadcast_to(mx.eye(16), (3, 16, 16)),
                       atol=1e-3)  # fmt: skip


STEPS = [
    Case(),
    Case(per_channel=True),
    Case(key_dim=128, value_dim=128, value_heads=2, key_heads=1),
    Case(dtype="bfloat16"),
    Case(dtype="float16", per_channel=True, key_dim=64),
    Case(count=1, value_heads=1, key_heads=1, value_dim=8),
    Case(value_dim=24, count=3),
]


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_the_step_kernel_follows_the_rule(case):
    arrays = case.arrays()
    assert supports(*arrays[:3], arrays[5]) is None
    want, last = exact(arrays)
    with launch.backend("runner"):
        y, state = delta.delta_rule(*arrays)
        mx.eval(y, state)
    assert y.dtype == DTYPES[case.dtype] and state.dtype == mx.float32
    assert error(y, want) < TOLERANCE[case.dtype] and error(state, last) < 2e-6


def test_heads_the_kernel_lacks_take_the_plain_form():
    arrays = Case(key_dim=24).arrays()
    assert "multiples of 32" in supports(*arrays[:3], arrays[5])
    with launch.backend("runner"):
        y, _ = delta.delta_rule(*arrays)
    assert error(y, exact(arrays)[0]) < 1e-6


def test_the_name_spells_the_kernel():
    arrays = Case(per_channel=True).arrays()
    spec = delta_step_spec(*arrays[:3], per_channel=True)
    assert spec.name == "delta_step_f32_f32_kh2_vh4_kd32_vd16_r4_s4_per_channel"
