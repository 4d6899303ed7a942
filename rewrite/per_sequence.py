"""The per-sequence route: original mixing code, once per sequence, over that sequence's caches."""

from __future__ import annotations

from collections.abc import Iterable

from .edits import decorate, site_comment
from .ir import Evidence, Match, Miss, Site
from .match import Mixer


def per_sequence(
    mixer: Mixer, kind: str, evidence: Iterable[Evidence], features: Iterable[str] = ()
) -> Match | Miss:
    """Have the class's own `__call__` run once for each sequence of the batch."""
    method = mixer.cls.methods.get("__call__")
    if method is None:
        return Miss(kind, 1, "the mixer is the class's own __call__")
    text = f"{kind} runs once per sequence, over that sequence's own cache"
    edits = (
        site_comment(mixer.source, method.function.span, text, kind),
        decorate(mixer.source, method, "per_sequence", kind),
    )
    site = Site("per_sequence", mixer.place(method.function.name_span))
    return Match(
        kind,
        "per-sequence",
        mixer.cls.qualified,
        tuple(sorted(features)),
        tuple(evidence),
        (site,),
        edits,
        ("per_sequence",),
    )
