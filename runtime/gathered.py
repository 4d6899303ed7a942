"""Paged attention in plain MLX: gather each sequence's blocks, then MLX's own fused attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from .blocks import BlockTable
from .ragged import Rows


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Block metadata of one group of layers for one step.

    blocks, slots [T] int32: where each row's keys and values go. `tables[i]` are the block numbers
    of sequence i from position `first[i]` on.
    """

    block_size: int
    rows: tuple[Rows, ...]
    blocks: mx.array
    slots: mx.array
    tables: tuple[mx.array, ...]
    first: tuple[int, ...]
    masks: dict[tuple[int, int | None, int | None, int | None], mx.array] = field(
        default_factory=dict
    )


def build(rows: tuple[Rows, ...], tables: Sequence[BlockTable], block_size: int) -> Ragged:
    """Metadata for a step whose blocks are already in the tables."""
    blocks, slots, arrays, first = [], [], [], []
    for part, table in zip(rows, tables, strict=True):
        positions = np.arange(part.position, part.end, dtype=np.int32)
        numbers = np.array(table.blocks, dtype=np.int32)
        blocks.append(numbers[positions // block_size - table.dropped])
        slots.append(positions % block_size)
        arrays.append(mx.array(numbers))
        first.append(table.dropped * block_size)
    return Ragged(
        block_size,
        rows,
        mx.array(np.concatenate(blocks)),
        mx.array(np.concatenate(slots)),
        tuple(arrays),
        tuple(first),
    )


def write_kv(
    key_pool: mx.array, value_pool: mx.array, keys: mx.array, values: mx.array, ragged: Ragged
) -> tuple[mx.array, mx.array]:
    """Put each row's keys [T, Hkv, 1, Dk] and values [T, Hkv, 1, Dv] into its block.

    Pools are [num_blocks, block_size, Hkv, D]; returns the pools that hold the rows.
    """
    key_pool[ragged.blocks, ragged.slots] = keys[:, :, 0].astype(key_pool.dtype)
    value_pool[ragged.blocks, ragged.slots] = values[:, :, 0].astype(value_pool.dtype)
    return key_pool, value_pool


def attention(
    queries: mx.array,
    key_pool: mx.array,
    value_pool: mx.array,
    ragged: Ragged,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    prefix: int | None = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
    tiled_heads: bool = False,
) -> mx.array:
    """Causal attention of each row over its own sequence: [T, Hq, 1, Dk] -> [T, Hq, 1, Dv]."""
    if prefix is not None:
        raise NotImplementedError("attention in both directions inside a prefix")
    kv_heads = key_pool.shape[2]
    num_heads = queries.shape[1]
    if tiled_heads:
        queries = _untile(queries, kv_heads)
    dtype = _promoted(queries.dtype, key_pool.dtype)
    outputs = []
    for index, part in enumerate(ragged.rows):
        low = _first_seen(part.position, window, chunk)
        keys = _gather(key_pool, ragged, index, low, part.end).astype(dtype)
        values = _gather(value_pool, ragged, index, low, part.end).astype(dtype)
        rows = queries[part.start : part.stop].astype(dtype)
        if part.length > 1:  # [L, Hq, 1, Dk] -> [1, Hq, L, Dk]
            rows = rows.transpose(2, 1, 0, 3)
        mask = _mask(ragged, index, low, window, chunk)
        if softcap is None:
            out = mx.fast.scaled_dot_product_attention(
                rows, keys, values, scale=scale, mask=mask, sinks=sinks
            )
        else:
            out = _softcapped(rows, keys, values, scale, softcap, mask)
        outputs.append(out.transpose(2, 1, 0, 3) if part.length > 1 else out)
    result = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    return _retile(result, kv_heads, num_heads) if tiled_heads else result


def _promoted(first: mx.Dtype, second: mx.Dtype) -> mx.Dtype:
    return first if first == second else mx.result_type(mx.array(0, first), mx.array(0, second))


def _first_seen(position: int, window: int | None, chunk: int | None) -> int:
    low = 0
    if window is not None:
        low = max(low, position - window + 1)
    if chunk is not None:
        low = max(low, position // chunk * chunk)
    return low


def _gather(pool: mx.array, ragged: Ragged, index: int, low: int, high: int) -> mx.array:
    """Positions low..high-1 of one sequence, [1, Hkv, high - low, D]."""
    size, first = ragged.block_size, ragged.first[index]
    begin, end = (low - first) // size, -(-(high - first) // size)
    pages = mx.take(pool, ragged.tables[index][begin:end], axis=0)
    skip = low - first - begin * size
    flat = pages.flatten(0, 1)[skip : skip + high - low]
    return flat.transpose(1, 0, 2)[None]


def _mask(
    ragged: Ragged, index: int, low: int, window: int | None, chunk: int | None
) -> mx.array | str | None:
    part = ragged.rows[index]
    if part.length == 1:
        return None
    last_low = _first_seen(part.end - 1, window, chunk)
    if last_low == low:
        return "causal"
    key = (index, low, window, chunk)
    if key not in ragged.masks:
        mine = np.arange(part.position, part.end)[:, None]
        theirs = np.arange(low, part.end)[None]
        seen = theirs <= mine
        if window is not None:
            seen &= theirs > mine - window
        if chunk is not None:
            seen &= theirs // chunk == mine // chunk
        ragged.masks[key] = mx.array(seen)
    return ragged.masks[key]


def _softcapped(  # noqa: PLR0917
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    cap: float,
    mask: mx.array | str | None,
) -> mx.array:
    """Scores squashed by cap * tanh(scores / cap) before the softmax."""
    kv_heads, length, total = keys.shape[1], queries.shape[2], keys.shape[2]
    grouped = (queries * scale).reshape(1, kv_heads, -1, length, queries.shape[3])
    scores = grouped @ keys[:, :, None].swapaxes(-1, -2)
    scores = mx.tanh(scores / cap) * cap
    if isinstance(mask, str):
        mask = mx.arange(total - length, total)[:, None] >= mx.arange(total)[None]
    if mask is not None:
        scores = mx.where(mask, scores, mx.array(-mx.inf, scores.dtype))
    weights = mx.softmax(scores, axis=-1, precise=True)
    return (weights @ values[:, :, None]).flatten(1, 2)


def _untile(queries: mx.array, kv_heads: int) -> mx.array:
    """Heads in the order h % kv_heads -> the order h // group."""
    rows, heads, one, width = queries.shape
    tiles = queries.reshape(rows, heads // kv_heads, kv_heads, one, width)
    return tiles.swapaxes(1, 2).reshape(rows, heads, one, width)


def _retile(result: mx.array, kv_heads: int, heads: int) -> mx.array:
    rows, _, one, width = result.shape
    groups = result.reshape(rows, kv_heads, heads // kv_heads, one, width)
    return groups.swapaxes(1, 2).reshape(rows, heads, one, width)
