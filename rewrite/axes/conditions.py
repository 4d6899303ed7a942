"""Comparisons and truth: what a test says, and which tests tell the number of tokens."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from ..ir import Expr
from .containers import Containers
from .domain import (
    CONSTANT,
    LENGTH,
    NONE,
    ROWS,
    Array,
    Barred,
    ByToken,
    Choice,
    ClassValue,
    Constant,
    Count,
    CountTest,
    Dead,
    Instance,
    Items,
    Known,
    Library,
    Numbers,
    Opaque,
    Partial,
    Refused,
    Routine,
    Table,
    Tuple,
    Undefined,
    Value,
    choice,
    is_live,
    options,
    parts,
)
from .machine import Fork
from .rules import RULES
from .states import OBJECT

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_MANY = 1 << 40  # tokens


class Conditions(Containers):
    def compare(self, op: str, left: Value, right: Value, key: Any) -> Value:
        if op in ("is", "is not"):
            return self.same(left, right, op == "is")
        if op in ("in", "not in"):
            return self.contains(left, right, op == "in")
        pair = (left, right)
        if any(isinstance(v, Choice) for v in pair):
            return self.each(lambda p, _: self.compare(op, p[0], p[1], key), pair, {})
        if OBJECT in pair:
            if op in ("==", "!="):
                return CONSTANT
            raise Dead
        if any(isinstance(v, (Count, CountTest)) for v in pair) and not any(
            isinstance(v, (Array, Barred)) for v in pair
        ):
            return self.compare_counts(op, left, right, key)
        if any(isinstance(v, Array) for v in pair):
            if NONE in pair:
                return Known(op == "!=")
            return self.apply(RULES["equal"], pair, {})
        if isinstance(left, Known) and isinstance(right, Known):
            try:
                return Known(bool(_COMPARE[op](left.value, right.value)))
            except TypeError:
                raise Dead from None
        if isinstance(left, Tuple) and isinstance(right, Tuple) and any(map(is_live, pair)):
            if left == right:
                return Known(op == "==")
            return CountTest(tuple(f for v in parts(left) for f in getattr(v, "factors", ())), key)
        for one, two in (pair, pair[::-1]):
            if isinstance(one, Barred):
                raise one.use()
            if one == Opaque("mask") and isinstance(two, Known) and isinstance(two.value, str):
                if two.value != "causal" and op in ("==", "!="):
                    return Known(op == "!=")  # no mask that anybody makes is another word
        if any(map(is_live, pair)):
            raise Refused("unknown-operation", "a comparison of what is not known")
        return CONSTANT

    @staticmethod
    def compare_counts(op: str, left: Value, right: Value, key: Any) -> Value:
        if left == right and isinstance(left, Count) and left.exact:
            return Known(op in ("==", "<=", ">="))
        factors = tuple(
            f for v in (left, right) if isinstance(v, (Count, CountTest)) for f in v.factors
        )
        single = alone = None
        for one, two, swap in ((left, right, False), (right, left, True)):
            if one == Count((ROWS,)) and isinstance(two, Known) and type(two.value) is int:
                alone = bool(_COMPARE[op](*((two.value, 1) if swap else (1, two.value))))
            if isinstance(one, Count) and one == Count((LENGTH,)) and isinstance(two, Known):
                says = [
                    bool(_COMPARE[op](*((two.value, n) if swap else (n, two.value))))
                    for n in (1, _MANY)
                ]
                if type(two.value) is int and two.value <= 1 and says[0] == says[1]:
                    return Known(says[0])  # a chunk has one token at least
                single = says[0]
        return CountTest(factors, key, single, alone)

    def same(self, left: Value, right: Value, wanted: bool) -> Value:
        if any(isinstance(v, (Count, CountTest)) for v in (*options(left), *options(right))):
            raise Refused("token-count", "whether a number of tokens is some object")
        barred = [v for v in (*options(left), *options(right)) if isinstance(v, Barred)]
        if any(v.factors for v in barred):
            return CountTest(tuple(f for v in barred for f in v.factors), None)
        outcomes: set[bool | None] = set()
        for one in options(left):
            for two in options(right):
                if isinstance(one, (Constant, Undefined)) or isinstance(two, (Constant, Undefined)):
                    outcomes.add(None)
                elif NONE in (one, two) or (isinstance(one, Known) and isinstance(two, Known)):
                    if Opaque("mask") in (one, two):
                        self.mask_branch()
                    if Opaque("pages") in (one, two):
                        raise Refused("cache-use", "whether a cache has keys is no question here")
                    outcomes.add(one == two)
                else:
                    outcomes.add(None)
        if len(outcomes) == 1 and None not in outcomes:
            return Known(outcomes.pop() == wanted)
        return CONSTANT

    def contains(self, left: Value, right: Value, wanted: bool) -> Value:
        if is_live(left) and not isinstance(left, Opaque):
            raise Refused("token-branch", "a test whether a token is in something")
        inside = (right,) if not isinstance(right, (Tuple, Items)) else tuple(parts(right))
        if any(is_live(v) and not isinstance(v, (Opaque, Instance, Table)) for v in inside):
            raise Refused("token-branch", "a test whether something is among what tokens hold")
        known = self.known_items(right)
        if isinstance(left, Known) and known is not None:
            if all(isinstance(v, Known) for v in known):
                return Known((left in known) == wanted)
        if isinstance(right, Instance) and isinstance(left, Known):
            self.consulted(right, str(left.value))
            if left.value not in right.attributes:
                return Known(not wanted)
        if isinstance(right, Known) and isinstance(right.value, str) and isinstance(left, Known):
            return Known((str(left.value) in right.value) == wanted)
        return CONSTANT

    def truth(self, value: Value) -> bool | None:
        """Whether a condition holds; None if that is not known."""
        match value:
            case Known():
                return bool(value.value)
            case Constant(key=("and" | "or", bool(held), _)):
                return held
            case Choice(options=several):
                found = {self.truth(one) for one in several}
                return found.pop() if len(found) == 1 else None
            case Array():
                if value.live:
                    raise Refused("token-branch", "a branch on what tokens hold", "mx.where")
                return None
            case Count():
                if not value.exact:
                    raise Refused("token-count", "a branch on the number of tokens")
                return True
            case CountTest():
                return self.truth_of_count(value)
            case Opaque() | Instance() | Routine() | ClassValue() | Library() | Partial():
                if value == Opaque("mask"):
                    self.mask_branch()
                if not isinstance(value, Library):
                    return True
                if is_live(value):
                    raise Refused("token-branch", "a branch on what is not known of tokens")
                return True if value.bound is None else None
            case Tuple(items=items):
                return bool(items)
            case Items(items=list() as held):
                return bool(held)
            case Table(entries=entries, other=None):
                return bool(entries)
            case Numbers() | ByToken():
                raise Refused("token-branch", "a branch on what tokens hold", "mx.where")
            case Barred():
                raise value.use()
        return None

    def mask_branch(self) -> None:
        """Upstream makes no mask for a single token, so whether there is one tells how many there
        are; only a recognised mixer may ask."""
        if not self.recognised():
            raise Refused("token-branch", "whether a mask is made depends on the number of tokens")

    def recognised(self) -> bool:
        owner = self.claimant()
        return owner is not None and owner.qualified in self.claims

    def claimant(self) -> ClassValue | None:
        """The innermost class around that was recognised as a mixer, else the outermost one."""
        owner = self.frame.owner
        for frame in reversed(self.frames):
            owner = frame.owner
            if owner is not None and owner.qualified in self.claims:
                break
        return owner

    def truth_of_count(self, test: CountTest) -> bool:
        if test.key is None:
            self.refuse_test(test)
        known = self.known_of_count(test)
        if known is None:
            raise Fork(test)
        return known

    def known_of_count(self, test: CountTest) -> bool | None:
        if self.singly and test.single is not None:
            return test.single
        if test.key in self.assumed:
            return self.assumed[test.key]
        return test.single if test.single is not None and self.claimed() else None

    def claimed(self) -> bool:
        """A recognised mixer asks: its kind says that both answers mean the same."""
        owner = self.claimant()
        if owner is None or owner.qualified not in self.claims:
            return False
        kind = self.claims[owner.qualified]
        self.assume(f"both arms mean the same: `{owner.name}` was recognised as {kind}")
        return True

    def refuse_test(self, test: CountTest) -> None:
        kinds = {f.kind for f in test.factors}
        if test.paged is not None and kinds == {"length"}:
            raise Refused("token-branch", "which mask is made depends on the number of tokens")
        if test.paged is not None:
            raise Refused("cache-use", "whether a cache has what a paged one has not")
        at = test.key[0] if isinstance(test.key, tuple) else None
        if kinds == {"length"}:
            raise Refused("length-dependent", "a branch on the length of a chunk", at=at)
        raise Refused("token-count", "a branch on the number of tokens", at=at)

    def narrowed(self, test: Expr, held: bool, names: dict[str, Value]) -> dict[str, Value]:
        """The names, with what a test on one of them says."""
        names = dict(names)
        if test.op == "unary" and test.data == "not":
            return self.narrowed(test.args[0], not held, names)
        if test.op == "bool" and (test.data == "and") == held:
            return self.narrowed(test.args[1], held, self.narrowed(test.args[0], held, names))
        name, none = None, False
        if test.op == "name":
            name, none = test.data, not held
        elif test.op == "compare" and len(test.args) == 2 and test.args[0].op == "name":
            right = test.args[1]
            if right.op == "const" and right.data is None and test.data[0] in ("is", "is not"):
                name, none = test.args[0].data, (test.data[0] == "is") == held
        if name is not None and name in names:
            several = options(names[name])
            bare = test.op == "name"
            kept = [
                v
                for v in several
                if isinstance(v, Constant)
                or ((v == NONE) == none if not bare else self._may_be(v, held))
            ]
            if kept:
                names[name] = choice(kept)
        return names

    def _may_be(self, value: Value, held: bool) -> bool:
        if isinstance(value, (Array, CountTest, Count)):
            return True
        known = self.truth(value)
        return known is None or known == held
