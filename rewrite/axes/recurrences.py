"""What the runtime's ops over several sequences do to axes: none looks from one to another."""

from __future__ import annotations

from collections.abc import Callable

from .domain import (
    NONE,
    ROWS,
    Array,
    Axis,
    Dead,
    Refused,
    Tuple,
    Value,
    feature,
    is_live,
    leads,
)
from .rules import Context, Rule, array
from .shapes import describe

Op = Callable[..., Value]


def _given(name: str, value: Value, *ranks: int) -> tuple[Axis, ...]:
    """The axes of an array with sequences in front."""
    x = array(value)
    if x.axes is None or x.open or len(x.axes) not in ranks or not leads(x):
        raise Refused("row-mixing", f"`{name}` of {describe(x)}", "[rows][...]")
    return x.axes


def _shared(name: str, *values: Value) -> None:
    """What all sequences have in common: weights, numbers."""
    if any(map(is_live, values)):
        raise Refused("row-mixing", f"`{name}` with weights or options of single sequences")


def _state(name: str, value: Value, rank: int) -> Array:
    """The state after a call, whatever there was before."""
    if value != NONE:
        _given(name, value, rank)
    return Array(((ROWS,), *(feature(("state", i)) for i in range(1, rank))))


def _unpadded(*values: Value) -> None:
    if any(value != NONE for value in values):
        raise Dead  # the op raises: nothing is padded


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
    **options: Value,
) -> Value:
    name = "delta_rule"
    _unpadded(mask)
    _shared(name, A_log, dt_bias, *options.values())
    _given(name, q, 4), _given(name, k, 4), _given(name, a, 3, 4), _given(name, b, 3)
    return Tuple((Array(_given(name, v, 4)), _state(name, state, 4)))


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
    name = "state_space_dual"
    _unpadded(mask, lengths)
    _shared(name, A_log, D, dt_bias, time_step_limit)
    _given(name, B, 4), _given(name, C, 4), _given(name, dt, 3)
    return Tuple((Array(_given(name, hidden_states, 4)), _state(name, state, 4)))


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
    name = "selective_scan"
    _shared(name, A, D)
    _given(name, delta, 3), _given(name, B, 3), _given(name, C, 3)
    return Tuple((Array(_given(name, x, 3)), _state(name, state, 3)))


def _diagonal(c: Context, x: Value, a: Value, h: Value) -> Value:
    name = "diagonal_scan"
    _given(name, a, 3)
    return Tuple((Array(_given(name, x, 3)), _state(name, h, 2)))


def _lightning(c: Context, q: Value, k: Value, v: Value, g: Value, scale: Value, h: Value) -> Value:
    name = "lightning_scan"
    _shared(name, g, scale)
    _given(name, k, 4)
    axes, width = _given(name, q, 4), _given(name, v, 4)[3]
    return Tuple((Array((*axes[:3], width)), _state(name, h, 4)))


def _low_rank(
    c: Context, r: Value, w: Value, k: Value, v: Value, a: Value, b: Value, h: Value
) -> Value:
    name = "low_rank_scan"
    for value in (w, k, a, b):
        _given(name, value, 4)
    axes, width = _given(name, r, 4), _given(name, v, 4)[3]
    return Tuple((Array((*axes[:3], width, ())), _state(name, h, 4)))


CONVOLVE = "convolve"  # a module's own forward, in another form


def _rules(**ops: Op) -> dict[str, Rule]:
    reason = "each sequence's tokens go through its own state"
    return {name: Rule(name, op, reason) for name, op in ops.items()}


# Called in place of a library's function, or of code.
CALLED = _rules(
    delta_rule=_delta_rule, state_space_dual=_state_space_dual, selective_scan=_selective_scan
)
# Of these, ops that can read and keep a state by themselves.
KEEPING = ("delta_rule",)
# Decorators of functions of a file; names of its arguments in this order.
DECORATING = _rules(diagonal_scan=_diagonal, lightning_scan=_lightning, low_rank_scan=_low_rank)
