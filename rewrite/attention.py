"""What the kinds of softmax attention share: following fetched keys to the sites that read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .edits import receiver_text, rename_callee, replace, site_comment
from .ir import Edit, Evidence, Match, Method, Miss, Site, Value
from .match import Attend, Flow, Mixer, flow, live, method_call


@dataclass(frozen=True, slots=True)
class Sites:
    """What one method contributes to a match."""

    edits: tuple[Edit, ...]
    evidence: tuple[Evidence, ...]
    sites: tuple[Site, ...]


def fetched_flow(mixer: Mixer, method: Method, consumers: Iterable[Value] = ()) -> Flow:
    """Where fetched keys and values (and keys handed in by a caller) go in a method."""
    calls = [a for a in mixer.attends if a.method is method]
    roots = [f.call for f in mixer.fetches if f.method is method]
    roots += [v for a in calls for v in (a.keys, a.values) if live(v).op == "param"]
    return flow(mixer, method, roots, [*(a.call for a in calls), *consumers])


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
