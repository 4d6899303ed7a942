"""Source bytes to syntax: the only module that knows libcst."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import libcst as cst
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper

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
    """The source is not Python that libcst can read."""

    def __init__(self, source: Source, message: str, line: int, column: int) -> None:
        super().__init__(f"{source.path}:{line}:{column}: {message}")
        self.source, self.message, self.line, self.column = source, message, line, column


def parse(source: Source) -> Module:
    """Parse one file.

    Raises:
        ParseError: with line and column, if the text is no Python or not valid UTF-8.
    """
    try:
        tree = cst.parse_module(source.data)
    except cst.ParserSyntaxError as error:
        raise ParseError(source, error.message, error.raw_line, error.raw_column + 1) from error
    except (UnicodeDecodeError, LookupError, SyntaxError) as error:
        raise ParseError(source, f"cannot decode the file: {error}", 1, 1) from error
    except RecursionError as error:
        raise ParseError(source, "nested too deeply", 1, 1) from error
    if tree.encoding.lower().replace("_", "-") not in ("utf-8", "ascii", "us-ascii"):
        raise ParseError(source, f"encoding {tree.encoding} is not UTF-8", 1, 1)
    wrapper = MetadataWrapper(tree, unsafe_skip_copy=True)
    try:
        spans = wrapper.resolve(ByteSpanPositionProvider)
        return Module(source, _Lower(source, spans).suite(tree.body))
    except RecursionError as error:
        raise ParseError(source, "nested too deeply", 1, 1) from error


_BINARY = {
    "Add": "+",
    "Subtract": "-",
    "Multiply": "*",
    "Divide": "/",
    "FloorDivide": "//",
    "Modulo": "%",
    "Power": "**",
    "MatrixMultiply": "@",
    "BitAnd": "&",
    "BitOr": "|",
    "BitXor": "^",
    "LeftShift": "<<",
    "RightShift": ">>",
}
_UNARY = {"Minus": "-", "Plus": "+", "Not": "not", "BitInvert": "~"}
_COMPARE = {
    "Equal": "==",
    "NotEqual": "!=",
    "LessThan": "<",
    "LessThanEqual": "<=",
    "GreaterThan": ">",
    "GreaterThanEqual": ">=",
    "In": "in",
    "NotIn": "not in",
    "Is": "is",
    "IsNot": "is not",
}


class _Lower:
    """Walks a libcst tree once and builds the syntax of `ir`."""

    def __init__(self, source: Source, spans: Any) -> None:
        self.source = source
        self.spans = spans

    # ----------------------------------------------------------------- expressions

    def span(self, node: cst.CSTNode) -> Span:
        span = self.spans[node]
        return Span(span.start, span.start + span.length)

    def expr(self, node: cst.BaseExpression) -> Expr:
        lower: Callable[[Any], Expr] | None = getattr(self, f"_{type(node).__name__}", None)
        span = self._with_parentheses(node)
        if lower is None:
            parts = tuple(self.expr(c) for c in node.children if isinstance(c, cst.BaseExpression))
            return Expr("other", parts, type(node).__name__, span)
        made = lower(node)
        return made if made.span == span else Expr(made.op, made.args, made.data, span)

    def _with_parentheses(self, node: cst.BaseExpression) -> Span:
        span = self.span(node)
        if not node.lpar:
            return span
        first, last = self.spans.get(node.lpar[0]), self.spans.get(node.rpar[-1])
        if first is None or last is None:
            return span
        return Span(min(first.start, span.start), max(last.start + last.length, span.end))

    def make(self, op: str, node: cst.CSTNode, args: Sequence[Expr] = (), data: Any = None) -> Expr:
        return Expr(op, tuple(args), data, self.span(node))

    def _none(self, node: cst.CSTNode) -> Expr:
        return self.make("const", node, (), None)

    def _Name(self, node: cst.Name) -> Expr:
        constants = {"None": None, "True": True, "False": False}
        if node.value in constants:
            return self.make("const", node, (), constants[node.value])
        return self.make("name", node, (), node.value)

    def _Integer(self, node: cst.Integer) -> Expr:
        return self.make("const", node, (), node.evaluated_value)

    def _Float(self, node: cst.Float) -> Expr:
        return self.make("const", node, (), node.evaluated_value)

    def _Imaginary(self, node: cst.Imaginary) -> Expr:
        return self.make("const", node, (), node.evaluated_value)

    def _SimpleString(self, node: cst.SimpleString) -> Expr:
        return self.make("const", node, (), node.evaluated_value)

    def _ConcatenatedString(self, node: cst.ConcatenatedString) -> Expr:
        value = node.evaluated_value
        if value is not None:
            return self.make("const", node, (), value)
        return self.make("string", node, (self.expr(node.left), self.expr(node.right)))

    def _FormattedString(self, node: cst.FormattedString) -> Expr:
        parts = [
            self.expr(part.expression)
            for part in node.parts
            if isinstance(part, cst.FormattedStringExpression)
        ]
        return self.make("string", node, parts)

    def _Ellipsis(self, node: cst.Ellipsis) -> Expr:
        return self.make("const", node, (), ...)

    def _Attribute(self, node: cst.Attribute) -> Expr:
        return self.make("attr", node, (self.expr(node.value),), node.attr.value)

    def _Call(self, node: cst.Call) -> Expr:
        args, keywords = [self.expr(node.func)], []
        for argument in node.args:
            args.append(self.expr(argument.value))
            keywords.append(argument.keyword.value if argument.keyword else argument.star or None)
        return self.make("call", node, args, tuple(keywords))

    def _Subscript(self, node: cst.Subscript) -> Expr:
        keys = [self._index(element.slice, element) for element in node.slice]
        single = len(keys) == 1 and not isinstance(
            node.slice[0].comma, cst.Comma
        )  # x[a,] is a tuple
        key = keys[0] if single else Expr("tuple", tuple(keys), None, keys[0].span)
        return self.make("subscript", node, (self.expr(node.value), key))

    def _index(self, node: cst.BaseSlice, element: cst.CSTNode) -> Expr:
        if isinstance(node, cst.Index):
            value = self.expr(node.value)
            return self.make("star", element, (value,), "*") if node.star else value
        assert isinstance(node, cst.Slice)
        parts = [
            self.expr(part) if part is not None else self._none(element)
            for part in (node.lower, node.upper, node.step)
        ]
        return self.make("slice", element, parts)

    def _elements(self, node: Any) -> list[Expr]:
        made = []
        for element in node.elements:
            value = self.expr(element.value)
            starred = isinstance(element, cst.StarredElement)
            made.append(self.make("star", element, (value,), "*") if starred else value)
        return made

    def _Tuple(self, node: cst.Tuple) -> Expr:
        return self.make("tuple", node, self._elements(node))

    def _List(self, node: cst.List) -> Expr:
        return self.make("list", node, self._elements(node))

    def _Set(self, node: cst.Set) -> Expr:
        return self.make("set", node, self._elements(node))

    def _Dict(self, node: cst.Dict) -> Expr:
        parts: list[Expr] = []
        for element in node.elements:
            key = self.expr(element.key) if isinstance(element, cst.DictElement) else None
            parts += [key or self._none(element), self.expr(element.value)]
        return self.make("dict", node, parts)

    def _BinaryOperation(self, node: cst.BinaryOperation) -> Expr:
        operator = _BINARY[type(node.operator).__name__]
        return self.make("binary", node, (self.expr(node.left), self.expr(node.right)), operator)

    def _UnaryOperation(self, node: cst.UnaryOperation) -> Expr:
        operator = _UNARY[type(node.operator).__name__]
        operand = self.expr(node.expression)
        if operator == "-" and operand.op == "const" and isinstance(operand.data, (int, float)):
            return self.make("const", node, (), -operand.data)
        return self.make("unary", node, (operand,), operator)

    def _BooleanOperation(self, node: cst.BooleanOperation) -> Expr:
        operator = "and" if isinstance(node.operator, cst.And) else "or"
        return self.make("bool", node, (self.expr(node.left), self.expr(node.right)), operator)

    def _Comparison(self, node: cst.Comparison) -> Expr:
        args, operators = [self.expr(node.left)], []
        for target in node.comparisons:
            operators.append(_COMPARE[type(target.operator).__name__])
            args.append(self.expr(target.comparator))
        return self.make("compare", node, args, tuple(operators))

    def _IfExp(self, node: cst.IfExp) -> Expr:
        parts = (self.expr(node.test), self.expr(node.body), self.expr(node.orelse))
        return self.make("if", node, parts)

    def _Lambda(self, node: cst.Lambda) -> Expr:
        return self.make("lambda", node, (self.expr(node.body),), self.parameters(node.params))

    def _NamedExpr(self, node: cst.NamedExpr) -> Expr:
        return self.make("walrus", node, (self.expr(node.target), self.expr(node.value)))

    def _comprehension(self, node: Any, elements: Sequence[Expr], kind: str) -> Expr:
        generators = []
        part: cst.CompFor | None = node.for_in
        while part is not None:
            conditions = tuple(self.expr(condition.test) for condition in part.ifs)
            generators.append(Generator(self.expr(part.target), self.expr(part.iter), conditions))
            part = part.inner_for_in
        return self.make("comp", node, elements, Comprehension(kind, tuple(generators)))

    def _ListComp(self, node: cst.ListComp) -> Expr:
        return self._comprehension(node, (self.expr(node.elt),), "list")

    def _SetComp(self, node: cst.SetComp) -> Expr:
        return self._comprehension(node, (self.expr(node.elt),), "set")

    def _GeneratorExp(self, node: cst.GeneratorExp) -> Expr:
        return self._comprehension(node, (self.expr(node.elt),), "generator")

    def _DictComp(self, node: cst.DictComp) -> Expr:
        return self._comprehension(node, (self.expr(node.key), self.expr(node.value)), "dict")

    # ----------------------------------------------------------------- statements

    def suite(self, body: Sequence[Any]) -> tuple[Stmt, ...]:
        made: list[Stmt] = []
        for node in body:
            if isinstance(node, cst.SimpleStatementLine):
                for small in node.body:
                    made.extend(self.small(small))
            else:
                made.append(self.compound(node))
        return tuple(made)

    def block(self, node: cst.BaseSuite) -> tuple[Stmt, ...]:
        if isinstance(node, cst.SimpleStatementSuite):
            return tuple(stmt for small in node.body for stmt in self.small(small))
        return self.suite(node.body)

    def small(self, node: cst.BaseSmallStatement) -> list[Stmt]:
        span = self.span(node)
        match node:
            case cst.Assign():
                targets = tuple(self.expr(target.target) for target in node.targets)
                return [Assign(targets, self.expr(node.value), span)]
            case cst.AnnAssign():
                value = self.expr(node.value) if node.value is not None else None
                return [Assign((self.expr(node.target),), value, span)]
            case cst.AugAssign():
                operator = _BINARY[type(node.operator).__name__.removesuffix("Assign")]
                return [AugAssign(self.expr(node.target), operator, self.expr(node.value), span)]
            case cst.Expr():
                return [Evaluate(self.expr(node.value), span)]
            case cst.Return():
                value = self.expr(node.value) if node.value is not None else None
                return [Return(value, span)]
            case cst.Import() | cst.ImportFrom():
                return self.imports(node, span)
        parts = tuple(
            self.expr(child) for child in node.children if isinstance(child, cst.BaseExpression)
        )
        return [Simple(type(node).__name__.lower(), parts, span)]

    def imports(self, node: cst.Import | cst.ImportFrom, span: Span) -> list[Stmt]:
        made: list[Stmt] = []
        if isinstance(node, cst.Import):
            for alias in node.names:
                module = _dotted(alias.name)
                local = _dotted(alias.asname.name) if alias.asname else None
                where = self.span(alias.name)
                made.append(Import(module, 0, (), local or module, False, where, span))
            return made
        module = _dotted(node.module) if node.module is not None else ""
        end = self.span(node.module).end if node.module is not None else 0
        if node.relative:
            start = self.span(node.relative[0]).start
            end = end or self.span(node.relative[-1]).end
        else:
            assert node.module is not None
            start = self.span(node.module).start
        is_star = isinstance(node.names, cst.ImportStar)
        names = (
            ()
            if isinstance(node.names, cst.ImportStar)
            else tuple(
                (
                    _dotted(alias.asname.name) if alias.asname else _dotted(alias.name),
                    _dotted(alias.name),
                )
                for alias in node.names
            )
        )
        where = Span(start, end)
        return [Import(module, len(node.relative), names, None, is_star, where, span)]

    def compound(self, node: cst.BaseCompoundStatement) -> Stmt:
        span = self.span(node)
        match node:
            case cst.FunctionDef():
                return self.function(node, span)
            case cst.ClassDef():
                bases = tuple(self.expr(argument.value) for argument in node.bases)
                return Class(
                    node.name.value,
                    bases,
                    tuple(self.expr(d.decorator) for d in node.decorators),
                    self.block(node.body),
                    self._from_decorators(node, span),
                    self.span(node.name),
                )
            case cst.If():
                orelse: tuple[Stmt, ...] = ()
                if isinstance(node.orelse, cst.If):
                    orelse = (self.compound(node.orelse),)
                elif node.orelse is not None:
                    orelse = self.block(node.orelse.body)
                return If(self.expr(node.test), self.block(node.body), orelse, span)
            case cst.For():
                tail = self.block(node.orelse.body) if node.orelse is not None else ()
                parts = self.expr(node.target), self.expr(node.iter)
                return For(*parts, self.block(node.body), tail, span)
            case cst.While():
                return While(self.expr(node.test), self.block(node.body), span)
            case cst.With():
                heads = tuple(self.expr(item.item) for item in node.items)
                return Block("with", heads, (self.block(node.body),), span)
            case cst.Try() | cst.TryStar():
                bodies = [self.block(node.body)]
                bodies += [self.block(handler.body) for handler in node.handlers]
                bodies += [self.block(p.body) for p in (node.orelse, node.finalbody) if p]
                return Block("try", (), tuple(bodies), span)
        parts_ = tuple(self.expr(c) for c in node.children if isinstance(c, cst.BaseExpression))
        return Simple(type(node).__name__.lower(), parts_, span)

    def _from_decorators(self, node: cst.FunctionDef | cst.ClassDef, span: Span) -> Span:
        if not node.decorators:
            return span
        return Span(self.span(node.decorators[0]).start, span.end)

    def function(self, node: cst.FunctionDef, span: Span) -> Function:
        start = self.source.data.rfind(b"def", 0, self.span(node.name).start)
        if node.asynchronous is not None:
            start = self.span(node.asynchronous).start
        return Function(
            node.name.value,
            self.parameters(node.params),
            tuple(self.expr(d.decorator) for d in node.decorators),
            self.block(node.body),
            self._from_decorators(node, span),
            Span(start, span.end),
            self.span(node.name),
            node.asynchronous is not None,
        )

    def parameters(self, node: cst.Parameters) -> tuple[Parameter, ...]:
        made = [self._parameter(p, "positional") for p in (*node.posonly_params, *node.params)]
        if isinstance(node.star_arg, cst.Param):
            made.append(self._parameter(node.star_arg, "*"))
        made += [self._parameter(p, "keyword") for p in node.kwonly_params]
        if node.star_kwarg is not None:
            made.append(self._parameter(node.star_kwarg, "**"))
        return tuple(made)

    def _parameter(self, node: cst.Param, kind: str) -> Parameter:
        default = self.expr(node.default) if node.default is not None else None
        annotation = self.expr(node.annotation.annotation) if node.annotation is not None else None
        return Parameter(node.name.value, kind, default, annotation)


def _dotted(node: cst.BaseExpression | cst.BaseAssignTargetExpression) -> str:
    if isinstance(node, cst.Attribute):
        return f"{_dotted(node.value)}.{node.attr.value}"
    assert isinstance(node, cst.Name)
    return node.value
