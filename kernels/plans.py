"""Work lists: which threadgroup does what in one step. Made on the host, once per step and group of
layers, so that kernels need no search and know nothing of windows, chunks or ragged batches."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .ragged import MIN_METADATA, Ragged

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class DecodePlan:
    """Items of the decode kernel: int32 [n, 8] of row, first key, last key, start of the table,
    output row. row_items [rows + 1]: the first item of each row; None if no row is split."""

    num_rows: int
    num_items: int
    items: mx.array
    row_items: mx.array | None


def first_seen(positions: Ints, window: int | None, chunk: int | None) -> Ints:
    """The oldest position that rows at `positions` see."""
    low = np.zeros_like(positions)
    if window is not None:
        low = np.maximum(low, positions - window + 1)
    if chunk is not None:
        low = np.maximum(low, positions // chunk * chunk)
    return low


def table_starts(ragged: Ragged) -> Ints:
    """Where block 0 of each sequence would be in the flat block table; may be negative."""
    width = ragged.block_tables.shape[1]
    starts: Ints = np.arange(ragged.num_sequences) * width - np.array(ragged.dropped)
    return starts


def decode_plan(
    ragged: Ragged,
    sequences: tuple[int, ...],
    *,
    window: int | None,
    chunk: int | None,
    tile: int,
    split: int,
) -> DecodePlan:
    """Items for all rows of some sequences, each of about `split` keys at most.

    The keys of a row are divided evenly, in whole tiles.
    """
    lengths = np.array(ragged.query_lens)[list(sequences)]
    owner = np.repeat(np.array(sequences), lengths)
    rows = np.concatenate([np.arange(*ragged.starts[i : i + 2]) for i in sequences])
    high = ragged.host_positions[rows]
    low = first_seen(high, window, chunk)
    tiles = high // tile - low // tile + 1
    parts = -(-tiles * tile // split)
    per_part = -(-tiles // parts)
    parts = -(-tiles // per_part)
    ends = np.cumsum(parts)
    part = np.arange(ends[-1]) - np.repeat(ends - parts, parts)
    begin = np.repeat(low // tile * tile, parts) + part * np.repeat(per_part * tile, parts)
    items = np.zeros((ends[-1], 8), np.int32)
    items[:, 0] = np.repeat(rows, parts)
    items[:, 1] = np.maximum(begin, np.repeat(low, parts))
    items[:, 2] = np.minimum(begin + np.repeat(per_part * tile, parts) - 1, np.repeat(high, parts))
    items[:, 3] = np.repeat(table_starts(ragged)[owner], parts)
    items[:, 4] = np.repeat(np.arange(len(rows)), parts)
    row_items = None
    if ends[-1] > len(rows):
        packed = np.zeros(max(MIN_METADATA, len(rows) + 1), np.int32)
        packed[1 : len(rows) + 1] = ends
        row_items = mx.array(packed)
    return DecodePlan(len(rows), int(ends[-1]), mx.array(items), row_items)
