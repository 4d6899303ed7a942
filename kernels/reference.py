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
from .ragged import Ragged


def write_kv(keys: mx.array, values: mx.array | None, pool: Pool, ragged: Ragged) -> Pool:
    """Put each row into its slot: keys [T, Hkv(, 1), Dk], values [T, Hkv(, 1), Dv].

    The assignment is in place if nothing else holds the pool's buffer, so a step must be evaluated
    before the next one writes.
    """
    _assign(pool, pool.keys, keys, ragged)
    if pool.values is not None and values is not None:
        _assign(pool, pool.values, values, ragged)
    return pool


def _assign(pool: Pool, store: mx.array, rows: mx.array, ragged: Ragged) -> None:
    if rows.ndim == 4:
        rows = rows.squeeze(2)
    if rows.dtype != store.dtype:
        rows = rows.astype(store.dtype)
    if pool.layout == "pages":
        index = ragged.scatter
        store[index // pool.block_size, index % pool.block_size] = rows
        return
    rows = rows.swapaxes(0, 1)
    first = ragged.single_run
    if first is not None:
        store[:, first : first + ragged.num_rows] = rows
    else:
        store[:, ragged.scatter] = rows


def gather(store: mx.array, pool: Pool, ragged: Ragged, sequence: int, low: int) -> mx.array:
    """Positions low.. of one sequence, [1, Hkv, positions, D]."""
    high = ragged.context_lens[sequence]
    first = ragged.run(sequence, low, high)
    if pool.layout == "pages":
        flat = store.flatten(0, 1)
        if first is not None:
            rows = flat[first : first + high - low]
        else:
            rows = mx.take(flat, ragged.index(sequence, low, high), axis=0)
        return rows.swapaxes(0, 1)[None]
    if first is not None:
        return store[None, :, first : first + high - low]
    return mx.take(store, ragged.index(sequence, low, high), axis=1)[None]


def take(pool: Pool, slots: mx.array) -> tuple[mx.array, mx.array | None]:
    """Keys and values at slots [n]: [Hkv, n, Dk], the same with Dv."""

    def taken(store: mx.array) -> mx.array:
        if pool.layout == "pages":
            return mx.take(store.flatten(0, 1), slots, axis=0).swapaxes(0, 1)
        return mx.take(store, slots, axis=1)

    return taken(pool.keys), None if pool.values is None else taken(pool.values)


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
        keys = gather(pool.keys, pool, ragged, i, low)
        if pool.values is None:
            values = keys[..., :value_dim]
        else:
            values = gather(pool.values, pool, ragged, i, low)
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
            offsets = np.arange(pool.block_size)
            read = (np.array(sources)[:, None] * pool.block_size + offsets).ravel()
            wrote = (np.array(targets)[:, None] * pool.block_size + offsets).ravel()
            store[:, mx.array(wrote)] = store[:, mx.array(read)]
    return replace(pool)
