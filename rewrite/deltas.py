"""Functions that are the gated delta rule, recognised by what they compute.

A file may bring the library's function along as a copy of its own. Such a function is the rule
(Gated Delta Networks, arXiv 2412.06464) if, with its first parameters q, k, v, a, b, A, dt and what
it hands them to, it computes the gates exp(-exp(A) softplus(a + dt)) and sigmoid(b), and one step

    S <- S decay;  S <- S + (v - S k) beta k^T;  y = S q
"""

from __future__ import annotations

from .ir import Method, Value
from .match import every_value, library_call, method_call, same
from .program import Program
from .softmax import number

_Q, _K, _V, _A, _B, _RATE, _BIAS = range(7)


def is_delta_rule(program: Program, function: Method) -> bool:
    """The function is the gated delta rule: gates and a step of its first seven parameters."""
    if len(function.params) < 9:
        return False
    found: set[str] = set()
    seen: set[tuple[int, tuple[tuple[int, int], ...]]] = set()
    queue = [(function, {id(param): place for place, param in enumerate(function.params)})]
    while queue:
        method, bound = queue.pop()
        known = id(method), tuple(sorted(bound.items()))
        if known in seen:
            continue
        seen.add(known)
        for value in every_value(method):
            if _decay(program, value, bound):
                found.add("decay")
            kept = library_call(program, value, "mlx.core.sigmoid")
            if kept and bound.get(id(kept[0])) == _B:
                found.add("beta")
        if _is_step(program, method, bound):
            found.add("step")
        for effect in method.calls():
            callee = effect.value.args[0]
            called = program.function_of(callee.data) if callee.op == "global" else None
            if called is not None:
                queue.append((called, _handed(program, effect.value, called, bound)))
    return found == {"decay", "beta", "step"}


def _handed(program: Program, call: Value, called: Method, bound: dict[int, int]) -> dict[int, int]:
    """Which parameters of a called function are parameters of the first one, whole or by token."""
    names = {str(param.data[1]): param for param in called.params}
    found = {}
    for index, (keyword, given) in enumerate(zip(call.data, call.args[1:], strict=True)):
        if keyword is None and index < len(called.params):
            param = called.params[index]
        elif keyword in names:
            param = names[keyword]
        else:
            continue
        place = bound.get(id(_source(program, given)))
        if place is not None:
            found[id(param)] = place
    return found


def _source(program: Program, value: Value) -> Value:
    """What a token's entry, or heads repeated for their group, are taken from."""
    while True:
        repeated = library_call(program, value, "mlx.core.repeat")
        if value.op == "index":
            value = value.args[0]
        elif repeated:
            value = repeated[0]
        elif value.op == "phi":
            first, second = (_source(program, part) for part in value.args[1:])
            return first if first is second else value
        else:
            return value


def _decay(program: Program, value: Value, bound: dict[int, int]) -> bool:
    """`exp(-exp(A) * softplus(a + dt))`."""
    inner = library_call(program, value, "mlx.core.exp")
    if not inner or inner[0].op != "binary" or inner[0].data != "*":
        return False
    rate, gate = inner[0].args
    if rate.op != "unary" or rate.data != "-":
        return False
    grown = library_call(program, rate.args[0], "mlx.core.exp")
    soft = library_call(program, gate, "mlx.nn.softplus")
    if not grown or not soft or soft[0].op != "binary" or soft[0].data != "+":
        return False
    base = method_call(grown[0], "astype") or grown[0]
    places = [bound.get(id(part)) for part in (base, *soft[0].args)]
    return places == [_RATE, _A, _BIAS]


def _is_step(program: Program, method: Method, bound: dict[int, int]) -> bool:
    """`y, S` of one token, as the module's text has it."""
    params = {
        place: param for param in method.params if (place := bound.get(id(param))) is not None
    }
    if not {_Q, _K, _V} <= set(params):
        return False
    for effect in method.returns:
        if effect.value.op != "tuple" or len(effect.value.args) != 2:
            continue
        y = method_call(effect.value.args[0], "astype") or effect.value.args[0]
        read = _read(y, params[_Q])
        if read is None or read.op != "binary" or read.data != "+":
            continue
        kept, added = read.args
        if kept.op != "binary" or kept.data != "*" or kept.args[0].op != "param":
            continue
        if added.op != "binary" or added.data != "*":
            continue
        key, change = added.args
        if not _spread(key, params[_K], (Ellipsis, None, slice)) or change.op != "index":
            continue
        delta = change.args[0]
        if not _spread(change, delta, (Ellipsis, None)) or delta.op != "binary":
            continue
        error, beta = delta.args
        if delta.data != "*" or beta.op != "index" or error.op != "binary" or error.data != "-":
            continue
        if not _spread(beta, beta.args[0], (Ellipsis, None)) or error.args[0] is not params[_V]:
            continue
        told = _read(error.args[1], params[_K])
        if told is not None and same(told, kept):
            return True
    return False


def _read(value: Value, by: Value) -> Value | None:
    """S in `(S * by[..., None, :]).sum(axis=-1)`."""
    product = method_call(value, "sum")
    if product is None or product.op != "binary" or product.data != "*":
        return None
    if len(value.args) != 2 or number(value.args[1]) != -1:
        return None
    return product.args[0] if _spread(product.args[1], by, (Ellipsis, None, slice)) else None


def _spread(value: Value, of: Value, keys: tuple[object, ...]) -> bool:
    """`of[keys]`, with `slice` for one that takes all."""
    if value.op != "index" or value.args[0] is not of or value.args[1].op != "tuple":
        return False
    given = value.args[1].args
    return len(given) == len(keys) and all(
        (part.op == "slice" and all(side.data is None for side in part.args))
        if key is slice
        else (part.op == "const" and part.data is key)
        for part, key in zip(given, keys, strict=True)
    )
