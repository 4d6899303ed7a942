"""Mixers with states that run on rows: token shift, what they hold and store, their fallback."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from compiling import EXAMPLES, compile_text
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import nn
from mlxrewrite.cli import main
from mlxrewrite.kernels import launch, shift
from mlxrewrite.kernels.dialects.cpu import KernelError, static
from mlxrewrite.kernels.dialects.cpu.source import Input
from mlxrewrite.kernels.render import render
from mlxrewrite.kernels.shift import Origins
from mlxrewrite.kernels.shift_specs import ShiftSpec
from mlxrewrite.runtime import row_states
from mlxrewrite.runtime.batch import Batch
from mlxrewrite.runtime.cache import PagedCache
from mlxrewrite.runtime.caches import ArraysCache
from mlxrewrite.runtime.compare import compare, original_logits, rewritten_logits
from mlxrewrite.runtime.row_runs import Runs
from mlxrewrite.runtime.row_states import last_of_sequences, shifted_rows
from mlxrewrite.runtime.rows import Rows
from mlxrewrite.runtime.schedule import random_schedule
from mlxrewrite.runtime.states import StateTable
from mlxrewrite.runtime.verify import _models, _read, verify
from mlxrewrite.runtime.views import StateLeaf, StateView

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
CONFIGS = Path(__file__).parent / "configs"
LENGTHS = ((9, 5), (1, 9), (8, 4), (6, 6), (2, 7), (11, 2), (3, 3), (5, 5))

# ------------------------------------------------------------------------------------ the kernel


def shifted(rows: np.ndarray, states: np.ndarray, lengths, begun) -> np.ndarray:
    """One sequence after the other."""
    found, start, state = [], 0, 0
    for length, has in zip(lengths, begun, strict=True):
        own = rows[start : start + length]
        found += [states[state] if has else np.zeros_like(rows[0]), *own[:-1]]
        start, state = start + length, state + has
    return np.stack(found)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=6))
def test_the_plain_form_is_one_sequence_after_the_other(parts):
    lengths, begun = zip(*parts, strict=True)
    rng = np.random.default_rng(0)
    rows, states = rng.standard_normal((sum(lengths), 5)), rng.standard_normal((sum(begun), 5))
    held = mx.array(states.astype(np.float32)) if any(begun) else None
    got = shift.shift(mx.array(rows.astype(np.float32)), held, Origins.of(lengths, begun))
    assert np.array_equal(np.array(got), shifted(rows, states, lengths, begun).astype(np.float32))


def case(width: int, dtype: str, begun=(True, False, True)):
    mx.random.seed(0)
    rows = mx.random.normal((9, width)).astype(DTYPES[dtype])
    states = mx.random.normal((sum(begun), width)).astype(DTYPES[dtype]) if any(begun) else None
    return rows, states, Origins.of((3, 5, 1), begun)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("begun", [(True, False, True), (False,) * 3, (True,) * 3])
@pytest.mark.parametrize("width", [1, 40, 700])
def test_the_kernel_does_as_the_plain_form(width, begun, dtype):
    given = case(width, dtype, begun)
    want = shift.shift(*given)
    with launch.backend("runner"):
        got = shift.shift(*given)
        mx.eval(got)
    assert got.dtype == want.dtype and mx.array_equal(got, want)


BUGS = {
    "a row too early": ("size_t(origin) * WIDTH", "size_t(max(origin - 1, 0)) * WIDTH"),
    "another state": ("size_t(-2 - origin)", "size_t(-1 - origin)"),
    "states are forgotten": ("origin < -1", "origin < -9"),
    "not zeros": ("static_cast<R>(0.0f)", "static_cast<R>(1.0f)"),
    "half of the row": ("channel < WIDTH", "channel < WIDTH / 2"),
    "parts overlap": ("% PARTS * THREADS * EACH", "% PARTS * THREADS"),
    "beyond the row": ("first + i * THREADS;", "first + i * THREADS + 1;"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_kernel_bugs_are_seen(bug, monkeypatch):
    given = case(700, "float32")
    want = shift.shift(*given)
    kernel = render(ShiftSpec("float32", 700, 4, 4, states=True))
    assert kernel.source.count(BUGS[bug][0]) == 1
    wrong = replace(kernel, source=kernel.source.replace(*BUGS[bug]), _made={})
    monkeypatch.setattr(shift, "render", lambda spec: wrong)
    try:
        with launch.backend("runner"):
            got = shift.shift(*given)
            mx.eval(got)
    except KernelError:
        return
    assert not mx.array_equal(got, want)


def test_what_the_kernel_asks_of_metal():
    for states in (False, True):
        kernel = render(ShiftSpec("float16", 70, 1, 3, states=states))
        rows = mx.zeros((9, 70), mx.float16)
        arrays = [rows, *([rows] if states else []), mx.zeros(9, mx.int32)]
        assert not static.check(
            name=kernel.name,
            inputs=[Input.of(n, a) for n, a in zip(kernel.input_names, arrays, strict=True)],
            output_names=kernel.output_names,
            output_dtypes=[mx.float16],
            source=kernel.source,
            header=kernel.header,
        )


def test_shapes_are_looked_at():
    rows, states, origins = case(8, "float32")
    with pytest.raises(ValueError, match="expected 9 rows"):
        shift.shift(rows[:4], states, origins)
    with pytest.raises(ValueError, match="before rows"):
        shift.shift(rows, states[:, :4], origins)


# ---------------------------------------------------------------------------------------- states


def view(lengths, table: StateTable) -> StateView:
    parts, start = [], 0
    for sequence, length in enumerate(lengths):
        parts.append(Rows(sequence, start, length, 0))
        start += length
    ids, positions = mx.zeros((start, 1), mx.int32), mx.zeros(start, mx.int32)
    batch = Batch(ids, positions, tuple(parts), (), None, (), None, 0)
    return StateView(ArraysCache(table.size), StateLeaf(table), batch, 3, ())


def before(x, last):
    if last is None:
        last = mx.zeros((x.shape[0], 1, x.shape[2]), x.dtype)
    return mx.concatenate([last, x[:, :-1]], axis=1)


op = shifted_rows("x", "last")(before)


def test_steps_of_a_ragged_batch_follow_each_sequence():
    table, seen, rng = StateTable(2), {0: [], 1: [], 2: []}, np.random.default_rng(1)
    for lengths in ((3, 1, 4), (1, 1, 1), (2, 5, 1)):
        cache = view(lengths, table)
        x = mx.array(rng.standard_normal((sum(lengths), 1, 6)).astype(np.float32))
        got = op(x, cache[1])
        cache[1] = last_of_sequences(x)
        for part in cache.batch.rows:
            for row in range(part.start, part.stop):
                known = seen[part.sequence]
                want = known[-1] if known else mx.zeros((1, 6))
                assert mx.array_equal(got[row], want)
                known.append(x[row])
        assert table.holds(0) == (None, (1, 6))


def test_a_state_that_was_replaced_is_not_read():
    cache = view((2,), StateTable(1))
    x = mx.zeros((2, 1, 4))
    held = cache[0]
    cache[0] = last_of_sequences(x)
    with pytest.raises(RuntimeError, match="replaced before it was read"):
        op(x, held)


def test_without_a_paged_cache_the_function_runs():
    x = mx.random.normal((2, 5, 4))
    assert mx.array_equal(op(x, None), before(x, None))
    assert mx.array_equal(op(x, last=x[:, :1]), before(x, x[:, :1]))


def test_a_held_state_is_no_array():
    cache = view((2,), StateTable(1))
    for misuse in (lambda s: s + 1, mx.exp, lambda s: s.astype(mx.float32), lambda s: s[0]):
        with pytest.raises(TypeError, match="a state belongs to sequences"):
            misuse(cache[0])
    with pytest.raises(TypeError, match="may only be stored"):
        last_of_sequences(mx.zeros((2, 1, 4))) + 1
    with pytest.raises(TypeError, match="was set to array"):
        cache[0] = mx.zeros((1, 1, 4))
    with pytest.raises(IndexError, match="state 1 of 1"):
        cache[1]


def test_rows_of_the_wrong_shape_are_refused():
    cache = view((2, 1), StateTable(1))
    for x in (mx.zeros((1, 3, 4)), mx.zeros((2, 1, 4)), mx.zeros((3, 1, 2, 2))):
        with pytest.raises(TypeError, match="from a batch of 3 rows"):
            op(x, cache[0])
    with pytest.raises(TypeError, match="from a batch of 3 rows"):
        cache[0] = last_of_sequences(mx.zeros((1, 3, 4)))


# ---------------------------------------------------------------------------------------- models


def run(seed: int = 1):
    _, config, _ = _read(CONFIGS / "rwkv7.json")
    original, rewritten = _models(config, None, 0, None, None)[:2]
    schedule = random_schedule(seed, LENGTHS, 60, 7)
    cache = PagedCache(rewritten, 4, num_blocks=60, poison=True)
    theirs = original_logits(original, schedule, "same")
    return compare(theirs, rewritten_logits(cache, schedule))


def _last_rows_of_the_batch(patch):
    plain = mx.take
    patch.setattr(mx, "take", lambda a, rows, axis: plain(a, rows[::-1], axis=axis))


def _new_sequences_begin_with_another_s_state(patch):
    plain = Origins.of

    def of(lengths, begun):
        made = plain(lengths, begun)
        return Origins(made.count, mx.where(made.array == -1, 0, made.array))

    patch.setattr(row_states.Origins, "of", of)


def outputs_in_the_order_of_runs(patch):
    plain = Runs.of

    def of(parts, begun):
        made = plain(parts, begun)
        return replace(made, order=None if made.order is None else mx.sort(made.order))

    patch.setattr(Runs, "of", of)


@pytest.mark.parametrize(
    "bug",
    [
        _last_rows_of_the_batch,
        _new_sequences_begin_with_another_s_state,
        outputs_in_the_order_of_runs,
    ],
)
def test_seeded_bugs_are_seen(bug, monkeypatch):
    bug(monkeypatch)
    assert not run().within(1e-4)


def test_projections_run_once_for_sequences_of_all_lengths(monkeypatch):
    """Two layers and the head: every linear layer once a step, however ragged it is."""
    _, config, _ = _read(CONFIGS / "rwkv7@tied.json")
    rewritten = _models(config, None, 0, None, None)[1]
    count, calls, plain = sum(isinstance(m, nn.Linear) for m in rewritten.modules()), [], nn.Linear
    forward = plain.__call__
    monkeypatch.setattr(plain, "__call__", lambda self, x: calls.append(x) or forward(self, x))
    cache = PagedCache(rewritten, 4, num_blocks=30)
    schedule = random_schedule(3, ((5, 2), (7, 2), (1, 2)), 60, 9)
    list(rewritten_logits(cache, schedule))
    assert calls and len(calls) % count == 0
    assert max(x.shape[0] for x in calls) > 2 and {x.shape[1] for x in calls} == {1}


# ------------------------------------------------------------------------------------ the compiler

SOURCE = (EXAMPLES / "token_shift.py").read_text()
CHANGES = {
    "mixes rows": ("mx.sigmoid(self.gate_proj(g))", "mx.sigmoid(mx.cumsum(self.gate_proj(g), 1))"),
    "keeps a sum of rows": ("cache[0] = x[:, -1:]", "cache[0] = mx.cumsum(x, 1)[:, -1:]"),
    "computes with a state": ("if cache is not None else None\n        mixed",
                              "* 1.0 if cache is not None else None\n        mixed"),
}  # fmt: skip


def classes(result) -> dict[str, str]:
    content = json.loads(result.emitted.manifest)
    assert content["route"] != "model"
    return {c["class"].rpartition(".")[2]: c["sites"][0]["rule"] for c in content["classes"]}


def test_the_example_runs_on_rows(tmp_path):
    result = compile_text(tmp_path, SOURCE)
    assert classes(result) == {"TimeMix": "shifted_rows", "ChannelMix": "shifted_rows"}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_proved_runs_once_per_length(tmp_path, change):
    text = SOURCE.replace(*CHANGES[change])
    assert text != SOURCE
    result = compile_text(tmp_path, text)
    assert classes(result) == {"TimeMix": "per_length", "ChannelMix": "per_length"}
    assert b"shifted_rows" not in result.emitted.code


def test_what_runs_once_per_length_agrees_too(tmp_path):
    source = tmp_path / "token_shift.py"
    source.write_text(SOURCE.replace(*CHANGES["mixes rows"]))
    made = tmp_path / "made"
    assert main([str(source), "-o", str(made), "-q", "--no-cache"]) == 0
    report = verify(EXAMPLES / "token_shift.json", generated=made, source=source)
    assert report.passed, report.text()


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    script = Path(__file__).parent.parent / "benchmarks" / "rows.py"
    sizes = "--hidden 64 --head 32 --layers 2 --decode 2 --prompts 5,3 --rounds 1 --dtype float32"
    target = tmp_path / "result.json"
    run = [sys.executable, str(script), *sizes.split(), "--json", str(target)]
    subprocess.run(run, check=True, capture_output=True)
    spent = json.loads(target.read_text())["milliseconds"]
    assert set(spent) == {"decode only", "with prompts"}
    assert all(set(part) == {"rows", "once per length"} for part in spent.values())
