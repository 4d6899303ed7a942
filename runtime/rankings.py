"""Attention to ranked positions: an indexer scores all positions of a sequence and keeps the best.

DeepSeek-V3.2, arXiv 2512.02556, section 2.1 (the lightning indexer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np
from mlxrewrite.kernels.ops import Ragged

from .masks import MaskSpec, seen_through
from .opaque import Opaque
from .pools import EntryPool
from .views import Handle


@dataclass(frozen=True, slots=True, eq=False)
class Selection(Opaque):
    """The positions that each row of a step attends to.

    `chosen` says for each sequence whether its rows are cut down; the others see all they may.
    `positions` int32 [R, n] for the R rows of those that are, in their order; a row also gets
    positions behind its own where it has too few, and must not look at them.
    """

    chosen: tuple[bool, ...]
    positions: mx.array | None
    ragged: Ragged

    _rule: ClassVar[str] = (
        "ranked positions of a paged batch are not an array: only `paged_latent_attention` takes "
        "them"
    )


def paged_top_positions(
    queries: mx.array, keys: Handle, weights: mx.array, count: int, *, mask: MaskSpec
) -> Selection:
    """The `count` positions of each row's sequence with the highest scores.

    A score is the sum over heads of max(q . k, 0) * w, with `queries` [T, H, 1, D] and `weights`
    [T, H, 1, 1], and `keys` what `update_and_fetch_index` returned. Sequences with no more than
    `count` positions are not cut down.
    """
    if not isinstance(keys, Handle) or keys.role != "index":
        raise TypeError(
            "paged_top_positions: expected what `update_and_fetch_index` of a paged cache "
            f"returned, got {keys!r}"
        )
    leaf, rows = keys.leaf, queries.shape[0]
    if seen_through(mask, leaf.retention, "paged_top_positions") != (None, None):
        raise TypeError("paged_top_positions: no op ranks the positions of a window or chunk")
    if weights.shape != (rows, queries.shape[1], 1, 1):
        raise TypeError(
            f"paged_top_positions: expected weights [{rows}, {queries.shape[1]}, 1, 1], "
            f"got {list(weights.shape)}"
        )
    ragged = keys.batch.ragged[leaf.group]
    assert ragged is not None  # the write of this step needed it
    chosen = tuple(end > count for end in ragged.context_lens)
    singles = tuple(i for i, cut in enumerate(chosen) if cut and ragged.query_lens[i] == 1)
    found: dict[int, mx.array] = {}
    if singles:
        best = _of_single_rows(leaf.pool, ragged, singles, queries, weights, count)
        found = {i: best[n : n + 1] for n, i in enumerate(singles)}
    for i, cut in enumerate(chosen):
        if cut and i not in found:
            found[i] = _of_many_rows(leaf.pool, ragged, i, queries, weights, count)
    parts = [found[i] for i in sorted(found)]
    if not parts:
        return Selection(chosen, None, ragged)
    if len(parts) == len(singles):
        return Selection(chosen, best, ragged)
    return Selection(chosen, parts[0] if len(parts) == 1 else mx.concatenate(parts), ragged)


def _of_single_rows(
    pool: EntryPool,
    ragged: Ragged,
    sequences: tuple[int, ...],
    queries: mx.array,
    weights: mx.array,
    count: int,
) -> mx.array:
    """One row each of several sequences, whose keys are gathered side by side: [sequences, n]."""
    ends = [ragged.context_lens[i] for i in sequences]

    def slots() -> mx.array:
        packed = np.zeros((len(sequences), max(ends)), np.int32)
        for row, i, end in zip(packed, sequences, ends, strict=True):
            row[:end] = ragged.slots(i, 0, end)
            row[end:] = row[0]
        return mx.array(packed)

    rows = ragged.once(
        ("single rows", sequences),
        lambda: mx.array(np.array([ragged.starts[i] for i in sequences], np.int32)),
    )
    last = ragged.once(
        ("ends", sequences), lambda: mx.array(np.array(ends, np.int32))[:, None, None, None]
    )
    keys = pool.entries_at(ragged.once(("slots", sequences), slots))[:, None]
    if len(sequences) < ragged.num_rows:
        queries, weights = queries[rows], weights[rows]
    scores = _scores(queries, keys, weights).sum(axis=1, keepdims=True)
    scores = mx.where(mx.arange(keys.shape[2]) < last, scores, -mx.inf)
    return _best(scores, count)[:, 0, 0]


def _of_many_rows(
    pool: EntryPool,
    ragged: Ragged,
    sequence: int,
    queries: mx.array,
    weights: mx.array,
    count: int,
) -> mx.array:
    """All rows of one sequence over the same keys: [rows, n]."""
    start, stop = ragged.starts[sequence : sequence + 2]
    keys = pool.gather(ragged, sequence, 0)
    mine = queries[start:stop].transpose(2, 1, 0, 3)
    products = _scores(mine, keys, weights[start:stop].transpose(2, 1, 0, 3))
    scores = products[:, :1]
    for head in range(1, products.shape[1]):  # one after the other: no copy of all heads
        scores = scores + products[:, head : head + 1]
    scores = mx.where(ragged.seen(sequence, 0, None, None), scores, -mx.inf)
    return _best(scores, count)[0, 0]


def _scores(queries: mx.array, keys: mx.array, weights: mx.array) -> mx.array:
    if keys.dtype != queries.dtype:
        keys = keys.astype(queries.dtype)
    return mx.maximum(queries @ keys.swapaxes(-1, -2), 0) * weights


def _best(scores: mx.array, count: int) -> mx.array:
    return mx.argpartition(scores, kth=-count, axis=-1)[..., -count:].astype(mx.int32)
