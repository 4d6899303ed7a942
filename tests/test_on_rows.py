"""Recurrences and windows on the rows of ragged batches, and mixers that run on all rows."""

from __future__ import annotations

import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lazy_kernels import lazy_kernels
from mlx import nn
from mlxrewrite.kernels import launch
from mlxrewrite.runtime import recurrences, row_runs, row_states
from mlxrewrite.runtime.batch import Batch
from mlxrewrite.runtime.cache import PagedCache
from mlxrewrite.runtime.caches import ArraysCache
from mlxrewrite.runtime.compare import compare, original_logits, rewritten_logits
from mlxrewrite.runtime.errors import RuntimeRefusal
from mlxrewrite.runtime.rope import initialize_rope, sequence_ends
from mlxrewrite.runtime.row_runs import Run, Runs, together
from mlxrewrite.runtime.row_states import RowStates, on_rows, window_state, windows
from mlxrewrite.runtime.rows import Rows
from mlxrewrite.runtime.schedule import random_schedule
from mlxrewrite.runtime.states import StateTable
from mlxrewrite.runtime.views import HeldState, StateLeaf, StateView
from mlxrewrite.runtime.weights import randomise
from runtime_models import states_on_rows
from test_recorded import same_as_unrecorded
from test_row_states import outputs_in_the_order_of_runs

DTYPES = {"float32": (mx.float32, 2e-5), "bfloat16": (mx.bfloat16, 8e-3)}
HEADS, WIDTH, VALUES, GROUPS, TAPS = 4, 8, 6, 2, 3
# Of each step, the sequences in their order with how many rows they have.
STEPS = (
    ((0, 5), (2, 64), (4, 1), (7, 2)),
    ((5, 1), (0, 300), (3, 2), (8, 65), (2, 1), (1, 130), (6, 64), (7, 3), (4, 63), (9, 1)),
    ((9, 1), (3, 1), (0, 1), (8, 1), (1, 1)),
    ((3, 1), (9, 1), (10, 1)),
    ((1, 70), (10, 66), (0, 1), (2, 9), (5, 1)),
    ((5, 40),),
)


def view(parts, table: StateTable, entry: int = 3) -> StateView:
    rows, start = [], 0
    for sequence, length in parts:
        rows.append(Rows(sequence, start, length, 0))
        start += length
    ids, positions = mx.zeros((start, 1), mx.int32), mx.zeros(start, mx.int32)
    batch = Batch(ids, positions, tuple(rows), (), None, (), None, 0)
    return StateView(ArraysCache(table.size), StateLeaf(table), batch, entry, ())


class Draw:
    """Random arrays of one type."""

    def __init__(self, seed: int, dtype) -> None:
        self.rng, self.dtype = np.random.default_rng(seed), dtype

    def __call__(self, *shape: int) -> mx.array:
        return mx.array(self.rng.standard_normal(shape).astype(np.float32)).astype(self.dtype)

    def factors(self, *shape: int) -> mx.array:
        return mx.array(self.rng.uniform(0.2, 1, shape).astype(np.float32)).astype(self.dtype)


# Each rule: its arrays of L rows, [L, 1, ...], and its call. Weights are the same for all.


def delta(per_channel: bool):
    width = (WIDTH,) if per_channel else ()
    weights = Draw(9, mx.float32)
    A_log, bias = weights(HEADS, *(1,) * per_channel), weights(HEADS, *width)

    def make(draw, n):
        keys = [draw(n, 1, GROUPS, WIDTH) / 3 for _ in range(2)]
        return *keys, draw(n, 1, HEADS, VALUES), draw(n, 1, HEADS, *width), draw(n, 1, HEADS)

    def call(q, k, v, a, b, state):
        return recurrences.delta_rule(q, k, v, a, b, A_log, bias, state)

    return make, call


def dual():
    weights = Draw(9, mx.float32)
    A_log, D, bias = (weights(HEADS) for _ in range(3))

    def make(draw, n):
        between = [draw(n, 1, GROUPS, WIDTH) for _ in range(2)]
        return draw(n, 1, HEADS, VALUES), *between, draw(n, 1, HEADS)

    def call(x, B, C, dt, state):
        return recurrences.state_space_dual(x, A_log, B, C, D, dt, bias, state, (0.001, 100.0))

    return make, call


def selective():
    weights = Draw(9, mx.float32)
    A, D = -weights.factors(HEADS, 4), weights(HEADS)

    def make(draw, n):
        return draw(n, 1, HEADS), draw.factors(n, 1, HEADS), draw(n, 1, 4), draw(n, 1, 4)

    def call(x, steps, B, C, state):
        return recurrences.selective_scan(x, steps, A, B, C, D, state)

    return make, call


def diagonal():
    call = recurrences.diagonal_scan("x", "a", "h")(lambda x, a, h: None)
    return (lambda draw, n: (draw(n, 1, WIDTH), draw.factors(n, 1, WIDTH))), call


def lightning():
    op = recurrences.lightning_scan("q", "k", "v", "g", "scale", "h")(
        lambda q, k, v, g, scale, h: None
    )
    decay = -Draw(9, mx.float32).factors(HEADS)

    def make(draw, n):
        return *(draw(n, HEADS, 1, WIDTH) for _ in range(2)), draw(n, HEADS, 1, VALUES)

    return make, lambda q, k, v, state: op(q, k, v, decay, 0.5, state)


def low_rank():
    op = recurrences.low_rank_scan("r", "w", "k", "v", "a", "b", "h")(
        lambda r, w, k, v, a, b, h: None
    )

    def make(draw, n):
        shape = (n, 1, HEADS, WIDTH)
        reading, writing = (0.1 * draw(*shape) for _ in range(2))
        return draw(*shape), draw.factors(*shape), draw(*shape), draw(*shape), reading, writing

    return make, op


def rules():
    return {
        "delta": delta(False),
        "delta per channel": delta(True),
        "dual": dual(),
        "selective": selective(),
        "diagonal": diagonal(),
        "lightning": lightning(),
        "low rank": low_rank(),
    }


RULES = rules()


def own(name: str, arrays):
    """Rows of one sequence, as it would be run alone."""
    if name == "lightning":
        return [x.squeeze(2).swapaxes(0, 1)[None] for x in arrays]
    return [x.squeeze(1)[None] for x in arrays]


def rows_of(name: str, y: mx.array) -> mx.array:
    return y[0].swapaxes(0, 1)[:, :, None] if name == "lightning" else y[0][:, None]


def difference(got: mx.array, want: mx.array) -> float:
    assert got.shape == want.shape and got.dtype == want.dtype
    left, right = (np.array(x.astype(mx.float32)) for x in (got, want))
    return float(np.abs(left - right).max() / max(1.0, np.abs(right).max()))


def worst(name: str, dtype, steps=STEPS, rules=RULES) -> float:
    """The largest difference of outputs and states from every sequence alone."""
    make, call = rules[name]
    table, alone, draw, found = StateTable(2), {}, Draw(0, dtype), 0.0
    for parts in steps:
        cache = view(parts, table)
        arrays = make(draw, cache.batch.num_rows)
        y, cache[1] = call(*arrays, cache[1])
        for part in cache.batch.rows:
            mine = [x[part.start : part.stop] for x in arrays]
            want, alone[part.sequence] = call(*own(name, mine), alone.get(part.sequence))
            found = max(found, difference(y[part.start : part.stop], rows_of(name, want)))
            state = table.read(1, (part.sequence,))
            found = max(found, difference(state, alone[part.sequence]))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RULES)
def test_rows_follow_each_sequence(name, dtype):
    """New sequences and others in one batch, in changing orders, and steps that go on from them."""
    kind, limit = DTYPES[dtype]
    assert worst(name, kind) <= limit


@pytest.mark.parametrize("name", RULES)
def test_kernels_are_given_what_they_take(name, monkeypatch):
    """Through the CPU runner: the kernels of single tokens, of scans and of selective scans."""
    for size, value in (("HEADS", 8), ("WIDTH", 32), ("VALUES", 8)):
        monkeypatch.setattr(sys.modules[__name__], size, value)
    kernels, plain = set(), launch.MetalKernel.__call__

    def run(self, *given, **named):
        kernels.add(self.name)
        return plain(self, *given, **named)

    monkeypatch.setattr(launch.MetalKernel, "__call__", run)
    steps = [[(s, min(n, 9)) for s, n in parts] for parts in STEPS[:4]]
    with launch.backend("runner"):
        assert worst(name, mx.float32, steps, rules()) <= 2e-5
    assert kernels


def _padding_is_what_comes(patch):
    plain = Run.rows
    patch.setattr(Run, "rows", lambda self, x, fill: plain(self, x, None))


def _states_in_the_batch_s_order(patch):
    plain = Runs.of

    def of(parts, begun):
        made = plain(parts, begun)
        mixed = [replace(r, sequences=tuple(sorted(r.sequences))) for r in made.runs]
        return replace(made, runs=tuple(mixed))

    patch.setattr(Runs, "of", of)


BUGS = (_padding_is_what_comes, _states_in_the_batch_s_order, outputs_in_the_order_of_runs)


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("name", RULES)
def test_seeded_bugs_are_seen(name, bug, monkeypatch):
    bug(monkeypatch)
    steps = [[(s, min(n, 9)) for s, n in parts] for parts in STEPS[:3]]
    try:
        assert worst(name, mx.float32, steps) > 1e-2
    except RuntimeError as problem:
        assert "with and without" in str(problem)


@pytest.mark.parametrize("name", RULES)
def test_what_is_not_finite_stays_in_its_sequence(name):
    make, call = RULES[name]
    parts, draw = ((0, 6), (1, 9), (2, 1), (3, 1)), Draw(0, mx.float32)
    arrays = make(draw, 17)
    bad = mx.array(np.isin(np.arange(17), [6, 15]))  # what is behind the first, and one alone
    broken = [mx.where(bad.reshape(17, *(1,) * (x.ndim - 1)), mx.inf, x) for x in arrays]
    found = []
    for given_rows in (arrays, broken):
        table = StateTable(1)
        cache = view(parts, table)
        y, cache[0] = call(*given_rows, cache[0])
        found.append((y, table.read(0, (0, 3))))
    rows = mx.array([*range(6), 16])
    assert mx.array_equal(*(y[rows] for y, _ in found))
    assert mx.array_equal(*(states for _, states in found))


# --------------------------------------------------------------------------------------------- runs


def cost(lengths, runs) -> int:
    return sum(row_runs.RUN + len(run) * max(lengths[i] for i in run) for run in runs)


def partitions(kinds):
    """All ways to cut a list."""
    for cuts in range(1 << (len(kinds) - 1)):
        found = [[kinds[0]]]
        for i, kind in enumerate(kinds[1:]):
            if cuts >> i & 1:
                found.append([])
            found[-1].append(kind)
        yield found


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=9))
def test_runs_cost_as_little_as_can_be(lengths):
    runs = list(together(lengths))
    assert sorted(i for run in runs for i in run) == list(range(len(lengths)))
    longer = [run for run in runs if any(lengths[i] > 1 for i in run)]
    assert all(lengths[i] > 1 for run in longer for i in run)
    assert len(runs) - len(longer) == (1 in lengths)
    ordered = sorted((i for i, n in enumerate(lengths) if n > 1), key=lambda i: -lengths[i])
    if ordered:
        assert cost(lengths, longer) == min(cost(lengths, p) for p in partitions(ordered))


@pytest.mark.parametrize(
    ("lengths", "count"),
    [
        ([1] * 64, 1),
        ([*range(16, 257, 16)], 2),
        ([*range(16, 257, 4)], 4),
        ([1, 1, *range(16, 257, 16), 8192], 4),
        ([256, *[64] * 63], 2),
        ([64, *[2] * 63], 2),
        ([64, 2, 9, 40], 1),
        ([300, 120], 1),
        ([9, 9, 9], 1),
    ],
)
def test_how_many_runs_there_are(lengths, count):
    assert len(list(together(lengths))) == count


def test_sequences_as_they_are_need_no_gather():
    """Single rows, and sequences of one length below each other."""
    for parts in ([(3, 1), (1, 1), (2, 1)], [(3, 7), (1, 7)], [(0, 1), (1, 1), (2, 30)]):
        rows = view(parts, StateTable(1)).batch.rows
        for begun in ([True] * len(parts), [False] * len(parts)):
            made = Runs.of(rows, begun)
            assert made.order is None
            assert all(run.index is None and run.real is None for run in made.runs)


def test_a_decode_step_takes_the_states_as_they_are(monkeypatch):
    """No gather, no copy: what the table holds, and the rows."""
    make, call = RULES["dual"]
    table, draw = StateTable(1), Draw(0, mx.float32)
    for step in range(3):
        if step == 1:
            monkeypatch.setattr(mx, "take", None)
            monkeypatch.setattr(mx, "concatenate", None)
        cache = view([(4, 1), (2, 1)], table)
        _, cache[0] = call(*make(draw, 2), cache[0])


# ------------------------------------------------------------------------------------------ windows


def worst_window(dtype, steps=STEPS) -> float:
    table, alone, draw, found = StateTable(1), {}, Draw(0, dtype), 0.0
    for parts in steps:
        cache = view(parts, table)
        x = draw(cache.batch.num_rows, 1, 5)
        got = windows(cache[0], x, TAPS)
        token = row_states._RUNNING.set(True)
        cache[0] = window_state(got, TAPS)
        row_states._RUNNING.reset(token)
        for part in cache.batch.rows:
            before = alone.get(part.sequence, mx.zeros((1, TAPS, 5), dtype))
            whole = windows(before, x[part.start : part.stop].squeeze(1)[None], TAPS)
            alone[part.sequence] = window_state(whole, TAPS)
            want = mx.stack([whole[0, i : i + TAPS + 1] for i in range(part.length)])
            found = max(found, difference(got[part.start : part.stop], want))
            state = table.read(0, (part.sequence,))
            found = max(found, difference(state, alone[part.sequence]))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_follow_each_sequence(dtype):
    """Also those that are shorter than a window, new or not."""
    assert worst_window(DTYPES[dtype][0]) == 0


def _rows_before_a_sequence(patch):
    plain = row_states.window_rows

    def window_rows(parts, begun, taps):
        index, first = plain(parts, begun, taps), sum(begun) * taps
        return np.where(index == first, first + 1, index)

    patch.setattr(row_states, "window_rows", window_rows)


def _states_a_row_late(patch):
    plain = row_states.window_rows

    def window_rows(parts, begun, taps):
        index, first = plain(parts, begun, taps), sum(begun) * taps
        return np.where(index < first - 1, index + 1, index)

    patch.setattr(row_states, "window_rows", window_rows)


def _ends_are_beginnings(patch):
    firsts = [p.start for p in view(STEPS[0], StateTable(1)).batch.rows]
    patch.setattr(row_states, "ends_of", lambda batch: mx.array(firsts))


@pytest.mark.parametrize("bug", [_rows_before_a_sequence, _states_a_row_late, _ends_are_beginnings])
def test_seeded_bugs_of_windows_are_seen(bug, monkeypatch):
    bug(monkeypatch)
    assert worst_window(mx.float32, STEPS[:1] if bug is _ends_are_beginnings else STEPS) > 0.1


def test_windows_are_promoted_as_by_concatenation():
    table = StateTable(1)
    table.write(0, (0,), mx.ones((1, TAPS, 4)))
    for parts in ([(0, 1)], [(0, 2), (1, 2)]):
        cache = view(parts, table)
        x = mx.zeros((cache.batch.num_rows, 1, 4), mx.bfloat16)
        assert windows(cache[0], x, TAPS).dtype == mx.float32


def test_windows_of_another_width_are_not_kept(monkeypatch):
    monkeypatch.setattr(row_states, "in_step", lambda: True)
    cache = view([(0, 2)], StateTable(1))
    for x in (mx.zeros((2, TAPS, 4)), mx.zeros((3, TAPS + 1, 4)), mx.zeros(2)):
        with pytest.raises(TypeError, match=r"window_state: expected \[2, 4, ...\]"):
            cache[0] = window_state(x, TAPS)


def test_states_of_another_width_are_refused():
    table = StateTable(1)
    table.write(0, (0,), mx.ones((1, TAPS, 4)))
    cache = view([(0, 2)], table)
    for x, taps in ((mx.zeros((2, 1, 4)), 2), (mx.zeros((2, 1, 5)), TAPS)):
        with pytest.raises(TypeError, match="windows: expected states"):
            windows(cache[0], x, taps)
    with pytest.raises(TypeError, match="from a batch of 2 rows"):
        windows(cache[0], mx.zeros((1, 2, 4)), TAPS)
    with pytest.raises(TypeError, match="expected 3 rows of state"):
        windows(mx.zeros((2, 2, 4)), mx.zeros((2, 1, 4)), TAPS)


# ------------------------------------------------------------------------------------------- states


def test_a_state_goes_back_to_its_own_place():
    make, call = RULES["dual"]
    cache, other = view([(0, 2)], StateTable(2)), view([(0, 2)], StateTable(2), entry=5)
    _, new = call(*make(Draw(0, mx.float32), 2), cache[1])
    with pytest.raises(TypeError, match="state 1 of cache entry 3> was stored as state 0"):
        cache[0] = new
    with pytest.raises(TypeError, match="stored as state 1 of cache entry 5"):
        other[1] = new
    cache[-1] = new


def test_a_state_that_was_replaced_is_not_read():
    make, call = RULES["delta"]
    cache, arrays = view([(0, 2)], StateTable(1)), make(Draw(0, mx.float32), 2)
    held = cache[0]
    _, cache[0] = call(*arrays, held)
    with pytest.raises(RuntimeError, match="replaced before it was read"):
        call(*arrays, held)


@pytest.mark.parametrize("name", RULES)
def test_rows_without_their_states_are_refused(name, monkeypatch):
    """Each would be taken for a sequence that begins."""
    make, call = RULES[name]
    arrays = make(Draw(0, mx.float32), 3)
    call(*arrays, None)
    monkeypatch.setattr(row_states, "in_step", lambda: True)
    with pytest.raises(RuntimeRefusal, match="NoneType in place of their states"):
        call(*arrays, None)


# ------------------------------------------------------------------------------------------- mixers

PROMPTS = ((70, 3), (1, 5), (130, 2), (9, 6), (64, 2), (2, 4), (65, 3), (3, 3))


def model(dtype=mx.float32) -> states_on_rows.Model:
    made = states_on_rows.Model(states_on_rows.ModelArgs())
    randomise(made, 3)
    made.set_dtype(dtype)
    return made


def run_model(dtype=mx.float32):
    made = model(dtype)
    schedule = random_schedule(2, PROMPTS, 61, 90)
    cache = PagedCache(made, 4, num_blocks=200, poison=True)
    theirs = original_logits(states_on_rows.Alone(made), schedule, "same")
    return compare(theirs, rewritten_logits(cache, schedule))


def test_mixers_on_rows_follow_each_sequence():
    result = run_model()
    assert result.within(1e-4), result


def test_mixers_on_rows_follow_each_sequence_in_bfloat16():
    result = run_model(mx.bfloat16)
    assert result.finite and result.max_delta <= 0.1 * result.spread, result


@pytest.mark.parametrize("bug", [*BUGS, _rows_before_a_sequence, _states_a_row_late])
def test_seeded_bugs_are_seen_in_models(bug, monkeypatch):
    bug(monkeypatch)
    try:
        assert not run_model().within(1e-3)
    except RuntimeError as problem:
        assert "with and without" in str(problem)


def test_a_mixer_runs_once_a_step(monkeypatch):
    """Two layers of each kind: every projection once, however many lengths there are."""
    made, calls, forward = model(), [], nn.Linear.__call__
    count = sum(isinstance(m, nn.Linear) for m in made.modules())
    monkeypatch.setattr(nn.Linear, "__call__", lambda s, x: calls.append(x) or forward(s, x))
    cache = PagedCache(made, 4, num_blocks=60)
    names = [cache.add_sequence() for _ in range(5)]
    cache.step({name: [1] * (1 + 7 * i) for i, name in enumerate(names)}, logit_rows="all")
    assert len(calls) == count and {x.shape[:2] for x in calls} == {(75, 1)}


def test_steps_of_mixers_on_rows_are_recorded():
    with lazy_kernels():
        recorder = same_as_unrecorded(model(), 1)
    assert recorder.lacking is None
    assert recorder.replayed >= 6
    assert recorder.recorded


class _Scaled(nn.Module):
    """A mixer that depends on where its rows stand, and that adds to positions in place."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []
        self.rope = initialize_rope(
            8, 10000.0, False, {"type": "dynamic", "factor": 2.0}, max_position_embeddings=4
        )

    @on_rows(offset=1)
    def __call__(self, x, mask=None, cache=None, offset=None):
        self.seen = [mask, cache, list(cache) if cache is not None else None]
        y = self.rope(x[:, None], offset=offset)[:, 0] if offset is not None else x
        if offset is not None:
            offset += 1
        return y


class _Standing(nn.Module):
    @on_rows("offset", offset=1)
    def __call__(self, x, cache=None, offset=None):
        return x + offset[:, None, None]


class _Returning(nn.Module):
    @on_rows
    def __call__(self, x, result=None, cache=None):
        return {0: x, 1: x.swapaxes(0, 1), 2: (x, [x, None]), 3: cache[0], 4: None}[result]


def test_what_a_mixer_on_rows_is_given():
    cache, x = view([(0, 3), (1, 1)], StateTable(2)), mx.random.normal((4, 1, 8))
    positions = cache.batch.positions
    positions += mx.array([4, 5, 6, 0])
    ends = mx.array([7, 7, 7, 1])
    mixer, mask = _Scaled(), cache.make_mask(1)
    with sequence_ends(positions, ends):
        got = mixer(x, mask, cache, offset=cache.offset)
        want = mixer.rope(x[:, None], offset=positions)[:, 0]
    assert mx.array_equal(got, want)
    assert positions.tolist() == [4, 5, 6, 0]
    none, states, entries = mixer.seen
    assert none is None and isinstance(states, RowStates) and isinstance(states, ArraysCache)
    assert states and states.lengths is None and states.left_padding is None
    assert states.advance(1) is None and states.make_mask(1) is None
    assert [type(entry) for entry in entries] == [HeldState] * 2
    with pytest.raises(TypeError, match="was set to array"):
        states[0] = x
    with pytest.raises(IndexError, match="state 2 of 2"):
        states[2]


def test_arguments_that_the_proof_is_not_for_are_refused():
    cache, x, mixer = view([(0, 4)], StateTable(1)), mx.zeros((4, 1, 8)), _Scaled()
    for arguments in ((x, x, cache), (x[None], None, cache), (x, [cache], cache)):
        with pytest.raises(TypeError, match="was proved to keep sequences apart, but not for"):
            mixer(*arguments)
    other = type("Other", (_Scaled,), {"__module__": "elsewhere"})
    with pytest.raises(TypeError, match="Other of another file"):
        other()(x, None, cache)
    with pytest.raises(TypeError, match="cannot tell how an array of shape"):
        mixer(mx.zeros((4, 2, 8)), None, cache)
    step = sequence_ends(cache.batch.positions, mx.ones(4))
    with step, pytest.raises(RuntimeRefusal, match="called without a cache"):
        mixer(x)
    assert mx.array_equal(mixer(x), x)


def test_numbers_of_rows_are_positions_or_refused():
    cache, x = view([(0, 3), (1, 1)], StateTable(1)), mx.zeros((4, 1, 8))
    assert mx.array_equal(_Standing()(x, cache, cache.offset), x)
    for offset in (mx.zeros(4, mx.int32), None):
        with pytest.raises(TypeError, match="with their positions as offset"):
            _Standing()(x, cache, offset)
    with pytest.raises(TypeError, match="numbers that are not positions"):
        _Scaled()(x, None, cache, offset=mx.zeros(4, mx.int32))


def test_a_convolution_gives_a_row_of_each_window():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 8, TAPS, groups=8)

        @on_rows
        def __call__(self, x, cache=None):
            return recurrences.convolve(windows(cache[0], x, TAPS), self.conv)

    with pytest.raises(TypeError, match=r"a row for each window, got \[4, 2, 8\]"):
        Wide()(mx.zeros((4, 1, 8)), view([(0, 4)], StateTable(1)))


def test_results_are_rows():
    cache, x, mixer = view([(0, 4)], StateTable(1)), mx.random.normal((4, 1, 8)), _Returning()
    assert mixer(x, 0, cache) is x and mixer(x, 2, cache) == (x, [x, None])
    assert mixer(x, 4, cache) is None
    for result, shown in ((1, r"got \[1, 4, 8\]"), (3, "got HeldState")):
        with pytest.raises(TypeError, match=shown):
            mixer(x, result, cache)


def test_a_mixer_on_rows_may_not_run_as_if_each_row_were_a_sequence():
    """An op that is given no state inside one is refused, also where no step is under way."""

    class Forgetful(nn.Module):
        @on_rows
        def __call__(self, x, cache=None):
            return windows(mx.zeros((x.shape[0], TAPS, x.shape[2])), x, TAPS)[:, -1:]

    with pytest.raises(RuntimeRefusal, match="array in place of their states"):
        Forgetful()(mx.zeros((4, 1, 8)), view([(0, 4)], StateTable(1)))
    assert row_states._RUNNING.get() is False
