"""Functions that work out a recurrence in chunks of their own, known by how they take one token."""

from __future__ import annotations

from .edits import Ops, decorate, site_comment
from .inlining import expanded
from .ir import Edit, Effect, Method, Site, Value
from .match import Mixer, every_value, is_none_test, library_call, method_call, place, same, size_of
from .program import Program
from .scans import _begins, _is_whole
from .states import Reach


def chunked_lightning(mixer: Mixer, kind: str) -> Ops | None:
    """Linear attention with a decay for each head, written in chunks, as ops; None if the class has
    other loops.

    What such a function does with one token says which recurrence it is. That its chunks are the
    same is not shown here: the op compares both when it is first called, and refuses to run if they
    differ.
    """
    sites: list[Site] = []
    edits: list[Edit] = []
    own = mixer.program.modules[mixer.cls.module].functions.values()
    for method in Reach(mixer).methods:
        if not any(value.op in ("loop", "carried") for value in every_value(method)):
            continue
        names = lightning_token(mixer.program, method)
        if names is None or not any(method is function for function in own):
            return None
        text = f"{kind} works out its recurrence in chunks, compared with these when first called"
        edits.append(site_comment(mixer.source, method.function.span, text, kind))
        arguments = ", ".join(f'"{name}"' for name in names)
        op = f"lightning_scan({arguments}, compared=True)"
        edits.append(decorate(mixer.source, method, op, kind))
        sites.append(Site("lightning_scan", place(mixer.source, method.function.name_span)))
    return Ops(tuple(sites), tuple(edits), ("lightning_scan",) if sites else ())


def lightning_token(program: Program, method: Method) -> tuple[str, ...] | None:
    """Names of q, k, v, g, scale and h, if the function takes one token [B, H, 1, D] as
    h <- h e^g + k^T v, y = (q scale) h, and carries the same h through its chunks.

    For more than one token both a y and the last h must be returned, the latter from a loop that
    begins with the same state.
    """
    if any(effect.kind in ("store", "augment") for effect in method.effects):
        return None
    if any(parameter.kind in ("*", "**") for parameter in method.function.parameters):
        return None
    single = [effect for effect in method.returns if _of_one(effect) is not None]
    general = [effect for effect in method.returns if _of_one(effect) is None]
    plain = [effect for effect in single if _without_options(effect)]
    if len(plain) != 1 or len(general) != 1 or plain[0].value.op != "tuple":
        return None
    if general[0].value.op != "tuple" or len(general[0].value.args) != 2:
        return None
    after, found = general[0].value.args[1], _token(program, plain[0].value)
    if found is None or after.op != "loop":
        return None
    q, k, v, g, scale, start = found
    h = next((part for part in start.args[1:] if part.op == "param"), None)
    if h is None or after.args[0] is not start or not _begins(program, start, h):
        return None
    if _of_one(plain[0]) is not q:
        return None
    roles = (q, k, v, g, scale, h)
    names = [str(part.data[1]) for part in roles if part.op == "param"]
    return tuple(names) if len(set(names)) == len(roles) else None


def _of_one(effect: Effect) -> Value | None:
    """x where the effect happens under `x.shape[2] == 1` and nothing else that counts tokens."""
    for test, taken in effect.path.conditions:
        if taken and test.op == "compare" and test.data == ("==",):
            size, one = test.args
            found = size_of(size)
            if one.op == "const" and one.data == 1 and found is not None and found[1] == 2:
                return found[0]
    return None


def _without_options(effect: Effect) -> bool:
    """Every further condition holds where arguments that may be left out are."""
    for test, taken in effect.path.conditions:
        none = is_none_test(test)
        if none is not None and none[0].op == "param" and none[1] != taken:
            return False
    return True


def _token(program: Program, value: Value) -> tuple[Value, ...] | None:
    """q, k, v, g, scale and the state before, in `(q * scale) @ h, h`, h = h e^g + k^T v."""
    y, h = (expanded(program, part) for part in value.args)
    if y is None or h is None or h.op != "binary" or h.data != "+":
        return None
    cast = method_call(y, "astype")
    y = cast if cast is not None else y
    if y.op != "binary" or y.data != "@" or not same(y.args[1], h):
        return None
    scaled = y.args[0]
    if scaled.op != "binary" or scaled.data != "*":
        return None
    for product, added in (h.args, h.args[::-1]):
        if added.op != "binary" or added.data != "@" or product.op != "binary":
            continue
        k, v = _turned(added.args[0]), added.args[1]
        for held, decay in (product.args, product.args[::-1]) if product.data == "*" else ():
            gate = _gate(program, decay)
            if gate is not None and k is not None and held.op == "phi":
                return scaled.args[0], k, v, gate, scaled.args[1], held
    return None


def _gate(program: Program, decay: Value) -> Value | None:
    """g in `exp(g)[:, None, None]`, with or without a cast."""
    cast = method_call(decay, "astype")
    decay = cast if cast is not None else decay
    if decay.op != "index" or decay.args[1].op != "tuple":
        return None
    whole, *new = decay.args[1].args
    if not _is_whole(whole) or len(new) != 2:
        return None
    if any(key.op != "const" or key.data is not None for key in new):
        return None
    got = library_call(program, decay.args[0], "mlx.core.exp")
    return got[0] if got is not None and len(got) == 1 and got[0].op == "param" else None


def _turned(value: Value) -> Value | None:
    """x in `x.transpose(0, 1, 3, 2)` or `x.swapaxes(-1, -2)`."""
    for name, orders in (("transpose", ([0, 1, 3, 2],)), ("swapaxes", ([-1, -2], [-2, -1]))):
        base = method_call(value, name)
        if base is not None:
            order = [part.data for part in value.args[1:] if part.op == "const"]
            return base if order in orders else None
    return None
