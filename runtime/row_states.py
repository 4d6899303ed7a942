"""Mixers with states that run on rows: what they do beside their states is done for all at once.

Their code runs once a step, on [T, 1, ...]. `cache[i]` is a `HeldState` to them, which ops hand to
each sequence's own rows, and what they store is what an op made of it (`NewState`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, overload

import mlx.core as mx
import numpy as np
from mlxrewrite.kernels.shift import Origins, shift

from . import caches
from .batch import Batch
from .errors import RuntimeRefusal
from .masks import MaskSpec
from .per_length import proved_views, sort_of
from .rope import in_step, positions_are
from .row_runs import require_rows
from .rows import Rows
from .views import HeldState, NewState, States, StateView, View

__all__ = [
    "RowStates",
    "last_of_sequences",
    "on_rows",
    "require_sequences",
    "shifted_rows",
    "window_state",
    "windows",
]

_Function = Callable[..., Any]
_RUNNING: ContextVar[bool] = ContextVar("mlxrewrite_on_rows", default=False)

# ----------------------------------------------------------------------------------------- mixers


class RowStates:
    """What a mixer that runs on rows gets in place of an `ArraysCache`.

    Indexing gives a `HeldState`, never None; only a `NewState` may be stored. There is no padding,
    so `lengths` and `left_padding` are None as in a cache that was never prepared.
    """

    __slots__ = ("_view",)
    lengths = None
    left_padding = None

    def __init__(self, view: StateView) -> None:
        self._view = view

    def __getitem__(self, index: int) -> HeldState:
        return self._view[index]

    def __setitem__(self, index: int, value: object) -> None:
        self._view[index] = value

    def __iter__(self) -> Iterator[HeldState]:
        return (self[index] for index in range(self._view.table.size))

    def __bool__(self) -> bool:
        return True

    def advance(self, N: int) -> None:
        """Upstream counts padding down here; there is none."""

    def make_mask(self, N: int) -> None:
        """No row is padding."""


caches.ArraysCache.register(RowStates)


@overload
def on_rows(method: _Function, /) -> _Function: ...
@overload
def on_rows(
    *positions: str, **ranks: int | tuple[int, ...]
) -> Callable[[_Function], _Function]: ...
def on_rows(*given: Any, **ranks: int | tuple[int, ...]) -> Any:
    """Run a mixer's `__call__(self, x, ...)` once a step, on all rows: T sequences of a token.

    Arguments: arrays [T, 1, ...] and the step's positions [T] pass as they are; views of states
    become `RowStates`; masks of states become None. Only ops of the runtime know whose rows are
    whose. Outside of steps the method runs as it is, inside RuntimeRefusal is raised where no
    argument is a view. Results are [T, 1, ...], tuples or lists of such, or None: TypeError for
    others.

    The compiler proved that everything else in the mixer treats rows alone; which arguments the
    proof is for is looked at as in `per_length`, with the same errors. `positions` are parameters
    that it takes for the step's positions: TypeError where they are given anything else.
    """
    if not ranks and len(given) == 1 and callable(given[0]):
        return _on_rows(given[0], (), {})
    return functools.partial(_on_rows, required=given, ranks=ranks)


def _on_rows(
    method: _Function, required: tuple[str, ...], ranks: dict[str, int | tuple[int, ...]]
) -> _Function:
    views_of = proved_views(method, ranks)
    signature = inspect.signature(method)

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        views = views_of(args, kwargs)
        if not views:
            return method(*args, **kwargs)
        batch = views[0].batch
        bound = signature.bind(*args, **kwargs).arguments if required else {}
        for name in required:
            if bound.get(name) is not batch.positions:
                raise TypeError(
                    f"{method.__qualname__} was proved to treat rows alone with their positions as "
                    f"{name}, and was given something else"
                )
        # Another array object: code may add to positions in place. Not `apart`, as other routes:
        # these are the rows' own positions, by which ropes find how long each sequence is.
        given = any(value is batch.positions for value in (*args[1:], *kwargs.values()))
        positions = mx.array(batch.positions) if given else batch.positions
        others = [_on_all_rows(value, batch, positions) for value in args[1:]]
        named = {name: _on_all_rows(value, batch, positions) for name, value in kwargs.items()}
        token = _RUNNING.set(True)
        try:
            with positions_are(positions) if given else nullcontext():
                result = method(args[0], *others, **named)
        finally:
            _RUNNING.reset(token)
        _require_results(result, batch, method)
        return result

    return run


def _on_all_rows(value: Any, batch: Batch, positions: mx.array) -> Any:
    if isinstance(value, mx.array):
        if value is batch.positions:
            return positions
        if sort_of(value, batch.num_rows) == "numbers":
            raise TypeError("a mixer that runs on rows was given numbers that are not positions")
        return value
    if isinstance(value, StateView):
        return RowStates(value)
    if isinstance(value, View):
        raise TypeError(f"a mixer that runs on rows was given {value!r}")
    if isinstance(value, MaskSpec):
        return None if value.kind == "sequence" else value
    return value


def _require_results(result: Any, batch: Batch, method: _Function) -> None:
    if type(result) in (tuple, list):
        for part in result:
            _require_results(part, batch, method)
    elif isinstance(result, mx.array):
        require_rows(result, batch, method)
    elif result is not None:
        raise TypeError(
            f"{method.__qualname__}: expected [{batch.num_rows}, 1, ...] from a batch of "
            f"{batch.num_rows} rows, got {type(result).__name__}"
        )


def require_sequences(function: _Function, state: object) -> None:
    """An op was given no states of a paged cache, but an array of each sequence's, or None.

    Raises RuntimeRefusal where it was given rows: it would take each for a sequence of its own.
    """
    if _RUNNING.get() or in_step():
        raise RuntimeRefusal(
            f"{function.__qualname__}: called on the rows of several sequences with "
            f"{type(state).__name__} in place of their states; give it an entry of their cache"
        )


def require_row_of_each(x: mx.array, function: _Function) -> mx.array:
    """x, if a mixer on rows runs and x is [T, 1, ...], or if none does. Raises TypeError else."""
    if _RUNNING.get() and (x.ndim < 2 or x.shape[1] != 1):
        raise TypeError(
            f"{function.__qualname__}: expected a row for each window, got {list(x.shape)}"
        )
    return x


# ------------------------------------------------------------------------------------------ windows


def windows(state: Any, x: mx.array, taps: int) -> mx.array:
    """In place of `mx.concatenate([state, x], axis=1)`, the inputs of a convolution.

    x [T, 1, ...] and the states [taps, ...] of a paged cache give [T, taps + 1, ...]: each row
    behind its `taps` predecessors, those of this step, before them what its sequence holds, zeros
    where it is new. Outside of steps, state [N, taps, ...] and x [N, L, ...] are concatenated.
    """
    if not isinstance(state, HeldState):
        require_sequences(windows, state)
        if state.shape[1] != taps:
            raise TypeError(f"windows: expected {taps} rows of state, got {list(state.shape)}")
        return mx.concatenate([state, x], axis=1)
    batch, begun = state.batch, state.begun()
    require_rows(x, batch, windows)
    parts, held = batch.rows, state.read_begun(begun)
    if held is not None and held.shape[1:] != (taps, *x.shape[2:]):
        raise TypeError(
            f"windows: expected states {[sum(begun), taps, *x.shape[2:]]} of {state!r}, got "
            f"{list(held.shape)}"
        )
    if held is not None and all(begun) and len(parts) == batch.num_rows:
        return mx.concatenate([held, x], axis=1)
    rows = [mx.zeros((1, *x.shape[2:]), x.dtype), x.squeeze(1)]
    if held is not None:
        rows.insert(0, held.flatten(0, 1))
    key = ("windows", taps, begun)
    index: mx.array | None = batch.memo.get(key)
    if index is None:
        index = batch.memo[key] = mx.array(window_rows(parts, begun, taps))
    return mx.take(mx.concatenate(rows), index, axis=0)


def window_rows(parts: Sequence[Rows], begun: Sequence[bool], taps: int) -> np.ndarray:
    """Where each row's predecessors and itself are, [T, taps + 1] int32: among the rows that the
    sequences hold, those that have begun, `taps` each; then one of zeros; then the batch's."""
    zeros = sum(begun) * taps
    found, states = [], 0
    back = np.arange(-taps, 1, dtype=np.int32)
    for part, has in zip(parts, begun, strict=True):
        offsets = np.arange(part.length, dtype=np.int32)[:, None] + back
        before = states + taps + offsets if has else zeros
        found.append(np.where(offsets < 0, before, zeros + 1 + part.start + offsets))
        states += taps if has else 0
    return np.concatenate(found).astype(np.int32)


def window_state(x: mx.array, taps: int) -> Any:
    """In place of `x[:, -taps:]`, the last inputs of a convolution, where they are stored.

    Of the windows [T, taps + 1, ...] of a mixer that runs on rows, what each sequence's last row
    keeps, as a new state; elsewhere x [N, taps + L, ...] gives the array [N, taps, ...].
    """
    if not (_RUNNING.get() or in_step()):
        return mx.contiguous(x[:, -taps:])

    def parts(batch: Batch) -> States:
        if x.ndim < 2 or x.shape[:2] != (batch.num_rows, taps + 1):
            raise TypeError(
                f"window_state: expected [{batch.num_rows}, {taps + 1}, ...] from a batch of "
                f"{batch.num_rows} rows, got {list(x.shape)}"
            )
        return [(sequences, s[:, 1:]) for sequences, s in _last_of_each(x, batch)]

    return NewState(parts)


# --------------------------------------------------------------------------------------- last rows


def shifted_rows(x: str, state: str) -> Callable[[_Function], _Function]:
    """In place of a function that gives each token the one before it.

    The arguments are the function's names of x and of the last token of before, which is zeros
    where there is none. With a state in a paged cache x is rows [T, 1, D], and so is the result;
    with any other the function itself runs.
    """

    def decorator(function: _Function) -> _Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            held = given.get(state)
            if not isinstance(held, HeldState):
                return function(*args, **kwargs)
            return _shifted(require_rows(given[x], held.batch, function, rank=3), held)

        return call

    return decorator


def _shifted(rows: mx.array, held: HeldState) -> mx.array:
    parts, begun = held.batch.rows, held.begun()
    states = held.read_begun(begun)
    if all(begun) and len(parts) == rows.shape[0]:
        assert states is not None
        return states  # every row is the next of its sequence
    before = None if states is None else states[:, 0]
    return shift(rows[:, 0], before, origins_of(held.batch, begun))[:, None]


def origins_of(batch: Batch, begun: tuple[bool, ...]) -> Origins:
    """Where each row's predecessor is, if these of the batch's sequences have a state."""
    found: Origins | None = batch.memo.get(("origins", begun))
    if found is None:
        lengths = [part.length for part in batch.rows]
        found = batch.memo["origins", begun] = Origins.of(lengths, begun)
    return found


def ends_of(batch: Batch) -> mx.array:
    """Each sequence's last row, int32."""
    found: mx.array | None = batch.memo.get("ends")
    if found is None:
        last = np.array([part.stop - 1 for part in batch.rows], dtype=np.int32)
        found = batch.memo["ends"] = mx.array(last)
    return found


def last_of_sequences(x: mx.array) -> NewState:
    """The last of each sequence's rows, as a state: x [T, 1, ...] -> [n, 1, ...]."""

    def parts(batch: Batch) -> States:
        return _last_of_each(require_rows(x, batch, last_of_sequences), batch)

    return NewState(parts)


def _last_of_each(x: mx.array, batch: Batch) -> States:
    sequences = tuple(part.sequence for part in batch.rows)
    if len(sequences) == batch.num_rows:
        return [(sequences, x)]
    return [(sequences, mx.take(x, ends_of(batch), axis=0))]
