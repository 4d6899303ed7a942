"""Recurrences that a rewritten model file calls in place of mlx_lm's, with the same arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlxrewrite.kernels import delta, linear, low_rank, scan, selective
from mlxrewrite.kernels.depthwise import MOST_TAPS, depthwise

from .errors import RuntimeRefusal
from .row_runs import over_rows
from .row_states import require_row_of_each, require_sequences
from .views import HeldState, NewState

__all__ = [
    "convolve",
    "delta_rule",
    "diagonal_scan",
    "lightning_scan",
    "low_rank_scan",
    "selective_scan",
    "state_space_dual",
]


State = mx.array | HeldState | None


def convolve(x: mx.array, module: Any) -> mx.array:
    """`module(x)`, where depthwise convolutions of a few taps take a form made for ragged batches.

    x [N, K - 1 + L, C] -> [N, L, C] for these; everything else is the module's own forward. On
    rows x are their windows [T, K, C]: TypeError for a module that makes other than a row of each.
    """
    return require_row_of_each(_convolved(x, module), convolve)


def _convolved(x: mx.array, module: Any) -> mx.array:
    if type(module) is not nn.Conv1d or x.ndim != 3:
        return module(x)  # type: ignore[no-any-return]
    weight = module.weight
    plain = (module.stride, module.padding, module.dilation) == (1, 0, 1)
    depth = weight.shape[2] == 1 and module.groups == weight.shape[0] == x.shape[2]
    if not (plain and depth and weight.shape[1] <= min(MOST_TAPS, x.shape[1])):
        return module(x)  # type: ignore[no-any-return]
    return depthwise(x, weight, module.bias if "bias" in module else None)


def delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: State = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    cache: Any = None,
    cache_index: int = 1,
) -> tuple[mx.array, Any]:
    """`mlx_lm.models.gated_delta.gated_delta_update`, without padding: chunks, or one token.

    q, k [N, L, Hk, Dk]; v [N, L, Hv, Dv]; a [N, L, Hv] or, with a decay for each channel,
    [N, L, Hv, Dk]; b [N, L, Hv]; state [N, Hv, Dv, Dk] float32. With a cache, the state is entry
    `cache_index` of it, before and after; ValueError if one is given as well. With a state in a
    paged cache q, k, v, a and b are rows [T, 1, ...].
    """
    _no_padding(mask)
    if cache is not None:
        if state is not None:
            raise ValueError("delta_rule: a state beside a cache that holds it")
        y, cache[cache_index] = delta_rule(
            q, k, v, a, b, A_log, dt_bias, cache[cache_index],
            use_kernel=use_kernel, lower_bound=lower_bound, allow_neg_eigval=allow_neg_eigval,
        )  # fmt: skip
        return y, cache[cache_index]
    log_decay, beta = delta.delta_gates(
        a, b, A_log, dt_bias, lower_bound=lower_bound, allow_neg_eigval=allow_neg_eigval
    )
    if not isinstance(state, HeldState):
        require_sequences(delta_rule, state)
        return delta.delta_rule(q, k, v, log_decay, beta, state, kernels=use_kernel)

    def over(rows: Sequence[mx.array], state: mx.array | None) -> tuple[mx.array, mx.array]:
        query, key, value, decay, strength = rows
        return delta.delta_rule(query, key, value, decay, strength, state, kernels=use_kernel)

    # Nothing decays (a logarithm of 0), and nothing is written, whatever keys and values are.
    rows = (q, None), (k, None), (v, None), (log_decay, 0.0), (beta, 0.0)
    return over_rows(state, rows, delta_rule, over)


def state_space_dual(
    hidden_states: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    state: State = None,
    time_step_limit: tuple[float, float] = (0.001, 100.0),
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, Any]:
    """`mlx_lm.models.ssm.ssm_update`, without padding: chunks, or one token.

    hidden_states [N, L, H, P]; B, C [N, L, G, S]; dt [N, L, H]; state [N, H, P, S] float32. With a
    state in a paged cache all of them are rows [T, 1, ...].
    """
    _no_padding(mask)
    _no_padding(lengths)
    if not isinstance(state, HeldState):
        require_sequences(state_space_dual, state)
        return linear.state_space_dual(hidden_states, A_log, B, C, D, dt, dt_bias, state,
                                       time_step_limit)  # fmt: skip

    def over(rows: Sequence[mx.array], state: mx.array | None) -> tuple[mx.array, mx.array]:
        x, entering, leaving, step = rows
        return linear.dual_rule(x, A_log, entering, leaving, step, state)

    steps = linear.dual_steps(dt, dt_bias, time_step_limit)
    rows = (hidden_states, None), (B, None), (C, None), (steps, 0.0)
    y, last = over_rows(state, rows, state_space_dual, over)
    return linear.dual_skipped(y, hidden_states, D), last


def selective_scan(
    x: mx.array,
    delta: mx.array,
    A: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    state: State = None,
) -> tuple[mx.array, Any]:
    """In place of h <- h e^(delta A) + delta x B, y = sum(h C) + D x, token by token.

    x, delta [N, L, M]; A [M, S]; B, C [N, L, S]; D [M]; state [N, M, S], float32 when it comes
    back, None for zeros. With a state in a paged cache x, delta, B and C are rows [T, 1, ...].
    """
    if not isinstance(state, HeldState):
        require_sequences(selective_scan, state)
        return selective.selective_scan(x, delta, A, B, C, D, state)

    def over(rows: Sequence[mx.array], state: mx.array | None) -> tuple[mx.array, mx.array]:
        inputs, steps, entering, leaving = rows
        return selective.selective_scan(inputs, steps, A, entering, leaving, D, state)

    return over_rows(state, ((x, None), (delta, 0.0), (B, None), (C, None)), selective_scan, over)


_Function = Callable[..., Any]


def diagonal_scan(x: str, a: str, h: str) -> Callable[[_Function], _Function]:
    """In place of a function that computes h <- a h + x token by token.

    The arguments are the function's names of x and a [N, L, D] and of the state [N, D] before the
    first token, None for zeros. It returns all h, and the last one. With a state in a paged cache
    they are rows [T, 1, D].
    """

    def run(given: dict[str, Any], function: _Function) -> tuple[mx.array, Any]:
        inputs, factors, state = given[x], given[a], given[h]
        if not isinstance(state, HeldState):
            require_sequences(function, state)
            return scan.diagonal(inputs, factors, state)
        return over_rows(state, ((inputs, 0.0), (factors, 1.0)), function, over)

    def over(rows: Sequence[mx.array], state: mx.array | None) -> tuple[mx.array, mx.array]:
        inputs, factors = rows
        return scan.diagonal(inputs, factors, state)

    return _replaced(run)


def lightning_scan(
    q: str, k: str, v: str, g: str, scale: str, h: str, *, compared: bool = False
) -> Callable[[_Function], _Function]:
    """In place of a function that computes h <- h e^g + k^T v, y = scale q h.

    The arguments are the function's names of q, k [N, H, L, K], v [N, H, L, V], g [H], the scale
    and the state [N, H, K, V] before the first token, None for zeros. It returns y [N, H, L, V] in
    the type of q, and the last state in float32. With a state in a paged cache q, k and v are rows
    [T, H, 1, ...].

    `compared`: the function was recognised by how it takes one token. What it does with more is
    compared with the recurrence when it is first called.
    """

    def run(given: dict[str, Any], function: _Function) -> tuple[mx.array, Any]:
        queries, keys, values = (given[name].swapaxes(1, 2) for name in (q, k, v))
        decay = mx.broadcast_to(given[g].astype(mx.float32), queries.shape[:3])
        queries, state = queries * given[scale], given[h]
        last: mx.array | NewState
        if isinstance(state, HeldState):
            rows = (queries, None), (keys, 0.0), (values, None), (decay, 0.0)
            y, last = over_rows(state, rows, function, over)
        else:
            require_sequences(function, state)
            y, last = over((queries, keys, values, decay), state)
        return y.swapaxes(1, 2).astype(given[q].dtype), last

    def over(rows: Sequence[mx.array], state: mx.array | None) -> tuple[mx.array, mx.array]:
        if state is not None:
            state = state.astype(mx.float32).swapaxes(-1, -2)
        query, key, value, decay = rows
        y, last = linear.linear_rule(query, key, value, decay, state)
        return y, last.swapaxes(-1, -2)

    names = (q, k, v, g, scale, h)
    compare = functools.partial(compare_lightning, names) if compared else None
    return _replaced(run, compare, names)


def low_rank_scan(
    r: str, w: str, k: str, v: str, a: str, b: str, h: str
) -> Callable[[_Function], _Function]:
    """In place of a function that computes h <- h diag(w) + (h a) b^T + v k^T, y = h r.

    The arguments are the function's names of r, w, k, v, a and b [N, L, H, D] and of the state
    [N, H, D, D] before the first token, None for zeros. It returns y [N, L, H, D, 1] in the type of
    r, and the last state in float32. With a state in a paged cache they are rows [T, 1, H, D].
    """

    def run(given: dict[str, Any], function: _Function) -> tuple[mx.array, mx.array | NewState]:
        rows = given[r], given[w], given[k], given[v], given[a], given[b]
        if any(x.ndim != 4 for x in rows):
            shapes = ", ".join(str(list(x.shape)) for x in rows)
            raise TypeError(f"expected rows [N, L, heads, width], got {shapes}")
        if not isinstance(given[h], HeldState):
            require_sequences(function, given[h])
            return over(rows, given[h])
        # A factor of 1 keeps, and nothing is written along b or along k.
        fills = None, 1.0, 0.0, None, None, 0.0
        return over_rows(given[h], tuple(zip(rows, fills, strict=True)), function, over)

    def over(rows: Sequence[mx.array], state: mx.array | None) -> tuple[mx.array, mx.array]:
        query, decay, key, value, reading, writing = rows
        y, last = low_rank.low_rank_rule(query, decay, key, value, reading, writing, state)
        return y[..., None], last

    return _replaced(run)


def _replaced(
    run: Callable[[dict[str, Any], _Function], Any],
    compare: Callable[[_Function, dict[str, Any], dict[str, Any]], None] | None = None,
    names: Sequence[str] = (),
) -> Callable[[_Function], _Function]:
    """A decorator: the function's arguments, by its own names, go to `run`, and so does the
    function.

    `compare` gets the function, the arguments with the `names` and all others; it is called when
    those others, which must be plain Python values, are met for the first time.
    """

    def decorator(function: _Function) -> _Function:
        signature = inspect.signature(function)
        compared: set[tuple[tuple[str, Any], ...]] = set()

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            if compare is not None:
                others = {n: value for n, value in bound.arguments.items() if n not in names}
                if (key := _plain_values(function, others)) not in compared:
                    compare(function, bound.arguments, others)
                    compared.add(key)
            return run(bound.arguments, function)

        return call

    return decorator


def _plain_values(function: _Function, others: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    for name, value in others.items():
        if not isinstance(value, None | bool | int | float | str):
            raise TypeError(
                f"{function.__qualname__}: the recurrence that stands for it was given "
                f"`{name}`, a {type(value).__name__}: a ragged batch has no padding to tell of"
            )
    return tuple(sorted(others.items()))


# Lengths below, at and behind the ends of chunks that files have.
_LENGTHS = (2, 64, 129, 300)
_DIFFERENCE = 1e-4


def compare_lightning(
    names: tuple[str, ...],
    function: _Function,
    given: dict[str, Any],
    others: dict[str, Any],
) -> None:
    """Raise RuntimeRefusal if a function is not the recurrence that it was taken for.

    It runs on random rows of the widths of `given`, in float32 on the CPU, with and without a state
    and for several lengths; the recurrence is worked out token by token in float64.
    """
    rng = np.random.default_rng(0)
    width, value_width = given[names[0]].shape[-1], given[names[2]].shape[-1]
    heads, scale = 2, 0.5
    decay = -rng.uniform(0.005, 0.7, heads)
    for length in _LENGTHS:
        q, k = (rng.standard_normal((1, heads, length, width)) for _ in range(2))
        v = rng.standard_normal((1, heads, length, value_width))
        for start in (None, rng.standard_normal((1, heads, width, value_width))):
            h, wanted = np.zeros((1, heads, width, value_width)) if start is None else start, []
            for t in range(length):
                h = h * np.exp(decay)[:, None, None] + k[:, :, t, :, None] * v[:, :, t, None]
                wanted.append(scale * (q[:, :, t, None] @ h))
            with mx.stream(mx.cpu):
                arrays = (mx.array(x, mx.float32) for x in (q, k, v, decay))
                state = None if start is None else mx.array(start, mx.float32)
                values = dict(zip(names, (*arrays, scale, state), strict=True))
                y, last = function(**values, **others)
                mx.eval(y, last)
            for got, want in ((y, np.concatenate(wanted, axis=2)), (last, h)):
                found = np.array(got.astype(mx.float32))
                limit = _DIFFERENCE * np.abs(want).max()
                if found.shape != want.shape or not np.abs(found - want).max() <= limit:
                    raise RuntimeRefusal(
                        f"{function.__qualname__} is not what it was taken for: {length} tokens "
                        "differ from h <- h e^g + k^T v, y = scale q h, taken one by one. Please "
                        "report the model file; its original runs in mlx_lm"
                    )


def _no_padding(mask: mx.array | None) -> None:
    if mask is not None:
        raise TypeError(
            "a recurrence of a rewritten model was given padding: a ragged batch has none"
        )
