"""The modules a proof runs over, by name, and what their top-level names are bound to.

The rewritten text of a file stands under its module's name behind `REWRITTEN`; imports inside it
that are relative lead to the rewritten text of siblings, absolute ones to the originals.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

from ..ir import (
    Assign,
    Block,
    Class,
    Edit,
    Expr,
    Function,
    If,
    Import,
    Module,
    Place,
    Source,
    Span,
    Stmt,
)
from ..match import place
from ..passes.facts import absolute_module

REWRITTEN = "=."

Binding = Function | Class | Expr | str  # a str is the dotted name an import gives


@dataclass(frozen=True, eq=False, slots=True)
class Text:
    """The syntax of one module, and how places in it lead back to the original text."""

    module: Module
    original: Source
    segments: tuple[tuple[int, int], ...]  # (offset in the text, offset in the original)
    names: dict[str, list[Binding]] = field(default_factory=dict)

    def place(self, span: Span) -> Place:
        start, end = self._back(span.start), self._back(max(span.end - 1, span.start)) + 1
        return place(self.original, Span(start, max(end, start + 1)))

    def _back(self, offset: int) -> int:
        index = bisect_right(self.segments, (offset, len(self.original.data))) - 1
        new, old = self.segments[max(index, 0)]
        after = self.segments[index + 1][1] if index + 1 < len(self.segments) else None
        place_ = old + offset - new
        return min(place_, after) if after is not None else place_


def text_of(module: Module, original: Source, edits: tuple[Edit, ...] = (), shift: int = 0) -> Text:
    """`module` is the syntax of `original` after `edits`, behind a banner of `shift` bytes."""
    segments = [(shift, 0)]
    moved = shift
    for edit in edits:
        segments.append((edit.span.start + moved, edit.span.start))
        moved += len(edit.after) - (edit.span.end - edit.span.start)
        segments.append((edit.span.end + moved, edit.span.end))
    text = Text(module, original, tuple(segments))
    _bind(module.body, text, outermost=True)
    return text


def _bind(body: tuple[Stmt, ...], text: Text, *, outermost: bool) -> None:
    def add(name: str, binding: Binding) -> None:
        known = text.names.setdefault(name, [])
        if outermost:
            known.clear()
        known.append(binding)

    for statement in body:
        match statement:
            case Import():
                for name, target in imported(statement, text.module.source):
                    add(name, target)
            case Class() | Function():
                add(statement.name, statement)
            case Assign(targets=targets, value=value) if value is not None:
                for place_ in targets:
                    if place_.op == "name":
                        add(place_.data, value)
            case If(body=one, orelse=two):
                _bind(one, text, outermost=False)
                _bind(two, text, outermost=False)
            case Block(bodies=bodies):
                for part in bodies:
                    _bind(part, text, outermost=False)


def imported(statement: Import, source: Source) -> list[tuple[str, str]]:
    if statement.alias is not None:
        if "." in statement.alias and statement.alias == statement.module:
            first = statement.module.split(".")[0]
            return [(first, first)]
        return [(statement.alias, statement.module)]
    base = absolute_module(statement, source.module, is_package=source.is_package)
    return [(local, f"{base}.{imported}") for local, imported in statement.names]


@dataclass(eq=False, slots=True)
class World:
    """Modules by name, read when first asked for; None if a name is no readable module."""

    read: Callable[[str], Text | None]
    known: dict[str, Text | None] = field(default_factory=dict)

    def text(self, name: str) -> Text | None:
        if name not in self.known:
            self.known[name] = self.read(name)
        return self.known[name]
