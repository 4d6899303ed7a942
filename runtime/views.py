"""Views: what a rewritten model gets in place of its caches, bound to one step's batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from . import caches
from .batch import Batch
from .caches import Retention, Spec
from .errors import RuntimeRefusal
from .masks import MaskSpec
from .opaque import Opaque
from .pools import EntryPool
from .states import StateTable


@dataclass(slots=True, eq=False)
class Leaf:
    """One paged entry of the cache list, for the life of a `PagedCache`.

    `group` is the index of the layers that share its block tables. The pool is made when the first
    keys arrive, since only they tell its shape; None still, later, means that the entry is used by
    mixers that run once per sequence. `asked` is the latest step in which somebody asked where its
    rows stand.
    """

    spec: Spec
    retention: Retention
    group: int
    entry: int
    path: tuple[int, ...]
    pool: EntryPool
    per_sequence: bool = False
    asked: int = -1


@dataclass(slots=True, eq=False)
class StateLeaf:
    """One entry of states of the cache list, for the life of a `PagedCache`."""

    table: StateTable
    per_sequence: bool = False


class Handle(Opaque):
    """Keys or values in pages, or latents or their rope keys: `role` says which. Only
    `paged_attention`, or for latents `paged_latent_attention`, can read them.

    `shape` is (T, Hkv, positions + 1, D), where the third entry is an array: each row's number of
    positions. Code that subtracts the length of the input from it gets each row's position.
    """

    __slots__ = ("batch", "leaf", "role")
    _rule: ClassVar[str] = (
        "a paged cache has no contiguous keys here: what `update_and_fetch` returns may only be "
        "passed on to `paged_attention`, and latents to `paged_latent_attention`"
    )

    def __init__(self, leaf: Leaf, batch: Batch, role: str) -> None:
        self.leaf = leaf
        self.batch = batch
        self.role = role

    @property
    def shape(self) -> tuple[int, int, mx.array, int]:
        pool, rank = self.leaf.pool.pool, self.leaf.pool.rank or 0
        widths = {"keys": pool.key_dim, "values": pool.value_dim or 0}
        widths |= {"latents": rank, "ropes": pool.key_dim - rank, "index": pool.key_dim}
        return (self.batch.num_rows, pool.kv_heads, self.batch.positions + 1, widths[self.role])

    @property
    def dtype(self) -> mx.Dtype:
        dtype: mx.Dtype = self.leaf.pool.pool.dtype
        return dtype

    def __repr__(self) -> str:
        return f"<paged {self.role} of cache entry {self.leaf.entry}>"


# What caches keep under private names: code that sets one of these means the cache, not a mark.
_KEPT = frozenset({"_idx", "_offset", "_lengths", "_left_padding", "_right_padding"})


class View:
    """One entry of the cache list during one step.

    A model may leave marks on it, under private names: what it worked out for this step's rows.
    """

    __slots__ = ("__dict__", "batch", "entry", "path", "spec")

    def __setattr__(self, name: str, value: Any) -> None:
        known = hasattr(type(self), name)
        if not known and (not name.startswith("_") or name in _KEPT):
            raise AttributeError(f"{self!r} has no attribute {name!r} to set")
        object.__setattr__(self, name, value)

    def __init__(self, spec: Spec | None, batch: Batch, entry: int, path: tuple[int, ...]) -> None:
        self.spec = spec
        self.batch = batch
        self.entry = entry
        self.path = path

    @property
    def offset(self) -> mx.array:
        """Each row's position, [T] int32. The same array for every entry of a step."""
        return self.batch.positions

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> MaskSpec:
        """What upstream's caches offer under this name, as a value."""
        del N  # always 1: every row is a sequence of one token
        return MaskSpec(window=window_size, return_array=return_array, path=self.path)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of cache entry {self.entry}{list(self.path) or ''}>"


class PagedView(View):
    """A paged entry: keys and values are written to blocks and come back as handles."""

    __slots__ = ("leaf",)

    def __init__(self, leaf: Leaf, batch: Batch) -> None:
        super().__init__(leaf.spec, batch, leaf.entry, leaf.path)
        self.leaf = leaf

    @property
    def offset(self) -> mx.array:
        """Each row's position, [T] int32. The same array for every entry of a step.

        Raises RuntimeRefusal once this step's rows are written: upstream's cache would count them.
        """
        leaf, batch = self.leaf, self.batch
        leaf.asked = batch.serial
        if self._grown() if leaf.per_sequence else leaf.pool.serial == batch.serial:
            raise RuntimeRefusal(
                f"{self!r}: its positions are read after this step's rows were written to it; the "
                "original would count on from the end of each chunk. Read them before"
            )
        return batch.positions

    def _grown(self) -> bool:
        """Whether the caches of a mixer that runs once per sequence have this step's rows."""
        first = self.batch.rows[0]
        originals = self.batch.originals.of(first.sequence)
        own = caches.entry_at(originals, (self.entry, *self.path))
        return bool(own.offset != first.position)

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> MaskSpec:
        """A cache with a window masks with it where it is asked for none."""
        del N
        kept = self.leaf.retention.window
        if window_size or kept:  # which rows a window shows depends on where they stand
            self.leaf.asked = self.batch.serial
        return MaskSpec(
            window=window_size or kept, return_array=return_array, path=self.path, kept=kept
        )

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        """Write this step's rows, keys [T, Hkv, 1, Dk] and values [T, Hkv, 1, Dv]."""
        leaf, batch = self._writable(), self.batch
        leaf.pool.write(keys, values, batch.ragged[leaf.group], batch.serial)
        return Handle(leaf, batch, "keys"), Handle(leaf, batch, "values")

    def update_and_fetch_latents(self, latents: mx.array, ropes: mx.array) -> tuple[Handle, Handle]:
        """Write this step's rows, latents [T, 1, 1, rank] and rope keys [T, 1, 1, R]."""
        leaf, batch = self._writable(), self.batch
        leaf.pool.write_latents(latents, ropes, batch.ragged[leaf.group], batch.serial)
        return Handle(leaf, batch, "latents"), Handle(leaf, batch, "ropes")

    def update_and_fetch_index(self, keys: mx.array, values: mx.array) -> tuple[Handle, None]:
        """Write this step's rows of keys that are only ranked, [T, 1, 1, D]; no values."""
        leaf, batch = self._writable(), self.batch
        leaf.pool.write_index(keys, values, batch.ragged[leaf.group], batch.serial)
        return Handle(leaf, batch, "index"), None

    def _writable(self) -> Leaf:
        if self.leaf.per_sequence:
            raise TypeError(
                f"{self!r} is used once per sequence by one layer and paged by another: the keys "
                "would be in two places"
            )
        return self.leaf

    def keys_and_values(self) -> tuple[Handle, Handle]:
        """The handles of what another layer wrote in this step."""
        leaf = self.leaf
        leaf.pool.require_written(self.batch.serial)
        return Handle(leaf, self.batch, "keys"), Handle(leaf, self.batch, "values")


class KVView(PagedView):
    __slots__ = ()

    @property
    def state(self) -> tuple[Handle, Handle]:
        """mlx_vlm reads under this name what another layer wrote in this step."""
        return self.keys_and_values()


class RotatingView(PagedView):
    __slots__ = ()


class ConcatenateView(PagedView):
    __slots__ = ()


class ChunkedView(PagedView):
    """Chunks end by what the mask says; nothing moves, so the front is never trimmed."""

    __slots__ = ()
    start_position: ClassVar[int] = 0

    def maybe_trim_front(self) -> None:
        """Blocks before the current chunk are released between steps."""


class StateView(View):
    """State of a mixer that runs once per sequence, once per length, or on rows through ops."""

    __slots__ = ("leaf",)

    def __init__(
        self, spec: Spec, leaf: StateLeaf, batch: Batch, entry: int, path: tuple[int, ...]
    ) -> None:
        super().__init__(spec, batch, entry, path)
        self.leaf = leaf

    @property
    def table(self) -> StateTable:
        """The states of all sequences. Raises TypeError where they are kept per sequence."""
        if self.leaf.per_sequence:
            raise TypeError(
                f"{self!r} is kept once per sequence by one layer and for a batch by another: the "
                "state would be in two places"
            )
        return self.leaf.table

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> MaskSpec:
        """All rows are real tokens: a batch is not padded."""
        del N, window_size, return_array
        return MaskSpec(kind="sequence", path=self.path)

    def __getitem__(self, index: int) -> HeldState:
        return HeldState(self, self._place(index))

    def __setitem__(self, index: int, value: object) -> None:
        place = self._place(index)
        if not isinstance(value, NewState):
            raise TypeError(
                f"state {index} of cache entry {self.entry} belongs to sequences, and was set to "
                f"{type(value).__name__}: its mixer must be marked `per_length` or "
                "`per_sequence`, or store what an op of the runtime returned"
            )
        held = value.held
        if held is not None and (held.view.table is not self.table or held.place != place):
            raise TypeError(
                f"what became of {held!r} was stored as state {place} of cache entry {self.entry}"
            )
        for sequences, states in value.parts(self.batch):
            self.table.write(place, sequences, states)

    def _place(self, index: int) -> int:
        size = self.table.size
        if not -size <= index < size:
            raise IndexError(f"state {index} of {size}")
        return index % size


class HeldState(Opaque):
    """What `cache[i]` of an entry of states is to a mixer that runs on rows: the states of all
    sequences, before the step. Ops of the runtime read it; it is no array and never None."""

    __slots__ = ("_writes", "place", "view")
    _rule: ClassVar[str] = (
        "a state belongs to sequences: its mixer must be marked `per_length` or `per_sequence`, or "
        "hand it to an op of the runtime"
    )

    def __init__(self, view: StateView, place: int) -> None:
        self.view = view
        self.place = place
        self._writes = view.table.writes(place)

    @property
    def batch(self) -> Batch:
        return self.view.batch

    def begun(self) -> tuple[bool, ...]:
        """Which of the batch's sequences have a state."""
        sequences = tuple(part.sequence for part in self.batch.rows)
        return self.view.table.known(self.place, sequences)

    def read(self, sequences: tuple[int, ...]) -> mx.array | None:
        """States [n, ...] of sequences that have one, None of sequences that have none.

        Raises RuntimeError if the state was replaced since it was taken from the cache.
        """
        table = self.view.table
        if table.writes(self.place) != self._writes:
            raise RuntimeError(f"{self!r} was replaced before it was read")
        return table.read(self.place, sequences) if sequences else None

    def read_begun(self, begun: tuple[bool, ...]) -> mx.array | None:
        """The states of those of the batch's sequences that have one, None if none has."""
        parts = zip(self.batch.rows, begun, strict=True)
        return self.read(tuple(part.sequence for part, has in parts if has))

    def __repr__(self) -> str:
        return f"<state {self.place} of cache entry {self.view.entry}>"


States = Iterable[tuple[tuple[int, ...], mx.array]]


class NewState(Opaque):
    """A state after the step, to be stored in a cache: for some sequences at a time, [n, ...].

    `held` is the state before the step that it was made of: it may only be stored in its place.
    """

    __slots__ = ("held", "parts")
    _rule: ClassVar[str] = "a new state may only be stored in a cache"

    def __init__(self, parts: Callable[[Batch], States], held: HeldState | None = None) -> None:
        self.parts = parts
        self.held = held


class ListView(View):
    """A `CacheList`: indexing gives the parts."""

    __slots__ = ("parts",)

    def __init__(
        self, spec: Spec, batch: Batch, entry: int, path: tuple[int, ...], parts: tuple[View, ...]
    ) -> None:
        super().__init__(spec, batch, entry, path)
        self.parts = parts

    def __getitem__(self, index: int) -> View:
        return self.parts[index]


class ForeignView(View):
    """A cache class that a model file defines itself."""

    __slots__ = ()


def find_view(cache: Any) -> View | None:
    """The first view in a cache list, or the view itself."""
    if isinstance(cache, View):
        return cache
    if isinstance(cache, list | tuple):
        return next((view for part in cache if (view := find_view(part)) is not None), None)
    return None


VIEWS: dict[type[Spec], type[PagedView]] = {
    caches.KVCache: KVView,
    caches.RotatingKVCache: RotatingView,
    caches.ChunkedKVCache: ChunkedView,
    caches.ConcatenateKVCache: ConcatenateView,
}
for _spec, _view in VIEWS.items():
    _spec.register(_view)
caches.ArraysCache.register(StateView)
caches.CacheList.register(ListView)
