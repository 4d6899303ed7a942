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
class Ranked:
    """Whose rows are ranked in a step, and what is known of those R rows.

    `chosen` says it of each sequence; `singles` are the numbers of the sequences among them that
    have one row. `tables` int32 [R, 1] is where each row's table begins in the flat block table,
    `own` int32 [R, 1] each row's position; None where no row is ranked. `rows` int32 and `ends`
    int32 [n, 1, 1, 1] are the single rows and their sequences' lengths.
    """

    chosen: tuple[bool, ...]
    singles: tuple[int, ...] = ()
    tables: mx.array | None = None
    own: mx.array | None = None
    rows: mx.array | None = None
    ends: mx.array | None = None

    @staticmethod
    def of(step: Ragged, count: int) -> Ranked:
        """Sequences with more than `count` positions. Where all have single rows, all of them if
        one is: such steps come again and again, and should be alike."""
        chosen = tuple(end > count for end in step.context_lens)
        if step.max_query_len == 1:
            chosen = (any(chosen),) * len(chosen)
        if not any(chosen):
            return Ranked(chosen)
        if any(step.dropped):
            raise TypeError("ranked positions may lie in blocks that were given back")
        mine = [i for i, cut in enumerate(chosen) if cut]
        lengths = [step.query_lens[i] for i in mine]
        rows = np.concatenate([np.arange(*step.starts[i : i + 2]) for i in mine])
        tables = np.repeat(np.array(mine) * step.block_tables.shape[1], lengths)
        singles = tuple(i for i in mine if step.query_lens[i] == 1)
        first = np.array([step.starts[i] for i in singles])
        ends = np.array([step.context_lens[i] for i in singles])
        return Ranked(
            chosen,
            singles,
            _ints(tables)[:, None],
            _ints(step.host_positions[rows])[:, None],
            _ints(first),
            _ints(ends)[:, None, None, None],
        )


def _ints(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.int32))


@dataclass(frozen=True, slots=True, eq=False)
class Selection(Opaque):
    """The positions that each row of a step attends to.

    The rows of sequences in `ranked.chosen` are cut down, the others see all they may. `positions`
    int32 [R, n] are those of the R rows that are, in their order; a row also gets positions behind
    its own where it has too few, even behind its sequence's end, and must not look at them.
    """

    ranked: Ranked
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
    `count` positions keep them all.
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
    ranked = ragged.ask(("ranked", count), lambda step: Ranked.of(step, count))
    chosen, singles = ranked.chosen, ranked.singles
    found: dict[int, mx.array] = {}
    if singles:
        best = _of_single_rows(leaf.pool, ragged, ranked, queries, weights, count)
        found = {i: best[n : n + 1] for n, i in enumerate(singles)}
    for i, cut in enumerate(chosen):
        if cut and i not in found:
            found[i] = _of_many_rows(leaf.pool, ragged, i, queries, weights, count)
    parts = [found[i] for i in sorted(found)]
    if not parts:
        return Selection(ranked, None, ragged)
    if len(parts) == len(singles):
        return Selection(ranked, best, ragged)
    return Selection(ranked, parts[0] if len(parts) == 1 else mx.concatenate(parts), ragged)


def _of_single_rows(
    pool: EntryPool,
    ragged: Ragged,
    ranked: Ranked,
    queries: mx.array,
    weights: mx.array,
    count: int,
) -> mx.array:
    """One row each of several sequences, whose keys are gathered side by side: [sequences, n]."""
    assert ranked.rows is not None and ranked.ends is not None
    tables, size = ragged.block_tables, pool.block_size
    if len(ranked.singles) < ragged.num_sequences:
        tables = tables[mx.array(ranked.singles, mx.int32)]
    if len(ranked.singles) < ragged.num_rows:
        queries, weights = queries[ranked.rows], weights[ranked.rows]
    # Whole tables: what is behind a sequence's end may be anything and does not count.
    slots = (tables[..., None] * size + mx.arange(size, dtype=mx.int32)).flatten(1)
    keys = pool.entries_at(slots)[:, None]
    scores = _scores(queries, keys, weights).sum(axis=1, keepdims=True)
    scores = mx.where(mx.arange(keys.shape[2]) < ranked.ends, scores, -mx.inf)
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
