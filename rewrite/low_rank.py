"""Recurrences on matrix states whose transition is diagonal plus a product, and token shifts,
recognised by what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .edits import Ops, decorate, site_comment
from .inlining import expanded
from .ir import Edit, Method, Site, Value
from .match import Mixer, every_value, library_call, method_call, place, same
from .program import Program
from .scans import _begins, _is_whole, _token_of
from .states import Reach

_DEVICE = frozenset({"mlx.core.default_device", "mlx.core.metal.is_available"})


@dataclass(frozen=True, slots=True)
class LowRank:
    """h <- h diag(w) + (h a) b^T + v k^T, y = h r, over axis 1: the parameters' names."""

    r: str
    w: str
    k: str
    v: str
    a: str
    b: str
    h: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.r, self.w, self.k, self.v, self.a, self.b, self.h)


def low_rank_scans(mixer: Mixer, kind: str) -> Ops | None:
    """Such recurrences that the class's forward calls, as ops; None if it has other loops.

    Functions of the class's own module and methods of the class itself.
    """
    own = [*mixer.program.modules[mixer.cls.module].functions.values(), *mixer.cls.methods.values()]
    sites: list[Site] = []
    edits: list[Edit] = []
    for method in Reach(mixer).methods:
        if not any(value.op in ("loop", "carried") for value in every_value(method)):
            continue
        found = low_rank(mixer.program, method)
        if found is None or not any(method is function for function in own):
            return None
        text = f"{kind} works out a prompt in chunks, and a token in one step"
        edits.append(site_comment(mixer.source, method.function.span, text, kind))
        arguments = ", ".join(f'"{name}"' for name in found.names)
        edits.append(decorate(mixer.source, method, f"low_rank_scan({arguments})", kind))
        sites.append(Site("low_rank_scan", place(mixer.source, method.function.name_span)))
    return Ops(tuple(sites), tuple(edits), ("low_rank_scan",) if sites else ())


def low_rank(program: Program, method: Method) -> LowRank | None:
    """The roles of a function's parameters, if it is such a recurrence and nothing else.

    A return that only the device decides on, of a call with the same arguments, is taken to be the
    same function in another form.
    """
    if any(effect.kind in ("store", "augment") for effect in method.effects):
        return None
    general = [effect for effect in method.returns if effect.value.op == "tuple"]
    if len(general) != 1 or len(general[0].value.args) != 2:
        return None
    if any(not _of_device(program, test) for e in method.returns for test, _ in e.path.conditions):
        return None
    joined, last = general[0].value.args
    if last.op != "loop":
        return None
    start, step = last.args[0], expanded(program, last.args[1])
    y = _stacked(program, method, joined)
    if y is None or step is None:
        return None
    found = _step(program, step, expanded(program, y[0]), start)
    if found is None or not same(y[1], found[0]) or start.op != "phi":
        return None
    given = next((part for part in start.args[1:] if part.op == "param"), None)
    if given is None or not _begins(program, start, given):
        return None
    roles = (*found, given)
    for effect in method.returns:
        if effect is not general[0] and not _is_other_form(effect.value, (*found, start)):
            return None
    names = [str(part.data[1]) for part in roles]
    return LowRank(*names) if len(set(names)) == len(roles) else None


def _of_device(program: Program, test: Value) -> bool:
    """A test that only the machine decides on: no parameter, no call of anything else."""
    return all(
        part.op in ("global", "bool", "compare", "unary", "const")
        or library_call(program, part, *_DEVICE) is not None
        for part in test.walk()
    )


def _is_other_form(value: Value, roles: tuple[Value, ...]) -> bool:
    """A call with each of the same arguments, once."""
    if value.op != "call" or len(value.args) != len(roles) + 1:
        return False
    return all(any(part is role for part in value.args[1:]) for role in roles)


def _stacked(program: Program, method: Method, joined: Value) -> tuple[Value, Value] | None:
    """y and x in `stack(list, axis=1).astype(x.dtype)`, where each turn of the loop adds one y."""
    cast = method_call(joined, "astype")
    if cast is None or len(joined.args) != 2 or joined.data != (None,):
        return None
    dtype, got = joined.args[1], library_call(program, cast, "mlx.core.stack")
    if dtype.op != "attr" or dtype.data != "dtype" or got is None or len(got) != 2:
        return None
    if not _is(got[1], 1) or got[0].op != "list" or got[0].args:
        return None
    added = [e for e in method.calls() if method_call(e.value, "append") is not None]
    if len(added) != 1 or not added[0].path.in_loop:
        return None
    if method_call(added[0].value, "append") is not got[0] or len(added[0].value.args) != 2:
        return None
    outside = {id(test) for effect in method.returns for test, _ in effect.path.conditions}
    if any(id(test) not in outside for test, _ in added[0].path.conditions):
        return None
    return added[0].value.args[1], dtype.args[0]


def _step(
    program: Program, step: Value, y: Value | None, start: Value
) -> tuple[Value, Value, Value, Value, Value, Value] | None:
    """The roles r, w, k, v, a and b in what one turn of the loop does."""
    read = _matmul(y)
    if read is None or not same(read[0], step):
        return None
    r = _as_column(program, read[1])
    terms = [*_terms(step)]
    kept = [w for term in terms if (w := _kept(program, term, start)) is not None]
    pairs = [pair for term in terms if (pair := _outer(program, term)) is not None]
    erased = [pair for term in terms if (pair := _turned(program, term, start)) is not None]
    if len(terms) != 3 or r is None or (len(kept), len(pairs), len(erased)) != (1, 1, 1):
        return None
    (v, k), (a, b) = pairs[0], erased[0]
    tokens = (r, kept[0], k, v, a, b)
    times = [token.args[1] for token in tokens]
    if not all(same(time, times[0]) for time in times):
        return None
    x = tuple(token.args[0] for token in tokens)
    return x[0], x[1], x[2], x[3], x[4], x[5]


def _terms(value: Value) -> Iterator[Value]:
    if value.op == "binary" and value.data == "+":
        for part in value.args:
            yield from _terms(part)
    else:
        yield value


def _kept(program: Program, term: Value, start: Value) -> Value | None:
    """w[:, t] in `h * w[:, t][:, :, None]`."""
    if term.op != "binary" or term.data != "*":
        return None
    for held, factor in (term.args, term.args[::-1]):
        if _is_carried(held, start):
            return _as_row(program, factor)
    return None


def _outer(program: Program, term: Value) -> tuple[Value, Value] | None:
    """v[:, t] and k[:, t] in `v[:, t][..., None] @ k[:, t][..., None, :]`."""
    product = _matmul(term)
    if product is None:
        return None
    v, k = _as_column(program, product[0]), _as_row(program, product[1])
    return None if v is None or k is None else (v, k)


def _turned(program: Program, term: Value, start: Value) -> tuple[Value, Value] | None:
    """a[:, t] and b[:, t] in `(h @ a[:, t][..., None]) @ b[:, t][..., None, :]`."""
    product = _matmul(term)
    inner = _matmul(product[0]) if product is not None else None
    if product is None or inner is None or not _is_carried(inner[0], start):
        return None
    a, b = _as_column(program, inner[1]), _as_row(program, product[1])
    return None if a is None or b is None else (a, b)


def _matmul(value: Value | None) -> tuple[Value, Value] | None:
    if value is None or value.op != "binary" or value.data != "@":
        return None
    return value.args[0], value.args[1]


def _is_carried(value: Value, start: Value) -> bool:
    return value.op == "carried" and value.args[0] is start


def _as_column(program: Program, value: Value) -> Value | None:
    """x[:, t] in `x[:, t][..., None]`, [N, H, D] as [N, H, D, 1]."""
    return _widened(program, value, ("...", None), (":", ":", ":", None))


def _as_row(program: Program, value: Value) -> Value | None:
    """x[:, t] in `x[:, t][..., None, :]`, [N, H, D] as [N, H, 1, D]."""
    return _widened(program, value, ("...", None, ":"), (":", ":", None), (":", ":", None, ":"))


def _widened(program: Program, value: Value, *forms: tuple[str | None, ...]) -> Value | None:
    if value.op != "index" or value.args[1].op != "tuple":
        return None
    if _token_of(program, value.args[0]) is None:
        return None
    keys = tuple(map(_key, value.args[1].args))
    return value.args[0] if keys in forms else None


def _key(key: Value) -> str | None:
    if _is_whole(key):
        return ":"
    if key.op == "const" and key.data is None:
        return None
    return "..." if key.op == "const" and key.data is Ellipsis else "?"


def _is(value: Value, constant: object) -> bool:
    return value.op == "const" and value.data == constant
