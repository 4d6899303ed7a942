"""The route of recurrent mixers: their code, once for all sequences with equally many rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from .axes import Failure
from .batchwise import kept_apart, rows_alone
from .convolutions import convolutions, windows
from .edits import Ops, decorate, rename_callee, site_comment
from .ir import Edit, Effect, Evidence, Match, Miss, Site
from .match import Mixer, callee_name
from .per_sequence import per_sequence

SITE, ROWS_SITE = "per_length", "on_rows"
# mlx_vlm's recurrences can read and write a cache by themselves, and keep more than one state.
_ELSEWHERE = frozenset({"*", "**", "state_steps"})
_CACHED = frozenset({"cache", "cache_index"})


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
    found = _on_rows(mixer, kind, (*replaced.edits, *more.edits), ranks) if replaced else None
    rows, positions = found or (Ops(), ())
    name = SITE if found is None else ROWS_SITE
    if found is not None:
        text = f"{kind} runs on all rows, their states are with ops"
    else:
        text = f"{kind} runs once for all sequences with equally many rows, over their states"
    own = (
        site_comment(mixer.source, method.function.span, text, kind),
        decorate(mixer.source, method, decorator(name, ranks, positions), kind),
    )
    site = Site(name, mixer.place(method.function.name_span))
    return Match(
        kind,
        "kernel" if replaced else "gathered",
        mixer.cls.qualified,
        tuple(sorted(features)),
        tuple(evidence),
        (site, *replaced.sites, *more.sites, *rows.sites),
        (*own, *replaced.edits, *more.edits, *rows.edits),
        (name, *replaced.imports, *more.imports, *rows.imports),
    )


def _on_rows(
    mixer: Mixer, kind: str, edits: tuple[Edit, ...], ranks: Mapping[str, tuple[int, ...]]
) -> tuple[Ops, tuple[str, ...]] | None:
    """What else a mixer needs to run on rows instead, and which of its parameters must be the rows'
    positions then; None where that is not proved."""
    found = windows(mixer, kind)
    positions = rows_alone(mixer, (*edits, *found.edits), ranks)
    return None if positions is None else (found, positions)


def decorator(
    name: str, ranks: Mapping[str, tuple[int, ...]], positions: Iterable[str] = ()
) -> str:
    """The decorator, with the ranks of arrays that a mixer is proved for, x [N, L, D] aside, and
    the parameters that must be positions in front."""
    (_, x), *others = ranks.items()
    told = dict(others) if x == (3,) else dict(ranks)
    quoted = (f'"{name}"' for name in positions)
    given = ", ".join((*quoted, *(f"{n}={r[0] if len(r) == 1 else r}" for n, r in told.items())))
    return f"{name}({given})" if given else name
