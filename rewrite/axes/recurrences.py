"""What the runtime's ops over several sequences do to axes: none looks from one to another."""

from __future__ import annotations

from collections.abc import Callable

from .domain import (
    LENGTH,
    NONE,
    ROWS,
    Array,
    Axis,
    Dead,
    Opaque,
    Refused,
    Tuple,
    Value,
    feature,
    is_live,
    leads,
    tokens,
)
from .rules import Context, Rule, array
from .shapes import are_rows, describe
from .states import HELD, NEW

Op = Callable[..., Value]


def _given(c: Context, name: str, value: Value, *ranks: int, at: int = 1) -> tuple[Axis, ...]:
    """The axes of an array with sequences in front; on rows, with tokens in axis `at`."""
    x = array(value)
    if x.axes is None or x.open or len(x.axes) not in ranks or not _leads(c, x, at):
        wanted = "[rows][length][...]" if c.on_rows else "[rows][...]"
        raise Refused("row-mixing", f"`{name}` of {describe(x)}", wanted)
    return x.axes


def _leads(c: Context, x: Array, at: int) -> bool:
    if not c.on_rows:
        return leads(x)
    return not x.tag and are_rows(x.axes or (), at)


def _shared(name: str, *values: Value) -> None:
    """What all sequences have in common: weights, numbers."""
    if any(map(is_live, values)):
        raise Refused("row-mixing", f"`{name}` with weights or options of single sequences")


def _state(c: Context, name: str, value: Value, rank: int) -> Value:
    """The state after a call, whatever there was before."""
    if c.on_rows:
        number = _number(HELD, value)
        if number is None:
            message = f"`{name}` without a state of the cache: each row would begin a sequence"
            raise Refused("row-mixing", message)
        return Opaque(f"{NEW}{number}")
    if value != NONE:
        _given(c, name, value, rank)
    return Array(((ROWS,), *(feature(("state", i)) for i in range(1, rank))))


def _number(kind: str, value: Value) -> str | None:
    """The number of the entry that something of this kind is of, on rows."""
    if isinstance(value, Opaque) and value.kind.startswith(kind):
        return value.kind.removeprefix(kind)
    return None


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
    _given(c, name, q, 4), _given(c, name, k, 4), _given(c, name, a, 3, 4), _given(c, name, b, 3)
    return Tuple((Array(_given(c, name, v, 4)), _state(c, name, state, 4)))


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
    _given(c, name, B, 4), _given(c, name, C, 4), _given(c, name, dt, 3)
    return Tuple((Array(_given(c, name, hidden_states, 4)), _state(c, name, state, 4)))


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
    _given(c, name, delta, 3), _given(c, name, B, 3), _given(c, name, C, 3)
    return Tuple((Array(_given(c, name, x, 3)), _state(c, name, state, 3)))


def _diagonal(c: Context, x: Value, a: Value, h: Value) -> Value:
    name = "diagonal_scan"
    _given(c, name, a, 3)
    return Tuple((Array(_given(c, name, x, 3)), _state(c, name, h, 2)))


def _lightning(c: Context, q: Value, k: Value, v: Value, g: Value, scale: Value, h: Value) -> Value:
    name = "lightning_scan"
    _shared(name, g, scale)
    _given(c, name, k, 4, at=2)
    axes, width = _given(c, name, q, 4, at=2), _given(c, name, v, 4, at=2)[3]
    return Tuple((Array((*axes[:3], width)), _state(c, name, h, 4)))


def _low_rank(
    c: Context, r: Value, w: Value, k: Value, v: Value, a: Value, b: Value, h: Value
) -> Value:
    name = "low_rank_scan"
    for value in (w, k, a, b):
        _given(c, name, value, 4)
    axes, width = _given(c, name, r, 4), _given(c, name, v, 4)[3]
    return Tuple((Array((*axes[:3], width, ())), _state(c, name, h, 4)))


# Stands for what a state and a chunk's rows are together: rows have a window of it each, so that
# nothing but a convolution and what is kept of it may be made of it.
_WINDOWS = "windows of "  # and the number of the entry that they begin with
_WINDOW = Array(((ROWS,), feature("window"), feature()))


def _windows(c: Context, state: Value, x: Value, taps: Value) -> Value:
    """A row and those before it in its sequence."""
    number = _number(HELD, state)
    if number is None or is_live(taps):
        raise Refused("row-mixing", "windows that do not begin with a state of the cache")
    _given(c, "windows", x, 3)
    return Opaque(f"{_WINDOWS}{number}")


def _window_state(c: Context, x: Value, taps: Value) -> Value:
    number = _number(_WINDOWS, x)
    if number is None or is_live(taps):
        raise Refused("row-mixing", "a state of what is no window")
    return Opaque(f"{NEW}{number}")


def of_windows(x: Value, convolution: Callable[[Value], Value]) -> Value:
    """What a convolution makes of each row's window: a row, or the runtime raises."""
    if _number(_WINDOWS, x) is None:
        return convolution(x)
    axes = array(convolution(_WINDOW)).axes or ()
    if len(axes) != 3 or axes[0] != (ROWS,) or tokens((*axes[1], *axes[2])):
        raise Refused("row-mixing", "what is no convolution of windows")
    return Array((axes[0], (LENGTH,), axes[2]))


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
# Called by mixers on rows.
WINDOWS = _rules(windows=_windows, window_state=_window_state)
# Decorators of functions of a file; names of its arguments in this order.
DECORATING = _rules(diagonal_scan=_diagonal, lightning_scan=_lightning, low_rank_scan=_low_rank)
