"""Where logits are made: only the rows somebody asked for go through the vocabulary projection."""

from __future__ import annotations

from dataclasses import dataclass

from .edits import names_before, replace
from .ir import ClassFacts, Edit, Method, ModuleFacts, Span, Value
from .match import arguments, library_call, live
from .program import Program

_ELEMENTWISE = frozenset({"*", "/", "+", "-", "@"})
# Functions that do not act on each row alone, or not on rows at axis 0.
_ACROSS = frozenset({"mean", "sum", "max", "concatenate", "stack", "split", "all_gather", "take"})


def last_rows_edit(program: Program, module: ModuleFacts, entry: ClassFacts) -> Edit | None:
    """Wrap the hidden states that enter the logits' head in `last_rows(..., cache)`.

    Follows the entry's forward method: from what it returns back through calls of one array, down
    into the class it delegates to, to the value that came out of the layers. None if another file
    makes the logits, or if no such value is found (the runtime then picks rows of the logits).
    """
    cls = entry
    method = cls.methods.get("__call__")
    if method is None or cls.module != module.source.module:
        return None
    # The keyword is fixed by mlx_lm: generation calls `model(ids, cache=...)`.
    cache = next((p for p in method.params if p.data[1] == "cache"), None)
    for _ in range(6):
        if cache is None or not method.returns:
            return None
        found = _peel(method, _logits(program, method.returns[-1].value))
        if found.peeled:
            return _wrap(module, method, found, cache)
        call = found.value
        inner = program.callees(call, cls, method) if call.op == "call" else []
        if not inner or inner[0][0].module != module.source.module:
            return None
        cache = _handed_on(call, cache, inner[0][1])
        cls, method = inner[0]
    return None


def _logits(program: Program, value: Value) -> Value:
    """What stands for the logits in what a forward returns: mlx_vlm wraps them."""
    value = live(value)
    wrapped = library_call(program, value, "mlx_vlm.models.base.LanguageModelOutput")
    if not wrapped:
        return value
    return arguments(value, ("logits",)).get("logits", value)


@dataclass(frozen=True, slots=True)
class _Peeled:
    """A value, how many row-wise steps were undone to reach it, and where the last one took it."""

    value: Value
    peeled: int
    taken_at: Span | None


def _peel(method: Method, value: Value) -> _Peeled:
    """Undo what acts on each row alone: heads, norms, caps."""
    peeled = 0
    taken_at: Span | None = None
    while True:
        value = live(value)
        if value.op == "phi":
            arms = [_peel(method, part) for part in value.args[1:]]
            if arms[0].value is not arms[1].value:
                return _Peeled(value, peeled, taken_at)
            more = max(arm.peeled for arm in arms)
            same_place = arms[0].taken_at if arms[0].taken_at == arms[1].taken_at else None
            where = same_place if more else taken_at
            return _Peeled(arms[0].value, peeled + more, where)
        if value.op == "tuple" and value.args:
            value = value.args[0]
            continue
        if value.op == "setitem":
            value, peeled, taken_at = value.args[0], peeled + 1, None
            continue
        given = _computed(method, value)
        if value.op == "binary" and value.data in _ELEMENTWISE and len(given) == 1:
            value, peeled, taken_at = given[0][1], peeled + 1, None
        elif value.op == "call" and len(given) == 1 and _acts_on_rows(value):
            position, inner = given[0]
            taken_at = value.syntax.args[position].span if value.syntax is not None else None
            value, peeled = inner, peeled + 1
        else:
            return _Peeled(value, peeled, taken_at)


def _computed(method: Method, value: Value) -> list[tuple[int, Value]]:
    """Operands that depend on what the method is given, with their positions."""
    this = method.params[0]
    operands = value.args if value.op == "binary" else value.args[1:]
    first = 0 if value.op == "binary" else 1
    return [
        (position, part)
        for position, part in enumerate(operands, first)
        if any(inner.op == "param" and inner is not this for inner in part.walk())
    ]


def _acts_on_rows(call: Value) -> bool:
    """A call of a module held by the model, or of a function, on one array and settings."""
    callee = call.args[0]
    if any(keyword in ("cache", "axis", "*", "**") for keyword in call.data):
        return False
    if callee.op == "attr":
        return callee.data in ("as_linear", "astype") or callee.args[0].op in ("param", "attr")
    return callee.op == "global" and callee.data.rsplit(".", 1)[-1] not in _ACROSS


def _handed_on(call: Value, cache: Value, callee: Method) -> Value | None:
    """The parameter of the callee that gets the caches."""
    names = [parameter.name for parameter in callee.function.parameters]
    for position, (keyword, value) in enumerate(zip(call.data, call.args[1:], strict=True)):
        if live(value) is cache:
            name = keyword if keyword is not None else names[position + 1]
            return next((p for p in callee.params if p.data[1] == name), None)
    return None


def _wrap(module: ModuleFacts, method: Method, found: _Peeled, cache: Value) -> Edit | None:
    source = module.source
    span = found.value.span if found.value.op == "call" else found.taken_at
    if span is None:
        return None
    held = names_before(method, span)
    name = next((name for name, value in held.items() if live(value) is cache), None)
    if name is None:
        return None  # the name now means something else, such as the last layer's cache
    return replace(source, span, f"last_rows({source.text(span)}, {name})", "last_rows")
