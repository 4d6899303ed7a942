"""Source bytes to syntax: the only module that knows parsers.

libcst reads every file that something is made from: it says whether the text is Python, whatever
interpreter runs the compiler, and must print it back byte for byte. Places come from the standard
library's `ast`, which has them in bytes at a tenth of the time that libcst's metadata takes; edits
are byte spans, so nothing else of the concrete tree is needed. Parentheses are the one thing `ast`
leaves out: they are looked up in the text, so that a span covers the parentheses around its
expression.
"""

from __future__ import annotations

import ast
import re
import tokenize
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import libcst

from ..ir import (
    Assign,
    AugAssign,
    Block,
    Class,
    Comprehension,
    Evaluate,
    Expr,
    For,
    Function,
    Generator,
    If,
    Import,
    Module,
    Parameter,
    Return,
    Simple,
    Source,
    Span,
    Stmt,
    While,
)


class ParseError(Exception):
    """The source is not Python that this interpreter can read."""

    def __init__(self, source: Source, message: str, line: int, column: int) -> None:
        super().__init__(f"{source.path}:{line}:{column}: {message}")
        self.source, self.message, self.line, self.column = source, message, line, column


DEEPEST = 200  # levels of syntax; every stage after this one recurses over them


def parse(source: Source) -> Module:
    """Parse one file.

    Raises:
        ParseError: with line and column, if the text is no Python, not valid UTF-8, or nested more
            than `DEEPEST` levels.
    """
    data = source.data
    if data.startswith(b"\xef\xbb\xbf"):
        raise ParseError(source, "the file starts with a byte order mark", 1, 1)
    if (bare := _CARRIAGE.search(data)) is not None:
        line = data.count(b"\n", 0, bare.start()) + 1
        raise ParseError(source, "a carriage return without a line feed", line, 1)
    try:
        encoding, _ = tokenize.detect_encoding(BytesIO(source.data).readline)
        if encoding.lower().replace("_", "-") not in ("utf-8", "utf-8-sig", "ascii", "us-ascii"):
            raise ParseError(source, f"encoding {encoding} is not UTF-8", 1, 1)
        source.data.decode("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in the model's strings: not ours to tell
            tree = ast.parse(source.data)
        return Module(source, _Lower(source).suite(tree.body))
    except SyntaxError as error:
        last = len(source.line_starts)
        line = min(max(error.lineno or 1, 1), last)
        raise ParseError(source, error.msg, line, max(error.offset or 1, 1)) from error
    except (UnicodeDecodeError, LookupError, ValueError) as error:
        raise ParseError(source, f"cannot decode the file: {error}", 1, 1) from error
    except (RecursionError, MemoryError) as error:
        raise ParseError(source, "nested too deeply", 1, 1) from error


def read_concretely(source: Source) -> None:
    """Have libcst read a file that `parse` has read: its syntax is not too deep.

    Its grammar is not the interpreter's, so two parsers must agree that this is Python; and what it
    read must print as the very bytes of the file, which edits by spans rely on. That takes longer
    than all else about a file, so only files that something is made from are read so.

    Raises:
        ParseError: with line and column.
    """
    try:
        module = libcst.parse_module(source.data)
    except libcst.ParserSyntaxError as error:
        line = min(max(error.raw_line, 1), len(source.line_starts))
        raise ParseError(source, error.message, line, error.raw_column + 1) from error
    if module.bytes != source.data:
        raise ParseError(source, "the concrete syntax does not print as the file", 1, 1)


_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.MatMult: "@",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.BitXor: "^",
    ast.LShift: "<<",
    ast.RShift: ">>",
}
_UNARY: dict[type[ast.unaryop], str] = {
    ast.USub: "-",
    ast.UAdd: "+",
    ast.Not: "not",
    ast.Invert: "~",
}
_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.In: "in",
    ast.NotIn: "not in",
    ast.Is: "is",
    ast.IsNot: "is not",
}
_KEYWORDS = {"delete": "del"}
_CARRIAGE = re.compile(rb"\r(?!\n)")
_FROM = re.compile(rb"from\b(.*?)\bimport\b", re.DOTALL)
_DEF = re.compile(rb"(?:async[\s\\]+)?(?:def|class)[\s\\]+")


class _Lower:
    """Walks the tree once and builds the syntax of `ir`."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.data = source.data
        self.starts = source.line_starts
        self.depth = 0
        self.comments: set[int] | None = None  # where they begin, once that has been asked
        self.inside: Span | None = None  # of an f-string: places in it are not told exactly

    # ----------------------------------------------------------------- places

    def span(self, node: Any) -> Span:
        if self.inside is not None:
            return self.inside
        start = self.starts[node.lineno - 1] + node.col_offset
        return Span(start, self.starts[node.end_lineno - 1] + node.end_col_offset)

    def outer(self, span: Span, bound: Span) -> Span:
        """The span with the parentheses around it, as far as they lie within `bound`."""
        start, end = span
        while True:
            left, right = self.left_of(start), self.right_of(end)
            if left < bound.start or right >= bound.end:
                return Span(start, end)
            if self.data[left : left + 1] != b"(" or self.data[right : right + 1] != b")":
                return Span(start, end)
            start, end = left, right + 1

    def left_of(self, start: int) -> int:
        """Where the last character before `start` is that is no white space."""
        place = start - 1
        while place >= 0:
            if self.data[place] in b" \t\f\\":
                place -= 1
            elif self.data[place] in b"\r\n":
                place -= 1
                line = self.starts[max(0, self._line(place))]
                comment = self.comment_in(line, place + 1)
                if comment >= 0:
                    place = comment - 1
            else:
                break
        return place

    def comment_in(self, start: int, end: int) -> int:
        """Where the comment of a line that ends outside of strings begins; -1 without one."""
        comment = self.data.find(b"#", start, end)
        if comment < 0:
            return -1
        line = self.data[start:end]
        if b"'" not in line and b'"' not in line:
            return comment
        if self.comments is None:  # the sign may stand in a string
            words = tokenize.tokenize(BytesIO(self.data).readline)
            self.comments = {
                self.starts[word.start[0] - 1] + len(word.line[: word.start[1]].encode())
                for word in words
                if word.type == tokenize.COMMENT
            }
        return next((at for at in range(comment, end) if at in self.comments), -1)

    def _line(self, place: int) -> int:
        return bisect_right(self.starts, place) - 1

    def right_of(self, end: int) -> int:
        """Where the first character from `end` on is that is no white space or comment."""
        place = end
        while place < len(self.data):
            if self.data[place] in b" \t\f\\\r\n":
                place += 1
            elif self.data[place : place + 1] == b"#":
                place = self.data.find(b"\n", place)
                if place < 0:
                    return len(self.data)
            else:
                break
        return place

    # ----------------------------------------------------------------- expressions

    def expr(self, node: ast.expr, bound: Span | None = None) -> Expr:
        """An expression; parentheses outside `bound` (its statement or parent) are not its own."""
        lower: Callable[[Any, Span], Expr] | None = getattr(self, f"_{type(node).__name__}", None)
        own = self.span(node)
        self.enter(own)
        if lower is None:
            parts = [c for c in ast.iter_child_nodes(node) if isinstance(c, ast.expr)]
            made = Expr("other", tuple(self.expr(c, own) for c in parts), type(node).__name__, own)
        else:
            made = lower(node, own)
        self.depth -= 1
        span = self.outer(own, bound) if bound is not None and self.inside is None else own
        return made if made.span == span else Expr(made.op, made.args, made.data, span)

    def enter(self, span: Span) -> None:
        self.depth += 1
        if self.depth > DEEPEST:
            line, column = self.source.line_column(span.start)
            raise ParseError(self.source, "nested too deeply", line, column)

    def _Name(self, node: ast.Name, span: Span) -> Expr:
        return Expr("name", (), node.id, span)

    def _Constant(self, node: ast.Constant, span: Span) -> Expr:
        return Expr("const", (), node.value, span)

    def _JoinedStr(self, node: ast.JoinedStr, span: Span) -> Expr:
        outer, self.inside = self.inside, span
        parts = tuple(
            self.expr(part.value) for part in node.values if isinstance(part, ast.FormattedValue)
        )
        self.inside = outer
        return Expr("string", parts, None, span)

    def _Attribute(self, node: ast.Attribute, span: Span) -> Expr:
        return Expr("attr", (self.expr(node.value, span),), node.attr, span)

    def _Call(self, node: ast.Call, span: Span) -> Expr:
        function = self.expr(node.func, span)
        opening = self.right_of(function.span.end)
        within = Span(opening + 1, span.end - 1) if self.inside is None else span
        given: list[tuple[ast.expr, str | None]] = [
            (a.value, "*") if isinstance(a, ast.Starred) else (a, None) for a in node.args
        ]
        given += [(keyword.value, keyword.arg or "**") for keyword in node.keywords]
        # Starred arguments may stand behind keywords: the order is that of the text.
        given.sort(key=lambda pair: (pair[0].lineno, pair[0].col_offset))
        args, keywords = [function], []
        for value, keyword in given:
            made = self.expr(value, within)
            if made.span.start < within.start:  # `f(x for x in y)`: the call's own parentheses
                first, last = self.right_of(within.start), self.left_of(within.end) + 1
                made = Expr(made.op, made.args, made.data, Span(first, last))
            args.append(made)
            keywords.append(keyword)
        return Expr("call", tuple(args), tuple(keywords), span)

    def _Subscript(self, node: ast.Subscript, span: Span) -> Expr:
        base = self.expr(node.value, span)
        key = node.slice
        if isinstance(key, ast.Tuple) and key.elts:
            within = self.span(key)
            keys = tuple(self.expr(part, within) for part in key.elts)
            index = Expr("tuple", keys, None, keys[0].span)
        else:
            index = self.expr(key, Span(base.span.end, span.end))
        return Expr("subscript", (base, index), None, span)

    def _Slice(self, node: ast.Slice, span: Span) -> Expr:
        parts = tuple(
            self.expr(part, span) if part is not None else Expr("const", (), None, span)
            for part in (node.lower, node.upper, node.step)
        )
        return Expr("slice", parts, None, span)

    def _Starred(self, node: ast.Starred, span: Span) -> Expr:
        return Expr("star", (self.expr(node.value, span),), "*", span)

    def _sequence(self, op: str, node: Any, span: Span) -> Expr:
        return Expr(op, tuple(self.expr(part, span) for part in node.elts), None, span)

    def _Tuple(self, node: ast.Tuple, span: Span) -> Expr:
        return self._sequence("tuple", node, span)

    def _List(self, node: ast.List, span: Span) -> Expr:
        return self._sequence("list", node, span)

    def _Set(self, node: ast.Set, span: Span) -> Expr:
        return self._sequence("set", node, span)

    def _Dict(self, node: ast.Dict, span: Span) -> Expr:
        parts: list[Expr] = []
        for key, value in zip(node.keys, node.values, strict=True):
            made = self.expr(value, span)
            first = self.expr(key, span) if key is not None else None
            parts += [first or Expr("const", (), None, made.span), made]
        return Expr("dict", tuple(parts), None, span)

    def _BinOp(self, node: ast.BinOp, span: Span) -> Expr:
        parts = (self.expr(node.left, span), self.expr(node.right, span))
        return Expr("binary", parts, _BINARY[type(node.op)], span)

    def _UnaryOp(self, node: ast.UnaryOp, span: Span) -> Expr:
        operator = _UNARY[type(node.op)]
        operand = self.expr(node.operand, span)
        if operator == "-" and operand.op == "const" and isinstance(operand.data, (int, float)):
            return Expr("const", (), -operand.data, span)
        return Expr("unary", (operand,), operator, span)

    def _BoolOp(self, node: ast.BoolOp, span: Span) -> Expr:
        operator = "and" if isinstance(node.op, ast.And) else "or"
        first, *rest = (self.expr(part, span) for part in node.values)
        for part in rest:
            first = Expr("bool", (first, part), operator, Span(first.span.start, part.span.end))
        return Expr("bool", first.args, operator, span)

    def _Compare(self, node: ast.Compare, span: Span) -> Expr:
        parts = tuple(self.expr(part, span) for part in (node.left, *node.comparators))
        return Expr("compare", parts, tuple(_COMPARE[type(op)] for op in node.ops), span)

    def _IfExp(self, node: ast.IfExp, span: Span) -> Expr:
        parts = tuple(self.expr(part, span) for part in (node.test, node.body, node.orelse))
        return Expr("if", parts, None, span)

    def _Lambda(self, node: ast.Lambda, span: Span) -> Expr:
        return Expr("lambda", (self.expr(node.body, span),), self.parameters(node.args), span)

    def _NamedExpr(self, node: ast.NamedExpr, span: Span) -> Expr:
        return Expr(
            "walrus", (self.expr(node.target, span), self.expr(node.value, span)), None, span
        )

    def _comprehension(
        self, node: Any, elements: Sequence[ast.expr], kind: str, span: Span
    ) -> Expr:
        generators = tuple(
            Generator(
                self.expr(part.target, span),
                self.expr(part.iter, span),
                tuple(self.expr(test, span) for test in part.ifs),
            )
            for part in node.generators
        )
        made = tuple(self.expr(element, span) for element in elements)
        return Expr("comp", made, Comprehension(kind, generators), span)

    def _ListComp(self, node: ast.ListComp, span: Span) -> Expr:
        return self._comprehension(node, (node.elt,), "list", span)

    def _SetComp(self, node: ast.SetComp, span: Span) -> Expr:
        return self._comprehension(node, (node.elt,), "set", span)

    def _GeneratorExp(self, node: ast.GeneratorExp, span: Span) -> Expr:
        return self._comprehension(node, (node.elt,), "generator", span)

    def _DictComp(self, node: ast.DictComp, span: Span) -> Expr:
        return self._comprehension(node, (node.key, node.value), "dict", span)

    # ----------------------------------------------------------------- statements

    def suite(self, body: Sequence[ast.stmt]) -> tuple[Stmt, ...]:
        made: list[Stmt] = []
        for node in body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                made += self.imports(node, self.span(node))
            else:
                span = self.span(node)
                self.enter(span)
                made.append(self.statement(node, span))
                self.depth -= 1
        return tuple(made)

    def statement(self, node: ast.stmt, span: Span) -> Stmt:
        match node:
            case ast.Assign():
                targets = tuple(self.expr(target, span) for target in node.targets)
                return Assign(targets, self.expr(node.value, span), span)
            case ast.AnnAssign():
                value = self.expr(node.value, span) if node.value is not None else None
                return Assign((self.expr(node.target, span),), value, span)
            case ast.AugAssign():
                target, value = self.expr(node.target, span), self.expr(node.value, span)
                return AugAssign(target, _BINARY[type(node.op)], value, span)
            case ast.Expr():
                return Evaluate(self.expr(node.value, span), span)
            case ast.Return():
                return Return(self.expr(node.value, span) if node.value is not None else None, span)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                return self.function(node, span)
            case ast.ClassDef():
                return self.class_(node, span)
            case ast.If():
                body, orelse = self.suite(node.body), self.suite(node.orelse)
                return If(self.expr(node.test, span), body, orelse, span)
            case ast.For() | ast.AsyncFor():
                parts = self.expr(node.target, span), self.expr(node.iter, span)
                return For(*parts, self.suite(node.body), self.suite(node.orelse), span)
            case ast.While():
                return While(self.expr(node.test, span), self.suite(node.body), span)
            case ast.With() | ast.AsyncWith():
                heads = tuple(self.expr(item.context_expr) for item in node.items)
                return Block("with", heads, (self.suite(node.body),), span)
            case ast.Try():
                return self.try_(node, span)
        if type(node).__name__ == "TryStar":
            return self.try_(node, span)
        parts_ = tuple(
            self.expr(child, span)
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.expr)
        )
        keyword = type(node).__name__.lower()
        return Simple(_KEYWORDS.get(keyword, keyword), parts_, span)

    def try_(self, node: Any, span: Span) -> Block:
        bodies = [self.suite(node.body)]
        bodies += [self.suite(handler.body) for handler in node.handlers]
        bodies += [self.suite(part) for part in (node.orelse, node.finalbody) if part]
        return Block("try", (), tuple(bodies), span)

    def imports(self, node: ast.Import | ast.ImportFrom, span: Span) -> list[Stmt]:
        if isinstance(node, ast.Import):
            made: list[Stmt] = []
            for alias in node.names:
                start = self.span(alias).start
                where = Span(start, start + len(alias.name.encode()))
                made.append(
                    Import(alias.name, 0, (), alias.asname or alias.name, False, where, span)
                )
            return made
        found = _FROM.match(self.data, span.start, span.end)
        assert found is not None
        text = found.group(1)
        start = found.start(1) + len(text) - len(text.lstrip(b" \t\f\r\n\\"))
        where = Span(start, found.start(1) + len(text.rstrip(b" \t\f\r\n\\")))
        is_star = node.names[0].name == "*"
        names = () if is_star else tuple((a.asname or a.name, a.name) for a in node.names)
        return [Import(node.module or "", node.level, names, None, is_star, where, span)]

    def _decorators(self, node: Any) -> tuple[Expr, ...]:
        return tuple(self.expr(d) for d in node.decorator_list)

    def _from_decorators(self, node: Any, span: Span) -> Span:
        if not node.decorator_list:
            return span
        first = self.span(node.decorator_list[0]).start
        return Span(self.data.rindex(b"@", 0, first), span.end)

    def _name_span(self, span: Span, name: str) -> Span:
        found = _DEF.match(self.data, span.start, span.end)
        assert found is not None
        return Span(found.end(), found.end() + len(name.encode()))

    def class_(self, node: ast.ClassDef, span: Span) -> Class:
        name = self._name_span(span, node.name)
        opening = self.right_of(name.end)
        last = max((self.span(base).end for base in node.bases), default=opening)
        within = Span(opening + 1, self.right_of(last))
        return Class(
            node.name,
            tuple(self.expr(base, within) for base in node.bases),
            self._decorators(node),
            self.suite(node.body),
            self._from_decorators(node, span),
            name,
        )

    def function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, span: Span) -> Function:
        return Function(
            node.name,
            self.parameters(node.args),
            self._decorators(node),
            self.suite(node.body),
            self._from_decorators(node, span),
            span,
            self._name_span(span, node.name),
            isinstance(node, ast.AsyncFunctionDef),
        )

    def parameters(self, node: ast.arguments) -> tuple[Parameter, ...]:
        plain = [*node.posonlyargs, *node.args]
        missing = len(plain) - len(node.defaults)
        made = [
            self._parameter(
                part, "positional", node.defaults[i - missing] if i >= missing else None
            )
            for i, part in enumerate(plain)
        ]
        if node.vararg is not None:
            made.append(self._parameter(node.vararg, "*", None))
        made += [
            self._parameter(part, "keyword", default)
            for part, default in zip(node.kwonlyargs, node.kw_defaults, strict=True)
        ]
        if node.kwarg is not None:
            made.append(self._parameter(node.kwarg, "**", None))
        return tuple(made)

    def _parameter(self, node: ast.arg, kind: str, default: ast.expr | None) -> Parameter:
        annotation = self.expr(node.annotation) if node.annotation is not None else None
        value = self.expr(default) if default is not None else None
        return Parameter(node.arg, kind, value, annotation)
