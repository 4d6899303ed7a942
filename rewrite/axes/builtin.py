"""Calls of Python's own functions."""

from __future__ import annotations

from collections.abc import Sequence

from .attributes import CACHES_OWN, Attributes
from .domain import (
    CONSTANT,
    LENGTH,
    NONE,
    ROWS,
    UNDEFINED,
    ZERO,
    Array,
    Barred,
    ByToken,
    ClassValue,
    Constant,
    Count,
    CountTest,
    Instance,
    Items,
    Iterable_,
    Known,
    Library,
    Numbers,
    Opaque,
    OpenShape,
    Partial,
    Refused,
    Routine,
    Slice,
    Super,
    Table,
    Tuple,
    Value,
    choice,
    is_live,
    options,
    parts,
)
from .machine import UNROLLED
from .operators import Operators
from .states import OBJECT, STATES

_EMPTY = Tuple(())
_BUILTINS = frozenset(
    "len range zip enumerate list tuple reversed iter next isinstance hasattr getattr setattr dict "
    "super sum callable print type map slice".split()
)
_PAGED = ("offset", "update_and_fetch", "make_mask", "keys_and_values")
# Attributes of mlx_lm's caches that its paged forms lack.
_UPSTREAM = frozenset(
    "keys values state meta_state nbytes size empty trim is_trimmable bits group_size max_size "
    "keep step left_padding lengths advance cache caches prepare finalize extract merge filter "
    "extend to_quantized chunk_size rotated _idx _temporal_order".split()
)
# What takes rows of a batch apart, and caches of one sequence may have, too.
_ROWWISE = ("extract", "merge")
# What only caches of padded batches have, or have as anything but None.
_PADDED = ("left_padding", "lengths")
# What reads or sets names behind the proof's back.
_HIDDEN = frozenset("locals globals vars eval exec compile __import__ open input delattr".split())
_HOLDING = frozenset("zip enumerate list tuple reversed iter next dict map".split())


class Builtins(Attributes, Operators):
    def call_builtin(self, name: str, args: Sequence[Value], more: dict[str, Value]) -> Value:
        for value in args if name not in _HOLDING else ():
            for one in options(value):
                if isinstance(one, Barred):
                    raise one.use()
        handler = getattr(self, f"_{name}", None)
        if name not in _HOLDING and any(Opaque("mask") in options(a) for a in args):
            word = name == "isinstance" and tuple(args[1:]) == (Library("builtins.str"),)
            if word and args[0] == Opaque("mask") and not self.recognised():
                # Upstream's is a word for chunks of several tokens, a paged one never.
                return CountTest((LENGTH,), None, paged=False)
            self.mask_branch()
        if handler is not None and name in _BUILTINS:
            return self.each(lambda a, k: handler(*a, **k), args, more)
        if self.forward and (name in _HIDDEN or "." in name):
            raise Refused("unknown-operation", f"{name}() shows what the proof does not follow")
        if any(map(is_live, (*args, *more.values()))):
            if name in ("int", "float", "bool", "str", "abs", "max", "min", "round", "sum"):
                return self._number(name, args)
            raise Refused("unknown-operation", f"{name}() of tokens has no rule")
        if name in ("max", "min", "int", "float", "abs", "bool") and args:
            if all(isinstance(a, Known) for a in args) and not more:
                return self.computed(getattr(__import__("builtins"), name), args)
        return CONSTANT

    def _number(self, name: str, args: Sequence[Value]) -> Value:
        flat = [p for a in args for p in ([a] if not isinstance(a, Tuple) else a.items)]
        for value in flat:
            if isinstance(value, Array) and value.live:
                raise Refused("token-branch", f"{name}() reads what tokens hold")
        found = tuple(dict.fromkeys(f for v in flat if isinstance(v, Count) for f in v.factors))
        if not found:
            raise Refused("unknown-operation", f"{name}() of tokens has no rule")
        return Count(found, exact=False)

    def _len(self, value: Value) -> Value:
        known = self.known_items(value)
        if known is not None:
            return Known(len(known))
        if isinstance(value, Array) and value.live:
            return self.shape_entry(value, 0)
        if isinstance(value, Numbers) and not value.one:
            return Count(tuple(f for f in value.axis if f.is_token), exact=False)
        each = value.element if isinstance(value, (Items, Iterable_)) else None
        if isinstance(each, Array) and each.tag[:1] == ("each",):
            raise Refused("token-count", "the length of a list of all tokens")
        if isinstance(value, (Library, ByToken)) and is_live(value):
            raise Refused("unknown-operation", "the length of what is not known")
        return CONSTANT

    def _range(self, *bounds: Value) -> Value:
        if any(map(is_live, bounds)):
            kinds = {f.kind for b in bounds if isinstance(b, Count) for f in b.factors}
            slug = "length-dependent" if kinds == {"length"} else "token-count"
            raise Refused(slug, "a loop over single tokens", "a mixer that runs once per sequence")
        if all(isinstance(b, Known) for b in bounds):
            numbers = range(*(b.value for b in bounds if isinstance(b, Known)))
            if len(numbers) <= UNROLLED:
                return Tuple(tuple(map(Known, numbers)))
        return Iterable_(CONSTANT)

    def _zip(self, *values: Value, **rest: Value) -> Value:
        if any(isinstance(v, Numbers) or (isinstance(v, Array) and v.live) for v in values):
            return ByToken(values, True)
        known = [self.known_items(v) for v in values]
        if known and all(k is not None for k in known):
            pairs = zip(*(k for k in known if k is not None), strict=False)
            return Tuple(tuple(Tuple(tuple(pair)) for pair in pairs))
        return Iterable_(Tuple(tuple(self.element(v) for v in values)))

    def _enumerate(self, value: Value, start: Value = ZERO) -> Value:
        known = self.known_items(value)
        if known is not None and isinstance(start, Known):
            return Tuple(tuple(Tuple((Known(i), v)) for i, v in enumerate(known, start.value)))
        return Iterable_(Tuple((CONSTANT, self.element(value))))

    def _list(self, value: Value = _EMPTY) -> Value:
        known = self.known_items(value)
        return self.items(known, None if known is not None else self.element(value))

    def _tuple(self, value: Value = _EMPTY) -> Value:
        known = self.known_items(value)
        if known is not None:
            return Tuple(tuple(known))
        return value if isinstance(value, OpenShape) else self.items(None, self.element(value))

    def _reversed(self, value: Value) -> Value:
        known = self.known_items(value)
        return Tuple(tuple(known[::-1])) if known is not None else Iterable_(self.element(value))

    def _iter(self, value: Value) -> Value:
        return Iterable_(self.element(value))

    def _next(self, value: Value, default: Value = UNDEFINED) -> Value:
        return choice((self.element(value), default))

    def _isinstance(self, value: Value, cls: Value) -> Value:
        names = {c.name.rpartition(".")[2] for c in parts(cls) if isinstance(c, Library)}
        if isinstance(cls, Library):
            names.add(cls.name.rpartition(".")[2])
        if value == OBJECT and names == {"array"}:
            return Known(False)
        if value == Opaque("mask") and names == {"array"}:
            return Known(False)  # a recognised mixer asks: elsewhere the question is refused
        if value == NONE and names == {"array"}:
            return Known(False)
        if value == Opaque("handle") and names == {"array"} and self.claimed():
            return Known(False)
        classes = list(parts(cls)) if isinstance(cls, Tuple) else [cls]
        python = all(isinstance(c, Library) and c.name.count(".") == 1 for c in classes)
        if value == Opaque("cache") and not python:
            raise Refused("cache-use", "the class of a cache decides: a paged one has another")
        if isinstance(value, (Array, Count)) and names:
            is_array = isinstance(value, Array)
            return Known("array" in names if is_array else "int" in names)
        return CONSTANT

    def _hasattr(self, value: Value, name: Value) -> Value:
        if value == STATES:
            return Known(self.states_have(name))
        if isinstance(value, Opaque):
            if value.kind == "cache" and isinstance(name, Known) and name.value in _ROWWISE:
                return CountTest((ROWS,), None, paged=False)
            return Known(self.cache_has(name))
        if isinstance(value, (Items, Tuple)) and isinstance(name, Known):
            return Known(hasattr(list if isinstance(value, Items) else tuple, str(name.value)))
        for one in options(value):
            if isinstance(one, Instance) and isinstance(name, Known):
                self.consulted(one, str(name.value))
        return CONSTANT

    def cache_has(self, name: Value) -> bool:
        """Whether a paged cache has an attribute; where others have it, asking is refused."""
        if not isinstance(name, Known) or (name.value in _UPSTREAM and not self.tying):
            raise Refused("cache-use", "whether a cache has what a paged one has not")
        if isinstance(name.value, str) and name.value[:1] == "_" and name.value not in CACHES_OWN:
            self.noticed(name.value)
        return name.value in _PAGED

    def _getattr(self, value: Value, name: Value, default: Value = UNDEFINED) -> Value:
        if not isinstance(name, Known):
            if is_live(value):
                raise Refused("unknown-operation", "an attribute whose name is computed")
            return CONSTANT
        if isinstance(value, Instance):
            self.consulted(value, name.value)
        if value == STATES and default != UNDEFINED and not self.states_have(name):
            return default
        if value == Opaque("cache") and default == NONE and name.value in _PADDED:
            return NONE
        if value == Opaque("cache") and default != UNDEFINED and name.value[:1] == "_":
            if name.value not in CACHES_OWN and self.noticed(name.value):
                return choice((default, CONSTANT))
        if (
            isinstance(value, Opaque)
            and value != STATES
            and default != UNDEFINED
            and not self.cache_has(name)
        ):
            return default
        if isinstance(value, Instance) and value.cls is not None and default != UNDEFINED:
            held = name.value in value.attributes or self.member(value.cls, name.value) is not None
            if not held:
                return default
        found = self.attribute(value, name.value)
        return choice((found, default)) if isinstance(value, Constant) else found

    def _setattr(self, value: Value, name: Value, given: Value) -> Value:
        if not isinstance(name, Known):
            raise Refused("state-on-self", "an attribute whose name is computed is set")
        self.store_attribute(value, name.value, given, None)
        return NONE

    def _dict(self, *args: Value, **more: Value) -> Value:
        if args and any(map(is_live, args)):
            raise Refused("unknown-operation", "dict() of tokens has no rule")
        return Table(dict(more), CONSTANT if args else None, self.depth, self.forward)

    def _super(self, *args: Value) -> Value:
        frame = self.frame
        if frame.owner is None or frame.this is None:
            return CONSTANT
        return Super(frame.this, frame.owner)

    def _sum(self, value: Value, start: Value = ZERO) -> Value:
        if not is_live(value):
            return CONSTANT
        known = self.known_items(value)
        every = known if known is not None else [self.element(value)] * 2
        result = start
        for item in every:
            result = self.binary("+", result, item)
        return result

    def _slice(self, *bounds: Value) -> Value:
        lower, upper, step = (*bounds, NONE, NONE)[:3] if len(bounds) > 1 else (NONE, *bounds, NONE)
        return Slice(lower, upper, step)

    def _callable(self, value: Value) -> Value:
        return Known(isinstance(value, (Routine, Instance, Partial, ClassValue)))

    def _print(self, *values: Value, **more: Value) -> Value:
        return NONE

    def _type(self, value: Value) -> Value:
        if isinstance(value, Instance) and value.cls is not None:
            return value.cls
        if value == Opaque("cache"):
            raise Refused("cache-use", "the class of a cache decides: a paged one has another")
        return CONSTANT

    def _map(self, function: Value, *values: Value) -> Value:
        return Iterable_(self.call(function, [self.element(v) for v in values], {}))
