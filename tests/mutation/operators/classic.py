"""The usual small slips, anywhere in a forward: operators, constants, bounds, order of lines."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from ..source import Change, File, called
from . import operator

_OTHER = {ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.FloorDiv: "*"}
_LESS = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
}


@operator("slip-operator", "another arithmetic operator")
def _operators(file: File) -> Iterator[Change]:
    for node in file.nodes(ast.BinOp):
        other = _OTHER.get(type(node.op))
        if other is not None:
            text = f"(({file.code(node.left)}) {other} ({file.code(node.right)}))"
            yield file.change(file.put(node, text), where=node)


@operator("slip-comparison", "another comparison")
def _comparisons(file: File) -> Iterator[Change]:
    for node in file.nodes(ast.Compare):
        if len(node.ops) == 1 and type(node.ops[0]) in _LESS:
            left, right = file.code(node.left), file.code(node.comparators[0])
            text = f"({left} {_LESS[type(node.ops[0])]} {right})"
            yield file.change(file.put(node, text), where=node)


@operator("slip-test-true", "a condition is always true")
def _true(file: File) -> Iterator[Change]:
    for kind in (ast.If, ast.IfExp):
        for node in file.nodes(kind):
            yield file.change(file.put(node.test, "True"), where=node)


@operator("slip-test-false", "a condition is always false")
def _false(file: File) -> Iterator[Change]:
    for kind in (ast.If, ast.IfExp):
        for node in file.nodes(kind):
            yield file.change(file.put(node.test, "False"), where=node)


@operator("slip-axis", "another axis")
def _axis(file: File) -> Iterator[Change]:
    for call in file.nodes(ast.Call):
        for keyword in call.keywords:
            if keyword.arg in ("axis", "axes") and _is_integer(keyword.value):
                for other in ("0", "1", "-1", "-2"):
                    if other != file.code(keyword.value):
                        yield file.change(file.put(keyword.value, other), where=call)


@operator("slip-positional-axis", "another positional axis")
def _positional_axis(file: File) -> Iterator[Change]:
    names = (
        "swapaxes",
        "mean",
        "sum",
        "squeeze",
        "expand_dims",
        "take",
        "split",
        "flatten",
        "moveaxis",
        "unflatten",
        "concatenate",
        "stack",
        "softmax",
        "argmax",
        "repeat",
    )
    for call in file.nodes(ast.Call):
        if called(call) in names:
            for argument in call.args:
                if _is_integer(argument):
                    for other in ("0", "1", "2", "-1", "-2"):
                        if other != file.code(argument):
                            yield file.change(file.put(argument, other), where=call)


@operator("slip-transpose", "two axes of a transpose change places")
def _transpose(file: File) -> Iterator[Change]:
    for call in file.nodes(ast.Call):
        if called(call) == "transpose" and len(call.args) >= 3:
            for one, two in zip(call.args, call.args[1:], strict=False):
                yield file.change(*file.swap(one, two), where=call)


@operator("slip-reshape", "two lengths of a reshape change places")
def _reshape(file: File) -> Iterator[Change]:
    for call in file.nodes(ast.Call):
        if called(call) == "reshape" and len(call.args) >= 3:
            for one, two in zip(call.args, call.args[1:], strict=False):
                if file.code(one) != file.code(two):
                    yield file.change(*file.swap(one, two), where=call)


@operator("slip-reshape-transposed", "heads are taken apart in another order")
def _heads(file: File) -> Iterator[Change]:
    for call in file.nodes(ast.Call):
        if called(call) == "reshape" and len(call.args) == 4:
            parts = [file.code(a) for a in call.args]
            if not isinstance(call.func, ast.Attribute):
                continue
            base = file.code(call.func.value)
            text = (
                f"{base}.reshape({parts[0]}, {parts[1]}, {parts[3]}, {parts[2]}).swapaxes(-1, -2)"
            )
            yield file.change(file.put(call, text), where=call)


@operator("slip-bound", "a bound of a slice moves by one")
def _bounds(file: File) -> Iterator[Change]:
    for node in file.nodes(ast.Slice):
        for part in (node.lower, node.upper):
            if part is not None:
                text = f"({file.code(part)}) + 1"
                yield file.change(file.put(part, text), where=node_of(file, node))
                text = f"({file.code(part)}) - 1"
                yield file.change(file.put(part, text), where=node_of(file, node))


def node_of(file: File, node: ast.AST) -> ast.AST:
    return file.statement(node)


@operator("slip-slice-dropped", "a slice takes everything")
def _everything(file: File) -> Iterator[Change]:
    for node in file.nodes(ast.Slice):
        if node.lower is not None or node.upper is not None:
            yield file.change(file.put(node, ":"), where=node_of(file, node))


@operator("slip-index", "another element")
def _index(file: File) -> Iterator[Change]:
    for node in file.nodes(ast.Subscript):
        if _is_integer(node.slice):
            for other in ("0", "1", "-1"):
                if other != file.code(node.slice):
                    yield file.change(file.put(node.slice, other), where=node)


@operator("slip-constant", "another constant")
def _constants(file: File) -> Iterator[Change]:
    for node in file.nodes(ast.Constant):
        if type(node.value) in (int, float) and not isinstance(node.value, bool):
            yield file.change(file.put(node, f"({node.value} + 1)"), where=node_of(file, node))


@operator("slip-line-dropped", "a line is left out")
def _dropped(file: File) -> Iterator[Change]:
    for kind in (ast.Assign, ast.AugAssign, ast.Expr):
        for node in file.nodes(kind):
            if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                yield file.change(file.put(node, "pass"), where=node)


@operator("slip-line-twice", "a line runs twice")
def _twice(file: File) -> Iterator[Change]:
    for kind in (ast.Assign, ast.AugAssign, ast.Expr):
        for node in file.nodes(kind):
            if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                indent = file.indent(node)
                code = file.code(node)
                if file.data[: file.start(node)].split(b"\n")[-1].strip() == b"":
                    yield file.change(file.put(node, f"{code}\n{indent}{code}"), where=node)


@operator("slip-lines-swapped", "two lines change places")
def _lines(file: File) -> Iterator[Change]:
    for function in file.forwards:
        for one, two in zip(function.body, function.body[1:], strict=False):
            if isinstance(one, ast.Assign | ast.AugAssign) and isinstance(
                two, ast.Assign | ast.AugAssign
            ):
                yield file.change(*file.swap(one, two), where=one)


@operator("slip-call-dropped", "a call of one argument is left out")
def _calls(file: File) -> Iterator[Change]:
    for call in file.nodes(ast.Call):
        if len(call.args) == 1 and not call.keywords and called(call) not in ("len", "range"):
            if not isinstance(call.args[0], ast.Starred):
                yield file.change(file.put(call, f"({file.code(call.args[0])})"), where=call)


@operator("slip-name", "another local name")
def _names(file: File) -> Iterator[Change]:
    for function in file.forwards:
        bound = sorted(
            {
                n.id
                for node in ast.walk(function)
                if isinstance(node, ast.Assign)
                for t in node.targets
                for n in ast.walk(t)
                if isinstance(n, ast.Name)
            }
        )
        names = [
            n
            for n in ast.walk(function)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.id in bound
        ]
        for position, node in enumerate(names):
            other = bound[(bound.index(node.id) + 1 + position) % len(bound)]
            if other != node.id:
                yield file.change(file.put(node, other), where=node)


@operator("slip-attribute", "another attribute of self")
def _attributes(file: File) -> Iterator[Change]:
    for function in file.forwards:
        found = [
            n
            for n in ast.walk(function)
            if isinstance(n, ast.Attribute)
            and isinstance(n.value, ast.Name)
            and n.value.id == "self"
        ]
        names = sorted({n.attr for n in found})
        for node in found:
            other = names[(names.index(node.attr) + 1) % len(names)]
            if other != node.attr:
                yield file.change(file.put(node, f"self.{other}"), where=node)


@operator("slip-keyword", "a keyword argument is left out")
def _keywords(file: File) -> Iterator[Change]:
    for call in file.nodes(ast.Call):
        for keyword in call.keywords:
            if keyword.arg is not None and (call.args or len(call.keywords) > 1):
                start, end = file.start(keyword), file.end(keyword)
                rest = file.data[end:]
                extra = len(rest) - len(rest.lstrip())
                comma = rest.lstrip().startswith(b",")
                from ..source import Splice

                stop = end + extra + 1 if comma else end
                yield file.change(Splice(start, stop, ""), where=call)


@operator("slip-constructor", "another constant in a constructor")
def _constructor(file: File) -> Iterator[Change]:
    for _, init in file.constructors:
        for node in ast.walk(init):
            if isinstance(node, ast.Constant) and type(node.value) in (int, float):
                text = f"({node.value} + 1)"
                yield file.change(file.put(node, text), where=file.statement(node))
            if isinstance(node, ast.Constant) and isinstance(node.value, bool):
                yield file.change(file.put(node, str(not node.value)), where=file.statement(node))


def _is_integer(node: ast.AST) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) is int
