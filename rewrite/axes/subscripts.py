"""Subscripts read and set."""

from __future__ import annotations

from ..ir import Expr
from .attributes import Attributes
from .containers import Containers
from .domain import (
    CONSTANT,
    PARAMETER,
    Array,
    Barred,
    Choice,
    Constant,
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
    Undefined,
    Value,
    is_live,
    options,
    parts,
)
from .indexing import index, store
from .rules import Rule, array


class Subscripts(Attributes, Containers):
    def subscript(self, base: Value, key: Value) -> Value:
        if isinstance(base, Choice):
            return self.join_calls(lambda one: self.subscript(one, key), base.options)
        if isinstance(key, Choice) and not isinstance(base, Opaque):
            return self.join_calls(lambda one: self.subscript(base, one), key.options)
        match base:
            case Array():
                if is_live(key):
                    return self.keyed(base, key)
                rule = Rule("index", lambda c, x: index(c, array(x), key), "")
                return self.with_term("index", self.apply(rule, (base,), {}), (base, key), {})
            case Tuple() | Items():
                return self.item(base, key)
            case OpenShape():
                return self.open_item(base, key)
            case Table():
                if is_live(key):
                    raise Refused("token-branch", "a dictionary is read by what tokens hold")
                found = self.entry(base, key)
                if found is None:
                    raise Dead
                return found
            case Opaque(kind="cache"):
                if is_live(key):
                    raise Refused("token-branch", "a cache is chosen by what tokens hold")
                return base
            case Opaque(kind="object"):
                raise Dead
            case Opaque(kind="states"):
                return self.read_state(key)
            case Opaque(kind=kind):
                raise Refused("cache-use", f"entries of a {kind} are read")
            case Instance():
                if isinstance(key, Known) and isinstance(key.value, str):
                    self.consulted(base, key.value)
                    found = base.attributes.get(key.value, PARAMETER)
                    return self.held(base, key.value, found)
                return CONSTANT
            case Library(name="at", bound=bound) if bound is not None:
                return Library("at.", Tuple((bound, key)))
            case Known(value=None) | Undefined():
                raise Dead
            case Barred():
                raise base.use()
            case Iterable_():
                return base if isinstance(key, Slice) else base.element
            case Constant(key=("number",)):
                raise Dead
            case Constant():
                if isinstance(key, Known) and base.key is not None and not is_live(key):
                    try:
                        hash(key)
                        return Constant((base.key, "[]", key.value))
                    except TypeError:
                        return CONSTANT
                if is_live(key):
                    raise Refused("token-branch", "the config is read by what tokens hold")
                return CONSTANT
        if isinstance(base, Library) and isinstance(base.bound, Opaque):
            raise Refused("cache-use", f"`.{base.name.partition('.')[2]}` of a paged cache")
        if isinstance(base, Numbers):
            raise Refused("token-branch", "what tokens hold is read by Python")
        if is_live(key) or is_live(base):
            raise Refused("unknown-operation", "an index into what is not known")
        return CONSTANT

    def keyed(self, base: Array, key: Value) -> Value:
        self.operations.add("index")
        return self.with_term("index", index(self, base, key), (base, key), {})

    def store_subscript(self, target: Expr, value: Value) -> None:
        base = self.value(target.args[0])
        key = self.value(target.args[1])
        self.at(target)
        for one in options(base):
            match one:
                case Array():
                    self.store_array(target.args[0], one, key, value)
                case Items():
                    if isinstance(key, Known) and one.items is not None and self.mutate(one):
                        if isinstance(key.value, int) and key.value < len(one.items):
                            one.items[key.value] = value
                            continue
                    self.mutate(one)
                    for item in parts(value) if isinstance(key, Slice) else (value,):
                        self.summarise(one, item)
                case Table():
                    self.store_entry(one, key, value)
                case Opaque(kind="cache") if value == Opaque("state"):
                    continue  # each sequence's new state, as an op of the runtime made it
                case Opaque(kind="states"):
                    self.keep_state(key, value)
                case Opaque():
                    raise Refused("cache-use", "an entry of a cache is set outside a mixer")
                case Instance():
                    name = key.value if isinstance(key, Known) else "?"
                    self.store_attribute(one, str(name), value, None)
                case Known(value=None):
                    continue
                case _:
                    if is_live(value) or is_live(key) or is_live(one):
                        raise Refused("state-on-self", "tokens are kept in something shared")
                    if self.forward:
                        raise Refused("state-on-self", "an entry of something shared is set")

    def store_array(self, target: Expr, base: Array, key: Value, value: Value) -> None:
        name = target.data if target.op == "name" else None
        if self.forward and not base.live and (name is None or name in self.frame.scope.aliases):
            raise Refused("state-on-self", "a weight is written to by the forward pass")
        rule = Rule("store", lambda c, b, v: store(c, array(b), key, v), "")
        made = self.apply(rule, (base, value), {})
        made = self.with_term("store", made, (base, key, value), {})
        if name is not None:
            self.frame.scope.names[name] = made
        elif self.forward and is_live(base):
            raise Refused("unknown-operation", "an array that is not a local name is written to")
