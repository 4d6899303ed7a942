"""What the kinds of softmax attention share: following fetched keys to the sites that read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields

from .branches import decided, is_dead
from .edits import receiver_text, rename_callee, replace, site_comment
from .ir import ClassFacts, Edit, Evidence, Match, Method, Miss, Site, Value
from .match import Attend, Flow, Mixer, attends, flow, live, method_call, uses
from .program import Program


@dataclass(frozen=True, slots=True)
class Sites:
    """What one method contributes to a match."""

    edits: tuple[Edit, ...]
    evidence: tuple[Evidence, ...]
    sites: tuple[Site, ...]


def fetched_flow(mixer: Mixer, method: Method, consumers: Iterable[Value] = ()) -> Flow:
    """Where fetched keys and values go in a method: its own, and those handed in by a caller or
    handed back by another method of the class."""
    calls = [a for a in mixer.attends if a.method is method]
    roots = [f.call for f in mixer.fetches if f.method is method]
    roots += [v for a in calls for v in (a.keys, a.values) if live(v).op == "param"]
    returned, other = _handed_back(mixer, method)
    found = flow(mixer, method, [*roots, *returned], [*(a.call for a in calls), *consumers])
    masks = mask_values(mixer.program, mixer.cls, method)

    def decide(test: Value) -> bool | None:
        return decided(mixer.program, test, masks)

    dead = {id(e.value) for e in method.calls() if e.path.conditions and is_dead(e, decide)}
    foreign = tuple(v for v in (*found.foreign, *other) if id(v) not in dead)
    return replace_fields(found, foreign=foreign)


def mask_values(program: Program, cls: ClassFacts, method: Method) -> frozenset[int]:
    """Values of a method that are the mask of a fused attention call, in it or in the method of
    its class that gets it back. On rows such a mask is no array and no word: the op that takes
    its place refuses all but masks of rows."""
    found = [a.mask for a in attends(program, method) if a.mask is not None]
    for other in cls.methods.values() if not found else ():
        for attend in attends(program, other):
            for mask in _sources(attend.mask) if attend.mask is not None else ():
                if mask.op != "item" or mask.args[0].op != "call":
                    continue
                if any(m is method for _, m in program.callees(mask.args[0], cls, other)):
                    found += [
                        effect.value.args[mask.data]
                        for effect in method.returns
                        if effect.value.op == "tuple" and mask.data < len(effect.value.args)
                    ]
    return frozenset(id(source) for mask in found for source in _sources(mask))


def _sources(mask: Value) -> list[Value]:
    """What a mask is, before branches and cuts."""
    if mask.op == "phi":
        return [source for part in mask.args[1:] for source in _sources(part)]
    if mask.op == "index":
        return _sources(mask.args[0])
    return [mask] if mask.op in ("param", "item") else []


def _handed_back(mixer: Mixer, method: Method) -> tuple[list[Value], list[Value]]:
    """Items of `self.helper(...)` that are keys or values the helper fetched; and what takes the
    helper's result as a whole."""
    fetching = {id(fetch.method): fetch.method for fetch in mixer.fetches}
    items: list[Value] = []
    other: list[Value] = []
    for call in (effect.value for effect in method.calls()):
        reached = [found for _, found in mixer.program.callees(call, mixer.cls, method)]
        if not any(id(found) in fetching and found is not method for found in reached):
            continue
        positions = [_fetched_positions(mixer, found) for found in reached]
        if not any(positions):
            continue
        for use in uses(method).get(id(call), ()):
            if use.user is None or use.user.op != "item":
                other.append(use.user or call)
            elif all(use.user.data in held for held in positions):
                items.append(use.user)
            elif any(use.user.data in held for held in positions):
                other.append(use.user)
    return items, other


def _fetched_positions(mixer: Mixer, helper: Method) -> frozenset[int]:
    """Where fetched keys and values stand in the tuples that a method returns."""
    roots = [f.call for f in mixer.fetches if f.method is helper]
    held = flow(mixer, helper, roots, [a.call for a in mixer.attends if a.method is helper])
    return frozenset(
        position
        for effect in helper.returns
        if effect.value.op == "tuple"
        for position, part in enumerate(effect.value.args)
        if held.holds(part) or held.holds(live(part))
    )


def attend_sites(mixer: Mixer, method: Method, found: Flow, kind: str) -> Sites | Miss:
    """The fused attention calls of a method, each reading what flows from a fetch."""
    narrow = next((call for call in found.casts if not _widens(mixer, call)), None)
    if narrow is not None:
        return Miss(kind, 3, "fetched keys keep their precision", mixer.place(narrow))
    edits: list[Edit] = [_drop_cast(mixer, call, kind) for call in found.casts]
    evidence: list[Evidence] = []
    sites: list[Site] = []
    for attend in mixer.attends:
        if attend.method is not method:
            continue
        for value in (attend.keys, attend.values):
            if not (found.holds(value) or found.holds(live(value))):
                return Miss(kind, 2, "keys and values come from a cache", mixer.place(value))
        if attend.mask is not None and not is_plain_mask(attend.mask):
            where = mixer.place(attend.mask)
            return Miss(kind, 3, "the mask is passed on as it was made", where)
        edits += attend_edits(mixer, attend, kind)
        evidence.append(mixer.evidence("attend", attend.call))
        if attend.mask is not None:
            evidence.append(mixer.evidence("mask", attend.mask))
        sites.append(Site("paged_attention", mixer.place(attend.call)))
    return Sites(tuple(edits), tuple(evidence), tuple(sites))


def attend_edits(mixer: Mixer, attend: Attend, kind: str) -> list[Edit]:
    text = f"{kind} reads its keys and values from pages"
    return [
        site_comment(mixer.source, attend.effect, text, kind),
        rename_callee(mixer.source, attend.call, "paged_attention", kind),
    ]


def attention_match(mixer: Mixer, kind: str, parts: Sequence[Sites]) -> Match:
    """A match on the kernel route from what the methods of a class contribute."""
    evidence = [mixer.evidence("fetch", fetch.call) for fetch in mixer.fetches]
    evidence += [item for part in parts for item in part.evidence]
    sites = tuple(site for part in parts for site in part.sites)
    return Match(
        kind,
        "kernel",
        mixer.cls.qualified,
        _features(mixer, bool(sites)),
        tuple(evidence),
        sites,
        tuple(edit for part in parts for edit in part.edits),
        ("paged_attention",) if sites else (),
    )


def is_plain_mask(mask: Value) -> bool:
    """The mask is handed on, not computed with."""
    if mask.op in ("param", "elem", "item"):
        return True
    if mask.op == "const":
        return mask.data is None
    if mask.op in ("index", "attr"):
        return is_plain_mask(mask.args[0])
    if mask.op == "phi":
        return all(is_plain_mask(part) for part in mask.args[1:])
    if mask.op in ("loop", "carried"):
        return all(is_plain_mask(part) for part in mask.args)
    return mask.op == "call" and mask.args[0].op == "global"


def _widens(mixer: Mixer, cast: Value) -> bool:
    """A cast to float32, or to the type of something else in the computation."""
    target = cast.args[1] if len(cast.args) == 2 else None
    if target is None or target.op != "global":
        return target is not None and target.op in ("attr", "item", "index", "phi")
    return mixer.program.resolve(target.data) == "mlx.core.float32"


def _drop_cast(mixer: Mixer, call: Value, kind: str) -> Edit:
    """Pages keep their dtype; attention computes in the wider of the queries' and the pages'."""
    return replace(mixer.source, call.span, receiver_text(mixer.source, call), kind)


def _features(mixer: Mixer, attends: bool) -> tuple[str, ...]:
    found = set()
    for attend in mixer.attends:
        if attend.sinks is not None and attend.sinks.op != "const":
            found.add("sinks")
        if live(attend.keys).op == "param":
            found.add("keys from the caller")
    for fetch in mixer.fetches:
        if method_call(fetch.call, "keys_and_values") is not None:
            found.add("reads what another layer wrote")
    if mixer.fetches and not attends:
        found.add("fetches for others")
    return tuple(sorted(found))
