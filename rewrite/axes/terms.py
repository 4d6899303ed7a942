"""How a value was computed, for comparing both ways of a branch on the number of tokens."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from .domain import (
    Array,
    Constant,
    Count,
    CountTest,
    Instance,
    Items,
    Known,
    Library,
    Opaque,
    Slice,
    Tuple,
    Value,
    join,
)


def termed(value: Value, term: Hashable) -> Value:
    match value:
        case Array():
            return Array(value.axes, value.open, value.tag, term)
        case Tuple(items=items):
            return Tuple(tuple(termed(v, (term, i) if term else None) for i, v in enumerate(items)))
    return value


def named(value: Value, name: Hashable) -> Value:
    """An argument as the beginning of terms."""
    if isinstance(value, Array) and value.term is not None:
        return value
    return termed(value, ("given", name))


def term_of(value: Value) -> Hashable:
    """How a value was computed, or which constant it is; None if that is not known."""
    match value:
        case Array():
            return value.term
        case Known():
            return ("known", type(value.value).__name__, repr(value.value))
        case Constant(key=key):
            return ("constant", key) if key is not None else None
        case CountTest():
            return ("test",)  # a hint such as `sorted_indices`: it changes no value
        case Library(name=name, bound=None):
            return ("library", name)
        case Instance():
            return ("object", id(value))
        case Count():
            return ("count", value)
        case Slice(lower=lower, upper=upper, step=step):
            words = tuple(map(term_of, (lower, upper, step)))
            return None if None in words else ("slice", words)
        case Tuple(items=items) | Items(items=list() as items):
            words = tuple(map(term_of, items))
            return None if None in words else ("items", words)
    return None


def same_terms(one: Value, two: Value) -> bool:
    if isinstance(one, Array) and isinstance(two, Array):
        # Sizes of features may be known under two names: those of tokens may not.
        alike = isinstance(join(one, two), Array)
        return alike and one.term is not None and one.term == two.term
    if isinstance(one, Tuple) and isinstance(two, Tuple):
        return len(one.items) == len(two.items) and all(
            same_terms(a, b) for a, b in zip(one.items, two.items, strict=True)
        )
    return isinstance(one, (Known, Opaque)) and one == two


def nesting(keys: Any) -> int:
    return 1 + max((nesting(k) for k in keys if isinstance(k, tuple)), default=0)
