"""`x[key]`, `x[key] = v` and `x.at[key]`: which rows an index can see."""

from __future__ import annotations

from .domain import (
    NONE,
    PARAMETER,
    ROWS,
    Array,
    Axis,
    Choice,
    Constant,
    Count,
    Factor,
    Known,
    Refused,
    Slice,
    Tuple,
    Value,
    feature,
    is_live,
    tokens,
)
from .rules import Context, array
from .shapes import broadcast, describe, distinct, size_key


def index(c: Context, x: Array, key: Value) -> Array:
    """The axes of `x[key]`."""
    if x.tag:
        return _tagged(x, key)
    keys = list(key.items) if isinstance(key, Tuple) else [key]
    chosen = [i for i, k in enumerate(keys) if isinstance(k, Array) and k.axes != ()]
    if not x.live and not any(map(is_live, keys)):
        return _constant(x, keys)
    if any(isinstance(k, Choice) for k in keys):
        raise Refused("unknown-operation", "an index that may be several things")
    if x.axes is None:
        return _of_parameter(keys)
    if x.open:
        return _of_open(x, keys)
    keys = _fill(keys, len(x.axes))
    chosen = [i for i, k in enumerate(keys) if isinstance(k, Array) and k.axes != ()]
    made: list[Axis] = []
    place = 0
    for k in keys:
        if k == NONE:
            made.append(())
            continue
        axis = x.axes[place]
        place += 1
        if isinstance(k, Array) and k.axes != ():
            if len(chosen) > 1:
                raise Refused("row-mixing", f"several index arrays into {describe(x)}")
            made += _choose(x, axis, k)
        elif isinstance(k, Slice):
            made.append(_slice(c, x, axis, k))
        else:
            _single(x, axis, k)
    return distinct(Array(tuple(made)))


def _tagged(x: Array, key: Value) -> Array:
    keys = key.items if isinstance(key, Tuple) else (key,)
    if x.tag == ("start",) and len(x.axes or ()) == 1:
        first, *rest = keys
        whole = first == Known(...) or (isinstance(first, Slice) and _is_full(first))
        if whole and rest and all(k == NONE for k in rest):
            return Array(((ROWS,), *((),) * len(rest)), tag=x.tag)
    if x.tag[0] == "start" and isinstance(key, (Known, Slice, Tuple)):
        raise Refused("position-special", "a position is picked from the cache's offset")
    raise Refused("row-mixing", "a permutation of rows is picked apart")


def _fill(keys: list[Value], rank: int) -> list[Value]:
    """The ellipsis, and what is left out at the end, as full slices."""
    used = sum(1 for k in keys if k != NONE and k != Known(...))
    missing: list[Value] = [Slice(NONE, NONE, NONE)] * (rank - used)
    if Known(...) in keys:
        at = keys.index(Known(...))
        return [*keys[:at], *missing, *keys[at + 1 :]]
    if used > rank:
        raise Refused("unknown-operation", "more indices than axes")
    return [*keys, *missing]


def _constant(x: Array, keys: list[Value]) -> Array:
    if x.axes is None or x.open:
        return PARAMETER
    try:
        keys = _fill(keys, len(x.axes))
    except Refused:
        return PARAMETER
    made: list[Axis] = []
    place = 0
    for k in keys:
        if k == NONE:
            made.append(())
            continue
        place += 1
        if isinstance(k, Slice):
            full = k.lower == k.upper == k.step == NONE
            made.append(x.axes[place - 1] if full else feature())
        elif not isinstance(k, Known):
            return PARAMETER
    return Array(tuple(made))


def _of_parameter(keys: list[Value]) -> Array:
    """A table of unknown rank, looked up by rows: `weight[ids]`."""
    first = keys[0]
    if len(keys) == 1 and isinstance(first, Array) and first.axes is not None:
        return Array(first.axes, True)
    raise Refused("unknown-operation", "a parameter of unknown rank is indexed by tokens")


def _of_open(x: Array, keys: list[Value]) -> Array:
    assert x.axes is not None
    at = keys.index(Known(...)) if Known(...) in keys else len(keys)
    for i, k in enumerate(keys[:at]):
        if i < len(x.axes) and not (isinstance(k, Slice) and _is_full(k)):
            raise Refused("position-special", f"{describe(x)} is indexed along its token axes")
    for k in keys[at + 1 :]:
        if not (isinstance(k, Slice) or k == NONE) or is_live(k):
            raise Refused("unknown-operation", f"an index into {describe(x)}")
    return x


def _is_full(k: Slice) -> bool:
    return k.lower in (NONE, Known(0)) and k.upper == NONE and k.step in (NONE, Known(1))


def _slice(c: Context, x: Array, axis: Axis, k: Slice) -> Axis:
    if _is_full(k):
        return axis
    kept = tokens(axis)
    if k.lower in (NONE, Known(0)) and k.step in (NONE, Known(1)) and kept:
        upper = k.upper
        whole = isinstance(upper, Count) and upper.exact and upper.rest == 1
        if whole and isinstance(upper, Count):
            if axis == upper.factors:
                return axis
            if axis[:1] == (Factor("feature", "machines"),) and axis[1:] == upper.factors:
                return axis[1:]  # the first machine's rows
    if kept:
        raise Refused(
            "position-special",
            f"some tokens are cut out of {describe(x)}",
            "last_rows, where logits of the last token are wanted",
        )
    if is_live(k.lower) or is_live(k.upper) or is_live(k.step):
        raise Refused("token-count", "features are cut at a number of tokens")
    if k.lower in (NONE, Known(0)) and k.step in (NONE, Known(1)):
        key = size_key(k.upper)
        if key is not None and not (isinstance(key, int) and key < 0):
            return feature(key)
    return feature(("at", c.here(), len(axis)))


def _single(x: Array, axis: Axis, k: Value) -> None:
    if tokens(axis):
        raise Refused(
            "position-special",
            f"one token is picked out of {describe(x)}",
            "last_rows, where logits of the last token are wanted",
        )
    if is_live(k):
        raise Refused("token-count", "an entry is picked by what tokens say")
    if not isinstance(k, (Known, Constant, Array)):
        raise Refused("unknown-operation", "an index that is not a number")
    if isinstance(k, Known) and not isinstance(k.value, int):
        raise Refused("unknown-operation", "an index that is not a number")


def _choose(x: Array, axis: Axis, k: Array) -> tuple[Axis, ...]:
    """One axis is replaced by those of an index array."""
    if k.tag and k.axes is not None:
        kind, identity = k.tag[0], k.tag[1] if len(k.tag) > 1 else None
        (own,) = k.axes
        if kind == "order" and axis == own[0].under:
            return (own,)
        if kind == "owner" and axis == own[0].under[:-1]:
            return (own,)
        if kind == "inverse" and axis[:1] and axis[0].kind == "order" and axis[0].size == identity:
            return (own,)
        raise Refused("row-mixing", f"rows of {x} are permuted by another array's order")
    if tokens(axis):
        raise Refused("row-mixing", f"rows are picked by index out of {describe(x)}")
    if x.live and k.live:
        raise Refused("row-mixing", f"entries of {x} for each of {k}", "take_along_axis")
    return k.axes if k.axes is not None else (feature(),)


def store(c: Context, x: Array, key: Value, value: Value) -> Array:
    """The axes of `x` after `x[key] = value`, and of `x.at[key].add(value)`."""
    place = index(c, x, key)
    given = array(value)
    if not x.live and (given.live or place.live):
        raise Refused("row-mixing", "rows write into one parameter")
    if x.live and place.live:
        broadcast([place, given])
    elif given.live:
        raise Refused("row-mixing", f"{given} is written over all of {x}")
    return Array(x.axes, x.open)
