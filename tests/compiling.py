"""Helpers for tests of the compiler: everything goes through these few functions."""

from __future__ import annotations

import textwrap
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from mlxrewrite.ir import Diagnostic, Match, ModuleFacts, Plan, Refusal, Source
from mlxrewrite.passes.classify import classify
from mlxrewrite.passes.emit import splice
from mlxrewrite.passes.facts import facts
from mlxrewrite.passes.parse import parse
from mlxrewrite.pipeline import Compiled, Compiler
from mlxrewrite.program import Program
from mlxrewrite.sources import Package, locate

EXAMPLES = Path(__file__).parent.parent / "examples" / "models"


def module(text: str, name: str = "probe.model") -> ModuleFacts:
    """Facts of one module given as text."""
    data = textwrap.dedent(text).encode()
    return facts(parse(Source.of(name, f"{name.replace('.', '/')}.py", data)))


def judge(text: str, name: str) -> Match | Refusal | None:
    """What the compiler makes of class `name` in a module given as text."""
    found = module(text)
    program = Program({found.source.module: found})
    return classify(program, found).get(f"probe.model.{name}")


@cache
def mlx_lm() -> Package:
    """The installed mlx_lm's models."""
    return locate("mlx_lm.models").package


def model_names(package: Package) -> list[str]:
    """Modules of the package that a loader can ask for a model."""
    text = {name: package.path_of(name) for name in package.modules()}
    return [n for n, p in text.items() if p is not None and b"\nclass Model(" in p.read_bytes()]


def compile_folder(folder: Path) -> dict[str, Compiled]:
    """Compile every module of a folder."""
    request = locate(str(folder))
    compiler = Compiler(request.package)
    return {name: compiler.compile(name) for name in request.package.modules()}


def compile_text(folder: Path, text: str, name: str = "model") -> Compiled:
    """Compile one module given as text, written into an empty folder."""
    (folder / f"{name}.py").write_text(text)
    request = locate(str(folder / f"{name}.py"))
    assert request.modules is not None
    return Compiler(request.package).compile(request.modules[0])


def rewritten(source: bytes, plan: Plan) -> bytes:
    return splice(source, plan.edits)


def upstream_folder() -> Path:
    spec = find_spec("mlx_lm")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "models"


def said_of(plan: Plan) -> list[Diagnostic]:
    """All that a plan says: notes, and why classes are refused."""
    return [*plan.notes, *(d for refusal in plan.refusals for d in refusal.diagnostics)]
