"""The kernels for pages over keys and values that are arrays: blocks that follow each other."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from . import calls, launch
from .pools import Pool
from .ragged import Ragged
from .specs import AttentionSpec


def layer_of(queries: mx.array, value_dim: int, block_size: int) -> AttentionSpec:
    """What attention of queries [T, H, 1, Dk] over as many key heads asks of the kernels."""
    dtype = calls.dtype_name(queries.dtype)
    _, heads, _, key_dim = queries.shape
    return AttentionSpec(key_dim, value_dim, heads, heads, block_size, dtype, dtype)


def blocks_from(ragged: Ragged, sequence: int, first: int) -> Ragged:
    """One sequence of a step as a step of its own; its blocks from `first` on lie side by side."""

    def make() -> Ragged:
        size, end = ragged.block_size, ragged.context_lens[sequence]
        count = -(-end // size) - first
        return Ragged.build(
            [ragged.query_lens[sequence]], [end], [tuple(range(count))], size, [first]
        )

    return ragged.once(("blocks from", sequence, first), make)


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    step: Ragged,
    *,
    scale: float,
    window: int | None,
    chunk: int | None,
) -> mx.array:
    """queries [T, H, 1, Dk], keys [N, H, Dk], values [N, H, Dv] of the one sequence of `step`
    (`blocks_from`), N whole blocks: [T, H, 1, Dv]. Only where `policy.serves_arrays` says so."""
    size = step.block_size
    pool = Pool(
        keys.reshape(-1, size, *keys.shape[1:]),
        values.reshape(-1, size, *values.shape[1:]),
        _token(launch.active()),
        size,
        "pages",
    )
    layer = layer_of(queries, values.shape[-1], size)
    query = calls.Query(queries, layer, scale, window, chunk, None, None)
    out, _ = calls.attention(query, pool, step, "kernel", arrays=True)
    return out


@lru_cache
def _token(where: launch.Backend | None) -> mx.array:
    """Of memory that nothing writes to."""
    del where  # an array for each back end
    made = mx.zeros((1,), mx.int32)
    mx.eval(made)
    return made
