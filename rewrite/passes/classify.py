"""Which kind each token-mixing class is; exactly one, or a refusal that says why not."""

from __future__ import annotations

from ..ir import ClassFacts, Diagnostic, Match, Miss, ModuleFacts, Refusal
from ..kinds import all_kinds
from ..match import Mixer
from ..program import Program


def classify(program: Program, module: ModuleFacts) -> dict[str, Match | Refusal]:
    """Judge every class of a module that mixes tokens, by qualified class name."""
    found: dict[str, Match | Refusal] = {}
    for cls in module.classes.values():
        judged = classify_class(program, cls)
        if judged is not None:
            found[cls.qualified] = judged
    return found


def classify_class(program: Program, cls: ClassFacts) -> Match | Refusal | None:
    """What one class is in a program; None if it does nothing about tokens and caches."""
    mixer = Mixer(program, cls)
    return _judge(mixer) if mixer.mixes else _bystander(mixer)


def _judge(mixer: Mixer) -> Match | Refusal | None:
    results = [kind.match(mixer) for kind in all_kinds()]
    matches = [result for result in results if isinstance(result, Match)]
    if len(matches) == 1:
        return matches[0]
    where = mixer.place(mixer.cls.syntax.name_span)
    name = mixer.cls.name
    if matches:
        kinds = " and ".join(sorted(match.kind for match in matches))
        message = f"`{name}` is taken by {kinds}"
        return Refusal(mixer.cls.qualified, (Diagnostic("two-kinds", message, where),))
    misses = [result for result in results if isinstance(result, Miss)]
    nearest = max(misses, key=lambda miss: miss.held)
    if mixer.attends and not (mixer.fetches or mixer.state_stores or mixer.state_updates):
        return Refusal(
            mixer.cls.qualified,
            (
                Diagnostic(
                    "uncached-attention",
                    f"`{name}` attends to keys that come from no cache",
                    mixer.place(mixer.attends[0].call),
                    "these keys are not fetched",
                ),
            ),
        )
    diagnostic = Diagnostic(
        "no-kind",
        f"`{name}` mixes tokens in a way no kind recognises",
        nearest.place or where,
        f"{nearest.kind} wants: {nearest.missing}",
        f"{nearest.kind} ({nearest.held} facts held)",
    )
    return Refusal(mixer.cls.qualified, (diagnostic,))


def _bystander(mixer: Mixer) -> Refusal | None:
    """A class that handles caches without mixing: it may only pass them on."""
    reads = mixer.cache_reads()
    if not reads:
        return None
    diagnostic = Diagnostic(
        "cache-use",
        f"`{mixer.cls.name}` reads `.{reads[0].data}` of a cache",
        mixer.place(reads[0]),
        "a paged cache has no such thing",
    )
    return Refusal(mixer.cls.qualified, (diagnostic,))
