"""The per-sequence route: a mixer's original code, once for each sequence of the batch.

Rows [T, 1, ...] become one [1, L, ...] per sequence, views become that sequence's own caches of
mlx_lm, masks become what upstream would have made from those, and results become rows again.
Always right, and slower than pages: one run of the mixer for every sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import base as upstream

from .batch import Batch
from .caches import entry_at
from .errors import RuntimeRefusal
from .masks import MaskSpec, require_kept
from .rope import apart, in_step
from .rows import Rows
from .views import Handle, ListView, PagedView, StateView, View

_Method = Callable[..., Any]


def per_sequence(method: _Method) -> _Method:
    """Run a mixer's `__call__(self, x, ...)` once per sequence.

    Arguments: arrays [T, 1, ...] are cut to the sequence's rows as [1, L, ...]; per-row factors
    [T, 1, 1, 1] become [1, 1, L, 1]; the positions become the number of the sequence's first one,
    and integers [T] computed from them the entry of that row; views become the sequence's own
    original caches; masks become what those caches make. Outside of steps the method runs as it is,
    inside RuntimeRefusal is raised where no argument is a view. Results [1, L, ...], or tuples or
    lists of them, come back as [T, 1, ...].
    """

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        views = tuple(find_views((args[1:], kwargs)))
        if not views:
            require_no_step(method)
            return method(*args, **kwargs)
        batch = views[0].batch
        results = []
        for part in batch.rows:
            split = _Split(batch, part, views)
            with apart():
                results.append(method(args[0], *split(args[1:]), **split(kwargs)))
        return _join(results, batch.rows, method)

    return run


def per_sequence_model(method: _Method) -> _Method:
    """Run a whole `Model.__call__(self, inputs, cache=...)` once per sequence.

    ids [T, 1] become [1, L], the list of views the sequence's list of original caches. Returns the
    logits of the wanted rows only, [S, 1, V].
    """

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        views = tuple(find_views((args[1:], kwargs)))
        if not views:
            return method(*args, **kwargs)
        batch = views[0].batch
        kept = []
        for part in batch.rows:
            split = _Split(batch, part, views)
            with apart():
                logits = method(args[0], *split(args[1:]), **split(kwargs))
            rows = [row - part.start for row in batch.wanted if part.start <= row < part.stop]
            if rows == list(range(part.length)):
                kept.append(logits[0])
            elif rows:
                kept.append(logits[0, mx.array(rows)])
        return (kept[0] if len(kept) == 1 else mx.concatenate(kept))[:, None]

    return run


def require_no_step(method: _Method) -> None:
    """A mixer without a cache cannot tell whose rows it is given, and would begin with each."""
    if in_step():
        raise RuntimeRefusal(
            f"{method.__qualname__}: called without a cache, so that no row would go on from the "
            "one before it; give it the cache of its layer"
        )


def find_views(value: Any) -> Iterator[View]:
    """The views among arguments."""
    if isinstance(value, View):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from find_views(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from find_views(part)


@dataclass(frozen=True, slots=True)
class _Split:
    """Turns arguments of a ragged batch into those of one sequence."""

    batch: Batch
    part: Rows
    views: Sequence[View]

    def __call__(self, value: Any) -> Any:
        if isinstance(value, mx.array):
            return self._array(value)
        if isinstance(value, View):
            return self._original(value)
        if isinstance(value, MaskSpec):
            return self._mask(value)
        if isinstance(value, Handle):
            raise TypeError(f"a mixer that runs once per sequence was given {value!r}")
        if type(value) in (list, tuple):
            return type(value)(self(part) for part in value)
        if type(value) is dict:
            return {key: self(part) for key, part in value.items()}
        return value

    def _array(self, value: mx.array) -> mx.array | int:
        part, total = self.part, self.batch.num_rows
        if value is self.batch.positions:
            return part.position
        if value.ndim == 0 or value.shape[0] != total:
            return value
        if value.ndim == 1 and mx.issubdtype(value.dtype, mx.integer):
            return value[part.start]
        if value.ndim == 1 or value.shape[1] != 1:
            raise TypeError(
                f"cannot tell how an array of shape {list(value.shape)} splits into sequences: "
                f"expected [{total}, 1, ...]"
            )
        rows = value if part.length == total else value[part.start : part.stop]
        if value.shape[1:] == (1, 1, 1):
            return rows.reshape(1, 1, part.length, 1)
        return rows.reshape(1, part.length, *value.shape[2:])

    def _original(self, view: View) -> Any:
        _claim(view)
        originals = self.batch.originals.of(self.part.sequence)
        return entry_at(originals, (view.entry, *view.path))

    def _mask(self, mask: MaskSpec) -> Any:
        if mask.kind == "sequence":
            return None  # what upstream makes where nothing is padded
        if mask.chunk is not None or mask.prefix is not None:
            return mask  # no upstream cache makes these; opaque to whoever would use it
        for view in self.views:
            own = view
            if isinstance(view, ListView) and mask.path[: len(view.path)] == view.path:
                for index in mask.path[len(view.path) :]:
                    own = own[index]  # type: ignore[index]
            if isinstance(own, PagedView):
                require_kept(mask, own.leaf.retention, "per_sequence")
                return upstream.create_attention_mask(
                    _Shape((1, self.part.length)),
                    self._original(own),
                    window_size=mask.window,
                    return_array=mask.return_array,
                )
        return mask


@dataclass(frozen=True, slots=True)
class _Shape:
    """Stands for [1, L, ...] where only the shape is asked for."""

    shape: tuple[int, int]


def _claim(view: View) -> None:
    """An entry is paged or kept per sequence, never both."""
    if isinstance(view, PagedView):
        if view.leaf.pool.made:
            raise TypeError(
                f"{view!r} is paged by one layer and used once per sequence by another: the keys "
                "would be in two places"
            )
        view.leaf.per_sequence = True
    elif isinstance(view, StateView):
        if view.leaf.table.used:
            raise TypeError(
                f"{view!r} is kept for a batch by one layer and once per sequence by another: the "
                "state would be in two places"
            )
        view.leaf.per_sequence = True
    elif isinstance(view, ListView):
        for part in view.parts:
            _claim(part)


def _join(results: list[Any], rows: tuple[Rows, ...], method: Callable[..., Any]) -> Any:
    first = results[0]
    if first is None and all(result is None for result in results):
        return None
    if type(first) in (tuple, list):
        return type(first)(_join(list(parts), rows, method) for parts in zip(*results, strict=True))
    columns = []
    for result, part in zip(results, rows, strict=True):
        if not isinstance(result, mx.array) or result.shape[:2] != (1, part.length):
            shape = list(result.shape) if isinstance(result, mx.array) else type(result).__name__
            raise TypeError(
                f"{method.__qualname__}: expected [1, {part.length}, ...] from one sequence of "
                f"{part.length} rows, got {shape}"
            )
        columns.append(result.reshape(part.length, 1, *result.shape[2:]))
    return columns[0] if len(columns) == 1 else mx.concatenate(columns)
