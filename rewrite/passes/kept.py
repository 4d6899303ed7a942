"""State that a forward pass leaves on the model: no route is right with it.

Even the whole model once per sequence shares one model between sequences: what the tokens of one
leave there, the tokens of another find. Looked for in every class the entry is built from and in
the functions of their modules.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..ir import ClassFacts, Diagnostic, Effect, Function, Method, Simple, Stmt, Value
from ..match import NOT_FORWARD, place
from ..program import Program
from .facts import all_statements

_CHANGING = frozenset(
    "append extend insert update setdefault add appendleft put __setattr__ __setitem__".split()
)


def kept_state(program: Program, entry: ClassFacts) -> tuple[Diagnostic, ...]:
    """Every place where the forward keeps tokens, or counts calls, outside of caches."""
    found = []
    modules: dict[str, None] = {}
    for cls in program.reachable(entry).values():
        for owner in program.lineage(cls):
            modules[owner.module] = None
            for name, method in owner.methods.items():
                if name not in NOT_FORWARD:
                    found += list(_kept(program, owner.module, method, is_method=True))
    for module in modules:
        for method in program.modules[module].functions.values():
            found += list(_kept(program, module, method, is_method=False))
    return tuple(dict.fromkeys(found))


def _kept(
    program: Program, module: str, method: Method, *, is_method: bool
) -> Iterator[Diagnostic]:
    source = program.modules[module].source
    this = method.params[0] if is_method and method.params else None
    given = {id(p) for p in method.params if p is not this}
    for effect in method.effects:
        what = _change(effect, this, given)
        if what is not None:
            where = place(source, (effect.target or effect.value).span)
            yield Diagnostic("state-on-self", what, where, act="source")
    for statement in _globals(method.function):
        where = place(source, statement.span)
        message = "a name of the module is set by the forward pass"
        yield Diagnostic("state-on-self", message, where, act="source")


def _change(effect: Effect, this: Value | None, given: set[int]) -> str | None:
    target = effect.target
    if effect.kind == "call":
        callee = effect.value.args[0]
        if callee.op != "attr" or callee.data not in _CHANGING:
            return None
        root = _root(callee.args[0])
        held = root is this or (root is not None and root.op == "global" and callee.args[0] is root)
        if this is None or not held or not any(_uses(a, given) for a in effect.value.args[1:]):
            return None
        return "tokens are kept in a list or dictionary of the model"
    if target is None or effect.kind not in ("store", "augment"):
        return None
    root = _root(target)
    shared = (this is not None and root is this) or (root is not None and root.op == "global")
    if not shared or (target is root and target.op != "global"):
        return None
    if effect.kind == "augment":
        return "the model is changed by each call"
    if _uses(effect.value, given):
        return "tokens are kept on the model"
    if effect.value.op == "binary" and any(_same_place(v, target) for v in effect.value.walk()):
        return "the model is changed by each call"
    return None


def _root(value: Value) -> Value | None:
    while value.op in ("attr", "index", "item") and value.args:
        value = value.args[0]
    return value if value.op in ("param", "global") else None


def _uses(value: Value, given: set[int]) -> bool:
    return any(id(part) in given for part in value.walk())


def _same_place(one: Value, two: Value) -> bool:
    if one.op == "call" and len(one.args) > 2 and one.args[0].data == "builtins.getattr":
        return two.op == "attr" and one.args[2].data == two.data
    return one.op == "attr" and two.op == "attr" and one.data == two.data


def _globals(function: Function) -> Iterator[Stmt]:
    for statement in all_statements(function.body):
        if isinstance(statement, Simple) and statement.keyword == "global":
            yield statement
