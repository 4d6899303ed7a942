"""Calls of what is read: parameters, decorators, and both ways of a branch on token counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ir import Expr, Function, Parameter
from .domain import (
    CONSTANT,
    LENGTH,
    NONE,
    Choice,
    ClassValue,
    CountTest,
    Dead,
    Instance,
    Items,
    Known,
    Library,
    Partial,
    Refused,
    Routine,
    Table,
    Tuple,
    Undefined,
    Value,
    choice,
    is_live,
    join,
    parts,
)
from .library import LibraryCalls
from .machine import Fork, Frame, Scope
from .meanings import MEANINGS, TOKENWISE, digest, meaning_text
from .rules import array
from .shapes import axis_index, describe
from .terms import named, same_terms

_DEEPEST = 60
_ROPE = "initialize_rope"
_CACHED = ("functools.lru_cache", "functools.cache", "functools.cached_property")


class Calls(LibraryCalls):
    def call(self, callee: Value, args: Sequence[Value], more: dict[str, Value]) -> Value:
        match callee:
            case Choice(options=several):
                return self.join_calls(lambda one: self.call(one, args, more), several)
            case Routine():
                return self.call_routine(callee, args, more)
            case ClassValue():
                return self.instantiate(callee, args, more)
            case Partial(function=function, args=first, keywords=keywords):
                return self.call(function, (*first, *args), {**dict(keywords), **more})
            case Library():
                return self.call_library(callee, args, more)
            case Instance():
                return self.call_instance(callee, args, more)
            case Known(value=None) | Undefined():
                raise Dead
        if any(map(is_live, (*args, *more.values()))) or is_live(callee):
            raise Refused("unknown-operation", "a call of something that is not known")
        return CONSTANT

    def call_instance(
        self, layer: Instance, args: Sequence[Value], more: dict[str, Value]
    ) -> Value:
        if layer.cls is not None:
            found = self.member(layer.cls, "__call__")
            if found is not None and isinstance(found[1], Function):
                method = self.decorated(found[1], found[0].module, layer, found[0])
                return self.call(method, args, more)
        return self.call_layer(layer, args, more)

    def decorated(
        self, function: Function, module: str, this: Value | None, owner: ClassValue | None
    ) -> Value:
        """A function with its decorators applied."""
        scope = self.frame.scope if self.frames and owner is None and this is None else None
        if scope is not None and scope.module != module:
            scope = None
        routine: Value = Routine(module, function, scope, this, owner)
        for expr in reversed(function.decorators):
            if expr.op == "name" and expr.data in ("property", "staticmethod", "classmethod"):
                if expr.data == "staticmethod":
                    routine = Routine(module, function, scope, None, owner)
                continue
            if expr.op == "attr" and expr.data in ("setter", "getter"):
                continue
            with self.setup(module):
                self.frame.scope.parent = scope  # of a nested function: names of the one around it
                decorator = self.value(expr)
            if isinstance(decorator, Library) and decorator.name in _CACHED:
                continue
            routine = self.call(decorator, (routine,), {})
        return routine

    def call_routine(
        self, routine: Routine, args: Sequence[Value], more: dict[str, Value]
    ) -> Value:
        if routine.module in self.ropes and getattr(routine.syntax, "name", "") == _ROPE:
            return self.rope()
        owner = routine.owner.qualified if routine.owner is not None else routine.module
        name = f"{owner}.{getattr(routine.syntax, 'name', '')}"
        if self.forward and (name in MEANINGS or name in TOKENWISE):
            found = self.by_meaning(name, routine, args, more)
            if found is not None:
                return found
        if len(self.frames) > _DEEPEST:
            raise Refused("unknown-operation", "calls nest too deeply")
        return self.call_bound_names(routine, self.bind(routine, args, more))

    def by_meaning(
        self, name: str, routine: Routine, args: Sequence[Value], more: dict[str, Value]
    ) -> Value | None:
        """A function that is known by its text; None if the text is another one."""
        text = self.world.text(routine.module)
        first, _, last = name.removeprefix(f"{routine.module}.").partition(".")
        known: object = routine.owner.syntax if routine.owner is not None else routine.syntax
        if text is None or text.names.get(first) != [known]:
            return None
        key = self.digests.get(name)
        if key is None:
            key = self.digests[name] = digest(text, first)
        if name in TOKENWISE:
            return self.tokenwise(routine, args, more) if key == TOKENWISE[name] else None
        meaning = MEANINGS[name]
        if key != meaning.digest:
            return None
        self.assume(f"`{last or first}`, read, and run on the CPU alone: {meaning.reason}")
        read = meaning_text(name)
        self.world.known[read.module.source.module] = read
        (function,) = read.names["meaning"]
        assert isinstance(function, Function)
        inner = Routine(read.module.source.module, function)
        given = args if routine.bound is None else (routine.bound, *args)
        value = self.call_bound_names(inner, self.bind(inner, given, more))
        return choice((NONE, value)) if meaning.declines else value

    def tokenwise(self, routine: Routine, args: Sequence[Value], more: dict[str, Value]) -> Value:
        """A call for each position of the length alone, put back behind each other.

        What is called treats each row by itself, or the proof of it ends there.
        """
        given = self.bind(routine, args, more)
        operation, first, rest, axis = given.values()
        assert isinstance(rest, Tuple)

        def require_along(values: Sequence[Value], done: str) -> None:
            for x in map(array, values):
                if x.tag or x.axes is None or x.axes[axis_index(x, axis)] != (LENGTH,):
                    raise Refused("row-mixing", f"{describe(x)} is {done} along another axis")

        require_along((first, *rest.items), "cut")
        self.singly += 1
        try:
            result = self.call(operation, (first, *rest.items), {})
        finally:
            self.singly -= 1
        made = parts(result) if isinstance(result, Tuple) else (result,)
        require_along(tuple(made), "put together")
        return result

    def call_bound_names(self, routine: Routine, names: dict[str, Value]) -> Value:
        """Call once for each of what arguments may be: with and without a cache, a mask, ..."""
        for name, held in names.items():
            if isinstance(held, Choice) and NONE in held.options:
                return self.join_calls(
                    lambda one, name=name: self.call_bound_names(  # type: ignore[misc]
                        routine, {**names, name: one}
                    ),
                    held.options,
                )
        key = self.memo_key(routine, names)
        if key is not None and not self.unmemoised and key in self.memo:
            return self.memo[key]
        frames, depth, forward = len(self.frames), self.depth, self.forward
        try:
            result = self.run(routine, names)
        except Dead:
            del self.frames[frames:]
            self.depth, self.forward = depth, forward
            raise
        except Fork as fork:
            del self.frames[frames:]
            self.depth = depth
            self.forward = forward
            result = self.both_ways(routine, names, fork.test)
            key = None
        if key is not None:
            self.memo[key] = result
        return result

    def memo_key(self, routine: Routine, names: dict[str, Value]) -> Any:
        if not self.forward or routine.scope is not None or self.assumed or self.singly:
            return None
        if any(_mutable(v) for v in names.values()):
            return None
        return (id(routine.syntax), routine.module, tuple(names.items()), self.depth > 0)

    def run(self, routine: Routine, names: dict[str, Value]) -> Value:
        syntax = routine.syntax
        scope = Scope(routine.module, dict(names), routine.scope, self.forward)
        scope.aliases = set(names)
        self.frames.append(Frame(scope, routine.owner, routine.bound, syntax.span))
        if isinstance(syntax, Expr):
            result = self.value(syntax.args[0])
        else:
            ended = self.block(syntax.body)
            result = self.frame.returns
            if not ended:
                result = join(result, NONE)
            elif isinstance(result, Undefined):
                self.frames.pop()
                raise Dead
        self.frames.pop()
        return result

    def both_ways(self, routine: Routine, names: dict[str, Value], test: CountTest) -> Value:
        """A branch on how many tokens there are: both ways must compute the same for every row.

        The same operations on the same values, but for a permutation of rows that is undone: that
        is what expert sorting does for speed.
        """
        results: list[Value] = []
        before, depth, forward = len(self.frames), self.depth, self.forward
        self.unmemoised += 1
        given = {name: named(value, (id(test), name)) for name, value in names.items()}
        try:
            for outcome in (True, False):
                self.assumed[test.key] = outcome
                try:
                    results.append(self.run(routine, dict(given)))
                except Fork as inner:  # another such branch behind this one
                    results.append(self.both_ways(routine, given, inner.test))
                except Dead:
                    pass
                del self.frames[before:]
                self.depth, self.forward = depth, forward
        finally:
            del self.assumed[test.key]
            self.unmemoised -= 1
        if not results:
            raise Dead
        if len(results) == 1:  # the other way raises
            self.refuse_test(test)
        one, two = results[0], results[-1]
        if not same_terms(one, two):
            self.refuse_test(test)
        self.operations.add("permutation")
        return join(one, two)

    def bind(
        self, routine: Routine, args: Sequence[Value], more: dict[str, Value]
    ) -> dict[str, Value]:
        """Arguments to parameters, as Python does it."""
        syntax = routine.syntax
        parameters: tuple[Parameter, ...] = (
            syntax.data if isinstance(syntax, Expr) else syntax.parameters
        )
        given = [routine.bound, *args] if routine.bound is not None else list(args)
        names: dict[str, Value] = {}
        left = dict(more)
        for parameter in parameters:
            if parameter.kind == "positional" and given:
                names[parameter.name] = given.pop(0)
            elif parameter.kind == "*":
                names[parameter.name] = Tuple(tuple(given))
                given = []
            elif parameter.kind == "**":
                rest: dict[Any, Value] = dict(left)
                names[parameter.name] = Table(rest, None, self.depth, self.forward)
                left = {}
            elif parameter.name in left:
                names[parameter.name] = left.pop(parameter.name)
            elif parameter.default is not None:
                with self.setup(routine.module):
                    self.frame.scope.parent = routine.scope
                    names[parameter.name] = self.value(parameter.default)
            elif not self.forward:
                names[parameter.name] = CONSTANT
            else:
                raise Dead
        if (given or left) and self.forward:
            raise Dead
        return names


def _mutable(value: Value) -> bool:
    if isinstance(value, (Items, Table)):
        return True
    if isinstance(value, Instance):
        return value.forward
    if isinstance(value, Routine):
        return value.scope is not None
    if isinstance(value, Known):
        try:
            hash(value.value)
        except TypeError:
            return True
    return any(map(_mutable, parts(value)))
