"""What a rewritten model file calls: paged attention, masks as values, wanted rows."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .masks import MaskSpec, seen_through
from .per_sequence import per_sequence, per_sequence_model
from .views import Handle, View, find_view

__all__ = [
    "chunked_mask",
    "last_rows",
    "paged_attention",
    "paged_mask",
    "per_sequence",
    "per_sequence_model",
    "row_positions",
    "sequence_mask",
]


def paged_attention(
    queries: mx.array,
    keys: Handle,
    values: Handle,
    cache: Any = None,
    scale: float | None = None,
    mask: MaskSpec | None = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
    tiled_heads: int | None = None,
) -> mx.array:
    """Attend each row to its own sequence's pages: [T, Hq, 1, Dk] -> [T, Hq, 1, Dv].

    `keys` and `values` are what `update_and_fetch` returned, of this layer or of the one whose keys
    it shares; `cache` is ignored, since files pass None or another layer's. `softcap` squashes
    scores to cap * tanh(scores / cap). With keys tiled `tiled_heads` times, which must
    make one for each query head, query head h reads key head h % Hkv instead of h // (Hq / Hkv).
    The result has the promoted type of queries and pool.
    """
    del cache
    if not (isinstance(keys, Handle) and isinstance(values, Handle)):
        raise TypeError(
            "paged_attention: expected what `update_and_fetch` of a paged cache returned, got "
            f"{type(keys).__name__} and {type(values).__name__}"
        )
    leaf = keys.leaf
    if values.leaf is not leaf or keys.role != "keys" or values.role != "values":
        raise TypeError(f"paged_attention: {keys!r} and {values!r} are not keys and their values")
    window, chunk = seen_through(mask, leaf.retention, "paged_attention")
    if scale is None:
        raise TypeError("paged_attention: expected a scale")
    heads, kv_heads = queries.shape[1], leaf.pool.pool.kv_heads
    ragged = keys.batch.ragged[leaf.group]
    assert ragged is not None  # the write of this step needed it
    if tiled_heads is not None:
        if tiled_heads * kv_heads != heads:
            raise ValueError(
                f"paged_attention: {kv_heads} key heads, tiled {tiled_heads} times, are not the "
                f"{heads} of the queries"
            )
        queries = _swap_heads(queries, tiled_heads, kv_heads)
        if sinks is not None:  # one for each query head
            sinks = sinks.reshape(tiled_heads, kv_heads).swapaxes(0, 1).reshape(-1)
    out = leaf.pool.attend(
        queries, ragged, scale=scale, window=window, chunk=chunk, sinks=sinks, softcap=softcap
    )
    return out if tiled_heads is None else _swap_heads(out, kv_heads, tiled_heads)


def _swap_heads(rows: mx.array, outer: int, inner: int) -> mx.array:
    """[T, outer * inner, 1, D] -> [T, inner * outer, 1, D]."""
    split = rows.reshape(rows.shape[0], outer, inner, 1, rows.shape[3])
    return split.swapaxes(1, 2).reshape(rows.shape)


def paged_mask(
    h: mx.array, cache: Any = None, window_size: int | None = None, return_array: bool = False
) -> MaskSpec:
    """`create_attention_mask` as a value: causal, within `window_size` positions if given.

    Files make masks for kinds of layers that a config may not have, and pass None as their cache.
    Those of mlx_vlm may pass all caches, of which the first counts.
    """
    if isinstance(cache, list | tuple):
        cache = cache[0] if cache else None
    if cache is None:
        return MaskSpec(window=window_size, return_array=return_array, floating=True)
    return _view(cache, "paged_mask").make_mask(h.shape[1], window_size, return_array)


def chunked_mask(cache: Any, chunk: int) -> MaskSpec:
    """A row sees the earlier positions of its own chunk of `chunk` positions."""
    view = _view(cache, "chunked_mask")
    view.offset  # noqa: B018 (chunks are counted from where the rows stand)
    return MaskSpec(chunk=chunk, path=view.path)


def sequence_mask(h: mx.array, cache: Any = None) -> MaskSpec:
    """`create_ssm_mask` as a value: no row is padding."""
    del h
    return MaskSpec(kind="sequence", path=_view(cache, "sequence_mask").path)


def last_rows(h: mx.array, cache: Any, axis: int = 0) -> mx.array:
    """Keep the rows whose logits are wanted: T -> S along `axis`. Harmless when done already."""
    view = find_view(cache)
    if view is None or (rows := view.batch.logit_rows) is None:
        return h
    batch = view.batch
    if h.shape[axis] == batch.num_logits:
        return h
    if h.shape[axis] != batch.num_rows:
        raise TypeError(
            f"last_rows: expected {batch.num_rows} rows along axis {axis}, got {list(h.shape)}"
        )
    return mx.take(h, rows, axis=axis)


def row_positions(offset: mx.array, ndim: int = 4) -> mx.array:
    """Positions [T] as [T, 1, ...] of `ndim` axes; 4 stand beside [T, heads, 1, width]."""
    return offset.reshape(-1, *(1,) * (ndim - 1))


def _view(cache: Any, name: str) -> View:
    if not isinstance(cache, View):
        raise TypeError(
            f"{name}: a rewritten model runs on paged caches, got {type(cache).__name__}; run it "
            "through mlxrewrite.runtime"
        )
    return cache
