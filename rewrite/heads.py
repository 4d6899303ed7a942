"""Where logits are made: only the rows somebody asked for go through the vocabulary projection."""

from __future__ import annotations

from .edits import replace
from .ir import ClassFacts, Edit, Method, ModuleFacts, Span, Value
from .match import live
from .program import Program

_ELEMENTWISE = frozenset({"*", "/", "+", "-"})


def last_rows_edit(program: Program, module: ModuleFacts, entry: ClassFacts) -> Edit | None:
    """Wrap the hidden states that enter the logits' head in `last_rows(..., cache)`.

    Follows the entry's forward method: from what it returns back through calls of one array, down
    into the class it delegates to, to the value that came out of the layers. None if another file
    makes the logits, or if no such value is found (the runtime then picks rows of the logits).
    """
    cls: ClassFacts | None = entry
    for _ in range(6):
        if cls is None or cls.module != module.source.module:
            return None
        method = cls.methods.get("__call__")
        if method is None or len(method.returns) == 0:
            return None
        value, peeled = _peel(method.returns[-1].value)
        cache = _cache_argument(method, value)
        if peeled:
            return _wrap(module, method, value, cache)
        inner = program.callees(value, cls, method) if value.op == "call" else []
        cls = inner[0][0] if inner else None
    return None


def _peel(value: Value) -> tuple[Value, int]:
    """Undo what acts on each row alone: heads, norms, caps. Counts how much was undone."""
    peeled = 0
    while True:
        value = live(value)
        if value.op == "phi":
            arms = [_peel(part) for part in value.args[1:]]
            if arms[0][0] is not arms[1][0]:
                return value, peeled
            return arms[0][0], peeled + max(arms[0][1], arms[1][1])
        if value.op == "tuple" and value.args:
            value = value.args[0]
        elif value.op == "setitem":
            value = value.args[0]
            peeled += 1
        elif value.op == "binary" and value.data in _ELEMENTWISE:
            arrays = [part for part in value.args if _is_computed(part)]
            if len(arrays) != 1:
                return value, peeled
            value = arrays[0]
            peeled += 1
        elif value.op == "call" and len(_arrays(value)) == 1 and _keeps_rows(value):
            value = _arrays(value)[0]
            peeled += 1
        else:
            return value, peeled


def _arrays(call: Value) -> list[Value]:
    return [part for part in call.args[1:] if _is_computed(part)]


def _is_computed(value: Value) -> bool:
    """The value depends on what the forward method is given."""
    return any(part.op == "param" and part.data[1] != "self" for part in value.walk())


def _keeps_rows(call: Value) -> bool:
    """A call of a module held in `self`, or of a function, on one array and numbers."""
    callee = call.args[0]
    if any(keyword in ("cache", "axis", "*", "**") for keyword in call.data):
        return False
    if callee.op == "attr":
        return callee.data == "as_linear" or callee.args[0].op in ("param", "attr")
    return callee.op == "global" and callee.data.rsplit(".", 1)[-1] not in (
        "mean", "sum", "max", "concatenate", "stack", "split", "all_gather", "take",
    )


def _cache_argument(method: Method, value: Value) -> str | None:
    """The name under which the method knows the caches it hands on."""
    parameters = {id(p): p.data[1] for p in method.params}
    if value.op == "call":
        for part in value.args[1:]:
            name = parameters.get(id(live(part)))
            if name is not None and _looks_like_caches(method, part):
                return name
    for parameter in method.params[1:]:
        if _looks_like_caches(method, parameter):
            return str(parameter.data[1])
    return None


def _looks_like_caches(method: Method, value: Value) -> bool:
    """`cache` is the keyword mlx_lm's loader contract fixes for the caches of a forward method."""
    value = live(value)
    return value.op == "param" and value.data[1] == "cache"


def _wrap(module: ModuleFacts, method: Method, value: Value, cache: str | None) -> Edit | None:
    source = module.source
    if cache is None or cache in method.rebound:
        return None
    span = _where(method, value)
    if span is None:
        return None
    return replace(source, span, f"last_rows({source.text(span)}, {cache})", "last_rows")


def _where(method: Method, value: Value) -> Span | None:
    """The bytes of an expression that computes the value and nothing else."""
    if value.op == "call":
        return value.span
    return None
