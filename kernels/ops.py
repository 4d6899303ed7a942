"""Paged attention: the ops that rewritten models call, on every back end.

    pool = new_pool(num_blocks=..., block_size=..., kv_heads=..., key_dim=..., value_dim=...,
                    dtype=...)                                                  # once per layer
    ragged = Ragged.build(query_lens, context_lens, block_tables, block_size)   # once per step
    pool = write_kv(keys, values, pool, ragged)                                 # per layer
    out, pool = attention(queries, pool, ragged, scale=scale)

A pool is threaded through the ops: each returns the one to use next, and only that one is valid
(`Pool`). On a GPU the memory is written in place and the pool carries a token that orders reads and
writes, so any number of steps may be evaluated together or asynchronously. On MLX's CPU back end
the write is MLX's own assignment, in place as long as a step is evaluated before the next one
writes and no one else holds the pool's arrays; evaluate `pool.arrays()` with the step.

Which kernel serves a call, and when the plain MLX route does, is decided in `policy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from . import calls, launch, policy, reference
from .metadata import MIN_METADATA
from .policy import Route
from .pools import Layout, Pool, new_pool
from .quantization import Packings, Quantization
from .ragged import Ragged
from .specs import AttentionSpec, supports

__all__ = [
    "AttentionSpec",
    "Layout",
    "Pool",
    "Quantization",
    "Ragged",
    "Route",
    "attention",
    "attention_spec",
    "copy_blocks",
    "gather",
    "new_pool",
    "read_blocks",
    "supports",
    "take",
    "write_blocks",
    "write_kv",
]


def write_kv(
    keys: mx.array,
    values: mx.array | None,
    pool: Pool,
    ragged: Ragged,
) -> Pool:
    """Put each row of the step into its slot.

    keys [T, Hkv, Dk] or [T, Hkv, 1, Dk]; values the same with Dv, None for a pool without values.
    Rows are cast to the pool's dtype, and quantised where it holds codes. T is ragged.num_rows.
    Blocks must not be shared: copy a shared block (`copy_blocks`) before a sequence writes to it.
    """
    _require_rows("keys", keys, ragged, pool.kv_heads, pool.key_dim)
    if (values is None) != (pool.values is None):
        raise ValueError(
            f"write_kv: the pool {'has no' if pool.values is None else 'has'} values and the call "
            f"{'has none' if values is None else 'brings some'}; make the pool to suit the layer"
        )
    if values is not None:
        _require_rows("values", values, ragged, pool.kv_heads, pool.value_dim)
    if _on_kernels(pool) and policy.writes_in_place():
        return calls.write_kv(keys, values, pool, ragged)
    return reference.write_kv(keys, values, pool, ragged)


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
    route: Route | None = None,
) -> tuple[mx.array, Pool]:
    """Attention of each row over the positions of its own sequence, this step's included.

    queries [T, Hq, Dk] or [T, Hq, 1, Dk], any float dtype; query head h reads key head
    h // (Hq // Hkv). Returns the output, shaped and typed like the queries with Dv for Dk, and the
    pool to use next.

    A row at position p sees the positions j with j <= p, and
        window: j > p - window,
        chunk: j // chunk == p // chunk.
    softcap: scores become softcap * tanh(score / softcap).
    sinks: [Hq], one more logit per head in the denominator of the softmax.
    value_dim: for a pool without values: values are the first value_dim entries of the keys.
    route: overrides the policy ("kernel" or "gathered").
    """
    _require_rows("queries", queries, ragged, None, pool.key_dim)
    if queries.shape[1] % pool.kv_heads:
        raise ValueError(
            f"attention: {queries.shape[1]} query heads do not divide among {pool.kv_heads} "
            "key heads"
        )
    if (value_dim is None) == (pool.values is None):
        raise ValueError(
            "attention: value_dim is for pools without values, and needed there; got "
            f"value_dim={value_dim} and a pool {'without' if pool.values is None else 'with'} them"
        )
    if _on_kernels(pool):
        layer = attention_spec(queries, pool, value_dim, softcap, sinks)
        query = calls.Query(queries, layer, scale, window, chunk, softcap, sinks)
        return calls.attention(query, pool, ragged, route)
    if route == "kernel":
        raise ValueError("attention: no kernel runs on this back end")
    out = reference.attention(
        queries,
        pool,
        ragged,
        scale=scale,
        window=window,
        chunk=chunk,
        softcap=softcap,
        sinks=sinks,
        value_dim=value_dim,
    )
    return out, pool


def gather(
    pool: Pool, ragged: Ragged, sequence: int, low: int = 0
) -> tuple[mx.array, mx.array | None, Pool]:
    """Keys and values of the positions low.. of one sequence, and the pool to use next.

    [1, Hkv, positions, Dk] and the same with Dv (None for a pool without values), for mixers that
    read a cache as arrays.
    """
    if _on_kernels(pool):
        return calls.gather(pool, ragged, sequence, low)
    return (*reference.gather(pool, ragged, sequence, low), pool)


def take(pool: Pool, slots: mx.array) -> tuple[mx.array, mx.array | None, Pool]:
    """Keys and values at slots of the pool (block * block_size + offset), int32 [n] made on any
    device: [Hkv, n, Dk], the same with Dv, and the pool to use next.

    A pool's arrays must not be read in any other way where writes are in place: MLX orders what
    runs by the arrays that it knows to be written, and a pool is not among them.
    """
    if not _on_kernels(pool):
        return (*reference.take(pool, slots), pool)
    count = slots.size
    if count < MIN_METADATA:
        slots = mx.pad(slots, (0, MIN_METADATA - count))
    return calls.take(pool, slots, count)


def copy_blocks(pool: Pool, sources: Sequence[int], targets: Sequence[int]) -> Pool:
    """Copy whole blocks inside a pool, sources[i] to targets[i]; targets must be distinct and no
    target may be a source."""
    if len(sources) != len(targets):
        raise ValueError(f"copy_blocks: {len(sources)} sources for {len(targets)} targets")
    if len(set(targets)) != len(targets) or set(targets) & set(sources):
        raise ValueError("copy_blocks: a target appears twice or is a source too")
    if not sources:
        return replace(pool)
    if _on_kernels(pool) and policy.writes_in_place():
        return calls.copy_blocks(pool, sources, targets)
    return reference.copy_blocks(pool, sources, targets)


def read_blocks(pool: Pool, blocks: Sequence[int]) -> tuple[mx.array, mx.array, Pool]:
    """Whole blocks of a pool of codes as they are stored, and the pool to use next.

    Keys and values as words, uint32 [n, block_size, Hkv, words of a row]: alike in all layouts.
    """
    packings = _packed(pool)
    if _on_kernels(pool):
        keys, values, pool = calls.read_blocks(pool, blocks)
    else:
        keys, values = reference.read_blocks(pool, blocks)
    if pool.layout == "pages":
        keys, values = (
            packings.keys.unfold(keys, pool.block_size),
            packings.values.unfold(values, pool.block_size),
        )
    return keys, values, pool


def write_blocks(pool: Pool, blocks: Sequence[int], keys: mx.array, values: mx.array) -> Pool:
    """Put what `read_blocks` gave into blocks of a pool of codes."""
    packings = _packed(pool)
    for packing, words in ((packings.keys, keys), (packings.values, values)):
        expected = (len(blocks), pool.block_size, packing.heads, packing.row_words)
        if words.shape != expected or words.dtype != mx.uint32:
            raise ValueError(
                f"write_blocks: expected words {list(expected)}, got {words.dtype} "
                f"{list(words.shape)}"
            )
    if pool.layout == "pages":
        keys, values = (
            packings.keys.fold(keys, pool.block_size),
            packings.values.fold(values, pool.block_size),
        )
    if _on_kernels(pool) and policy.writes_in_place():
        return calls.write_blocks(pool, blocks, keys, values)
    return reference.write_blocks(pool, blocks, keys, values)


def _packed(pool: Pool) -> Packings:
    if pool.packings is None:
        raise ValueError("blocks are read and written as words in pools of codes only")
    return pool.packings


def attention_spec(
    queries: mx.array,
    pool: Pool,
    value_dim: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
) -> AttentionSpec:
    """What `attention` with these arguments asks of the kernels."""
    how = None if pool.packings is None else pool.packings.quantization
    return AttentionSpec(
        key_dim=pool.key_dim,
        value_dim=value_dim or pool.value_dim or pool.key_dim,
        query_heads=queries.shape[1],
        kv_heads=pool.kv_heads,
        block_size=pool.block_size,
        dtype=calls.dtype_name(queries.dtype),
        pool_dtype=calls.dtype_name(pool.dtype),
        softcap=softcap is not None,
        sinks=sinks is not None,
        shared_values=pool.values is None,
        bits=0 if how is None else how.bits,
        code_group=0 if how is None else how.group_size,
    )


def _on_kernels(pool: Pool) -> bool:
    return pool.layout == "pages" and launch.active() is not None


def _require_rows(
    what: str, rows: mx.array, ragged: Ragged, heads: int | None, width: int | None
) -> None:
    shape = rows.shape
    flat = shape if rows.ndim == 3 else (*shape[:2], shape[3]) if rows.ndim == 4 else ()
    fits = len(flat) == 3 and flat[0] == ragged.num_rows and flat[2] == width
    if not fits or (heads is not None and flat[1] != heads) or (rows.ndim == 4 and shape[2] != 1):
        raise ValueError(
            f"{what}: expected [{ragged.num_rows} rows, {heads or 'heads'}, {width}], or the same "
            f"with a 1 before the last axis, got {list(shape)}"
        )
