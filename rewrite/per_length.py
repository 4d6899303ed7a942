"""The route of recurrent mixers: their code, once for all sequences with equally many rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from .axes import Failure
from .batchwise import kept_apart
from .edits import add_argument, decorate, rename_callee, replace, site_comment
from .ir import Edit, Effect, Evidence, Match, Miss, Site
from .match import Mixer, callee_name
from .per_sequence import per_sequence

SITE = "per_length"
CONVOLUTION = "mlx.nn.Conv1d"
# mlx_vlm's recurrences can read and write a cache by themselves, and keep more than one state.
_ELSEWHERE = frozenset({"*", "**", "state_steps"})
_CACHED = frozenset({"cache", "cache_index"})


@dataclass(frozen=True, slots=True)
class Ops:
    """Calls that become ops of ours."""

    sites: tuple[Site, ...] = ()
    edits: tuple[Edit, ...] = ()
    imports: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.sites)


def recurrences(
    mixer: Mixer, calls: Iterable[Effect], names: Collection[str] | None, op: str, kind: str
) -> Ops:
    """A library's recurrence becomes an op that takes the same arguments.

    `names` are the library's function; calls of others stay, and so do calls with unpacked
    arguments, and those that leave the state to a cache. With None, all calls are of that function,
    and the op keeps states in a cache as it does.
    """
    sites: list[Site] = []
    edits: list[Edit] = []
    for effect in calls:
        call = effect.value
        given = set(call.data)
        if _ELSEWHERE & given or (names is not None and _CACHED & given):
            continue
        if names is not None and callee_name(mixer.program, call) not in names:
            continue
        text = f"{kind} works out a prompt in chunks, and a token in one step"
        edits.append(site_comment(mixer.source, effect, text, kind))
        edits.append(rename_callee(mixer.source, call, op, kind))
        sites.append(Site(op, mixer.place(call)))
    return Ops(tuple(sites), tuple(edits), (op,) if sites else ())


def convolutions(mixer: Mixer, kind: str) -> Ops:
    """`conv(x)`, where conv is a convolution that __init__ made, becomes an op.

    The op asks the module whether it has a form for it, and calls the module if it has none.
    """
    sites: list[Site] = []
    edits: list[Edit] = []
    for effect in (*mixer.attribute_calls(CONVOLUTION), *_handed_convolutions(mixer)):
        call = effect.value
        if len(call.args) != 2 or call.data != (None,):
            continue
        assert call.syntax is not None
        callee = call.syntax.args[0].span  # not the value's: that of a parameter is where it stands
        text = f"{kind} has a convolution that needs no plan for each shape"
        edits.append(site_comment(mixer.source, effect, text, kind))
        edits.append(replace(mixer.source, callee, "convolve", kind))
        edits.append(add_argument(call, mixer.source.text(callee), kind))
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


def per_length(
    mixer: Mixer,
    kind: str,
    evidence: Iterable[Evidence],
    features: Iterable[str] = (),
    ops: Ops | None = None,
    rank: int = 3,
) -> Match | Miss:
    """Have the class's own `__call__` run once for each number of rows that sequences have.

    If it may do something across sequences, once per sequence instead. With `ops`, which must be
    all that mixes tokens beside convolutions, the route is "kernel", else "gathered".
    """
    method = mixer.cls.methods.get("__call__")
    if method is None:
        return Miss(kind, 1, "the mixer is the class's own __call__")
    replaced, more = ops or Ops(), convolutions(mixer, kind)
    if replaced.imports == more.imports:  # the kind is its convolutions
        more = Ops()
    ranks = kept_apart(mixer, (*replaced.edits, *more.edits), rank)
    if isinstance(ranks, Failure):
        where = ranks.place or mixer.place(method.function.name_span)
        why = Evidence(f"not proved to keep sequences apart: {ranks.message}", where)
        return per_sequence(mixer, kind, (*evidence, why), features)
    text = f"{kind} runs once for all sequences with equally many rows, over their states"
    own = (
        site_comment(mixer.source, method.function.span, text, kind),
        decorate(mixer.source, method, decorator(ranks), kind),
    )
    site = Site(SITE, mixer.place(method.function.name_span))
    return Match(
        kind,
        "kernel" if replaced else "gathered",
        mixer.cls.qualified,
        tuple(sorted(features)),
        tuple(evidence),
        (site, *replaced.sites, *more.sites),
        (*own, *replaced.edits, *more.edits),
        ("per_length", *replaced.imports, *more.imports),
    )


def decorator(ranks: Mapping[str, tuple[int, ...]]) -> str:
    """The decorator, with the ranks of arrays that a mixer is proved for, x [N, L, D] aside."""
    (_, x), *others = ranks.items()
    told = dict(others) if x == (3,) else dict(ranks)
    given = ", ".join(f"{n}={r[0] if len(r) == 1 else r}" for n, r in told.items())
    return f"{SITE}({given})" if given else SITE
