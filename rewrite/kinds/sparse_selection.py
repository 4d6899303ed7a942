"""sparse_selection: attention over a selection of the cached keys.

Matches     a class that ranks cached keys (an indexer, block scores), itself or by a module it
            holds, and attends to the best. DeepSeek-V3.2 sparse attention (DSA), MiniMax blocks.
Refuses     everything that attends to all keys it may see.
Becomes     an indexer: its keys in pages, `paged_top_positions` in the place of its scores. Latent
            attention to what an indexer ranks: `paged_latent_attention` over those positions.
            Everything else: the original code, once per sequence.
"""

from __future__ import annotations

from ..edits import delete_statement, insert, names_before, replace, site_comment, spell
from ..ir import ClassFacts, Evidence, Match, Miss, Site
from ..latents import paged_latents
from ..match import Mixer
from ..per_sequence import per_sequence
from ..rankings import Ranking, ranking, ranks, statements_of
from ..regions import bound_names, read_of
from . import Counter, Example
from .latent_mla import _HEAD, _MLA

NAME = "sparse_selection"


def match(mixer: Mixer) -> Match | Miss:
    if not mixer.fetches:
        return Miss(NAME, 0, "a fetch from a cache")
    if mixer.state_stores:
        return Miss(NAME, 1, "no state beside keys and values")
    rankings = ranks(mixer)
    if not rankings:
        return Miss(NAME, 1, "keys are ranked, by the class or a module it holds")
    own = {id(effect) for method in mixer.methods for effect in method.effects}
    evidence = [mixer.evidence("keys ranked", e) for e in rankings if id(e) in own]
    evidence += [mixer.evidence("cache array read", read) for read in mixer.cache_reads()]
    paged = _paged(mixer, evidence)
    if isinstance(paged, Match):
        return paged
    place = paged.place or mixer.place(mixer.fetches[0].call)
    evidence.append(Evidence(f"not paged, for it is not proved: {paged.missing}", place))
    return per_sequence(mixer, NAME, evidence)


def _paged(mixer: Mixer, evidence: list[Evidence]) -> Match | Miss:
    """The match on the kernel route, or what stands in its way."""
    if mixer.attends:
        return paged_latents(mixer, NAME, evidence, selected=True)
    found = ranking(mixer, NAME)
    if isinstance(found, Miss):
        return found
    for cls in _holders(mixer):
        holder = paged_latents(Mixer(mixer.program, cls), NAME, [], selected=True)
        if isinstance(holder, Miss):
            where = holder.place or mixer.place(found.result)
            return Miss(NAME, 2, f"`{cls.name}`, which holds it, reads pages too", where)
    return _indexer(mixer, found, evidence)


def _holders(mixer: Mixer) -> list[ClassFacts]:
    """The classes that hold an instance of the mixer's class."""
    return [
        cls
        for module in mixer.program.modules.values()
        for cls in module.classes.values()
        if any(
            made is mixer.cls
            for value in cls.attributes.values()
            for made in mixer.program.classes_in(value)
        )
    ]


def _indexer(mixer: Mixer, found: Ranking, evidence: list[Evidence]) -> Match | Miss:
    """Index keys in pages; the statements that made scores of them go."""
    source, method = mixer.source, found.method
    going = statements_of(found)
    last = going[-1] if going else None
    if last is None or last is not found.result.statement or last is not method.function.body[-1]:
        return Miss(NAME, 2, "scores are made in the method's own body", mixer.place(found.result))
    kept = [s for s in method.function.body if s not in going]
    read = read_of(bound_names(going), [s for s in kept if s.span.start > going[0].span.start])
    if read is not None:
        return Miss(NAME, 2, "scores serve nothing but the ranking", mixer.place(read))
    needed = {id(value) for value in found.result.value.walk()}
    for effect in method.effects:
        if any(s.span.start <= effect.statement.span.start < s.span.end for s in going):
            fine = effect.kind == "return" or id(effect.value) in needed
            if effect.kind not in ("call", "return") or not fine:
                return Miss(NAME, 2, "scores serve nothing but the ranking", mixer.place(effect))
    names = names_before(method, last.span)
    texts = []
    for value in (found.queries, found.keys, found.weights, found.count, found.mask):
        text = spell(source, value, names)
        if text is None:
            return Miss(NAME, 2, "what the ranking is made of has names", mixer.place(value))
        texts.append(text)
    call = f"return paged_top_positions({', '.join(texts[:4])}, mask={texts[4]})"
    fetch = found.fetch
    edits = [
        site_comment(source, fetch.effect, f"{NAME} keeps its index keys in pages", NAME),
        insert(fetch.call.args[0].span.end, "_index", NAME),
        site_comment(source, last.span, f"{NAME} ranks the positions of each row's sequence", NAME),
        replace(source, last.span, call, NAME),
    ]
    edits += [delete_statement(source, s.span, NAME) for s in going[:-1]]
    edits += [delete_statement(source, e.statement.span, NAME) for e in found.upkeep]
    evidence = [
        *evidence,
        mixer.evidence("index keys fetched", fetch.call),
        mixer.evidence("scores of all positions", found.scores),
        mixer.evidence("all positions while there are few", found.short.statement.span),
    ]
    sites = (
        Site("update_and_fetch_index", mixer.place(fetch.call)),
        Site("paged_top_positions", mixer.place(found.result)),
    )
    cls, names_used = mixer.cls.qualified, ("paged_top_positions",)
    return Match(
        NAME, "kernel", cls, ("indexer",), tuple(evidence), sites, tuple(edits), names_used
    )


_INDEX = """
import mlx.core as mx
import mlx.nn as nn

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.q = nn.Linear(args.width, args.width)
        self.k = nn.Linear(args.width, args.width)

    def __call__(self, x, mask=None, cache=None):
        q, k = self.q(x)[:, None], self.k(x)[:, None]
        if cache is not None:
            k, _ = cache.update_and_fetch(k, k)
        scores = q @ k.swapaxes(-1, -2)
        return mx.argpartition(scores, kth=-4, axis=-1)[..., -4:]
"""

_DSA_INDEXER = """
class Ranker(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.best = args.best
        self.q = nn.Linear(args.width, 4 * 16)
        self.k = nn.Linear(args.width, 16)
        self.w = nn.Linear(args.width, 4)

    def __call__(self, x, mask=None, cache=None):
        b, n, _ = x.shape
        q = self.q(x).reshape(b, n, 4, 16).swapaxes(1, 2)
        k = self.k(x)[:, None]
        if cache is not None:
            k, _ = cache.update_and_fetch(k, k)
            cache.values = mx.zeros_like(cache.keys)
        if k.shape[2] <= self.best:
            return None
        scores = mx.maximum(q @ k.swapaxes(-1, -2), 0)
        weights = self.w(x).swapaxes(-1, -2)[..., None]
        scores = scores * weights
        if n > 1:
            scores = sum(scores[:, h : h + 1] for h in range(scores.shape[1]))
        else:
            scores = scores.sum(axis=1, keepdims=True)
        if mask is not None:
            scores = mx.where(mask, scores, -float("inf"))
        return mx.argpartition(scores, kth=-self.best, axis=-1)[..., -self.best :]
"""

_DSA_HEAD = _HEAD.replace("class Mix", f"{_DSA_INDEXER}\n\nclass Mix")
_DSA_HEAD = _DSA_HEAD.replace(
    "        self.up_k", "        self.ranker = Ranker(args)\n        self.up_k"
)
_DSA = (
    _DSA_HEAD.replace("cache.update", "cache[0].update")
    + """
        places = self.ranker(x, mask, cache=cache[1])
        if places is not None:
            if L == 1:
                at = places[:, :, 0, :, None]
                latent = mx.take_along_axis(
                    latent, mx.broadcast_to(at, at.shape[:-1] + (8,)), axis=2
                )
                k_rope = mx.take_along_axis(
                    k_rope, mx.broadcast_to(at, at.shape[:-1] + (8,)), axis=2
                )
                if mask is not None:
                    mask = mx.take_along_axis(mask, places, axis=-1)
            else:
                few = mx.zeros((B, 1, L, latent.shape[2]), dtype=mx.bool_)
                few = mx.put_along_axis(few, places, mx.array(True), axis=-1)
                if mask is not None:
                    few = few & mask
                mask = few
"""
    + _MLA[len(_HEAD) :]
)


def _slow(name: str, text: str, *changes: tuple[str, str]) -> Example:
    """An example that only the per-sequence route serves."""
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return Example(name, text, "per-sequence")


ACCEPTS = (
    Example("Mix", _INDEX, "per-sequence"),
    Example("Ranker", _DSA),
    Example("Mix", _DSA),
    # Other scores than the op makes, or a ranking of something else.
    _slow("Ranker", _DSA, ("swapaxes(-1, -2), 0)", "swapaxes(-1, -2), 1)")),
    _slow("Ranker", _DSA, ("scores = scores * weights", "scores = scores * weights + 1")),
    _slow("Ranker", _DSA, ("return None", "return mx.arange(4)[None, None, None]")),
    _slow("Ranker", _DSA, ("kth=-self.best", "kth=-4")),
    _slow("Ranker", _DSA, ("self.w(x).swapaxes", "self.w(x + k.sum()).swapaxes")),
    _slow("Ranker", _DSA, ("mx.where(mask, scores,", "mx.where(mask == 0, scores,")),
    # Attention that reads other places, or whose places come from no indexer.
    _slow("Mix", _DSA, ("latent, mx.broadcast_to(at,", "latent, mx.broadcast_to(at + 1,")),
    _slow("Mix", _DSA, ("few = few & mask", "few = few | mask")),
    _slow("Mix", _DSA, ("mask = few", "few = mask")),
    _slow("Mix", _DSA, ("k_rope = mx.take", "x = mx.take")),
    _slow("Mix", _DSA, ("latent = mx.take", "x = mx.take")),
    _slow("Mix", _DSA, ("kth=-self.best", "kth=-4")),
    # Neither half goes to pages alone.
    _slow("Ranker", _DSA, ("few = few & mask", "few = few | mask")),
)
REJECTS = (
    Counter(
        "Mix", _INDEX.replace("mx.argpartition(scores, kth=-4, axis=-1)", "mx.exp(scores)"), None
    ),
)
