"""Mixers that mix tokens only in functions that are ops: all else in them runs on rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .edits import Ops, decorate, replace, site_comment
from .ir import Edit, Effect, Evidence, Match, Method, Site, Value
from .match import Mixer, is_none_test, library_call, place, size_of
from .program import Program
from .scans import _is_whole
from .states import Reach, is_token_shift


def token_rows(
    mixer: Mixer,
    kind: str,
    evidence: Iterable[Evidence],
    features: Iterable[str],
    scans: Ops | None,
    otherwise: Match,
) -> Match | None:
    """Have token shifts, and the `scans`, read states of a ragged batch; the class stays as it is.

    What the class stores is each sequence's last row, or what a scan returned. That nothing else in
    it mixes rows is for the proof of the file to show: without one it becomes `otherwise`. None
    where the structure is another.
    """
    reach = Reach(mixer)
    if scans is None or (reach.token_loops() and not scans):
        return None
    sites: list[Site] = []
    edits: list[Edit] = []
    own = set(map(id, mixer.program.modules[mixer.cls.module].methods()))
    for method in reach.methods:
        if not is_token_shift(mixer.program, method):
            continue
        names = shifted(mixer.program, method)
        if names is None or id(method) not in own or method.function.decorators:
            return None
        text = f"{kind} gives each row the one before it, or its sequence's state"
        edits.append(site_comment(mixer.source, method.function.span, text, kind))
        edits.append(
            decorate(mixer.source, method, f'shifted_rows("{names[0]}", "{names[1]}")', kind)
        )
        sites.append(Site("shifted_rows", place(mixer.source, method.function.name_span)))
    for effect in _stores(mixer):
        kept = _kept(mixer, effect, kind)
        if kept is None and not scans:
            return None
        if kept is not None:
            sites.append(Site("last_of_sequences", mixer.place(effect)))
            edits += kept
    if {site.rule for site in sites} != {"shifted_rows", "last_of_sequences"}:
        return None
    return Match(
        kind,
        "kernel",
        mixer.cls.qualified,
        tuple(sorted(features)),
        tuple(evidence),
        (*sites, *scans.sites),
        (*edits, *scans.edits),
        ("shifted_rows", "last_of_sequences", *scans.imports),
        otherwise,
    )


def _stores(mixer: Mixer) -> Iterator[Effect]:
    """Stores of entries of caches, those behind an earlier store too."""
    for method in mixer.methods:
        for effect in method.effects:
            if effect.kind == "store" and effect.target is not None and effect.target.op == "index":
                base = effect.target.args[0]
                while base.op == "setitem":
                    base = base.args[0]
                if mixer.is_cache(base):
                    yield effect


def _kept(mixer: Mixer, effect: Effect, kind: str) -> tuple[Edit, ...] | None:
    """`cache[i] = x[:, -1:]`, with x of any rank, and the edits that make it an op."""
    value, source = effect.value, mixer.source
    span, statement = value.span, effect.statement.span
    if not _is_last(value) or not statement.start <= span.start < span.end <= statement.end:
        return None
    if effect.path.in_loop or value.syntax is None:
        return None
    base = source.text(value.syntax.args[0].span)
    comment = f"{kind} keeps each sequence's last row"
    return (
        site_comment(source, effect, comment, kind),
        replace(source, span, f"last_of_sequences({base})", kind),
    )


def _is_last(value: Value) -> bool:
    """`x[:, -1:]`, or with whole axes behind it."""
    if value.op != "index" or value.args[1].op != "tuple":
        return False
    first, last, *more = (*value.args[1].args, None, None)
    if first is None or last is None or last.op != "slice" or not _is_whole(first):
        return False
    lower, upper, step = last.args[:3]
    plain = all(part.op == "const" and part.data is None for part in (upper, step))
    begins = lower.op == "const" and lower.data == -1
    return plain and begins and all(part is None or _is_whole(part) for part in more)


# ------------------------------------------------------------------------------------ token shifts


def shifted(program: Program, method: Method) -> tuple[str, str] | None:
    """The names of x and of the state, if a function gives each token of x [B, L, D] the one before
    it, from the state or zeros [B, 1, D] at the beginning, and does nothing else.

    One token alone may be a branch of its own.
    """
    if any(effect.kind in ("store", "augment") for effect in method.effects):
        return None
    joined = [found for e in method.returns if (found := _joined(program, e.value)) is not None]
    if len(joined) != 1:
        return None
    x, before = joined[0]
    for effect in method.returns:
        tests = [_counted(test) is x for test, _ in effect.path.conditions]
        alone = any(taken for _, taken in effect.path.conditions)
        general = _joined(program, effect.value) is not None
        if not all(tests) or alone == general or not (general or effect.value is before):
            return None
    state = _state(program, before, x)
    if state is None or x.op != "param" or state is x:
        return None
    return str(x.data[1]), str(state.data[1])


def _joined(program: Program, value: Value) -> tuple[Value, Value] | None:
    """x and the state in `concatenate([state, x[:, :-1]], axis=1)`."""
    got = library_call(program, value, "mlx.core.concatenate")
    if got is None or len(got) != 2 or got[0].op != "list" or len(got[0].args) != 2:
        return None
    if got[1].op != "const" or got[1].data != 1 or value.data not in ((None, "axis"), (None, None)):
        return None
    before, rest = got[0].args
    if rest.op != "index" or rest.args[1].op != "tuple":
        return None
    first, middle, *more = rest.args[1].args
    if middle.op != "slice" or not _is_whole(first) or not all(map(_is_whole, more)):
        return None
    lower, upper, step = middle.args[:3]
    if any(part.op != "const" or part.data is not None for part in (lower, step)):
        return None
    return (rest.args[0], before) if upper.op == "const" and upper.data == -1 else None


def _state(program: Program, before: Value, x: Value) -> Value | None:
    """s in `zeros((B, 1, D), x.dtype) if s is None else s`, B and D those of x."""
    test = is_none_test(before.args[0]) if before.op == "phi" else None
    if test is None or test[0].op != "param":
        return None
    given, absent = before.args[2], before.args[1]
    if not test[1]:
        given, absent = absent, given
    got = library_call(program, absent, "mlx.core.zeros")
    if given is not test[0] or got is None or len(got) != 2 or got[0].op not in ("tuple", "list"):
        return None
    sizes, dtype = got[0].args, got[1]
    of_x = dtype.op == "attr" and dtype.data == "dtype" and dtype.args[0] is x
    if not of_x or len(sizes) != 3 or sizes[1].op != "const" or sizes[1].data != 1:
        return None
    return given if size_of(sizes[0]) == (x, 0) and size_of(sizes[2]) == (x, 2) else None


def _counted(test: Value) -> Value | None:
    """x in `x.shape[1] == 1`."""
    if test.op != "compare" or test.data != ("==",):
        return None
    size, one = test.args
    if one.op != "const" or one.data != 1:
        return None
    found = size_of(size)
    return found[0] if found is not None and found[1] == 1 else None
