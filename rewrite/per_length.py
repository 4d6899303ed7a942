"""The route of recurrent mixers: their code, once for all sequences with equally many rows."""

from __future__ import annotations

from collections.abc import Iterable

from .batchwise import joins_sequences
from .edits import decorate, site_comment
from .ir import Edit, Evidence, Match, Miss, Site
from .match import Mixer
from .per_sequence import per_sequence

SITE = "per_length"


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
