"""What a function of the program returns, in terms of the arguments of one call of it."""

from __future__ import annotations

from .ir import Expr, ModuleFacts, Value
from .program import Program


def expanded(program: Program, value: Value) -> Value | None:
    """The value, or what a function of the program returns for it, with its own arguments."""
    if value.op != "item" or value.args[0].op != "call":
        return value
    call = value.args[0]
    callee = call.args[0]
    function = program.function_of(callee.data) if callee.op == "global" else None
    if function is None or any(keyword is not None for keyword in call.data):
        return None
    plain = all(effect.kind in ("call", "return") for effect in function.effects)
    if not plain or len(function.returns) != 1 or not _only_compiled(program, callee.data):
        return None
    result, given = function.returns[0].value, call.args[1:]
    if result.op != "tuple" or len(function.params) != len(given):
        return None
    bound = {id(param): argument for param, argument in zip(function.params, given, strict=True)}
    return _substituted(result.args[value.data], bound, {})


def _only_compiled(program: Program, dotted: str) -> bool:
    """The function has no decorator, or `mx.compile` alone, with options or without."""
    module, _, name = program.resolve(dotted).rpartition(".")
    file = program.modules[module]
    for decorator in file.functions[name].function.decorators:
        parts = [decorator]
        if decorator.op == "call":  # partial(mx.compile, ...)
            if _dotted(file, decorator.args[0]) not in ("functools.partial", "mlx.core.compile"):
                return False
            parts = list(decorator.args[1:2]) if len(decorator.args) > 1 else [decorator.args[0]]
        if any(_dotted(file, part) != "mlx.core.compile" for part in parts):
            return False
    return True


def _dotted(file: ModuleFacts, expr: Expr) -> str:
    """The name that an expression spells, imports resolved."""
    if expr.op == "attr":
        return f"{_dotted(file, expr.args[0])}.{expr.data}"
    bound = file.names.get(expr.data) if expr.op == "name" else None
    return str(bound.data) if bound is not None else ""


def _substituted(value: Value, bound: dict[int, Value], made: dict[int, Value]) -> Value:
    """The value with parameters replaced by arguments; what is shared stays shared."""
    if id(value) in bound:
        return bound[id(value)]
    if id(value) not in made:
        parts = tuple(_substituted(part, bound, made) for part in value.args)
        changed = any(new is not old for new, old in zip(parts, value.args, strict=True))
        made[id(value)] = (
            Value(value.op, parts, value.data, value.span, value.syntax) if changed else value
        )
    return made[id(value)]
