"""The route of recurrent mixers: their code, once for all sequences with equally many rows."""

from __future__ import annotations

from collections.abc import Iterable

from .batchwise import joins_sequences
from .edits import decorate, rename_callee, site_comment
from .ir import Edit, Effect, Evidence, Match, Miss, Site
from .match import Mixer, callee_name
from .per_sequence import per_sequence

SITE = "per_length"


def recurrence_sites(
    mixer: Mixer, calls: Iterable[Effect], name: str, op: str, kind: str
) -> tuple[tuple[Site, ...], tuple[Edit, ...], tuple[str, ...]]:
    """Sites, edits and imports where a library's recurrence becomes an op of ours.

    `name` is the library's function; calls of others, and calls with unpacked arguments, stay.
    """
    sites: list[Site] = []
    edits: list[Edit] = []
    for effect in calls:
        call = effect.value
        if callee_name(mixer.program, call) != name or {"*", "**"} & set(call.data):
            continue
        text = f"{kind} works out a prompt in chunks, and a token in one step"
        edits.append(site_comment(mixer.source, effect, text, kind))
        edits.append(rename_callee(mixer.source, call, op, kind))
        sites.append(Site(op, mixer.place(call)))
    return tuple(sites), tuple(edits), (op,) if edits else ()


def per_length(
    mixer: Mixer,
    kind: str,
    evidence: Iterable[Evidence],
    features: Iterable[str] = (),
    *,
    sites: Iterable[Site] = (),
    edits: Iterable[Edit] = (),
    imports: Iterable[str] = (),
) -> Match | Miss:
    """Have the class's own `__call__` run once for each number of rows that sequences have.

    If it may do something across sequences, once per sequence instead. With `edits` of recurrences
    into ops the route is "kernel", else "gathered".
    """
    method = mixer.cls.methods.get("__call__")
    if method is None:
        return Miss(kind, 1, "the mixer is the class's own __call__")
    if joins_sequences(mixer) is not None:
        return per_sequence(mixer, kind, evidence, features)
    text = f"{kind} runs once for all sequences with equally many rows, over their states"
    own = (
        site_comment(mixer.source, method.function.span, text, kind),
        decorate(mixer.source, method, "per_length", kind),
    )
    site = Site(SITE, mixer.place(method.function.name_span))
    found = tuple(edits)
    return Match(
        kind,
        "kernel" if found else "gathered",
        mixer.cls.qualified,
        tuple(sorted(features)),
        tuple(evidence),
        (site, *sites),
        (*own, *found),
        ("per_length", *imports),
    )
