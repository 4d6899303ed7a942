"""Where the axes go when an array changes its shape, and how two arrays line up."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from .domain import (
    LENGTH,
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
    Value,
    feature,
    join_axes,
    spell_axis,
    tokens,
)

TRAILING = -1000  # the last axis of an array with unknown feature axes at its end


def describe(x: Array) -> str:
    return f"axes {x}"


def are_rows(axes: Sequence[Axis], at: int = 1) -> bool:
    """[rows]...[length]..., with the length in axis `at` and no tokens anywhere else."""
    if len(axes) <= at or axes[0] != (ROWS,) or axes[at] != (LENGTH,):
        return False
    return not any(tokens(axis) for i, axis in enumerate(axes) if i not in (0, at))


def axis_index(x: Array, axis: Value) -> int:
    """The index of an axis; `TRAILING` for the last one of an open array."""
    if not isinstance(axis, Known) or not isinstance(axis.value, int):
        raise Refused("unknown-operation", f"the axis is not a plain number ({describe(x)})")
    assert x.axes is not None
    number, rank = axis.value, len(x.axes)
    if x.open:
        if number == -1:
            return TRAILING
        if number < 0 or number >= rank:
            raise Refused("unknown-operation", f"axis {number} of an array of unknown rank")
        return number
    if not -rank <= number < rank:
        raise Refused("unknown-operation", f"axis {number} of an array with {describe(x)}")
    return number % rank


def axis_at(x: Array, index: int) -> Axis:
    assert x.axes is not None
    return feature() if index == TRAILING else x.axes[index]


def axis_indices(x: Array, axis: Value) -> list[int]:
    """Several axes; None is all of them."""
    from .domain import Items, Tuple

    assert x.axes is not None
    if isinstance(axis, Known) and axis.value is None:
        return [*range(len(x.axes)), *([TRAILING] if x.open else [])]
    items = axis.items if isinstance(axis, (Tuple, Items)) else (axis,)
    return [axis_index(x, item) for item in items or ()]


def within(x: Array, axis: Value, what: str) -> list[int]:
    """The axes that an operation computes across: none may be one of tokens."""
    found = axis_indices(x, axis)
    for index in found:
        crossed = tokens(axis_at(x, index))
        if crossed:
            kinds = " and ".join(f.kind for f in crossed)
            raise Refused(
                "row-mixing",
                f"{what} across the {kinds} axis",
                f"the same across a feature axis; here axis {index} of {describe(x)}",
            )
    return found


# --------------------------------------------------------------------------- broadcasting


def combine(one: Axis, two: Axis) -> Axis:
    """What two axes that stand above each other become."""
    if one == two or not two:
        return one
    if not one:
        return two
    joined = join_axes(one, two)
    if joined is not None and tokens(joined):
        return joined
    if not tokens(one) and not tokens(two):
        return one if any(f.size is not None for f in one) else two
    raise Refused(
        "row-mixing",
        f"a {spell_axis(one)} axis meets a {spell_axis(two)} axis",
        "arrays whose token axes stand above each other",
    )


def broadcast(arrays: Sequence[Array]) -> Array:
    """The axes of an elementwise result."""
    shaped = [a for a in arrays if a.live]
    if not shaped:
        known = [a for a in arrays if a.axes is not None]
        if len(known) < len(arrays):
            return PARAMETER
        shaped = known
    if any(a.open for a in shaped):
        return _broadcast_open(shaped)
    shapes = [a.axes for a in arrays if a.axes is not None and not a.open]
    rank = max(map(len, shapes))
    result: list[Axis] = [()] * rank
    for axes in shapes:
        for offset in range(1, len(axes) + 1):
            result[rank - offset] = combine(result[rank - offset], axes[len(axes) - offset])
    return distinct(Array(tuple(result)))


def _broadcast_open(shaped: list[Array]) -> Array:
    """One has unknown axes at its end. Axes line up from the end, so it may meet weights only: if
    two arrays of rows have other numbers of axes, rows come to stand above other axes."""
    first, *others = sorted(shaped, key=lambda a: not a.open)
    if others:
        raise Refused("row-mixing", f"{first} meets {others[0]}: they may not line up")
    return first


def distinct(x: Array) -> Array:
    """No token axis twice: that would be a value for each pair of tokens."""
    seen: list[Factor] = []
    for factor in x.token_factors:
        inner = (factor, *factor.under)
        for one in inner:
            if one in seen:
                raise Refused(
                    "row-mixing",
                    f"a value for each pair of {one.kind}: {describe(x)}",
                    "arrays whose token axes stand above each other",
                )
        seen += inner
    rows = {f.kind for f in seen} & {"rows", "wanted"}
    if len(rows) > 1:
        raise Refused("row-mixing", "rows before and after the choice of wanted rows meet")
    return x


# --------------------------------------------------------------------------- reshape


def size_key(value: Value) -> Hashable:
    match value:
        case Known():
            key: Hashable = value.value
            return key
        case Constant():
            return value.key
    return None


def reshape(x: Array, shape: Sequence[Value]) -> Array:
    """`x.reshape(shape)`: which factors each new axis holds.

    Row-major order keeps the order of factors, so the new axes cut the same sequence of factors in
    other places. Sizes of the config are unknown, but two facts decide: explicit token counts, and
    that a reshape must work for a single token too, so whatever -1 takes beyond tokens are features
    of one token.
    """
    if not x.live:
        if x.axes is not None or all(not isinstance(s, Count) for s in shape):
            return Array(
                tuple(feature(size_key(s)) if size_key(s) != -1 else feature() for s in shape)
            )
        raise Refused("token-count", "a parameter is reshaped by a number of tokens")
    assert x.axes is not None
    slots = [_slot(item) for item in shape]
    flat = [factor for axis in x.axes for factor in axis]
    have = [f for f in flat if f.is_token]
    given = [f for slot in slots if slot is not None for f in slot if f.is_token]
    wild = next((i for i, slot in enumerate(slots) if slot is None), None)
    if x.open:
        return _reshape_open(x, slots)
    if given == have:
        _check_runs(flat, slots, x)
        filled: list[Axis] = [slot if slot is not None else feature() for slot in slots]
        return distinct(Array(tuple(filled)))
    if wild is None:
        if any(f.kind == "order" for f in have):
            raise Refused(
                "row-mixing", f"a permutation of rows is not undone before {x} is reshaped"
            )
        raise Refused(
            "length-dependent" if LENGTH in have and LENGTH not in given else "token-count",
            f"{describe(x)} are reshaped without their token axes",
            "reshape(B, L, ...) or reshape(-1, ...)",
        )
    before = [f for slot in slots[:wild] if slot is not None for f in slot]
    after = [f for slot in slots[wild + 1 :] if slot is not None for f in slot]
    lead = [f for f in before if f.is_token]
    trail = [f for f in after if f.is_token]
    if have[: len(lead)] != lead or (trail and have[len(have) - len(trail) :] != trail):
        raise Refused("row-mixing", f"a reshape changes the order of the token axes of {x}")
    missing = have[len(lead) : len(have) - len(trail)]
    if not missing or [f for f in before if not f.is_token] or _leading(flat):
        raise Refused("row-mixing", f"a reshape moves features before the tokens of {x}")
    start = max(i for i, f in enumerate(flat) if f == missing[-1]) + 1
    inner = flat[flat.index(missing[0]) : start]
    if any(not f.is_token for f in inner) and [f for f in inner if f.is_token] != missing:
        raise Refused("row-mixing", f"a reshape merges token axes that stand apart in {x}")
    end = next((i for i in range(start, len(flat)) if flat[i].is_token), len(flat))
    tail = flat[start:end]
    ahead = _until_token(after)
    sizes, wanted = [f.size for f in tail], [f.size for f in ahead]
    if not ahead:
        extra = list(tail)
    elif sizes == wanted and None not in sizes:
        extra = []
    elif _divides(wanted, sizes):
        extra = [Factor("feature")]
    else:
        raise Refused(
            "row-mixing",
            f"a reshape of {x} whose sizes may not divide the features of one token",
            "reshape(-1, D) with D from the array's own shape",
        )
    if trail and (extra or ahead != tail):
        raise Refused("row-mixing", f"a reshape may move features across the tokens of {x}")
    axes = [slot if slot is not None else (*inner, *extra) for slot in slots]
    return distinct(Array(tuple(axes)))


def _divides(wanted: list[Hashable], sizes: list[Hashable]) -> bool:
    """Whether a product of sizes divides another, as far as their keys tell."""
    whole = [part for size in sizes for part in _product(size)]
    for part in (p for size in wanted for p in _product(size)):
        if part in whole:
            whole.remove(part)
            continue
        even = next(
            (
                w
                for w in whole
                if isinstance(w, int) and isinstance(part, int) and part > 0 and w % part == 0
            ),
            None,
        )
        if part is None or even is None:
            return False
        whole.remove(even)
        whole.append(even // int(str(part)))
    return True


def _product(size: Hashable) -> list[Hashable]:
    if isinstance(size, tuple) and size[:1] == ("*",):
        return [part for factor in size[1:] for part in _product(factor)]
    return [] if size == 1 else [size]


def _leading(flat: list[Factor]) -> list[Factor]:
    return _until_token(flat)


def _until_token(factors: list[Factor]) -> list[Factor]:
    found = []
    for factor in factors:
        if factor.is_token:
            break
        found.append(factor)
    return found


def _slot(item: Value) -> Axis | None:
    """One entry of a shape; None for -1."""
    if isinstance(item, Known) and item.value == -1:
        return None
    if isinstance(item, Count):
        if not item.exact:
            raise Refused("token-count", "a size is computed from a number of tokens")
        return (*item.factors, *feature(item.rest))
    if isinstance(item, Choice):
        kinds = [_slot(option) for option in item.options]
        if any(kind is None or tokens(kind) for kind in kinds):
            raise Refused("unknown-operation", "a size that may be several things")
        return feature()
    if not isinstance(item, (Known, Constant)):
        raise Refused("unknown-operation", "a size that is not a number")
    return feature(size_key(item))


def _runs(factors: Sequence[Factor | None]) -> list[list[Hashable]]:
    """The sizes of the features before, between and behind the tokens; ... where -1 stands."""
    runs: list[list[Hashable]] = [[]]
    for factor in factors:
        if factor is None:
            runs[-1].append(...)
        elif factor.is_token:
            runs.append([])
        else:
            runs[-1].append(factor.size)
    return runs


def _check_runs(flat: list[Factor], slots: list[Axis | None], x: Array) -> None:
    """All tokens are named; then only the features behind the last of them may be cut anew."""
    target: list[Factor | None] = []
    for slot in slots:
        target += [None] if slot is None else list(slot)
    old, new = _runs(flat), _runs(target)
    for one, two in zip(old[:-1], new[:-1], strict=True):
        if one != two or None in one or ... in two:
            raise Refused(
                "row-mixing",
                f"a reshape moves features across the tokens of {x}",
                "transpose the token axes to the front first",
            )


def _reshape_open(x: Array, slots: list[Axis | None]) -> Array:
    """Unknown features at the end: the shape must name the tokens at its head."""
    assert x.axes is not None
    head = [tokens(axis) for axis in x.axes]
    named = [tokens(slot) for slot in slots[: len(head)] if slot is not None]
    if named != head or any(slot and tokens(slot) for slot in slots[len(head) :]):
        raise Refused("row-mixing", f"a reshape of {x} that does not begin with its token axes")
    return Array(tuple(slot if slot is not None else feature() for slot in slots))


def flatten(x: Array, start: int, end: int) -> Array:
    assert x.axes is not None
    rank = len(x.axes)
    if not x.live and x.axes is None:
        return PARAMETER
    start, end = start % rank, end % rank
    merged = tuple(f for axis in x.axes[start : end + 1] for f in axis)
    return Array((*x.axes[:start], merged, *x.axes[end + 1 :]), x.open)


def unflatten(x: Array, index: int, shape: Sequence[Value]) -> Array:
    assert x.axes is not None
    inner = Array((x.axes[index],))
    made = reshape(inner, shape)
    assert made.axes is not None
    return distinct(Array((*x.axes[:index], *made.axes, *x.axes[index + 1 :]), x.open))
