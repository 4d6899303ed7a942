"""Statements, and what assignments bind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..ir import (
    Assign,
    AugAssign,
    Block,
    Class,
    Evaluate,
    Expr,
    For,
    Function,
    If,
    Import,
    Return,
    Simple,
    Stmt,
    While,
)
from .attributes import mentions, only_keeps, only_notes
from .domain import (
    CONSTANT,
    NONE,
    ROWS,
    UNDEFINED,
    Array,
    Barred,
    Choice,
    ClassValue,
    Count,
    CountTest,
    Dead,
    Instance,
    Items,
    Known,
    Library,
    Opaque,
    OpenShape,
    Refused,
    Undefined,
    Value,
    choice,
    options,
)
from .loops import Loops
from .operators import Operators
from .states import STATES
from .subscripts import Subscripts
from .world import imported


class Statements(Loops, Subscripts, Operators):
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
                    value = self.kept_value(targets, expr)
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

    def kept_value(self, targets: Sequence[Expr], expr: Expr) -> Value:
        """What is assigned; what an attribute's own new value reads of it is told apart."""
        one = targets[0] if len(targets) == 1 else None
        if one is None or one.op != "attr" or not self.forward or not mentions(expr, one.data):
            return self.value(expr)
        with self.reading_apart(frozenset((one.data,))) as found:
            value = self.value(expr)
        mine = set(map(id, options(self.value(one.args[0]))))
        self.own_reads |= {key for key in found if key[0] in mine}
        self.reads |= {key for key in found if key[0] not in mine}
        return value

    def local_import(self, statement: Import) -> None:
        text = self.world.text(self.frame.scope.module)
        assert text is not None
        for name, target in imported(statement, text.module.source):
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
            case "del" if self.forward:
                for part in statement.args:
                    self.forget(part)
            case "assert":
                for part in statement.args[:1]:
                    self.value(part)
        return False

    def forget(self, target: Expr) -> None:
        """`del`: of names only; what else it takes away may outlive the call."""
        if target.op in ("tuple", "list"):
            for part in target.args:
                self.forget(part)
        elif target.op == "name":
            self.assign(target, UNDEFINED, None)
        else:
            self.at(target)
            raise Refused("state-on-self", "something is taken away by the forward pass")

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
        if value == STATES and star is None:
            known = [self.read_state(Known(i)) for i in range(len(names))]
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

    def branch(self, statement: If) -> bool:
        tying, self.tying = self.tying, _only_ties(statement)
        alone = self.keeps(statement)
        with self.reading_apart(alone):
            test = self.value(statement.test)
        self.tying = tying
        self.frame.where = statement.test.span
        if isinstance(test, CountTest) and self.known_of_count(test) is None:
            rows = all(f == ROWS for f in test.factors) or test.key is None
            if rows and test.paged is None and self.only_names(statement):
                self.name_by_count(statement, test)
                return False
        known = self.truth(test)
        scope = self.frame.scope
        before = scope.names
        if known is not None:
            scope.names = self.narrowed(statement.test, known, before)
            with self.only_noting(alone):
                return self.block(statement.body if known else statement.orelse)
        ends: list[dict[str, Value]] = []
        self.depth += 1
        grown = after = self.grown
        for held, body in ((True, statement.body), (False, statement.orelse)):
            self.grown = grown
            scope.names = self.narrowed(statement.test, held, before)
            with self.only_noting(alone):
                ended = self.block(body)
            if not ended:
                ends.append(scope.names)
            after = after or self.grown
        self.grown = after
        self.depth -= 1
        if not ends:
            scope.names = before
            return True
        scope.names = self.met(ends, statement.test.span)
        return False

    def keeps(self, statement: If) -> frozenset[str]:
        """The attributes that a branch only keeps, by itself or by a method that does no more."""
        body = statement.body
        call = body[0].value if len(body) == 1 and isinstance(body[0], Evaluate) else None
        if self.forward and call is not None and call.op == "call" and len(call.args) == 1:
            callee = call.args[0]
            if callee.op == "attr" and callee.args[0].op == "name":
                this = self.lookup(callee.args[0].data)
                if isinstance(this, Instance) and this.cls is not None:
                    found = self.member(this.cls, callee.data)
                    if found is not None and isinstance(found[1], Function):
                        return only_keeps(statement, found[1].body)
        if not statement.orelse and (noted := only_notes(body)):
            return only_keeps(statement, body) | noted
        return only_keeps(statement, body)

    @contextmanager
    def only_noting(self, names: frozenset[str]) -> Iterator[None]:
        self.noting.append(names)
        try:
            yield
        finally:
            self.noting.pop()

    def only_names(self, statement: If) -> bool:
        """The branch does nothing but give names values that mlx's own operations compute."""
        for part in (*statement.body, *statement.orelse):
            match part:
                case Assign(targets=targets, value=expr) if expr is not None:
                    named = all(t.op == "name" for t in targets)
                    if not named or not self.computes(expr):
                        return False
                case If():
                    if not self.computes(part.test) or not self.only_names(part):
                        return False
                case _:
                    return False
        return True

    def computes(self, expr: Expr) -> bool:
        """Nothing is called but mlx, nothing is bound."""
        if expr.op == "call":
            callee = expr.args[0]
            while callee.op == "attr":
                callee = callee.args[0]
            found = self.lookup(callee.data) if callee.op == "name" else None
            if not isinstance(found, Library) or found.name not in _PURE:
                return False
        return expr.op in _COMPUTING and all(map(self.computes, expr.args))

    def name_by_count(self, statement: If, test: CountTest) -> None:
        """Names whose values the number of tokens decides: nothing may use them."""
        scope, depth, frames = self.frame.scope, self.depth, len(self.frames)
        before, where = scope.names, statement.test.span
        ends: list[dict[str, Value]] = []
        for body in (statement.body, statement.orelse):
            scope.names = dict(before)
            for part in body:
                try:
                    self.statement(part)
                except Refused as problem:
                    del self.frames[frames:]
                    self.depth = depth
                    for name in _assigned((part,)):
                        scope.names[name] = Barred(
                            problem.slug, problem.message, test.factors or _SOME
                        )
            ends.append(scope.names)
        one, two = ends
        scope.names = {**one, **two}
        for name in one.keys() & two.keys():
            plain = isinstance(one[name], (Known, Count, Opaque)) and one[name] == two[name]
            if one[name] is not two[name] and not plain:  # equal axes are no equal entries
                message = f"the number of tokens decides what `{name}` is"
                scope.names[name] = Barred(
                    "token-count", message, test.factors or _SOME, (scope.module, where)
                )


_PURE = ("mlx.core", "builtins.getattr", "builtins.isinstance", "builtins.len")
_COMPUTING = frozenset(
    "name const attr call subscript slice tuple unary binary compare bool if".split()
)
_SOME = (ROWS,)


def _assigned(body: Sequence[Stmt]) -> Iterator[str]:
    for part in body:
        if isinstance(part, Assign):
            yield from (target.data for target in part.targets)
        elif isinstance(part, If):
            yield from _assigned((*part.body, *part.orelse))


def _only_ties(statement: If) -> bool:
    """`if ...: cache.keys = mx.depends(cache.keys, h)`, as pipelines end, changes no value."""
    return not statement.orelse and all(
        isinstance(part, Assign)
        and part.value is not None
        and part.value.op == "call"
        and part.value.args[0].op == "attr"
        and part.value.args[0].data == "depends"
        and all(t.op == "attr" and t.data in ("keys", "values") for t in part.targets)
        for part in statement.body
    )
