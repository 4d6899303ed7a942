"""What each operation of mlx does to token axes: one rule an operation, each with its reason.

A rule takes abstract values in the order of mlx's own signature and returns the result's axes, or
raises `Refused`. Python binds the arguments, so a call that a rule does not know is refused, too.
`tests/test_axes_rules.py` checks every rule against mlx: it changes one row of the inputs and sees
which rows of the outputs change.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from .domain import (
    CONSTANT,
    LAST,
    LENGTH,
    NO,
    NONE,
    PARAMETER,
    ROWS,
    ZERO,
    Array,
    Axis,
    Barred,
    Choice,
    ClassValue,
    Constant,
    Count,
    CountTest,
    Dead,
    Factor,
    Instance,
    Items,
    Iterable_,
    Known,
    Opaque,
    Refused,
    Routine,
    Table,
    Tuple,
    Undefined,
    Value,
    choice,
    feature,
    is_live,
    leads,
    tokens,
)
from .shapes import (
    TRAILING,
    axis_at,
    axis_index,
    axis_indices,
    broadcast,
    combine,
    describe,
    distinct,
    flatten,
    reshape,
    size_key,
    unflatten,
    within,
)


class Context(Protocol):
    """What rules may ask of the interpreter."""

    sequences: bool
    on_rows: bool

    def here(self) -> Any: ...
    def assume(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    apply: Callable[..., Value]
    reason: str


RULES: dict[str, Rule] = {}


def rule(reason: str, *names: str) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    def add(function: Callable[..., Value]) -> Callable[..., Value]:
        watched = _watched(function)
        for name in names or (function.__name__.rstrip("_"),):
            RULES[name] = Rule(name, watched, reason)
        return function

    return add


def _watched(function: Callable[..., Value]) -> Callable[..., Value]:
    """The rule, which does not look at its `rest` and `more`: nothing of tokens may be in them."""
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    ignored = {p.kind for p in parameters if p.name in ("rest", "more")}
    positional = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) - 1
    if inspect.Parameter.VAR_POSITIONAL not in ignored:
        positional = 1 << 16

    @functools.wraps(function)
    def apply(c: Context, *args: Value, **more: Value) -> Value:
        others = (v for k, v in more.items() if k not in named and k not in ("shape", "axes"))
        if any(map(is_live, (*args[positional:], *others))):
            raise Refused("unknown-operation", "an option made from tokens")
        return function(c, *args, **more)

    return apply


def array(value: Value) -> Array:
    """The value as an array; Python numbers are arrays without axes."""
    match value:
        case Array():
            return value
        case Known(value=None):
            raise Dead
        case Known() | Constant():
            return Array(())
        case Tuple(items=items) if not is_live(value):
            return Array((feature(len(items)),))
        case Items() if not is_live(value):
            return Array((feature(),))
        case Table() | Instance() | ClassValue() | Routine() | Undefined():
            raise Dead
        case Choice(options=several):
            return _one_array(several)
        case Count() | CountTest():
            raise Refused("token-count", "a number of tokens is used as data", "a size in a shape")
        case Opaque(kind="object" | "states"):
            raise Dead
        case Opaque(kind=kind):
            raise Refused("cache-use", f"a {kind} is used as an array", "passing it on")
        case Barred():
            raise value.use()
    raise Refused("unknown-operation", "an operand that is not known")


def _one_array(several: tuple[Value, ...]) -> Array:
    """What every option is that is an array."""
    found: list[Array] = []
    for option in several:
        try:
            found.append(array(option))
        except Dead:
            continue
    merged = choice(found)
    if isinstance(merged, Array):
        return merged
    raise Refused("unknown-operation", "arrays of different axes meet in one name")


def live(value: Value) -> bool:
    return isinstance(value, Array) and value.live


# --------------------------------------------------------------------------- elementwise

_ARITHMETIC = ("+", "-", "*", "/", "//", "%", "**")
ELEMENTWISE = (
    "abs add arccos arccosh arcsin arcsinh arctan arctan2 arctanh bitwise_and bitwise_invert "
    "bitwise_or bitwise_xor ceil clip conj conjugate cos cosh degrees divide divmod equal erf "
    "erfinv exp expm1 floor floor_divide greater greater_equal isclose isfinite isinf isnan "
    "isneginf isposinf left_shift less less_equal log log10 log1p log2 logaddexp logical_and "
    "logical_not logical_or maximum minimum multiply nan_to_num negative not_equal power radians "
    "real imag reciprocal remainder right_shift round rsqrt sigmoid sign sin sinh sqrt square "
    "subtract tan tanh where from_fp8 to_fp8"
).split()


@rule("each element is computed from the elements above it alone", *ELEMENTWISE)
def elementwise(c: Context, *values: Value, **rest: Value) -> Value:
    del rest
    arrays = [array(v) for v in values if v != NONE]
    for one in arrays:
        if one.tag:
            _tagged(one)
    if any(one.axes is None for one in arrays) and any(one.live for one in arrays):
        c.assume("a parameter of a shape that is not known has no more axes than what it meets")
    return broadcast(arrays)


def _tagged(one: Array) -> None:
    if one.tag[0] == "unturned":
        raise Refused(*_UNTURNED, at=one.tag[1])
    if one.tag[0] in ("row", "each"):
        raise Refused("row-mixing", "one token's part meets the parts of others")
    if one.tag[0] in ("start", "end", "steps"):
        raise Refused(
            "position-special",
            "the position of a chunk's first token is used as data",
            "mx.arange(offset, offset + L), a rope's offset, or a number added to it",
        )
    raise Refused("row-mixing", "a permutation of rows is used as data")


def arithmetic(c: Context, operator: str, left: Value, right: Value) -> Value:
    """`left operator right` where one of them is an array."""
    if operator == "-" and isinstance(left, Array) and left.tag == ("end",):
        if right == Count((LENGTH,)):
            return Array(left.axes, tag=("start",))  # the end less the chunk's length
    one, two = array(left), array(right)
    if operator == "+" and {one.tag, two.tag} == {("start",), ("steps",)}:
        start = one if one.tag == ("start",) else two
        if start.axes == ((ROWS,), ()):
            return Array(((ROWS,), (LENGTH,)))  # each token's own position
    for this, other in ((one, two), (two, one)):
        if this.tag[:1] == ("start",) and operator in "+-" and not other.live:
            if other.axes != () or (operator == "-" and this is two):
                _tagged(this)
            return this
    if operator == "//" and one.tag[:1] == ("order",):
        (factor,) = one.axes[0] if one.axes else ()
        last = factor.under[-1]
        if last.is_token or size_key(right) is None or size_key(right) != last.size:
            raise Refused("row-mixing", "a permutation is divided by another number than its width")
        return Array(one.axes, tag=("owner", factor.size))
    return elementwise(c, one, two)


# --------------------------------------------------------------------------- reductions


def reduced(x: Array, across: Iterable[int], keepdims: Value) -> Array:
    assert x.axes is not None
    gone = set(across)
    keep = isinstance(keepdims, Known) and bool(keepdims.value)
    if not isinstance(keepdims, Known) and not x.live:
        return PARAMETER
    if TRAILING in gone:
        if keep or len(gone) > 1:
            return x
        # One of an unknown number of feature axes is gone: none, or some, are left.
        raise Refused("unknown-operation", "a reduction of an array of unknown rank")
    axes = [() if i in gone else axis for i, axis in enumerate(x.axes) if keep or i not in gone]
    return Array(tuple(axes), x.open)


@rule(
    "sums and the like run over the given axes only; without one, over all",
    *"sum mean max min prod var std any all logsumexp median".split(),
)
def reduction(
    c: Context, a: Value, axis: Value = NONE, keepdims: Value = NO, **rest: Value
) -> Value:
    x = array(a)
    if x.axes is None:
        return PARAMETER
    if not x.live and isinstance(axis, Constant):
        return PARAMETER
    return reduced(x, within(x, axis, "a reduction"), keepdims)


@rule("the index of an extreme along one axis; without one, over all", "argmax", "argmin")
def extreme(c: Context, a: Value, axis: Value = NONE, keepdims: Value = NO, **rest: Value) -> Value:
    return reduction(c, a, axis, keepdims)


@rule("a norm runs over the given axes only; without one, over all", "linalg.norm")
def norm(
    c: Context,
    a: Value,
    ord: Value = NONE,
    axis: Value = NONE,
    keepdims: Value = NO,
    **rest: Value,
) -> Value:
    return reduction(c, a, axis, keepdims)


def _along(c: Context, a: Value, axis: Value, what: str) -> Array:
    x = array(a)
    if x.axes is not None and (x.live or isinstance(axis, Known)):
        within(x, axis, what)
    return Array(x.axes, x.open)


@rule("each value depends on all values along the axes; without one, on all", "softmax")
def softmax(c: Context, a: Value, axis: Value = NONE, **rest: Value) -> Value:
    return _along(c, a, axis, "a softmax")


@rule(
    "each value depends on earlier ones along the axis; without one, on all",
    *"cumsum cumprod cummax cummin logcumsumexp".split(),
)
def scan(c: Context, a: Value, axis: Value = NONE, **rest: Value) -> Value:
    return _along(c, a, axis, "a scan")


@rule("values are put in order along one axis, the last by default", "sort")
def sort(c: Context, a: Value, axis: Value = LAST, **rest: Value) -> Value:
    return _along(c, a, axis, "a sort")


@rule(
    "values are put around the k-th along one axis, the last by default",
    "partition",
    "argpartition",
)
def partition(c: Context, a: Value, kth: Value, axis: Value = LAST, **rest: Value) -> Value:
    return _along(c, a, axis, "a partition")


@rule("the largest along one axis, the last by default", "topk")
def topk(c: Context, a: Value, k: Value, axis: Value = LAST, **rest: Value) -> Value:
    x = _along(c, a, axis, "a choice of the largest")
    return resized(c, x, axis, k)


def resized(c: Context, x: Array, axis: Value, size: Value = NONE) -> Array:
    """The axis gets another size, known by where it is made if not otherwise."""
    if x.axes is None or not isinstance(axis, Known):
        return PARAMETER
    index = axis_index(x, axis)
    if index == TRAILING:
        return x
    key = size_key(size)
    new = feature(key if key is not None and key != -1 else ("at", c.here()))
    return Array((*x.axes[:index], new, *x.axes[index + 1 :]), x.open)


@rule("the order along one axis; of all rows together it is a permutation to be undone", "argsort")
def argsort(c: Context, a: Value, axis: Value = LAST, **rest: Value) -> Value:
    x = array(a)
    if x.live and x.axes is not None and len(x.axes) == 1 and not x.open:
        (only,) = x.axes
        if x.tag[:1] == ("order",):
            return Array((only[0].under,), tag=("inverse", only[0].size))
        if not x.tag and only[0].kind != "order":
            identity = c.here()
            return Array(((Factor("order", identity, only),),), tag=("order", identity))
    return _along(c, x, axis, "a sort")


# --------------------------------------------------------------------------- shapes


def items_of(value: Value) -> tuple[Value, ...]:
    """A shape or a list of axes given as one tuple, or as one number."""
    if isinstance(value, Tuple):
        return value.items
    if isinstance(value, Items) and value.items is not None:
        return tuple(value.items)
    if isinstance(value, (Known, Constant, Count)):
        return (value,)
    raise Refused("unknown-operation", "a shape of unknown length")


def spread(values: tuple[Value, ...]) -> tuple[Value, ...]:
    """Arguments given one by one, or as one tuple."""
    return items_of(values[0]) if len(values) == 1 else values


@rule("row-major order: the new axes cut the same elements elsewhere", "reshape")
def reshape_(c: Context, a: Value, *shape: Value, **rest: Value) -> Value:
    x = array(a)
    given = rest.get("shape")
    if not x.live and not any(map(is_live, shape)):
        try:
            return reshape(x, items_of(given) if given is not None else spread(shape))
        except Refused:
            return PARAMETER
    return reshape(x, items_of(given) if given is not None else spread(shape))


@rule("neighbouring axes become one, in row-major order", "flatten")
def flatten_(
    c: Context, a: Value, start_axis: Value = ZERO, end_axis: Value = LAST, **rest: Value
) -> Value:
    x = array(a)
    if x.axes is None:
        return PARAMETER
    if x.open or not isinstance(start_axis, Known) or not isinstance(end_axis, Known):
        raise Refused("unknown-operation", "a flatten of unknown axes")
    return flatten(x, start_axis.value, end_axis.value)


@rule("one axis becomes several, in row-major order", "unflatten")
def unflatten_(c: Context, a: Value, axis: Value, shape: Value, **rest: Value) -> Value:
    x = array(a)
    if x.axes is None:
        return PARAMETER
    index = axis_index(x, axis)
    if index == TRAILING:
        if is_live(shape):
            raise Refused("token-count", "features are cut by a number of tokens")
        return x
    return unflatten(x, index, items_of(shape))


@rule("axes of size one are dropped; the length axis has that size only when rewritten", "squeeze")
def squeeze(c: Context, a: Value, axis: Value = NONE, **rest: Value) -> Value:
    x = array(a)
    if x.axes is None:
        return PARAMETER
    if axis == NONE and x.live:
        raise Refused("length-dependent", "axes are dropped wherever their size is one")
    gone = axis_indices(x, axis)
    for index in gone:
        if tokens(axis_at(x, index)):
            raise Refused("length-dependent", f"a token axis of {x} is dropped")
    if TRAILING in gone:
        raise Refused("unknown-operation", "an array of unknown rank loses an axis")
    return Array(tuple(s for i, s in enumerate(x.axes) if i not in gone), x.open)


@rule("axes of size one are added", "expand_dims")
def expand_dims(c: Context, a: Value, axis: Value, **rest: Value) -> Value:
    x = array(a)
    if x.axes is None:
        return PARAMETER
    added = [_plain(item) for item in items_of(axis)]
    if x.open:
        raise Refused("unknown-operation", "an array of unknown rank gets an axis")
    rank = len(x.axes) + len(added)
    places = {number % rank for number in added}
    rest_ = iter(x.axes)
    return Array(tuple(() if i in places else next(rest_) for i in range(rank)))


def _plain(value: Value) -> int:
    if isinstance(value, Known) and isinstance(value.value, int):
        return value.value
    raise Refused("unknown-operation", "an axis that is not a plain number")


@rule("axes change places", "transpose", "permute_dims")
def transpose(c: Context, a: Value, *axes: Value, **rest: Value) -> Value:
    x = array(a)
    if x.axes is None:
        return PARAMETER
    given = rest.get("axes")
    order = items_of(given) if given is not None else spread(axes) if axes else ()
    if x.open:
        raise Refused("unknown-operation", "the axes of an array of unknown rank are exchanged")
    numbers = [_plain(item) % len(x.axes) for item in order] or [*range(len(x.axes))][::-1]
    if sorted(numbers) != [*range(len(x.axes))]:
        raise Refused("unknown-operation", f"a transpose that does not fit {describe(x)}")
    return Array(tuple(x.axes[i] for i in numbers), tag=x.tag if len(numbers) < 2 else ())


@rule("two axes change places", "swapaxes")
def swapaxes(c: Context, a: Value, axis1: Value, axis2: Value, **rest: Value) -> Value:
    x = array(a)
    if x.axes is None:
        return PARAMETER
    i, j = axis_index(x, axis1), axis_index(x, axis2)
    if TRAILING in (i, j):
        raise Refused("unknown-operation", "the axes of an array of unknown rank are exchanged")
    order = list(x.axes)
    order[i], order[j] = order[j], order[i]
    return Array(tuple(order), x.open)


@rule("one axis moves to another place", "moveaxis")
def moveaxis(c: Context, a: Value, source: Value, destination: Value, **rest: Value) -> Value:
    x = array(a)
    if x.axes is None:
        return PARAMETER
    i, j = axis_index(x, source), axis_index(x, destination)
    if TRAILING in (i, j):
        raise Refused("unknown-operation", "the axes of an array of unknown rank are exchanged")
    order = list(x.axes)
    order.insert(j, order.pop(i))
    return Array(tuple(order), x.open)


@rule("axes of size one, and new ones, repeat what is there", "broadcast_to")
def broadcast_to(c: Context, a: Value, shape: Value, **rest: Value) -> Value:
    x = array(a)
    axes = _shape_axes(shape)
    if axes is None:
        return PARAMETER if not x.live else x
    return broadcast([x, Array(axes)])


def _shape_axes(shape: Value) -> tuple[Axis, ...] | None:
    """The axes a shape describes; None if it is a constant of unknown length."""
    if isinstance(shape, Constant) or (isinstance(shape, Items) and shape.items is None):
        if is_live(shape):
            raise Refused("token-count", "a shape of unknown length from numbers of tokens")
        return None
    made: list[Axis] = []
    for item in items_of(shape):
        if isinstance(item, Count):
            if not item.exact:
                raise Refused("token-count", "a size is computed from a number of tokens")
            made.append((*item.factors, *feature(item.rest)))
        else:
            made.append(feature(size_key(item)))
    return tuple(made)


@rule("a constant array; with token axes, it is the same for all tokens", "zeros", "ones")
def constant_array(c: Context, shape: Value, *rest: Value, **more: Value) -> Value:
    axes = _shape_axes(shape)
    return PARAMETER if axes is None else distinct(Array(axes))


@rule("an array of one repeated value", "full")
def full(c: Context, shape: Value, vals: Value, *rest: Value, **more: Value) -> Value:
    axes = _shape_axes(shape)
    return PARAMETER if axes is None else broadcast([array(vals), Array(axes)])


@rule("a constant array of another's shape", "zeros_like", "ones_like")
def like(c: Context, a: Value, *rest: Value, **more: Value) -> Value:
    x = array(a)
    return Array(x.axes, x.open)


@rule("an array of another's shape and one repeated value")
def full_like(c: Context, a: Value, vals: Value, *rest: Value, **more: Value) -> Value:
    x = array(a)
    if not x.live and is_live(vals):
        raise Refused("row-mixing", "an array that has no tokens is filled with what tokens hold")
    return broadcast([Array(x.axes, x.open), array(vals)])


@rule("counts up: along tokens, that is a position in the chunk", "arange", "linspace")
def counting(c: Context, *values: Value, **rest: Value) -> Value:
    if values == (Count((LENGTH,)),) or values == (Known(0), Count((LENGTH,))):
        return Array(((LENGTH,),), tag=("steps",))
    if any(is_live(v) for v in (*values, *rest.values())):
        raise Refused(
            "length-dependent",
            "positions are counted from the start of a chunk",
            "mx.arange(offset, offset + L) with the cache's offset",
        )
    return Array((feature(),))


@rule("a matrix of numbers", "eye", "tri", "identity")
def matrix(c: Context, *values: Value, **rest: Value) -> Value:
    if any(is_live(v) for v in (*values, *rest.values())):
        raise Refused("length-dependent", "a matrix as large as a chunk is long")
    return Array((feature(), feature()))


@rule("random numbers are no function of tokens; only parameters start so", "random.normal")
def random(c: Context, shape: Value = NONE, *given: Value, **rest: Value) -> Value:
    if any(map(is_live, (shape, *given, *rest.values()))):
        raise Refused("unknown-operation", "random numbers in a forward pass")
    axes = _shape_axes(shape) if shape != NONE else None
    return PARAMETER if axes is None else Array(axes)


@rule("random numbers, their range before their shape", "random.uniform")
def uniform(c: Context, low: Value = NONE, high: Value = NONE, shape: Value = NONE,
            *given: Value, **rest: Value) -> Value:  # fmt: skip
    return random(c, shape, low, high, *given, **rest)


@rule("an array of numbers of the config", "array")
def array_(c: Context, value: Value, *rest: Value, **more: Value) -> Value:
    if isinstance(value, Array):
        return value
    if isinstance(value, (Known, Constant)):
        key = value.key if isinstance(value, Constant) else None
        number = isinstance(value, Known) or (isinstance(key, tuple) and key[0] in _ARITHMETIC)
        return Array(()) if number else PARAMETER
    if is_live(value):
        raise Refused("token-count", "an array is made from numbers of tokens")
    return array(value) if isinstance(value, (Tuple, Items)) else PARAMETER


@rule("nothing but the order of computing changes")
def depends(c: Context, a: Value, dependencies: Value = NONE, **rest: Value) -> Value:
    return array(a)


@rule("the same axes with another type, place or gradient", "astype", "stop_gradient", "contiguous")
def same_axes(c: Context, a: Value, *rest: Value, **more: Value) -> Value:
    return array(a)


@rule("the last axis is read in another width", "view")
def view(c: Context, a: Value, dtype: Value = NONE, **rest: Value) -> Value:
    x = array(a)
    if x.axes is not None:
        within(x, Known(-1), "another width")
        return resized(c, x, Known(-1))
    return PARAMETER


# --------------------------------------------------------------------------- joining, cutting


def listed(value: Value) -> list[Value]:
    if isinstance(value, Tuple):
        return list(value.items)
    if isinstance(value, Items):
        if value.items is not None:
            return list(value.items)
        if value.element is None or isinstance(value.element, Undefined):
            raise Dead  # an empty list
        return [value.element]
    if isinstance(value, Iterable_):
        return [value.element]
    raise Refused("unknown-operation", "a list that is not known")


@rule("arrays are put behind each other along one axis, the first by default", "concatenate",
      "concat")  # fmt: skip
def concatenate(c: Context, arrays: Value, axis: Value = ZERO, **rest: Value) -> Value:
    found = [array(v) for v in listed(arrays)]
    if not any(x.live for x in found):
        first = found[0] if found else PARAMETER
        return resized(c, first, axis) if first.axes is not None else PARAMETER
    shaped = [x for x in found if x.live]
    first = shaped[0]
    assert first.axes is not None
    for x in shaped:
        within(x, axis, "a concatenation")
    index = axis_index(first, axis)
    rest_ = []
    for x in found:
        if x.axes is None:
            raise Refused("row-mixing", f"a parameter is put beside {first}")
        if index == TRAILING:
            rest_.append(x)
            continue
        if len(x.axes) != len(first.axes):
            raise Refused("unknown-operation", "arrays of different rank are put together")
        rest_.append(Array((*x.axes[:index], (), *x.axes[index + 1 :]), x.open))
    merged = broadcast(rest_)
    assert merged.axes is not None
    if index == TRAILING:
        return merged
    return Array(
        (*merged.axes[:index], feature(("at", c.here())), *merged.axes[index + 1 :]), merged.open
    )


@rule("arrays are put beside each other along a new axis", "stack")
def stack(c: Context, arrays: Value, axis: Value = ZERO, **rest: Value) -> Value:
    found = [array(v) for v in listed(arrays)]
    if len(found) == 1 and found[0].tag[:1] == ("each",) and axis == Known(0):
        only = found[0]
        if only.axes is not None and not only.open:
            return distinct(Array((only.tag[1], *only.axes)))  # type: ignore[arg-type]
    if any(x.tag for x in found):
        for x in found:
            elementwise(c, x)
    if not found or any(x.axes is None for x in found):
        if any(x.live for x in found):
            raise Refused("row-mixing", "a parameter is stacked beside rows")
        return PARAMETER
    merged = broadcast(found)
    assert merged.axes is not None
    if merged.open:
        raise Refused("unknown-operation", "arrays of unknown rank are stacked")
    place = _plain(axis) % (len(merged.axes) + 1)
    count = len(found) if not isinstance(arrays, Items) or arrays.items is not None else None
    new = feature(count if count is not None else ("at", c.here()))
    return Array((*merged.axes[:place], new, *merged.axes[place:]))


@rule("an array is cut along one axis, the first by default", "split")
def split(
    c: Context, a: Value, indices_or_sections: Value, axis: Value = ZERO, **rest: Value
) -> Value:
    x = array(a)
    if x.axes is not None and (x.live or isinstance(axis, Known)):
        within(x, axis, "a split")
    if is_live(indices_or_sections):
        raise Refused("token-count", "an array is cut at a number of tokens")
    part = resized(c, x, axis)
    match indices_or_sections:
        case Known(value=int(number)):
            return Tuple((part,) * number)
        case Tuple(items=items):
            return Tuple((part,) * (len(items) + 1))
        case Items(items=list() as items):
            return Tuple((part,) * (len(items) + 1))
    return Iterable_(part)


@rule("each entry along an axis is repeated; without one, of the flattened array", "repeat")
def repeat(c: Context, a: Value, repeats: Value, axis: Value = NONE, **rest: Value) -> Value:
    x = array(a)
    if x.axes is None:
        return PARAMETER
    within(x, axis, "a repetition")
    if is_live(repeats):
        raise Refused("token-count", "repeated by a number of tokens")
    return resized(c, x, axis) if axis != NONE else Array((feature(),))


@rule("the array is repeated along each axis; axes of tokens may only be taken once", "tile")
def tile(c: Context, a: Value, reps: Value, **rest: Value) -> Value:
    x = array(a)
    if not x.live and not is_live(reps):
        return PARAMETER
    numbers = items_of(reps)
    if x.axes is None or x.open or len(numbers) > len(x.axes):
        axes = _shape_axes(reps)
        if x.axes is not None and not x.open and axes is not None and not is_live(reps):
            extra = len(axes) - len(x.axes)
            x = Array((((),) * extra) + x.axes)
        else:
            raise Refused("unknown-operation", "a tiling whose axes are not known")
    assert x.axes is not None
    made = list(x.axes)
    for offset in range(1, len(numbers) + 1):
        place, number = len(made) - offset, numbers[len(numbers) - offset]
        if number == Known(1):
            continue
        if isinstance(number, Count) and number.exact and not made[place]:
            made[place] = (*number.factors, *feature(number.rest))
        elif tokens(made[place]) or is_live(number):
            raise Refused("row-mixing", f"a tiling along a token axis of {x}")
        else:
            made[place] = feature(("at", c.here(), place))
    return distinct(Array(tuple(made)))


@rule("zeros are put around; axes of tokens must get none", "pad")
def pad(c: Context, a: Value, pad_width: Value, *rest: Value, **more: Value) -> Value:
    x = array(a)
    if not x.live:
        return PARAMETER if not is_live(pad_width) else _refuse_count("padded")
    assert x.axes is not None
    widths = listed(pad_width) if isinstance(pad_width, (Tuple, Items)) else []
    if is_live(pad_width) or len(widths) != len(x.axes) or x.open:
        raise Refused("length-dependent", f"{describe(x)} are padded")
    made = list(x.axes)
    for i, width in enumerate(widths):
        nothing = isinstance(width, Tuple) and all(w == Known(0) for w in width.items)
        if nothing:
            continue
        if tokens(made[i]):
            raise Refused("length-dependent", f"a token axis of {x} is padded")
        made[i] = feature(("at", c.here(), i))
    return Array(tuple(made))


def _refuse_count(what: str) -> Value:
    raise Refused("token-count", f"{what} by a number of tokens")


@rule("entries move along the axes and around the end; without one, of all", "roll")
def roll(c: Context, a: Value, shift: Value, axis: Value = NONE, **rest: Value) -> Value:
    x = _along(c, a, axis, "a roll")
    if is_live(shift):
        raise Refused("token-count", "rolled by what single tokens say")
    return x


@rule("the entries of the last two axes are told apart by where they are", "tril", "triu")
def triangle(c: Context, a: Value, *rest: Value, **more: Value) -> Value:
    x = array(a)
    if x.axes is None:
        return PARAMETER
    within(x, Tuple((Known(-2), Known(-1))), "a triangle")
    return x


# --------------------------------------------------------------------------- choosing


@rule("entries along an axis, by index", "take")
def take(c: Context, a: Value, indices: Value, axis: Value = NONE, **rest: Value) -> Value:
    x, chosen = array(a), array(indices)
    if not x.live and not chosen.live:
        return PARAMETER
    if x.axes is None:
        assert chosen.axes is not None
        if axis == Known(0):
            return Array(chosen.axes, True)
        if axis == Known(-1) or axis == NONE:
            return Array(chosen.axes)
        raise Refused("unknown-operation", "entries of a parameter of unknown rank")
    if axis == NONE and len(x.axes) > 1:
        raise Refused(
            "row-mixing" if x.live else "unknown-operation", "entries of the flattened array"
        )
    index = axis_index(x, Known(0) if axis == NONE else axis)
    if tokens(axis_at(x, index)):
        raise Refused("row-mixing", f"rows are chosen by index along a token axis of {x}")
    if x.live and chosen.live:
        raise Refused("row-mixing", "entries of each row for each row", "take_along_axis")
    inner = chosen.axes if chosen.axes is not None else (feature(),)
    if index == TRAILING:
        return x
    return distinct(Array((*x.axes[:index], *inner, *x.axes[index + 1 :]), x.open))


@rule("entries along an axis, each row by its own indices", "take_along_axis")
def take_along_axis(
    c: Context, a: Value, indices: Value, axis: Value = NONE, **rest: Value
) -> Value:
    x, chosen = array(a), array(indices)
    if not x.live and not chosen.live:
        return PARAMETER
    if x.axes is None or chosen.axes is None:
        raise Refused("unknown-operation", "indices of unknown rank")
    within(x, axis, "a choice by index")
    within(chosen, axis, "a choice by index")
    index = axis_index(chosen, axis)
    if index == TRAILING or x.open or chosen.open or len(x.axes) != len(chosen.axes):
        raise Refused("unknown-operation", "indices of another rank")
    new = chosen.axes[index]
    merged = broadcast([_without(x, index), _without(chosen, index)])
    assert merged.axes is not None
    return Array((*merged.axes[:index], new, *merged.axes[index + 1 :]))


def _without(x: Array, index: int) -> Array:
    assert x.axes is not None
    return Array((*x.axes[:index], (), *x.axes[index + 1 :]))


@rule("entries along an axis are replaced, in each row at its own indices", "put_along_axis")
def put_along_axis(
    c: Context, a: Value, indices: Value, values: Value, axis: Value = NONE, **rest: Value
) -> Value:
    x = array(a)
    chosen = array(take_along_axis(c, a, indices, axis))
    broadcast([chosen, array(values)])
    if not x.live and chosen.live:
        raise Refused("row-mixing", "rows write into one parameter")
    return x


# --------------------------------------------------------------------------- products


@rule("sums over the last axis of the left and the last but one of the right", "matmul")
def matmul(c: Context, a: Value, b: Value, **rest: Value) -> Value:
    x, y = array(a), array(b)
    if not x.live and not y.live:
        return PARAMETER
    for part in (x, y):
        if part.tag:
            _tagged(part)
    if x.axes is None:
        raise Refused("unknown-operation", f"a parameter of unknown rank times {y}")
    within(x, Known(-1), "a product")
    if y.axes is None:
        c.assume("a parameter of a shape that is not known is a matrix")
        return resized(c, x, Known(-1))
    if x.open or y.open:
        if len(y.axes) <= 2 and not y.live:
            return x
        raise Refused("unknown-operation", "a product of arrays of unknown rank")
    if len(y.axes) == 1:
        within(y, Known(0), "a product")
        return Array(x.axes[:-1])
    within(y, Known(-2), "a product")
    if len(x.axes) == 1:
        return Array((*y.axes[:-2], y.axes[-1]))
    batch = broadcast([Array(x.axes[:-2]), Array(y.axes[:-2])])
    assert batch.axes is not None
    return distinct(Array((*batch.axes, x.axes[-2], y.axes[-1])))


@rule("a product, and an addition", "addmm")
def addmm(c: Context, addend: Value, a: Value, b: Value, *rest: Value, **more: Value) -> Value:
    return elementwise(c, addend, matmul(c, a, b))


@rule("a product with packed weights: sums over the last axis", "quantized_matmul")
def quantized_matmul(c: Context, x: Value, w: Value, *rest: Value, **more: Value) -> Value:
    if live(w):
        raise Refused("unknown-operation", "packed weights made from tokens")
    left = array(x)
    if not left.live:
        return PARAMETER
    within(left, Known(-1), "a product")
    return resized(c, left, Known(-1))


@rule("each row of a batch times the matrix its index names", "gather_mm", "gather_qmm")
def gather_mm(
    c: Context,
    a: Value,
    b: Value,
    *rest: Value,
    lhs_indices: Value = NONE,
    rhs_indices: Value = NONE,
    sorted_indices: Value = NO,  # a hint, which changes no value
    **more: Value,
) -> Value:
    x = array(a)
    if live(b) or lhs_indices != NONE:
        raise Refused("unknown-operation", "a gathered product of other than parameters")
    if rhs_indices == NONE:
        raise Refused("unknown-operation", "a gathered product without indices")
    chosen = array(rhs_indices)
    if chosen.tag:
        _tagged(chosen)
    if not x.live and not chosen.live:
        return PARAMETER
    if x.axes is None or x.open or len(x.axes) < 2 or chosen.axes is None or chosen.open:
        raise Refused("unknown-operation", "a gathered product of unknown rank")
    within(x, Known(-1), "a product")
    batch = broadcast([Array(x.axes[:-2]), chosen])
    assert batch.axes is not None
    return distinct(Array((*batch.axes, x.axes[-2], feature(("at", c.here())))))


@rule("letters that the result lacks are summed over", "einsum")
def einsum(c: Context, subscripts: Value, *operands: Value, **rest: Value) -> Value:
    arrays = [array(v) for v in operands]
    if not any(x.live for x in arrays):
        return PARAMETER
    text = subscripts.value if isinstance(subscripts, Known) else None
    if not isinstance(text, str) or "->" not in text or "." in text:
        raise Refused("unknown-operation", "an einsum that is not spelled out")
    left, result = text.replace(" ", "").split("->")
    letters: dict[str, Axis] = {}
    for part, x in zip(left.split(","), arrays, strict=True):
        if x.axes is None:
            continue
        if len(part) != len(x.axes) or x.open:
            raise Refused("unknown-operation", f"an einsum of {part} for {describe(x)}")
        for letter, axis in zip(part, x.axes, strict=True):
            letters[letter] = combine(letters[letter], axis) if letter in letters else axis
    for letter, axis in letters.items():
        if letter not in result and tokens(axis):
            raise Refused("row-mixing", f"an einsum sums over a token axis, {letter}")
    return distinct(Array(tuple(letters.get(letter, feature()) for letter in result)))


@rule("the outer product of two flattened arrays", "outer", "inner", "tensordot", "kron")
def products(c: Context, a: Value, b: Value, *rest: Value, **more: Value) -> Value:
    if live(a) or live(b):
        raise Refused("row-mixing", "a product of all elements with all", "a matmul")
    return PARAMETER


@rule("channels last: a window along the middle axes", "conv1d", "conv2d", "conv_general")
def convolution(c: Context, a: Value, weight: Value, *rest: Value, **more: Value) -> Value:
    x = array(a)
    if live(weight):
        raise Refused("row-mixing", "a convolution whose weights are tokens")
    if not x.live:
        return PARAMETER
    if x.axes is None or x.open or len(x.axes) < 3:
        raise Refused("unknown-operation", "a convolution of unknown rank")
    numbers = tuple(Known(i) for i in range(1, len(x.axes)))
    within(x, Tuple(numbers), "a convolution")
    made = [feature(("at", c.here(), i)) for i in range(1, len(x.axes))]
    return Array((x.axes[0], *made))


@rule("groups along the last axis", "quantize")
def quantize(c: Context, w: Value, *rest: Value, **more: Value) -> Value:
    x = array(w)
    if not x.live:
        return Iterable_(PARAMETER)
    within(x, Known(-1), "a quantisation")
    part = resized(c, x, Known(-1))
    return Tuple((part, part, part))


@rule("groups along the last axis", "dequantize")
def dequantize(
    c: Context, w: Value, scales: Value, biases: Value = NONE, *rest: Value, **more: Value
) -> Value:
    x = array(w)
    if not x.live and not live(scales):
        return PARAMETER
    merged = broadcast([array(v) for v in (w, scales, biases) if v != NONE])
    within(merged, Known(-1), "a dequantisation")
    return resized(c, merged, Known(-1))


@rule("a butterfly over the last axis", "hadamard_transform")
def hadamard(c: Context, a: Value, *rest: Value, **more: Value) -> Value:
    return _along(c, a, Known(-1), "a transform")


# --------------------------------------------------------------------------- fused


@rule("each row is scaled by the mean over its last axis", "fast.rms_norm", "fast.layer_norm")
def fast_norm(c: Context, a: Value, weight: Value = NONE, *rest: Value, **more: Value) -> Value:
    x = array(a)
    if live(weight):
        return broadcast([_along(c, a, Known(-1), "a norm"), array(weight)])
    return _along(c, x, Known(-1), "a norm")


@rule("a row is turned by its own position: offset plus its place on the last axis but one",
      "fast.rope")  # fmt: skip
def rope(c: Context, a: Value, *rest: Value, offset: Value = ZERO, **more: Value) -> Value:
    return turned(c, array(a), offset)


_UNTURNED = (
    "position-special",
    "a rotary embedding that does not count from the cache's offset",
    "offset=cache.offset, or that plus a number",
)


def turned(c: Context, x: Array, offset: Value) -> Array:
    """A rotary embedding: the offset must be each row's own position, where rows are tokens."""
    if not x.live:
        return x
    if offset == NONE:
        raise Dead
    if c.sequences:
        if x.open or len(x.axes or ()) < 3 or not leads(x):
            raise Refused("row-mixing", f"a rotary embedding of {describe(x)}")
        if is_live(offset) and array(offset).axes != ((ROWS,),):
            raise Refused("row-mixing", "a rotary embedding from other than positions [rows]")
        return x
    if not is_live(offset):
        return Array(x.axes, x.open, ("unturned", c.here()))  # for calls without a cache
    if not isinstance(offset, Array) or offset.tag[:1] != ("start",):
        raise Refused(*_UNTURNED)
    head, last = (x.axes or ())[:1], (x.axes or ())[-2:-1]
    if x.open or head != ((ROWS,),) or last != ((LENGTH,),) or len(x.axes or ()) < 3:
        raise Refused(
            "position-special",
            f"a rotary embedding of {describe(x)}",
            "[rows]...[length][features]",
        )
    within(x, Known(-1), "a rotary embedding")
    return x


@rule("every query sees every key along the last axis but one",
      "fast.scaled_dot_product_attention")  # fmt: skip
def attention(
    c: Context, q: Value, k: Value, v: Value, *, mask: Value = NONE, **more: Value
) -> Value:
    for part in (k, v):
        x = array(part)
        if x.axes is None or x.open:
            raise Refused("unknown-operation", "attention to keys of unknown rank")
        within(x, Known(-2), "attention")
    keys = array(k)
    assert keys.axes is not None
    merged = broadcast([_without(array(q), len(keys.axes) - 2), _without(keys, len(keys.axes) - 2)])
    assert merged.axes is not None
    queries = array(q)
    assert queries.axes is not None
    scores = Array((*merged.axes[:-2], queries.axes[-2], keys.axes[-2]))
    if is_live(mask) and broadcast([scores, array(mask)]).axes != scores.axes:
        raise Refused("row-mixing", f"a mask of {describe(array(mask))}")
    return Array((*scores.axes[:-1], feature()))  # type: ignore[index]


# --------------------------------------------------------------------------- several machines


@rule("every machine has the same rows", "distributed.all_sum", "distributed.send",
      "distributed.recv_like")  # fmt: skip
def exchanged(c: Context, a: Value, *rest: Value, **more: Value) -> Value:
    return array(a)


@rule("the machines' rows behind each other", "distributed.all_gather")
def all_gather(c: Context, a: Value, *rest: Value, **more: Value) -> Value:
    x = array(a)
    if x.axes is None:
        return PARAMETER
    return Array(((Factor("feature", "machines"), *x.axes[0]), *x.axes[1:]), x.open)


@rule("an array of the given shape from another machine", "distributed.recv")
def recv(c: Context, shape: Value, *rest: Value, **more: Value) -> Value:
    return constant_array(c, shape)


@rule("nothing comes back", "eval", "async_eval", "synchronize", "clear_cache")
def nothing(c: Context, *values: Value, **others: Value) -> Value:
    return CONSTANT
