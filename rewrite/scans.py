"""Functions that are a recurrence over tokens and nothing else, recognised by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .edits import Ops, decorate, site_comment
from .ir import Edit, Method, Site, Value
from .match import Mixer, every_value, is_none_test, library_call, place, same, size_of
from .program import Program
from .states import Reach


@dataclass(frozen=True, slots=True)
class Diagonal:
    """h <- a h + x over axis 1, all h and the last one returned: the parameters' names."""

    x: str
    a: str
    h: str


def diagonal_scans(mixer: Mixer, kind: str) -> Ops | None:
    """Diagonal recurrences that the class's forward calls, as ops; None if it has other loops."""

    def roles(method: Method) -> tuple[str, ...] | None:
        found = diagonal(mixer.program, method)
        return None if found is None else (found.x, found.a, found.h)

    return _functions(mixer, kind, "diagonal_scan", roles)


def lightning_scans(mixer: Mixer, kind: str) -> Ops | None:
    """Linear attention with a decay for each head, as ops; None if the class has other loops."""
    return _functions(mixer, kind, "lightning_scan", lambda m: _lightning(mixer.program, m))


def _functions(
    mixer: Mixer, kind: str, op: str, roles: Callable[[Method], tuple[str, ...] | None]
) -> Ops | None:
    """Only functions of the class's own module: others are not in the file that is written."""
    sites: list[Site] = []
    edits: list[Edit] = []
    own = mixer.program.modules[mixer.cls.module].functions.values()
    for method in Reach(mixer).methods:
        if not any(value.op in ("loop", "carried") for value in every_value(method)):
            continue
        names = roles(method)
        if names is None or not any(method is function for function in own):
            return None
        text = f"{kind} works out its recurrence without a loop over tokens"
        edits.append(site_comment(mixer.source, method.function.span, text, kind))
        arguments = ", ".join(f'"{name}"' for name in names)
        edits.append(decorate(mixer.source, method, f"{op}({arguments})", kind))
        sites.append(Site(op, place(mixer.source, method.function.name_span)))
    return Ops(tuple(sites), tuple(edits), (op,) if sites else ())


def diagonal(program: Program, method: Method) -> Diagonal | None:
    """The roles of a function's parameters, if it is a diagonal recurrence."""
    stores = [effect for effect in method.effects if effect.kind in ("store", "augment")]
    if len(stores) != 1 or not stores[0].path.in_loop or not method.returns:
        return None
    general, *special = reversed(method.returns)
    if general.path.in_loop or general.value.op != "tuple" or len(general.value.args) != 2:
        return None
    all_of_them, last = general.value.args
    if all_of_them.op != "loop" or last.op != "loop":
        return None
    step = last.args[1]
    found = _step(program, step, last.args[0])
    if found is None:
        return None
    x, a, h = found
    if not _collects(program, all_of_them, step, x) or not _begins(program, last.args[0], h):
        return None
    if not all(_is_one_token(effect.path.conditions, x) for effect in special):
        return None
    if not all(_same_for_one(effect.value, effect.path.conditions, x, a, h) for effect in special):
        return None
    names = [str(value.data[1]) for value in (x, a, h)]
    return Diagonal(*names) if len(set(names)) == 3 else None


def _step(program: Program, step: Value, start: Value) -> tuple[Value, Value, Value] | None:
    """`a[:, t] * carried + x[:, t]`: x, a and the parameter that the carried value begins as."""
    if step.op != "binary" or step.data != "+":
        return None
    for product, added in (step.args, step.args[::-1]):
        x = _token_of(program, added)
        if x is None or product.op != "binary" or product.data != "*":
            continue
        for factor, held in (product.args, product.args[::-1]):
            a = _token_of(program, factor)
            if (
                a is None
                or not same(factor.args[1], added.args[1])
                or held.op != "carried"
                or held.args[0] is not start
            ):
                continue
            if start.op == "phi" and (test := is_none_test(start.args[0])) is not None:
                return x, a, test[0]
    return None


def _token_of(program: Program, value: Value) -> Value | None:
    """x in `x[:, t]`, with x a parameter and t running over `range(y.shape[1])`."""
    if value.op != "index" or value.args[0].op != "param" or value.args[1].op != "tuple":
        return None
    keys = value.args[1].args
    if len(keys) != 2 or not _is_whole(keys[0]) or keys[1].op != "elem":
        return None
    return value.args[0] if _is_token_loop(program, keys[1].args[0]) else None


def _is_token_loop(program: Program, value: Value) -> bool:
    """`range(x.shape[1])`, with x a parameter."""
    got = library_call(program, value, "builtins.range")
    if got is None or len(got) != 1:
        return False
    return any(part.op == "param" and _is_length(got[0], part) for part in got[0].walk())


def _is_whole(key: Value) -> bool:
    return key.op == "slice" and all(
        part.op == "const" and part.data is None for part in key.args[:3]
    )


def _collects(program: Program, collected: Value, step: Value, x: Value) -> bool:
    """`y = zeros_like(x)`, then `y[:, t] = h` for every token."""
    begun = library_call(program, collected.args[0], "mlx.core.zeros_like")
    stored = collected.args[1]
    if begun is None or begun[0] is not x or stored.op != "setitem":
        return False
    target, keys, value = stored.args
    return value is step and target.op == "carried" and _reads_at(step, keys)


def _reads_at(step: Value, keys: Value) -> bool:
    """The step reads its tokens where the result is stored."""
    return any(part.op == "index" and same(part.args[1], keys) for part in step.args)


def _begins(program: Program, start: Value, h: Value) -> bool:
    """The state given, or zeros."""
    test = is_none_test(start.args[0])
    if start.op != "phi" or test is None:
        return False
    given, absent = (start.args[2], start.args[1]) if test[1] else (start.args[1], start.args[2])
    return given is h and library_call(program, absent, "mlx.core.zeros") is not None


def _is_one_token(conditions: tuple[tuple[Value, bool], ...], x: Value) -> bool:
    """A branch that only one token takes: `x.shape[1] == 1`."""
    for test, taken in conditions:
        if taken and test.op == "compare" and test.data == ("==",):
            left, right = test.args
            if right.op == "const" and right.data == 1 and _is_length(left, x):
                return True
    return False


def _is_length(value: Value, x: Value) -> bool:
    return size_of(value) == (x, 1)


def _same_for_one(
    value: Value, conditions: tuple[tuple[Value, bool], ...], x: Value, a: Value, h: Value
) -> bool:
    """`x, x[:, 0]` without a state, `a * h[:, None] + x` and its last with one."""
    if value.op != "tuple" or len(value.args) != 2:
        return False
    y, last = value.args
    if last.op != "index" or not same(last.args[0], y) or last.args[1].op != "tuple":
        return False
    keys = last.args[1].args
    if len(keys) != 2 or not _is_whole(keys[0]) or keys[1].op not in ("const", "unary"):
        return False
    absent = _state_is_absent(conditions, h)
    if absent is None:
        return False
    if absent:
        return y is x
    if y.op != "binary" or y.data != "+":
        return False
    product = next((part for part in y.args if part is not x), None)
    if product is None or x not in y.args or product.op != "binary" or product.data != "*":
        return False
    spread = next((part for part in product.args if part is not a), None)
    return a in product.args and spread is not None and _is_spread(spread, h)


def _is_spread(value: Value, h: Value) -> bool:
    """`h[:, None]`."""
    if value.op != "index" or value.args[0] is not h or value.args[1].op != "tuple":
        return False
    keys = value.args[1].args
    return len(keys) == 2 and _is_whole(keys[0]) and keys[1].op == "const" and keys[1].data is None


def _state_is_absent(conditions: tuple[tuple[Value, bool], ...], h: Value) -> bool | None:
    for test, taken in conditions:
        got = is_none_test(test)
        if got is not None and got[0] is h:
            return got[1] == taken
    return None


# ------------------------------------------------------------------------------ matrix states


def _lightning(program: Program, method: Method) -> tuple[str, ...] | None:
    """h <- h e^g + k^T v, y = (q scale) h, over axis 2 of [B, H, L, D]: names of q, k, v, g, scale
    and h. All y, joined, and the last h are returned."""
    if any(effect.kind in ("store", "augment") for effect in method.effects):
        return None
    if len(method.returns) != 1 or method.returns[0].path.in_loop:
        return None
    value = method.returns[0].value
    if value.op != "tuple" or len(value.args) != 2:
        return None
    joined, last = value.args
    if last.op != "loop" or last.args[0].op != "param":
        return None
    h, step = last.args
    test = is_none_test(step.args[0]) if step.op == "phi" else None
    if test is None or test[0].op != "carried" or test[0].args[0] is not h:
        return None
    grown, first = (step.args[2], step.args[1]) if test[1] else (step.args[1], step.args[2])
    gate = _kept(program, grown, first, test[0])
    added = _product(first)
    read = _joined(program, method, joined)
    if gate is None or added is None or read is None or read.args[1] is not step:
        return None
    k, v = _turned(program, added[0]), _tokens_of(program, added[1])
    scaled = read.args[0]
    if k is None or v is None or scaled.op != "index" or not same(scaled.args[1], v.args[1]):
        return None
    q = scaled.args[0]
    if q.op != "binary" or q.data != "*" or not same(k.args[1], v.args[1]):
        return None
    if not _runs_over(program, v, q.args[0]):
        return None
    roles = (q.args[0], k.args[0], v.args[0], gate, q.args[1], h)
    names = [str(part.data[1]) for part in roles if part.op == "param"]
    return tuple(names) if len(set(names)) == len(roles) else None


def _product(value: Value) -> tuple[Value, Value] | None:
    return (value.args[0], value.args[1]) if value.op == "binary" and value.data == "@" else None


def _kept(program: Program, grown: Value, first: Value, held: Value) -> Value | None:
    """g in `held * exp(g)[:, None, None] + first`, with or without a cast of the decay."""
    if grown.op != "binary" or grown.data != "+" or first not in grown.args:
        return None
    product = next((part for part in grown.args if part is not first), None)
    if product is None or product.op != "binary" or product.data != "*":
        return None
    decay = next((part for part in product.args if part is not held), None)
    if decay is None or held not in product.args:
        return None
    if decay.op == "call" and decay.args[0].op == "attr" and decay.args[0].data == "astype":
        decay = decay.args[0].args[0]
    if decay.op != "index" or decay.args[1].op != "tuple":
        return None
    whole, *new = decay.args[1].args
    if not _is_whole(whole) or len(new) != 2 or any(k.op != "const" or k.data for k in new):
        return None
    got = library_call(program, decay.args[0], "mlx.core.exp")
    return got[0] if got is not None and len(got) == 1 and got[0].op == "param" else None


def _turned(program: Program, value: Value) -> Value | None:
    """`x[:, :, t : t + 1]` in `x[:, :, t : t + 1].transpose(0, 1, 3, 2)`."""
    if value.op != "call" or value.args[0].op != "attr" or value.args[0].data != "transpose":
        return None
    order = [part.data for part in value.args[1:] if part.op == "const"]
    return _tokens_of(program, value.args[0].args[0]) if order == [0, 1, 3, 2] else None


def _tokens_of(program: Program, value: Value) -> Value | None:
    """The value itself, if it is `x[:, :, t : t + 1]` with x a parameter."""
    if value.op != "index" or value.args[0].op != "param" or value.args[1].op != "tuple":
        return None
    keys = value.args[1].args
    if len(keys) != 3 or not (_is_whole(keys[0]) and _is_whole(keys[1])) or keys[2].op != "slice":
        return None
    start, stop, stride = keys[2].args[:3]
    one_more = (
        stop.op == "binary"
        and stop.data == "+"
        and stop.args[0] is start
        and stop.args[1].op == "const"
        and stop.args[1].data == 1
    )
    plain = stride.op == "const" and stride.data is None
    return value if start.op == "elem" and one_more and plain else None


def _runs_over(program: Program, tokens: Value, q: Value) -> bool:
    """t in `x[:, :, t : t + 1]` runs over `range(q.shape[2])`."""
    start = tokens.args[1].args[2].args[0]
    got = library_call(program, start.args[0], "builtins.range")
    if got is None or len(got) != 1 or got[0].op != "item" or got[0].data != 2:
        return False
    shape = got[0].args[0]
    return shape.op == "attr" and shape.data == "shape" and shape.args[0] is q


def _joined(program: Program, method: Method, joined: Value) -> Value | None:
    """y in `concatenate(list, axis=2)`, where the list gets one y in each turn of the loop."""
    got = library_call(program, joined, "mlx.core.concatenate")
    if got is None or len(got) != 2 or got[1].op != "const" or got[1].data != 2:
        return None
    added = [
        effect
        for effect in method.calls()
        if effect.value.args[0].op == "attr" and effect.value.args[0].data == "append"
    ]
    if len(added) != 1 or not added[0].path.in_loop or added[0].path.conditions:
        return None
    if added[0].value.args[0].args[0] is not got[0] or got[0].op != "list" or got[0].args:
        return None
    y = added[0].value.args[1]
    return y if _product(y) is not None else None
