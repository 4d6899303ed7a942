"""Prompt caches of mlx_lm from the blocks of a sequence, and sequences from prompt caches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import cache as upstream
from mlxrewrite.kernels import ops
from mlxrewrite.kernels.ops import Ragged
from mlxrewrite.kernels.quantization import Packing, Packings

from .blocks import BlockTable
from .cache import PagedCache
from .caches import Retention, Spec, entry_at
from .errors import RuntimeRefusal
from .memory import Footprint
from .views import Leaf, StateLeaf

_Write = Callable[[mx.array, mx.array, Ragged, int], None]


def extract(cache: PagedCache, sequence: int) -> list[Any]:
    """The caches that the original model would have after the sequence's positions; evaluated."""
    tables, length = cache.tables(sequence), cache.length(sequence)
    originals: list[Any] = []  # of mixers that run once per sequence; made when one is asked for

    def own(path: tuple[int, ...]) -> Any:
        if not originals:
            originals.extend(cache.originals_of(sequence))
        return copy.deepcopy(entry_at(originals, path))

    def made(spec: Spec | None, path: tuple[int, ...]) -> Any:
        leaf = cache.leaves.get(path)
        if leaf is not None and leaf.pool.made and length:
            return _from_blocks(cache, leaf, tables[leaf.group], length)
        slots = cache.states.get(path)
        if slots is not None and any(shape is not None for shape in slots.table.holds(sequence)):
            return _from_slots(slots, sequence)
        if spec is not None and spec.parts:
            parts = [made(part, (*path, i)) for i, part in enumerate(spec.parts)]
            return upstream.CacheList(*parts)
        return own(path)

    found = [made(spec, (entry,)) for entry, spec in enumerate(cache.specs)]
    mx.eval([_arrays(entry) for entry in found])
    return found


def length_of(caches: Sequence[Any], before: int) -> int:
    """How many positions prompt caches hold; 0 for fresh ones.

    States do not say after how many positions they are: `before`, if that many are said to be in
    them, or one that stands for all, since nothing else in such caches depends on it.
    """
    offsets, silent = [], []
    for entry in _flat(caches):
        offset = getattr(entry, "offset", None)
        if isinstance(offset, int):  # whatever a cache that was cut back still has behind it
            offsets.append(offset)
        else:
            silent.append(entry)
    found = max(offsets, default=0)
    return max(before, 1) if not found and any(map(_arrays, silent)) else found


def check(
    specs: Sequence[Spec | None], footprint: Footprint, caches: Sequence[Any], length: int
) -> None:
    """Raise RuntimeRefusal unless `restore` can make a sequence of these caches."""
    if len(caches) != len(specs):
        raise RuntimeRefusal(
            f"prompt caches: expected {len(specs)} entries for this model, got {len(caches)}"
        )
    for path in sorted(footprint.entries):
        entry = entry_at(caches, path)
        spec = specs[path[0]]
        for index in path[1:]:
            assert spec is not None
            spec = spec.parts[index]
        assert spec is not None and spec.retention is not None
        quantised = isinstance(entry, upstream.QuantizedKVCache)
        if quantised:
            _check_codes(footprint, spec, entry, path[0])
        elif type(entry) is not type(spec.original()):
            raise RuntimeRefusal(
                f"prompt cache entry {path[0]} is a {type(entry).__name__}: expected a "
                f"{type(spec).__name__}, as make_prompt_cache makes it"
            )
        if int(entry.offset) != length:
            raise RuntimeRefusal(
                f"prompt cache entry {path[0]} has {entry.offset} positions, expected {length}"
            )
        keys = entry.keys[0] if quantised and entry.keys is not None else entry.keys
        if keys is not None and keys.shape[0] != 1:
            raise RuntimeRefusal(f"prompt caches: expected one text, got {keys.shape[0]}")
        held = 0 if keys is None else keys.shape[2]
        if held < length - spec.retention.first_needed(length):
            raise RuntimeRefusal(
                f"prompt cache entry {path[0]} holds {held} positions: too few for {spec}"
            )


def _check_codes(footprint: Footprint, spec: Spec, entry: Any, index: int) -> None:
    """Codes are taken as they are, so they must be those that the pools hold."""
    how = footprint.quantization
    if how is None or (how.bits, how.group_size) != (entry.bits, entry.group_size):
        mine = "has none" if how is None else f"has {how.bits} bits in groups of {how.group_size}"
        raise RuntimeRefusal(
            f"prompt cache entry {index} has {entry.bits} bits in groups of {entry.group_size}, "
            f"and the engine {mine}: give it the same kv_bits and kv_group_size"
        )
    if spec.retention != Retention():
        raise RuntimeRefusal(
            f"prompt cache entry {index} is a QuantizedKVCache: expected a {type(spec).__name__}"
        )


def restore(cache: PagedCache, footprint: Footprint, caches: Sequence[Any], length: int) -> int:
    """A new sequence that begins with what prompt caches hold, `length` positions; see `check`.

    The caches stay as they are. Raises OutOfBlocks, and changes nothing, if there is no room.
    """
    sequence = cache.begin(length)
    cache.open_step()
    for path in sorted(footprint.entries):
        leaf = cache.leaves[path]
        write: _Write = leaf.pool.write
        if path in footprint.latents:
            write = leaf.pool.write_latents
        elif path in footprint.indices:
            write = leaf.pool.write_index
        table = cache.tables(sequence)[leaf.group]
        _to_blocks(cache, leaf, entry_at(caches, path), length, write, table)
    for path in sorted(footprint.states):
        cache.states[path].table.restore(sequence, entry_at(caches, path).cache)
    known = {*footprint.entries, *footprint.states}
    if not footprint.everything and not _all_known(cache.specs, known):
        cache.set_originals(sequence, [copy.deepcopy(entry) for entry in caches])
    return sequence


def _all_known(specs: Sequence[Spec | None], known: set[tuple[int, ...]]) -> bool:
    """Whether no entry is left that a mixer keeps once per sequence."""

    def covered(spec: Spec | None, path: tuple[int, ...]) -> bool:
        if spec is None or not spec.parts:
            return path in known
        return all(covered(part, (*path, i)) for i, part in enumerate(spec.parts))

    return all(covered(spec, (entry,)) for entry, spec in enumerate(specs))


def _from_slots(leaf: StateLeaf, sequence: int) -> Any:
    found = upstream.ArraysCache(leaf.table.size)
    found.cache = list(leaf.table.snapshot(sequence))
    return found


def _from_blocks(cache: PagedCache, leaf: Leaf, table: BlockTable, length: int) -> Any:
    size, spec = cache.block_size, leaf.spec
    kept = leaf.retention.window or leaf.retention.chunk
    first = table.dropped * size
    low = first if kept is None else max(first, length - kept)
    pool, dtype = leaf.pool.pool, leaf.pool.rows_dtype
    if pool.packings is not None and leaf.retention == Retention():
        return _codes_from_blocks(leaf, pool.packings, table, length)
    values: mx.array | None
    if low < length:
        ragged = Ragged.build([1], [length], [table.blocks], size, [table.dropped])
        keys, values, leaf.pool.pool = ops.gather(pool, ragged, 0, low)
    else:  # a new chunk begins: nothing of the ones before it is left
        keys = mx.zeros((1, pool.kv_heads, 0, pool.key_dim), dtype)
        values = None
        if pool.value_dim is not None:
            values = mx.zeros((1, pool.kv_heads, 0, pool.value_dim), dtype)
    if leaf.pool.index:
        values = mx.zeros_like(keys)
    elif values is None:  # latents beside their rope keys, which mlx_lm keeps as keys and values
        keys, values = mx.split(keys, [leaf.pool.rank or 0], axis=-1)
    keys, values = keys.astype(dtype), values.astype(dtype)
    found = spec.original()
    if isinstance(found, upstream.RotatingKVCache):
        # What no later row sees is not kept. The oldest position of a full window is such: the
        # next one takes its place before anything is read.
        missing = min(length, found.max_size) - keys.shape[2]
        if missing:
            keys, values = _behind(keys, missing), _behind(values, missing)
        found._idx = keys.shape[2]
    elif isinstance(found, upstream.ChunkedKVCache):
        found.start_position = low
    found.keys, found.values, found.offset = keys, values, length
    return found


def _codes_from_blocks(leaf: Leaf, packings: Packings, table: BlockTable, length: int) -> Any:
    """mlx_lm's quantised cache with the very codes of the blocks."""
    how, count = packings.quantization, -(-length // leaf.pool.block_size)
    found = upstream.QuantizedKVCache(group_size=how.group_size, bits=how.bits)

    def parts(words: mx.array, packing: Packing) -> tuple[mx.array, ...]:
        rows = words.flatten(0, 1)[:length].swapaxes(0, 1)[None]
        codes, scales, biases = packing.parts(rows)
        dtype = leaf.pool.rows_dtype
        return mx.contiguous(codes), scales.astype(dtype), biases.astype(dtype)

    keys, values = leaf.pool.read_words(table.blocks[:count])
    found.keys, found.values = parts(keys, packings.keys), parts(values, packings.values)
    found.offset = length
    return found


def _codes_to_blocks(cache: PagedCache, leaf: Leaf, entry: Any, table: BlockTable) -> None:
    """The very codes of mlx_lm's quantised cache, and behind them codes of zeros."""
    length, size, per_word = entry.offset, cache.block_size, 32 // entry.bits
    (heads, _, key_words), dtype = entry.keys[0].shape[1:], entry.keys[1].dtype
    leaf.pool.make_for(heads, key_words * per_word, entry.values[0].shape[3] * per_word, dtype)
    packings, count = leaf.pool.pool.packings, -(-length // size)
    assert packings is not None

    def words(arrays: tuple[mx.array, ...], packing: Packing) -> mx.array:
        codes, scales, biases = (array[0, :, :length] for array in arrays)
        rows = packing.joined(codes, scales.astype(packing.dtype), biases.astype(packing.dtype))
        rows = mx.pad(rows.swapaxes(0, 1), [(0, count * size - length), (0, 0), (0, 0)])
        return rows.reshape(count, size, heads, packing.row_words)

    made = words(entry.keys, packings.keys), words(entry.values, packings.values)
    leaf.pool.write_words(table.blocks[:count], *made, cache.serial)


def _behind(rows: mx.array, count: int) -> mx.array:
    return mx.pad(rows, [(0, 0), (0, 0), (count, 0), (0, 0)])


def _to_blocks(
    cache: PagedCache,
    leaf: Leaf,
    entry: Any,
    length: int,
    write: _Write,
    table: BlockTable,
) -> None:
    if isinstance(entry, upstream.QuantizedKVCache):
        _codes_to_blocks(cache, leaf, entry, table)
        return
    keys, values = entry.keys, entry.values
    if isinstance(entry, upstream.RotatingKVCache):
        keys, values = entry._temporal_order(keys), entry._temporal_order(values)
    else:
        used = length - getattr(entry, "start_position", 0)
        keys, values = keys[..., :used, :], values[..., :used, :]
    count = min(keys.shape[2], length - table.dropped * cache.block_size)
    if count <= 0:  # a new chunk begins
        return
    ragged = Ragged.build([count], [length], [table.blocks], cache.block_size, [table.dropped])
    keys, values = (rows[..., -count:, :].transpose(2, 1, 0, 3) for rows in (keys, values))
    write(keys, values, ragged, cache.serial)


def block_arrays(cache: PagedCache, block: int) -> dict[str, mx.array]:
    """Keys and values of one block of all layers, by cache entry; for caches of one group."""
    found = {}
    for path, leaf in cache.leaves.items():
        if not leaf.pool.made:
            continue
        ragged = Ragged.build([1], [cache.block_size], [[block]], cache.block_size)
        values: mx.array | None
        if leaf.pool.quantization is not None:
            keys, values = leaf.pool.read_words([block])
        else:
            keys, values, leaf.pool.pool = ops.gather(leaf.pool.pool, ragged, 0, 0)
        if values is None:
            keys, values = mx.split(keys, [leaf.pool.rank or 0], axis=-1)
        name = ".".join(map(str, path))
        found[f"{name}.keys"], found[f"{name}.values"] = keys, values
    mx.eval(found)
    return found


def fill_blocks(cache: PagedCache, sequence: int, blocks: Sequence[dict[str, Any]]) -> None:
    """Append whole blocks, as `block_arrays` took them out, to a sequence of whole blocks.

    Arrays are bytes in the type of the pools. Raises OutOfBlocks if there is no room.
    """
    size, start = cache.block_size, cache.length(sequence)
    length = start + size * len(blocks)
    cache.grow(sequence, length)
    cache.open_step()
    for path, leaf in cache.leaves.items():
        if not leaf.pool.made:
            continue
        name, dtype = ".".join(map(str, path)), leaf.pool.pool.dtype
        table = cache.tables(sequence)[leaf.group]
        if leaf.pool.quantization is not None:
            keys, values = (
                mx.concatenate([mx.array(block[f"{name}.{role}"]) for block in blocks]).view(
                    mx.uint32
                )
                for role in ("keys", "values")
            )
            places = table.blocks[start // size : length // size]
            leaf.pool.write_words(places, keys, values, cache.serial)
            continue
        keys, values = (
            mx.concatenate([mx.array(block[f"{name}.{role}"]) for block in blocks], axis=2)
            .view(dtype)
            .transpose(2, 1, 0, 3)
            for role in ("keys", "values")
        )
        ragged = Ragged.build([length - start], [length], [table.blocks], size, [table.dropped])
        write = leaf.pool.write if leaf.pool.rank is None else leaf.pool.write_latents
        write(keys, values, ragged, cache.serial)


def _flat(caches: Sequence[Any]) -> list[Any]:
    found = []
    for entry in caches:
        found += _flat(entry.caches) if isinstance(entry, upstream.CacheList) else [entry]
    return found


def _arrays(entry: Any) -> list[mx.array]:
    if entry is None or (hasattr(entry, "empty") and entry.empty()):
        return []
    return [value for _, value in tree_flatten(entry.state) if isinstance(value, mx.array)]
