"""Building blocks of edits: what kinds and the plan write into a file."""

from __future__ import annotations

from dataclasses import dataclass

from .ir import Edit, Effect, Method, Site, Source, Span, Value
from .match import live


@dataclass(frozen=True, slots=True)
class Ops:
    """Calls that become ops of ours."""

    sites: tuple[Site, ...] = ()
    edits: tuple[Edit, ...] = ()
    imports: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.sites)


def replace(source: Source, span: Span, text: str, rule: str) -> Edit:
    return Edit(span, source.data[span.start : span.end], text.encode(), rule)


def insert(offset: int, text: str, rule: str) -> Edit:
    return Edit(Span(offset, offset), b"", text.encode(), rule)


def site_comment(source: Source, effect: Effect | Span, text: str, rule: str) -> Edit:
    """One comment line above the statement that holds a site."""
    start = (effect if isinstance(effect, Span) else effect.statement.span).start
    where = source.line_start(start)
    return insert(where, f"{source.indent(start)}# mlxrewrite: {text}\n", rule)


def rename_callee(source: Source, call: Value, name: str, rule: str) -> Edit:
    """Call something else. The callee's value may have been bound elsewhere, under another name:
    what is replaced is the text at the call."""
    span = call.syntax.args[0].span if call.syntax is not None else call.args[0].span
    return replace(source, span, name, rule)


def argument_text(source: Source, call: Value, position: int) -> str:
    """The text of argument `position` of a call."""
    assert call.syntax is not None
    return source.text(call.syntax.args[position + 1].span)


def receiver_text(source: Source, call: Value) -> str:
    """The text of `x` in `x.method(...)`."""
    assert call.syntax is not None
    return source.text(call.syntax.args[0].args[0].span)


def add_argument(call: Value, text: str, rule: str) -> Edit:
    """Another argument behind the last one of a call."""
    assert call.syntax is not None
    return insert(call.syntax.args[-1].span.end, f", {text}", rule)


def decorate(source: Source, method: Method, decorator: str, rule: str) -> Edit:
    """A decorator closest to the `def` line."""
    start = source.line_start(method.function.def_span.start)
    indent = source.indent(method.function.def_span.start)
    return insert(start, f"{indent}@{decorator}\n", rule)


def delete_statement(source: Source, span: Span, rule: str) -> Edit:
    """Remove a statement with its lines."""
    start, end = source.line_start(span.start), source.line_end(max(span.end - 1, span.start))
    return replace(source, Span(start, end), "", rule)


def spell(source: Source, value: Value, names: dict[str, Value]) -> str | None:
    """Text that has the value where `names` tells what names hold; None if there is none.

    A name that holds it, or constants, attributes, items and arithmetic of such.
    """
    wanted = live(value)
    for name, held in names.items():
        if held is value or live(held) is wanted:
            return name
    if value.op == "const":
        return repr(value.data)
    if value.op == "global":
        return source.text(value.span)
    parts = [spell(source, part, names) for part in value.args]
    if any(part is None for part in parts):
        return None
    match value.op:
        case "attr":
            return f"{parts[0]}.{value.data}"
        case "index":
            return f"{parts[0]}[{parts[1]}]"
        case "binary":
            return f"({parts[0]} {value.data} {parts[1]})"
    return None


def names_before(method: Method, place: Value | Span) -> dict[str, Value]:
    """What names hold before the innermost statement that starts at or before a place."""
    start = (place if isinstance(place, Span) else place.span).start
    known = [at for at in method.before if at <= start]
    return method.before[max(known)] if known else {}
