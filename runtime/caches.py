"""Cache specs: the names and constructor arguments of `mlx_lm.models.cache`, as frozen values.

A rewritten file imports its caches from here, so its `make_cache` stays as it was written and
returns a description of the caches. `PagedCache` reads it.

An instance of any form of a kind is an instance of the spec's class: the spec itself, the view
that a rewritten model gets, and the original cache that a mixer gets when it runs once per
sequence. `isinstance(cache, ArraysCache)` in a model file therefore keeps its meaning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.models import cache as upstream

from .errors import RuntimeRefusal


@dataclass(frozen=True, slots=True, order=True)
class Retention:
    """How far back a layer can look: everything, `window` positions, or the current chunk."""

    window: int | None = None
    chunk: int | None = None

    def first_needed(self, position: int) -> int:
        """The oldest position that a row at `position`, or a later one, can see."""
        if self.window is not None:
            return max(0, position - self.window + 1)
        if self.chunk is not None:
            return position // self.chunk * self.chunk
        return 0


class Spec(ABC):
    """A frozen description of one entry of a model's cache list."""

    __slots__ = ()

    @abstractmethod
    def original(self) -> Any:
        """A new, empty cache of mlx_lm for one sequence."""

    @property
    def retention(self) -> Retention | None:
        """What a paged entry must keep; None where there is nothing to page."""
        return None

    @property
    def parts(self) -> tuple[Spec, ...]:
        """The entries of a `CacheList`."""
        return ()


@dataclass(frozen=True, slots=True)
class KVCache(Spec):
    """All keys and values of a sequence."""

    def original(self) -> Any:
        return upstream.KVCache()

    @property
    def retention(self) -> Retention:
        return Retention()


@dataclass(frozen=True, slots=True)
class ConcatenateKVCache(Spec):
    """Keys and values kept by concatenation; paged exactly as `KVCache`."""

    def original(self) -> Any:
        return upstream.ConcatenateKVCache()

    @property
    def retention(self) -> Retention:
        return Retention()


@dataclass(frozen=True, slots=True)
class RotatingKVCache(Spec):
    """The keys and values of the last `max_size` positions."""

    max_size: int
    keep: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.max_size, int) or self.max_size < 1:
            raise RuntimeRefusal(
                f"RotatingKVCache: expected a positive number of positions, got {self.max_size!r}; "
                "the window in the model's config is missing or wrong"
            )
        if self.keep:
            raise RuntimeRefusal(
                f"RotatingKVCache(keep={self.keep}): a paged window drops its oldest positions; "
                "first positions kept for ever are not supported"
            )

    def original(self) -> Any:
        return upstream.RotatingKVCache(max_size=self.max_size, keep=self.keep)

    @property
    def retention(self) -> Retention:
        return Retention(window=self.max_size)


@dataclass(frozen=True, slots=True)
class ChunkedKVCache(Spec):
    """The keys and values of the current chunk of `chunk_size` positions."""

    chunk_size: int

    def original(self) -> Any:
        return upstream.ChunkedKVCache(self.chunk_size)

    @property
    def retention(self) -> Retention:
        return Retention(chunk=self.chunk_size)


@dataclass(frozen=True, slots=True, init=False)
class ArraysCache(Spec):
    """`size` arrays of state, whose shapes only the mixer knows."""

    size: int

    def __init__(self, size: int, left_padding: Sequence[int] | None = None) -> None:
        if left_padding:
            raise RuntimeRefusal("ArraysCache(left_padding=...): a ragged batch is never padded")
        object.__setattr__(self, "size", size)

    def original(self) -> Any:
        return upstream.ArraysCache(self.size)


@dataclass(frozen=True, slots=True, init=False)
class CacheList(Spec):
    """Several caches of one layer."""

    caches: tuple[Spec, ...]

    def __init__(self, *caches: Spec) -> None:
        object.__setattr__(self, "caches", caches)

    def __getitem__(self, index: int) -> Spec:
        return self.caches[index]

    def original(self) -> Any:
        return upstream.CacheList(*(part.original() for part in self.caches))

    @property
    def parts(self) -> tuple[Spec, ...]:
        return self.caches


_SPECS = (KVCache, ConcatenateKVCache, RotatingKVCache, ChunkedKVCache, ArraysCache, CacheList)
for _spec in _SPECS:
    _spec.register(getattr(upstream, _spec.__name__))


def is_spec(value: object) -> bool:
    """Whether a value is a spec itself, and not another form of the cache it describes."""
    if not isinstance(value, Spec) or type(value) not in _SPECS:
        return False
    return all(is_spec(part) for part in value.parts)


def spec_of(value: Any) -> Spec | None:
    """The spec of a cache list's entry: itself, or that of an empty cache of mlx_lm, which a
    `make_cache` that was exchanged, or one that names the module, may give. None for anything else.
    """
    if is_spec(value):
        found: Spec = value
        return found
    kind = type(value)
    if kind is upstream.CacheList:
        parts = [spec_of(part) for part in value.caches]
        known = [part for part in parts if part is not None]
        return CacheList(*known) if len(known) == len(parts) else None
    if kind not in _EMPTY or not value.empty():
        return None
    return _EMPTY[kind](value)


# How mlx_lm's caches are told once they exist.
_EMPTY: dict[type, Callable[[Any], Spec]] = {
    upstream.KVCache: lambda cache: KVCache(),
    upstream.ConcatenateKVCache: lambda cache: ConcatenateKVCache(),
    upstream.RotatingKVCache: lambda cache: RotatingKVCache(cache.max_size, cache.keep),
    upstream.ChunkedKVCache: lambda cache: ChunkedKVCache(cache.chunk_size),
    upstream.ArraysCache: lambda cache: ArraysCache(len(cache.cache)),
}


def entry_at(caches: Sequence[Any], path: Sequence[int]) -> Any:
    """An entry of a cache list or, by further numbers, a part of one."""
    found = caches[path[0]]
    for index in path[1:]:
        found = found[index]
    return found
