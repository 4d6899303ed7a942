"""Python's operators over arrays, numbers of tokens, lists and known values."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from .conditions import Conditions
from .domain import (
    CONSTANT,
    NONE,
    PARAMETER,
    Array,
    Barred,
    Constant,
    Count,
    CountTest,
    Dead,
    Items,
    Known,
    Library,
    Opaque,
    Refused,
    Tuple,
    Undefined,
    Value,
    choice,
    is_live,
    options,
)
from .marks import row_of
from .rules import RULES, arithmetic
from .states import OBJECT, STATES
from .terms import nesting

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
}


class Operators(Conditions):
    def binary(self, op: str, left: Value, right: Value) -> Value:
        return self.each(lambda pair, _: self._binary(op, *pair), (left, right), {})

    def _binary(self, op: str, left: Value, right: Value) -> Value:
        pair = (left, right)
        if any(v == NONE or isinstance(v, Undefined) for v in pair):
            raise Dead
        if left == Opaque("cache") and op == "+" and isinstance(right, (Items, Tuple)):
            held = options(self.element(right))
            return self.items(None, choice((left, *held)))
        if OBJECT in pair or STATES in pair:
            raise Dead
        for one, two in (pair, pair[::-1]):
            if isinstance(one, Barred):
                raise one.use()
            if isinstance(one, Count) and isinstance(two, Array) and two.tag[:1] == ("start",):
                return Barred("token-count", "how many keys there are is used as data")
        if any(isinstance(v, Opaque) for v in pair):
            raise Refused("cache-use", "a cache or a mask is computed with")
        if any(isinstance(v, Array) for v in pair):
            if any(isinstance(v, Library) for v in pair):
                return PARAMETER if not any(map(is_live, pair)) else self._unknown_operand()
            if op == "@":
                return self.apply(RULES["matmul"], pair, {})
            if row_of(pair) is not None:
                return self.apply(RULES["multiply"], pair, {})
            try:
                return self.with_term(op, arithmetic(self, op, left, right), pair, {})
            except TypeError:
                return self._unknown_operand() if any(map(is_live, pair)) else PARAMETER
        if any(isinstance(v, (Count, CountTest)) for v in pair):
            return self._count(op, left, right)
        if isinstance(left, Tuple) and isinstance(right, Tuple) and op == "+":
            return Tuple((*left.items, *right.items))
        if any(isinstance(v, (Items, Tuple)) for v in pair):
            return self._listed(op, left, right)
        if isinstance(left, Known) and isinstance(right, Known):
            return self.computed(_BINARY.get(op), pair)
        if any(map(is_live, pair)):
            return self._unknown_operand()
        if isinstance(left, (Known, Constant)) and isinstance(right, (Known, Constant)):
            keys = [v.value if isinstance(v, Known) else v.key for v in (left, right)]
            if None not in keys and nesting(keys) < 4:
                try:
                    hash(tuple(keys))
                except TypeError:
                    return CONSTANT
                return Constant((op, *keys))
        return CONSTANT

    @staticmethod
    def _unknown_operand() -> Value:
        raise Refused("unknown-operation", "an operand that is not known")

    @staticmethod
    def _count(op: str, left: Value, right: Value) -> Value:
        factors: tuple[Any, ...] = ()
        rest: list[Any] = []
        exact = op == "*"
        for value in (left, right):
            if isinstance(value, Count):
                factors += value.factors
                exact = exact and value.exact
                rest += [value.rest] if value.rest != 1 else []
            elif isinstance(value, CountTest):
                factors, exact = factors + value.factors, False
            elif isinstance(value, Known):
                rest += [value.value] if value.value != 1 else []
            elif isinstance(value, Constant):
                rest.append(value.key)
            else:
                raise Refused("unknown-operation", "an operand that is not known")
        if not exact:
            return Count(tuple(dict.fromkeys(factors)), exact=False)
        return Count(factors, 1 if not rest else rest[0] if len(rest) == 1 else ("*", *rest))

    def _listed(self, op: str, left: Value, right: Value) -> Value:
        if op == "+":
            one, two = self.known_items(left), self.known_items(right)
            if one is not None and two is not None:
                return self.items([*one, *two])
            return self.items(None, choice((self.element(left), self.element(right))))
        if op == "*":
            value, number = (left, right) if isinstance(left, (Items, Tuple)) else (right, left)
            if is_live(number):
                raise Refused("token-count", "a list is as long as there are tokens")
            known = self.known_items(value)
            if known is not None and isinstance(number, Known) and isinstance(number.value, int):
                if len(known) * number.value <= 64:
                    made = known * number.value
                    return Tuple(tuple(made)) if isinstance(value, Tuple) else self.items(made)
            return self.items(None, self.element(value))
        if is_live(left) or is_live(right):
            self._unknown_operand()
        return CONSTANT

    @staticmethod
    def computed(function: Callable[..., Any] | None, args: Sequence[Value]) -> Value:
        """The result of a function of known Python values, where it is small."""
        values = [a.value for a in args if isinstance(a, Known)]
        plain = all(isinstance(v, (int, float, str, bool)) for v in values)
        if function is None or not plain:
            return CONSTANT
        if function is operator.pow and any(abs(v) > 64 for v in values if not isinstance(v, str)):
            return CONSTANT
        try:
            result = function(*values)
        except ArithmeticError:
            raise Dead from None
        except (TypeError, ValueError):
            return CONSTANT
        if isinstance(result, str) and len(result) > 256:
            return CONSTANT
        return Known(result) if isinstance(result, (int, float, str, bool)) else CONSTANT
