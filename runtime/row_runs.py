"""Recurrences over the rows of a ragged batch: few runs, however different sequences' lengths are.

Sequences with one row are one run. Longer ones are put together, the shorter ones with padding
behind that changes nothing: a decay of 1 and nothing written. So a state after the padding is the
one after a sequence's last row, and outputs of padding are dropped. Those with and without a state
run together, zeros for those without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .batch import Batch
from .rows import Rows
from .views import HeldState, NewState

Fill = float | None
# What a recurrence does with rows [N, L, ...] and states [n, ...], or None for zeros.
Rule = Callable[[Sequence[mx.array], mx.array | None], tuple[mx.array, mx.array]]
RUN = 512  # rows of padding that another run is taken to cost as much as: its launches, its graph


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Sequences that a recurrence takes together, `length` rows each; the first `begun` of them
    have a state.

    `index` [N, L] int32 are their rows in the batch, a sequence's last one again for padding; None
    where they are neighbours in order, from row `first` on. `real` [N, L] says which are no
    padding, None where all are.
    """

    sequences: tuple[int, ...]
    begun: int
    length: int
    first: int
    index: mx.array | None
    real: mx.array | None

    def rows(self, x: mx.array, fill: Fill) -> mx.array:
        """x [T, 1, ...] -> [N, L, ...], with `fill` for padding."""
        count, length = len(self.sequences), self.length
        if self.index is None:
            stop = self.first + count * length
            return x[self.first : stop].reshape(count, length, *x.shape[2:])
        taken = mx.take(x.squeeze(1), self.index, axis=0)
        if self.real is None or fill is None:
            return taken
        real = self.real.reshape(count, length, *(1,) * (taken.ndim - 2))
        return mx.where(real, taken, mx.array(fill, taken.dtype))

    def states(self, held: HeldState) -> mx.array | None:
        """The sequences' states [N, ...], None if all are new."""
        known = held.read(self.sequences[: self.begun])
        new = len(self.sequences) - self.begun
        if known is None or not new:
            return known
        # float32, as recurrences begin: what others hold does not decide on a sequence's type.
        return mx.concatenate([known, mx.zeros((new, *known.shape[1:]), mx.float32)])


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """The runs of a step. `order` [T] int32 says where each row of the batch is among their rows
    below each other; None where these are the batch's, in order."""

    runs: tuple[Run, ...]
    order: mx.array | None

    @staticmethod
    def of(parts: Sequence[Rows], begun: Sequence[bool]) -> Runs:
        """Of a batch's sequences, which have a state or not."""
        starts = np.array([part.start for part in parts], dtype=np.int32)
        lengths = np.array([part.length for part in parts], dtype=np.int32)
        order = np.empty(lengths.sum(), dtype=np.int32)
        runs, done = [], 0
        for numbers in together(lengths.tolist()):
            members = sorted(numbers, key=lambda i: (not begun[i], i))
            longest = int(lengths[members].max())
            offsets = np.arange(longest, dtype=np.int32)
            real = offsets < lengths[members, None]
            index = starts[members, None] + np.minimum(offsets, lengths[members, None] - 1)
            order[index[real]] = done + np.flatnonzero(real)
            done += real.size
            first = int(index[0, 0])
            apart = not np.array_equal(index.ravel(), np.arange(first, first + index.size))
            run = Run(
                sequences=tuple(parts[i].sequence for i in members),
                begun=sum(begun[i] for i in members),
                length=longest,
                first=first,
                index=mx.array(index) if apart else None,
                real=None if real.all() else mx.array(real),
            )
            runs.append(run)
        whole = done == len(order) and np.array_equal(order, np.arange(done))
        return Runs(tuple(runs), None if whole else mx.array(order))

    def joined(self, outputs: Sequence[mx.array]) -> mx.array:
        """Outputs [N, L, ...] of each run -> [T, 1, ...]."""
        flat = [y.reshape(y.shape[0] * y.shape[1], 1, *y.shape[2:]) for y in outputs]
        rows = flat[0] if len(flat) == 1 else mx.concatenate(flat)
        return rows if self.order is None else mx.take(rows, self.order, axis=0)


def together(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Which sequences run together: those of one row, and the longer ones by their lengths.

    Neighbours in length share a run, so that the rows of padding, and RUN more for each run, are as
    few as can be. Few prompts are one run or two, unless one is much longer than another; a step
    that reads many has as many more as save that much padding each.
    """
    single = [i for i, length in enumerate(lengths) if length == 1]
    if single:
        yield single
    alike: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        if length > 1:
            alike.setdefault(length, []).append(i)
    kinds = np.array(sorted(alike, reverse=True), dtype=np.int64)
    before = np.cumsum([0, *(len(alike[kind]) for kind in kinds.tolist())])
    # The least cost of the first j kinds, and which is the longest of the last run among them.
    cost, longest = np.zeros(len(kinds) + 1, dtype=np.int64), [0] * (len(kinds) + 1)
    for j in range(1, len(kinds) + 1):
        costs = cost[:j] + RUN + (before[j] - before[:j]) * kinds[:j]
        longest[j] = int(costs.argmin())
        cost[j] = costs[longest[j]]
    stop = len(kinds)
    while stop:
        yield [i for kind in kinds[longest[stop] : stop].tolist() for i in alike[kind]]
        stop = longest[stop]


def runs_of(batch: Batch, begun: tuple[bool, ...]) -> Runs:
    """The runs of a step; worked out once for all layers."""
    found: Runs | None = batch.memo.get(("runs", begun))
    if found is None:
        found = batch.memo["runs", begun] = Runs.of(batch.rows, begun)
    return found


def over_rows(
    held: HeldState, rows: Sequence[tuple[mx.array, Fill]], function: Callable[..., Any], run: Rule
) -> tuple[mx.array, NewState]:
    """A recurrence on rows [T, 1, ...], each with what padding of it has to be to change nothing.

    None is for rows whose padding does not count because of the others: it is a sequence's own last
    row, so that what is not finite stays in its sequence. Returns outputs [T, 1, ...], and states.
    """
    batch = held.batch
    for x, _ in rows:
        require_rows(x, batch, function)
    plan = runs_of(batch, held.begun())
    outputs, states = [], []
    for part in plan.runs:
        y, state = run([part.rows(x, fill) for x, fill in rows], part.states(held))
        if y.shape[:2] != (len(part.sequences), part.length):
            raise TypeError(
                f"{function.__qualname__}: expected [{len(part.sequences)}, {part.length}, ...] "
                f"from its recurrence, got {list(y.shape)}"
            )
        outputs.append(y)
        states.append((part.sequences, state))
    return plan.joined(outputs), NewState(lambda _: states, held)


def require_rows(
    x: mx.array, batch: Batch, function: Callable[..., Any], rank: int | None = None
) -> mx.array:
    """x, if it is rows [T, 1, ...] of the batch. Raises TypeError otherwise."""
    if x.shape[:2] != (batch.num_rows, 1) or rank not in (None, x.ndim):
        raise TypeError(
            f"{function.__qualname__}: expected [{batch.num_rows}, 1, ...] from a batch of "
            f"{batch.num_rows} rows, got {list(x.shape)}"
        )
    return x
