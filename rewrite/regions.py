"""Replacing a run of statements by one: what may go, and what the code behind it still needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass

from .edits import names_before, replace
from .ir import Assign, AugAssign, Edit, Effect, Expr, For, Method, Source, Span, Stmt, Value


@dataclass(frozen=True, eq=False, slots=True)
class Region:
    """Statements `first` up to `last` (included) of a method's own body."""

    method: Method
    first: int
    last: int

    @property
    def statements(self) -> tuple[Stmt, ...]:
        return self.method.function.body[self.first : self.last + 1]

    @property
    def start(self) -> int:
        return self.statements[0].span.start

    @property
    def end(self) -> int:
        return self.statements[-1].span.end

    def holds(self, span: Span) -> bool:
        return self.start <= span.start < self.end


def region_of(method: Method, places: Iterable[Span]) -> Region | None:
    """The shortest run of the body's own statements that holds all places."""
    found = []
    for place in places:
        index = next(
            (
                i
                for i, statement in enumerate(method.function.body)
                if statement.span.start <= place.start < statement.span.end
            ),
            None,
        )
        if index is None:
            return None
        found.append(index)
    return Region(method, min(found), max(found)) if found else None


def problem_with(
    region: Region, result: Value, spared: Iterable[Effect] = ()
) -> Value | Span | None:
    """Where a region does something else than compute `result`; None if it may be replaced.

    Every call in it is needed for the result, nothing is stored or returned, and no name that it
    binds is read behind it but the one that holds the result. `spared` effects may go.
    """
    needed = {id(value) for value in result.walk()}
    needed |= {id(part) for effect in spared for part in effect.value.walk()}
    allowed = set(map(id, spared))
    for effect in region.method.effects:
        if id(effect) in allowed or _fills_own_list(effect, region):
            continue
        inside = region.holds(effect.statement.span)
        if inside and (effect.kind != "call" or id(effect.value) not in needed):
            return effect.value
    keeps = result_name(region, result)
    bound = set(bound_names(region.statements)) - {keeps}
    return read_of(bound, region.method.function.body[region.last + 1 :])


def _fills_own_list(effect: Effect, region: Region) -> bool:
    """`shape[-1] = n`, where `shape = list(...)` is made in the region."""
    if effect.kind != "store" or effect.target is None or effect.target.op != "index":
        return False
    made = effect.target.args[0]
    called = made.op == "call" and made.args[0].op == "global"
    return called and made.args[0].data == "builtins.list" and region.holds(made.span)


def read_of(names: Iterable[str], statements: Iterable[Stmt]) -> Span | None:
    """The first place in statements where one of the names stands."""
    wanted = set(names)
    for part in _expressions(tuple(statements)):
        if part.op == "name" and part.data in wanted:
            return part.span
    return None


def result_name(region: Region, result: Value) -> str | None:
    """The one name that holds the result behind the region."""
    body = region.method.function.body
    if region.last + 1 >= len(body):
        return None
    names = region.method.before.get(body[region.last + 1].span.start, {})
    holding = [name for name, value in names.items() if value is result]
    return holding[0] if len(holding) == 1 else None


def replace_region(source: Source, region: Region, text: str, rule: str) -> Edit:
    """The statements become `text`, whose lines are indented like the first of them."""
    start = source.line_start(region.start)
    end = source.line_end(region.end - 1)
    indent = source.indent(region.start)
    lines = "".join(f"{indent}{line}\n" if line else "\n" for line in text.split("\n"))
    return replace(source, Span(start, end), lines, rule)


def verbatim(source: Source, method: Method, value: Value, names: dict[str, Value]) -> str | None:
    """The text of a call in the method, if its names mean the same where `names` tells what they
    hold."""
    if value.op != "call" or value.syntax is None:
        return None
    here = names_before(method, value)
    used = {part.data for part in _expressions(value.syntax) if part.op == "name"}
    if any(here.get(name) is not names.get(name) for name in used):
        return None
    return source.text(value.span)


def bound_names(statements: Iterable[Stmt]) -> Iterator[str]:
    """Names that statements at any depth give a value."""
    for node in _nodes(tuple(statements)):
        targets: tuple[Expr, ...] = ()
        if isinstance(node, Assign):
            targets = node.targets
        elif isinstance(node, (AugAssign, For)):
            targets = (node.target,)
        elif isinstance(node, Expr) and node.op == "walrus":
            targets = (node.args[0],)
        for target in targets:
            for part in _expressions(target):
                if part.op == "name":
                    yield part.data


def _expressions(node: object) -> Iterator[Expr]:
    return (part for part in _nodes(node) if isinstance(part, Expr))


def _nodes(node: object) -> Iterator[object]:
    if isinstance(node, tuple) and not isinstance(node, Span):
        for item in node:
            yield from _nodes(item)
    elif is_dataclass(node):
        yield node
        for field in fields(node):
            yield from _nodes(getattr(node, field.name))
