"""The route of recurrent mixers: original code, once for all sequences with equally many rows.

Sequences that decode have one row each, so a decode step runs every mixer once, over all of them.
A prompt that is read in between adds one run. Rows [T, 1, ...] become [N, L, ...] for N sequences
of L rows, views become the states of those sequences, and results become rows again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import mlx.core as mx
import numpy as np

from . import caches
from .batch import Batch
from .masks import MaskSpec
from .per_sequence import find_views, require_no_step
from .rope import apart
from .rows import Rows
from .states import StateTable
from .views import StateView, View

_Method = Callable[..., Any]
# Arguments that are no arrays, beside the first: what the compiler's proof lets them be.
_PLAIN = (bool, int, float, StateView, MaskSpec)


class BatchedState:
    """What a mixer gets in place of an `ArraysCache`: the states of several sequences.

    Indexing gives array [N, ...], or None where the sequences are new; assigning keeps one. There
    is no padding, so `lengths` and `left_padding` are None as in a cache that was never prepared.
    """

    __slots__ = ("_sequences", "_table")
    lengths = None
    left_padding = None

    def __init__(self, table: StateTable, sequences: tuple[int, ...]) -> None:
        self._table = table
        self._sequences = sequences

    def __getitem__(self, index: int) -> mx.array | None:
        if not -self._table.size <= index < self._table.size:
            raise IndexError(f"state {index} of {self._table.size}")
        return self._table.read(index % self._table.size, self._sequences)

    def __setitem__(self, index: int, value: mx.array) -> None:
        if not isinstance(value, mx.array):
            raise TypeError(f"state {index}: expected an array, got {type(value).__name__}")
        self._table.write(index % self._table.size, self._sequences, value)

    def __iter__(self) -> Iterator[mx.array | None]:
        return (self[index] for index in range(self._table.size))

    def __bool__(self) -> bool:
        return True

    def update_window(
        self, index: int, source: mx.array, width: int, *, lengths: mx.array | None = None
    ) -> mx.array:
        """Keep the last `width` positions of source [N, width + L, ...]."""
        if lengths is not None or not 0 <= width <= source.shape[1]:
            raise ValueError(f"state {index}: the last {width} of {source.shape[1]} positions")
        state = mx.contiguous(source[:, source.shape[1] - width :])
        self[index] = state
        return state

    def update_recurrent(
        self, index: int, length: int, update: Callable[..., Any]
    ) -> tuple[mx.array, mx.array]:
        """Keep the second of what `update(state, None)` returns."""
        del length
        output, state = update(self[index], None)[:2]
        self[index] = state
        return output, state

    def advance(self, N: int) -> None:
        """Upstream counts padding down here; there is none."""

    def make_mask(self, N: int) -> None:
        """No row is padding."""


caches.ArraysCache.register(BatchedState)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Sequences with equally many rows, and states of the same arrays.

    `rows` [N * L] are the rows of the batch in the order of `sequences`, None for all of them as
    they are; `first` [N] is each sequence's first row, and `parts` say where it is.
    """

    sequences: tuple[int, ...]
    length: int
    rows: np.ndarray | None
    first: np.ndarray
    parts: tuple[Rows, ...]

    @property
    def single(self) -> bool:
        """Whether the rows of the batch are one of each sequence, as they are."""
        return self.rows is None and self.length == 1

    @property
    def positions(self) -> np.ndarray:
        """The position of each sequence's first row, [N]."""
        return np.array([part.position for part in self.parts], dtype=np.int32)


@overload
def per_length(method: _Method, /) -> _Method: ...
@overload
def per_length(**ranks: int | tuple[int, ...]) -> Callable[[_Method], _Method]: ...
def per_length(method: _Method | None = None, /, **ranks: int | tuple[int, ...]) -> Any:
    """Run a mixer's `__call__(self, x, ...)` once for each number of rows that sequences have.

    Arguments: arrays [T, 1, ...] become [N, L, ...]; per-row factors [T, 1, 1, 1] become
    [N, 1, L, 1]; the positions become those of the first rows, [N], and integers [T] computed from
    them the entries of those rows; views of states become `BatchedState`; masks of states become
    None. Outside of steps the method runs as it is, inside RuntimeRefusal is raised where no
    argument is a view. Results [N, L, ...], or
    tuples or lists of them, come back as [T, 1, ...].

    The compiler proved that the mixer keeps sequences apart for arguments of certain sorts: x an
    array of rank 3, or of the rank that `ranks` has for its name, and the others None, numbers,
    views and masks, or arrays of the ranks given for their names; and for classes of the method's
    own file. TypeError for any other.
    """
    if method is None:
        return functools.partial(_per_length, ranks=ranks)
    return _per_length(method, {})


def _per_length(method: _Method, ranks: dict[str, int | tuple[int, ...]]) -> _Method:
    views_of = proved_views(method, ranks)

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        views = views_of(args, kwargs)
        if not views:
            return method(*args, **kwargs)
        batch = views[0].batch
        groups = groups_of(batch, views)
        results = []
        for group in groups:
            gather = Gather(batch, group)
            with apart():
                results.append(method(args[0], *gather(args[1:]), **gather(kwargs)))
        return rows_of(results, groups, batch.num_rows, method)

    return run


def proved_views(
    method: _Method, ranks: dict[str, int | tuple[int, ...]]
) -> Callable[[Sequence[Any], dict[str, Any]], tuple[View, ...]]:
    """What looks at the arguments of each call of a mixer and finds their views.

    None outside of steps, where the method runs as it is. Raises RuntimeRefusal inside if there is
    none, and TypeError for arguments that the compiler's proof says nothing of.
    """
    _, first, *others = inspect.signature(method).parameters
    allowed = {name: _tuple(ranks.get(name, ())) for name in others}
    allowed[first] = _tuple(ranks.get(first, 3))
    names = (first, *others)

    def views_of(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[View, ...]:
        views = tuple(find_views((args[1:], kwargs)))
        if not views:
            require_no_step(method)
            return ()
        if type(args[0]).__module__ != method.__module__:
            raise TypeError(
                f"{method.__qualname__} was proved to keep sequences apart, but not in "
                f"{type(args[0]).__qualname__} of another file"
            )
        for name, value in (*zip(names, args[1:], strict=False), *kwargs.items()):
            if not _is_expected(value, allowed.get(name, ()), other=name != first):
                shown = f"an array of {value.ndim} axes" if isinstance(value, mx.array) else value
                raise TypeError(
                    f"{method.__qualname__} was proved to keep sequences apart, but not for "
                    f"{name} = {shown!r}"
                )
        return views

    return views_of


def _tuple(ranks: int | tuple[int, ...]) -> tuple[int, ...]:
    return ranks if isinstance(ranks, tuple) else (ranks,)


def _is_expected(value: Any, ranks: tuple[int, ...], *, other: bool) -> bool:
    if isinstance(value, mx.array):
        return value.ndim in ranks
    return other and (value is None or isinstance(value, _PLAIN))


def groups_of(batch: Batch, views: Sequence[View]) -> tuple[Group, ...]:
    """The groups of a step's sequences; worked out once for all layers that agree on them."""
    tables = [table for view in views for table in _tables(view)]
    key = tuple(
        (part.length, *(table.holds(part.sequence) for table in tables)) for part in batch.rows
    )
    found: tuple[Group, ...] | None = batch.memo.get(key)
    if found is None:
        found = batch.memo[key] = tuple(grouped(batch, key))
    return found


def grouped(batch: Batch, key: tuple[tuple[Any, ...], ...]) -> Iterator[Group]:
    """The sequences of a batch, those with equal entries of `key` together."""
    members: dict[tuple[Any, ...], list[int]] = {}
    for number, kind in enumerate(key):
        members.setdefault(kind, []).append(number)
    for numbers in members.values():
        parts = [batch.rows[number] for number in numbers]
        rows = np.concatenate([np.arange(p.start, p.stop, dtype=np.int32) for p in parts])
        yield Group(
            sequences=tuple(part.sequence for part in parts),
            length=parts[0].length,
            rows=None if len(members) == 1 else rows,
            first=np.array([part.start for part in parts], dtype=np.int32),
            parts=tuple(parts),
        )


def _tables(view: View) -> Iterator[StateTable]:
    for part in getattr(view, "parts", (view,)):
        if isinstance(part, StateView):
            yield part.table
        elif part is not view:
            yield from _tables(part)


@dataclass(frozen=True, slots=True)
class Gather:
    """Turns arguments of a ragged batch into those of one group."""

    batch: Batch
    group: Group

    def __call__(self, value: Any) -> Any:
        if isinstance(value, mx.array):
            return self._array(value)
        if isinstance(value, StateView):
            return BatchedState(value.table, self.group.sequences)
        if isinstance(value, View):
            raise TypeError(f"a mixer that runs once per length was given {value!r}")
        if isinstance(value, MaskSpec):
            return None if value.kind == "sequence" else value
        if type(value) in (list, tuple):
            return type(value)(self(part) for part in value)
        if type(value) is dict:
            return {key: self(part) for key, part in value.items()}
        return value

    def _array(self, value: mx.array) -> mx.array:
        group, total = self.group, self.batch.num_rows
        if value is self.batch.positions:
            # Another array object in either case: code may add to it in place.
            return mx.array(value if group.single else group.positions)
        sort = sort_of(value, total)
        if sort == "other":
            return value
        count, length = len(group.sequences), group.length
        if sort == "numbers":
            return value if group.single else value[mx.array(group.first)]
        rows = value
        if group.rows is not None:
            start, stop = int(group.rows[0]), int(group.rows[-1]) + 1
            together = stop - start == len(group.rows) and bool(np.all(np.diff(group.rows) == 1))
            rows = value[start:stop] if together else value[mx.array(group.rows)]
        if value.shape[1:] == (1, 1, 1):
            return rows.reshape(count, 1, length, 1)
        return rows.reshape(count, length, *value.shape[2:])


def sort_of(value: mx.array, total: int) -> Literal["rows", "numbers", "other"]:
    """What an argument is in a batch of `total` rows: rows [T, 1, ...], an integer for each [T], or
    nothing of the rows'. Raises TypeError for an array of so many rows that is neither."""
    if value.ndim == 0 or value.shape[0] != total:
        return "other"
    if value.ndim == 1 and mx.issubdtype(value.dtype, mx.integer):
        return "numbers"
    if value.ndim == 1 or value.shape[1] != 1:
        raise TypeError(
            f"cannot tell how an array of shape {list(value.shape)} splits into sequences: "
            f"expected [{total}, 1, ...]"
        )
    return "rows"


def rows_of(
    results: list[Any], groups: tuple[Group, ...], total: int, method: Callable[..., Any]
) -> Any:
    """Results [N, L, ...] of each group, or tuples or lists of them, as rows [T, 1, ...]."""
    first = results[0]
    if first is None and all(result is None for result in results):
        return None
    if type(first) in (tuple, list):
        columns = zip(*results, strict=True)
        return type(first)(rows_of(list(parts), groups, total, method) for parts in columns)
    found = []
    for result, group in zip(results, groups, strict=True):
        wanted = (len(group.sequences), group.length)
        if not isinstance(result, mx.array) or result.shape[:2] != wanted:
            shape = list(result.shape) if isinstance(result, mx.array) else type(result).__name__
            raise TypeError(
                f"{method.__qualname__}: expected [{wanted[0]}, {wanted[1]}, ...] from "
                f"{wanted[0]} sequences of {wanted[1]} rows, got {shape}"
            )
        found.append(result.reshape(wanted[0] * wanted[1], 1, *result.shape[2:]))
    if len(found) == 1:
        return found[0]
    order = np.concatenate([group.rows for group in groups if group.rows is not None])
    joined = mx.concatenate(found)
    if np.array_equal(order, np.arange(total)):
        return joined
    return joined[mx.array(np.argsort(order).astype(np.int32))]
