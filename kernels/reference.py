"""Each op in plain MLX: the gathered route, and what runs on MLX's CPU back end.

A sequence's keys are a slice of the pool where its blocks lie side by side, a gather otherwise;
then MLX's own fused attention runs over them, in float32 inside. Explicit arithmetic serves what
that function lacks (soft caps).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from .pools import Pool
from .quantization import Packing
from .ragged import Ragged


def write_kv(keys: mx.array, values: mx.array | None, pool: Pool, ragged: Ragged) -> Pool:
    """Put each row into its slot: keys [T, Hkv(, 1), Dk], values [T, Hkv(, 1), Dv].

    The assignment is in place if nothing else holds the pool's buffer, so a step must be evaluated
    before the next one writes.
    """
    for store, rows, packing in zip(
        (pool.keys, pool.values), (keys, values), _packings(pool), strict=True
    ):
        if store is not None and rows is not None:
            _assign(pool, store, rows, packing, ragged)
    return pool


def _packings(pool: Pool) -> tuple[Packing | None, Packing | None]:
    return (None, None) if pool.packings is None else (pool.packings.keys, pool.packings.values)


def _assign(
    pool: Pool, store: mx.array, rows: mx.array, packing: Packing | None, ragged: Ragged
) -> None:
    if rows.ndim == 4:
        rows = rows.squeeze(2)
    if rows.dtype != pool.dtype:
        rows = rows.astype(pool.dtype)
    if packing is not None:
        rows = packing.pack(rows)
    if pool.layout == "pages":
        index, size = ragged.scatter, pool.block_size
        if packing is not None:
            words = mx.array(packing.index(size))[index % size].flatten(1)
            store[(index // size)[:, None], words] = rows.flatten(1)
        else:
            store[index // size, index % size] = rows
        return
    rows = rows.swapaxes(0, 1)
    first = ragged.single_run
    if first is not None:
        store[:, first : first + ragged.num_rows] = rows
    else:
        store[:, ragged.scatter] = rows


def gather(pool: Pool, ragged: Ragged, sequence: int, low: int) -> tuple[mx.array, mx.array | None]:
    """Positions low.. of one sequence, [1, Hkv, positions, Dk], and the same with Dv."""
    high = ragged.context_lens[sequence]
    first = ragged.run(sequence, low, high)

    def gathered(store: mx.array | None, packing: Packing | None) -> mx.array | None:
        if store is None:
            return None
        if first is None or (packing is not None and pool.layout == "pages"):
            return _taken(pool, store, packing, ragged.index(sequence, low, high))[None]
        if pool.layout == "pages":
            return store.flatten(0, 1)[first : first + high - low].swapaxes(0, 1)[None]
        rows = store[None, :, first : first + high - low]
        return rows if packing is None else packing.unpack(rows)

    packings = _packings(pool)
    keys = gathered(pool.keys, packings[0])
    assert keys is not None
    return keys, gathered(pool.values, packings[1])


def _taken(pool: Pool, store: mx.array, packing: Packing | None, slots: mx.array) -> mx.array:
    """Rows at slots [n]: [Hkv, n, D]."""
    if pool.layout == "heads":
        rows = mx.take(store, slots, axis=1)
    elif packing is None:
        rows = mx.take(store.flatten(0, 1), slots, axis=0).swapaxes(0, 1)
    else:
        words = mx.array(packing.index(pool.block_size))[slots % pool.block_size]
        rows = store[(slots // pool.block_size)[:, None, None], words].swapaxes(0, 1)
    return rows if packing is None else packing.unpack(rows)


def take(pool: Pool, slots: mx.array) -> tuple[mx.array, mx.array | None]:
    """Keys and values at slots [n]: [Hkv, n, Dk], the same with Dv."""
    for_keys, for_values = _packings(pool)
    keys = _taken(pool, pool.keys, for_keys, slots)
    return keys, None if pool.values is None else _taken(pool, pool.values, for_values, slots)


def first_seen(position: int, window: int | None, chunk: int | None) -> int:
    """The oldest position that a row at `position` sees."""
    low = 0
    if window is not None:
        low = max(low, position - window + 1)
    if chunk is not None:
        low = max(low, position // chunk * chunk)
    return low


def attention(
    queries: mx.array,
    pool: Pool,
    ragged: Ragged,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    value_dim: int | None = None,
) -> mx.array:
    """Attention of each row over its own sequence: see `ops.attention`."""
    outputs = []
    for i in range(ragged.num_sequences):
        low = first_seen(ragged.context_lens[i] - ragged.query_lens[i], window, chunk)
        keys, values = gather(pool, ragged, i, low)
        if values is None:
            values = keys[..., :value_dim]
        outputs.append(
            sequence_attention(
                queries,
                keys,
                values,
                ragged,
                i,
                low,
                scale=scale,
                window=window,
                chunk=chunk,
                softcap=softcap,
                sinks=sinks,
            )
        )
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


def sequence_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    ragged: Ragged,
    sequence: int,
    low: int,
    *,
    scale: float,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    sinks: mx.array | None,
) -> mx.array:
    """The rows of one sequence over its positions from `low` on.

    queries: of all sequences, [T, Hq(, 1), Dk]; keys [1, Hkv, positions, Dk], values the same with
    Dv. Returns [rows, Hq(, 1), Dv].
    """
    i, rank, rows_dtype = sequence, queries.ndim, queries.dtype
    length, end = ragged.query_lens[i], ragged.context_lens[i]
    if sinks is not None and sinks.dtype != rows_dtype:
        sinks = sinks.astype(rows_dtype)
    if keys.dtype != rows_dtype:
        keys, values = keys.astype(rows_dtype), values.astype(rows_dtype)
    rows = queries if rank == 4 else queries[:, :, None]
    if ragged.num_sequences > 1:
        rows = rows[ragged.starts[i] : ragged.starts[i + 1]]
    mask: mx.array | str | None = None
    if length > 1:
        rows = rows.transpose(2, 1, 0, 3)
        plain = first_seen(end - 1, window, chunk) == low
        mask = "causal" if plain else ragged.seen(i, low, window, chunk)
    if softcap is None:
        out = mx.fast.scaled_dot_product_attention(
            rows, keys, values, scale=scale, mask=mask, sinks=sinks
        )
    else:
        if mask == "causal":
            mask = ragged.seen(i, low, window, chunk)
        out = _softcapped(rows, keys, values, scale=scale, cap=softcap, mask=mask, sinks=sinks)
    if length > 1:
        out = out.transpose(2, 1, 0, 3)
    return out.squeeze(2) if rank == 3 else out


def _softcapped(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    cap: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """Scores squashed to cap * tanh(score / cap) before mask and softmax, in float32."""
    kv_heads, dtype = keys.shape[1], queries.dtype
    _, heads, length, width = queries.shape
    grouped = (queries * scale).reshape(1, kv_heads, -1, length, width)
    scores = (grouped @ keys[:, :, None].swapaxes(-1, -2)).astype(mx.float32)
    scores = mx.tanh(scores / cap) * cap
    if isinstance(mask, mx.array):
        scores = mx.where(mask, scores, -mx.inf)
    if sinks is not None:
        column = sinks.astype(mx.float32).reshape(1, kv_heads, -1, 1, 1)
        column = mx.broadcast_to(column, (*scores.shape[:-1], 1))
        scores = mx.concatenate([column, scores], axis=-1)
    weights = mx.softmax(scores, axis=-1)
    if sinks is not None:
        weights = weights[..., 1:]
    out = weights.astype(dtype) @ values[:, :, None]
    return out.reshape(1, heads, length, values.shape[-1])


def copy_blocks(pool: Pool, sources: Sequence[int], targets: Sequence[int]) -> Pool:
    """Copy whole blocks inside a pool."""
    for store in (pool.keys, pool.values):
        if store is None:
            continue
        if pool.layout == "pages":
            store[mx.array(list(targets))] = store[mx.array(list(sources))]
        else:
            store[:, _block_slots(pool, targets)] = store[:, _block_slots(pool, sources)]
    return replace(pool)


def read_blocks(pool: Pool, blocks: Sequence[int]) -> tuple[mx.array, mx.array]:
    """Whole blocks of a pool of codes, as words [n, ...]."""
    assert pool.values is not None
    if pool.layout == "pages":
        index = mx.array(list(blocks))
        return pool.keys[index], pool.values[index]
    slots = _block_slots(pool, blocks)

    def read(store: mx.array) -> mx.array:
        rows = store[:, slots].swapaxes(0, 1)
        return rows.reshape(len(blocks), pool.block_size, *rows.shape[1:])

    return read(pool.keys), read(pool.values)


def write_blocks(pool: Pool, blocks: Sequence[int], keys: mx.array, values: mx.array) -> Pool:
    """Words as `read_blocks` gives them into blocks of a pool of codes."""
    for store, words in ((pool.keys, keys), (pool.values, values)):
        assert store is not None
        if pool.layout == "pages":
            store[mx.array(list(blocks))] = words
        else:
            store[:, _block_slots(pool, blocks)] = words.flatten(0, 1).swapaxes(0, 1)
    return replace(pool)


def _block_slots(pool: Pool, blocks: Sequence[int]) -> mx.array:
    slots = np.array(blocks)[:, None] * pool.block_size + np.arange(pool.block_size)
    return mx.array(slots.ravel().astype(np.int32))
