"""Branches that no row takes: tests whose end follows from what masks and caches are on rows.

a mask of attention        is no array and no word: the op in its place takes masks of rows only
`cache.offset`             is an array with one axis
`getattr(cache, x, None)`  is None, `hasattr(cache, x)` False, for what padded batches keep
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from .ir import Effect, Method, Value
from .program import Program

# What caches of padded batches, and none of a paged view, has under these names.
_PADDED = frozenset({"left_padding", "lengths", "extract", "merge"})
_MASK_TYPES = frozenset({"mlx.core.array", "builtins.str"})

Decide = Callable[[Value], bool | None]


def decided(
    program: Program, test: Value, masks: Iterable[int] = (), own: Decide | None = None
) -> bool | None:
    """How a test ends on rows, if that is known. `masks` are ids of values that are masks of
    attention; `own` knows more tests."""
    masks = frozenset(masks)
    return _Tests(program, masks, own).end(test, 0)


class _Tests:
    def __init__(self, program: Program, masks: frozenset[int], own: Decide | None) -> None:
        self.program = program
        self.masks = masks
        self.own = own

    def end(self, test: Value, depth: int) -> bool | None:
        if self.own is not None and (known := self.own(test)) is not None:
            return known
        if test.op == "const":
            return bool(test.data)
        if test.op == "bool":
            sides = [self.end(part, depth) for part in test.args]
            stop = bool(test.data == "or")
            if stop in sides:
                return stop
            return None if None in sides else not stop
        if test.op == "unary" and test.data == "not":
            inner = self.end(test.args[0], depth)
            return None if inner is None else not inner
        if test.op == "phi":
            known = self.end(test.args[0], depth)
            return None if known is None else self.end(test.args[1 if known else 2], depth)
        if test.op == "compare":
            return self._compared(test)
        if test.op == "call" and test.args[0].op == "global":
            return self._called(test, depth)
        return None

    def _compared(self, test: Value) -> bool | None:
        """`cache.offset.ndim > 0`, and whether what nobody has is None."""
        if len(test.data) != 1:
            return None
        left, right = test.args
        if right.op != "const":
            return None
        if left.op == "attr" and left.data == "ndim" and is_offset(left.args[0]):
            kept = {">": right.data < 1, "==": right.data == 1} if right.data is not None else {}
            return kept.get(test.data[0])
        if right.data is None and self._is_absent(left):
            return {"is": True, "is not": False}.get(test.data[0])
        return None

    def _called(self, test: Value, depth: int) -> bool | None:
        name = self.program.resolve(test.args[0].data)
        given = test.args[1:]
        if name == "builtins.isinstance" and len(given) == 2 and given[1].op == "global":
            kind = self.program.resolve(given[1].data)
            if id(given[0]) in self.masks and kind in _MASK_TYPES:
                return False
            if is_offset(given[0]):
                return {"mlx.core.array": True, "builtins.int": False}.get(kind)
            return False if self._is_absent(given[0]) else None
        if name == "builtins.hasattr" and len(given) == 2 and given[1].op == "const":
            return False if given[1].data in _PADDED else None
        function = self.program.function_of(name)
        if function is None or depth > 2 or len(function.returns) != 1:
            return None
        if any(effect.kind not in ("call", "return") for effect in function.effects):
            return None
        return self.end(function.returns[0].value, depth + 1)

    def _is_absent(self, value: Value) -> bool:
        """`getattr(cache, "left_padding", None)`."""
        if value.op != "call" or value.args[0].op != "global" or len(value.args) != 4:
            return False
        if self.program.resolve(value.args[0].data) != "builtins.getattr":
            return False
        name, default = value.args[2:]
        nothing = default.op == "const" and default.data is None
        return nothing and name.op == "const" and name.data in _PADDED


def is_offset(value: Value) -> bool:
    """`cache.offset`, and no attribute of a layer."""
    if value.op != "attr" or value.data != "offset" or value.args[0].op == "attr":
        return False
    return value.args[0].op != "param" or value.args[0].data[1] != "self"


def is_dead(effect: Effect, decide: Decide) -> bool:
    """The effect stands behind a test that ends the other way."""
    return any(decide(test) is (not held) for test, held in effect.path.conditions)


def live_values(method: Method, decide: Decide) -> Iterator[Value]:
    """Values of a method that can come to be: not those of branches that are not taken, nor those
    behind an `and` or `or` that has ended."""
    effects = [effect for effect in method.effects if not is_dead(effect, decide)]
    skipped = {id(value) for effect in method.effects for value in _behind(effect, decide)}
    seen: set[int] = set()
    for effect in effects:
        stack = [root for root in _roots(effect) if id(root) not in skipped]
        while stack:
            value = stack.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            yield value
            stack.extend(_parts(value, decide))


def _roots(effect: Effect) -> list[Value]:
    roots = [effect.value, effect.target, *(test for test, _ in effect.path.conditions)]
    return [root for root in roots if root is not None]


def _parts(value: Value, decide: Decide) -> tuple[Value, ...]:
    """What a value is computed from, in the branches that are taken."""
    if value.op == "phi" and (known := decide(value.args[0])) is not None:
        return (value.args[1 if known else 2],)
    if value.op == "bool":
        stop = value.data == "or"
        for place, part in enumerate(value.args):
            if decide(part) is stop:
                return value.args[: place + 1]
    return value.args


def _behind(effect: Effect, decide: Decide) -> Iterator[Value]:
    """What is written behind an `and` or `or` of the effect's tests that has ended."""
    for test, _ in effect.path.conditions:
        for value in test.walk():
            if value.op == "bool":
                for part in value.args[len(_parts(value, decide)) :]:
                    inside = range(part.span.start, part.span.end)
                    yield from (inner for inner in part.walk() if inner.span.start in inside)
