"""Recurrences on matrix states: plain form, chunks and kernels against float64, token by token."""

from __future__ import annotations

import runpy
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.gated_delta import gated_delta_update
from mlx_lm.models.ssm import ssm_update
from mlxrewrite.kernels import delta, depthwise, launch, linear, scan, state_step, triangles
from mlxrewrite.kernels.dialects.cpu import KernelError, static
from mlxrewrite.kernels.dialects.cpu.source import Input
from mlxrewrite.kernels.render import render
from mlxrewrite.kernels.state_specs import DepthwiseSpec, ScanSpec, state_step_spec, supports
from mlxrewrite.runtime.recurrences import (
    convolve,
    delta_rule,
    diagonal_scan,
    lightning_scan,
    state_space_dual,
)

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
    assert error(y, want) < 4e-6 and error(state, last) < 4e-6


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
    spec = state_step_spec(*arrays[:3], per_channel=True, delta=True)
    assert spec.name == "state_step_f32_f32_kh2_vh4_kd32_vd16_r4_s4_per_channel_delta"


# ------------------------------------------------------------------- without the delta correction


def exact_linear(arrays: list[mx.array]) -> tuple[np.ndarray, np.ndarray]:
    q, k, v, g, state = (np.array(x.astype(mx.float32)).astype(np.float64) for x in arrays)
    q, k = (np.repeat(x, v.shape[2] // k.shape[2], axis=2) for x in (q, k))
    outputs = []
    for t in range(q.shape[1]):
        state = state * np.exp(g[:, t])[..., None, None] + v[:, t][..., None] * k[:, t, :, None]
        outputs.append(np.einsum("nhvk,nhk->nhv", state, q[:, t]))
    return np.stack(outputs, 1), state


def without_beta(arrays: list[mx.array]) -> list[mx.array]:
    return [*arrays[:4], arrays[5]]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 128, 150])
def test_linear_attention_of_any_length(length, hard):
    arrays = without_beta(Case(length=length, hard=hard).arrays())
    y, state = linear.linear_rule(*arrays)
    want, last = exact_linear(arrays)
    assert error(y, want) < 2e-6 and error(state, last) < 2e-6


@pytest.mark.parametrize("case", [Case(), Case(dtype="bfloat16", key_dim=128)], ids=str)
def test_the_linear_step_kernel(case):
    arrays = without_beta(case.arrays())
    arrays[2] = arrays[2].astype(mx.float32)  # values may be wider than the rows
    want, last = exact_linear(arrays)
    with launch.backend("runner"):
        y, state = linear.linear_rule(*arrays)
        mx.eval(y, state)
    assert error(y, want) < TOLERANCE[case.dtype] and error(state, last) < 2e-6


@pytest.mark.parametrize("length", [1, 9, 300])
def test_state_spaces_are_mlx_lm_s(length):
    mx.random.seed(1)
    n, heads, width, groups, size = 2, 4, 8, 2, 16
    x = mx.random.normal((n, length, heads, width))
    B, C = (mx.random.normal((n, length, groups, size)) for _ in range(2))
    dt = mx.random.normal((n, length, heads))
    A_log, D, bias = (mx.random.normal((heads,)) for _ in range(3))
    state = mx.random.normal((n, heads, width, size))
    for before in (state, None):
        args = (x, A_log, B, C, D, dt, bias, before, (0.001, 0.1))
        ours, theirs = state_space_dual(*args), ssm_update(*args)
        for got, want in zip(ours, theirs, strict=True):
            assert mx.allclose(got, want, atol=2e-5 * float(mx.abs(want).max()))


def test_delta_rules_are_mlx_lm_s():
    q, k, v, _, b, state = Case(length=9).arrays()
    a, A_log, bias = (mx.random.normal(shape) for shape in ((2, 9, 4), (4,), (4,)))
    for options in ({}, {"allow_neg_eigval": True}, {"lower_bound": -5.0}):
        args = (q, k, v, a, b, A_log, bias, state)
        ours, theirs = delta_rule(*args, **options), gated_delta_update(*args, **options)
        for got, want in zip(ours, theirs, strict=True):
            assert mx.allclose(got, want, atol=2e-6)


def test_padding_is_refused():
    q, k, v, _, b, state = Case(length=2).arrays()
    with pytest.raises(TypeError, match="padding"):
        delta_rule(q, k, v, b, b, b[0, 0], b[0, 0], state, mx.ones((2, 2), mx.bool_))


def _decay_forgotten(text: str) -> str:
    return text.replace("kept[i][j] *= factor;", "")


def _next_key_channel(text: str) -> str:
    return text.replace("key[j] = static_cast<float>(keys[key_row + j]);",
                        "key[j] = static_cast<float>(keys[key_row + (j ^ 1)]);")  # fmt: skip


def _old_state_in_the_output(text: str) -> str:
    return text.replace("by_query + given * together", "by_query")


def _head_of_another_group(text: str) -> str:
    return text.replace("head / (VALUE_HEADS / KEY_HEADS)", "head % KEY_HEADS")


def _row_beyond_the_end(text: str) -> str:
    return text.replace("+ row) * KEY_DIM", "+ row + 1) * KEY_DIM")


@pytest.mark.parametrize(
    "bug",
    [
        _decay_forgotten,
        _next_key_channel,
        _old_state_in_the_output,
        _head_of_another_group,
        _row_beyond_the_end,
    ],
)
def test_seeded_kernel_bugs_are_seen(bug, monkeypatch):
    arrays = Case(key_dim=64).arrays()
    kernel = render(state_step_spec(*arrays[:3], per_channel=False, delta=True))
    wrong = replace(kernel, source=bug(kernel.source), _made={})
    assert wrong.source != kernel.source
    monkeypatch.setattr(state_step, "render", lambda spec: wrong)
    want, last = exact(arrays)
    try:
        with launch.backend("runner"):
            y, state = delta.delta_rule(*arrays)
            mx.eval(y, state)
    except KernelError:
        assert bug is _row_beyond_the_end
        return
    assert max(error(y, want), error(state, last)) > 1e-4


@pytest.mark.parametrize("recorded", [False, True])
def test_the_benchmark_runs(recorded):
    path = Path(__file__).parents[1] / "benchmarks" / "states.py"
    benchmark = runpy.run_path(str(path))
    rows = benchmark["measure"](tiny=True, recorded=recorded, rounds=1)
    assert len(rows) == (6 if recorded else 12)
    assert all(row.ours > 0 and row.theirs > 0 for row in rows)
    assert "copy" in benchmark["table"](rows)


# ---------------------------------------------------------------------------- convolutions


@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_depthwise_convolutions_are_mlx_s(length, bias, dtype):
    mx.random.seed(2)
    module = nn.Conv1d(70, 70, 4, groups=70, bias=bias)
    module.set_dtype(DTYPES[dtype])
    x = mx.random.normal((2, length + 3, 70)).astype(DTYPES[dtype])
    wide = nn.Conv1d(70, 70, 4, groups=70, bias=bias)
    wide.update(module.parameters())
    wide.set_dtype(mx.float32)
    want = np.array(wide(x.astype(mx.float32))).astype(np.float64)
    plain = convolve(x, module)
    with launch.backend("runner"):
        kernel = convolve(x, module)
        mx.eval(kernel)
    for got in (plain, kernel):
        assert got.dtype == x.dtype and error(got, want) < TOLERANCE[dtype]


def test_the_sizes_of_a_convolution_cover_every_token(monkeypatch):
    """One row less in the text of the kernel, and the comparison above would fail."""
    module = nn.Conv1d(32, 32, 4, groups=32)
    x = mx.random.normal((1, 20, 32))
    make = depthwise.render

    def wrong(spec):
        kernel = make(spec)
        return replace(kernel, source=kernel.source.replace("row + TAPS - 1)", "row + TAPS - 2)"),
                       _made={})  # fmt: skip

    monkeypatch.setattr(depthwise, "render", wrong)
    with launch.backend("runner"):
        assert not mx.allclose(convolve(x, module), module(x), atol=1e-3)


def test_other_convolutions_are_called_as_they_are():
    x = mx.random.normal((1, 9, 8))
    for module in (
        nn.Conv1d(8, 8, 4),
        nn.Conv1d(8, 8, 4, groups=8, padding=3),
        nn.Conv1d(8, 8, 4, groups=8, stride=2),
        nn.Conv1d(8, 8, 3, groups=8, dilation=2),
        lambda x: 2 * x,
    ):
        assert mx.array_equal(convolve(x, module), module(x))


# ------------------------------------------------------------------------------------- scans


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 2, 9, 40])
@pytest.mark.parametrize("begun", [False, True])
def test_diagonal_recurrences(length, begun, dtype):
    rng = np.random.default_rng(5)
    shape = (2, length, 40)
    x, a = rng.standard_normal(shape), rng.random(shape)
    a[rng.random(shape) < 0.2] = 0.0
    x, a = (mx.array(part.astype(np.float32)).astype(DTYPES[dtype]) for part in (x, a))
    start = mx.array(rng.standard_normal((2, 40)).astype(np.float32)) if begun else None
    held, want = np.zeros((2, 40)) if start is None else np.array(start, np.float64), []
    exact_x, exact_a = (np.array(part.astype(mx.float32)).astype(np.float64) for part in (x, a))
    for t in range(length):
        held = exact_a[:, t] * held + exact_x[:, t]
        want.append(held)
    function = diagonal_scan("x", "a", "h")(lambda a, x, h=None: None)
    plain = function(a, x, start) if begun else function(a, x=x)
    with launch.backend("runner"):
        kernel = scan.diagonal(x, a, start)
        mx.eval(kernel)
    for y, last in (plain, kernel):
        assert y.dtype == x.dtype and error(y, np.stack(want, 1)) < TOLERANCE[dtype]
        assert error(last, held) < 1e-6


def test_what_the_kernels_ask_of_metal():
    """The readers of Metal text find nothing, with few and with many elements of each input."""
    for count in (1, 64):
        arrays = Case(count=count, dtype="bfloat16", value_heads=1, key_heads=1).arrays()
        gates = [mx.zeros((count, 1, 1)), mx.zeros((count, 1, 1, 32))]
        for delta_, gate in ((d, g) for d in (False, True) for g in gates):
            spec = state_step_spec(*arrays[:3], per_channel=gate.ndim == 4, delta=delta_)
            made = [*arrays[:3], gate, *arrays[4:5][: int(delta_)], arrays[5]]
            assert not _findings(spec, made, [mx.bfloat16, mx.float32])
    for bias in (False, True):
        spec = DepthwiseSpec("float16", 70, 4, 2, 3, bias)
        rows = [mx.zeros((1, 5, 70), mx.float16), mx.zeros((70, 4, 1), mx.float16)]
        rows += [mx.zeros(70)] * bias
        assert not _findings(spec, [*rows, mx.zeros(8, mx.int32)], [mx.float16])
    wide = mx.zeros((1, 5, 70))
    inputs = [wide, wide, mx.zeros((1, 70)), mx.zeros(8, mx.int32)]
    assert not _findings(ScanSpec("float32", 70, 1, 8), inputs, [mx.float32, mx.float32])


def _findings(spec, arrays, dtypes):
    kernel = render(spec)
    return static.check(
        name=kernel.name,
        inputs=[Input.of(n, a) for n, a in zip(kernel.input_names, arrays, strict=True)],
        output_names=kernel.output_names,
        output_dtypes=dtypes,
        source=kernel.source,
        header=kernel.header,
    )


@pytest.mark.parametrize("length", [1, 9, 140])
@pytest.mark.parametrize("begun", [False, True])
def test_lightning_attention(length, begun):
    """The state keeps mlx_lm's layout, [K, V], from step to step."""
    rng = np.random.default_rng(7)
    q, k = (rng.standard_normal((2, 3, length, 32)) for _ in range(2))
    v, g = rng.standard_normal((2, 3, length, 16)), -rng.random(3)
    h = rng.standard_normal((2, 3, 32, 16)) if begun else np.zeros((2, 3, 32, 16))
    function = lightning_scan("a", "b", "c", "d", "e", "f")(lambda a, b, c, d, e, f=None: None)
    given = [mx.array(part.astype(np.float32)) for part in (q, k, v, g)]
    y, last = function(*given, 0.5, *([mx.array(h.astype(np.float32))] if begun else []))
    outputs = []
    for t in range(length):
        h = h * np.exp(g)[:, None, None] + k[:, :, t, :, None] * v[:, :, t, None]
        outputs.append(0.5 * np.einsum("nhk,nhkv->nhv", q[:, :, t], h))
    assert error(y, np.stack(outputs, 2)) < 2e-6 and error(last, h) < 2e-6
