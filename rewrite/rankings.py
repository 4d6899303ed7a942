"""Recognises the two halves of attention to ranked positions in graphs of values.

An indexer scores every cached position for a row and returns the places of the best:

    argpartition(where(mask, sum over heads of (max(q @ k^T, 0) * w), lowest), -n)[..., -n:]

and None while there are no more than n. Attention then reads the fetched arrays at those places, or
masks all others, which comes to the same. DeepSeek-V3.2, arXiv 2512.02556, section 2.1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from .ir import Effect, Method, Miss, Stmt, Value
from .match import (
    Fetch,
    Mixer,
    callee_name,
    every_value,
    is_none_test,
    library_call,
    live,
    method_call,
    same,
)
from .program import Program
from .softmax import is_lowest, number, turned_rows
from .states import Reach

_RANKINGS = ("mlx.core.argpartition", "mlx.core.argsort", "mlx.core.topk", "mlx.core.partition")


def ranks(mixer: Mixer) -> list[Effect]:
    """Calls that rank, by the class or by a module it holds, unless they choose no keys: a class
    that attends to the very keys that it fetches ranks something else."""
    calls = Reach(mixer).calls()
    found = [e for e in calls if callee_name(mixer.program, e.value) in _RANKINGS]
    fetched = {id(fetch.call) for fetch in mixer.fetches}
    seen = [part for a in mixer.attends for part in (a.keys, a.values, a.mask) if part is not None]
    made = any(v.op == "call" for part in seen for v in _before(part, fetched))
    return found if made or not seen else []


def _before(value: Value, fetched: Collection[int]) -> Iterator[Value]:
    """What a value is made of, as far as the fetches."""
    seen: set[int] = set()
    queue = [value]
    while queue:
        one = live(queue.pop())
        if id(one) not in seen and id(one) not in fetched:
            seen.add(id(one))
            yield one
            queue += one.args


@dataclass(frozen=True, eq=False, slots=True)
class Ranking:
    """An indexer. `scores` are the masked scores of all positions, `result` what is returned."""

    method: Method
    fetch: Fetch
    queries: Value
    keys: Value
    weights: Value
    count: Value
    mask: Value
    scores: Value
    result: Effect
    short: Effect  # `return None`, while there are few positions
    upkeep: tuple[Effect, ...]  # stores that only keep the cache's second array small


def ranking(mixer: Mixer, kind: str) -> Ranking | Miss:
    """The class as an indexer, or the first fact that is missing."""

    def miss(missing: str, where: Value | Effect | None = None) -> Miss:
        return Miss(kind, 2, missing, mixer.place(where) if where is not None else None)

    program = mixer.program
    if len(mixer.fetches) != 1 or mixer.attends or mixer.state_stores:
        return miss("one fetch of keys and no attention")
    fetch = mixer.fetches[0]
    method = fetch.method
    given = [e for e in method.returns if not _is_none(e.value)]
    nothing = [e for e in method.returns if _is_none(e.value)]
    if len(given) != 1 or len(nothing) != 1:
        return miss("ranked positions are returned, or None", fetch.call)
    plain = given[0]
    found = _ranked(program, plain.value)
    if found is None:
        return miss("the places of the highest scores are returned", plain)
    scores, count = found
    masked = _masked(program, scores)
    if masked is None:
        return miss("scores that the mask bars get the lowest value", scores)
    raw, mask = masked
    product = _summed(program, raw)
    if product is None or product.op != "binary" or product.data != "*":
        return miss("scores are summed over heads", raw)
    weighed = _weighed(program, product)
    if weighed is None:
        return miss("products below zero count as zero, the others by a weight", product)
    inner, weights = weighed
    keys = turned_rows(program, inner.args[1]) if inner.op == "binary" else None
    if inner.op != "binary" or inner.data != "@" or keys is None:
        return miss("scores are products of queries and keys", inner)
    if not is_fetched(mixer, fetch, keys, 0) or _reaches(inner.args[0], fetch):
        return miss("queries meet the fetched keys", inner)
    if _reaches(weights, fetch):
        return miss("weights do not depend on what is fetched", weights)
    if not _is_few(nothing[0], keys, count, mixer, fetch):
        return miss("None is returned while there are no more positions than wanted", nothing[0])
    upkeep = tuple(e for e in method.effects if _is_upkeep(program, mixer, e))
    handled = {id(part) for e in upkeep for part in (e.target, *e.value.args)}
    reads = [read for read in mixer.cache_reads() if id(read) not in handled]
    if reads:
        return miss("caches are only fetched from", reads[0])
    second = next((v for v in every_value(method) if v.op == "item" and _is_second(v, fetch)), None)
    if second is not None:
        return miss("nothing is fetched but keys", second)
    queries = inner.args[0]
    return Ranking(
        method, fetch, queries, keys, weights, count, mask, scores, plain, nothing[0], upkeep
    )


def is_fetched(mixer: Mixer, fetch: Fetch, value: Value, position: int) -> bool:
    found = live(value, mixer.is_cache)
    return found.op == "item" and found.data == position and found.args[0] is fetch.call


def statements_of(ranked: Ranking) -> list[Stmt]:
    """The body's own statements that work on scores, the return in the end: they go."""
    derived = [v for v in ranked.result.value.walk() if _reaches(v, ranked.fetch)]
    places = [v.span.start for v in derived if not _is_part_of_fetch(v, ranked)]
    places.append(ranked.short.statement.span.start)
    return [
        statement
        for statement in ranked.method.function.body
        if any(statement.span.start <= at < statement.span.end for at in places)
    ]


def _is_part_of_fetch(value: Value, ranked: Ranking) -> bool:
    """The fetch, its items, and the choice between them and what there was without a cache."""
    if value is ranked.fetch.call or value is ranked.keys:
        return True
    return value.op == "item" and value.args[0] is ranked.fetch.call


def _is_second(value: Value, fetch: Fetch) -> bool:
    return value.data == 1 and value.args[0] is fetch.call


def _is_none(value: Value) -> bool:
    return value.op == "const" and value.data is None


def _reaches(value: Value, fetch: Fetch) -> bool:
    return any(part is fetch.call for part in value.walk())


def _ranked(program: Program, value: Value) -> tuple[Value, Value] | None:
    """Scores and number in `argpartition(scores, kth=-n, axis=-1)[..., -n:]`."""
    if value.op != "index" or value.args[1].op != "tuple":
        return None
    keys = value.args[1].args
    if len(keys) != 2 or keys[0].data is not ... or keys[1].op != "slice":
        return None
    lower, upper, step = keys[1].args
    call = value.args[0]
    got = library_call(program, call, "mlx.core.argpartition")
    if not got or not (_is_none(upper) and _is_none(step)):
        return None
    named = dict(zip(call.data, got, strict=True))
    kth, axis = named.get("kth"), named.get("axis")
    if kth is None or axis is None or number(axis) != -1 or call.data[0] is not None:
        return None
    count, again = _negated(lower), _negated(kth)
    if count is None or again is None or not same(count, again):
        return None
    return got[0], count


def _negated(value: Value) -> Value | None:
    return value.args[0] if value.op == "unary" and value.data == "-" else None


def _masked(program: Program, value: Value) -> tuple[Value, Value] | None:
    """Scores and mask in `where(mask, scores, lowest)`, if there is a mask."""
    tested = absent = None
    if value.op == "phi":
        test = is_none_test(value.args[0])
        if test is None:
            return None
        tested, absent = test[0], value.args[1 if test[1] else 2]
        value = value.args[2 if test[1] else 1]
    chosen = library_call(program, value, "mlx.core.where")
    if not chosen or len(chosen) != 3 or not is_lowest(program, chosen[2]):
        return None
    mask, scores, _ = chosen
    if mask.op != "param" or (tested is not None and (tested is not mask or absent is not scores)):
        return None
    return scores, mask


def _summed(program: Program, value: Value) -> Value | None:
    """What is summed over axis 1: `x.sum(axis=1, keepdims=True)`, its slices added, or a choice."""
    if value.op == "phi" and is_none_test(value.args[0]) is None:
        first, second = (_summed(program, part) for part in value.args[1:])
        return first if first is not None and first is second else None
    summed = method_call(value, "sum")
    if summed is not None:
        named = dict(zip(value.data, value.args[1:], strict=True))
        axis, kept = named.get("axis"), named.get("keepdims")
        fits = axis is not None and number(axis) == 1 and kept is not None and kept.data is True
        return summed if fits and len(named) == 2 else None
    got = library_call(program, value, "builtins.sum")
    if not got or len(got) != 1 or got[0].op != "comp" or len(got[0].args) != 2:
        return None
    element, iterable = got[0].args
    bounds = library_call(program, iterable, "builtins.range")
    if element.op != "index" or element.args[1].op != "tuple" or not bounds or len(bounds) != 1:
        return None
    whole, keys = element.args[0], element.args[1].args
    if len(keys) != 2 or any(key.op != "slice" for key in keys):
        return None
    everything = all(_is_none(part) for part in keys[0].args)
    low, high, step = keys[1].args
    one = high.op == "binary" and high.data == "+" and high.args[0] is low
    one = one and number(high.args[1]) == 1 and _is_none(step)
    counted = low.op == "elem" and low.args[0] is iterable
    heads = _extent(bounds[0], 1)
    return whole if everything and one and counted and heads is whole else None


def _weighed(program: Program, product: Value) -> tuple[Value, Value] | None:
    """`x` and `w` in `maximum(x, 0) * w`."""
    for bent, weights in (product.args, product.args[::-1]):
        above = library_call(program, bent, "mlx.core.maximum")
        if above and len(above) == 2 and number(above[1]) == 0:
            return above[0], weights
    return None


def _extent(value: Value, axis: int) -> Value | None:
    """`x` in `x.shape[axis]`."""
    if value.op == "index" and number(value.args[1]) == axis and value.args[0].op == "attr":
        return value.args[0].args[0] if value.args[0].data == "shape" else None
    return None


def _is_few(effect: Effect, keys: Value, count: Value, mixer: Mixer, fetch: Fetch) -> bool:
    """`if keys.shape[2] <= n: return None`, in the method's own body."""
    conditions = effect.path.conditions
    if len(conditions) != 1 or not conditions[0][1]:
        return False
    test = conditions[0][0]
    if test.op != "compare" or test.data != ("<=",) or not same(test.args[1], count):
        return False
    measured = _extent(test.args[0], 2)
    return measured is not None and is_fetched(mixer, fetch, measured, 0)


def _is_upkeep(program: Program, mixer: Mixer, effect: Effect) -> bool:
    """`cache.values = zeros_like(cache.keys)`: nobody reads the second array."""
    target = effect.target
    if effect.kind != "store" or target is None or target.op != "attr" or target.data != "values":
        return False
    got = library_call(program, effect.value, "mlx.core.zeros_like")
    if not got or got[0].op != "attr" or got[0].data != "keys":
        return False
    return mixer.is_cache(target.args[0]) and same(got[0].args[0], target.args[0])


# --------------------------------------------------------------------------- the other half


@dataclass(frozen=True, eq=False, slots=True)
class Selected:
    """Fetched arrays and a mask, cut down to ranked places."""

    places: Value
    side: int  # the arm of the choice that reads the places
    test: Value


def peel(program: Program, value: Value) -> tuple[Value, Selected] | None:
    """What is read at ranked places: `take_along_axis(x, places, 2) if few else x`.

    The arm that does not read masks instead (`peel_mask`); without places (None) all is read.
    """
    given = _if_given(value)
    if given is None:
        return None
    places, chosen, whole = given
    if chosen.op != "phi":
        return None
    for side in (0, 1):
        read, other = chosen.args[1 + side], chosen.args[2 - side]
        got = library_call(program, read, "mlx.core.take_along_axis")
        if other is not whole or not got or len(got) != 3 or number(got[2]) != 2:
            continue
        spread = library_call(program, got[1], "mlx.core.broadcast_to")
        if got[0] is whole and spread and _is_column(program, spread[0], places):
            return whole, Selected(places, side, chosen.args[0])
    return None


def peel_mask(program: Program, value: Value, selected: Selected) -> Value | None:
    """The mask before ranked places were put into it, by the same choice."""
    given = _if_given(value)
    if given is None or not same(given[0], selected.places):
        return None
    _, chosen, mask = given
    if chosen.op != "phi" or not same(chosen.args[0], selected.test):
        return None
    read, barred = chosen.args[1 + selected.side], chosen.args[2 - selected.side]
    there = _if_given(read)
    if there is None or there[0] is not mask or there[2] is not mask:
        return None
    got = library_call(program, there[1], "mlx.core.take_along_axis")
    if not got or got[0] is not mask or not _is_places(program, got[1], selected.places):
        return None
    both = _if_given(barred)
    if both is None or both[0] is not mask or number(got[2]) != -1:
        return None
    joined, alone = both[1], both[2]
    if joined.op != "binary" or joined.data != "&" or joined.args[0] is not alone:
        return None
    return mask if joined.args[1] is mask and _marks(program, alone, selected.places) else None


def _if_given(value: Value) -> tuple[Value, Value, Value] | None:
    """`x`, the arm with x, and the arm without, of a choice by `x is not None`."""
    if value.op != "phi":
        return None
    test = is_none_test(value.args[0])
    if test is None or value.args[0].op not in ("compare", "unary"):
        return None
    with_x, without = (value.args[2], value.args[1]) if test[1] else value.args[1:]
    return test[0], with_x, without


def _is_places(program: Program, value: Value, places: Value) -> bool:
    """The places, also behind `stop_gradient`."""
    got = library_call(program, value, "mlx.core.stop_gradient")
    return value is places or bool(got and got[0] is places)


def _is_column(program: Program, value: Value, places: Value) -> bool:
    """`places[:, :, 0, :, None]`."""
    if value.op != "index" or not _is_places(program, value.args[0], places):
        return False
    if value.args[1].op != "tuple" or len(value.args[1].args) != 5:
        return False
    a, b, row, d, new = value.args[1].args
    slices = all(
        key.op == "slice" and all(_is_none(part) for part in key.args) for key in (a, b, d)
    )
    return slices and number(row) == 0 and row.op == "const" and _is_none(new)


def _marks(program: Program, value: Value, places: Value) -> bool:
    """`put_along_axis(zeros(..., bool), places, True, axis=-1)`."""
    got = library_call(program, value, "mlx.core.put_along_axis")
    if not got or len(got) != 4 or number(got[3]) != -1:
        return False
    blank = library_call(program, got[0], "mlx.core.zeros")
    true = library_call(program, got[2], "mlx.core.array")
    if not blank or not true or true[0].data is not True:
        return False
    boolean = any(part.op == "global" and part.data == "mlx.core.bool_" for part in blank)
    return boolean and _is_places(program, got[1], places)
