"""Runs a rewritten model on abstract values: which axes everything has, from ids to logits.

The entry class is built by its own `__init__` from an unknown config, then called with ids
[rows][length] and caches. Branches on the config run both ways, loops run until nothing new is
learnt, calls are followed into every function and layer that can be read. What cannot be followed
is refused, unless a rule says what it does to token axes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from ..ir import (
    Assign,
    Assumption,
    AugAssign,
    Block,
    Class,
    Comprehension,
    Evaluate,
    Expr,
    For,
    Function,
    If,
    Import,
    Parameter,
    Place,
    Return,
    Simple,
    Span,
    Stmt,
    While,
)
from . import rules as array_rules
from .domain import (
    CONSTANT,
    LENGTH,
    NONE,
    PARAMETER,
    ROWS,
    UNDEFINED,
    ZERO,
    Array,
    ByToken,
    Choice,
    ClassValue,
    Constant,
    Count,
    CountTest,
    Dead,
    Instance,
    Items,
    Iterable_,
    Known,
    Library,
    Numbers,
    Opaque,
    OpenShape,
    Partial,
    Refused,
    Routine,
    Slice,
    Super,
    Table,
    Tuple,
    Undefined,
    Value,
    choice,
    feature,
    is_live,
    join,
    options,
    parts,
    tokens,
)
from .indexing import index, store
from .layers import FUNCTIONS, KERNELS, LAYERS, SITES, as_linear, check_rows, some_site, updated
from .rules import RULES, Rule, arithmetic, array
from .shapes import size_key
from .world import REWRITTEN, Text, World

_SITES = "mlxrewrite.runtime.sites."
_EMPTY = Tuple(())
_DEEPEST = 60
_ROUNDS = 12
_UNROLLED = 24


class Fork(Exception):
    """A branch on a number of tokens: the call is run both ways and compared."""

    def __init__(self, test: CountTest) -> None:
        self.test = test


@dataclass(eq=False, slots=True)
class Scope:
    """The names of one call."""

    module: str
    names: dict[str, Value]
    parent: Scope | None
    forward: bool
    aliases: set[str] = field(default_factory=set)  # names of what others hold, too
    outer: set[str] = field(default_factory=set)  # declared global or nonlocal


@dataclass(eq=False, slots=True)
class Frame:
    scope: Scope
    owner: ClassValue | None
    this: Value | None
    where: Span
    returns: Value = UNDEFINED
    breaks: list[dict[str, Value]] = field(default_factory=list)
    continues: list[dict[str, Value]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Failure:
    """Where and why a proof ends."""

    slug: str
    message: str
    nearest: str
    place: Place | None
    label: str


class Interpreter:
    """One proof. `claims` are the classes whose mixing a kind has taken, by name and kind."""

    def __init__(self, world: World, claims: dict[str, str]) -> None:
        self.world = world
        self.claims = claims
        self.frames: list[Frame] = []
        self.forward = False
        self.depth = 0
        self.module_values: dict[tuple[str, str], Value] = {}
        self.memo: dict[Any, Value] = {}
        self.lineages: dict[tuple[str, int], list[ClassValue | Library]] = {}
        self.unmemoised = 0
        self.assumed: dict[Any, bool] = {}
        self.assumptions: dict[Assumption, None] = {}
        self.reads: set[tuple[int, str]] = set()
        self.operations: set[str] = set()
        self.tests: list[Expr] = []  # of the branches control is in
        self.added: list[tuple[Items, Value, int]] | None = None  # in a loop over tokens

    # ----------------------------------------------------------------- entry

    def prove(self, module: str, entry: str) -> Failure | None:
        """Run `entry(config)(ids, cache=caches)`; None if every step is row by row."""
        try:
            cls = self.global_value(module, entry)
            if not isinstance(cls, ClassValue):
                raise Refused("unknown-operation", f"`{entry}` is not a class that can be read")
            model = self.instantiate(cls, (Constant(("config",)),), {})
            self.forward = True
            ids = Array(((ROWS,), (LENGTH,)))
            out = self.call(model, (ids,), {"cache": Opaque("cache")})
            self.check_logits(out)
        except Refused as problem:
            return self.failure(problem)
        except Dead:
            return self.failure(Refused("unknown-operation", "every path ends in an error"))
        except RecursionError:
            return self.failure(Refused("unknown-operation", "calls nest too deeply"))
        return None

    def check_logits(self, out: Value) -> None:
        for one in options(out):
            first = one.items[0] if isinstance(one, Tuple) and one.items else one
            logits = array(first)
            axes = logits.axes or ()
            good = len(axes) == 3 and axes[0][:1] and axes[0][0].kind in ("rows", "wanted")
            if logits.open and len(axes) == 2:
                good = True
            if not good or len(axes[0]) != 1 or axes[1] != (LENGTH,):
                raise Refused("row-mixing", f"the model returns axes {logits}")

    def failure(self, problem: Refused) -> Failure:
        """The innermost place in the file itself, or in a rewritten sibling."""
        where, label = None, ""
        if problem.at is not None:
            module, span = problem.at
            text = self.world.text(module)
            self.frames.clear()
            place = text.place(span) if text is not None else None
            return Failure(problem.slug, problem.message, problem.nearest, place, "")
        for frame in reversed(self.frames):
            text = self.world.text(frame.scope.module)
            if text is None:
                continue
            found = text.place(frame.where)
            if where is None:
                where = found
            if frame.scope.module.startswith(REWRITTEN):
                if found is not where:
                    label = f"reaches {where}"
                where = found
                break
        self.frames.clear()
        return Failure(problem.slug, problem.message, problem.nearest, where, label)

    # ----------------------------------------------------------------- context of rules

    def here(self) -> Any:
        frame = self.frames[-1]
        return (frame.scope.module, frame.where)

    def assume(self, text: str) -> None:
        place = None
        if self.frames:
            module = self.world.text(self.frames[-1].scope.module)
            place = module.place(self.frames[-1].where) if module is not None else None
        self.assumptions[Assumption(text, place)] = None

    def apply(self, rule: Rule, args: Sequence[Value], more: dict[str, Value]) -> Value:
        """A rule, for every combination of what its arguments may be."""

        def run(args: Sequence[Value], more: dict[str, Value]) -> Value:
            live = any(map(is_live, (*args, *more.values())))
            if live:
                self.operations.add(rule.name)
                if rule.name != "paged_attention":
                    for value in (*args, *more.values()):
                        if (wrong := _unturned(value)) is not None:
                            array_rules.elementwise(self, wrong)
            try:
                row = _row((*args, *more.values()))
                if row is not None:
                    return self.on_row(rule, row, args, more)
                return self.with_term(rule.name, rule.apply(self, *args, **more), args, more)
            except TypeError:
                if not live:
                    return PARAMETER
                raise Refused(
                    "unknown-operation", f"{rule.name} is called in a way that its rule lacks"
                ) from None
            except Refused:
                if not live:
                    return PARAMETER
                raise

        return self.each(run, args, more)

    def with_term(
        self, name: Hashable, result: Value, args: Sequence[Value], more: dict[str, Value]
    ) -> Value:
        """The result, told by how it was computed, while both ways of a branch are compared."""
        if not self.unmemoised:
            return result
        first = args[0] if args else NONE
        if name in _PERMUTING and isinstance(first, Array):
            order = [v for v in args[1:] if isinstance(v, Array) and v.live]
            restored = all(v.tag[:1] in (("order",), ("owner",), ("inverse",)) for v in order)
            if restored and (order or name != "index"):
                return _termed(result, first.term)
        names = sorted(more)
        words = (*map(_term, args), *(_term(more[key]) for key in names))
        return _termed(result, None if None in words else (name, *names, *words))

    def on_row(self, rule: Rule, row: Any, args: Sequence[Value], more: dict[str, Value]) -> Value:
        """A rule for one token's parts: whatever it computes, it computes for each token alone."""
        inner = [_bare(v) for v in args]
        named = {k: _bare(v) for k, v in more.items()}
        if any(map(is_live, (*inner, *named.values()))):
            raise Refused("row-mixing", "one token's part meets the parts of others")
        return _marked(rule.apply(self, *inner, **named), row)

    def each(
        self,
        function: Callable[[Sequence[Value], dict[str, Value]], Value],
        args: Sequence[Value],
        more: dict[str, Value],
    ) -> Value:
        """Call a function for each choice among its arguments and join the results."""
        for i, value in enumerate(args):
            if isinstance(value, Choice):
                return self.join_calls(
                    lambda option, i=i: self.each(  # type: ignore[misc]
                        function, [*args[:i], option, *args[i + 1 :]], more
                    ),
                    value.options,
                )
        for key, value in more.items():
            if isinstance(value, Choice):
                return self.join_calls(
                    lambda option, key=key: self.each(  # type: ignore[misc]
                        function, args, {**more, key: option}
                    ),
                    value.options,
                )
        return function(args, more)

    def join_calls(self, function: Callable[[Value], Value], several: Sequence[Value]) -> Value:
        """What a function gives for any of several values; those that raise give nothing."""
        frames, depth, forward = len(self.frames), self.depth, self.forward
        found: list[Value] = []
        taken: list[Value] = []
        for option in several:
            try:
                found.append(function(option))
                taken.append(option)
            except Dead:
                del self.frames[frames:]
                self.depth, self.forward = depth, forward
        if not found:
            raise Dead
        result = choice(found) if len(found) > 2 else join(found[0], found[-1])
        if self.unmemoised and isinstance(result, Array) and result.term is None:
            words = tuple(map(_term, (*taken, *found)))
            return _termed(result, None if None in words else ("either", words))
        return result

    # ----------------------------------------------------------------- names

    @property
    def frame(self) -> Frame:
        return self.frames[-1]

    def global_value(self, module: str, name: str) -> Value:
        key = (module, name)
        if key not in self.module_values:
            self.module_values[key] = CONSTANT  # ends a circle
            self.module_values[key] = self._global_value(module, name)
        return self.module_values[key]

    def _global_value(self, module: str, name: str) -> Value:
        text = self.world.text(module)
        if text is None:
            return Library(f"{module}.{name}")
        bindings = text.names.get(name)
        if bindings is None:
            inner = f"{module}.{name}"
            return Library(inner)
        found: list[Value] = []
        for binding in bindings:
            if isinstance(binding, str):
                found.append(self.dotted(binding))
            elif isinstance(binding, Class):
                found.append(ClassValue(module, binding))
            elif isinstance(binding, Function):
                found.append(self.decorated(binding, module, None, None))
            else:
                with self.setup(module):
                    try:
                        found.append(self.value(binding))
                    except Dead:
                        continue
        return choice(found)

    def dotted(self, name: str) -> Value:
        """What an absolute dotted name is: a module, or something in one."""
        base, _, last = name.rpartition(".")
        if base and not base.startswith("mlxrewrite.") and self.world.text(base) is not None:
            text = self.world.text(base)
            assert text is not None
            if last in text.names:
                return self.global_value(base, last)
        return Library(name)

    @contextmanager
    def setup(self, module: str) -> Iterator[None]:
        """Evaluate something of a module as it is when the module is imported."""
        forward, self.forward = self.forward, False
        depth, self.depth = self.depth, 0
        self.frames.append(Frame(Scope(module, {}, None, False), None, None, Span(0, 0)))
        yield
        self.frames.pop()
        self.forward, self.depth = forward, depth

    def lookup(self, name: str) -> Value:
        scope: Scope | None = self.frame.scope
        while scope is not None:
            found = scope.names.get(name)
            if found is not None:
                return found
            scope = scope.parent
        text = self.world.text(self.frame.scope.module)
        if text is not None and name in text.names:
            return self.global_value(self.frame.scope.module, name)
        return Library(f"builtins.{name}")

    # ----------------------------------------------------------------- classes

    def lineage(self, cls: ClassValue) -> list[ClassValue | Library]:
        """The class and its bases, the class first; library classes as such."""
        key = (cls.module, id(cls.syntax))
        if key not in self.lineages:
            self.lineages[key] = self._lineage(cls)
        return self.lineages[key]

    def _lineage(self, cls: ClassValue) -> list[ClassValue | Library]:
        found: list[ClassValue | Library] = []
        queue: list[Value] = [cls]
        while queue:
            current = queue.pop(0)
            if isinstance(current, Library):
                found.append(current)
            if not isinstance(current, ClassValue) or current in found:
                continue
            found.append(current)
            with self.setup(current.module):
                for base in current.syntax.bases:
                    queue += options(self.value(base))
        return found

    def member(
        self, cls: ClassValue, name: str, after: ClassValue | None = None
    ) -> tuple[ClassValue, Function | Expr] | None:
        """A method or a class-level value, as an instance finds it."""
        lineage = [c for c in self.lineage(cls) if isinstance(c, ClassValue)]
        if after is not None:
            lineage = lineage[lineage.index(after) + 1 :]
        for owner in lineage:
            for statement in owner.syntax.body:
                if isinstance(statement, Function) and statement.name == name:
                    return owner, statement
                if isinstance(statement, Assign) and statement.value is not None:
                    if any(t.op == "name" and t.data == name for t in statement.targets):
                        return owner, statement.value
        return None

    def instantiate(self, cls: ClassValue, args: Sequence[Value], more: dict[str, Value]) -> Value:
        lineage = self.lineage(cls)
        names = [c.name for c in lineage if isinstance(c, Library)]
        if any(isinstance(c, ClassValue) and c.qualified in _CONFIGS for c in lineage):
            if any(map(is_live, (*args, *more.values()))):
                raise Refused("unknown-operation", "a config made from tokens")
            return Constant(("config", cls.qualified))
        layers = [n.rpartition(".")[2] for n in names if n.startswith("mlx.nn.")]
        layer = next((n for n in layers if n != "Module"), "")
        made = Instance(cls, {}, layer, self.depth, self.forward)
        found = self.member(cls, "__init__")
        if found is not None and isinstance(found[1], Function):
            owner, function = found
            routine = Routine(owner.module, function, None, made, owner)
            self.call_routine(routine, args, more)
            return made
        fields = [
            (s.targets[0].data, s.value)
            for c in reversed([c for c in lineage if isinstance(c, ClassValue)])
            for s in c.syntax.body
            if isinstance(s, Assign) and s.targets[0].op == "name"
        ]
        if layer or not fields:
            if any(map(is_live, (*args, *more.values()))) and not layer:
                raise Refused("unknown-operation", f"`{cls.name}` is made from tokens")
            return made
        given = dict(zip((name for name, _ in fields), args, strict=False)) | more
        with self.setup(cls.module):
            for name, default in fields:
                made.attributes[name] = given.get(
                    name, self.value(default) if default is not None else CONSTANT
                )
        return made

    # ----------------------------------------------------------------- calls

    def call(self, callee: Value, args: Sequence[Value], more: dict[str, Value]) -> Value:
        match callee:
            case Choice(options=several):
                return self.join_calls(lambda one: self.call(one, args, more), several)
            case Routine():
                return self.call_routine(callee, args, more)
            case ClassValue():
                return self.instantiate(callee, args, more)
            case Partial(function=function, args=first, keywords=keywords):
                return self.call(function, (*first, *args), {**dict(keywords), **more})
            case Library():
                return self.call_library(callee, args, more)
            case Instance():
                return self.call_instance(callee, args, more)
            case Known(value=None) | Undefined():
                raise Dead
        if any(map(is_live, (*args, *more.values()))) or is_live(callee):
            raise Refused("unknown-operation", "a call of something that is not known")
        return CONSTANT

    def call_instance(
        self, layer: Instance, args: Sequence[Value], more: dict[str, Value]
    ) -> Value:
        if layer.cls is not None:
            found = self.member(layer.cls, "__call__")
            if found is not None and isinstance(found[1], Function):
                method = self.decorated(found[1], found[0].module, layer, found[0])
                return self.call(method, args, more)
        return self.call_layer(layer, args, more)

    def call_layer(self, layer: Instance, args: Sequence[Value], more: dict[str, Value]) -> Value:
        if layer.layer == "Sequential":
            (value,) = args
            for inner in layer.attributes.values():
                value = self.call(inner, (value,), {})
            return value
        entry = LAYERS.get(layer.layer)
        if entry is None:
            if any(map(is_live, (*args, *more.values()))):
                raise Refused("unknown-operation", f"nn.{layer.layer or 'Module'} has no rule")
            return CONSTANT
        function, reason = entry
        name = f"nn.{layer.layer}"
        rule = Rule(name, lambda c, *a, **k: function(c, layer, *a, **k), reason)
        return self.with_term((name, id(layer)), self.apply(rule, args, more), args, more)

    def decorated(
        self, function: Function, module: str, this: Value | None, owner: ClassValue | None
    ) -> Value:
        """A function with its decorators applied."""
        scope = self.frame.scope if self.frames and owner is None and this is None else None
        if scope is not None and scope.module != module:
            scope = None
        routine: Value = Routine(module, function, scope, this, owner)
        for expr in reversed(function.decorators):
            if expr.op == "name" and expr.data in ("property", "staticmethod", "classmethod"):
                if expr.data == "staticmethod":
                    routine = Routine(module, function, scope, None, owner)
                continue
            if expr.op == "attr" and expr.data in ("setter", "getter"):
                continue
            with self.setup(module):
                decorator = self.value(expr)
            if isinstance(decorator, Library) and decorator.name in _CACHED:
                continue
            routine = self.call(decorator, (routine,), {})
        return routine

    def call_routine(
        self, routine: Routine, args: Sequence[Value], more: dict[str, Value]
    ) -> Value:
        if len(self.frames) > _DEEPEST:
            raise Refused("unknown-operation", "calls nest too deeply")
        return self.call_bound_names(routine, self.bind(routine, args, more))

    def call_bound_names(self, routine: Routine, names: dict[str, Value]) -> Value:
        """Call once for each of what arguments may be: with and without a cache, a mask, ..."""
        for name, held in names.items():
            if isinstance(held, Choice) and NONE in held.options:
                return self.join_calls(
                    lambda one, name=name: self.call_bound_names(  # type: ignore[misc]
                        routine, {**names, name: one}
                    ),
                    held.options,
                )
        key = self.memo_key(routine, names)
        if key is not None and not self.unmemoised and key in self.memo:
            return self.memo[key]
        frames, depth, forward = len(self.frames), self.depth, self.forward
        try:
            result = self.run(routine, names)
        except Dead:
            del self.frames[frames:]
            self.depth, self.forward = depth, forward
            raise
        except Fork as fork:
            del self.frames[frames:]
            self.depth = depth
            result = self.both_ways(routine, names, fork.test)
            key = None
        if key is not None:
            self.memo[key] = result
        return result

    def memo_key(self, routine: Routine, names: dict[str, Value]) -> Any:
        if not self.forward or routine.scope is not None or self.assumed:
            return None
        if any(_mutable(v) for v in names.values()):
            return None
        return (id(routine.syntax), routine.module, tuple(names.items()), self.depth > 0)

    def run(self, routine: Routine, names: dict[str, Value]) -> Value:
        syntax = routine.syntax
        scope = Scope(routine.module, dict(names), routine.scope, self.forward)
        scope.aliases = set(names)
        self.frames.append(Frame(scope, routine.owner, routine.bound, syntax.span))
        if isinstance(syntax, Expr):
            result = self.value(syntax.args[0])
        else:
            ended = self.block(syntax.body)
            result = self.frame.returns
            if not ended:
                result = join(result, NONE)
            elif isinstance(result, Undefined):
                self.frames.pop()
                raise Dead
        self.frames.pop()
        return result

    def both_ways(self, routine: Routine, names: dict[str, Value], test: CountTest) -> Value:
        """A branch on how many tokens there are: both ways must compute the same for every row.

        The same operations on the same values, but for a permutation of rows that is undone: that
        is what expert sorting does for speed.
        """
        results: list[Value] = []
        before, depth = len(self.frames), self.depth
        self.unmemoised += 1
        given = {name: _named(value, (id(test), name)) for name, value in names.items()}
        for outcome in (True, False):
            del self.frames[before:]
            self.depth = depth
            self.assumed[test.key] = outcome
            results.append(self.run(routine, dict(given)))
        del self.assumed[test.key]
        self.unmemoised -= 1
        one, two = results
        if one != two or not _same_terms(one, two):
            self.refuse_test(test)
        self.operations.add("permutation")
        return one

    def refuse_test(self, test: CountTest) -> None:
        kinds = {f.kind for f in test.factors}
        at = test.key[0] if isinstance(test.key, tuple) else None
        if kinds == {"length"}:
            raise Refused("length-dependent", "a branch on the length of a chunk", at=at)
        raise Refused("token-count", "a branch on the number of tokens", at=at)

    def bind(
        self, routine: Routine, args: Sequence[Value], more: dict[str, Value]
    ) -> dict[str, Value]:
        """Arguments to parameters, as Python does it."""
        syntax = routine.syntax
        parameters: tuple[Parameter, ...] = (
            syntax.data if isinstance(syntax, Expr) else syntax.parameters
        )
        given = [routine.bound, *args] if routine.bound is not None else list(args)
        names: dict[str, Value] = {}
        left = dict(more)
        for parameter in parameters:
            if parameter.kind == "positional" and given:
                names[parameter.name] = given.pop(0)
            elif parameter.kind == "*":
                names[parameter.name] = Tuple(tuple(given))
                given = []
            elif parameter.kind == "**":
                rest: dict[Any, Value] = dict(left)
                names[parameter.name] = Table(rest, None, self.depth, self.forward)
                left = {}
            elif parameter.name in left:
                names[parameter.name] = left.pop(parameter.name)
            elif parameter.default is not None:
                with self.setup(routine.module):
                    self.frame.scope.parent = routine.scope
                    names[parameter.name] = self.value(parameter.default)
            elif not self.forward:
                names[parameter.name] = CONSTANT
            else:
                raise Dead
        if (given or left) and self.forward:
            raise Dead
        return names

    # ----------------------------------------------------------------- library calls

    def call_library(self, callee: Library, args: Sequence[Value], more: dict[str, Value]) -> Value:
        name = callee.name
        if callee.bound is not None:
            return self.call_bound(name, callee.bound, args, more)
        if name.startswith("mlx.core."):
            return self.call_core(name.removeprefix("mlx.core."), args, more)
        if name.startswith("mlx.nn."):
            return self.call_nn(name.removeprefix("mlx.nn."), args, more)
        if name.startswith("builtins."):
            return self.call_builtin(name.removeprefix("builtins."), args, more)
        if name.startswith("mlxrewrite."):
            return self.call_site(name, args, more)
        if name in ("functools.partial",):
            return Partial(args[0], tuple(args[1:]), tuple(more.items()))
        if name in _PASSED:
            return args[0]
        if any(map(is_live, (*args, *more.values()))):
            raise Refused("unknown-operation", f"`{name}` has no rule")
        return CONSTANT

    def call_core(self, name: str, args: Sequence[Value], more: dict[str, Value]) -> Value:
        if name in ("compile", "checkpoint"):
            if not args:
                return Partial(Library(f"mlx.core.{name}"), (), ())
            return args[0]
        rule = RULES.get(name)
        if rule is not None:
            more.pop("stream", None)
            return self.apply(rule, args, more)
        if any(map(is_live, (*args, *more.values()))):
            raise Refused("unknown-operation", f"mx.{name} has no rule")
        if name == "fast.metal_kernel":
            return self.kernel(more)
        return CONSTANT if name.split(".", maxsplit=1)[0] in _NO_ARRAYS else PARAMETER

    @staticmethod
    def kernel(more: dict[str, Value]) -> Value:
        """A custom kernel, known by its text."""
        text = more.get("source", NONE)
        digest = ""
        if isinstance(text, Known) and isinstance(text.value, str):
            digest = sha256(text.value.encode()).hexdigest()[:16]
        return Library(f"kernel.{digest}", NONE)

    def call_kernel(self, digest: str, args: Sequence[Value], more: dict[str, Value]) -> Value:
        """Rows in, rows out, as the kernel's text was read; any other kernel is refused."""
        if not any(map(is_live, (*args, *more.values()))):
            return CONSTANT
        reason = KERNELS.get(digest)
        shapes = more.get("output_shapes", NONE)
        known = self.known_items(shapes)
        if reason is None or known is None:
            raise Refused("unknown-operation", "a custom kernel", "mlx's own operations")
        self.assume(f"a custom kernel, read and not run: {reason}")
        made = [self.apply(RULES["zeros"], (shape,), {}) for shape in known]
        return Tuple(tuple(_termed(v, None) for v in made))

    def call_nn(self, name: str, args: Sequence[Value], more: dict[str, Value]) -> Value:
        last = name.rpartition(".")[2]
        rule = FUNCTIONS.get(last)
        if rule is not None:
            return self.apply(rule, args, more)
        if last[:1].isupper():
            if any(map(is_live, (*args, *more.values()))):
                raise Refused("unknown-operation", f"a layer nn.{last} made from tokens")
            made = Instance(None, {}, last, self.depth, self.forward)
            if last == "Sequential":
                made.attributes = {str(i): v for i, v in enumerate(args)}
            elif last in ("Linear", "Embedding"):
                width = more.get(
                    "output_dims", more.get("dims", args[1] if len(args) > 1 else NONE)
                )
                made.width = size_key(width)
                if more.get("bias") == Known(False):
                    made.attributes["bias"] = NONE
            return made
        if any(map(is_live, (*args, *more.values()))):
            raise Refused("unknown-operation", f"nn.{name} has no rule")
        return CONSTANT

    def call_site(self, name: str, args: Sequence[Value], more: dict[str, Value]) -> Value:
        if name == "mlxrewrite.runtime.rope.initialize_rope":
            return Instance(None, {}, "RoPE", self.depth, self.forward)
        last = name.rpartition(".")[2]
        if last in ("per_sequence", "per_sequence_model", "per_length"):
            return Library("per_sequence", Tuple((*args, Known(_ONCE[last]))))
        entry = SITES.get(last)
        if entry is not None:
            function, reason = entry
            return self.apply(Rule(last, function, reason), args, more)
        if not any(map(is_live, (*args, *more.values()))):
            return CONSTANT
        self.assume(f"`{last}` treats each row by itself (a site of the runtime)")
        return some_site(self, last, tuple(args), more)

    def call_bound(
        self, name: str, bound: Value, args: Sequence[Value], more: dict[str, Value]
    ) -> Value:
        if name == "per_sequence":
            assert isinstance(bound, Tuple)
            return self.call_mixer(bound.items[0], bound.items[1], args, more)
        kind, _, method = name.partition(".")
        if kind == "kernel":
            return self.call_kernel(method, args, more)
        if kind == "array":
            return self.call_array(bound, method, args, more)
        if kind == "at":
            assert isinstance(bound, Tuple)
            base, key = bound.items
            if method not in ("add", "subtract", "multiply", "divide", "maximum", "minimum"):
                raise Refused("unknown-operation", f"`.at[...].{method}` has no rule")
            rule = Rule("at", lambda c, b, v: store(c, array(b), key, v), "")
            found = self.apply(rule, (base, *args), more)
            return self.with_term(("at", method), found, (base, key, *args), more)
        if kind == "opaque":
            return self.call_opaque(method, args, more)
        if kind == "layer":
            assert isinstance(bound, Instance)
            return self.call_layer_method(bound, method, args, more)
        if kind == "items":
            assert isinstance(bound, (Items, Tuple))
            return self.call_items(bound, method, args)
        if kind == "table":
            assert isinstance(bound, Table)
            return self.call_table(bound, method, args)
        raise Refused("unknown-operation", f"`.{method}` of something that is not known")

    def call_mixer(
        self, routine: Value, how: Value, args: Sequence[Value], more: dict[str, Value]
    ) -> Value:
        """The original mixer over each sequence's own rows: [rows][length] and features."""
        assert isinstance(routine, Routine) and isinstance(routine.syntax, Function)
        assert isinstance(how, Known)
        owner = routine.owner.name if routine.owner is not None else routine.syntax.name
        check_rows(f"`{owner}` {how.value}", (*args, *more.values()))
        widths = {_width(s.value) for s in _returns(routine.syntax.body)}
        self.assume(
            f"`{owner}` runs {how.value} and gives [rows][length][features]; "
            "the runtime checks the first two axes"
        )
        rows = Array(((ROWS,), (LENGTH,), feature(("of", owner))))
        if widths == {0}:
            return rows
        if len(widths) == 1:
            return Tuple((rows,) * widths.pop())
        raise Refused("unknown-operation", f"`{owner}` returns one or several values")

    def call_array(
        self, bound: Value, method: str, args: Sequence[Value], more: dict[str, Value]
    ) -> Value:
        if method == "tolist" and isinstance(bound, Array) and bound.axes and not bound.tag:
            if tokens(bound.axes[0]) and not any(map(tokens, bound.axes[1:])):
                return Numbers(bound.axes[0])
        if method in ("item", "tolist"):
            if is_live(bound):
                raise Refused("token-branch", "what tokens hold is read by Python")
            return CONSTANT
        rule = RULES.get(method)
        if rule is not None:
            return self.apply(rule, (bound, *args), more)
        if is_live(bound) or any(map(is_live, args)):
            raise Refused("unknown-operation", f"array method `{method}` has no rule")
        return PARAMETER

    def call_opaque(self, method: str, args: Sequence[Value], more: dict[str, Value]) -> Value:
        if method in ("update_and_fetch", "keys_and_values"):
            if not args:
                return Tuple((Opaque("handle"), Opaque("handle")))
            return self.apply(
                Rule(method, lambda c, k, v: updated(k, v), "keys go to pages"), args, more
            )
        if method == "update_and_fetch_latents":
            return self.apply(
                Rule(method, lambda c, k, v: updated(k, v), "latents go to pages"), args, more
            )
        if method == "update_and_fetch_index":
            self.apply(
                Rule(method, lambda c, k, v: updated(k, v), "index keys go to pages"), args, more
            )
            return Tuple((Opaque("index"), NONE))
        if method == "make_mask":
            return Opaque("mask")
        if method == "maybe_trim_front":
            return NONE
        raise Refused("cache-use", f"`.{method}` of a paged cache")

    def call_layer_method(
        self, layer: Instance, method: str, args: Sequence[Value], more: dict[str, Value]
    ) -> Value:
        if method == "as_linear":
            rule = Rule(method, lambda c, x: as_linear(c, layer, x), "a product")
            return self.with_term((method, id(layer)), self.apply(rule, args, more), args, more)
        if method == "__call__":
            return self.call_layer(layer, args, more)
        if method == "get":
            key = args[0].value if args and isinstance(args[0], Known) else None
            return layer.attributes.get(str(key), choice((NONE, PARAMETER)))
        if any(map(is_live, (*args, *more.values()))):
            raise Refused("unknown-operation", f"nn.{layer.layer}.{method} has no rule")
        return CONSTANT

    # ----------------------------------------------------------------- containers

    def items(self, values: list[Value] | None, element: Value | None = None) -> Items:
        return Items(values, element, self.depth, self.forward)

    def mutate(self, container: Items | Table | Instance) -> bool:
        """Whether a change happens for sure and once; refuses to change what outlives the call."""
        if self.forward and not container.forward:
            raise Refused(
                "state-on-self", "something that outlives the call is changed by the forward pass"
            )
        return container.depth == self.depth

    def call_items(self, bound: Items | Tuple, method: str, args: Sequence[Value]) -> Value:
        if isinstance(bound, Tuple) or method in ("index", "count", "copy"):
            if method == "copy" and isinstance(bound, Items):
                copied = list(bound.items) if bound.items is not None else None
                return self.items(copied, bound.element)
            return CONSTANT
        sure = self.mutate(bound)
        if self.added is not None and method != "append":
            raise Refused("row-mixing", "a loop over tokens that does more than add to lists")
        if method in ("append", "insert", "extend"):
            added = [args[-1]] if method != "extend" else None
            if method == "extend":
                added = self.known_items(args[0])
            if self.added is not None:
                if bound.items != [] and not any(t is bound for t, _, _ in self.added):
                    raise Refused("row-mixing", "a loop over tokens that adds to what others made")
                self.added += [(bound, v, self.depth) for v in added or (UNDEFINED,)]
                return NONE
            if sure and bound.items is not None and method != "insert" and added is not None:
                bound.items.extend(added)
                return NONE
            for value in added if added is not None else [self.element(args[0])]:
                self.summarise(bound, value)
            return NONE
        if method == "pop":
            if sure and bound.items and (not args or args[0] in (Known(-1), Known(0))):
                return bound.items.pop(args[0].value if args and isinstance(args[0], Known) else -1)
            self.summarise(bound, UNDEFINED)
            return bound.element or CONSTANT
        if method in ("reverse", "sort", "clear", "remove"):
            self.summarise(bound, UNDEFINED)
            return NONE
        raise Refused("unknown-operation", f"list method `{method}`")

    @staticmethod
    def summarise(bound: Items, value: Value) -> None:
        joined: Value = choice((*(bound.items or ()), *options(bound.element or UNDEFINED), value))
        bound.items, bound.element = None, joined
        for source in bound.sources:
            if source is not bound:
                Interpreter.summarise(source, value)

    def call_table(self, bound: Table, method: str, args: Sequence[Value]) -> Value:
        if method in ("get", "pop", "setdefault") and args:
            found = self.entry(bound, args[0])
            if method == "setdefault" and self.forward and not bound.forward:
                if any(map(is_live, args)):
                    raise Refused("state-on-self", "tokens are kept in something shared")
                self.assume("a constant is computed once and kept in a dictionary")
                return choice((args[1], *(options(found) if found is not None else ())))
            if method != "get":
                self.mutate(bound)
                if method == "setdefault":
                    self.store_entry(bound, args[0], args[1] if len(args) > 1 else NONE)
            default = args[1] if len(args) > 1 else NONE
            return (
                found
                if found is not None and _certain(bound, args[0])
                else choice((default, *(options(found) if found is not None else ())))
            )
        pairs = [Tuple((Known(k), v)) for k, v in bound.entries.items()]
        if bound.other is not None:
            pairs.append(Tuple((CONSTANT, bound.other)))
        if method in ("items", "keys", "values"):
            at = {"keys": 0, "values": 1}.get(method)
            chosen: list[Value] = [p if at is None else p.items[at] for p in pairs]
            if bound.other is None:
                return Tuple(tuple(chosen))
            return Iterable_(choice(chosen))
        if method == "update":
            self.mutate(bound)
            for arg in args:
                if isinstance(arg, Table):
                    for key, value in arg.entries.items():
                        self.store_entry(bound, Known(key), value)
                elif is_live(arg):
                    raise Refused("unknown-operation", "a dictionary is updated with tokens")
            return NONE
        if method == "copy":
            return Table(dict(bound.entries), bound.other, self.depth, self.forward)
        raise Refused("unknown-operation", f"dictionary method `{method}`")

    @staticmethod
    def entry(bound: Table, key: Value) -> Value | None:
        if isinstance(key, Known) and key.value in bound.entries:
            return bound.entries[key.value]
        if isinstance(key, Known):
            return bound.other
        every = [*bound.entries.values(), *([bound.other] if bound.other is not None else [])]
        return choice(every) if every else None

    def store_entry(self, bound: Table, key: Value, value: Value) -> None:
        sure = self.mutate(bound)
        if is_live(key):
            raise Refused("token-branch", "a dictionary is keyed by what tokens hold")
        if isinstance(key, Known):
            old = bound.entries.get(key.value)
            bound.entries[key.value] = value if sure or old is None else join(old, value)
        else:
            bound.other = value if bound.other is None else join(bound.other, value)

    def known_items(self, value: Value) -> list[Value] | None:
        """The items of something to loop over, if their number is known."""
        match value:
            case Tuple(items=items):
                return list(items)
            case Items(items=list() as items):
                return list(items)
            case Table(entries=entries, other=None):
                return [Known(key) for key in entries]
        return None

    def element(self, value: Value) -> Value:
        """What a loop over a value meets."""
        match value:
            case Choice(options=several):
                return self.join_calls(self.element, several)
            case Tuple() | Items() | Iterable_():
                found = list(parts(value))
                return choice(found) if found else UNDEFINED
            case Table(entries=entries):
                return choice([Known(k) for k in entries] or [CONSTANT])
            case Array():
                if not value.live:
                    return PARAMETER
                return index(self, value, Known(0))
            case Opaque(kind="cache"):
                return value
            case Constant():
                return Constant(("element", value.key)) if value.key is not None else CONSTANT
            case Library():
                return CONSTANT
            case Known(value=str()):
                return CONSTANT
            case Numbers(one=True):
                return value
            case ByToken() | Numbers():
                raise Refused("token-branch", "what tokens hold is read by Python")
            case OpenShape() | Count() | CountTest():
                raise Refused("token-count", "a loop over numbers of tokens")
            case Opaque():
                raise Refused("cache-use", f"a loop over a {value.kind}")
            case Known(value=None):
                raise Dead
            case Instance():
                return CONSTANT if not is_live(value) else self._no_loop()
        return CONSTANT

    @staticmethod
    def _no_loop() -> Value:
        raise Refused("unknown-operation", "a loop over an object")

    # ----------------------------------------------------------------- builtins

    def call_builtin(self, name: str, args: Sequence[Value], more: dict[str, Value]) -> Value:
        handler = getattr(self, f"_{name}", None)
        if name not in _HOLDING and any(Opaque("mask") in options(a) for a in args):
            self.mask_branch()
        if handler is not None and name in _BUILTINS:
            return self.each(lambda a, k: handler(*a, **k), args, more)
        if any(map(is_live, (*args, *more.values()))):
            if name in ("int", "float", "bool", "str", "abs", "max", "min", "round", "sum"):
                return self._number(name, args)
            raise Refused("unknown-operation", f"{name}() of tokens has no rule")
        if name in ("max", "min", "int", "float", "abs") and args:
            if all(isinstance(a, Known) for a in args) and not more:
                return self.computed(getattr(__import__("builtins"), name), args)
        return CONSTANT

    def _number(self, name: str, args: Sequence[Value]) -> Value:
        flat = [p for a in args for p in ([a] if not isinstance(a, Tuple) else a.items)]
        for value in flat:
            if isinstance(value, Array) and value.live:
                raise Refused("token-branch", f"{name}() reads what tokens hold")
        found = tuple(dict.fromkeys(f for v in flat if isinstance(v, Count) for f in v.factors))
        if not found:
            raise Refused("unknown-operation", f"{name}() of tokens has no rule")
        return Count(found, exact=False)

    def _len(self, value: Value) -> Value:
        known = self.known_items(value)
        if known is not None:
            return Known(len(known))
        if isinstance(value, Array) and value.live:
            return self.shape_entry(value, 0)
        return CONSTANT

    def _range(self, *bounds: Value) -> Value:
        if any(map(is_live, bounds)):
            kinds = {f.kind for b in bounds if isinstance(b, Count) for f in b.factors}
            slug = "length-dependent" if kinds == {"length"} else "token-count"
            raise Refused(slug, "a loop over single tokens", "a mixer that runs once per sequence")
        if all(isinstance(b, Known) for b in bounds):
            numbers = range(*(b.value for b in bounds if isinstance(b, Known)))
            if len(numbers) <= _UNROLLED:
                return Tuple(tuple(map(Known, numbers)))
        return Iterable_(CONSTANT)

    def _zip(self, *values: Value, **rest: Value) -> Value:
        if any(isinstance(v, Numbers) or (isinstance(v, Array) and v.live) for v in values):
            return ByToken(values, True)
        known = [self.known_items(v) for v in values]
        if known and all(k is not None for k in known):
            pairs = zip(*(k for k in known if k is not None), strict=False)
            return Tuple(tuple(Tuple(tuple(pair)) for pair in pairs))
        return Iterable_(Tuple(tuple(self.element(v) for v in values)))

    def _enumerate(self, value: Value, start: Value = ZERO) -> Value:
        known = self.known_items(value)
        if known is not None and isinstance(start, Known):
            return Tuple(tuple(Tuple((Known(i), v)) for i, v in enumerate(known, start.value)))
        return Iterable_(Tuple((CONSTANT, self.element(value))))

    def _list(self, value: Value = _EMPTY) -> Value:
        known = self.known_items(value)
        return self.items(known, None if known is not None else self.element(value))

    def _tuple(self, value: Value = _EMPTY) -> Value:
        known = self.known_items(value)
        if known is not None:
            return Tuple(tuple(known))
        return value if isinstance(value, OpenShape) else self.items(None, self.element(value))

    def _reversed(self, value: Value) -> Value:
        known = self.known_items(value)
        return Tuple(tuple(known[::-1])) if known is not None else Iterable_(self.element(value))

    def _iter(self, value: Value) -> Value:
        return Iterable_(self.element(value))

    def _next(self, value: Value, default: Value = UNDEFINED) -> Value:
        return choice((self.element(value), default))

    def _isinstance(self, value: Value, cls: Value) -> Value:
        names = {c.name.rpartition(".")[2] for c in parts(cls) if isinstance(c, Library)}
        if isinstance(cls, Library):
            names.add(cls.name.rpartition(".")[2])
        if isinstance(value, (Array, Count)) and names:
            is_array = isinstance(value, Array)
            return Known("array" in names if is_array else "int" in names)
        return CONSTANT

    def _hasattr(self, value: Value, name: Value) -> Value:
        if isinstance(value, Opaque):
            known = ("offset", "update_and_fetch", "make_mask", "keys_and_values")
            return Known(isinstance(name, Known) and name.value in known)
        return CONSTANT

    def _getattr(self, value: Value, name: Value, default: Value = UNDEFINED) -> Value:
        if not isinstance(name, Known):
            if is_live(value):
                raise Refused("unknown-operation", "an attribute whose name is computed")
            return CONSTANT
        if isinstance(value, Instance) and self.forward and not value.forward:
            self.reads.add((id(value), name.value))
        if isinstance(value, Instance) and value.cls is not None and default != UNDEFINED:
            held = name.value in value.attributes or self.member(value.cls, name.value) is not None
            if not held:
                return default
        found = self.attribute(value, name.value)
        return choice((found, default)) if isinstance(value, Constant) else found

    def _setattr(self, value: Value, name: Value, given: Value) -> Value:
        if not isinstance(name, Known):
            raise Refused("state-on-self", "an attribute whose name is computed is set")
        self.store_attribute(value, name.value, given, None)
        return NONE

    def _dict(self, *args: Value, **more: Value) -> Value:
        if args and any(map(is_live, args)):
            raise Refused("unknown-operation", "dict() of tokens has no rule")
        return Table(dict(more), CONSTANT if args else None, self.depth, self.forward)

    def _super(self, *args: Value) -> Value:
        frame = self.frame
        if frame.owner is None or frame.this is None:
            return CONSTANT
        return Super(frame.this, frame.owner)

    def _sum(self, value: Value, start: Value = ZERO) -> Value:
        if not is_live(value):
            return CONSTANT
        known = self.known_items(value)
        every = known if known is not None else [self.element(value)] * 2
        result = start
        for item in every:
            result = self.binary("+", result, item)
        return result

    def _callable(self, value: Value) -> Value:
        return Known(isinstance(value, (Routine, Instance, Partial, ClassValue)))

    def _print(self, *values: Value, **more: Value) -> Value:
        return NONE

    def _type(self, value: Value) -> Value:
        if isinstance(value, Instance) and value.cls is not None:
            return value.cls
        return CONSTANT

    def _map(self, function: Value, *values: Value) -> Value:
        return Iterable_(self.call(function, [self.element(v) for v in values], {}))

    # ----------------------------------------------------------------- attributes

    def attribute(self, base: Value, name: str) -> Value:
        match base:
            case Choice(options=several):
                return self.join_calls(lambda one: self.attribute(one, name), several)
            case Array():
                return self.array_attribute(base, name)
            case Instance():
                return self.instance_attribute(base, name)
            case Super(this=this, owner=owner):
                return self.super_attribute(this, owner, name)
            case ClassValue():
                return self.class_attribute(base, name)
            case Library(bound=None):
                return self.dotted(f"{base.name}.{name}")
            case Library(name="at."):
                return Library(f"at.{name}", base.bound)
            case Opaque(kind="cache"):
                if name == "offset":
                    return Array(((ROWS,),), tag=("start",))
                if name in ("keys", "values"):
                    return Opaque("pages")  # what mx.depends ties to the end of a pipeline
                if name == "start_position":
                    return Opaque("first position kept")
                return Library(f"opaque.{name}", base)
            case Opaque(kind="handle") if name == "dtype":
                return CONSTANT
            case Opaque(kind="handle") if name == "shape":
                end = Array(((ROWS,),), tag=("end",))
                return Tuple((Count((ROWS,)), CONSTANT, end, CONSTANT))
            case Opaque(kind=kind):
                raise Refused("cache-use", f"`.{name}` of a {kind}")
            case Items() | Tuple() | Iterable_() | OpenShape():
                return Library(f"items.{name}", base)
            case Table():
                return Library(f"table.{name}", base)
            case Known(value=None) | Undefined():
                raise Dead
            case Constant(key=key):
                return Constant((key, name)) if key is not None else CONSTANT
            case Partial() | Routine():
                if name in ("__name__", "__call__"):
                    return base if name == "__call__" else CONSTANT
                return CONSTANT
            case Count() | CountTest():
                raise Refused("token-count", "a number of tokens is used as data")
        return CONSTANT

    def array_attribute(self, base: Array, name: str) -> Value:
        if name == "shape":
            if base.axes is None:
                return Iterable_(CONSTANT)
            entries = tuple(self.shape_entry(base, i) for i in range(len(base.axes)))
            return OpenShape(entries) if base.open else Tuple(entries)
        if name == "size":
            if not base.live:
                return CONSTANT
            factors = tuple(f for axis in base.axes or () for f in axis)
            return Count(tuple(f for f in factors if f.is_token), ("size",), True)
        if name == "ndim":
            return Known(len(base.axes)) if base.axes is not None and not base.open else CONSTANT
        if name in ("dtype", "itemsize", "nbytes"):
            return Constant((name, base.term)) if base.term is not None else CONSTANT
        if name == "T":
            return self.apply(RULES["transpose"], (base,), {})
        if name == "at":
            return Library("at", base)
        return Library(f"array.{name}", base)

    def shape_entry(self, x: Array, place: int) -> Value:
        assert x.axes is not None
        axis = x.axes[place]
        held = tuple(f for f in axis if f.is_token)
        rest = [f for f in axis if not f.is_token]
        if not held:
            if not axis:
                return Known(1)
            key = rest[0].size if len(rest) == 1 else None
            return Known(key) if isinstance(key, int) else Constant(key)
        if not rest:
            return Count(held)
        return Count(held, ("sizes", tuple(f.size for f in rest)), exact=len(rest) == 1)

    def instance_attribute(self, base: Instance, name: str) -> Value:
        if self.forward and not base.forward:
            self.reads.add((id(base), name))
        found = base.attributes.get(name)
        if found is not None:
            return self.held(base, name, found)
        if base.cls is not None:
            member = self.member(base.cls, name)
            if member is not None:
                return self.bound_member(base, *member)
        if base.layer and name in ("weight", "bias", "scales", "biases"):
            rank = 1 if name == "bias" or base.layer.endswith("Norm") else 2
            return self.held(base, name, Array((feature(),) * rank))
        if name == "training":
            return Known(False)
        return Library(f"layer.{name}", base)

    def held(self, base: Instance, name: str, value: Value) -> Value:
        """A value of an object, known by whose it is while both ways of a branch are compared."""
        if self.unmemoised and isinstance(value, Array) and value.term is None:
            return _termed(value, ("held", id(base), name))
        if isinstance(value, Constant) and value.key is None:
            return Constant(("held", id(base), name))
        return value

    def bound_member(self, base: Value, owner: ClassValue, syntax: Function | Expr) -> Value:
        if isinstance(syntax, Expr):
            with self.setup(owner.module):
                return self.value(syntax)
        if any(d.op == "name" and d.data == "property" for d in syntax.decorators) or any(
            d.op in ("name", "attr") and d.data == "cached_property" for d in syntax.decorators
        ):
            return self.call_routine(Routine(owner.module, syntax, None, base, owner), (), {})
        if any(d.op == "name" and d.data == "classmethod" for d in syntax.decorators):
            cls = base.cls if isinstance(base, Instance) else base
            return Routine(owner.module, syntax, None, cls, owner)
        return self.decorated(syntax, owner.module, base, owner)

    def super_attribute(self, this: Value, owner: ClassValue, name: str) -> Value:
        if isinstance(this, Instance) and this.cls is not None:
            member = self.member(this.cls, name, after=owner)
            if member is not None:
                return self.bound_member(this, *member)
            if name == "__init__":
                return Library("builtins.object")
            return Library(f"layer.{name}", this)
        return CONSTANT

    def class_attribute(self, base: ClassValue, name: str) -> Value:
        member = self.member(base, name)
        if member is None:
            return CONSTANT
        owner, syntax = member
        if isinstance(syntax, Expr):
            with self.setup(owner.module):
                return self.value(syntax)
        if any(d.op == "name" and d.data == "classmethod" for d in syntax.decorators):
            return Routine(owner.module, syntax, None, base, owner)
        return Routine(owner.module, syntax, None, None, owner)

    def store_attribute(self, base: Value, name: str, value: Value, expr: Expr | None) -> None:
        if isinstance(base, Choice):
            for option in base.options:
                if isinstance(option, Instance) and (self.forward and not option.forward):
                    self.store_attribute(option, name, value, expr)
                elif isinstance(option, Instance):
                    held = option.attributes.get(name, UNDEFINED)
                    option.attributes[name] = join(held, value)
                elif option != NONE:
                    self.store_attribute(option, name, value, expr)
            return
        if isinstance(base, Instance):
            if self.forward and not base.forward:
                self.store_on_model(base, name, value, expr)
                return
            old = base.attributes.get(name)
            sure = base.depth == self.depth or old is None
            base.attributes[name] = value if sure or old is None else join(old, value)
        elif isinstance(base, Opaque):
            if value != Opaque("pages"):
                raise Refused("cache-use", f"`.{name}` of a cache is set")
        elif self.forward:
            raise Refused("state-on-self", f"`.{name}` of something shared is set")

    def store_on_model(self, base: Instance, name: str, value: Value, expr: Expr | None) -> None:
        """What the forward keeps on the model must be the same whenever it is kept."""
        old = base.attributes.get(name, NONE)
        if is_live(value):
            raise Refused(
                "state-on-self", f"`.{name}` keeps what tokens hold for the next call", "a cache"
            )
        again = (id(base), name) in self.reads
        number = any(isinstance(v, (Known, Constant)) for v in options(value))
        first = not number and any(_mentions(test, name) for test in self.tests)
        if again and not first and not (expr is not None and _settles(expr, name)):
            raise Refused("state-on-self", f"`.{name}` changes from call to call", "a cache")
        self.assume(f"`.{name}` is computed from the weights alone and kept on the model")
        base.attributes[name] = join(old, value) if old != NONE else value
        self.memo.clear()

    # ----------------------------------------------------------------- expressions

    def value(self, expr: Expr) -> Value:
        handler: Callable[[Expr], Value] | None = getattr(self, f"e_{expr.op}", None)
        if handler is None:
            found = [self.value(part) for part in expr.args]
            if any(map(is_live, found)):
                raise Refused("unknown-operation", f"a {expr.data or expr.op} expression")
            return CONSTANT
        return handler(expr)

    def at(self, expr: Expr) -> None:
        self.frame.where = expr.span

    def e_name(self, expr: Expr) -> Value:
        return self.lookup(expr.data)

    def e_const(self, expr: Expr) -> Value:
        return Known(expr.data)

    def e_string(self, expr: Expr) -> Value:
        if any(is_live(self.value(part)) for part in expr.args):
            raise Refused("token-branch", "text made of what tokens hold")
        return CONSTANT

    def e_attr(self, expr: Expr) -> Value:
        base = self.value(expr.args[0])
        self.at(expr)
        return self.attribute(base, expr.data)

    def e_tuple(self, expr: Expr) -> Value:
        items = self.sequence(expr.args)
        return Tuple(tuple(items)) if items is not None else CONSTANT

    def e_list(self, expr: Expr) -> Value:
        items = self.sequence(expr.args)
        return self.items(items, None if items is not None else CONSTANT)

    def e_set(self, expr: Expr) -> Value:
        items = self.sequence(expr.args)
        if items is not None and any(map(is_live, items)):
            raise Refused("unknown-operation", "a set of tokens")
        return self.items(items, None if items is not None else CONSTANT)

    def sequence(self, exprs: Sequence[Expr]) -> list[Value] | None:
        """Items of a display; None if a starred part has unknown length."""
        found: list[Value] = []
        unknown = False
        for part in exprs:
            if part.op == "star":
                value = self.value(part.args[0])
                known = self.known_items(value)
                if known is None:
                    if is_live(value) or isinstance(value, OpenShape):
                        raise Refused("unknown-operation", "a starred part of unknown length")
                    unknown = True
                    continue
                found += known
            else:
                found.append(self.value(part))
        if unknown and any(map(is_live, found)):
            raise Refused("unknown-operation", "a starred part of unknown length")
        return None if unknown else found

    def e_dict(self, expr: Expr) -> Value:
        made = Table({}, None, self.depth, self.forward)
        for key, value in zip(expr.args[::2], expr.args[1::2], strict=True):
            name, held = self.value(key), self.value(value)
            if name == NONE and key.span == value.span:
                if isinstance(held, Table):
                    made.entries |= held.entries
                    made.other = made.other or held.other
                else:
                    made.other = CONSTANT
            else:
                self.store_entry(made, name, held)
        return made

    def e_slice(self, expr: Expr) -> Value:
        lower, upper, step = (self.value(part) for part in expr.args)
        return Slice(lower, upper, step)

    def e_lambda(self, expr: Expr) -> Value:
        return Routine(self.frame.scope.module, expr, self.frame.scope, None, None)

    def e_walrus(self, expr: Expr) -> Value:
        value = self.value(expr.args[1])
        self.assign(expr.args[0], value, None)
        return value

    def e_if(self, expr: Expr) -> Value:
        test = self.value(expr.args[0])
        self.at(expr.args[0])
        known = self.truth(test)
        results: list[Value] = []
        before = self.frame.scope.names
        for held, part in ((True, expr.args[1]), (False, expr.args[2])):
            if known is not None and known != held:
                continue
            self.frame.scope.names = self.narrowed(expr.args[0], held, before)
            try:
                results.append(self.value(part))
            except Dead:
                continue
            finally:
                self.frame.scope.names = before
        if not results:
            raise Dead
        return choice(results) if len(results) < 2 else join(*results)

    def e_bool(self, expr: Expr) -> Value:
        left = self.value(expr.args[0])
        self.at(expr.args[0])
        if isinstance(left, CountTest) and left.key not in self.assumed:
            known = None if left.single is None else self.truth(left)
        else:
            known = self.truth(left)
        stops = expr.data == "or"
        if known is not None and known == stops:
            return left
        before = self.frame.scope.names
        self.frame.scope.names = self.narrowed(expr.args[0], not stops, before)
        try:
            right = self.value(expr.args[1])
        except Dead:
            right = UNDEFINED
        finally:
            self.frame.scope.names = before
        if known is not None:
            return right
        if isinstance(left, CountTest):
            return left if not is_live(right) or right == left else CountTest(left.factors, None)
        if expr.data == "or":
            return choice(
                (*(o for o in options(left) if o != NONE and o != Known(False)), *options(right))
            )
        return join(left, right) if not isinstance(left, Constant) else choice((left, right))

    def e_unary(self, expr: Expr) -> Value:
        value = self.value(expr.args[0])
        self.at(expr)
        if expr.data == "not":
            known = self.truth(value) if not isinstance(value, CountTest) else None
            if isinstance(value, CountTest):
                known = self.truth(value)
            return CONSTANT if known is None else Known(not known)
        match value:
            case Known():
                return self.computed(_UNARY[expr.data], (value,))
            case Array():
                return self.apply(RULES["negative"], (value,), {})
            case Count():
                return Count(value.factors, exact=False)
            case Choice():
                return self.apply(RULES["negative"], (value,), {}) if is_live(value) else CONSTANT
        if is_live(value):
            raise Refused("cache-use", "a cache or a mask is computed with")
        if isinstance(value, Constant) and value.key is not None and _depth((value.key,)) < 6:
            return Constant((expr.data, value.key))
        return CONSTANT

    def e_binary(self, expr: Expr) -> Value:
        left, right = self.value(expr.args[0]), self.value(expr.args[1])
        self.at(expr)
        return self.binary(expr.data, left, right)

    def binary(self, op: str, left: Value, right: Value) -> Value:
        return self.each(lambda pair, _: self._binary(op, *pair), (left, right), {})

    def _binary(self, op: str, left: Value, right: Value) -> Value:
        pair = (left, right)
        if any(v == NONE or isinstance(v, Undefined) for v in pair):
            raise Dead
        if left == Opaque("cache") and op == "+" and isinstance(right, (Items, Tuple)):
            held = options(self.element(right))
            return self.items(None, choice((left, *held)))
        if any(isinstance(v, Opaque) for v in pair):
            raise Refused("cache-use", "a cache or a mask is computed with")
        if any(isinstance(v, Array) for v in pair):
            if any(isinstance(v, Library) for v in pair):
                return PARAMETER if not any(map(is_live, pair)) else self._unknown_operand()
            if op == "@":
                return self.apply(RULES["matmul"], pair, {})
            if _row(pair) is not None:
                return self.apply(RULES["multiply"], pair, {})
            try:
                return self.with_term(op, arithmetic(self, op, left, right), pair, {})
            except TypeError:
                return self._unknown_operand() if any(map(is_live, pair)) else PARAMETER
        if any(isinstance(v, (Count, CountTest)) for v in pair):
            return self._count(op, left, right)
        if isinstance(left, Tuple) and isinstance(right, Tuple) and op == "+":
            return Tuple((*left.items, *right.items))
        if any(isinstance(v, (Items, Tuple)) for v in pair):
            return self._listed(op, left, right)
        if isinstance(left, Known) and isinstance(right, Known):
            return self.computed(_BINARY.get(op), pair)
        if any(map(is_live, pair)):
            return self._unknown_operand()
        if isinstance(left, (Known, Constant)) and isinstance(right, (Known, Constant)):
            keys = [v.value if isinstance(v, Known) else v.key for v in (left, right)]
            if None not in keys and _depth(keys) < 4:
                try:
                    hash(tuple(keys))
                except TypeError:
                    return CONSTANT
                return Constant((op, *keys))
        return CONSTANT

    @staticmethod
    def _unknown_operand() -> Value:
        raise Refused("unknown-operation", "an operand that is not known")

    @staticmethod
    def _count(op: str, left: Value, right: Value) -> Value:
        factors: tuple[Any, ...] = ()
        rest: list[Any] = []
        exact = op == "*"
        for value in (left, right):
            if isinstance(value, Count):
                factors += value.factors
                exact = exact and value.exact
                rest += [value.rest] if value.rest != 1 else []
            elif isinstance(value, CountTest):
                factors, exact = factors + value.factors, False
            elif isinstance(value, Known):
                rest += [value.value] if value.value != 1 else []
            elif isinstance(value, Constant):
                rest.append(value.key)
            else:
                raise Refused("unknown-operation", "an operand that is not known")
        if not exact:
            return Count(tuple(dict.fromkeys(factors)), exact=False)
        return Count(factors, 1 if not rest else rest[0] if len(rest) == 1 else ("*", *rest))

    def _listed(self, op: str, left: Value, right: Value) -> Value:
        if op == "+":
            one, two = self.known_items(left), self.known_items(right)
            if one is not None and two is not None:
                return self.items([*one, *two])
            return self.items(None, choice((self.element(left), self.element(right))))
        if op == "*":
            value, number = (left, right) if isinstance(left, (Items, Tuple)) else (right, left)
            if is_live(number):
                raise Refused("token-count", "a list is as long as there are tokens")
            known = self.known_items(value)
            if known is not None and isinstance(number, Known) and isinstance(number.value, int):
                if len(known) * number.value <= 64:
                    made = known * number.value
                    return Tuple(tuple(made)) if isinstance(value, Tuple) else self.items(made)
            return self.items(None, self.element(value))
        if is_live(left) or is_live(right):
            self._unknown_operand()
        return CONSTANT

    @staticmethod
    def computed(function: Callable[..., Any] | None, args: Sequence[Value]) -> Value:
        """The result of a function of known Python values, where it is small."""
        values = [a.value for a in args if isinstance(a, Known)]
        plain = all(isinstance(v, (int, float, str, bool)) for v in values)
        if function is None or not plain:
            return CONSTANT
        if function is operator.pow and any(abs(v) > 64 for v in values if not isinstance(v, str)):
            return CONSTANT
        try:
            result = function(*values)
        except ArithmeticError:
            raise Dead from None
        except (TypeError, ValueError):
            return CONSTANT
        if isinstance(result, str) and len(result) > 256:
            return CONSTANT
        return Known(result) if isinstance(result, (int, float, str, bool)) else CONSTANT

    def e_compare(self, expr: Expr) -> Value:
        values = [self.value(part) for part in expr.args]
        self.at(expr)
        results = [
            self.compare(op, values[i], values[i + 1], (self.here(), i))
            for i, op in enumerate(expr.data)
        ]
        if len(results) == 1:
            return results[0]
        if any(isinstance(r, CountTest) for r in results):
            return next(r for r in results if isinstance(r, CountTest))
        known = [r.value for r in results if isinstance(r, Known)]
        return Known(all(known)) if len(known) == len(results) else CONSTANT

    def compare(self, op: str, left: Value, right: Value, key: Any) -> Value:
        if op in ("is", "is not"):
            return self.same(left, right, op == "is")
        if op in ("in", "not in"):
            return self.contains(left, right, op == "in")
        pair = (left, right)
        if any(isinstance(v, Choice) for v in pair):
            return self.each(lambda p, _: self.compare(op, p[0], p[1], key), pair, {})
        if any(isinstance(v, (Count, CountTest)) for v in pair) and not any(
            isinstance(v, Array) for v in pair
        ):
            return self.compare_counts(op, left, right, key)
        if any(isinstance(v, Array) for v in pair):
            if NONE in pair:
                return Known(op == "!=")
            return self.apply(RULES["equal"], pair, {})
        if isinstance(left, Known) and isinstance(right, Known):
            try:
                return Known(bool(_COMPARE[op](left.value, right.value)))
            except TypeError:
                raise Dead from None
        if isinstance(left, Tuple) and isinstance(right, Tuple) and any(map(is_live, pair)):
            if left == right:
                return Known(op == "==")
            return CountTest(tuple(f for v in parts(left) for f in getattr(v, "factors", ())), key)
        if any(map(is_live, pair)):
            raise Refused("unknown-operation", "a comparison of what is not known")
        return CONSTANT

    @staticmethod
    def compare_counts(op: str, left: Value, right: Value, key: Any) -> Value:
        if left == right and isinstance(left, Count) and left.exact:
            return Known(op in ("==", "<=", ">="))
        factors = tuple(
            f for v in (left, right) if isinstance(v, (Count, CountTest)) for f in v.factors
        )
        single = None
        for one, two, swap in ((left, right, False), (right, left, True)):
            if isinstance(one, Count) and one == Count((LENGTH,)) and isinstance(two, Known):
                numbers = (two.value, 1) if swap else (1, two.value)
                single = bool(_COMPARE[op](*numbers))
        return CountTest(factors, key, single)

    def same(self, left: Value, right: Value, wanted: bool) -> Value:
        outcomes: set[bool | None] = set()
        for one in options(left):
            for two in options(right):
                if isinstance(one, (Constant, Undefined)) or isinstance(two, (Constant, Undefined)):
                    outcomes.add(None)
                elif NONE in (one, two) or (isinstance(one, Known) and isinstance(two, Known)):
                    if Opaque("mask") in (one, two):
                        self.mask_branch()
                    outcomes.add(one == two)
                else:
                    outcomes.add(None)
        if len(outcomes) == 1 and None not in outcomes:
            return Known(outcomes.pop() == wanted)
        return CONSTANT

    def contains(self, left: Value, right: Value, wanted: bool) -> Value:
        if is_live(left) and not isinstance(left, Opaque):
            raise Refused("token-branch", "a test whether a token is in something")
        known = self.known_items(right)
        if isinstance(left, Known) and known is not None:
            if all(isinstance(v, Known) for v in known):
                return Known((left in known) == wanted)
        if isinstance(right, Instance) and isinstance(left, Known):
            if left.value not in right.attributes:
                return Known(not wanted)
        if isinstance(right, Known) and isinstance(right.value, str) and isinstance(left, Known):
            return Known((str(left.value) in right.value) == wanted)
        return CONSTANT

    def truth(self, value: Value) -> bool | None:
        """Whether a condition holds; None if that is not known."""
        match value:
            case Known():
                return bool(value.value)
            case Choice(options=several):
                found = {self.truth(one) for one in several}
                return found.pop() if len(found) == 1 else None
            case Array():
                if value.live:
                    raise Refused("token-branch", "a branch on what tokens hold", "mx.where")
                return None
            case Count():
                if not value.exact:
                    raise Refused("token-count", "a branch on the number of tokens")
                return True
            case CountTest():
                return self.truth_of_count(value)
            case Opaque() | Instance() | Routine() | ClassValue() | Library() | Partial():
                if value == Opaque("mask"):
                    self.mask_branch()
                return True if not isinstance(value, Library) or value.bound is None else None
            case Tuple(items=items):
                return bool(items)
            case Items(items=list() as held):
                return bool(held)
            case Table(entries=entries, other=None):
                return bool(entries)
        return None

    def mask_branch(self) -> None:
        """Upstream makes no mask for a single token, so whether there is one tells how many there
        are; only a recognised mixer may ask."""
        owner = self.claimant()
        if owner is None or owner.qualified not in self.claims:
            raise Refused("token-branch", "whether a mask is made depends on the number of tokens")

    def claimant(self) -> ClassValue | None:
        """The innermost class around that was recognised as a mixer, else the outermost one."""
        owner = self.frame.owner
        for frame in reversed(self.frames):
            owner = frame.owner
            if owner is not None and owner.qualified in self.claims:
                break
        return owner

    def truth_of_count(self, test: CountTest) -> bool:
        if test.key is None:
            self.refuse_test(test)
        if test.key in self.assumed:
            return self.assumed[test.key]
        owner = self.claimant()
        if test.single is not None and owner is not None and owner.qualified in self.claims:
            kind = self.claims[owner.qualified]
            self.assume(f"both arms mean the same: `{owner.name}` was recognised as {kind}")
            return test.single
        raise Fork(test)

    def e_subscript(self, expr: Expr) -> Value:
        base = self.value(expr.args[0])
        key = self.value(expr.args[1])
        self.at(expr)
        return self.subscript(base, key)

    def subscript(self, base: Value, key: Value) -> Value:
        if isinstance(base, Choice):
            return self.join_calls(lambda one: self.subscript(one, key), base.options)
        if isinstance(key, Choice) and not isinstance(base, Opaque):
            return self.join_calls(lambda one: self.subscript(base, one), key.options)
        match base:
            case Array():
                if is_live(key):
                    return self.keyed(base, key)
                rule = Rule("index", lambda c, x: index(c, array(x), key), "")
                return self.with_term("index", self.apply(rule, (base,), {}), (base, key), {})
            case Tuple() | Items():
                return self.item(base, key)
            case OpenShape():
                return self.open_item(base, key)
            case Table():
                found = self.entry(base, key)
                if found is None:
                    raise Dead
                return found
            case Opaque(kind="cache"):
                if isinstance(key, Slice):
                    return base
                return base
            case Opaque(kind=kind):
                raise Refused("cache-use", f"entries of a {kind} are read")
            case Instance():
                if isinstance(key, Known) and isinstance(key.value, str):
                    found = base.attributes.get(key.value, PARAMETER)
                    return self.held(base, key.value, found)
                return CONSTANT
            case Library(name="at", bound=bound) if bound is not None:
                return Library("at.", Tuple((bound, key)))
            case Known(value=None) | Undefined():
                raise Dead
            case Iterable_():
                return base if isinstance(key, Slice) else base.element
            case Constant():
                if isinstance(key, Known) and base.key is not None and not is_live(key):
                    try:
                        hash(key)
                        return Constant((base.key, "[]", key.value))
                    except TypeError:
                        return CONSTANT
                if is_live(key):
                    raise Refused("token-branch", "the config is read by what tokens hold")
                return CONSTANT
        if is_live(key):
            raise Refused("unknown-operation", "an index into what is not known")
        return CONSTANT

    def keyed(self, base: Array, key: Value) -> Value:
        self.operations.add("index")
        return self.with_term("index", index(self, base, key), (base, key), {})

    def item(self, base: Tuple | Items, key: Value) -> Value:
        known = self.known_items(base)
        if isinstance(key, Numbers) and key.one and not is_live(base):
            return self.element(base)  # each token chooses for itself, in a loop over tokens
        if is_live(key):
            if isinstance(key, Slice) or known is None:
                raise Refused("token-count", "a list is cut at a number of tokens")
            raise Refused("token-branch", "an item is chosen by what tokens hold")
        if isinstance(key, Slice):
            bounds = (key.lower, key.upper, key.step)
            if known is not None and all(isinstance(b, Known) for b in bounds):
                cut = slice(*(b.value for b in bounds if isinstance(b, Known)))
                made = known[cut]
                return Tuple(tuple(made)) if isinstance(base, Tuple) else self.items(made)
            return self.items(None, self.element(base))
        if known is not None and isinstance(key, Known) and isinstance(key.value, int):
            if -len(known) <= key.value < len(known):
                return known[key.value]
            raise Dead
        return self.element(base)

    @staticmethod
    def open_item(base: OpenShape, key: Value) -> Value:
        if isinstance(key, Known) and isinstance(key.value, int):
            if 0 <= key.value < len(base.head):
                return base.head[key.value]
            return CONSTANT
        if isinstance(key, Slice) and isinstance(key.upper, Known) and key.lower == NONE:
            upper = key.upper.value
            if isinstance(upper, int) and 0 <= upper <= len(base.head):
                return Tuple(base.head[:upper])
        raise Refused("unknown-operation", "part of a shape of unknown length")

    def e_call(self, expr: Expr) -> Value:
        callee = self.value(expr.args[0])
        args: list[Value] = []
        more: dict[str, Value] = {}
        unknown = False
        for keyword, part in zip(expr.data, expr.args[1:], strict=True):
            value = self.value(part)
            if keyword is None:
                args.append(value)
            elif keyword == "*":
                known = self.known_items(value)
                if known is None:
                    if is_live(value) or isinstance(value, OpenShape):
                        raise Refused("unknown-operation", "arguments of unknown number")
                    unknown = True
                else:
                    args += known
            elif keyword == "**":
                if isinstance(value, Table):
                    more |= {str(k): v for k, v in value.entries.items()}
                elif is_live(value):
                    raise Refused("unknown-operation", "keyword arguments of unknown names")
            else:
                more[keyword] = value
        self.at(expr)
        if isinstance(callee, Library) and callee.name == "at.":
            raise Refused("unknown-operation", "`.at[...]` is called")
        if unknown and isinstance(callee, Library):
            if any(map(is_live, args)):
                raise Refused("unknown-operation", "arguments of unknown number")
            return CONSTANT
        return self.call(callee, args, more)

    def e_comp(self, expr: Expr) -> Value:
        data: Comprehension = expr.data
        saved = self.frame.scope.names
        self.frame.scope.names = dict(saved)
        values: list[Value] = []
        exact = self.comprehend(expr, data.generators, values)
        self.frame.scope.names = saved
        if data.kind == "dict":
            made = Table({}, None, self.depth, self.forward)
            for pair in values:
                assert isinstance(pair, Tuple)
                self.store_entry(made, *pair.items)
            if not exact and made.entries:
                made.other = choice(made.entries.values())
            return made
        if exact:
            return self.items(values)
        return self.items(None, choice(values) if values else UNDEFINED)

    def comprehend(self, expr: Expr, generators: Sequence[Any], values: list[Value]) -> bool:
        """Add the comprehension's elements; whether each is met exactly once."""
        if not generators:
            found = [self.value(part) for part in expr.args]
            values.append(found[0] if len(found) == 1 else Tuple(tuple(found)))
            return True
        first, *rest = generators
        iterable = self.value(first.iterable)
        known = self.known_items(iterable)
        exact = known is not None and len(known) <= _UNROLLED
        elements = known if exact and known is not None else [self.element(iterable)]
        if not exact:
            self.depth += 1
        for element in elements:
            if isinstance(element, Undefined):
                continue
            self.assign(first.target, element, None)
            outcome: bool | None = True
            for condition in first.conditions:
                held = self.truth(self.value(condition))
                outcome = False if held is False else outcome if held else None
                if outcome is False:
                    break
            if outcome is False:
                continue
            exact = self.comprehend(expr, rest, values) and exact and outcome is True
        if known is None or len(known) > _UNROLLED:
            self.depth -= 1
        return exact

    # ----------------------------------------------------------------- statements

    def block(self, body: Sequence[Stmt]) -> bool:
        """Run statements in order; True if control never gets past them."""
        frames, depth, forward = len(self.frames), self.depth, self.forward
        for statement in body:
            try:
                if self.statement(statement):
                    return True
            except Dead:
                del self.frames[frames:]
                self.depth, self.forward = depth, forward
                return True
        return False

    def statement(self, statement: Stmt) -> bool:
        match statement:
            case Assign(targets=targets, value=expr):
                if expr is not None:
                    value = self.value(expr)
                    for target in targets:
                        self.assign(target, value, expr)
            case AugAssign():
                self.augment(statement)
            case Evaluate(value=expr):
                self.value(expr)
            case Return(value=expr):
                value = self.value(expr) if expr is not None else NONE
                frame = self.frame
                if isinstance(frame.returns, Undefined):
                    frame.returns = value
                else:
                    ends = [{"": frame.returns}, {"": value}]
                    frame.returns = self.met(ends, statement.span)[""]
                return True
            case If():
                return self.branch(statement)
            case For():
                return self.for_loop(statement)
            case While():
                return self.while_loop(statement)
            case Block(heads=heads, bodies=bodies):
                return self.guarded(statement.keyword, heads, bodies)
            case Function():
                made = self.decorated(statement, self.frame.scope.module, None, None)
                self.frame.scope.names[statement.name] = made
            case Class():
                made = ClassValue(self.frame.scope.module, statement)
                self.frame.scope.names[statement.name] = made
            case Import():
                self.local_import(statement)
            case Simple():
                return self.simple(statement)
        return False

    def local_import(self, statement: Import) -> None:
        from .world import _imported

        text = self.world.text(self.frame.scope.module)
        assert text is not None
        for name, target in _imported(statement, text.module.source):
            self.frame.scope.names[name] = self.dotted(target)

    def simple(self, statement: Simple) -> bool:
        match statement.keyword:
            case "raise":
                return True
            case "break":
                self.frame.breaks.append(dict(self.frame.scope.names))
                return True
            case "continue":
                self.frame.continues.append(dict(self.frame.scope.names))
                return True
            case "global" | "nonlocal":
                self.frame.scope.outer |= {part.data for part in statement.args}
                text = self.world.text(self.frame.scope.module)
                if text is not None and self.forward:
                    words = text.module.source.text(statement.span).replace(",", " ").split()[1:]
                    self.frame.scope.outer |= set(words)
            case "match" if self.forward:
                self.frame.where = statement.span
                raise Refused("unknown-operation", "a match statement")
            case "assert":
                for part in statement.args[:1]:
                    self.value(part)
        return False

    def assign(self, target: Expr, value: Value, expr: Expr | None) -> None:
        match target.op:
            case "name":
                scope = self.frame.scope
                if target.data in scope.outer and self.forward:
                    self.at(target)
                    raise Refused("state-on-self", f"`{target.data}` of an enclosing scope is set")
                scope.names[target.data] = value
                held = expr is not None and expr.op in ("name", "attr", "subscript")
                (scope.aliases.add if held else scope.aliases.discard)(target.data)
            case "tuple" | "list":
                self.unpack(target, value)
            case "attr":
                base = self.value(target.args[0])
                self.at(target)
                self.store_attribute(base, target.data, value, expr)
            case "subscript":
                self.store_subscript(target, value)
            case "star":
                self.assign(target.args[0], value, None)

    def unpack(self, target: Expr, value: Value) -> None:
        self.at(target)
        if isinstance(value, Choice):
            parts_: list[list[Value]] = []
            for option in value.options:
                try:
                    parts_.append(self.unpacked(target, option))
                except Dead:
                    continue
            if not parts_:
                raise Dead
            found = [choice(several) for several in zip(*parts_, strict=True)]
        else:
            found = self.unpacked(target, value)
        for part, item in zip(target.args, found, strict=True):
            self.assign(part, item, None)

    def unpacked(self, target: Expr, value: Value) -> list[Value]:
        names = target.args
        star = next((i for i, part in enumerate(names) if part.op == "star"), None)
        known = self.known_items(value)
        if isinstance(value, OpenShape) and star is None:
            if len(names) < len(value.head):
                raise Dead
            return [*value.head, *[CONSTANT] * (len(names) - len(value.head))]
        if known is not None:
            if star is None:
                if len(known) != len(names):
                    raise Dead
                return known
            after = len(names) - star - 1
            if len(known) < len(names) - 1:
                raise Dead
            middle = known[star : len(known) - after]
            return [*known[:star], self.items(middle), *known[len(known) - after :]]
        if isinstance(value, OpenShape):
            raise Refused("unknown-operation", "part of a shape of unknown length")
        element = self.element(value)
        return [self.items(None, element) if part.op == "star" else element for part in names]

    def store_subscript(self, target: Expr, value: Value) -> None:
        base = self.value(target.args[0])
        key = self.value(target.args[1])
        self.at(target)
        for one in options(base):
            match one:
                case Array():
                    self.store_array(target.args[0], one, key, value)
                case Items():
                    if isinstance(key, Known) and one.items is not None and self.mutate(one):
                        if isinstance(key.value, int) and key.value < len(one.items):
                            one.items[key.value] = value
                            continue
                    self.mutate(one)
                    for item in parts(value) if isinstance(key, Slice) else (value,):
                        self.summarise(one, item)
                case Table():
                    self.store_entry(one, key, value)
                case Opaque():
                    raise Refused("cache-use", "an entry of a cache is set outside a mixer")
                case Instance():
                    name = key.value if isinstance(key, Known) else "?"
                    self.store_attribute(one, str(name), value, None)
                case Known(value=None):
                    continue
                case _:
                    if is_live(value) or is_live(key) or is_live(one):
                        raise Refused("state-on-self", "tokens are kept in something shared")

    def store_array(self, target: Expr, base: Array, key: Value, value: Value) -> None:
        name = target.data if target.op == "name" else None
        if self.forward and not base.live and (name is None or name in self.frame.scope.aliases):
            raise Refused("state-on-self", "a weight is written to by the forward pass")
        rule = Rule("store", lambda c, b, v: store(c, array(b), key, v), "")
        made = self.apply(rule, (base, value), {})
        made = self.with_term("store", made, (base, key, value), {})
        if name is not None:
            self.frame.scope.names[name] = made
        elif self.forward and is_live(base):
            raise Refused("unknown-operation", "an array that is not a local name is written to")

    def augment(self, statement: AugAssign) -> None:
        target = statement.target
        current = self.value(target)
        value = self.value(statement.value)
        self.frame.where = statement.span
        for one in options(current):
            if isinstance(one, Array) and one.tag[:1] == ("start",):
                raise Refused(
                    "position-special",
                    "the positions, which all layers share, are changed in place",
                )
            if isinstance(one, Array) and not one.live and self.forward:
                held = target.op != "name" or target.data in self.frame.scope.aliases
                if held:
                    raise Refused("state-on-self", "a weight is changed by the forward pass")
            if isinstance(one, Items) and statement.operator == "+":
                self.call_items(one, "extend", (value,))
                return
        if target.op == "attr" and self.forward:
            base = self.value(target.args[0])
            if not all(isinstance(b, Instance) and b.forward for b in options(base)):
                raise Refused("state-on-self", f"`.{target.data}` changes from call to call")
        result = self.binary(statement.operator, current, value)
        self.assign(target, result, None)

    def narrowed(self, test: Expr, held: bool, names: dict[str, Value]) -> dict[str, Value]:
        """The names, with what a test on one of them says."""
        names = dict(names)
        if test.op == "unary" and test.data == "not":
            return self.narrowed(test.args[0], not held, names)
        if test.op == "bool" and (test.data == "and") == held:
            return self.narrowed(test.args[1], held, self.narrowed(test.args[0], held, names))
        name, none = None, False
        if test.op == "name":
            name, none = test.data, not held
        elif test.op == "compare" and len(test.args) == 2 and test.args[0].op == "name":
            right = test.args[1]
            if right.op == "const" and right.data is None and test.data[0] in ("is", "is not"):
                name, none = test.args[0].data, (test.data[0] == "is") == held
        if name is not None and name in names:
            several = options(names[name])
            bare = test.op == "name"
            kept = [
                v
                for v in several
                if isinstance(v, Constant)
                or ((v == NONE) == none if not bare else self._may_be(v, held))
            ]
            if kept:
                names[name] = choice(kept)
        return names

    def _may_be(self, value: Value, held: bool) -> bool:
        if isinstance(value, (Array, CountTest, Count)):
            return True
        known = self.truth(value)
        return known is None or known == held

    def branch(self, statement: If) -> bool:
        test = self.value(statement.test)
        self.frame.where = statement.test.span
        known = self.truth(test)
        scope = self.frame.scope
        before = scope.names
        if known is not None:
            scope.names = self.narrowed(statement.test, known, before)
            self.tests.append(statement.test)
            ended = self.block(statement.body if known else statement.orelse)
            self.tests.pop()
            return ended
        ends: list[dict[str, Value]] = []
        self.depth += 1
        self.tests.append(statement.test)
        for held, body in ((True, statement.body), (False, statement.orelse)):
            scope.names = self.narrowed(statement.test, held, before)
            if not self.block(body):
                ends.append(scope.names)
        self.tests.pop()
        self.depth -= 1
        if not ends:
            scope.names = before
            return True
        scope.names = self.met(ends, statement.test.span)
        return False

    def met(self, ends: Sequence[dict[str, Value]], where: Span) -> dict[str, Value]:
        """The names after a branch on the config."""
        merged = _merged(ends)
        if not self.unmemoised or len(ends) < 2:
            return merged
        for name, value in merged.items():
            words = [end.get(name, UNDEFINED) for end in ends]
            if isinstance(value, Array) and value.term is None:
                terms = tuple(map(_term, words))
                if None not in terms:
                    merged[name] = _termed(value, ("either", self.frame.scope.module, where, terms))
        return merged

    def for_loop(self, statement: For) -> bool:
        iterable = self.value(statement.iterable)
        self.frame.where = statement.iterable.span
        if isinstance(iterable, ByToken):
            self.token_loop(statement, iterable)
            return False
        known = self.known_items(iterable)
        frame, scope = self.frame, self.frame.scope
        outer = frame.breaks, frame.continues
        if known is not None and len(known) <= _UNROLLED:
            left: list[dict[str, Value]] = []
            alive = True
            for item in known:
                frame.breaks, frame.continues = [], []
                self.assign(statement.target, item, None)
                ended = self.block(statement.body)
                left += frame.breaks
                nexts = [*frame.continues, *([] if ended else [scope.names])]
                if not nexts:
                    alive = False
                    break
                if frame.breaks:
                    self.depth += 1
                scope.names = _merged(nexts)
            frame.breaks, frame.continues = outer
            ends = [*left, *([scope.names] if alive else [])]
            if not ends:
                return True
            scope.names = _merged(ends)
            return self.block(statement.orelse) if alive and not left else False
        element = self.element(iterable)
        if isinstance(element, Undefined):
            return False

        def head() -> None:
            self.assign(statement.target, element, None)

        self.repeat(head, statement.body)
        frame.breaks, frame.continues = outer
        return False

    def token_loop(self, statement: For, over: ByToken) -> None:
        """A loop over tokens in Python: one round, for any token, that may only add to lists.

        Each list gets exactly one entry a round, made from that round's token alone; nothing else
        leaves the loop.
        """
        axes = {
            v.axis if isinstance(v, Numbers) else (v.axes or ((),))[0]
            for v in over.values
            if isinstance(v, (Numbers, Array))
        }
        if len(axes) != 1 or len(over.values) < 1:
            raise Refused("row-mixing", "a loop over tokens and something else")
        (axis,) = axes
        if not tokens(axis) or any(not f.is_token for f in axis):
            raise Refused("row-mixing", "a loop over parts of tokens")
        parts_: list[Value] = []
        for value in over.values:
            if isinstance(value, Numbers):
                parts_.append(Numbers(axis, one=True))
            elif isinstance(value, Array) and not value.open and not value.tag:
                inner = Array((value.axes or ())[1:])
                if inner.live:
                    raise Refused("row-mixing", "a loop over tokens of single tokens' values")
                parts_.append(Array(inner.axes, tag=("row", axis)))
            else:
                raise Refused("row-mixing", "a loop over tokens and something else")
        scope = self.frame.scope
        before = dict(scope.names)
        saved, self.added = self.added, []
        self.depth += 1
        depth = self.depth
        self.assign(statement.target, Tuple(tuple(parts_)), None)
        breaks, continues = self.frame.breaks, self.frame.continues
        self.frame.breaks, self.frame.continues = [], []
        returns = self.frame.returns
        ended = self.block(statement.body)
        if ended or self.frame.breaks or self.frame.continues or self.frame.returns is not returns:
            raise Refused("row-mixing", "a loop over tokens that does not run to its end")
        self.frame.breaks, self.frame.continues = breaks, continues
        self.depth -= 1
        added, self.added = self.added, saved
        for name, value in before.items():
            if scope.names.get(name) is not value and not isinstance(value, Items):
                raise Refused("row-mixing", f"`{name}` is carried from token to token")
        scope.names = before
        for target in {id(t): t for t, _, _ in added}.values():
            mine = [(v, d) for t, v, d in added if t is target]
            (value, at), *more = mine
            if more or at != depth or not isinstance(value, Array) or value.tag != ("row", axis):
                raise Refused("row-mixing", "a loop over tokens that does not add one entry each")
            target.items, target.element = None, Array(value.axes, value.open, ("each", axis))

    def while_loop(self, statement: While) -> bool:
        frame = self.frame
        outer = frame.breaks, frame.continues

        def head() -> None:
            self.truth(self.value(statement.test))

        self.repeat(head, statement.body)
        frame.breaks, frame.continues = outer
        return False

    def repeat(self, head: Callable[[], None], body: Sequence[Stmt]) -> None:
        """Run a loop's body until nothing new is learnt of any name."""
        frame, scope = self.frame, self.frame.scope
        self.depth += 1
        state = scope.names
        for _ in range(_ROUNDS):
            frame.breaks, frame.continues = [], []
            scope.names = dict(state)
            head()
            ended = self.block(body)
            ends = [state, *frame.breaks, *frame.continues, *([] if ended else [scope.names])]
            after = _merged(ends)
            if after.keys() == state.keys() and all(
                _settled(after[name], state[name]) for name in after
            ):
                break
            state = after
        else:
            raise Refused("unknown-operation", "a loop that keeps changing what names hold")
        scope.names = state
        self.depth -= 1

    def guarded(
        self, keyword: str, heads: Sequence[Expr], bodies: Sequence[tuple[Stmt, ...]]
    ) -> bool:
        for head in heads:
            if is_live(self.value(head)):
                raise Refused("unknown-operation", "a with statement over tokens")
        if keyword == "with":
            return self.block(bodies[0])
        scope = self.frame.scope
        before = scope.names
        ends: list[dict[str, Value]] = []
        self.depth += 1
        scope.names = dict(before)
        if not self.block(bodies[0]):
            ends.append(scope.names)
        for body in bodies[1:]:
            scope.names = _merged([before, *ends])
            if not self.block(body):
                ends.append(scope.names)
        self.depth -= 1
        scope.names = _merged(ends) if ends else before
        return not ends


# --------------------------------------------------------------------------- helpers


def _merged(several: Sequence[dict[str, Value]]) -> dict[str, Value]:
    first, *rest = several
    if not rest:
        return first
    result = dict(first)
    for other in rest:
        for name, value in other.items():
            held = result.get(name)
            result[name] = value if held is None else join(held, value)
    return result


def _settled(new: Value, old: Value) -> bool:
    if new is old or new == old:
        return True
    if isinstance(new, (Constant, Known)) and isinstance(old, Constant):
        return True
    if isinstance(new, Items) and isinstance(old, Items):
        if new.items is not None or old.items is not None:
            if new.items is None or old.items is None or len(new.items) != len(old.items):
                return False
            return all(_settled(a, b) for a, b in zip(new.items, old.items, strict=True))
        return _settled(new.element or CONSTANT, old.element or CONSTANT)
    if isinstance(new, Table) and isinstance(old, Table):
        if new is old or new.entries.keys() != old.entries.keys():
            return new is old
        pairs = [(new.entries[k], old.entries[k]) for k in new.entries]
        return all(_settled(a, b) for a, b in [*pairs, (new.other or NONE, old.other or NONE)])
    if isinstance(new, Tuple) and isinstance(old, Tuple) and len(new.items) == len(old.items):
        return all(_settled(a, b) for a, b in zip(new.items, old.items, strict=True))
    if isinstance(new, Choice) and isinstance(old, Choice):
        return len(new.options) == len(old.options)
    if isinstance(new, Array) and isinstance(old, Array):
        return join(new, old) == old
    return isinstance(new, (Routine, Partial, ClassValue)) and type(new) is type(old)


def _termed(value: Value, term: Hashable) -> Value:
    match value:
        case Array():
            return Array(value.axes, value.open, value.tag, term)
        case Tuple(items=items):
            return Tuple(
                tuple(_termed(v, (term, i) if term else None) for i, v in enumerate(items))
            )
    return value


def _named(value: Value, name: Hashable) -> Value:
    """An argument as the beginning of terms."""
    if isinstance(value, Array) and value.term is not None:
        return value
    return _termed(value, ("given", name))


def _term(value: Value) -> Hashable:
    """How a value was computed, or which constant it is; None if that is not known."""
    match value:
        case Array():
            return value.term
        case Known():
            return ("known", type(value.value).__name__, repr(value.value))
        case Constant(key=key):
            return ("constant", key) if key is not None else None
        case CountTest():
            return ("test",)  # a hint such as `sorted_indices`: it changes no value
        case Library(name=name, bound=None):
            return ("library", name)
        case Instance():
            return ("object", id(value))
        case Count():
            return ("count", value)
        case Slice(lower=lower, upper=upper, step=step):
            words = tuple(map(_term, (lower, upper, step)))
            return None if None in words else ("slice", words)
        case Tuple(items=items) | Items(items=list() as items):
            words = tuple(map(_term, items))
            return None if None in words else ("items", words)
    return None


def _same_terms(one: Value, two: Value) -> bool:
    if isinstance(one, Array) and isinstance(two, Array):
        return one.term is not None and one.term == two.term
    if isinstance(one, Tuple) and isinstance(two, Tuple):
        return all(_same_terms(a, b) for a, b in zip(one.items, two.items, strict=True))
    return isinstance(one, (Known, Opaque)) and one == two


def _row(values: Sequence[Value]) -> Any:
    """The axis of a loop over tokens that one of the values is a part of."""
    for value in values:
        if isinstance(value, Array):
            if value.tag[:1] == ("row",):
                return value.tag[1]
        else:
            found = _row(list(parts(value)))
            if found is not None:
                return found
    return None


def _bare(value: Value) -> Value:
    """The value without the mark of one token."""
    match value:
        case Array(tag=("row", _)):
            return Array(value.axes, value.open)
        case Tuple(items=items):
            return Tuple(tuple(map(_bare, items)))
        case Items(items=items, element=element):
            held = [_bare(v) for v in items] if items is not None else None
            return Items(held, _bare(element) if element is not None else None, -1, value.forward)
        case Iterable_(element=element):
            return Iterable_(_bare(element))
        case Choice(options=several):
            return choice(map(_bare, several))
    return value


def _marked(value: Value, row: Any) -> Value:
    match value:
        case Array():
            return Array(value.axes, value.open, ("row", row))
        case Tuple(items=items):
            return Tuple(tuple(_marked(v, row) for v in items))
        case Iterable_(element=element):
            return Iterable_(_marked(element, row))
    return value


def _unturned(value: Value) -> Array | None:
    if isinstance(value, Array):
        return value if value.tag[:1] == ("unturned",) else None
    return next((found for part in parts(value) if (found := _unturned(part))), None)


def _mutable(value: Value) -> bool:
    if isinstance(value, (Items, Table)):
        return True
    if isinstance(value, Instance):
        return value.forward
    if isinstance(value, Routine):
        return value.scope is not None
    if isinstance(value, Known):
        try:
            hash(value.value)
        except TypeError:
            return True
    return any(map(_mutable, parts(value)))


def _depth(keys: Any) -> int:
    return 1 + max((_depth(k) for k in keys if isinstance(k, tuple)), default=0)


def _certain(table: Table, key: Value) -> bool:
    return isinstance(key, Known) and key.value in table.entries


def _returns(body: Sequence[Stmt]) -> Iterator[Return]:
    for statement in body:
        match statement:
            case Return():
                yield statement
            case If(body=one, orelse=two) | For(body=one, orelse=two):
                yield from _returns(one)
                yield from _returns(two)
            case While(body=one):
                yield from _returns(one)
            case Block(bodies=bodies):
                for part in bodies:
                    yield from _returns(part)


def _width(expr: Expr | None) -> int:
    return len(expr.args) if expr is not None and expr.op == "tuple" else 0


def _mentions(expr: Expr, name: str) -> bool:
    if expr.op in ("attr", "const") and expr.data == name:
        return True
    return any(_mentions(part, name) for part in expr.args)


def _settles(expr: Expr, name: str) -> bool:
    """Applied twice it does what it does once: a cast or a clip of the attribute itself."""
    if expr.op != "call":
        return not _mentions(expr, name)
    callee = expr.args[0]
    if callee.op == "attr" and callee.data in ("astype", "clip"):
        inside = [callee.args[0], *expr.args[1:]]
        return all(part.op in ("attr", "name", "const", "unary") for part in inside)
    return False


_ONCE = {
    "per_sequence": "once per sequence",
    "per_sequence_model": "once per sequence",
    "per_length": "once for all sequences with equally many rows",
}
_CONFIGS = ("mlx_lm.models.base.BaseModelArgs", "mlx_vlm.models.base.BaseModelConfig")
_CACHED = ("functools.lru_cache", "functools.cache", "functools.cached_property")
_PASSED = ("functools.wraps", "copy.copy", "copy.deepcopy", "functools.lru_cache")
_NO_ARRAYS = ("finfo", "iinfo", "distributed", "metal", "default_device", "fast", "issubdtype")
# What a permutation of rows that is undone is made of: none of it changes an entry.
_PERMUTING = ("flatten", "unflatten", "index", "expand_dims", "squeeze", "stop_gradient")
_BUILTINS = frozenset(
    "len range zip enumerate list tuple reversed iter next isinstance hasattr getattr setattr dict "
    "super sum callable print type map".split()
)
_HOLDING = frozenset("zip enumerate list tuple reversed iter next dict map".split())
_UNARY: dict[str, Callable[[Any], Any]] = {
    "-": operator.neg,
    "+": operator.pos,
    "~": operator.invert,
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
__all__ = ["Assumption", "Failure", "Interpreter", "Text"]
