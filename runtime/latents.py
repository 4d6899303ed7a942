"""What a rewritten model file calls for latent attention: absorbed for few rows, materialised for
many.

DeepSeek-V2, arXiv 2405.04434, section 2.1. Both forms are one function: a content query meets a
latent through one matrix a head, which can go to either side of the product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
from mlxrewrite.kernels import arrays, policy
from mlxrewrite.kernels.ops import Ragged
from mlxrewrite.kernels.reference import first_seen

from .masks import MaskSpec, seen_through
from .pools import EntryPool
from .rankings import Selection
from .views import Handle

# What latents gathered for rows that attend to ranked positions may take at a time.
SELECTED_BYTES = 1 << 28


def paged_latent_attention(
    content: mx.array,
    rope: mx.array,
    latents: Handle,
    ropes: Handle,
    up_keys: Any = None,
    up_values: Any = None,
    *,
    scale: float,
    mask: MaskSpec,
    places: Selection | None = None,
) -> mx.array:
    """Attend each row to the latents of its own sequence, by their content and their rope keys.

    `content` [T, H, 1, N] and `rope` [T, H, 1, R] are the two parts of the queries; `latents` and
    `ropes` are what `update_and_fetch_latents` returned. `up_keys` and `up_values` are the layer's
    projections of a latent to keys [N] and values [Dv] of each head, `up_keys(x)` being its
    transpose unless called with `transpose=False`. Returns [T, H, 1, Dv]. Without projections the
    content has the width of a latent already, and so has the result. With `places`, a row sees only
    those of its positions that `paged_top_positions` ranked best. DeepSeek-V2, arXiv 2405.04434.
    """
    if not (isinstance(latents, Handle) and isinstance(ropes, Handle)):
        raise TypeError(
            "paged_latent_attention: expected what `update_and_fetch_latents` of a paged cache "
            f"returned, got {type(latents).__name__} and {type(ropes).__name__}"
        )
    leaf, batch = latents.leaf, latents.batch
    if ropes.leaf is not leaf or latents.role != "latents" or ropes.role != "ropes":
        raise TypeError(
            f"paged_latent_attention: {latents!r} and {ropes!r} are not latents and their rope keys"
        )
    window, chunk = seen_through(mask, leaf.retention, "paged_latent_attention")
    ragged = batch.ragged[leaf.group]
    assert ragged is not None  # the write of this step needed it
    queries = Queries(content, rope, up_keys, up_values)
    if places is None:
        return attend(leaf.pool, ragged, queries, scale=scale, window=window, chunk=chunk)
    if not isinstance(places, Selection) or places.ragged is not ragged:
        raise TypeError(
            "paged_latent_attention: expected places that `paged_top_positions` ranked in this "
            f"step, in a cache with the same blocks, got {places!r}"
        )
    if (window, chunk) != (None, None):
        raise TypeError("paged_latent_attention: no op attends to ranked positions of a window")
    return attend_selected(leaf.pool, ragged, queries, places, scale=scale)


@dataclass(frozen=True, slots=True, eq=False)
class Queries:
    """Content [T, H, 1, N] and rope [T, H, 1, R] of the queries, and a layer's projections."""

    content: mx.array
    rope: mx.array
    up_keys: Callable[..., mx.array] | None
    up_values: Callable[..., mx.array] | None

    def rows(self, start: int, stop: int) -> Queries:
        if stop - start == self.content.shape[0]:
            return self
        content, rope = self.content[start:stop], self.rope[start:stop]
        return Queries(content, rope, self.up_keys, self.up_values)

    def join(self, indices: mx.array) -> Queries:
        content, rope = self.content[indices], self.rope[indices]
        return Queries(content, rope, self.up_keys, self.up_values)


@dataclass(frozen=True, slots=True, eq=False)
class _Split:
    """Which sequences of a step are materialised, and the rest as a step of its own."""

    long: tuple[bool, ...]
    rest: Ragged | None
    rest_rows: mx.array | None


# Made once per step, for all layers alike.
_SPLITS: WeakKeyDictionary[Ragged, dict[tuple[bool, ...], _Split]] = WeakKeyDictionary()


def attend(
    pool: EntryPool,
    ragged: Ragged,
    queries: Queries,
    *,
    scale: float,
    window: int | None,
    chunk: int | None,
) -> mx.array:
    """Each row over the latents of its sequence: [T, H, 1, Dv]."""
    rank = pool.rank
    if rank is None:
        raise RuntimeError("latents are read from a cache entry that holds keys and values")
    seen = {"window": window, "chunk": chunk}
    long = _long(ragged, queries, rank)
    if not any(long):
        return _absorbed(pool, ragged, queries, scale=scale, **seen)

    def absorbed(rest: Ragged, chosen: Queries) -> mx.array:
        return _absorbed(pool, rest, chosen, scale=scale, **seen)

    def materialised(sequence: int) -> mx.array:
        return _materialised(pool, ragged, sequence, queries, scale=scale, **seen)

    return _apart(ragged, long, queries, materialised, absorbed)


def attend_selected(
    pool: EntryPool, ragged: Ragged, queries: Queries, places: Selection, *, scale: float
) -> mx.array:
    """The same where the rows of some sequences see ranked positions only: [T, H, 1, Dv]."""

    def everything(rest: Ragged, chosen: Queries) -> mx.array:
        return attend(pool, rest, chosen, scale=scale, window=None, chunk=None)

    if places.positions is None:
        return everything(ragged, queries)
    chosen = places.ranked.chosen
    if all(chosen):
        return _selected(pool, ragged, queries, places, scale=scale)
    rows = [ragged.starts[i : i + 2] for i, cut in enumerate(chosen) if cut]
    taken = dict(zip([start for start, _ in rows], _offsets(rows), strict=True))
    mine = queries.join(ragged.once(("selected", chosen), lambda: _rows_of(rows)))
    found = _selected(pool, ragged, mine, places, scale=scale)

    def part(sequence: int) -> mx.array:
        first = taken[ragged.starts[sequence]]
        return found[first : first + ragged.query_lens[sequence]]

    return _apart(ragged, chosen, queries, part, everything)


def _apart(
    ragged: Ragged,
    flags: tuple[bool, ...],
    queries: Queries,
    alone: Callable[[int], mx.array],
    together: Callable[[Ragged, Queries], mx.array],
) -> mx.array:
    """Flagged sequences one by one, the rest as a step of its own; all rows in their order."""
    split = _split(ragged, flags)
    rest = None
    if split.rest is not None and split.rest_rows is not None:
        rest = together(split.rest, queries.join(split.rest_rows))
    parts, taken = [], 0
    for flagged, run in groupby(range(len(flags)), lambda i: flags[i]):
        members = list(run)
        if flagged:
            parts += [alone(i) for i in members]
        else:
            assert rest is not None
            count = sum(ragged.query_lens[i] for i in members)
            parts.append(rest[taken : taken + count])
            taken += count
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _rows_of(spans: list[tuple[int, ...]]) -> mx.array:
    return mx.array([row for start, stop in spans for row in range(start, stop)], mx.int32)


def _offsets(spans: list[tuple[int, ...]]) -> list[int]:
    """Where each span begins if they lie side by side."""
    return [sum(stop - start for start, stop in spans[:i]) for i in range(len(spans))]


def _selected(
    pool: EntryPool, ragged: Ragged, queries: Queries, places: Selection, *, scale: float
) -> mx.array:
    """Absorbed attention of each row to its own places: [R, H, 1, Dv]."""
    positions, rank = places.positions, pool.rank
    assert positions is not None and rank is not None
    ranked, size = places.ranked, pool.block_size
    assert ranked.tables is not None and ranked.own is not None
    seen = (positions <= ranked.own)[:, None, None]
    positions = mx.minimum(positions, ranked.own)  # behind it nothing may have been written
    blocks = ragged.block_tables.reshape(-1)[ranked.tables + positions // size]
    slots = blocks * size + positions % size
    content = queries.content
    if queries.up_keys is not None:
        content = _by_head(queries.up_keys, content)
    if queries.rope.shape[-1]:
        content = mx.concatenate([content, queries.rope], axis=-1)
    bytes_of_row = positions.shape[1] * content.shape[3] * content.dtype.size
    step = max(1, SELECTED_BYTES // bytes_of_row)
    parts = []
    for start in range(0, content.shape[0], step):
        part = slice(start, start + step)
        keys = pool.entries_at(slots[part])[:, None].astype(content.dtype)
        parts.append(
            mx.fast.scaled_dot_product_attention(
                content[part], keys, keys[..., :rank], scale=scale, mask=seen[part]
            )
        )
    out = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    return out if queries.up_values is None else _by_head(queries.up_values, out)


def _long(ragged: Ragged, queries: Queries, rank: int) -> tuple[bool, ...]:
    """Which sequences of a step are cheaper with keys and values of their own."""
    if queries.up_keys is None or queries.up_values is None:
        return (False,) * ragged.num_sequences
    _, heads, _, width = queries.content.shape

    def make(step: Ragged) -> tuple[bool, ...]:
        return tuple(
            policy.materialise_latents(rows, context, rank=rank, heads=heads, content_dim=width)
            for rows, context in zip(step.query_lens, step.context_lens, strict=True)
        )

    return ragged.ask(("materialised", rank, heads, width), make)


def _split(ragged: Ragged, long: tuple[bool, ...]) -> _Split:
    known = _SPLITS.setdefault(ragged, {})
    if long not in known:
        short = [i for i, is_long in enumerate(long) if not is_long]
        rest = rows = None
        if short:
            rest = Ragged.build(
                [ragged.query_lens[i] for i in short],
                [ragged.context_lens[i] for i in short],
                [ragged.tables[i] for i in short],
                ragged.block_size,
                [ragged.dropped[i] for i in short],
            )
            rows = mx.array([r for i in short for r in range(*ragged.starts[i : i + 2])], mx.int32)
        known[long] = _Split(long, rest, rows)
    return known[long]


def _absorbed(
    pool: EntryPool,
    ragged: Ragged,
    queries: Queries,
    *,
    scale: float,
    window: int | None,
    chunk: int | None,
) -> mx.array:
    """Queries go to the latents, and what comes back goes to the values."""
    content = queries.content
    if queries.up_keys is not None:
        content = _by_head(queries.up_keys, content)
    if queries.rope.shape[-1]:
        content = mx.concatenate([content, queries.rope], axis=-1)
    out = pool.attend(
        content, ragged, scale=scale, window=window, chunk=chunk, sinks=None, softcap=None
    )
    return out if queries.up_values is None else _by_head(queries.up_values, out)


def _by_head(up: Callable[..., mx.array], rows: mx.array) -> mx.array:
    """One product a head over all rows: [T, H, 1, D] -> [T, H, 1, D']."""
    if rows.shape[0] == 1:
        return up(rows)
    return up(rows.transpose(2, 1, 0, 3)).transpose(2, 1, 0, 3)


def _materialised(
    pool: EntryPool,
    ragged: Ragged,
    sequence: int,
    queries: Queries,
    *,
    scale: float,
    window: int | None,
    chunk: int | None,
) -> mx.array:
    """Keys and values of all heads, made once from the sequence's latents."""
    assert queries.up_keys is not None and queries.up_values is not None and pool.rank is not None
    start, stop = ragged.starts[sequence : sequence + 2]
    end = ragged.context_lens[sequence]
    low = first_seen(end - (stop - start), window, chunk)
    mine = queries.rows(start, stop)
    content, roped = mine.content, mine.rope.shape[-1] > 0
    if roped:
        content = mx.concatenate([content, mine.rope], axis=-1)
    width = queries.up_values(mx.zeros((1, 1, 1, pool.rank), content.dtype)).shape[-1]
    paged = policy.serves_arrays(arrays.layer_of(content, width, ragged.block_size))
    if paged:  # whole blocks
        low = low // ragged.block_size * ragged.block_size
    entries = pool.gather(ragged, sequence, low).astype(content.dtype)
    if paged and (more := -entries.shape[2] % ragged.block_size):
        entries = mx.pad(entries, [(0, 0), (0, 0), (0, more), (0, 0)])
    latents, rope_keys = entries[..., : pool.rank], entries[..., pool.rank :]
    keys, values = queries.up_keys(latents, transpose=False), queries.up_values(latents)
    if paged:  # position by position, else head by head
        keys, values, rope_keys = (x.transpose(2, 1, 0, 3) for x in (keys, values, rope_keys))
    if roped:
        spread = mx.broadcast_to(rope_keys, (*keys.shape[:3], rope_keys.shape[-1]))
        keys = mx.concatenate([keys, spread], axis=-1)
    if paged:
        step = arrays.blocks_from(ragged, sequence, low // ragged.block_size)
        return arrays.attention(
            content, keys[:, :, 0], values[:, :, 0], step, scale=scale, window=window, chunk=chunk
        )
    plain = first_seen(end - 1, window, chunk) == low
    mask: mx.array | str = "causal" if plain else ragged.seen(sequence, low, window, chunk)
    out = mx.fast.scaled_dot_product_attention(
        content.transpose(2, 1, 0, 3), keys, values, scale=scale, mask=mask
    )
    return out.transpose(2, 1, 0, 3)
