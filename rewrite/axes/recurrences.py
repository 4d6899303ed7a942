"""What the runtime's ops over several sequences do to axes: none looks from one to another."""

from __future__ import annotations

from collections.abc import Callable

from .domain import (
    NONE,
    ROWS,
    Array,
    Axis,
    Refused,
    Tuple,
    Value,
    feature,
    is_live,
    leads,
)
from .rules import Context, array
from .shapes import describe

Op = Callable[..., Value]


def _apart(name: str, *values: Value) -> None:
    """Every array has its sequences in front, or nothing of them."""
    for value in values:
        if value != NONE and is_live(value):
            x = array(value)
            if not leads(x):
                raise Refused("row-mixing", f"`{name}` of {describe(x)}", "[rows][...]")


def _axes(name: str, value: Value, rank: int) -> tuple[Axis, ...]:
    x = array(value)
    if x.axes is None or x.open or len(x.axes) != rank or not leads(x):
        raise Refused("row-mixing", f"`{name}` of {describe(x)}", "[rows][...]")
    return x.axes


def _state(rank: int) -> Array:
    return Array(((ROWS,), *(feature(("state", i)) for i in range(1, rank))))


def _delta_rule(
    c: Context,
    q: Value,
    k: Value,
    v: Value,
    a: Value,
    b: Value,
    A_log: Value,
    dt_bias: Value,
    state: Value = NONE,
    mask: Value = NONE,
    *,
    use_kernel: Value = NONE,
    lower_bound: Value = NONE,
    allow_neg_eigval: Value = NONE,
) -> Value:
    _apart("delta_rule", q, k, v, a, b, A_log, dt_bias, state, mask)
    _apart("delta_rule", use_kernel, lower_bound, allow_neg_eigval)
    _axes("delta_rule", q, 4)
    return Tuple((Array(_axes("delta_rule", v, 4)), _state(4)))


def _state_space_dual(
    c: Context,
    hidden_states: Value,
    A_log: Value,
    B: Value,
    C: Value,
    D: Value,
    dt: Value,
    dt_bias: Value,
    state: Value = NONE,
    time_step_limit: Value = NONE,
    mask: Value = NONE,
    lengths: Value = NONE,
) -> Value:
    _apart("state_space_dual", hidden_states, A_log, B, C, D, dt, dt_bias, state, mask, lengths)
    return Tuple((Array(_axes("state_space_dual", hidden_states, 4)), _state(4)))


def _selective_scan(
    c: Context,
    x: Value,
    delta: Value,
    A: Value,
    B: Value,
    C: Value,
    D: Value,
    state: Value = NONE,
) -> Value:
    _apart("selective_scan", x, delta, A, B, C, D, state)
    return Tuple((Array(_axes("selective_scan", x, 3)), _state(3)))


def _diagonal(c: Context, x: Value, a: Value, h: Value) -> Value:
    _apart("diagonal_scan", x, a, h)
    return Tuple((Array(_axes("diagonal_scan", x, 3)), _state(2)))


def _lightning(c: Context, q: Value, k: Value, v: Value, g: Value, scale: Value, h: Value) -> Value:
    _apart("lightning_scan", q, k, v, g, scale, h)
    axes = _axes("lightning_scan", q, 4)
    return Tuple((Array((*axes[:3], _axes("lightning_scan", v, 4)[3])), _state(4)))


def _low_rank(
    c: Context, r: Value, w: Value, k: Value, v: Value, a: Value, b: Value, h: Value
) -> Value:
    _apart("low_rank_scan", r, w, k, v, a, b, h)
    axes = _axes("low_rank_scan", r, 4)
    return Tuple((Array((*axes[:3], _axes("low_rank_scan", v, 4)[3], ())), _state(4)))


CONVOLVE = "convolve"  # a module's own forward, in another form
# Called in place of a library's function, or of code.
CALLED: dict[str, tuple[Op, str]] = {
    "delta_rule": (_delta_rule, "each sequence's tokens go through its own state"),
    "state_space_dual": (_state_space_dual, "each sequence's tokens go through its own state"),
    "selective_scan": (_selective_scan, "each sequence's tokens go through its own state"),
}
# Of these, ops that can read and keep a state by themselves.
KEEPING = ("delta_rule",)
# Decorators of functions of a file; names of its arguments in this order.
DECORATING: dict[str, tuple[Op, str]] = {
    "diagonal_scan": (_diagonal, "each sequence's tokens go through its own state"),
    "lightning_scan": (_lightning, "each sequence's tokens go through its own state"),
    "low_rank_scan": (_low_rank, "each sequence's tokens go through its own state"),
}
