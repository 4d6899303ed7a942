"""Causal convolutions: the modules become ops, and on rows what they convolve becomes windows.

A causal convolution of K taps keeps the last K - 1 of its inputs. In the file that is
`joined = concatenate([state, x], axis=1)` and, to be kept, `joined[:, -(K - 1):]`. Where every
token is a row of its own, `windows` gives each row the K - 1 before it in its sequence and itself,
and each sequence keeps what its last row would: `window_state`. Outside of steps both are what they
stand for.
"""

from __future__ import annotations

from collections.abc import Iterator

from .edits import Ops, add_argument, names_before, replace, site_comment, spell
from .ir import Edit, Effect, Method, Site, Value
from .match import Mixer, every_value, library_call, made_by, through, uses
from .previous import _is_slice
from .states import Reach

CONVOLUTION = "mlx.nn.Conv1d"
JOIN, KEEP = "windows", "window_state"


def convolutions(mixer: Mixer, kind: str) -> Ops:
    """`conv(x)`, where conv is a convolution that __init__ made, becomes an op.

    The op asks the module whether it has a form for it, and calls the module if it has none.
    """
    sites: list[Site] = []
    edits: list[Edit] = []
    for effect in (*mixer.attribute_calls(CONVOLUTION), *_handed_convolutions(mixer)):
        call = effect.value
        if len(call.args) == 2 and call.data == (None,):
            edits += _convolved(mixer, effect, kind)
            sites.append(Site("convolve", mixer.place(call)))
    return Ops(tuple(sites), tuple(edits), ("convolve",) if sites else ())


def _handed_convolutions(mixer: Mixer) -> Iterator[Effect]:
    """Calls of a parameter of a method that the class hands a convolution to."""
    handed = any(
        mixer._is_made_by(argument, {CONVOLUTION})
        for method in mixer.methods
        for effect in method.calls()
        for argument in effect.value.args[1:]
    )
    for method in mixer.methods if handed else ():
        for effect in method.calls():
            callee = effect.value.args[0]
            if callee.op == "param" and any(callee is param for param in method.params[1:]):
                yield effect


def _convolved(mixer: Mixer, effect: Effect, kind: str) -> Iterator[Edit]:
    call = effect.value
    assert call.syntax is not None
    callee = call.syntax.args[0].span  # not the value's: that of a parameter is where it stands
    text = f"{kind} has a convolution that needs no plan for each shape"
    yield site_comment(mixer.source, effect, text, kind)
    yield replace(mixer.source, callee, "convolve", kind)
    yield add_argument(call, mixer.source.text(callee), kind)


def windows(mixer: Mixer, kind: str) -> Ops:
    """What joins a state with rows, and what is kept of it, as ops, in the class and what it runs
    of its own file. That all states go there and nowhere else is for the proof to show."""
    sites: list[Site] = []
    edits: list[Edit] = []
    own = {id(method) for method in mixer.program.modules[mixer.cls.module].methods()}
    reach = Reach(mixer)
    for method in reach.methods:
        for effect in method.calls() if id(method) in own else ():
            state = _state(mixer, method, effect.value)
            if state is None:
                continue
            cuts = list(_cuts(mixer, method, effect.value))
            syntax = effect.value.syntax
            count = _count(mixer, state) or (cuts[0][1] if cuts else None)
            taps = count and spell(mixer.source, count, names_before(method, effect.value))
            if not cuts or taps is None or syntax is None:
                continue
            first, rows = (mixer.source.text(part.span) for part in syntax.args[1].args)
            note = f"{kind} gives each row those before it, or its sequence's state"
            edits.append(site_comment(mixer.source, effect, note, kind))
            text = f"{JOIN}({first}, {rows}, {taps})"
            edits.append(replace(mixer.source, effect.value.span, text, kind))
            sites.append(Site(JOIN, mixer.place(effect.value)))
            for cut, _, text in cuts:
                note = f"{kind} keeps what the last row of each sequence would"
                edits.append(site_comment(mixer.source, cut.span, note, kind))
                edits.append(replace(mixer.source, cut.span, f"{KEEP}({text})", kind))
                sites.append(Site(KEEP, mixer.place(cut)))
            for inner in _inner_convolutions(reach, method, effect.value):
                edits += _convolved(mixer, inner, kind)
                sites.append(Site("convolve", mixer.place(inner.value)))
    names = tuple(n for n in (JOIN, KEEP, "convolve") if any(site.rule == n for site in sites))
    return Ops(tuple(sites), tuple(edits), names)


def _inner_convolutions(reach: Reach, method: Method, join: Value) -> Iterator[Effect]:
    """`self.conv(joined)` in a class that the mixer is built from."""
    if method.owner == reach.mixer.cls.qualified:
        return
    owners = [c for c in reach.classes if any(m is method for m in c.methods.values())]
    for effect in method.calls():
        call = effect.value
        if len(call.args) != 2 or call.data != (None,):
            continue
        if any(part is join for part in _either(call.args[1])) and any(
            made_by(reach.program, cls, call.args[0], {CONVOLUTION}) for cls in owners
        ):
            yield effect


def _state(mixer: Mixer, method: Method, call: Value) -> Value | None:
    """The state in `concatenate([state, x], axis=1)`: what a cache holds, or is handed over."""
    got = library_call(mixer.program, call, "mlx.core.concatenate")
    if got is None or len(got) != 2 or got[0].op not in ("list", "tuple"):
        return None
    if len(got[0].args) != 2 or got[1].op != "const" or got[1].data != 1:
        return None
    if call.syntax is None or call.syntax.args[1].op not in ("list", "tuple"):
        return None
    state = got[0].args[0]
    handed = set(map(id, method.params[1:]))
    for part in through(state):
        if id(part) in handed or (part.op == "index" and mixer.is_cache(part.args[0])):
            return state
    return None


def _cuts(mixer: Mixer, method: Method, join: Value) -> Iterator[tuple[Value, Value, str]]:
    """`joined[:, -n:]`, contiguous or not, n, and both as arguments of an op."""
    table = uses(method)
    for value in every_value(method):
        if value.op != "index" or value.args[1].op != "tuple":
            continue
        first, middle, *more = (*value.args[1].args, None, None)[:4]
        if middle is None or middle.op != "slice":
            continue
        if not any(part is join for part in _either(value.args[0])):
            continue
        if not all(part is None or _is_slice(part, None, None) for part in (first, *more)):
            continue
        lower, upper, step = middle.args[:3]
        if any(part.op != "const" or part.data is not None for part in (upper, step)):
            continue
        syntax = value.syntax
        if lower.op != "unary" or lower.data != "-" or syntax is None:
            continue
        key = syntax.args[1]
        if key.op != "tuple" or key.args[1].op != "slice" or key.args[1].args[0].op != "unary":
            continue  # a key that was made before
        parts = syntax.args[0].span, key.args[1].args[0].args[0].span
        text = ", ".join(map(mixer.source.text, parts))
        users = [use.user for use in table.get(id(value), ()) if use.user is not None]
        whole = [u for u in users if library_call(mixer.program, u, "mlx.core.contiguous")]
        yield (whole[0] if len(whole) == len(users) == 1 else value), lower.args[0], text


def _either(value: Value) -> Iterator[Value]:
    """What a value may be."""
    stack = [value]
    while stack:
        current = stack.pop()
        yield current
        if current.op == "phi":
            stack.extend(current.args[1:])


def _count(mixer: Mixer, state: Value) -> Value | None:
    """K - 1 in `zeros((B, K - 1, C))`, which stands for a state that is not there yet."""
    for arm in state.args[1:] if state.op == "phi" else ():
        got = library_call(mixer.program, arm, "mlx.core.zeros")
        if got and got[0].op in ("tuple", "list") and len(got[0].args) == 3:
            count: Value = got[0].args[1]
            return count
    return None
