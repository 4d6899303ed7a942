"""Every value that crosses a stage of the compiler.

Three layers, each frozen:

* `Source` and `Module`: the text and its syntax, freed of the parser (`passes/parse.py`).
* `Value`, `Method`, `ClassFacts`, `ModuleFacts`: what the text computes, as a graph of values with
  their places (`passes/facts.py`). Facts hold no judgement and no kind names.
* `Match`, `Refusal`, `Plan`, `Emitted`: the judgement and what follows from it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple, Union

# --------------------------------------------------------------------------- places


class Span(NamedTuple):
    """Bytes `start` up to `end` of one source."""

    start: int
    end: int


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """One file: `module` is its dotted name, `path` the name shown in diagnostics."""

    module: str
    path: str
    data: bytes
    line_starts: tuple[int, ...]
    is_package: bool = False

    @staticmethod
    def of(module: str, path: str, data: bytes, *, is_package: bool = False) -> Source:
        starts = [0]
        position = data.find(b"\n")
        while position >= 0:
            starts.append(position + 1)
            position = data.find(b"\n", position + 1)
        return Source(module, path, data, tuple(starts), is_package)

    @property
    def sha256(self) -> str:
        return sha256(self.data).hexdigest()

    def line_column(self, offset: int) -> tuple[int, int]:
        """1-based line and column (in characters) of a byte offset."""
        line = bisect_right(self.line_starts, offset)
        start = self.line_starts[line - 1]
        return line, len(self.data[start:offset].decode("utf-8", "replace")) + 1

    def line_text(self, line: int) -> str:
        start = self.line_starts[line - 1]
        end = self.line_starts[line] if line < len(self.line_starts) else len(self.data)
        return self.data[start:end].decode("utf-8", "replace").rstrip("\r\n")

    def line_start(self, offset: int) -> int:
        """Byte offset of the first character of the line that holds `offset`."""
        return self.line_starts[bisect_right(self.line_starts, offset) - 1]

    def line_end(self, offset: int) -> int:
        """Byte offset just past the line break that ends the line holding `offset`."""
        index = bisect_right(self.line_starts, offset)
        return self.line_starts[index] if index < len(self.line_starts) else len(self.data)

    def indent(self, offset: int) -> str:
        """White space before the first character of the line that holds `offset`."""
        start = self.line_start(offset)
        text = self.data[start : self.line_end(offset)].decode("utf-8", "replace")
        return text[: len(text) - len(text.lstrip(" \t"))]

    def text(self, span: Span) -> str:
        return self.data[span.start : span.end].decode("utf-8")


# --------------------------------------------------------------------------- syntax


@dataclass(frozen=True, eq=False, slots=True)
class Expr:
    """An expression. `op` says which; `args` are its parts; `data` what is not an expression.

    op          args                               data
    name        -                                  identifier
    const       -                                  value
    attr        (base,)                            attribute name
    call        (callee, *arguments)               one name (keyword), None, "*" or "**" a argument
    subscript   (base, index)                      -
    slice       (lower, upper, step)               -   (a missing part is const None)
    tuple/list/set  items                          -
    dict        keys and values in turn            -   (a `**x` entry has key const None)
    binary      (left, right)                      operator text
    unary       (operand,)                         operator text
    bool        (left, right)                      "and" | "or"
    compare     (left, right, ...)                 operator texts
    if          (test, body, orelse)               -
    lambda      (body,)                            Parameters
    comp        (element[, value])                 Comprehension
    star        (operand,)                         "*" | "**"
    walrus      (target, value)                    -
    string      parts of an f-string               -
    other       parts                              class name in `ast`
    """

    op: str
    args: tuple[Expr, ...]
    data: Any
    span: Span


@dataclass(frozen=True, eq=False, slots=True)
class Generator:
    target: Expr
    iterable: Expr
    conditions: tuple[Expr, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Comprehension:
    kind: str
    generators: tuple[Generator, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Parameter:
    name: str
    kind: str  # "positional" | "keyword" | "*" | "**"
    default: Expr | None
    annotation: Expr | None


@dataclass(frozen=True, eq=False, slots=True)
class Assign:
    targets: tuple[Expr, ...]
    value: Expr | None
    span: Span


@dataclass(frozen=True, eq=False, slots=True)
class AugAssign:
    target: Expr
    operator: str
    value: Expr
    span: Span


@dataclass(frozen=True, eq=False, slots=True)
class Evaluate:
    value: Expr
    span: Span


@dataclass(frozen=True, eq=False, slots=True)
class Return:
    value: Expr | None
    span: Span


@dataclass(frozen=True, eq=False, slots=True)
class If:
    test: Expr
    body: tuple[Stmt, ...]
    orelse: tuple[Stmt, ...]
    span: Span


@dataclass(frozen=True, eq=False, slots=True)
class For:
    target: Expr
    iterable: Expr
    body: tuple[Stmt, ...]
    orelse: tuple[Stmt, ...]
    span: Span


@dataclass(frozen=True, eq=False, slots=True)
class While:
    test: Expr
    body: tuple[Stmt, ...]
    span: Span


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """`with` and `try` statements: parts that run in order, maybe."""

    keyword: str
    heads: tuple[Expr, ...]
    bodies: tuple[tuple[Stmt, ...], ...]
    span: Span


@dataclass(frozen=True, eq=False, slots=True)
class Import:
    """`module` is dotted, with `level` leading dots; `names` maps local name to imported name.

    For `import a.b as c`, `names` is empty and `alias` is the local name bound to the module.
    """

    module: str
    level: int
    names: tuple[tuple[str, str], ...]
    alias: str | None
    is_star: bool
    module_span: Span
    span: Span


@dataclass(frozen=True, eq=False, slots=True)
class Function:
    name: str
    parameters: tuple[Parameter, ...]
    decorators: tuple[Expr, ...]
    body: tuple[Stmt, ...]
    span: Span  # from the first decorator
    def_span: Span  # from the word `def`
    name_span: Span
    is_async: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Class:
    name: str
    bases: tuple[Expr, ...]
    decorators: tuple[Expr, ...]
    body: tuple[Stmt, ...]
    span: Span
    name_span: Span


@dataclass(frozen=True, eq=False, slots=True)
class Simple:
    """pass, break, continue, raise, assert, del, global, nonlocal, type."""

    keyword: str
    args: tuple[Expr, ...]
    span: Span


Stmt = Union[  # noqa: UP007 (the classes stand below their first use)
    Assign,
    AugAssign,
    Evaluate,
    Return,
    If,
    For,
    While,
    Block,
    Import,
    Function,
    Class,
    Simple,
]


@dataclass(frozen=True, eq=False, slots=True)
class Module:
    source: Source
    body: tuple[Stmt, ...]


# --------------------------------------------------------------------------- facts


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """A node of the graph of what a function computes.

    op       args                       data
    const    -                          the constant
    param    -                          (function name, parameter name)
    global   -                          dotted name, imports resolved
    attr     (base,)                    attribute name
    call     (callee, *arguments)       one keyword (or None, "*", "**") an argument
    index    (base, key)                -
    item     (base,)                    position in an unpacked tuple
    elem     (iterable,)                -   (an element met in a loop over it)
    phi      (test, when true, else)    -
    loop     (before, after one round)  -   (after a loop)
    carried  (before,)                  name   (inside a loop, the value of an earlier round)
    binary, unary, bool, compare, tuple, list, set, dict, slice, star, string: as in `Expr`
    setitem  (base, key, value)         -   (a local after `base[key] = value`)
    comp     (element, *iterables)      kind
    closure  -                          Function or Expr
    unknown  parts                      reason
    """

    op: str
    args: tuple[Value, ...]
    data: Any
    span: Span
    syntax: Expr | None = None  # of calls and entries read: where each part stands

    def __repr__(self) -> str:
        return f"<{self.op} {self.data!r} {tuple(self.span)}>"

    def walk(self, seen: set[int] | None = None) -> Iterator[Value]:
        """Every value this one is computed from, itself first, each once.

        `seen` holds ids of values to leave out, with all that they are computed from; it grows.
        """
        seen = set() if seen is None else seen
        stack = [self]
        while stack:
            value = stack.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            yield value
            stack.extend(reversed(value.args))


@dataclass(frozen=True, eq=False, slots=True)
class Path:
    """Conditions under which an effect happens: (test, whether it held), outermost first."""

    conditions: tuple[tuple[Value, bool], ...] = ()
    in_loop: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Effect:
    """Something a method does, in order.

    kind      value           target
    call      the call        -
    store     what is stored  the attribute or index value stored to
    augment   the result      what is changed in place
    return    what            -
    """

    kind: str
    value: Value
    target: Value | None
    path: Path
    statement: Stmt


@dataclass(frozen=True, eq=False, slots=True)
class Method:
    owner: str | None  # qualified class name, None for a function of the module
    function: Function
    params: tuple[Value, ...]
    effects: tuple[Effect, ...]
    returns: tuple[Effect, ...]
    rebound: frozenset[str]  # names that a loop target or an assignment gives a new value
    before: dict[int, dict[str, Value]]  # what names hold before each statement, by its start byte

    @property
    def name(self) -> str:
        return self.function.name

    def calls(self) -> Iterator[Effect]:
        return (effect for effect in self.effects if effect.kind == "call")


@dataclass(frozen=True, eq=False, slots=True)
class ClassFacts:
    module: str
    syntax: Class
    bases: tuple[Value, ...]
    methods: dict[str, Method]
    attributes: dict[str, Value]  # what __init__ leaves in self.<name>

    @property
    def name(self) -> str:
        return self.syntax.name

    @property
    def qualified(self) -> str:
        return f"{self.module}.{self.syntax.name}"


@dataclass(frozen=True, eq=False, slots=True)
class ModuleFacts:
    module: Module
    names: dict[str, Value]  # top-level names
    imports: tuple[Import, ...]
    classes: dict[str, ClassFacts]
    functions: dict[str, Method]

    @property
    def source(self) -> Source:
        return self.module.source

    def methods(self) -> Iterator[Method]:
        """All functions of the file: those of its classes, and its own."""
        for cls in self.classes.values():
            yield from cls.methods.values()
        yield from self.functions.values()


# --------------------------------------------------------------------------- judgement


@dataclass(frozen=True, slots=True)
class Place:
    path: str
    line: int
    column: int
    end_column: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """Why something was refused: a slug, a place, the reason, and who can act."""

    slug: str
    message: str
    place: Place | None
    label: str = ""
    nearest: str = ""
    act: str = "compiler"  # "source" | "compiler" | "fundamental"
    severity: str = "refused"  # "refused" | "error" | "note"


@dataclass(frozen=True, slots=True)
class Evidence:
    """One fact that speaks for a kind, with where it stands."""

    role: str
    place: Place


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace the bytes of `span`, which must read `before`, by `after`."""

    span: Span
    before: bytes
    after: bytes
    rule: str


@dataclass(frozen=True, slots=True)
class Site:
    """One place where tokens are mixed, and what becomes of it."""

    rule: str
    place: Place


@dataclass(frozen=True, slots=True)
class Match:
    """A class was recognised: its kind, the route it takes and the edits that follow.

    `otherwise` is what it becomes in a file whose rewritten text is not proved row by row.
    """

    kind: str
    route: str  # "kernel" | "gathered" | "per-sequence"
    class_name: str
    features: tuple[str, ...]
    evidence: tuple[Evidence, ...]
    sites: tuple[Site, ...]
    edits: tuple[Edit, ...]
    imports: tuple[str, ...]
    otherwise: Match | None = None


@dataclass(frozen=True, slots=True)
class Miss:
    """A kind does not fit: how many of its facts held, and the first that did not."""

    kind: str
    held: int
    missing: str
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class Assumption:
    """Something that the proof of token independence rests on and does not show."""

    text: str
    place: Place | None


@dataclass(frozen=True, slots=True)
class Refusal:
    class_name: str
    diagnostics: tuple[Diagnostic, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Verdict:
    """How one file is run: token-major, the whole model once per sequence, or not at all."""

    mode: str  # "sites" | "model" | "none"
    entry: ClassFacts | None
    reasons: tuple[Diagnostic, ...]  # why not token-major
    assumptions: tuple[Assumption, ...] = ()  # what the proof of token independence rests on


@dataclass(frozen=True, slots=True)
class Contract:
    """What the runtime must know to call a language model that stands inside a larger one.

    `positions`: its forward takes explicit position ids. `reads`: names of its arguments, those
    taken from `**kwargs` included, and "**" if it hands the rest on. `state`: for each class, the
    attributes that a forward pass leaves on the model, which belong to one sequence.
    """

    entry: str
    positions: bool
    reads: tuple[str, ...]
    state: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All edits of one file, disjoint and sorted."""

    module: str
    route: str  # the worst route in the file: kernel, gathered, per-sequence, model, refused, none
    matches: tuple[Match, ...]
    refusals: tuple[Refusal, ...]
    notes: tuple[Diagnostic, ...]
    edits: tuple[Edit, ...]
    contract: Contract | None = None  # of a language model inside a larger one
    assumptions: tuple[Assumption, ...] = ()


@dataclass(frozen=True, slots=True)
class Emitted:
    """One generated file and its manifest, both as bytes, with their names in the output folder."""

    name: str
    code: bytes | None
    manifest: bytes
    plan: Plan = field(compare=False)
