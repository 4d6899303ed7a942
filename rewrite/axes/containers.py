"""Lists, tuples, tables and shapes: their entries, their methods and what outlives a call."""

from __future__ import annotations

from collections.abc import Sequence

from .domain import (
    CONSTANT,
    NONE,
    PARAMETER,
    UNDEFINED,
    Array,
    ByToken,
    Choice,
    Constant,
    Count,
    CountTest,
    Dead,
    Instance,
    Items,
    Iterable_,
    Known,
    Library,
    Numbers,
    Opaque,
    OpenShape,
    Refused,
    Slice,
    Table,
    Tuple,
    Value,
    choice,
    is_live,
    join,
    options,
    parts,
)
from .indexing import index
from .states import States


class Containers(States):
    def items(self, values: list[Value] | None, element: Value | None = None) -> Items:
        return Items(values, element, self.depth, self.forward)

    def mutate(self, container: Items | Table | Instance) -> bool:
        """Whether a change happens for sure and once; refuses to change what outlives the call."""
        if self.forward and not container.forward:
            raise Refused(
                "state-on-self", "something that outlives the call is changed by the forward pass"
            )
        return container.depth == self.depth

    def call_items(self, bound: Items | Tuple, method: str, args: Sequence[Value]) -> Value:
        if isinstance(bound, Tuple) or method in ("index", "count", "copy"):
            if method == "copy" and isinstance(bound, Items):
                copied = list(bound.items) if bound.items is not None else None
                return self.items(copied, bound.element)
            if is_live(bound) or any(map(is_live, args)):
                raise Refused("token-branch", f"`{method}` of a list of what tokens hold")
            return CONSTANT
        if method in ("pop", "insert") and args and is_live(args[0]):
            raise Refused("token-branch", "an entry of a list is chosen by what tokens hold")
        sure = self.mutate(bound)
        if self.added is not None and method != "append":
            raise Refused("row-mixing", "a loop over tokens that does more than add to lists")
        if method in ("append", "insert", "extend"):
            added = [args[-1]] if method != "extend" else None
            if method == "extend":
                added = self.known_items(args[0])
            if self.added is not None:
                if bound.items != [] and not any(t is bound for t, _, _ in self.added):
                    raise Refused("row-mixing", "a loop over tokens that adds to what others made")
                self.added += [(bound, v, self.depth) for v in added or (UNDEFINED,)]
                return NONE
            if sure and bound.items is not None and method != "insert" and added is not None:
                bound.items.extend(added)
                return NONE
            for value in added if added is not None else [self.element(args[0])]:
                self.summarise(bound, value)
            return NONE
        if method == "pop":
            if sure and bound.items and (not args or args[0] in (Known(-1), Known(0))):
                return bound.items.pop(args[0].value if args and isinstance(args[0], Known) else -1)
            self.summarise(bound, UNDEFINED)
            return bound.element or CONSTANT
        if method in ("reverse", "sort", "clear", "remove"):
            self.summarise(bound, UNDEFINED)
            return NONE
        raise Refused("unknown-operation", f"list method `{method}`")

    @staticmethod
    def summarise(bound: Items, value: Value) -> None:
        joined: Value = choice((*(bound.items or ()), *options(bound.element or UNDEFINED), value))
        bound.items, bound.element = None, joined
        for source in bound.sources:
            if source is not bound:
                Containers.summarise(source, value)

    def call_table(self, bound: Table, method: str, args: Sequence[Value]) -> Value:
        if method in ("get", "pop", "setdefault") and args:
            if is_live(args[0]):
                raise Refused("token-branch", "a dictionary is read by what tokens hold")
            found = self.entry(bound, args[0])
            if method == "setdefault" and self.forward and not bound.forward:
                if any(map(is_live, args)):
                    raise Refused("state-on-self", "tokens are kept in something shared")
                self.assume("a constant is computed once and kept in a dictionary")
                return choice((args[1], *(options(found) if found is not None else ())))
            if method != "get":
                self.mutate(bound)
                if method == "setdefault":
                    self.store_entry(bound, args[0], args[1] if len(args) > 1 else NONE)
            default = args[1] if len(args) > 1 else NONE
            return (
                found
                if found is not None and _certain(bound, args[0])
                else choice((default, *(options(found) if found is not None else ())))
            )
        pairs = [Tuple((Known(k), v)) for k, v in bound.entries.items()]
        if bound.other is not None:
            pairs.append(Tuple((CONSTANT, bound.other)))
        if method in ("items", "keys", "values"):
            at = {"keys": 0, "values": 1}.get(method)
            chosen: list[Value] = [p if at is None else p.items[at] for p in pairs]
            if bound.other is None:
                return Tuple(tuple(chosen))
            return Iterable_(choice(chosen))
        if method == "update":
            self.mutate(bound)
            for arg in args:
                if isinstance(arg, Table):
                    for key, value in arg.entries.items():
                        self.store_entry(bound, Known(key), value)
                elif is_live(arg):
                    raise Refused("unknown-operation", "a dictionary is updated with tokens")
            return NONE
        if method == "copy":
            return Table(dict(bound.entries), bound.other, self.depth, self.forward)
        raise Refused("unknown-operation", f"dictionary method `{method}`")

    @staticmethod
    def entry(bound: Table, key: Value) -> Value | None:
        if isinstance(key, Known) and key.value in bound.entries:
            return bound.entries[key.value]
        if isinstance(key, Known):
            return bound.other
        every = [*bound.entries.values(), *([bound.other] if bound.other is not None else [])]
        return choice(every) if every else None

    def store_entry(self, bound: Table, key: Value, value: Value) -> None:
        sure = self.mutate(bound)
        if is_live(key):
            raise Refused("token-branch", "a dictionary is keyed by what tokens hold")
        if isinstance(key, Known):
            old = bound.entries.get(key.value)
            bound.entries[key.value] = value if sure or old is None else join(old, value)
        else:
            bound.other = value if bound.other is None else join(bound.other, value)

    def known_items(self, value: Value) -> list[Value] | None:
        """The items of something to loop over, if their number is known."""
        match value:
            case Tuple(items=items):
                return list(items)
            case Items(items=list() as items):
                return list(items)
            case Table(entries=entries, other=None):
                return [Known(key) for key in entries]
        return None

    def element(self, value: Value) -> Value:
        """What a loop over a value meets."""
        match value:
            case Choice(options=several):
                return self.join_calls(self.element, several)
            case Tuple() | Items() | Iterable_():
                found = list(parts(value))
                return choice(found) if found else UNDEFINED
            case Table(entries=entries):
                return choice([Known(k) for k in entries] or [CONSTANT])
            case Array():
                if not value.live:
                    return PARAMETER
                return index(self, value, Known(0))
            case Opaque(kind="cache"):
                return value
            case Opaque(kind="states"):
                return self.any_state()
            case Constant():
                return Constant(("element", value.key)) if value.key is not None else CONSTANT
            case Library() if not is_live(value):
                return CONSTANT
            case Known(value=str()):
                return CONSTANT
            case Numbers(one=True):
                return value
            case ByToken() | Numbers():
                raise Refused("token-branch", "what tokens hold is read by Python")
            case OpenShape() | Count() | CountTest():
                raise Refused("token-count", "a loop over numbers of tokens")
            case Opaque():
                raise Refused("cache-use", f"a loop over a {value.kind}")
            case Known(value=None):
                raise Dead
            case Instance():
                return CONSTANT if not is_live(value) else self._no_loop()
        return CONSTANT if not is_live(value) else self._no_loop()

    @staticmethod
    def _no_loop() -> Value:
        raise Refused("unknown-operation", "a loop over an object")

    def item(self, base: Tuple | Items, key: Value) -> Value:
        known = self.known_items(base)
        if isinstance(key, Numbers) and key.one and not is_live(base):
            return self.element(base)  # each token chooses for itself, in a loop over tokens
        if is_live(key):
            if isinstance(key, Slice) or known is None:
                raise Refused("token-count", "a list is cut at a number of tokens")
            raise Refused("token-branch", "an item is chosen by what tokens hold")
        if isinstance(key, Slice):
            bounds = (key.lower, key.upper, key.step)
            if known is not None and all(isinstance(b, Known) for b in bounds):
                cut = slice(*(b.value for b in bounds if isinstance(b, Known)))
                made = known[cut]
                return Tuple(tuple(made)) if isinstance(base, Tuple) else self.items(made)
            return self.items(None, self.element(base))
        if known is not None and isinstance(key, Known) and isinstance(key.value, int):
            if -len(known) <= key.value < len(known):
                return known[key.value]
            raise Dead
        return self.element(base)

    @staticmethod
    def open_item(base: OpenShape, key: Value) -> Value:
        if isinstance(key, Known) and isinstance(key.value, int):
            if 0 <= key.value < len(base.head):
                return base.head[key.value]
            return CONSTANT
        if isinstance(key, Slice) and isinstance(key.upper, Known) and key.lower == NONE:
            upper = key.upper.value
            if isinstance(upper, int) and 0 <= upper <= len(base.head):
                return Tuple(base.head[:upper])
        raise Refused("unknown-operation", "part of a shape of unknown length")


def _certain(table: Table, key: Value) -> bool:
    return isinstance(key, Known) and key.value in table.entries
