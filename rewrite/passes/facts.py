"""Syntax to facts: what each function computes, as a graph of values, and what it does, in order.

One symbolic run of every function: names become the values they hold, branches join in `phi`
values, loops run once with `carried` values for what an earlier round left. Nothing is judged here
and nothing is executed.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Sequence

from ..ir import (
    Assign,
    AugAssign,
    Block,
    Class,
    ClassFacts,
    Comprehension,
    Effect,
    Evaluate,
    Expr,
    For,
    Function,
    If,
    Import,
    Method,
    Module,
    ModuleFacts,
    Path,
    Return,
    Simple,
    Span,
    Stmt,
    Value,
    While,
)


def facts(module: Module) -> ModuleFacts:
    """Collect the facts of one module; classes and functions at its top level."""
    imports: list[Import] = []
    names = _top_level_names(module, imports)
    classes: dict[str, ClassFacts] = {}
    functions: dict[str, Method] = {}
    for statement in _definitions(module.body):
        if isinstance(statement, Class):
            classes[statement.name] = _class_facts(statement, module, names)
        else:
            functions[statement.name] = _run(statement, None, module, names)
    return ModuleFacts(module, names, tuple(imports), classes, functions)


def absolute_module(statement: Import, module: str, *, is_package: bool = False) -> str:
    """The dotted name of the module an import statement of `module` names."""
    if not statement.level:
        return statement.module
    parts = module.split(".")
    keep = len(parts) - statement.level + (1 if is_package else 0)
    base = ".".join(parts[: max(keep, 0)])
    return f"{base}.{statement.module}" if statement.module else base


def _definitions(body: Iterable[Stmt]) -> Iterable[Class | Function]:
    for statement in body:
        if isinstance(statement, (Class, Function)):
            yield statement
        elif isinstance(statement, If):
            yield from _definitions(statement.body)
            yield from _definitions(statement.orelse)
        elif isinstance(statement, Block):
            for part in statement.bodies:
                yield from _definitions(part)


def all_statements(body: Iterable[Stmt]) -> Iterable[Stmt]:
    """All statements at any depth, functions and classes included."""
    for statement in body:
        yield statement
        match statement:
            case If(body=inner, orelse=other) | For(body=inner, orelse=other):
                yield from all_statements(inner)
                yield from all_statements(other)
            case While(body=inner) | Function(body=inner) | Class(body=inner):
                yield from all_statements(inner)
            case Block(bodies=parts):
                for part in parts:
                    yield from all_statements(part)


def _top_level_names(module: Module, imports: list[Import]) -> dict[str, Value]:
    names: dict[str, Value] = {}
    name = module.source.module
    for statement in all_statements(module.body):
        match statement:
            case Import():
                imports.append(statement)
                names.update(_imported(statement, module))
            case Class() | Function() if statement in module.body or not names.get(statement.name):
                here = f"{name}.{statement.name}"
                names.setdefault(statement.name, Value("global", (), here, statement.name_span))
    for statement in module.body:
        match statement:
            case Assign(targets=targets):
                for target in targets:
                    if target.op == "name":
                        here = f"{name}.{target.data}"
                        names[target.data] = Value("global", (), here, target.span)
            case Class() | Function():
                here = f"{name}.{statement.name}"
                names[statement.name] = Value("global", (), here, statement.name_span)
    return names


def _imported(statement: Import, module: Module) -> dict[str, Value]:
    if statement.alias is not None:
        if "." in statement.alias and statement.alias == statement.module:
            first = statement.module.split(".")[0]  # `import a.b` binds `a`
            return {first: Value("global", (), first, statement.span)}
        return {statement.alias: Value("global", (), statement.module, statement.span)}
    source = module.source
    base = absolute_module(statement, source.module, is_package=source.is_package)
    return {
        local: Value("global", (), f"{base}.{imported}", statement.span)
        for local, imported in statement.names
    }


def _class_facts(syntax: Class, module: Module, names: dict[str, Value]) -> ClassFacts:
    owner = f"{module.source.module}.{syntax.name}"
    evaluator = _Evaluator(module, names, owner)
    bases = tuple(evaluator.value(base) for base in syntax.bases)
    methods = {
        part.name: _run(part, owner, module, names)
        for part in syntax.body
        if isinstance(part, Function)
    }
    attributes: dict[str, Value] = {}
    for name in ("__init__", "setup"):
        if name in methods:
            attributes |= _attributes(methods[name])
    return ClassFacts(module.source.module, syntax, bases, methods, attributes)


def _attributes(method: Method) -> dict[str, Value]:
    found: dict[str, Value] = {}
    if not method.params:
        return found
    this = method.params[0]
    for effect in method.effects:
        target = effect.target
        if effect.kind not in ("store", "augment") or target is None:
            continue
        if target.op != "attr" or target.args[0] is not this:
            continue
        value = effect.value
        if target.data in found and effect.path.conditions:
            test = effect.path.conditions[-1][0]
            value = Value("phi", (test, value, found[target.data]), None, value.span)
        found[target.data] = value
    return found


def _run(function: Function, owner: str | None, module: Module, names: dict[str, Value]) -> Method:
    evaluator = _Evaluator(module, names, owner)
    params = evaluator.bind_parameters(function)
    evaluator.block(function.body)
    effects = tuple(evaluator.effects)
    returns = tuple(effect for effect in effects if effect.kind == "return")
    rebound = frozenset(evaluator.rebound)
    return Method(owner, function, params, effects, returns, rebound, evaluator.before)


class _Evaluator:
    """Runs one function symbolically."""

    def __init__(self, module: Module, names: dict[str, Value], owner: str | None) -> None:
        self.module = module
        self.names = names
        self.owner = owner
        self.env: dict[str, Value] = {}
        self.effects: list[Effect] = []
        self.rebound: set[str] = set()
        self.before: dict[int, dict[str, Value]] = {}
        self.path = Path()
        self.statement: Stmt = Simple("pass", (), Span(0, 0))

    # ------------------------------------------------------------------ names

    def bind_parameters(self, function: Function) -> tuple[Value, ...]:
        made = []
        for parameter in function.parameters:
            where = function.name_span
            value = Value("param", (), (function.name, parameter.name), where)
            self.env[parameter.name] = value
            made.append(value)
        return tuple(made)

    def lookup(self, name: str, span: Span) -> Value:
        found = self.env.get(name)
        if found is not None:
            return found
        known = self.names.get(name)
        if known is not None:
            return Value("global", (), known.data, span)
        if hasattr(builtins, name):
            return Value("global", (), f"builtins.{name}", span)
        return Value("unknown", (), f"the name `{name}` is not defined here", span)

    def effect(self, kind: str, value: Value, target: Value | None = None) -> None:
        self.effects.append(Effect(kind, value, target, self.path, self.statement))

    # ------------------------------------------------------------------ expressions

    def value(self, expr: Expr) -> Value:
        match expr.op:
            case "name":
                return self.lookup(expr.data, expr.span)
            case "const":
                return Value("const", (), expr.data, expr.span)
            case "attr":
                return self.attribute(self.value(expr.args[0]), expr.data, expr.span)
            case "call":
                args = tuple(self.value(part) for part in expr.args)
                name = _attribute_named(args, expr)
                if name is not None:
                    return self.attribute(args[1], name, expr.span)
                if _is_listed_pair(args, expr):
                    pair = (self.item(args[1], i, expr.span) for i in (0, 1))
                    return Value("tuple", tuple(pair), None, expr.span)
                call = Value("call", args, expr.data, expr.span, expr)
                self.effect("call", call)
                return call
            case "subscript":
                base, key = (self.value(part) for part in expr.args)
                return self.index(base, key, expr.span, expr)
            case "if":
                test, body, orelse = (self.value(part) for part in expr.args)
                return Value("phi", (test, body, orelse), None, expr.span)
            case "lambda":
                return Value("closure", (), expr, expr.span)
            case "comp":
                return self.comprehension(expr)
            case "walrus":
                value = self.value(expr.args[1])
                self.assign(expr.args[0], value)
                return value
            case "other":
                parts = tuple(self.value(part) for part in expr.args)
                return Value("unknown", parts, f"a {expr.data} expression", expr.span)
        parts = tuple(self.value(part) for part in expr.args)
        return Value(expr.op, parts, expr.data, expr.span)

    @staticmethod
    def attribute(base: Value, name: str, span: Span) -> Value:
        if base.op == "global" and not base.data.startswith("builtins."):
            return Value("global", (), f"{base.data}.{name}", span)
        return Value("attr", (base,), name, span)

    @staticmethod
    def index(base: Value, key: Value, span: Span, syntax: Expr | None = None) -> Value:
        if base.op in ("tuple", "list") and key.op == "const" and isinstance(key.data, int):
            plain = not any(part.op == "star" for part in base.args)
            if plain and -len(base.args) <= key.data < len(base.args):
                return base.args[key.data]
        if _is_fetched_pair(base) and type(key.data) is int and key.data in (0, 1):
            return Value("item", (base,), key.data, span)
        return Value("index", (base, key), None, span, syntax)

    @staticmethod
    def item(base: Value, position: int, span: Span) -> Value:
        if base.op in ("tuple", "list") and position < len(base.args):
            if not any(part.op == "star" for part in base.args[: position + 1]):
                return base.args[position]
        if base.op == "phi":
            test, first, second = base.args
            parts = (
                test,
                _Evaluator.item(first, position, span),
                _Evaluator.item(second, position, span),
            )
            return Value("phi", parts, None, span)
        return Value("item", (base,), position, span)

    @staticmethod
    def rest(base: Value, position: int, count: int, span: Span) -> Value:
        """What a starred target at the end takes of a fetched pair; unknown of all else."""
        if _is_fetched_pair(base) and position == count - 1 <= 2:
            items = tuple(_Evaluator.item(base, i, span) for i in range(position, 2))
            return Value("list", items, None, span)
        return Value("unknown", (base,), "a starred target", span)

    def element(self, iterable: Value, span: Span) -> Value:
        """What a loop over `iterable` meets."""
        if iterable.op == "call" and iterable.args[0].op == "global":
            callee, arguments = iterable.args[0].data, iterable.args[1:]
            if callee == "builtins.zip":
                return Value("tuple", tuple(self.element(a, span) for a in arguments), None, span)
            if callee == "builtins.enumerate" and arguments:
                counter = Value("elem", (iterable,), None, span)
                return Value("tuple", (counter, self.element(arguments[0], span)), None, span)
        return Value("elem", (iterable,), None, span)

    def comprehension(self, expr: Expr) -> Value:
        data: Comprehension = expr.data
        saved, path = dict(self.env), self.path
        iterables = []
        for generator in data.generators:
            iterable = self.value(generator.iterable)
            iterables.append(iterable)
            self.assign(generator.target, self.element(iterable, generator.target.span), False)
            self.path = Path(self.path.conditions, True)
            for condition in generator.conditions:
                self.path = Path((*self.path.conditions, (self.value(condition), True)), True)
        elements = tuple(self.value(part) for part in expr.args)
        self.env, self.path = saved, path
        return Value("comp", (*elements, *iterables), data.kind, expr.span)

    # ------------------------------------------------------------------ statements

    def block(self, body: Sequence[Stmt]) -> bool:
        """Run statements in order; True if control never gets past them."""
        for statement in body:
            self.statement = statement
            self.before[statement.span.start] = dict(self.env)
            if self.run(statement):
                return True
        return False

    def run(self, statement: Stmt) -> bool:
        match statement:
            case Assign(targets=targets, value=expr):
                if expr is not None:
                    value = self.value(expr)
                    for target in targets:
                        self.assign(target, value)
            case AugAssign():
                self.augment(statement)
            case Evaluate(value=expr):
                self.value(expr)
            case Return(value=expr):
                value = (
                    self.value(expr)
                    if expr is not None
                    else Value("const", (), None, statement.span)
                )
                self.effect("return", value)
                return True
            case If():
                return self.branch(statement)
            case For():
                self.loop(statement)
            case While():
                self.while_loop(statement)
            case Block(heads=heads, bodies=bodies):
                for head in heads:
                    self.value(head)
                before = dict(self.env)
                ended = [self.block(body) for body in bodies]
                if statement.keyword == "try" and any(ended):
                    self.env = before | self.env
                return statement.keyword == "with" and ended[0]
            case Function():
                self.env[statement.name] = Value("closure", (), statement, statement.span)
            case Import():
                for local, value in _imported(statement, self.module).items():
                    self.env[local] = value
            case Simple(keyword=keyword, args=args):
                for part in args:
                    self.value(part)
                return keyword in ("raise", "continue", "break")
            case Class():
                self.env[statement.name] = Value(
                    "unknown", (), "a class inside a function", statement.span
                )
        return False

    def assign(self, target: Expr, value: Value, rebind: bool = True) -> None:
        match target.op:
            case "name":
                if rebind and target.data in self.env:
                    self.rebound.add(target.data)
                self.env[target.data] = value
            case "tuple" | "list":
                for position, part in enumerate(target.args):
                    if part.op == "star":
                        rest = self.rest(value, position, len(target.args), part.span)
                        self.assign(part.args[0], rest, rebind)
                        break
                    self.assign(part, self.item(value, position, part.span), rebind)
            case "attr":
                base = self.value(target.args[0])
                place = self.attribute(base, target.data, target.span)
                self.effect("store", value, place)
            case "subscript":
                base, key = (self.value(part) for part in target.args)
                place = Value("index", (base, key), None, target.span)
                self.effect("store", value, place)
                name = target.args[0]
                if name.op == "name":
                    self.env[name.data] = Value("setitem", (base, key, value), None, target.span)

    def augment(self, statement: AugAssign) -> None:
        current = self.value(statement.target)
        value = self.value(statement.value)
        result = Value("binary", (current, value), statement.operator, statement.span)
        self.effect("augment", result, current)
        if statement.target.op == "name":
            self.rebound.add(statement.target.data)
            self.env[statement.target.data] = result

    def branch(self, statement: If) -> bool:
        test = self.value(statement.test)
        outer, before = self.path, self.env
        self.path = Path((*outer.conditions, (test, True)), outer.in_loop)
        self.env = dict(before)
        body_ends = self.block(statement.body)
        body_env = self.env
        self.path = Path((*outer.conditions, (test, False)), outer.in_loop)
        self.env = dict(before)
        orelse_ends = self.block(statement.orelse)
        orelse_env = self.env
        self.path = outer
        if body_ends and orelse_ends:
            self.env = before
            return True
        if body_ends or orelse_ends:
            self.env = orelse_env if body_ends else body_env
            self.path = Path((*outer.conditions, (test, not body_ends)), outer.in_loop)
            return False
        self.env = self._join(test, body_env, orelse_env, statement.span)
        return False

    @staticmethod
    def _join(
        test: Value, first: dict[str, Value], second: dict[str, Value], span: Span
    ) -> dict[str, Value]:
        joined: dict[str, Value] = {}
        for name in {**first, **second}:
            one, two = first.get(name), second.get(name)
            if one is two and one is not None:
                joined[name] = one
            else:
                missing = Value("unknown", (), f"`{name}` is set on one branch only", span)
                joined[name] = Value("phi", (test, one or missing, two or missing), None, span)
        return joined

    def loop(self, statement: For) -> None:
        iterable = self.value(statement.iterable)
        before = dict(self.env)
        self._carry(statement.body, before, statement.span)
        outer = self.path
        self.path = Path(outer.conditions, True)
        self.assign(statement.target, self.element(iterable, statement.target.span))
        self.block(statement.body)
        self.path = outer
        self._after_loop(before, statement.span)
        self.block(statement.orelse)

    def while_loop(self, statement: While) -> None:
        before = dict(self.env)
        self._carry(statement.body, before, statement.span)
        outer = self.path
        test = self.value(statement.test)
        self.path = Path((*outer.conditions, (test, True)), True)
        self.block(statement.body)
        self.path = outer
        self._after_loop(before, statement.span)

    def _carry(self, body: Sequence[Stmt], before: dict[str, Value], span: Span) -> None:
        for name in _assigned(body):
            if name in before:
                self.env[name] = Value("carried", (before[name],), name, span)

    def _after_loop(self, before: dict[str, Value], span: Span) -> None:
        for name, value in list(self.env.items()):
            start = before.get(name)
            if start is None:
                continue
            if value.op == "carried" and value.args[0] is start:
                self.env[name] = start
            elif value is not start:
                self.env[name] = Value("loop", (start, value), None, span)


def _attribute_named(args: tuple[Value, ...], call: Expr) -> str | None:
    """The name in `getattr(x, "name")`, which is `x.name`: not with a default, and not with a
    name that a class would mangle."""
    if len(args) != 3 or any(call.data) or args[0].op != "global":
        return None
    if args[0].data != "builtins.getattr" or args[2].op != "const":
        return None
    name = args[2].data
    plain = isinstance(name, str) and name.isidentifier() and not name.startswith("__")
    return name if plain else None


def _is_fetched_pair(value: Value) -> bool:
    """`cache.update_and_fetch(k, v)`: a pair by protocol, so its parts are what it unpacks to."""
    return (
        value.op == "call"
        and len(value.args) == 3
        and value.args[0].op == "attr"
        and value.args[0].data == "update_and_fetch"
    )


def _is_listed_pair(args: tuple[Value, ...], call: Expr) -> bool:
    """`list(pair)` or `tuple(pair)` of a fetched pair."""
    if len(args) != 2 or any(call.data) or args[0].op != "global":
        return False
    made = args[0].data in ("builtins.list", "builtins.tuple")
    return made and _is_fetched_pair(args[1])


def _assigned(body: Sequence[Stmt]) -> list[str]:
    """Names that statements bind, in order, each once."""
    names: dict[str, None] = {}

    def target(expr: Expr) -> None:
        if expr.op == "name":
            names[expr.data] = None
        elif expr.op in ("tuple", "list", "star"):
            for part in expr.args:
                target(part)
        elif expr.op == "subscript" and expr.args[0].op == "name":
            names[expr.args[0].data] = None

    for statement in all_statements(body):
        match statement:
            case Assign(targets=targets):
                for one in targets:
                    target(one)
            case AugAssign(target=one) | For(target=one):
                target(one)
    return list(names)
