"""Recognises `softmax(mask(cap(q @ k^T))) @ v` in a graph of values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .ir import Value
from .match import is_none_test, library_call, live, method_call, same
from .program import Program


@dataclass(frozen=True, eq=False, slots=True)
class Spelled:
    """Attention written out. `raw_*` are the values as they are before heads are regrouped."""

    product: Value
    queries: Value  # without the scale
    raw_queries: Value  # with it
    keys: Value
    values: Value
    raw_keys: Value
    raw_values: Value
    scale: Value | None
    rescale: tuple[str, Value] | None  # "*" or "/" and what scores are scaled by after the product
    softcap: Value | None
    mask: Value | None
    added: bool  # the mask, without a look at its type: upstream, a boolean one hides nothing


@dataclass(frozen=True, eq=False, slots=True)
class _Masking:
    """A mask applied to scores: chosen by, or added."""

    mask: Value
    added: bool


def _along_keys(softmax: Value) -> bool:
    """The axis is the last: without one all scores would be normalised together."""
    given = list(zip(softmax.data, softmax.args[1:], strict=True))
    axes = [value for keyword, value in given if keyword == "axis"]
    axes += [value for keyword, value in given[1:2] if keyword is None]
    return len(axes) == 1 and number(axes[0]) == -1


def spelled_attention(
    program: Program, product: Value, fetched: Callable[[Value, int], bool]
) -> Spelled | None:
    """Match `product` as the second matrix product of attention.

    `fetched(value, 0)` and `(value, 1)` tell whether a value is the fetched keys or values.
    """
    if product.op != "binary" or product.data != "@":
        return None
    raw_values = _ungrouped(program, product.args[1])
    if raw_values is None or not fetched(raw_values, 1):
        return None
    weights = _uncast(product.args[0])
    softmax = library_call(program, weights, "mlx.core.softmax")
    if not softmax or not _along_keys(weights):
        return None
    scores, maskings = _unmasked(program, _uncast(softmax[0]))
    if len({id(one.mask) for one in maskings}) > 1:
        return None
    scores, softcap = _uncapped(program, scores)
    scores, rescale = _unscaled(_uncast(scores))
    if scores.op != "binary" or scores.data != "@":
        return None
    turned = method_call(scores.args[1], "swapaxes", "transpose", "moveaxis")
    if turned is None:
        return None
    raw_keys = _ungrouped(program, turned)
    if raw_keys is None or not fetched(raw_keys, 0):
        return None
    raw_queries = _ungrouped_queries(scores.args[0])
    queries, scale = raw_queries, None
    if raw_queries.op == "binary" and raw_queries.data == "*":
        queries, scale = raw_queries.args
    mask = maskings[0].mask if maskings else None
    return Spelled(
        product,
        queries,
        raw_queries,
        raw_keys,
        raw_values,
        raw_keys,
        raw_values,
        scale,
        rescale,
        softcap,
        mask,
        any(one.added for one in maskings),
    )


def _uncast(value: Value) -> Value:
    while True:
        inner = method_call(value, "astype")
        if inner is None:
            return value
        value = inner


def _unscaled(scores: Value) -> tuple[Value, tuple[str, Value] | None]:
    """`(q @ k^T) * s` gives the product and ("*", s)."""
    if scores.op == "binary" and scores.data in ("*", "/"):
        inner = _uncast(scores.args[0])
        if inner.op == "binary" and inner.data == "@":
            return inner, (scores.data, scores.args[1])
    return scores, None


def _ungrouped(program: Program, value: Value) -> Value | None:
    """Keys before they are spread over the query heads of their group (head h reads h // group)."""
    value = live(value)
    if value.op == "phi":
        first, second = (_ungrouped(program, part) for part in value.args[1:])
        return first if first is not None and first is second else None
    expanded = library_call(program, value, "mlx.core.expand_dims")
    if expanded and len(expanded) == 2 and expanded[1].op == "const" and expanded[1].data == 2:
        return _ungrouped(program, expanded[0])
    if value.op == "call" and value.args[0].op == "global":
        function = program.function_of(value.args[0].data)
        if function is not None and len(value.args) > 1 and _repeats_heads(program, function):
            return _ungrouped(program, value.args[1])
        return None
    return value


def _repeats_heads(program: Program, function: object) -> bool:
    """A function that returns its first parameter, or it repeated over the heads of a group.

    Repeated means: a new axis 2, broadcast, and reshaped to four dimensions, so that query head h
    reads key head h divided by the group.
    """
    from .ir import Method

    assert isinstance(function, Method)
    if not function.params or not function.returns:
        return False
    first = function.params[0]
    for effect in function.returns:
        value = effect.value
        if value is first:
            continue
        reshaped = method_call(value, "reshape")
        spread = library_call(program, reshaped, "mlx.core.broadcast_to") if reshaped else None
        if not spread or len(value.args) != 5:
            return False
        grown = library_call(program, spread[0], "mlx.core.expand_dims")
        if not grown or grown[0] is not first or len(grown) != 2 or grown[1].data != 2:
            return False
    return True


def _ungrouped_queries(value: Value) -> Value:
    """Queries before `reshape(B, kv_heads, group, L, D)`."""
    value = live(value)
    if value.op == "phi":
        arms = [_ungrouped_queries(part) for part in value.args[1:]]
        return arms[0] if arms[0] is arms[1] else value
    inner = method_call(value, "reshape")
    if inner is not None and len(value.args) == 6:
        return inner
    return value


def _unmasked(program: Program, value: Value) -> tuple[Value, list[_Masking]]:
    """Scores before a mask was applied, and the parameters that were the mask."""
    if value.op == "phi":
        return _unmasked_branch(program, value)
    chosen = library_call(program, value, "mlx.core.where")
    if chosen and len(chosen) == 3 and is_lowest(program, chosen[2]):
        mask = _mask_parameter(chosen[0])
        if mask is not None:
            scores, others = _unmasked(program, chosen[1])
            return scores, [*others, _Masking(mask, False)]
    if value.op == "binary" and value.data == "+":
        for scores, other in (value.args, value.args[::-1]):
            mask = _mask_parameter(other)
            if mask is not None and other is not scores:
                inner, others = _unmasked(program, scores)
                return inner, [*others, _Masking(mask, True)]
    return value, []


def _unmasked_branch(program: Program, value: Value) -> tuple[Value, list[_Masking]]:
    """Of a branch: it may only ask whether there is a mask, and of which type it is."""
    test, *ways = value.args
    if test.op == "const":
        return _unmasked(program, ways[0] if test.data else ways[1])
    (one, first), (two, second) = (_unmasked(program, way) for way in ways)
    if one is not two:
        return value, []
    none = is_none_test(test)
    if none is not None:
        present, absent = (second, first) if none[1] else (first, second)
        if not absent and all(none[0] is found.mask for found in present):
            return one, present
    boolean = _boolean_test(program, test)
    if boolean is not None:
        chosen, added = (first, second) if boolean[1] else (second, first)
        masks = [found.mask for found in (*chosen, *added)]
        sorted_out = all(not c.added for c in chosen) and all(a.added for a in added)
        if chosen and sorted_out and all(_mask_parameter(boolean[0]) is m for m in masks):
            return one, chosen
    return value, []


def _boolean_test(program: Program, test: Value) -> tuple[Value, bool] | None:
    """`m.dtype == mx.bool_` gives (m, True), `!=` (m, False)."""
    if test.op != "compare" or len(test.data) != 1 or test.data[0] not in ("==", "!="):
        return None
    left, right = test.args
    if left.op != "attr" or left.data != "dtype" or right.op != "global":
        return None
    if program.resolve(right.data) != "mlx.core.bool_":
        return None
    return left.args[0], test.data[0] == "=="


def _mask_parameter(value: Value) -> Value | None:
    """The one parameter a mask is, possibly chosen between it and a causal array."""
    if value.op == "param":
        return value
    if value.op == "phi":
        found = [part for part in value.args[1:] if part.op == "param"]
        return found[0] if len(found) == 1 else None
    return None


def _uncapped(program: Program, value: Value) -> tuple[Value, Value | None]:
    """`cap * tanh(scores / cap)` gives (scores, cap)."""
    if value.op == "binary" and value.data == "*":
        for bent, cap in (value.args, value.args[::-1]):
            inner = library_call(program, bent, "mlx.core.tanh")
            if inner and inner[0].op == "binary" and inner[0].data == "/":
                scores, divisor = inner[0].args
                if same(divisor, cap):
                    return scores, cap
    return value, None


def turned_rows(program: Program, value: Value) -> Value | None:
    """`x` in a value that is x with its last two of four axes (or of any number) exchanged."""
    x = method_call(value, "swapaxes", "transpose")
    order = value.args[1:] if x is not None else ()
    name = value.args[0].data if x is not None else ""
    if x is None:
        got = library_call(program, value, "mlx.core.swapaxes")
        if not got:
            return None
        x, order, name = got[0], got[1:], "swapaxes"
    numbers = tuple(number(part) for part in order)
    if name == "swapaxes":
        return x if numbers in ((-1, -2), (-2, -1), (2, 3), (3, 2)) else None
    return x if numbers == (0, 1, 3, 2) else None


def is_lowest(program: Program, value: Value) -> bool:
    """A number that no score falls below: a type's least one, minus infinity, or -1e9 and less."""
    got = library_call(program, value, "mlx.core.array")
    if got:
        value = got[0]
    if value.op == "attr" and value.data == "min":
        return library_call(program, value.args[0], "mlx.core.finfo") is not None
    if value.op == "unary" and value.data == "-":
        inner = value.args[0]
        if inner.op == "global":
            return inner.data in ("mlx.core.inf", "math.inf", "numpy.inf")
        word = library_call(program, inner, "builtins.float")
        if word:
            return word[0].data in ("inf", "infinity")
    least = number(value)
    return isinstance(least, (int, float)) and least <= -1e9


def number(value: Value) -> object:
    """The number a value is, with its sign."""
    if value.op == "unary" and value.data == "-" and value.args[0].op == "const":
        inner = value.args[0].data
        return -inner if isinstance(inner, (int, float)) else None
    return value.data if value.op == "const" else None
