"""Names, line breaks and comments are no evidence; what a model is does not depend on them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import pytest
from compiling import mlx_lm, model_names
from mlxrewrite.ir import Assign, Class, Expr, For, Function, Import, Source, Span
from mlxrewrite.passes.parse import parse
from mlxrewrite.pipeline import Compiler
from mlxrewrite.sources import Package

# Names that libraries fix: attributes of arrays and caches, and what mlx_lm's loader asks for.
FIXED = frozenset(
    (
        "Model ModelArgs layers model_type weight bias shape dtype ndim T offset keys values state "
        "lengths advance update_and_fetch keys_and_values make_cache size start_position args "
        "config pipeline_rank pipeline_size pipeline_layers start_idx end_idx scales biases "
        "group_size bits mode training"
    ).split()
)


def parts(node: object) -> Iterator[object]:
    """Every syntax node below a node."""
    if isinstance(node, tuple) and not isinstance(node, Span):
        for item in node:
            yield from parts(item)
    elif dataclasses.is_dataclass(node) and not isinstance(node, (Source, Span)):
        yield node
        for field in dataclasses.fields(node):
            yield from parts(getattr(node, field.name))


def renamed(data: bytes, module: str) -> bytes:
    """The text with other names for its classes, its instance attributes and its locals."""
    syntax = parse(Source.of(module, module, data))
    nodes = list(parts(syntax.body))
    classes = {n.name for n in nodes if isinstance(n, Class)} - FIXED
    methods = {n.name for n in nodes if isinstance(n, Function)}
    attributes = {
        target.data
        for n in nodes
        if isinstance(n, Assign)
        for target in n.targets
        if target.op == "attr" and target.args[0].data == "self"
    }
    attributes -= FIXED | methods
    attributes -= {  # also a field of the arguments: the two cannot be told apart by name
        n.targets[0].data
        for c in nodes
        if isinstance(c, Class)
        for n in c.body
        if isinstance(n, Assign) and n.targets[0].op == "name"
    }
    imported = {n.alias for n in nodes if isinstance(n, Import) and n.alias is not None}
    changes: dict[int, bytes] = {}
    for node in nodes:
        if isinstance(node, Class) and node.name in classes:
            changes[node.name_span.end] = b"_9"
        if isinstance(node, Expr) and node.op == "name" and node.data in classes:
            changes[node.span.end] = b"_9"
        if isinstance(node, Expr) and node.op == "attr" and node.data in attributes:
            if root(node) in imported:  # `self.rope` is not `mx.fast.rope`
                continue
            end = end_of_attribute(data, node)
            if end is not None:
                changes[end] = b"_7"
        if isinstance(node, Function):
            for name in local_names(node):
                for inner in parts(node.body):
                    if isinstance(inner, Expr) and inner.op == "name" and inner.data == name:
                        changes[inner.span.start + len(name.encode())] = b"_5"
    text = data
    for end in sorted(changes, reverse=True):
        text = text[:end] + changes[end] + text[end:]
    return text


def root(node: Expr) -> object:
    """The name that a chain of attributes begins with."""
    while node.op == "attr":
        node = node.args[0]
    return node.data if node.op == "name" else None


def end_of_attribute(data: bytes, node: Expr) -> int | None:
    """Where the attribute's name ends: parentheses around the whole are part of the span."""
    text = data[node.args[0].span.end : node.span.end]
    found = re.match(rb"\s*\.\s*\w+", text)
    return node.args[0].span.end + found.end() if found else None


def local_names(function: Function) -> set[str]:
    """Names bound in the function only: no parameters, none that a nested function uses."""
    parameters = {parameter.name for parameter in function.parameters}
    bound: set[str] = set()
    for node in parts(function.body):
        if isinstance(node, Function):
            return set()
        if isinstance(node, (Assign, For)):
            targets = node.targets if isinstance(node, Assign) else (node.target,)
            for target in targets:
                for inner in parts(target):
                    if isinstance(inner, Expr) and inner.op == "name":
                        bound.add(inner.data)
        if isinstance(node, Expr) and node.op in ("comp", "lambda"):
            bound -= {n.data for n in parts(node) if isinstance(n, Expr) and n.op == "name"}
    comprehended = {
        inner.data
        for node in parts(function.body)
        if isinstance(node, Expr) and node.op in ("comp", "lambda", "string")
        for inner in parts(node)
        if isinstance(inner, Expr) and inner.op == "name"
    }
    return bound - parameters - comprehended


@dataclasses.dataclass(frozen=True, slots=True)
class Changed(Package):
    """A package in which one module reads otherwise."""

    module: str = ""
    data: bytes = b""

    def read(self, module: str) -> Source | None:
        if module == self.module:
            return Source.of(module, self.module, self.data)
        return Package.read(self, module)


def outcome(package: Package, name: str) -> tuple:
    """What the compiler made of a module, names left out."""
    compiled = Compiler(package).compile(name)
    assert not compiled.errors, compiled.errors
    assert compiled.emitted is not None
    plan = compiled.emitted.plan
    kinds = [(m.kind, m.route, m.features, [s.rule for s in m.sites]) for m in plan.matches]
    return plan.route, kinds, len(plan.refusals), [edit.rule for edit in plan.edits]


SAMPLE = (
    "llama gemma2 gemma3n gear olmo plamo llama4 deepseek_v3 qwen3_next mamba2 lfm2 gpt_oss "
    "iquestloopcoder afm7 stablelm kimi_linear rwkv7 recurrent_gemma bailing_hybrid "
    "minimax_m3_vl"
).split()


def everything() -> list:
    package = mlx_lm()
    names = [name.rsplit(".", 1)[-1] for name in model_names(package)]
    return [
        pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow)
        for name in names
        if name != "models"
    ]


@pytest.mark.parametrize("name", everything())
def test_other_names_change_nothing(name):
    package = mlx_lm()
    module = f"{package.name}.{name}"
    data = package.read(module).data
    other = renamed(data, module)
    if other == data:
        pytest.skip("nothing of its own to rename")
    shape = (package.name, package.root, package.shown, package.upstream, package.entry)
    assert outcome(Changed(*shape, module, other), module) == outcome(package, module)


@pytest.mark.parametrize("name", SAMPLE[:8])
def test_comments_and_blank_lines_change_nothing(name):
    package = mlx_lm()
    module = f"{package.name}.{name}"
    lines = package.read(module).data.decode().split("\n")
    opened = 0
    noisy = []
    for line in lines:
        quiet = opened == 0 and line and not line[0].isspace() and '"""' not in line
        if quiet and line.startswith(("class ", "def ", "import ", "from ")):
            noisy += ["# a comment", ""]
        noisy.append(line + ("  # noise" if line.endswith(":") and opened == 0 else ""))
        opened += line.count("(") + line.count("[") - line.count(")") - line.count("]")
    data = "\n".join(noisy).encode()
    shape = (package.name, package.root, package.shown, package.upstream, package.entry)
    assert outcome(Changed(*shape, module, data), module) == outcome(package, module)
