"""Mixers with states that run on rows: what they do beside their states is done for all at once.

`cache[i]` is a `HeldState` to them, which ops hand to each sequence's own rows, and what they store
is what an op made of it (`NewState`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlxrewrite.kernels.shift import Origins, shift

from .batch import Batch
from .per_length import Gather, Group, grouped, rows_of
from .views import HeldState, NewState, States

__all__ = ["last_of_sequences", "shifted_rows"]

_Function = Callable[..., Any]


def shifted_rows(x: str, state: str) -> Callable[[_Function], _Function]:
    """In place of a function that gives each token the one before it.

    The arguments are the function's names of x and of the last token of before, which is zeros
    where there is none. With a state in a paged cache x is rows [T, 1, D], and so is the result;
    with any other the function itself runs.
    """

    def decorator(function: _Function) -> _Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            held = given.get(state)
            if not isinstance(held, HeldState):
                return function(*args, **kwargs)
            return _shifted(_rows(given[x], held.batch, function, rank=3), held)

        return call

    return decorator


def _shifted(rows: mx.array, held: HeldState) -> mx.array:
    parts, begun = held.batch.rows, held.begun()
    states = held.read(tuple(p.sequence for p, has in zip(parts, begun, strict=True) if has))
    if all(begun) and len(parts) == rows.shape[0]:
        assert states is not None
        return states  # every row is the next of its sequence
    before = None if states is None else states[:, 0]
    return shift(rows[:, 0], before, origins_of(held.batch, begun))[:, None]


def origins_of(batch: Batch, begun: tuple[bool, ...]) -> Origins:
    """Where each row's predecessor is, if these of the batch's sequences have a state."""
    found: Origins | None = batch.memo.get(("origins", begun))
    if found is None:
        lengths = [part.length for part in batch.rows]
        found = batch.memo["origins", begun] = Origins.of(lengths, begun)
    return found


def ends_of(batch: Batch) -> mx.array:
    """Each sequence's last row, int32."""
    found: mx.array | None = batch.memo.get("ends")
    if found is None:
        last = np.array([part.stop - 1 for part in batch.rows], dtype=np.int32)
        found = batch.memo["ends"] = mx.array(last)
    return found


def last_of_sequences(x: mx.array) -> NewState:
    """The last of each sequence's rows, as a state: x [T, 1, ...] -> [n, 1, ...]."""

    def parts(batch: Batch) -> States:
        rows = _rows(x, batch, last_of_sequences)
        sequences = tuple(part.sequence for part in batch.rows)
        if len(sequences) == batch.num_rows:
            return [(sequences, rows)]
        return [(sequences, mx.take(rows, ends_of(batch), axis=0))]

    return NewState(parts)


def by_length(
    held: HeldState,
    rows: Sequence[mx.array],
    function: _Function,
    run: Callable[[Sequence[mx.array], mx.array | None], tuple[mx.array, mx.array]],
) -> tuple[mx.array, NewState]:
    """`run` over all sequences with equally many rows: rows [T, 1, ...] as [N, L, ...], with their
    states, None where they have none. Its outputs come back as rows, its states as one."""
    batch = held.batch
    rows = [_rows(x, batch, function) for x in rows]
    groups = _groups(held)
    outputs, states = [], []
    for group in groups:
        gather = Gather(batch, group)
        y, state = run([gather(x) for x in rows], held.read(group.sequences))
        outputs.append(y)
        states.append((group.sequences, state))
    return rows_of(outputs, groups, batch.num_rows, function), NewState(lambda _: states)


def _groups(held: HeldState) -> tuple[Group, ...]:
    """The batch's sequences by their number of rows, those with and without a state apart."""
    batch = held.batch
    lengths = [part.length for part in batch.rows]
    key = tuple(zip(lengths, held.begun(), strict=True))
    found: tuple[Group, ...] | None = batch.memo.get(("groups", key))
    if found is None:
        found = batch.memo["groups", key] = tuple(grouped(batch, key))
    return found


def _rows(x: mx.array, batch: Batch, function: _Function, rank: int | None = None) -> mx.array:
    if x.shape[:2] != (batch.num_rows, 1) or rank not in (None, x.ndim):
        raise TypeError(
            f"{function.__qualname__}: expected [{batch.num_rows}, 1, ...] from a batch of "
            f"{batch.num_rows} rows, got {list(x.shape)}"
        )
    return x
