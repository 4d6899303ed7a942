"""The value of each kind of expression."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from ..ir import Comprehension, Expr
from .domain import (
    CONSTANT,
    NONE,
    UNDEFINED,
    Array,
    Choice,
    Constant,
    Count,
    CountTest,
    Dead,
    Known,
    Library,
    OpenShape,
    Refused,
    Routine,
    Slice,
    Table,
    Tuple,
    Undefined,
    Value,
    choice,
    is_live,
    join,
    options,
)
from .machine import UNROLLED
from .operators import Operators
from .rules import RULES
from .subscripts import Subscripts
from .terms import nesting

_UNARY: dict[str, Callable[[Any], Any]] = {
    "-": operator.neg,
    "+": operator.pos,
    "~": operator.invert,
}


def _both(stops: bool, left: bool | None, right: bool | None) -> bool | None:
    """How `or` (it stops at True) or `and` ends, where that is known."""
    if stops in (left, right):
        return stops
    return None if None in (left, right) else not stops


def _joined(
    stops: bool, left: CountTest, right: CountTest, alone: bool | None, paged: bool | None
) -> CountTest:
    """Two tests in one, which is a test of its own."""
    factors = (*left.factors, *right.factors)
    if not isinstance(left.key, tuple) or right.key is None:
        return CountTest(factors, None, None, alone, paged)
    return CountTest(factors, (left.key[0], stops, left.key, right.key), None, alone, paged)


# Methods of containers, of Python and others, that change them.
_CHANGING = frozenset(
    "add append appendleft clear discard extend insert pop popitem popleft remove rotate send "
    "setdefault subtract update".split()
)


class Expressions(Subscripts, Operators):
    def value(self, expr: Expr) -> Value:
        handler: Callable[[Expr], Value] | None = getattr(self, f"e_{expr.op}", None)
        if handler is None:
            found = [self.value(part) for part in expr.args]
            if any(map(is_live, found)):
                raise Refused("unknown-operation", f"a {expr.data or expr.op} expression")
            return CONSTANT
        return handler(expr)

    def e_name(self, expr: Expr) -> Value:
        return self.lookup(expr.data)

    def e_const(self, expr: Expr) -> Value:
        return Known(expr.data)

    def e_string(self, expr: Expr) -> Value:
        if any(is_live(self.value(part)) for part in expr.args):
            raise Refused("token-branch", "text made of what tokens hold")
        return CONSTANT

    def e_attr(self, expr: Expr) -> Value:
        base = self.value(expr.args[0])
        self.at(expr)
        return self.attribute(base, expr.data)

    def e_tuple(self, expr: Expr) -> Value:
        items = self.sequence(expr.args)
        return Tuple(tuple(items)) if items is not None else CONSTANT

    def e_list(self, expr: Expr) -> Value:
        items = self.sequence(expr.args)
        return self.items(items, None if items is not None else CONSTANT)

    def e_set(self, expr: Expr) -> Value:
        items = self.sequence(expr.args)
        if items is not None and any(map(is_live, items)):
            raise Refused("unknown-operation", "a set of tokens")
        return self.items(items, None if items is not None else CONSTANT)

    def sequence(self, exprs: Sequence[Expr]) -> list[Value] | None:
        """Items of a display; None if a starred part has unknown length."""
        found: list[Value] = []
        unknown = False
        for part in exprs:
            if part.op == "star":
                value = self.value(part.args[0])
                known = self.known_items(value)
                if known is None:
                    if is_live(value) or isinstance(value, OpenShape):
                        raise Refused("unknown-operation", "a starred part of unknown length")
                    unknown = True
                    continue
                found += known
            else:
                found.append(self.value(part))
        if unknown and any(map(is_live, found)):
            raise Refused("unknown-operation", "a starred part of unknown length")
        return None if unknown else found

    def e_dict(self, expr: Expr) -> Value:
        made = Table({}, None, self.depth, self.forward)
        for key, value in zip(expr.args[::2], expr.args[1::2], strict=True):
            name, held = self.value(key), self.value(value)
            if name == NONE and key.span == value.span:
                if isinstance(held, Table):
                    made.entries |= held.entries
                    made.other = made.other or held.other
                else:
                    made.other = CONSTANT
            else:
                self.store_entry(made, name, held)
        return made

    def e_slice(self, expr: Expr) -> Value:
        lower, upper, step = (self.value(part) for part in expr.args)
        return Slice(lower, upper, step)

    def e_lambda(self, expr: Expr) -> Value:
        return Routine(self.frame.scope.module, expr, self.frame.scope, None, None)

    def e_walrus(self, expr: Expr) -> Value:
        value = self.value(expr.args[1])
        self.assign(expr.args[0], value, None)
        return value

    def e_if(self, expr: Expr) -> Value:
        test = self.value(expr.args[0])
        self.at(expr.args[0])
        known = self.truth(test)
        results: list[Value] = []
        before = self.frame.scope.names
        for held, part in ((True, expr.args[1]), (False, expr.args[2])):
            if known is not None and known != held:
                continue
            self.frame.scope.names = self.narrowed(expr.args[0], held, before)
            try:
                results.append(self.value(part))
            except Dead:
                continue
            finally:
                self.frame.scope.names = before
        if not results:
            raise Dead
        return choice(results) if len(results) < 2 else join(*results)

    def e_bool(self, expr: Expr) -> Value:
        left = self.value(expr.args[0])
        self.at(expr.args[0])
        known = self.known_of_count(left) if isinstance(left, CountTest) else self.truth(left)
        stops = expr.data == "or"
        if known is not None and known == stops:
            return left
        before = self.frame.scope.names
        self.frame.scope.names = self.narrowed(expr.args[0], not stops, before)
        frames, depth = len(self.frames), self.depth
        try:
            right = self.value(expr.args[1])
        except Dead:
            right = UNDEFINED
        except Refused:
            if known is not None or not isinstance(left, CountTest):
                raise
            del self.frames[frames:]
            self.depth = depth
            right = CountTest(left.factors, None)  # it may not decide: nor may the whole test
        finally:
            self.frame.scope.names = before
        if known is not None:
            return right
        if isinstance(left, Constant | CountTest) and isinstance(right, Known | Constant):
            if self.truth(right) is stops:  # whatever the other side is
                return Constant(("and" if not stops else "or", stops, self.here()))
        if isinstance(left, CountTest) and isinstance(right, CountTest):
            alone, paged = (
                _both(stops, getattr(left, end), getattr(right, end)) for end in ("alone", "paged")
            )
            if alone is not None and alone is paged:  # both forms take the same way
                return Known(alone)
            if left != right:
                return _joined(stops, left, right, alone, paged)
        if isinstance(left, CountTest):
            if is_live(right) and right != left:
                return CountTest(left.factors, None)
            if right == left:
                return left
            if self.truth(right) is not None:
                return left
            ends = (end if end is stops else None for end in (left.alone, left.paged))
            return CountTest(left.factors, left.key, left.single, *ends)
        if expr.data == "or":
            return choice(
                (*(o for o in options(left) if o != NONE and o != Known(False)), *options(right))
            )
        return join(left, right) if not isinstance(left, Constant) else choice((left, right))

    def e_unary(self, expr: Expr) -> Value:
        value = self.value(expr.args[0])
        self.at(expr)
        if expr.data == "not":
            known = self.truth(value) if not isinstance(value, CountTest) else None
            if isinstance(value, CountTest):
                known = self.truth(value)
            return CONSTANT if known is None else Known(not known)
        match value:
            case Known():
                return self.computed(_UNARY[expr.data], (value,))
            case Array():
                return self.apply(RULES["negative"], (value,), {})
            case Count():
                return Count(value.factors, exact=False)
            case Choice():
                return self.apply(RULES["negative"], (value,), {}) if is_live(value) else CONSTANT
        if is_live(value):
            raise Refused("cache-use", "a cache or a mask is computed with")
        if isinstance(value, Constant) and value.key is not None and nesting((value.key,)) < 6:
            return Constant((expr.data, value.key))
        return CONSTANT

    def e_binary(self, expr: Expr) -> Value:
        left, right = self.value(expr.args[0]), self.value(expr.args[1])
        self.at(expr)
        return self.binary(expr.data, left, right)

    def e_compare(self, expr: Expr) -> Value:
        values = [self.value(part) for part in expr.args]
        self.at(expr)
        results = [
            self.compare(op, values[i], values[i + 1], (self.here(), i))
            for i, op in enumerate(expr.data)
        ]
        if len(results) == 1:
            return results[0]
        tests = [r for r in results if isinstance(r, CountTest)]
        if tests:
            singles = [r.single if isinstance(r, CountTest) else None for r in results]
            single = False if False in singles else None if None in singles else True
            return CountTest(tuple(f for t in tests for f in t.factors), tests[0].key, single)
        known = [r.value for r in results if isinstance(r, Known)]
        return Known(all(known)) if len(known) == len(results) else CONSTANT

    def e_subscript(self, expr: Expr) -> Value:
        base = self.value(expr.args[0])
        key = self.value(expr.args[1])
        self.at(expr)
        return self.subscript(base, key)

    def e_call(self, expr: Expr) -> Value:
        callee = self.value(expr.args[0])
        args: list[Value] = []
        more: dict[str, Value] = {}
        unknown = False
        for keyword, part in zip(expr.data, expr.args[1:], strict=True):
            value = self.value(part)
            if keyword is None:
                args.append(value)
            elif keyword == "*":
                known = self.known_items(value)
                if known is None:
                    if is_live(value) or isinstance(value, OpenShape):
                        raise Refused("unknown-operation", "arguments of unknown number")
                    unknown = True
                else:
                    args += known
            elif keyword == "**":
                if isinstance(value, Table):
                    more |= {str(k): v for k, v in value.entries.items()}
                elif is_live(value):
                    raise Refused("unknown-operation", "keyword arguments of unknown names")
            else:
                more[keyword] = value
        self.at(expr)
        if self.forward and callee == Library("builtins.next") and not self.made_here(expr.args[1]):
            raise Refused("state-on-self", "an iterator that outlives the call moves on")
        method = expr.args[0].data if expr.args[0].op == "attr" else None
        if self.forward and isinstance(callee, Constant) and method in _CHANGING:
            raise Refused("state-on-self", f"`.{method}` of something shared may change it")
        if isinstance(callee, Library) and callee.name == "at.":
            raise Refused("unknown-operation", "`.at[...]` is called")
        if unknown and isinstance(callee, Library):
            if any(map(is_live, args)):
                raise Refused("unknown-operation", "arguments of unknown number")
            return CONSTANT
        return self.call(callee, args, more)

    def made_here(self, expr: Expr) -> bool:
        """Whether what an expression gives was made by this call, as far as its form tells."""
        if expr.op == "name":
            scope = self.frame.scope
            return expr.data in scope.names and expr.data not in scope.aliases
        return expr.op in ("call", "comp")

    def e_comp(self, expr: Expr) -> Value:
        data: Comprehension = expr.data
        saved = self.frame.scope.names
        self.frame.scope.names = dict(saved)
        values: list[Value] = []
        exact = self.comprehend(expr, data.generators, values)
        self.frame.scope.names = saved
        if data.kind == "dict":
            made = Table({}, None, self.depth, self.forward)
            for pair in values:
                assert isinstance(pair, Tuple)
                self.store_entry(made, *pair.items)
            if not exact and made.entries:
                made.other = choice(made.entries.values())
            return made
        if exact:
            return self.items(values)
        return self.items(None, choice(values) if values else UNDEFINED)

    def comprehend(self, expr: Expr, generators: Sequence[Any], values: list[Value]) -> bool:
        """Add the comprehension's elements; whether each is met exactly once."""
        if not generators:
            found = [self.value(part) for part in expr.args]
            values.append(found[0] if len(found) == 1 else Tuple(tuple(found)))
            return True
        first, *rest = generators
        iterable = self.value(first.iterable)
        known = self.known_items(iterable)
        exact = known is not None and len(known) <= UNROLLED
        elements = known if exact and known is not None else [self.element(iterable)]
        if not exact:
            self.depth += 1
        for element in elements:
            if isinstance(element, Undefined):
                continue
            self.assign(first.target, element, None)
            outcome: bool | None = True
            for condition in first.conditions:
                held = self.truth(self.value(condition))
                outcome = False if held is False else outcome if held else None
                if outcome is False:
                    break
            if outcome is False:
                continue
            exact = self.comprehend(expr, rest, values) and exact and outcome is True
        if known is None or len(known) > UNROLLED:
            self.depth -= 1
        return exact
