"""Building blocks of edits: what kinds and the plan write into a file."""

from __future__ import annotations

from .ir import Edit, Effect, Method, Source, Span, Value


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
    return replace(source, call.args[0].span, name, rule)


def decorate(source: Source, method: Method, decorator: str, rule: str) -> Edit:
    """A decorator closest to the `def` line."""
    start = source.line_start(method.function.def_span.start)
    indent = source.indent(method.function.def_span.start)
    return insert(start, f"{indent}@{decorator}\n", rule)


def delete_statement(source: Source, span: Span, rule: str) -> Edit:
    """Remove a statement with its lines."""
    start, end = source.line_start(span.start), source.line_end(max(span.end - 1, span.start))
    return replace(source, Span(start, end), "", rule)
