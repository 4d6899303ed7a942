"""Loops, and names where several ways of control meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..ir import Expr, For, Span, Stmt, While
from .conditions import Conditions
from .domain import (
    CONSTANT,
    NONE,
    UNDEFINED,
    Array,
    ByToken,
    Choice,
    ClassValue,
    Constant,
    Items,
    Known,
    Numbers,
    Partial,
    Refused,
    Routine,
    Table,
    Tuple,
    Undefined,
    Value,
    is_live,
    join,
    tokens,
)
from .machine import UNROLLED
from .terms import term_of, termed

_ROUNDS = 12


class Loops(Conditions):
    def met(self, ends: Sequence[dict[str, Value]], where: Span) -> dict[str, Value]:
        """The names after a branch on the config."""
        names = merged(ends)
        if not self.unmemoised or len(ends) < 2:
            return names
        for name, value in names.items():
            words = [end.get(name, UNDEFINED) for end in ends]
            if isinstance(value, Array) and value.term is None:
                terms = tuple(map(term_of, words))
                if None not in terms:
                    names[name] = termed(value, ("either", self.frame.scope.module, where, terms))
        return names

    def for_loop(self, statement: For) -> bool:
        iterable = self.value(statement.iterable)
        self.frame.where = statement.iterable.span
        if isinstance(iterable, ByToken):
            self.token_loop(statement, iterable)
            return False
        known = self.known_items(iterable)
        frame, scope = self.frame, self.frame.scope
        outer = frame.breaks, frame.continues
        if known is not None and len(known) <= UNROLLED:
            left: list[dict[str, Value]] = []
            alive = True
            for item in known:
                frame.breaks, frame.continues = [], []
                self.assign(statement.target, item, None)
                ended = self.block(statement.body)
                left += frame.breaks
                nexts = [*frame.continues, *([] if ended else [scope.names])]
                if not nexts:
                    alive = False
                    break
                if frame.breaks:
                    self.depth += 1
                scope.names = merged(nexts)
            frame.breaks, frame.continues = outer
            ends = [*left, *([scope.names] if alive else [])]
            if not ends:
                return True
            scope.names = merged(ends)
            return self.block(statement.orelse) if alive and not left else False
        element = self.element(iterable)
        if isinstance(element, Undefined):
            return False

        def head() -> None:
            self.assign(statement.target, element, None)

        self.repeat(head, statement.body)
        frame.breaks, frame.continues = outer
        return False

    def token_loop(self, statement: For, over: ByToken) -> None:
        """A loop over tokens in Python: one round, for any token, that may only add to lists.

        Each list gets exactly one entry a round, made from that round's token alone; nothing else
        leaves the loop.
        """
        axes = {
            v.axis if isinstance(v, Numbers) else (v.axes or ((),))[0]
            for v in over.values
            if isinstance(v, (Numbers, Array))
        }
        if len(axes) != 1 or len(over.values) < 1:
            raise Refused("row-mixing", "a loop over tokens and something else")
        (axis,) = axes
        if not tokens(axis) or any(not f.is_token for f in axis):
            raise Refused("row-mixing", "a loop over parts of tokens")
        parts_: list[Value] = []
        for value in over.values:
            if isinstance(value, Numbers):
                parts_.append(Numbers(axis, one=True))
            elif isinstance(value, Array) and not value.open and not value.tag:
                inner = Array((value.axes or ())[1:])
                if inner.live:
                    raise Refused("row-mixing", "a loop over tokens of single tokens' values")
                parts_.append(Array(inner.axes, tag=("row", axis)))
            else:
                raise Refused("row-mixing", "a loop over tokens and something else")
        scope = self.frame.scope
        before = dict(scope.names)
        saved, self.added = self.added, []
        self.depth += 1
        depth = self.depth
        self.assign(statement.target, Tuple(tuple(parts_)), None)
        breaks, continues = self.frame.breaks, self.frame.continues
        self.frame.breaks, self.frame.continues = [], []
        returns = self.frame.returns
        ended = self.block(statement.body)
        if ended or self.frame.breaks or self.frame.continues or self.frame.returns is not returns:
            raise Refused("row-mixing", "a loop over tokens that does not run to its end")
        self.frame.breaks, self.frame.continues = breaks, continues
        self.depth -= 1
        added, self.added = self.added, saved
        for name, value in before.items():
            if scope.names.get(name) is not value and not isinstance(value, Items):
                raise Refused("row-mixing", f"`{name}` is carried from token to token")
        scope.names = before
        for target in {id(t): t for t, _, _ in added}.values():
            mine = [(v, d) for t, v, d in added if t is target]
            (value, at), *more = mine
            if more or at != depth or not isinstance(value, Array) or value.tag != ("row", axis):
                raise Refused("row-mixing", "a loop over tokens that does not add one entry each")
            target.items, target.element = None, Array(value.axes, value.open, ("each", axis))

    def while_loop(self, statement: While) -> bool:
        frame = self.frame
        outer = frame.breaks, frame.continues

        def head() -> None:
            self.truth(self.value(statement.test))

        self.repeat(head, statement.body)
        frame.breaks, frame.continues = outer
        return False

    def repeat(self, head: Callable[[], None], body: Sequence[Stmt]) -> None:
        """Run a loop's body until nothing new is learnt of any name."""
        frame, scope = self.frame, self.frame.scope
        self.depth += 1
        state = scope.names
        for _ in range(_ROUNDS):
            frame.breaks, frame.continues = [], []
            scope.names = dict(state)
            head()
            ended = self.block(body)
            ends = [state, *frame.breaks, *frame.continues, *([] if ended else [scope.names])]
            after = merged(ends)
            if after.keys() == state.keys() and all(
                settled(after[name], state[name]) for name in after
            ):
                break
            state = after
        else:
            raise Refused("unknown-operation", "a loop that keeps changing what names hold")
        scope.names = state
        self.depth -= 1

    def guarded(
        self, keyword: str, heads: Sequence[Expr], bodies: Sequence[tuple[Stmt, ...]]
    ) -> bool:
        for head in heads:
            if is_live(self.value(head)):
                raise Refused("unknown-operation", "a with statement over tokens")
        if keyword == "with":
            return self.block(bodies[0])
        scope = self.frame.scope
        before = scope.names
        ends: list[dict[str, Value]] = []
        self.depth += 1
        scope.names = dict(before)
        if not self.block(bodies[0]):
            ends.append(scope.names)
        for body in bodies[1:]:
            scope.names = merged([before, *ends])
            if not self.block(body):
                ends.append(scope.names)
        self.depth -= 1
        scope.names = merged(ends) if ends else before
        return not ends


def merged(several: Sequence[dict[str, Value]]) -> dict[str, Value]:
    first, *rest = several
    if not rest:
        return first
    result = dict(first)
    for other in rest:
        for name, value in other.items():
            held = result.get(name)
            result[name] = value if held is None else join(held, value)
    return result


def settled(new: Value, old: Value) -> bool:
    if new is old or new == old:
        return True
    if isinstance(new, (Constant, Known)) and isinstance(old, Constant):
        return True
    if isinstance(new, Items) and isinstance(old, Items):
        if new.items is not None or old.items is not None:
            if new.items is None or old.items is None or len(new.items) != len(old.items):
                return False
            return all(settled(a, b) for a, b in zip(new.items, old.items, strict=True))
        return settled(new.element or CONSTANT, old.element or CONSTANT)
    if isinstance(new, Table) and isinstance(old, Table):
        if new is old or new.entries.keys() != old.entries.keys():
            return new is old
        pairs = [(new.entries[k], old.entries[k]) for k in new.entries]
        return all(settled(a, b) for a, b in [*pairs, (new.other or NONE, old.other or NONE)])
    if isinstance(new, Tuple) and isinstance(old, Tuple) and len(new.items) == len(old.items):
        return all(settled(a, b) for a, b in zip(new.items, old.items, strict=True))
    if isinstance(new, Choice) and isinstance(old, Choice):
        return len(new.options) == len(old.options)
    if isinstance(new, Array) and isinstance(old, Array):
        return join(new, old) == old
    return isinstance(new, (Routine, Partial, ClassValue)) and type(new) is type(old)
