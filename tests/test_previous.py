"""The row before each row in its own sequence, over steps in which sequences join and leave."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlxrewrite.kernels import launch
from mlxrewrite.kernels.shift import Origins
from mlxrewrite.runtime import previous
from mlxrewrite.runtime.batch import Batch
from mlxrewrite.runtime.cache import PagedCache
from mlxrewrite.runtime.caches import ArraysCache
from mlxrewrite.runtime.compare import compare, original_logits, rewritten_logits
from mlxrewrite.runtime.previous import keep_last_rows, previous_rows
from mlxrewrite.runtime.rows import Rows
from mlxrewrite.runtime.schedule import random_schedule
from mlxrewrite.runtime.states import StateTable
from mlxrewrite.runtime.verify import _models, _read
from mlxrewrite.runtime.views import StateLeaf, StateView

CONFIGS = Path(__file__).parent / "configs"
STEPS = [  # rows of each sequence
    {0: 3},
    {0: 1, 1: 2, 2: 1},
    {0: 1, 1: 1, 2: 1},
    {0: 1, 1: 1, 2: 1},
    {2: 2, 0: 1},
    {1: 1, 3: 1},
    {3: 1, 1: 1, 4: 4, 2: 1},
]


def view_of(table: StateTable, step: dict[int, int], lengths: dict[int, int]) -> StateView:
    rows, start = [], 0
    for sequence, count in step.items():
        rows.append(Rows(sequence, start, count, lengths.get(sequence, 0)))
        start += count
    batch = Batch(mx.zeros((start, 1)), mx.zeros(start), tuple(rows), (), None, (), None, 0)
    return StateView(ArraysCache(1), StateLeaf(table), batch, 0, ())


def errors() -> float:
    """The largest difference over the steps; each row is its sequence and its position."""
    table, lengths, worst = StateTable(1), {}, 0.0
    for step in STEPS:
        view = view_of(table, step, lengths)
        rows, wanted = [], []
        for sequence, count in step.items():
            for position in range(lengths.get(sequence, 0), lengths.get(sequence, 0) + count):
                rows.append([10 * sequence + 1, position])
                wanted.append([10 * sequence + 1, position - 1] if position else [0, 0])
            lengths[sequence] = position + 1
        given = mx.array(np.array(rows, np.float32))[:, :, None]
        got = previous_rows(given, view, 0)
        keep_last_rows(view, 0, given, 2)
        assert got.shape == given.shape
        worst = max(worst, float(mx.abs(got[..., 0] - mx.array(wanted)).max()))
    return worst


@pytest.mark.parametrize("where", [None, "runner"])
def test_each_row_finds_the_one_before_it(where):
    with launch.backend(where):
        assert errors() == 0.0


def _first_row_of_the_step(patch):
    patch.setattr(previous, "ends_of", lambda b: mx.array([part.start for part in b.rows]))


def _row_above_whosever_it_is(patch):
    one = Origins.of
    patch.setattr(previous, "origins_of", lambda b, begun: one([b.num_rows], begun[:1]))


def _kept_rows_in_another_order(patch):
    plain = StateTable.read
    patch.setattr(StateTable, "read", lambda *a: plain(*a)[::-1])


@pytest.mark.parametrize(
    "bug", [_first_row_of_the_step, _row_above_whosever_it_is, _kept_rows_in_another_order]
)
def test_seeded_bugs_are_seen(bug, monkeypatch):
    bug(monkeypatch)
    assert errors() > 0


def test_a_model_sees_a_seeded_bug(monkeypatch):
    """The last row of a step where that of each sequence belongs."""
    monkeypatch.setattr(previous, "ends_of", lambda b: mx.array([b.num_rows - 1] * len(b.rows)))
    _, config, _ = _read(CONFIGS / "baichuan_m1.json")
    original, rewritten, *_ = _models(config, None, 0, None, None)
    schedule = random_schedule(1, ((9, 5), (1, 9), (8, 4), (6, 6)), 60, 7)
    cache = PagedCache(rewritten, 4, num_blocks=60, poison=True)
    theirs = original_logits(original, schedule, "same")
    assert not compare(theirs, rewritten_logits(cache, schedule)).within(1e-4)


def test_what_does_not_fit_is_refused():
    table = StateTable(1)
    view = view_of(table, {0: 2}, {})
    with pytest.raises(TypeError, match="expected 2 rows"):
        previous_rows(mx.zeros((3, 1)), view, 0)
    with pytest.raises(TypeError, match="states of a paged cache"):
        previous_rows(mx.zeros((2, 1)), None, 0)
    with pytest.raises(TypeError, match="not that of tokens"):
        keep_last_rows(view, 0, mx.zeros((2, 4, 3)), 1)
    previous_rows(mx.zeros((2, 4, 1)), view, 0)
    with pytest.raises(TypeError, match="predecessors of rows"):
        keep_last_rows(view, 0, mx.zeros((2, 3, 1)), 2)
    keep_last_rows(view, 0, mx.zeros((2, 4, 1)), 2)
    with pytest.raises(TypeError, match="the states are rows"):
        previous_rows(mx.zeros((1, 3, 1)), view_of(table, {0: 1}, {0: 2}), 0)
