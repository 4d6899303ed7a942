"""Checks what was built before anything is written."""

from __future__ import annotations

import ast

from ..diagnostics import error
from ..ir import Diagnostic, Emitted, ModuleFacts, Plan

_SITES_IMPORT = "mlxrewrite.runtime."


def verify(module: ModuleFacts, plan: Plan, emitted: Emitted) -> tuple[Diagnostic, ...]:
    """Proof obligations of a generated file; what fails is a bug of the compiler.

    It compiles; every byte outside the edits is the original's, in order; every name it takes from
    the runtime is imported and used.
    """
    if emitted.code is None:
        return ()
    text = emitted.code
    problems: list[Diagnostic] = []
    try:
        tree = ast.parse(text, filename=module.source.path)
    except (SyntaxError, ValueError) as problem:
        return (error("invalid-output", f"{module.source.path}: {problem}", act="compiler"),)
    if _without_edits(text, plan, module) != module.source.data:
        problems.append(
            error("invalid-output", f"{module.source.path}: bytes outside edits changed")
        )
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_SITES_IMPORT)
        for alias in node.names
    }
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    wanted = {name for match in plan.matches for name in match.imports}
    for name in sorted(wanted - imported):
        problems.append(error("invalid-output", f"{module.source.path}: `{name}` not imported"))
    for name in sorted(wanted - used):
        problems.append(error("invalid-output", f"{module.source.path}: `{name}` not used"))
    return tuple(problems)


def _without_edits(text: bytes, plan: Plan, module: ModuleFacts) -> bytes:
    """Undo the edits on the generated text: the original, if nothing else changed."""
    body = text.split(b"\n", 2)[2]
    parts: list[bytes] = []
    position = 0
    shift = 0
    for edit in plan.edits:
        start = edit.span.start + shift
        parts += [body[position:start], edit.before]
        if body[start : start + len(edit.after)] != edit.after:
            return b""
        position = start + len(edit.after)
        shift += len(edit.after) - len(edit.before)
    parts.append(body[position:])
    return b"".join(parts)
