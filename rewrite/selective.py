"""Selective state spaces that a class scans itself, recognised by what its methods compute.

A method computes, from tokens x and the state before them,

    h <- h e^(dt A) + dt x B;  y = sum(h C) + D x

either over all tokens, with a loop of its own, or for one token, and another method loops over
them. The first ends with a call of the op in either case; of the second the loop becomes one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from .edits import Ops, replace, site_comment, spell
from .ir import Assign, Edit, For, Method, Site, Span, Stmt, Value
from .match import (
    Mixer,
    callee_name,
    every_value,
    is_none_test,
    library_call,
    same,
    size_of,
    uses,
)
from .program import Program
from .scans import _is_whole
from .states import Reach

OP = "selective_scan"
_LAST = (-1,)


@dataclass(frozen=True, slots=True)
class _Roles:
    """What stands for what in a method that returns y and the last h."""

    x: Value
    delta: Value
    A: Value
    B: Value
    C: Value
    D: Value
    h: Value

    @property
    def all(self) -> tuple[Value, ...]:
        return (self.x, self.delta, self.A, self.B, self.C, self.D, self.h)


def selective_scans(mixer: Mixer, kind: str) -> Ops | None:
    """The scans that the class's forward may run, as ops; None if it has other loops."""
    sites: list[Site] = []
    edits: list[Edit] = []
    looping = [m for m in Reach(mixer).methods if any(v.op == "elem" for v in every_value(m))]
    for method in looping:
        if not any(method is own for own in mixer.methods):
            return None
        whole = _whole(mixer.program, method)
        if whole is not None:
            found = _ending(mixer, method, whole, kind)
        else:
            found = _walked(mixer, method, kind)
        if found is None:
            return None
        edits += found[0]
        sites.append(found[1])
    return Ops(tuple(sites), tuple(edits), (OP,) if sites else ())


# ------------------------------------------------------------------------- what is computed


def _whole(program: Program, method: Method) -> _Roles | None:
    """All tokens, [N, L, M]: states are made for all of them and then joined, one by one."""
    value = _returned(method)
    if value is None:
        return None
    y, last = value.args
    read = _read_out(program, y, (-1, 3))
    if read is None or read[0].op != "loop":
        return None
    states, C, D, x = read
    if last.op != "index" or last.args[0] is not states or not _is_place(last.args[1], -1):
        return None
    begun, round_ = states.args
    added = _added(program, begun, x, (-2, 2))
    if added is None:
        return None
    delta, B = added
    # In each round, if there is a state: states[:, t] = state * decay[:, t] + states[:, t].
    if round_.op != "phi":
        return None
    test = is_none_test(round_.args[0])
    grown, left = (round_.args[2], round_.args[1]) if test and test[1] else round_.args[1:]
    if test is None or grown.op != "setitem" or left.op != "carried":
        return None
    target, place, new = grown.args
    held = test[0]
    if target is not left or left.args[0] is not begun or held.op != "carried":
        return None
    factor = _grown(program, new, held, lambda rest: _is_entry(rest, left, place))
    if factor is None or factor.op != "index" or not same(factor.args[1], place):
        return None
    rates = _decay(program, factor.args[0], delta)
    if rates is None or not _is_token(program, place, x):
        return None
    # What the next round carries is what was stored, and the first has the parameter.
    if not _carries(method, held, round_, place) or held.args[0].op != "param":
        return None
    return _Roles(x, delta, rates, B, C, D, held.args[0])


def _single(program: Program, method: Method) -> _Roles | None:
    """One token, [N, M]."""
    value = _returned(method)
    if value is None:
        return None
    y, new = value.args
    read = _read_out(program, y, (-1, 2))
    if read is None or read[0] is not new or new.op != "phi":
        return None
    _, C, D, x = read
    test = is_none_test(new.args[0])
    if test is None or test[0].op != "param":
        return None
    grown, alone = (new.args[2], new.args[1]) if test[1] else new.args[1:]
    added = _added(program, alone, x, (-2, 1))
    factor = _grown(program, grown, test[0], lambda rest: rest is alone)
    if added is None or factor is None:
        return None
    rates = _decay(program, factor, added[0])
    return None if rates is None else _Roles(x, added[0], rates, added[1], C, D, test[0])


def _returned(method: Method) -> Value | None:
    """The pair that a method returns, if it returns at its end only."""
    if len(method.returns) != 1:
        return None
    end = method.returns[0]
    if end.path.conditions or end.path.in_loop or end.value.op != "tuple":
        return None
    return end.value if len(end.value.args) == 2 else None


def _read_out(
    program: Program, y: Value, axes: tuple[int, ...]
) -> tuple[Value, Value, Value, Value] | None:
    """h, C, D and x in `(h @ expand_dims(C, -1)).squeeze(axis) + D * x`, x a parameter."""
    if y.op != "binary" or y.data != "+":
        return None
    for read, skipped in (y.args, y.args[::-1]):
        if skipped.op != "binary" or skipped.data != "*" or read.op != "call":
            continue
        callee = read.args[0]
        if callee.op != "attr" or callee.data != "squeeze" or len(read.args) != 2:
            continue
        product = callee.args[0]
        if _number(read.args[1]) not in axes or product.op != "binary" or product.data != "@":
            continue
        C = _widened(program, product.args[1], _LAST)
        for D, x in (skipped.args, skipped.args[::-1]):
            if C is not None and x.op == "param" and x is not D:
                return product.args[0], C, D, x
    return None


def _added(
    program: Program, value: Value, x: Value, axes: tuple[int, ...]
) -> tuple[Value, Value] | None:
    """delta and B in `expand_dims(delta * x, -1) * expand_dims(B, axis)`."""
    if value.op != "binary" or value.data != "*":
        return None
    for inputs, entering in (value.args, value.args[::-1]):
        product, B = _widened(program, inputs, _LAST), _widened(program, entering, axes)
        if product is None or B is None or product.op != "binary" or product.data != "*":
            continue
        for delta, other in (product.args, product.args[::-1]):
            if other is x and delta is not x:
                return delta, B
    return None


def _decay(program: Program, value: Value, delta: Value) -> Value | None:
    """A in `exp(expand_dims(delta, -1) * A)`."""
    got = library_call(program, value, "mlx.core.exp")
    if got is None or len(got) != 1 or got[0].op != "binary" or got[0].data != "*":
        return None
    for steps, rates in (got[0].args, got[0].args[::-1]):
        if _widened(program, steps, _LAST) is delta:
            return rates
    return None


def _widened(program: Program, value: Value, axes: tuple[int, ...]) -> Value | None:
    """x in `expand_dims(x, axis)`."""
    got = library_call(program, value, "mlx.core.expand_dims")
    if got is None or len(got) != 2 or value.data[0] is not None:
        return None
    return got[0] if value.data[1] in (None, "axis") and _number(got[1]) in axes else None


def _grown(
    program: Program, value: Value, held: Value, added: Callable[[Value], bool]
) -> Value | None:
    """The factor in `held * factor + x`, where x is what `added` says."""
    for one, two, rest in _multiplied_and_added(program, value):
        if added(rest) and (one is held or two is held):
            return two if one is held else one
    return None


def _multiplied_and_added(program: Program, value: Value) -> Iterator[tuple[Value, Value, Value]]:
    """a, b and c in `a * b + c`, or in a call of a function of the program that returns it."""
    if value.op == "call":
        name = callee_name(program, value)
        function = program.function_of(name) if name is not None else None
        if function is None or set(value.data) != {None} or len(function.returns) != 1:
            return
        if len(function.effects) != 1 or len(function.params) != len(value.args) - 1:
            return  # the return is all that it does
        given = dict(zip(map(id, function.params), value.args[1:], strict=True))
        for inner in _multiplied_and_added(program, function.returns[0].value):
            if all(id(part) in given for part in inner):
                a, b, c = (given[id(part)] for part in inner)
                yield a, b, c
    elif value.op == "binary" and value.data == "+":
        for product, added in (value.args, value.args[::-1]):
            if product.op == "binary" and product.data == "*":
                yield product.args[0], product.args[1], added


# ------------------------------------------------------------------------------- tokens


def _is_token(program: Program, key: Value, x: Value) -> bool:
    """`[:, t]` for t in `range(x.shape[1])`."""
    token = _token(key)
    bound = _bound(program, token) if token is not None else None
    return bound is not None and size_of(bound) == (x, 1)


def _token(key: Value) -> Value | None:
    """t in the key of `x[:, t]`, t an element of something."""
    if key.op != "tuple" or len(key.args) != 2 or not _is_whole(key.args[0]):
        return None
    return key.args[1] if key.args[1].op == "elem" else None


def _bound(program: Program, token: Value) -> Value | None:
    """n in `for t in range(n)`."""
    got = library_call(program, token.args[0], "builtins.range")
    return got[0] if got is not None and len(got) == 1 else None


def _is_place(key: Value, place: int) -> bool:
    """`[:, place]`."""
    return key.op == "tuple" and len(key.args) == 2 and (
        _is_whole(key.args[0]) and _number(key.args[1]) == place
    )  # fmt: skip


def _is_entry(value: Value, base: Value, key: Value) -> bool:
    return value.op == "index" and value.args[0] is base and same(value.args[1], key)


def _carries(method: Method, held: Value, round_: Value, place: Value) -> bool:
    """The name of a carried value ends each round as `round_[:, t]`.

    Carried values are shared by nothing but their name: what it has after the loop tells.
    """
    for names in method.before.values():
        after = names.get(held.data)
        if after is not None and after.op == "loop" and after.args[0] is held.args[0]:
            return _is_entry(after.args[1], round_, place)
    return False


def _number(value: Value) -> int | None:
    if value.op == "unary" and value.data == "-" and value.args[0].op == "const":
        return -value.args[0].data if isinstance(value.args[0].data, int) else None
    plain = value.op == "const" and type(value.data) is int
    return value.data if plain else None


# -------------------------------------------------------------------------------- edits


def _ending(
    mixer: Mixer, method: Method, roles: _Roles, kind: str
) -> tuple[list[Edit], Site] | None:
    """Return what the op gives as soon as all that it needs is there, instead of the rest."""
    body = method.function.body
    for start in range(len(body)):
        names = method.before.get(body[start].span.start, {})
        texts = [spell(mixer.source, role, names) for role in roles.all]
        if None not in texts:
            break
    else:
        return None
    if not _all_accounted_for(method, body[start:]):
        return None
    span = Span(body[start].span.start, body[-1].span.end)
    text = f"{kind} works out its recurrence without a loop over tokens"
    call = f"return {OP}({', '.join(filter(None, texts))})"
    edits = [
        site_comment(mixer.source, span, text, kind),
        replace(mixer.source, span, call, kind),
    ]
    return edits, Site(OP, mixer.place(span))


def _all_accounted_for(method: Method, rest: tuple[Stmt, ...]) -> bool:
    """What the statements do is nothing but to compute what the method returns."""
    end = method.returns[0]
    values = list(end.value.walk())
    known = {id(value) for value in values}
    # `x[...] = y` makes a value of its own, which must be used.
    stored = {(id(v.args[0]), id(v.args[2])) for v in values if v.op == "setitem"}
    span = Span(rest[0].span.start, rest[-1].span.end)
    for effect in method.effects:
        if not span.start <= effect.statement.span.start < span.end or effect is end:
            continue
        if effect.kind == "store":
            target = effect.target
            if target is None or target.op != "index":
                return False
            if (id(target.args[0]), id(effect.value)) not in stored:
                return False
        elif id(effect.value) not in known:
            return False
    return True


def _walked(mixer: Mixer, method: Method, kind: str) -> tuple[list[Edit], Site] | None:
    """A loop that gives each token to a method for one, and collects what it returns:

    for t in range(n):
        y, state = self.step(x[:, t], ..., state)
        all_of_them.append(y)
    y = mx.stack(all_of_them, axis=1)
    """
    for loop, join in _neighbours(method.function.body):
        found = _loop(mixer, method, loop, join)
        if found is None:
            continue
        call, text = found
        step = mixer.program.callees(call, mixer.cls, method)
        if len(step) != 1 or not any(step[0][1] is own for own in mixer.methods):
            return None
        roles = _single(mixer.program, step[0][1])
        if roles is None or mixer.mentions(step[0][1].name) != 1 or not _by_token(mixer, roles):
            return None
        if not _fits(step[0][1], call, roles):
            return None
        ending = _ending(mixer, step[0][1], roles, kind)
        if ending is None:
            return None
        span = Span(loop.span.start, join.span.end)
        note = f"{kind} takes all tokens at once"
        edits = [
            site_comment(mixer.source, span, note, kind),
            replace(mixer.source, span, text, kind),
        ]
        return [*edits, *ending[0]], ending[1]
    return None


def _neighbours(body: tuple[Stmt, ...]) -> Iterator[tuple[For, Assign]]:
    """A loop and the assignment after it, and no other loop in the body."""
    if sum(isinstance(statement, For) for statement in body) == 1:
        for first, second in pairwise(body):
            if isinstance(first, For) and isinstance(second, Assign) and not first.orelse:
                yield first, second


def _loop(mixer: Mixer, method: Method, loop: For, join: Assign) -> tuple[Value, str] | None:
    """The call of one token's method, and the text of the one for all of them."""
    inside = [
        e for e in method.effects if loop.span.start <= e.statement.span.start < loop.span.end
    ]
    after = [e for e in method.effects if e.statement is join]
    calls = [e.value for e in inside if e.kind == "call" and e.statement is not loop]
    if len(calls) != 2 or any(e.kind != "call" for e in inside) or len(after) != 1:
        return None
    call, append = calls
    syntax, table = call.syntax, uses(method)
    stacked = library_call(mixer.program, after[0].value, "mlx.core.stack")
    if syntax is None or stacked is None or len(stacked) != 2 or _number(stacked[1]) != 1:
        return None
    if after[0].value.data != (None, "axis") or len(join.targets) != 1:
        return None
    items = {user.data: user for use in table[id(call)] if (user := use.user) is not None}
    if set(items) != {0, 1} or len(table[id(call)]) != 2:
        return None
    if any(item.op != "item" for item in items.values()) or len(table[id(items[0])]) != 1:
        return None
    listed = stacked[0].op == "list" and not stacked[0].args
    collected = (
        append.args[0].op == "attr"
        and append.args[0].data == "append"
        and append.args[0].args[0] is stacked[0]
        and append.args[1:] == (items[0],)
    )
    appends = [u for u in table[id(stacked[0])] if u.user is not after[0].value]
    if not listed or not collected or len(appends) != 1:
        return None
    states = [a for a in call.args[1:] if a.op == "carried"]
    tokens = [a for a in call.args[1:] if a.op == "index"]
    if len(states) != 1 or len(tokens) != 1 or set(call.data) != {None}:
        return None
    name = states[0].data
    later = method.before[join.span.start].get(name)
    if later is None or later.op != "loop" or later.args != (states[0].args[0], items[1]):
        return None
    token = _token(tokens[0].args[1])
    bound = _bound(mixer.program, token) if token is not None else None
    if token is None or bound is None or len(table[id(token)]) != 1:
        return None
    target = join.targets[0]
    if target.op != "name" or target.data == name:
        return None
    source, range_ = mixer.source, token.args[0].syntax
    assert range_ is not None
    count = source.text(range_.args[1].span)
    texts = [source.text(syntax.args[0].span)]
    for given, written in zip(call.args[1:], syntax.args[1:], strict=True):
        if given is tokens[0]:
            texts.append(f"{source.text(written.args[0].span)}[:, :{count}]")
        elif (
            any(part.op in ("elem", "carried") for part in given.walk()) and given is not states[0]
        ):
            return None
        else:
            texts.append(source.text(written.span))
    return call, f"{target.data}, {name} = {texts[0]}({', '.join(texts[1:])})"


def _fits(step: Method, call: Value, roles: _Roles) -> bool:
    """The call gives the tokens as x and the state as h."""
    given = dict(zip(map(id, step.params[1:]), call.args[1:], strict=False))
    x, h = given.get(id(roles.x)), given.get(id(roles.h))
    return x is not None and h is not None and x.op == "index" and h.op == "carried"


# --------------------------------------------------------------- one token or many, the same


def _by_token(mixer: Mixer, roles: _Roles) -> bool:
    """delta, B and C of many tokens are those of each: made along the last axis of x."""
    rest = (roles.A, roles.D)
    if any(part is roles.x for value in rest for part in value.walk()):
        return False
    return all(_along_last(mixer, value, roles.x) for value in (roles.delta, roles.B, roles.C))


def _along_last(mixer: Mixer, value: Value, x: Value) -> bool:
    if value is x:
        return True
    if value.op == "item":
        got = library_call(mixer.program, value.args[0], "mlx.core.split")
        if got is None or len(got) != 3 or value.args[0].data[2] not in (None, "axis"):
            return False
        return _number(got[2]) == -1 and _without(got[1], x) and _along_last(mixer, got[0], x)
    if value.op == "phi":
        test, *ways = value.args
        return _without(test, x) and all(_along_last(mixer, way, x) for way in ways)
    if value.op != "call":
        return False
    first, *others = value.args[1:]
    if value.data[0] is not None or not all(_without(other, x) for other in others):
        return False
    names = ("mlx.core.fast.rms_norm", "mlx.core.fast.layer_norm", "mlx.nn.softplus")
    made = {"mlx.nn.Linear", "mlx.nn.RMSNorm", "mlx.nn.LayerNorm"}
    known = callee_name(mixer.program, value) in names or (
        not others and mixer._is_made_by(value.args[0], made)
    )
    return known and _along_last(mixer, first, x)


def _without(value: Value, x: Value) -> bool:
    return all(part is not x for part in value.walk())
