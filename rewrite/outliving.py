"""State that outlives a call of the model and is in no cache.

The whole model, or a mixer, may run once per sequence; what such code leaves on the model, on a
module or in a closure would go from one sequence to another. Upstream runs one sequence at a time
and never sees that, so it is refused here, on the syntax: every store in a function that a forward
pass may run is followed to the name it starts from. What is computed once from weights and kept
(`self._scaled = self.weight + 1`) holds nothing of a sequence, and stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from .ir import (
    Assign,
    AugAssign,
    Block,
    Class,
    ClassFacts,
    Diagnostic,
    Evaluate,
    Expr,
    For,
    Function,
    If,
    Import,
    ModuleFacts,
    Simple,
    Source,
    Span,
    Stmt,
    While,
)
from .match import place
from .program import Program

# Run before a forward pass, or between passes.
_BEFORE = frozenset(
    {
        "__init__", "__post_init__", "__init_subclass__", "sanitize", "shard", "make_cache",
        "pipeline", "from_dict", "to_quantized", "load_weights", "set_dtype", "freeze",
    }
)  # fmt: skip
_CHANGES = frozenset(
    {
        "append", "extend", "insert", "pop", "popitem", "clear", "update", "setdefault", "add",
        "remove", "discard", "appendleft", "popleft", "rotate", "sort", "reverse", "send",
        "__setitem__", "__setattr__", "__delitem__", "__delattr__", "__next__", "put", "set",
    }
)  # fmt: skip
_REACHING = frozenset({"type", "globals", "vars", "locals", "super", "__import__"})
_HARMLESS = frozenset({"open", "print", "str", "repr", "int", "len", "range", "list", "dict"})
# Assigns `transformers.AutoProcessor.from_pretrained`, and calls nothing of what it is given.
_REGISTERING = frozenset({"mlx_vlm.models.base.install_auto_processor_patch"})
_SETTERS = frozenset({"setattr", "delattr", "next"})


def outliving(program: Program, modules: list[ModuleFacts]) -> Iterator[Diagnostic]:
    """Where the functions of modules leave something that the next call finds."""
    before = _before(modules)
    for module in modules:
        for statement in module.module.body:
            yield from _definition(program, module, statement, before)


def patches(module: ModuleFacts) -> Iterator[Diagnostic]:
    """What a module does when it is imported beyond binding names: its classes are then not as
    they are written."""
    stack: list[Stmt] = list(reversed(module.module.body))
    while stack:
        node = stack.pop()
        if isinstance(node, If):
            stack += [*node.body, *node.orelse]
        elif isinstance(node, Block):
            stack += [part for body in node.bodies for part in body]
        elif isinstance(node, Class):
            stack += node.body
            plain = [p for p in node.body if isinstance(p, Function) and not p.decorators]
            names = [part.name for part in plain]
            # Defined twice: the later one counts, and every reader has to know that.
            yield from (
                _patch(module, part)
                for index, part in enumerate(plain)
                if part.name in names[:index]
            )
            defined = {"__call__", *(p.name for p in node.body if isinstance(p, Function))}
            yield from (
                _patch(module, part)
                for part in node.body
                if isinstance(part, Assign)
                and any(to.op == "name" and to.data in defined for to in part.targets)
            )
        elif isinstance(node, Assign):
            if all(target.op == "name" for target in node.targets):
                continue
            yield _patch(module, node)
        elif isinstance(node, Evaluate):
            if not _only_speaks(node.value) and not _registers(module, node.value):
                yield _patch(module, node)
        elif isinstance(node, (For, While, AugAssign)) or (
            isinstance(node, Simple) and node.keyword in ("del", "delete", "global", "nonlocal")
        ):
            yield _patch(module, node)


def _patch(module: ModuleFacts, node: Stmt) -> Diagnostic:
    return Diagnostic(
        "patched",
        "the file changes something when it is imported",
        place(module.source, node.span),
        "classes may then not be as they are written",
        "definitions and names bound once",
        act="source",
    )


def _registers(module: ModuleFacts, expr: Expr) -> bool:
    """A call of a library's function that changes another package, and nothing of the program's:
    which classes read the files of a checkpoint."""
    if expr.op != "call" or expr.args[0].op != "name":
        return False
    bound = module.names.get(expr.args[0].data)
    return bound is not None and bound.op == "global" and bound.data in _REGISTERING


def _only_speaks(expr: Expr) -> bool:
    if expr.op in ("const", "string"):
        return True
    if expr.op != "call":
        return False
    if _read(expr) <= _HARMLESS:
        return True  # no name of the file's own in it
    root = _root(expr.args[0])
    speaks = ("print", "warnings", "logging", "logger", "sys")
    return root is not None and root.op == "name" and root.data in speaks


def outliving_in(program: Program, cls: ClassFacts) -> Iterator[Diagnostic]:
    """Where the methods of one class do, those that it inherits, and the functions they call."""
    for owner in program.lineage(cls):
        module = program.modules[owner.module]
        yield from _definition(program, module, owner.syntax, _BEFORE)
        for function in _mentioned(module, owner):
            yield from _definition(program, module, function, _BEFORE)


def _mentioned(module: ModuleFacts, cls: ClassFacts) -> Iterator[Function]:
    """Functions of a class's file that its text mentions, or that those mention in turn."""
    own = {part.name: part for part in module.module.body if isinstance(part, Function)}
    queue: list[object] = [cls.syntax]
    while queue:
        for part in below(queue.pop()):
            if isinstance(part, Expr) and part.op in ("name", "attr") and part.data in own:
                function = own.pop(part.data)
                yield function
                queue.append(function)


def outliving_around(program: Program, cls: ClassFacts) -> Iterator[Diagnostic]:
    """Where the file's own decorators of a class's methods do."""
    for owner in program.lineage(cls):
        module = program.modules[owner.module]
        names = {
            expr.data
            for part in owner.syntax.body
            if isinstance(part, Function)
            for decorator in part.decorators
            for expr in below(decorator)
            if isinstance(expr, Expr) and expr.op == "name"
        }
        for statement in module.module.body:
            if isinstance(statement, Function) and statement.name in names:
                yield from _definition(program, module, statement, _BEFORE)


def _before(modules: list[ModuleFacts]) -> frozenset[str]:
    """Names of functions that are mentioned only by what runs before a forward pass, or nowhere
    and put back weights: a loader calls those."""
    mentions: dict[str, set[str]] = {}  # name -> names of the functions that mention it
    functions: dict[str, list[Function]] = {}
    for module in modules:
        stack: list[tuple[object, str]] = [(part, "") for part in module.module.body]
        while stack:
            node, inside = stack.pop()
            if isinstance(node, Function):
                functions.setdefault(node.name, []).append(node)
                inside = inside or node.name
            elif isinstance(node, Expr) and node.op in ("name", "attr"):
                mentions.setdefault(node.data, set()).add(inside)
            elif isinstance(node, Expr) and node.op == "const" and isinstance(node.data, str):
                mentions.setdefault(node.data, set()).add(inside)  # getattr
            stack += [(part, inside) for part in _parts(node)]
    before = set(_BEFORE)
    for name, found in functions.items():
        if name not in mentions and all(map(_restores, found)):
            before.add(name)
    while True:
        more = {
            name
            for name in functions.keys() - before
            if not name.startswith("__") and mentions.get(name) and mentions[name] <= before
        }
        if not more:
            return frozenset(before)
        before |= more


def _restores(function: Function) -> bool:
    """`for n, w in self.part.parameters().items(): if n not in self: setattr(self, n, w)`, no more:
    of what the model holds anyway, by a method that is given nothing."""
    body = function.body
    if function.decorators or len(function.parameters) != 1 or len(body) != 1:
        return False
    this, loop = function.parameters[0].name, body[0]
    if not isinstance(loop, For) or loop.orelse or len(loop.body) != 1:
        return False
    names, test = list(_names(loop.target)), loop.body[0]
    if not isinstance(test, If) or test.orelse or len(test.body) != 1 or len(names) != 2:
        return False
    store, weights = test.body[0], loop.iterable
    for method in ("items", "parameters"):
        if weights.op != "call" or len(weights.args) != 1 or weights.args[0].op != "attr":
            return False
        if weights.args[0].data != method:
            return False
        weights = weights.args[0].args[0]
    return (
        isinstance(store, Evaluate)
        and weights.op == "attr"
        and _is_name(weights.args[0], this)
        and test.test.op == "compare"
        and tuple(test.test.data) == ("not in",)
        and _are_names(test.test.args, (names[0], this))
        and store.value.op == "call"
        and not any(store.value.data)
        and _are_names(store.value.args, ("setattr", this, *names))
    )


def _are_names(found: tuple[Expr, ...], names: tuple[str, ...]) -> bool:
    return len(found) == len(names) and all(map(_is_name, found, names))


def _is_name(expr: Expr, name: str) -> bool:
    return expr.op == "name" and expr.data == name


def _definition(
    program: Program, module: ModuleFacts, node: object, before: frozenset[str]
) -> Iterator[Diagnostic]:
    if isinstance(node, Function):
        if node.name not in before:
            yield from _function(module, node, None)
    elif isinstance(node, Class):
        facts = module.classes.get(node.name)
        layer = facts is not None and facts.syntax is node and _is_layer(program, facts)
        for part in node.body:
            if isinstance(part, Function) and part.name not in before:
                this = part.parameters[0].name if part.parameters and layer else None
                yield from _function(module, part, this)
    elif dataclasses.is_dataclass(node) and not isinstance(node, (Expr, Source, Span)):
        for inner in _parts(node):
            if isinstance(inner, (Function, Class)):
                yield from _definition(program, module, inner, before)


def _is_layer(program: Program, cls: ClassFacts) -> bool:
    """A module of the model: what it holds lives as long as the model. Caches are other classes."""
    for owner in program.lineage(cls):
        for base in owner.bases:
            if base.op == "global" and program.resolve(base.data).startswith("mlx.nn."):
                return True
    return False


def _function(
    module: ModuleFacts,
    function: Function,
    this: str | None,
    around: frozenset[str] = frozenset(),  # what functions around it bind, `self` left out
) -> Iterator[Diagnostic]:
    nodes = list(_own(function))
    shared = {
        name
        for node in nodes
        if isinstance(node, Simple) and node.keyword in ("global", "nonlocal")
        for part in node.args
        for name in [part.data]
    }
    bound = {p.name for p in function.parameters} | set(_bound(nodes))
    lasting = {this} if this is not None else set()
    lasting |= {
        p.name for p in function.parameters if p.default is not None and _mutable(p.default)
    }
    local = bound - shared - lasting
    aliases = _aliases(nodes, lambda name: name in lasting or name not in local)
    lasting |= aliases

    def outlives(expr: Expr) -> bool:
        root = _root(expr)
        if root is None:
            return False
        if root.op == "call":
            return root.args[0].op == "name" and root.args[0].data in _REACHING
        return root.data in lasting or root.data not in local

    def told(expr: Expr, what: str) -> Diagnostic:
        text = module.source.text(expr.span).split("\n")[0]
        return Diagnostic(
            "state-on-self",
            f"`{function.name}` leaves something in `{text[:60]}` for its next call",
            place(module.source, expr.span),
            what,
            "state in a cache: cache[i] = ...",
            act="source",
        )

    kept = _computed_once(nodes, function, this, around)
    for node in nodes:
        if isinstance(node, (Simple,)) and node.keyword in ("global", "nonlocal"):
            where = place(module.source, node.span)
            message = f"`{function.name}` sets a {node.keyword} name"
            label = "the next sequence would find it"
            yield Diagnostic("state-on-self", message, where, label, act="source")
        for target in _targets(node):
            if target.op in ("attr", "subscript") and outlives(target) and id(node) not in kept:
                yield told(target, "this lives as long as the model, not as long as a sequence")
        if isinstance(node, Expr) and node.op == "call":
            callee = node.args[0]
            if callee.op == "attr" and callee.data in _CHANGES and outlives(callee.args[0]):
                if not _is_library(module, callee):
                    yield told(callee, "this changes what lives as long as the model")
            if callee.op == "name" and callee.data in _SETTERS and len(node.args) > 1:
                if callee.data not in local and outlives(node.args[1]):
                    yield told(node, "this changes what lives as long as the model")
    for node in nodes:
        if isinstance(node, (Function, Class)):
            for part in (node,) if isinstance(node, Function) else node.body:
                if isinstance(part, Function):
                    yield from _function(module, part, None, around | (bound - {this}))


def _computed_once(
    nodes: list[object], function: Function, this: str | None, around: frozenset[str]
) -> set[int]:
    """Assignments that keep what has nothing of this call in it, and change nothing else."""
    given = {p.name for p in function.parameters if p.name != this} | around
    for _ in range(3):
        for node in nodes:
            if isinstance(node, (Assign, AugAssign, For)):
                source = node.iterable if isinstance(node, For) else node.value
                if source is not None and given & _read(source):
                    given |= {name for target in _targets(node) for name in _names(target)}
    found = set()
    for node in nodes:
        if not isinstance(node, Assign) or node.value is None or node.value.op == "const":
            continue
        attributes = {t.data for t in _targets(node) if t.op == "attr"}
        again = any(
            isinstance(part, Expr) and part.op in ("attr", "const") and part.data in attributes
            for part in below(node.value)
        )
        again = again and not _settles(node)
        plain = all(t.op in ("attr", "name") for t in _targets(node))
        if plain and attributes and not again and not given & _read(node.value):
            found.add(id(node))
    apart: set[int] = set()  # what only decides whether to keep
    for node in nodes:
        if isinstance(node, If) and any(id(part) in found for part in node.body):
            quiet = all(
                isinstance(part, Assign) and all(t.op == "attr" for t in part.targets)
                for part in node.body
            )
            if quiet and not node.orelse:
                apart |= set(map(id, below(node.test)))
            else:
                found -= {id(part) for part in node.body}
    for node in nodes:
        if isinstance(node, Assign) and id(node) in found and _told(nodes, node, apart):
            found.discard(id(node))
    return found


def _settles(node: Assign) -> bool:
    """`w = mx.clip(w, a, b)` or `w = w.astype(t)`: of what was so before it is the same, and so are
    several of them one after the other."""
    if len(node.targets) != 1 or node.value is None or node.value.op != "call":
        return False
    callee, *given = node.value.args
    if callee.op != "attr" or callee.data not in ("clip", "astype") or not given:
        return False
    changed, rest = (callee.args[0], given) if callee.data == "astype" else (given[0], given[1:])
    target = _chain(node.targets[0])
    inside = [part for expr in rest for part in below(expr)]
    again = [p for p in inside if isinstance(p, Expr) and p.data == node.targets[0].data]
    return target is not None and _chain(changed) == target and not again


def _chain(expr: Expr) -> tuple[str, ...] | None:
    """The names of `a.b.c`."""
    names = []
    while expr.op == "attr":
        names.append(expr.data)
        expr = expr.args[0]
    return (expr.data, *reversed(names)) if expr.op == "name" else None


def _told(nodes: list[object], kept: Assign, apart: set[int]) -> bool:
    """Something else tells whether an attribute has been kept before."""
    names = {target.data for target in _targets(kept) if target.op == "attr"}
    own = set(map(id, below(kept)))
    if _settles(kept):
        for node in nodes:
            if isinstance(node, Assign) and _settles(node):
                own |= set(map(id, below(node)))
    for node in nodes:
        if not isinstance(node, Expr) or id(node) in apart or id(node) in own:
            continue
        if node.op in ("const", "string") and node.data in names:
            return True
        if node.op == "attr" and node.data in names and node.span.start < kept.span.start:
            return True
    return False


def _read(expr: Expr) -> set[str]:
    return {e.data for e in below(expr) if isinstance(e, Expr) and e.op == "name"}


def below(node: object) -> Iterator[object]:
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        stack.extend(_parts(current))


def _is_library(module: ModuleFacts, callee: Expr) -> bool:
    """`mx.something.set(...)`: a name that is an imported module, not a container."""
    root = _root(callee)
    if root is None or root.op != "name":
        return False
    imported = {s.alias for s in module.imports if s.alias is not None}
    return root.data in imported


def _own(function: Function) -> Iterator[object]:
    """Every node of a function's body; of nested functions and classes only themselves."""
    stack: list[object] = list(reversed(function.body))
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, (Function, Class)):
            stack.extend(reversed(list(_parts(node))))


def _parts(node: object) -> Iterator[object]:
    """The syntax nodes right below a node."""
    if isinstance(node, tuple) and not isinstance(node, Span):
        for item in node:
            if isinstance(item, tuple) or dataclasses.is_dataclass(item):
                yield from _parts(item) if isinstance(item, tuple) else (item,)
    elif dataclasses.is_dataclass(node):
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if isinstance(value, (Source, Span)):
                continue
            if isinstance(value, tuple):
                yield from _parts(value)
            elif dataclasses.is_dataclass(value):
                yield value


def _targets(node: object) -> Iterator[Expr]:
    found: tuple[Expr, ...] = ()
    if isinstance(node, Assign):
        found = node.targets
    elif isinstance(node, (AugAssign, For)):
        found = (node.target,)
    elif isinstance(node, Simple) and node.keyword in ("del", "delete"):
        found = node.args
    stack = list(found)
    while stack:
        target = stack.pop()
        if target.op in ("tuple", "list", "star"):
            stack.extend(target.args)
        else:
            yield target


def _bound(nodes: list[object]) -> Iterator[str]:
    """Names that a function binds itself."""
    for node in nodes:
        for target in _targets(node):
            if target.op == "name":
                yield target.data
        if isinstance(node, (Function, Class)):
            yield node.name
        if isinstance(node, Import):
            yield from (local for local, _ in node.names)
            if node.alias is not None:
                yield node.alias.split(".")[0]
        if isinstance(node, Expr) and node.op == "walrus" and node.args[0].op == "name":
            yield node.args[0].data
        if isinstance(node, Expr) and node.op == "comp":
            for generator in node.data.generators:
                yield from _names(generator.target)
        if isinstance(node, Expr) and node.op == "lambda":
            yield from (parameter.name for parameter in node.data)


def _names(target: Expr) -> Iterator[str]:
    if target.op == "name":
        yield target.data
    elif target.op in ("tuple", "list", "star"):
        for part in target.args:
            yield from _names(part)


def _aliases(nodes: list[object], lasts: object) -> set[str]:
    """Locals that stand for something lasting: `me = self`, `kept = self.table`."""
    assert callable(lasts)
    found: set[str] = set()
    for _ in range(3):
        for node in nodes:
            if not isinstance(node, Assign) or node.value is None:
                continue
            root = _root(node.value)
            if root is None or root.op != "name" or not (lasts(root.data) or root.data in found):
                continue
            found |= {t.data for t in node.targets if t.op == "name"}
    return found


def _root(expr: Expr) -> Expr | None:
    """The name, or the call, that a chain of attributes and items starts from."""
    while expr.op in ("attr", "subscript"):
        expr = expr.args[0]
    return expr if expr.op in ("name", "call") else None


def _mutable(default: Expr) -> bool:
    return default.op in ("list", "dict", "set", "comp", "call")
