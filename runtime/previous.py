"""State that is the last token's row: windows of two tokens over ragged batches.

A mixer that computes with the token before finds, where every token is a batch row of its own, the
row above in the same step, or what the last step kept for the sequence. New sequences begin with
zeros. Single rows take the kept rows as they are: the batch they were kept for is the same.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlxrewrite.kernels.shift import shift

from .row_states import ends_of, origins_of
from .views import StateView

__all__ = ["keep_last_rows", "previous_rows"]


def previous_rows(rows: mx.array, cache: Any, index: int) -> mx.array:
    """The row before each of `rows` [T, ...] in its own sequence, zeros before a first one.

    `cache` is a view of states, of which array `index` holds the last row of each sequence.
    """
    view = _checked(rows, cache, "previous_rows")
    batch, table = view.batch, view.table
    batch.memo["previous", id(table), index] = rows.shape[1:]
    sequences = tuple(part.sequence for part in batch.rows)
    begun = table.known(index, sequences)
    held = tuple(name for name, has in zip(sequences, begun, strict=True) if has)
    states = table.read(index, held) if held else None
    if states is not None and states.shape[1:] != rows.shape[1:]:
        raise TypeError(
            f"previous_rows: the states are rows of {list(states.shape[1:])}, this step's of "
            f"{list(rows.shape[1:])}"
        )
    if states is not None and all(begun) and len(sequences) == len(rows):
        return states.astype(rows.dtype)  # every row is the next of its sequence
    flat = (len(rows), -1)
    before = None if states is None else states.reshape(len(held), -1)
    return shift(rows.reshape(flat), before, origins_of(batch, begun)).reshape(rows.shape)


def keep_last_rows(cache: Any, index: int, rows: mx.array, axis: int) -> None:
    """Keep the last row of each sequence among `rows` [T, ...] as array `index` of its states.

    `axis` is where the original has tokens; it has size 1, since each row is one.
    """
    view = _checked(rows, cache, "keep_last_rows")
    if rows.shape[axis] != 1:
        raise TypeError(f"keep_last_rows: axis {axis} of {list(rows.shape)} is not that of tokens")
    batch, table = view.batch, view.table
    read = batch.memo.get(("previous", id(table), index))
    if read is not None and read != rows.shape[1:]:
        raise TypeError(
            f"keep_last_rows: rows of {list(rows.shape[1:])} are kept where the step read the "
            f"predecessors of rows of {list(read)}"
        )
    # A copy, or what the rows are a part of would stay in memory.
    single = len(batch.rows) == len(rows)
    last = mx.contiguous(rows) if single else mx.take(rows, ends_of(batch), axis=0)
    table.write(index, tuple(part.sequence for part in batch.rows), last)


def _checked(rows: mx.array, cache: Any, name: str) -> StateView:
    if not isinstance(cache, StateView):
        raise TypeError(f"{name}: expected states of a paged cache, got {type(cache).__name__}")
    if rows.shape[0] != cache.batch.num_rows:
        raise TypeError(
            f"{name}: expected {cache.batch.num_rows} rows, got an array of {list(rows.shape)}"
        )
    return cache
