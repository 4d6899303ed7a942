"""State that is the last token's row: windows of two tokens over ragged batches.

A mixer that computes with the token before finds, where every token is a batch row of its own, the
row above in the same step, or what the last step kept for the sequence. New sequences begin with
zeros. Single rows take the kept rows as they are: the batch they were kept for is the same.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from .batch import Batch
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
    known = table.known(index, sequences)
    if all(known) and len(sequences) == len(rows):
        kept = table.read(index, sequences)
        assert kept is not None
        return _like(kept, rows)
    sources = [mx.zeros((1, *rows.shape[1:]), rows.dtype), rows]
    held = tuple(name for name, is_known in zip(sequences, known, strict=True) if is_known)
    if held:
        kept = table.read(index, held)
        assert kept is not None
        sources.append(_like(kept, rows))
    return mx.concatenate(sources)[_places(batch, known)]


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
    if len(batch.rows) == len(rows):
        last = mx.contiguous(rows)
    else:
        last = rows[batch.memo_of("last rows", lambda: _last(batch))]
    table.write(index, tuple(part.sequence for part in batch.rows), last)


def _checked(rows: mx.array, cache: Any, name: str) -> StateView:
    if not isinstance(cache, StateView):
        raise TypeError(f"{name}: expected states of a paged cache, got {type(cache).__name__}")
    if rows.shape[0] != cache.batch.num_rows:
        raise TypeError(
            f"{name}: expected {cache.batch.num_rows} rows, got an array of {list(rows.shape)}"
        )
    return cache


def _like(kept: mx.array, rows: mx.array) -> mx.array:
    if kept.shape[1:] != rows.shape[1:]:
        raise TypeError(
            f"previous_rows: the states are rows of {list(kept.shape[1:])}, this step's of "
            f"{list(rows.shape[1:])}"
        )
    return kept.astype(rows.dtype)


def _last(batch: Batch) -> mx.array:
    return mx.array(np.array([part.stop - 1 for part in batch.rows], dtype=np.int32))


def _places(batch: Batch, known: tuple[bool, ...]) -> mx.array:
    """Where each row's predecessor stands: 0 a zero, then the step's rows, then the kept ones."""

    def make() -> mx.array:
        places = np.arange(batch.num_rows, dtype=np.int32)  # the row above is one further on
        kept = batch.num_rows + 1
        for part, is_known in zip(batch.rows, known, strict=True):
            places[part.start] = kept if is_known else 0
            kept += is_known
        return mx.array(places)

    return batch.memo_of(("previous", known), make)
