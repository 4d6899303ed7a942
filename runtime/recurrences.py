"""Recurrences that a rewritten model file calls in place of mlx_lm's, with the same arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx import nn
from mlxrewrite.kernels import delta, linear, scan
from mlxrewrite.kernels.depthwise import MOST_TAPS, depthwise

__all__ = ["convolve", "delta_rule", "diagonal_scan", "lightning_scan", "state_space_dual"]


def convolve(x: mx.array, module: Any) -> mx.array:
    """`module(x)`, where depthwise convolutions of a few taps take a form made for ragged batches.

    x [N, K - 1 + L, C] -> [N, L, C] for these; everything else is the module's own forward.
    """
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
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, mx.array]:
    """`mlx_lm.models.gated_delta.gated_delta_update`, without padding: chunks, or one token.

    q, k [N, L, Hk, Dk]; v [N, L, Hv, Dv]; a [N, L, Hv] or, with a decay for each channel,
    [N, L, Hv, Dk]; b [N, L, Hv]; state [N, Hv, Dv, Dk] float32.
    """
    _no_padding(mask)
    log_decay, beta = delta.delta_gates(
        a, b, A_log, dt_bias, lower_bound=lower_bound, allow_neg_eigval=allow_neg_eigval
    )
    return delta.delta_rule(q, k, v, log_decay, beta, state, kernels=use_kernel)


def state_space_dual(
    hidden_states: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    time_step_limit: tuple[float, float] = (0.001, 100.0),
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """`mlx_lm.models.ssm.ssm_update`, without padding: chunks, or one token.

    hidden_states [N, L, H, P]; B, C [N, L, G, S]; dt [N, L, H]; state [N, H, P, S] float32.
    """
    _no_padding(mask)
    _no_padding(lengths)
    return linear.state_space_dual(hidden_states, A_log, B, C, D, dt, dt_bias, state,
                                   time_step_limit)  # fmt: skip


_Function = Callable[..., Any]


def diagonal_scan(x: str, a: str, h: str) -> Callable[[_Function], _Function]:
    """In place of a function that computes h <- a h + x token by token.

    The arguments are the function's names of x and a [N, L, D] and of the state [N, D] before the
    first token, None for zeros. It returns all h, and the last one.
    """
    return _replaced(lambda given: scan.diagonal(given[x], given[a], given[h]))


def lightning_scan(
    q: str, k: str, v: str, g: str, scale: str, h: str
) -> Callable[[_Function], _Function]:
    """In place of a function that computes h <- h e^g + k^T v, y = scale q h token by token.

    The arguments are the function's names of q, k [N, H, L, K], v [N, H, L, V], g [H], the scale
    and the state [N, H, K, V] before the first token, None for zeros. It returns y [N, H, L, V] in
    the type of q, and the last state in float32.
    """

    def run(given: dict[str, Any]) -> tuple[mx.array, mx.array]:
        queries, keys, values = (given[name].swapaxes(1, 2) for name in (q, k, v))
        decay = mx.broadcast_to(given[g].astype(mx.float32), queries.shape[:3])
        state = given[h]
        if state is not None:
            state = state.astype(mx.float32).swapaxes(-1, -2)
        y, state = linear.linear_rule(queries * given[scale], keys, values, decay, state)
        return y.swapaxes(1, 2).astype(given[q].dtype), state.swapaxes(-1, -2)

    return _replaced(run)


def _replaced(run: Callable[[dict[str, Any]], Any]) -> Callable[[_Function], _Function]:
    """A decorator: the function's arguments, by its own names, go to `run`."""

    def decorator(function: _Function) -> _Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return run(bound.arguments)

        return call

    return decorator


def _no_padding(mask: mx.array | None) -> None:
    if mask is not None:
        raise TypeError(
            "a recurrence of a rewritten model was given padding: a ragged batch has none"
        )
