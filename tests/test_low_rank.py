"""States with a transition that is diagonal plus a product: chunks and kernel against float64."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from low_rank_cases import DTYPES, TOLERANCE, Case, error, exact
from mlxrewrite.kernels import launch, low_rank
from mlxrewrite.kernels.dialects.cpu import KernelError, static
from mlxrewrite.kernels.dialects.cpu.source import Input
from mlxrewrite.kernels.low_rank_specs import low_rank_step_spec
from mlxrewrite.kernels.render import render


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 65, 150])
def test_any_length_follows_the_rule(length, hard):
    arrays = Case(length=length, hard=hard).arrays()
    y, state = low_rank.low_rank_rule(*arrays)
    want, last = exact(arrays)
    assert error(y, want) < 4e-6 and error(state, last) < 4e-6


@pytest.mark.parametrize("chunk", [1, 2, 16, 64])
def test_chunks_of_any_size_agree(chunk):
    arrays = Case(length=37).arrays()
    want, last = exact(arrays)
    y, state = low_rank.low_rank_rule(*arrays, chunk=chunk)
    assert error(y, want) < 2e-6 and error(state, last) < 2e-6


def test_a_prompt_may_come_in_pieces():
    arrays = Case(length=40).arrays()
    whole, last = low_rank.low_rank_rule(*arrays)
    parts, state = [], arrays[6]
    for start, stop in ((0, 1), (1, 20), (20, 40)):
        y, state = low_rank.low_rank_rule(*(x[:, start:stop] for x in arrays[:6]), state)
        parts.append(y)
    assert mx.allclose(mx.concatenate(parts, axis=1), whole, atol=2e-6)
    assert mx.allclose(state, last, atol=2e-6)


def test_no_state_is_zeros():
    *rows, state = Case(length=5).arrays()
    none, zeros = low_rank.low_rank_rule(*rows), low_rank.low_rank_rule(*rows, state * 0)
    assert all(mx.array_equal(one, two) for one, two in zip(none, zeros, strict=True))


def test_the_loop_is_the_rule():
    arrays = Case(length=9).arrays()
    want, last = exact(arrays)
    y, state = low_rank.low_rank_loop(*arrays)
    assert error(y, want) < 1e-6 and error(state, last) < 1e-6


STEPS = [
    Case(),
    Case(key_dim=64, value_dim=64, heads=2),
    Case(key_dim=128, value_dim=24, count=1, heads=1),
    Case(key_dim=256, value_dim=8),
    Case(dtype="bfloat16", key_dim=64),
    Case(dtype="float16", count=3, hard=True),
]


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_the_step_kernel_follows_the_rule(case):
    arrays = case.arrays()
    want, last = exact(arrays)
    with launch.backend("runner"):
        y, state = low_rank.low_rank_rule(*arrays)
        mx.eval(y, state)
    assert y.dtype == DTYPES[case.dtype] and state.dtype == mx.float32
    assert error(y, want) < TOLERANCE[case.dtype] and error(state, last) < 2e-6


def test_rows_of_several_types_are_taken_in_float32():
    arrays = Case(dtype="bfloat16", value_dim=8).arrays()
    arrays[1] = mx.random.uniform(0.5, 1, arrays[1].shape)
    want, last = exact(arrays)
    with launch.backend("runner"):
        y, state = low_rank.low_rank_rule(*arrays)
        mx.eval(y, state)
    assert y.dtype == mx.bfloat16
    assert error(y, want) < TOLERANCE["bfloat16"] and error(state, last) < 2e-6


def test_heads_the_kernel_lacks_take_the_plain_form():
    arrays = Case(key_dim=24).arrays()
    with launch.backend("runner"):
        y, _ = low_rank.low_rank_rule(*arrays)
    assert error(y, exact(arrays)[0]) < 1e-6


def test_the_name_spells_the_kernel():
    queries, *_, values = Case(key_dim=64).arrays()[:4]
    name = low_rank_step_spec(queries, values).name
    assert name == "low_rank_step_f32_f32_h3_kd64_vd16_r8_s2"


BUGS = {
    "read behind the decay": (
        "    held += kept[i][j] * read[j];\n    kept[i][j] *= factor[j];",
        "    kept[i][j] *= factor[j];\n    held += kept[i][j] * read[j];",
    ),
    "not decayed": ("    kept[i][j] *= factor[j];\n", ""),
    "read and written alike": ("held * write[j]", "held * read[j]"),
    "the output lacks the pair": ("by_query + held * by_write", "by_query"),
    "the output lacks the value": (" + given * by_key)", ")"),
    "another channel": ("reading[key_row + j]", "reading[key_row + (j ^ 1)]"),
    "another row's value": ("values[target]", "values[target ^ 1]"),
    "a row beyond the end": ("+ row) * KEY_DIM", "+ row + 1) * KEY_DIM"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_kernel_bugs_are_seen(bug, monkeypatch):
    arrays = Case(key_dim=64).arrays()
    kernel = render(low_rank_step_spec(arrays[0], arrays[3]))
    assert kernel.source.count(BUGS[bug][0]) == 1
    wrong = replace(kernel, source=kernel.source.replace(*BUGS[bug]), _made={})
    monkeypatch.setattr(low_rank, "render", lambda spec: wrong)
    want, last = exact(arrays)
    try:
        with launch.backend("runner"):
            y, state = low_rank.low_rank_rule(*arrays)
            mx.eval(y, state)
    except KernelError:
        assert bug == "a row beyond the end"
        return
    assert max(error(y, want), error(state, last)) > 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_kernel_asks_of_metal(dtype):
    for count in (1, 64):
        arrays = Case(count=count, dtype=dtype, heads=1).arrays()
        kernel = render(low_rank_step_spec(arrays[0], arrays[3]))
        assert not static.check(
            name=kernel.name,
            inputs=[Input.of(n, a) for n, a in zip(kernel.input_names, arrays, strict=True)],
            output_names=kernel.output_names,
            output_dtypes=[DTYPES[dtype], mx.float32],
            source=kernel.source,
            header=kernel.header,
        )
