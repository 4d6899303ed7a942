"""Marks of arrays that are no whole: one token's part in a loop over tokens, turned axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .domain import Array, Choice, Items, Iterable_, Tuple, Value, choice, parts


def row_of(values: Sequence[Value]) -> Any:
    """The axis of a loop over tokens that one of the values is a part of."""
    for value in values:
        if isinstance(value, Array):
            if value.tag[:1] == ("row",):
                return value.tag[1]
        else:
            found = row_of(list(parts(value)))
            if found is not None:
                return found
    return None


def bare(value: Value) -> Value:
    """The value without the mark of one token."""
    match value:
        case Array(tag=("row", _)):
            return Array(value.axes, value.open)
        case Tuple(items=items):
            return Tuple(tuple(map(bare, items)))
        case Items(items=items, element=element):
            held = [bare(v) for v in items] if items is not None else None
            return Items(held, bare(element) if element is not None else None, -1, value.forward)
        case Iterable_(element=element):
            return Iterable_(bare(element))
        case Choice(options=several):
            return choice(map(bare, several))
    return value


def marked(value: Value, row: Any) -> Value:
    match value:
        case Array():
            return Array(value.axes, value.open, ("row", row))
        case Tuple(items=items):
            return Tuple(tuple(marked(v, row) for v in items))
        case Iterable_(element=element):
            return Iterable_(marked(element, row))
    return value


def unturned(value: Value) -> Array | None:
    if isinstance(value, Array):
        return value if value.tag[:1] == ("unturned",) else None
    return next((found for part in parts(value) if (found := unturned(part))), None)
