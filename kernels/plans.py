"""Work lists: which threadgroup does what in one step. Made on the host, once per step and group of
layers, so that kernels need no search and know nothing of windows, chunks or ragged batches."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .metadata import padded
from .ragged import Ragged, rounded

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


def rows_of(ragged: Ragged, sequences: tuple[int, ...]) -> Ints:
    """The rows of some sequences."""
    return np.concatenate([np.arange(*ragged.starts[i : i + 2]) for i in sequences])


def require_live(ragged: Ragged, owners: Ints, low: Ints) -> None:
    """Refuse positions whose blocks were given back, see `Ragged.require_live`."""
    kept = np.array(ragged.dropped)[owners] * ragged.block_size
    if (low < kept).any():
        at = int(np.argmax(low < kept))
        ragged.require_live(int(owners[at]), int(low[at]))


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
    rows = rows_of(ragged, sequences)
    high = ragged.host_positions[rows]
    low = first_seen(high, window, chunk)
    require_live(ragged, owner, low)
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
        row_items = packed_ends(ends)
        # Work of the last item once more, into parts that no row has.
        items = _filled(ragged, items, items[-1])
    return DecodePlan(len(rows), len(items), mx.array(items), row_items)


def _filled(
    ragged: Ragged, items: npt.NDArray[np.int32], idle: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """Items of a split call; where rows are single, so many that the next steps have as many."""
    if ragged.max_query_len > 1:
        return items
    more = np.repeat(idle[None], rounded(len(items)) - len(items), axis=0)
    return np.concatenate([items, more])


@dataclass(frozen=True, slots=True, eq=False)
class TiledPlan:
    """Items of the tiled kernel, int32 [n, 8], see its template. row_items as in `DecodePlan`;
    num_parts: outputs of a split call, one for each row and part of its keys."""

    num_rows: int
    num_items: int
    num_parts: int
    items: mx.array
    row_items: mx.array | None


def row_spans(ragged: Ragged, window: int | None, chunk: int | None) -> mx.array:
    """First and last key of each row: int32 [>= T, 2]."""
    first = first_seen(ragged.host_positions, window, chunk)
    return padded(np.stack([first, ragged.host_positions], axis=1))


def tiled_plan(
    ragged: Ragged,
    sequences: tuple[int, ...],
    *,
    window: int | None,
    chunk: int | None,
    group: int,
    row_tiles: int,
    tile: int,
    split: int,
) -> TiledPlan:
    """Items for all rows of some sequences; the keys of each in parts of about `split` at most.

    All rows of a sequence have equally many parts, since a row's query heads may be spread over
    two items; a part none of whose keys a row sees is merged with weight 0.
    """
    chosen = np.array(sequences)
    length, end = np.array(ragged.query_lens)[chosen], np.array(ragged.context_lens)[chosen]
    lowest = first_seen(end - length, window, chunk)
    require_live(ragged, chosen, lowest)
    base = lowest // tile * tile
    tiles = (end - 1 - base) // tile + 1
    parts = -(-tiles * tile // split)
    per_part = -(-tiles // parts) * tile
    parts = -(-tiles * tile // per_part)
    outputs = parts * length  # of each sequence
    size = 16 * row_tiles
    pieces = -(-length * group // size)  # of the packed rows, each for every part
    counts = parts * pieces
    owner = np.repeat(np.arange(len(chosen)), counts)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    part, first = index // pieces[owner], index % pieces[owner] * size
    last = np.minimum(first + size, (length * group)[owner])
    begin, start = base[owner] + part * per_part[owner], (end - length)[owner]
    low = np.maximum(first_seen(start + first // group, window, chunk), begin)
    high = np.minimum(start + (last - 1) // group, begin + per_part[owner] - 1)
    none = low > high
    packed = np.zeros((len(owner), 8), np.int32)
    packed[:, 0] = np.array(ragged.starts)[chosen][owner]
    packed[:, 1], packed[:, 2] = first, last
    packed[:, 3], packed[:, 4] = np.where(none, tile, low), np.where(none, -1, high)
    packed[:, 5] = table_starts(ragged)[chosen][owner]
    packed[:, 6] = (np.cumsum(outputs) - outputs)[owner] + part
    packed[:, 7] = parts[owner]
    # The longest first: what is left for the end is short.
    packed = packed[np.argsort(packed[:, 3] - packed[:, 4], kind="stable")]
    row_parts, num_parts = np.repeat(parts, length), int(outputs.sum())
    split_rows = num_parts > len(row_parts)
    if split_rows:
        packed = _filled(ragged, packed, np.array([0, 1, 1, tile, -1, 0, 0, 1], np.int32))
        num_parts = num_parts if ragged.max_query_len > 1 else rounded(num_parts)
    return TiledPlan(
        len(row_parts),
        len(packed),
        num_parts,
        mx.array(packed),
        packed_ends(np.cumsum(row_parts)) if split_rows else None,
    )


def packed_ends(ends: Ints) -> mx.array:
    """0 and the ends, as int32 of at least MIN_METADATA entries."""
    return padded([0, *ends])
