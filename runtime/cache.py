"""PagedCache: the caches of many sequences of one model, and the step that runs them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlxrewrite.kernels import policy
from mlxrewrite.kernels.ops import Quantization, Ragged

from . import batch as batches
from .batch import Batch, Sampled
from .blocks import BlockAllocator, BlockTable
from .caches import ArraysCache, KVCache, Retention, Spec, entry_at, spec_of
from .errors import OutOfBlocks, RuntimeRefusal, UnknownSequence
from .pools import EntryPool
from .recorded import Recorder
from .rope import sequence_ends
from .rows import Rows
from .states import Snapshot, StateTable
from .views import VIEWS, ForeignView, Leaf, ListView, StateLeaf, StateView, View

Tokens = Sequence[int] | mx.array | Sampled
POOL_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
LogitRows = Literal["last", "all"] | Mapping[int, Sequence[int]]


@dataclass(slots=True, eq=False)
class _Sequence:
    tables: list[BlockTable]
    length: int = 0
    broken: bool = False
    originals: list[Any] | None = None


@dataclass(slots=True, eq=False)
class _Group:
    """Layers with equal retention: they share block tables and an allocator."""

    retention: Retention
    allocator: BlockAllocator
    leaves: list[Leaf] = field(default_factory=list)
    unused: bool = False


class _Originals:
    """Makes each sequence's original caches when a mixer first asks for them."""

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache

    def of(self, sequence: int) -> list[Any]:
        return self._cache._originals_of(sequence)


class PagedCache:
    """Paged caches of a rewritten model and the sequences in them.

    `num_blocks` blocks of `block_size` positions for every group of layers with equal retention, or
    a number for each retention. Pools take the type of the keys unless `dtype` is given, and hold
    codes with `quantization`, their scales in that type. `poison`
    and `shuffle_seed` are for tests: NaN in blocks that nobody holds, blocks in random order.
    Sequences can be cut back by up to `rollback` positions: windows keep that much more.
    """

    def __init__(
        self,
        model: Any,
        block_size: int = 16,
        *,
        num_blocks: int | Mapping[Retention, int] = 512,
        dtype: mx.Dtype | None = None,
        poison: bool = False,
        shuffle_seed: int | None = None,
        rollback: int = 0,
        quantization: Quantization | None = None,
    ) -> None:
        if block_size < 1:
            raise RuntimeRefusal(f"block size: expected at least 1, got {block_size}")
        if dtype is not None and dtype not in POOL_DTYPES:
            raise RuntimeRefusal(
                f"dtype of the caches: expected float32, float16 or bfloat16, got {dtype}"
            )
        self.model = model
        self.block_size = block_size
        self.specs = cache_specs(model)
        self._num_blocks = num_blocks
        self._dtype = dtype
        self.quantization = quantization
        self._poison = poison
        self._shuffle_seed = shuffle_seed
        self._rollback = rollback
        self._groups: list[_Group] = []
        self._state_entries = False
        self._leaves: dict[tuple[int, ...], Leaf] = {}
        self._states: dict[tuple[int, ...], StateLeaf] = {}
        self._copies: list[mx.array] = []  # snapshots that nobody was told to evaluate yet
        for entry, spec in enumerate(self.specs):
            self._collect(spec, entry, ())
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0
        self._serial = 0
        self._stepped = False
        self._store = _Originals(self)
        self._recorder = Recorder(model, self._leaves, self._states, self._views)

    @property
    def recorder(self) -> Recorder:
        """Steps of single rows that run without the model's Python."""
        return self._recorder

    @property
    def gathered_layers(self) -> dict[str, str]:
        """Cache entries whose attention no kernel serves, and what kernels there are; MLX's own
        attention over gathered pages serves them. Known once a step has run."""
        return {
            f"cache entry {'.'.join(map(str, path))}": leaf.pool.lacking
            for path, leaf in sorted(self._leaves.items())
            if leaf.pool.lacking is not None
        }

    # ------------------------------------------------------------- sequences

    def add_sequence(self) -> int:
        """A new, empty sequence; returns its id."""
        name = self._next_id
        self._next_id += 1
        self._sequences[name] = _Sequence([BlockTable() for _ in self._groups])
        return name

    def free(self, sequence: int) -> None:
        """Forget a sequence and give its blocks back."""
        state = self._find(sequence)
        del self._sequences[sequence]
        for leaf in self._states.values():
            leaf.table.free(sequence)
        for group, table in zip(self._groups, state.tables, strict=True):
            # The last first: of blocks kept for their content, a sequence's first outlive the rest.
            self._release(group, table.blocks[::-1])

    def begin(self, length: int) -> int:
        """A new sequence with places for `length` positions that somebody else fills.

        Groups with windows have places for what later rows see. Raises OutOfBlocks, and changes
        nothing, if there is no room.
        """
        tables = []
        for group in self._groups:
            dropped = group.retention.first_needed(length) // self.block_size
            tables.append(BlockTable([], 0 if group.unused else dropped))
        counts = [
            0 if group.unused else table.missing(length, self.block_size)
            for group, table in zip(self._groups, tables, strict=True)
        ]
        for group, count in zip(self._groups, counts, strict=True):
            if count > group.allocator.num_free:
                raise OutOfBlocks(f"{length} positions need {count} more blocks")
        for group, table, count in zip(self._groups, tables, counts, strict=True):
            table.blocks = group.allocator.allocate(count)
        name = self.add_sequence()
        self._sequences[name] = _Sequence(tables, length)
        return name

    def adopt(
        self, tables: Sequence[BlockTable], length: int, snapshot: Snapshot | None = None
    ) -> int:
        """A new sequence that begins with the first `length` positions of others, in their blocks.

        `tables` has one entry for each group of layers. Whole blocks are shared, a last one that
        is only partly wanted is copied. `snapshot` has the states after these positions, where
        mixers keep any. Raises OutOfBlocks, and changes nothing, if the copy has no place.
        """
        if snapshot is not None and snapshot.length != length:
            raise RuntimeRefusal(
                f"adopt: a snapshot after {snapshot.length} positions for a sequence of {length}"
            )
        partial = length % self.block_size != 0
        for group, table in zip(self._groups, tables, strict=True):
            group.allocator.share(table.blocks)
        mine = [BlockTable(list(table.blocks), table.dropped) for table in tables]
        used = [(g, t) for g, t in zip(self._groups, mine, strict=True) if not g.unused]
        if partial and any(not group.allocator.num_free for group, _ in used):
            for group, table in zip(self._groups, mine, strict=True):
                self._release(group, table.blocks[::-1])
            raise OutOfBlocks("no free block for the copy of a block that is partly shared")
        if partial:
            for group, table in used:
                shared = table.blocks[-1]
                table.blocks[-1:] = group.allocator.allocate(1)
                for leaf in group.leaves:
                    leaf.pool.copy([shared], table.blocks[-1:])
                self._release(group, [shared])
        name = self._next_id
        self._next_id += 1
        self._sequences[name] = _Sequence(mine, length)
        if snapshot is not None:
            for held, states in zip(self._states.values(), snapshot.states, strict=True):
                held.table.restore(name, states)
        return name

    def snapshot(self, sequence: int) -> Snapshot:
        """Copies of a sequence's states as they are after its positions so far.

        With the blocks of those positions they make a sequence that goes on from there: `adopt`.
        The copies are among the next `arrays`. Raises RuntimeRefusal where mixers that run once per
        sequence keep anything.
        """
        state = self._find(sequence)
        if not self.snapshots_suffice:
            raise RuntimeRefusal(
                "snapshot: a mixer that runs once per sequence keeps its own state"
            )
        states = tuple(leaf.table.snapshot(sequence) for leaf in self._states.values())
        made = [array for entry in states for array in entry if array is not None]
        self._copies += made
        return Snapshot(state.length, states)

    @property
    def snapshots_suffice(self) -> bool:
        """Whether blocks and a snapshot hold all that a sequence has; False before any step."""
        own = any(leaf.per_sequence for leaf in self._leaves.values())
        own = own or any(leaf.per_sequence for leaf in self._states.values())
        unknown = any(spec is None for spec in self.specs)
        return not own and not unknown and self._stepped

    @property
    def states(self) -> Mapping[tuple[int, ...], StateLeaf]:
        """The entries of states, by index and path in the cache list."""
        return self._states

    def reserve(self, sequence: int, count: int) -> int:
        """Give a sequence places for up to `count` more positions; returns for how many."""
        state = self._find(sequence)
        wanted = state.length + count
        if all(
            group.unused or wanted <= (table.dropped + len(table.blocks)) * self.block_size
            for group, table in zip(self._groups, state.tables, strict=True)
        ):
            return max(0, count)
        used = [(g, state.tables[i]) for i, g in enumerate(self._groups) if not g.unused]
        for group, table in used:
            most = table.dropped + len(table.blocks) + group.allocator.num_free
            wanted = min(wanted, most * self.block_size)
        for group, table in used:
            missing = table.missing(wanted, self.block_size)
            table.blocks += group.allocator.allocate(missing, table.last)
        return max(0, wanted - state.length)

    def grow(self, sequence: int, length: int) -> None:
        """Make a sequence `length` positions long; somebody else fills the new ones.

        Raises OutOfBlocks, and changes nothing but reserved places, if there is no room.
        """
        state = self._find(sequence)
        if self.reserve(sequence, length - state.length) < length - state.length:
            raise OutOfBlocks(f"no room for {length} positions")
        state.length = length

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the positions from `length` on: what a step appended and nobody wants.

        No more than the `rollback` that the cache was made for, and no mixer that keeps state.
        """
        state = self._find(sequence)
        if not state.length - self._rollback <= length <= state.length:
            raise RuntimeRefusal(
                f"truncate: expected a length from {state.length - self._rollback} to "
                f"{state.length}, got {length}"
            )
        if not self.pages_everything:
            raise RuntimeRefusal("truncate: the state of a recurrent mixer cannot be taken back")
        state.length = length
        for group, table in zip(self._groups, state.tables, strict=True):
            count = max(0, -(-length // self.block_size) - table.dropped)
            gone, table.blocks = table.blocks[count:], table.blocks[:count]
            self._release(group, gone[::-1])

    def tables(self, sequence: int) -> list[BlockTable]:
        """The sequence's block tables, one for each group of layers. Not to be changed."""
        return self._find(sequence).tables

    @property
    def groups(self) -> list[tuple[Retention, BlockAllocator | None]]:
        """The groups of layers that share block tables; no allocator where nothing is paged."""
        return [(g.retention, None if g.unused else g.allocator) for g in self._groups]

    @property
    def leaves(self) -> Mapping[tuple[int, ...], Leaf]:
        """The entries that can be paged, by index and path in the cache list."""
        return self._leaves

    @property
    def rollback(self) -> int:
        return self._rollback

    @property
    def serial(self) -> int:
        """The number of the latest step."""
        return self._serial

    def open_step(self) -> None:
        """Writes that are not the model's count as a step of their own."""
        self._serial += 1

    def originals_of(self, sequence: int) -> list[Any]:
        """The sequence's original caches, for mixers that run once per sequence."""
        return self._originals_of(sequence)

    def set_originals(self, sequence: int, caches: list[Any]) -> None:
        self._find(sequence).originals = caches

    @property
    def pages_everything(self) -> bool:
        """Whether blocks hold all that a sequence has: no mixer keeps state or caches of its own.

        False until the first step, which shows it.
        """
        leaves = self._leaves.values()
        mixed = self._state_entries or any(leaf.per_sequence for leaf in leaves)
        return not mixed and any(leaf.pool.made for leaf in leaves)

    def length(self, sequence: int) -> int:
        """The number of positions the sequence has."""
        return self._find(sequence).length

    @property
    def free_blocks(self) -> dict[Retention, int]:
        """Free blocks of each group of layers that pages anything."""
        groups = [group for group in self._groups if not group.unused]
        return {group.retention: group.allocator.num_free for group in groups}

    def num_blocks(self, retention: Retention) -> int:
        """All blocks of a group of layers."""
        return next(g.allocator.num_blocks for g in self._groups if g.retention == retention)

    # ------------------------------------------------------------------ step

    def step(self, tokens: Mapping[int, Tokens], logit_rows: LogitRows = "last") -> mx.array:
        """Append tokens to sequences and run the model once over all of them.

        `tokens` maps a sequence to its new tokens: a list, an int array [n] that may be
        unevaluated, or one token that an earlier step samples. `logit_rows` is "last" (the last
        new row of each sequence), "all", or the new rows wanted of each sequence (none for
        sequences that are left out). Returns logits [S, V] in the order of `tokens`. Raises
        OutOfBlocks before anything is changed.
        """
        rows = self._rows(tokens)
        wanted = self._logit_rows(rows, logit_rows)
        self._reserve(rows)
        self._serial += 1
        single = rows[-1].stop == len(rows)
        try:
            logits = self._recorded(rows, tokens, wanted) if single else None
            if logits is None:
                batch = self._batch(rows, [tokens[part.sequence] for part in rows], wanted)
                with sequence_ends(batch.positions, batches.row_ends(rows)):
                    made = batches.logits_of(self.model(batch.ids, cache=self._views(batch)))
                self._require_grown(rows)
                logits = _selected(made, batch)
                if single:
                    self._recorder.learn(batch)
        except BaseException:
            for part in rows:
                self._sequences[part.sequence].broken = True
            raise
        self._commit(rows)
        self._stepped = True
        return logits[: len(wanted)] if len(wanted) < logits.shape[0] else logits

    def _recorded(
        self, rows: tuple[Rows, ...], tokens: Mapping[int, Tokens], wanted: Sequence[int]
    ) -> mx.array | None:
        """Logits [>= S, V] of a step of single rows that runs without Python, if there is one."""
        if not self._recorder.ready:
            return None
        last, count = rows[-1], self._recorder.size(len(rows))
        # More rows like the last one, which write what it writes.
        rows += tuple(Rows(last.sequence, i, 1, last.position) for i in range(len(rows), count))
        batch = self._batch(rows, [tokens[part.sequence] for part in rows], range(count))
        logits = self._recorder.step(batch, batches.row_ends(rows))
        if logits is None:
            return None
        logits = logits.squeeze(1)
        if list(wanted) == list(range(len(wanted))):
            return logits
        return mx.take(logits, mx.array(np.array(wanted, dtype=np.int32)), axis=0)

    def arrays(self, states: bool = True) -> list[mx.array]:
        """Everything a later step depends on: evaluate it with each step.

        Without `states` only the pools: the state of mixers that run once per sequence may wait
        when logits are evaluated, which need all of it but the newest.
        """
        found = [a for leaf in self._leaves.values() for a in leaf.pool.arrays()]
        found += [a for state in self._states.values() for a in state.table.arrays()]
        found += self._copies
        self._copies = []
        if not states:
            return found
        for state in self._sequences.values():
            for original in state.originals or ():
                flat = tree_flatten(original.state)
                found += [value for _, value in flat if isinstance(value, mx.array)]
        return found

    # --------------------------------------------------------------- details

    def _collect(self, spec: Spec | None, entry: int, path: tuple[int, ...]) -> None:
        if spec is None:
            self._state_entries = True
            return
        if isinstance(spec, ArraysCache):
            self._states[(entry, *path)] = StateLeaf(StateTable(spec.size))
        for index, part in enumerate(spec.parts):
            self._collect(part, entry, (*path, index))
        retention = spec.retention
        if retention is None:
            self._state_entries = self._state_entries or not spec.parts
            return
        group = next((g for g in self._groups if g.retention == retention), None)
        if group is None:
            blocks = self._num_blocks
            if not isinstance(blocks, int):
                if retention not in blocks:
                    raise RuntimeRefusal(f"num_blocks: expected a number for {retention}")
                blocks = blocks[retention]
            group = _Group(
                retention,
                BlockAllocator(blocks, self._shuffle_seed, spread=policy.layout() == "heads"),
            )
            if self._poison:
                group.allocator.on_evict = functools.partial(self._fill, group)
            self._groups.append(group)
        pool = EntryPool(
            group.allocator.num_blocks,
            self.block_size,
            self._dtype,
            self._poison,
            self.quantization,
            f"cache entry {'.'.join(map(str, (entry, *path)))}",
        )
        leaf = Leaf(spec, retention, self._groups.index(group), entry, path, pool)
        group.leaves.append(leaf)
        self._leaves[(entry, *path)] = leaf

    def _find(self, sequence: int) -> _Sequence:
        state = self._sequences.get(sequence)
        if state is None:
            raise UnknownSequence(f"sequence {sequence} was never added, or was freed")
        return state

    def _rows(self, tokens: Mapping[int, Tokens]) -> tuple[Rows, ...]:
        if not tokens:
            raise RuntimeRefusal("step: expected tokens for at least one sequence, got none")
        rows, start = [], 0
        for name, new in tokens.items():
            state = self._find(name)
            if state.broken:
                raise UnknownSequence(f"sequence {name} was broken by a failed step: free it")
            count = new.size if isinstance(new, mx.array) else len(new)
            if count == 0:
                raise RuntimeRefusal(f"step: sequence {name} has no new tokens")
            rows.append(Rows(name, start, count, state.length))
            start += count
        return tuple(rows)

    def _logit_rows(self, rows: tuple[Rows, ...], wanted: LogitRows) -> list[int]:
        if isinstance(wanted, str):
            if wanted == "last":
                return [part.stop - 1 for part in rows]
            if wanted == "all":
                return list(range(rows[-1].stop))
            raise RuntimeRefusal(f"logit_rows: expected 'last', 'all' or rows, got {wanted!r}")
        chosen = []
        for part in rows:
            before = -1
            for row in wanted.get(part.sequence, ()):
                if not before < row < part.length:
                    raise RuntimeRefusal(
                        f"logit_rows: expected rows of sequence {part.sequence} in rising order, "
                        f"0 to {part.length - 1}, got {list(wanted[part.sequence])}"
                    )
                chosen.append(part.start + row)
                before = row
        return chosen

    def _reserve(self, rows: tuple[Rows, ...]) -> None:
        """Give every new row a place, in all groups or in none."""
        plan = []
        for index, group in enumerate(self._groups):
            if group.unused:
                continue
            needs = []
            for part in rows:
                table = self._sequences[part.sequence].tables[index]
                needs.append((table, table.missing(part.end, self.block_size)))
            total = sum(count for _, count in needs)
            if total > group.allocator.num_free:
                raise OutOfBlocks(
                    f"a step of {rows[-1].stop} rows needs {total} more blocks of "
                    f"{self.block_size} positions, and {group.allocator.num_free} of "
                    f"{group.allocator.num_blocks} are free: free a sequence, or make the cache "
                    "with more blocks"
                )
            plan.append((group, needs))
        for group, needs in plan:
            for table, count in needs:
                if count:
                    table.blocks += group.allocator.allocate(count, table.last)

    def _batch(self, rows: tuple[Rows, ...], tokens: list[Tokens], wanted: Sequence[int]) -> Batch:
        total = rows[-1].stop
        # At least one row stays: layers after the selection then never see an empty array.
        kept = list(wanted) or [total - 1]
        everything = len(kept) == total and kept == list(range(total))
        ragged = tuple(
            None if group.unused else self._ragged(i, rows) for i, group in enumerate(self._groups)
        )
        return Batch(
            ids=batches.row_ids(tokens),
            positions=batches.row_positions(rows),
            rows=rows,
            wanted=tuple(kept),
            logit_rows=None if everything else mx.array(np.array(kept, dtype=np.int32)),
            ragged=ragged,
            originals=self._store,
            serial=self._serial,
        )

    def _ragged(self, index: int, rows: tuple[Rows, ...]) -> Ragged:
        tables = [self._sequences[part.sequence].tables[index] for part in rows]
        return Ragged.build(
            [part.length for part in rows],
            [part.end for part in rows],
            [table.blocks for table in tables],
            self.block_size,
            [table.dropped for table in tables],
        )

    def _views(self, batch: Batch) -> list[View]:
        """What the model gets in place of its cache list."""
        return [self._view(spec, batch, entry, ()) for entry, spec in enumerate(self.specs)]

    def _view(self, spec: Spec | None, batch: Batch, entry: int, path: tuple[int, ...]) -> View:
        leaf = self._leaves.get((entry, *path))
        if leaf is not None:
            return VIEWS[type(leaf.spec)](leaf, batch)
        if spec is None:
            return ForeignView(None, batch, entry, path)
        if spec.parts:
            parts = tuple(
                self._view(part, batch, entry, (*path, i)) for i, part in enumerate(spec.parts)
            )
            return ListView(spec, batch, entry, path, parts)
        return StateView(spec, self._states[(entry, *path)], batch, entry, path)

    def _commit(self, rows: tuple[Rows, ...]) -> None:
        for part in rows:
            self._sequences[part.sequence].length = part.end
        for index, group in enumerate(self._groups):
            if group.unused:
                continue
            if not any(leaf.pool.made for leaf in group.leaves):
                # Mixers that run once per sequence keep these keys: nothing to page.
                group.unused = True
                for state in self._sequences.values():
                    self._release(group, state.tables[index].blocks)
                    state.tables[index] = BlockTable()
                continue
            for part in rows:
                table = self._sequences[part.sequence].tables[index]
                certain = max(0, part.end - self._rollback)
                self._release(group, table.drop_unseen(certain, self.block_size, group.retention))

    def _require_grown(self, rows: tuple[Rows, ...]) -> None:
        """Entries that told where the step's rows stand got these rows.

        Positions are those of the sequences, and upstream's are what its cache was given so far: of
        one that a layer does not write to, they stay where they are.
        """
        for (entry, *path), leaf in self._leaves.items():
            if leaf.asked == self._serial and not self._grown(leaf, rows):
                name = ".".join(map(str, (entry, *path)))
                raise RuntimeRefusal(
                    f"positions were read from cache entry {name}, and no layer wrote this step's "
                    "rows to it: in the original they would stay behind those of the sequence"
                )

    def _grown(self, leaf: Leaf, rows: tuple[Rows, ...]) -> bool:
        if not leaf.per_sequence:
            return leaf.pool.serial == self._serial
        for part in rows:
            own = entry_at(self._originals_of(part.sequence), (leaf.entry, *leaf.path))
            if own.offset != part.end:
                return False
        return True

    def _release(self, group: _Group, blocks: Sequence[int]) -> None:
        freed = group.allocator.release(blocks)
        if self._poison:
            self._fill(group, *freed)

    @staticmethod
    def _fill(group: _Group, *blocks: int) -> None:
        for leaf in group.leaves:
            leaf.pool.fill_freed(blocks)

    def _originals_of(self, sequence: int) -> list[Any]:
        state = self._find(sequence)
        if state.originals is None:
            state.originals = fresh_caches(self.model, self.specs)
        return state.originals


def cache_specs(model: Any) -> list[Spec | None]:
    """The model's cache list as specs; None where it holds something else, such as a cache class of
    the model file's own, which only a model that runs once per sequence can use."""
    if not hasattr(model, "make_cache"):
        return [KVCache() for _ in model.layers]
    entries = list(model.make_cache())
    specs = [spec_of(entry) for entry in entries]
    own = [id(entry) for entry, spec in zip(entries, specs, strict=True) if spec is not None]
    if len(set(own)) < len(own):
        raise RuntimeRefusal(
            "make_cache returns one cache several times: expected a cache of its own for each entry"
        )
    return specs


def cache_retentions(model: Any) -> list[Retention]:
    """The retentions of the model's groups of layers, each once."""
    found: dict[Retention, None] = {}
    stack = [spec for spec in reversed(cache_specs(model)) if spec is not None]
    while stack:
        spec = stack.pop()
        stack.extend(reversed(spec.parts))
        if spec.retention is not None:
            found[spec.retention] = None
    return list(found)


def fresh_caches(model: Any, specs: Sequence[Spec | None]) -> list[Any]:
    """Original caches for one sequence, in the structure of the cache list.

    A model with `original_caches` makes them itself.
    """
    if hasattr(model, "original_caches"):
        return list(model.original_caches())
    own = model.make_cache() if any(spec is None for spec in specs) else []
    return [own[i] if spec is None else spec.original() for i, spec in enumerate(specs)]


def _selected(logits: mx.array, batch: Batch) -> mx.array:
    """[S or T, 1, V] -> [S, V]."""
    if logits.shape[0] == batch.num_rows and batch.num_logits != batch.num_rows:
        logits = logits[batch.logit_rows]
    if logits.shape[0] != batch.num_logits or logits.shape[1] != 1:
        raise RuntimeError(
            f"the model gave logits {list(logits.shape)} for {batch.num_logits} wanted rows"
        )
    return logits.squeeze(1)
