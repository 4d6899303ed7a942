"""Recognises attention over cached latents in a graph of values.

Three spellings, all of one function as long as the two projections are what `is_head_map` proves:

* a choice of arms before one attention call: queries projected onto the latents (absorbed), or keys
  and values projected from them (materialised), and the output projected behind the first;
* the same choice with one attention call in each arm;
* the absorbed arm alone.

Since both arms of a choice compute the same, what decides between them does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .attention import fetched_flow
from .edits import insert, names_before, site_comment, spell
from .ir import Effect, Evidence, Match, Method, Miss, Site, Value
from .match import (
    Attend,
    Fetch,
    Mixer,
    every_value,
    is_none_test,
    is_pipeline_tail,
    library_call,
    same,
    uses,
)
from .program import Program
from .rankings import Ranking, Selected, is_fetched, peel, peel_mask, ranking
from .regions import (
    Region,
    problem_with,
    region_of,
    replace_region,
    result_name,
    verbatim,
)
from .softmax import is_lowest, number, turned_rows


@dataclass(frozen=True, eq=False, slots=True)
class Scores:
    """`where(mask, (rope * scale) @ keys^T, lowest)`: the rope part of the scores, masked."""

    rope: Value
    rope_key: Value
    scale: Value | None
    mask: Value


@dataclass(frozen=True, eq=False, slots=True)
class LatentAttention:
    """Attention over latents. `result` is what the code behind it uses.

    `content` are the queries that meet the latents: before their projection if `ups` are there (the
    projections of keys and values), else after it. `places` are the ranked positions that are read,
    of all if None. `absorbed` and `materialised` are the attention
    calls of the arms.
    """

    fetch: Fetch
    result: Value
    content: Value
    rope: Value
    latent: Value
    rope_key: Value
    scale: Value
    mask: Value
    ups: tuple[Value, Value] | None
    places: Value | None
    absorbed: Attend
    materialised: Attend | None


def latent_attention(mixer: Mixer, method: Method, kind: str) -> LatentAttention | Miss:
    """The attention over what the method's one fetch returns, or the first fact that is missing."""
    fetches = [f for f in mixer.fetches if f.method is method]
    attends = [a for a in mixer.attends if a.method is method]
    if len(fetches) != 1 or fetches[0].effect.path.in_loop:
        return Miss(kind, 2, "one fetch of a latent and a rope key", mixer.place(fetches[-1].call))
    reader = _Reader(mixer, method, fetches[0], kind)
    for attend in attends:
        if attend.sinks is not None and attend.sinks.op != "const":
            return Miss(kind, 2, "no sinks", mixer.place(attend.sinks))
    if len(attends) == 2:
        return reader.two_calls(*attends)
    if len(attends) != 1:
        return Miss(kind, 2, "one attention call, or one in each arm of a choice")
    return reader.choice(attends[0]) if _choice(attends[0].keys) else reader.alone(attends[0])


@dataclass(frozen=True, eq=False, slots=True)
class _Reader:
    mixer: Mixer
    method: Method
    fetch: Fetch
    kind: str
    selections: list[Selected | None] = field(
        default_factory=list
    )  # of all reads of what is fetched

    # ------------------------------------------------------------- the three spellings

    def choice(self, attend: Attend) -> LatentAttention | Miss:
        """One call whose queries, keys and values are chosen."""
        found = _choice(attend.keys)
        assert found is not None
        test, arms = found
        side = 0 if self.is_latent(arms[0]) else 1
        parts = []
        for value in (attend.queries, attend.keys, attend.values):
            chosen = _choice(value)
            if chosen is None or not same(chosen[0], test):
                return self.miss("queries, keys and values chosen together", value)
            parts.append((chosen[1][side], chosen[1][1 - side]))
        (queries, content), (latent, keys), (latent_too, values) = parts
        up_keys, up_values = _called(queries), _called(values)
        if not (self.is_latent(latent) and self.is_latent(latent_too)):
            return self.miss("one arm attends to the latents", attend.keys)
        if up_keys is None or not _is_call(queries, up_keys, content):
            return self.miss("that arm's queries are projected onto the latents", queries)
        if not self.is_up_keys(keys, up_keys) or not self.is_up_values(values, up_values):
            return self.miss("the other arm's keys and values are projected from latents", keys)
        assert up_values is not None
        result = self.joined(test, side, attend.call, up_values, attend.call)
        if result is None:
            return self.miss("the output is projected in the first arm only", attend.call)
        return self.finish(attend, None, result, content, (up_keys, up_values))

    def two_calls(self, one: Attend, two: Attend) -> LatentAttention | Miss:
        """A call in each arm."""
        absorbed, other = (one, two) if self.is_latent(one.keys) else (two, one)
        up_keys, up_values = _called(absorbed.queries), _called(other.values)
        if not (self.is_latent(absorbed.keys) and self.is_latent(absorbed.values)):
            return self.miss("one arm attends to the latents", absorbed.keys)
        if up_keys is None or absorbed.queries.data != (None,):
            return self.miss("that arm's queries are projected onto the latents", absorbed.queries)
        if not self.is_up_values(other.values, up_values):
            return self.miss("the other arm's values are projected from latents", other.values)
        assert up_values is not None
        content = absorbed.queries.args[1]
        scores = self.scores(absorbed)
        if isinstance(scores, Miss):
            return scores
        queries, keys = self.joined_parts(other.queries), self.joined_parts(other.keys)
        if queries is None or queries[0] is not content or queries[1] is not scores.rope:
            return self.miss("the other arm's queries are both parts side by side", other.queries)
        if keys is None or not self.is_up_keys(keys[0], up_keys) or not self.is_rope(keys[1]):
            return self.miss("the other arm's keys are both parts side by side", other.keys)
        if other.mask is None or other.mask is not scores.mask:
            return self.miss("both arms have one mask", other.mask or other.call)
        if not (absorbed.scale and other.scale and same(absorbed.scale, other.scale)):
            return self.miss("both arms have one scale", other.scale or other.call)
        for test, side in self.tests_of(absorbed, other):
            result = self.joined(test, side, absorbed.call, up_values, other.call)
            if result is not None:
                return self.finish(absorbed, other, result, content, (up_keys, up_values))
        return self.miss("the output is projected in the first arm only", absorbed.call)

    def alone(self, attend: Attend) -> LatentAttention | Miss:
        """One call that attends to the latents, whatever the number of tokens."""
        if not (self.is_latent(attend.keys) and self.is_latent(attend.values)):
            return self.miss("keys and values are the latents", attend.keys)
        return self.finish(attend, None, attend.call, attend.queries, None)

    def finish(
        self,
        absorbed: Attend,
        materialised: Attend | None,
        result: Value,
        content: Value,
        ups: tuple[Value, Value] | None,
    ) -> LatentAttention | Miss:
        scores = self.scores(absorbed)
        if isinstance(scores, Miss):
            return scores
        scale = absorbed.scale
        if scale is None:
            return self.miss("a scale", absorbed.call)
        unscaled = scores.scale is None and scale.op == "const" and scale.data == 1
        if not unscaled and (scores.scale is None or not same(scores.scale, scale)):
            return self.miss("both parts of the scores have one scale", absorbed.mask or scale)
        for up in ups or ():
            if _head_map(self.mixer, up) is None:
                return self.miss("the projections are one matrix a head, used both ways", up)
        chosen = _choice(absorbed.keys)
        arms = chosen[1] if chosen is not None else (absorbed.keys,)
        latent, places = self.unselected(next(arm for arm in arms if self.is_latent(arm)))
        if not all(_alike(other, places) for other in self.selections):
            return self.miss("latents and rope keys are read at the same places", absorbed.keys)
        return LatentAttention(
            self.fetch,
            result,
            content,
            scores.rope,
            latent,
            scores.rope_key,
            scale,
            scores.mask,
            ups,
            places.places if places is not None else None,
            absorbed,
            materialised,
        )

    # ------------------------------------------------------------- parts

    def miss(self, missing: str, where: Value) -> Miss:
        return Miss(self.kind, 2, missing, self.mixer.place(where))

    def is_latent(self, value: Value) -> bool:
        return self.is_fetched(value, 0)

    def is_rope(self, value: Value) -> bool:
        """The fetched rope key, as it is or for every head."""
        spread = library_call(self.mixer.program, value, "mlx.core.broadcast_to")
        return self.is_fetched(spread[0] if spread else value, 1)

    def is_fetched(self, value: Value, position: int) -> bool:
        whole, selected = self.unselected(value)
        found = is_fetched(self.mixer, self.fetch, whole, position)
        if found:
            self.selections.append(selected)
        return found

    def unselected(self, value: Value) -> tuple[Value, Selected | None]:
        """A fetched array before ranked places of it were read, and the reading."""
        return peel(self.mixer.program, value) or (value, None)

    def is_up_keys(self, value: Value, up: Value) -> bool:
        """`up(latent, transpose=False)`: the same matrices from the other side."""
        if value.op != "call" or len(value.args) != 3 or not same(value.args[0], up):
            return False
        flag = value.args[2]
        return (
            self.is_latent(value.args[1])
            and value.data in ((None, _flag_name(self.mixer, up)), (None, None))
            and flag.op == "const"
            and flag.data is False
        )

    def is_up_values(self, value: Value, up: Value | None) -> bool:
        return up is not None and value.data == (None,) and self.is_latent(value.args[1])

    def joined_parts(self, value: Value) -> tuple[Value, Value] | None:
        """`concatenate([content, rope], axis=-1)`."""
        got = library_call(self.mixer.program, value, "mlx.core.concatenate")
        if not got or len(got) != 2 or got[0].op not in ("list", "tuple"):
            return None
        last = number(got[1]) in (-1, 3)
        return (got[0].args[0], got[0].args[1]) if last and len(got[0].args) == 2 else None

    def tests_of(self, absorbed: Attend, other: Attend) -> Iterator[tuple[Value, int]]:
        """Conditions that decide between two calls, and the arm of the first one."""
        mine = {id(test): held for test, held in absorbed.effect.path.conditions}
        for test, held in other.effect.path.conditions:
            if mine.get(id(test), held) is not held:
                yield test, 1 if held else 0

    def joined(
        self, test: Value, side: int, absorbed: Value, up_values: Value, other: Value
    ) -> Value | None:
        """`up_values(absorbed) if test else other`, which must be all that uses the two calls."""
        table = uses(self.method)
        for value in every_value(self.method):
            found = _choice(value)
            if found is None or not same(found[0], test):
                continue
            projected, plain = found[1][side], found[1][1 - side]
            if plain is not other or not _is_call(projected, up_values, absorbed):
                continue
            users = [use.user for part in {id(absorbed), id(other)} for use in table.get(part, ())]
            users += [use.user for use in table.get(id(projected), ())]
            if all(user is projected or user is value for user in users):
                return value
        return None

    def scores(self, attend: Attend) -> Scores | Miss:
        """The rope part of the scores, given to attention as its mask."""
        value = attend.mask
        if value is None:
            return self.miss("scores of the rope part are the mask of attention", attend.call)
        tested = None
        if value.op == "phi":
            test = is_none_test(value.args[0])
            if test is None:
                return self.miss("scores are masked wherever there is a mask", value)
            tested, absent = test[0], value.args[1 if test[1] else 2]
            value = value.args[2 if test[1] else 1]
        chosen = library_call(self.mixer.program, value, "mlx.core.where")
        if not chosen or len(chosen) != 3 or not is_lowest(self.mixer.program, chosen[2]):
            return self.miss("scores that the mask bars get the lowest value", value)
        mask, scores, _ = chosen
        if tested is not None and (tested is not mask or absent is not scores):
            return self.miss("scores are masked by what is tested, and are nothing else", value)
        selected = self.selections[0]
        if selected is not None:
            before = peel_mask(self.mixer.program, mask, selected)
            if before is None:
                return self.miss("the mask is cut down to the places that are read", mask)
            mask = before
        if mask.op != "param":
            return self.miss("the mask is passed on as it was made", mask)
        factor = None
        if scores.op == "binary" and scores.data == "*":
            scores, factor = scores.args
        if scores.op != "binary" or scores.data != "@":
            return self.miss("one product of rope queries and rope keys, and no other term", scores)
        rope, keys = scores.args
        turned = turned_rows(self.mixer.program, keys)
        if turned is None or not self.is_fetched(turned, 1):
            return self.miss("rope queries meet the fetched rope keys", keys)
        turned, _ = self.unselected(turned)
        if factor is None and rope.op == "binary" and rope.data == "*":
            rope, factor = rope.args
        return Scores(rope, turned, factor, mask)


def _alike(one: Selected | None, other: Selected | None) -> bool:
    """Both read everything, or the same places by the same choice."""
    if one is None or other is None:
        return one is other
    return one.places is other.places and one.side == other.side and same(one.test, other.test)


def _choice(value: Value) -> tuple[Value, tuple[Value, Value]] | None:
    """Test and arms of a choice that is not about a missing argument."""
    if value.op != "phi" or is_none_test(value.args[0]) is not None:
        return None
    return value.args[0], (value.args[1], value.args[2])


def _called(value: Value) -> Value | None:
    """`self.x` in `self.x(...)`."""
    if value.op == "call" and value.args[0].op == "attr" and value.args[0].args[0].op == "param":
        return value.args[0]
    return None


def _is_call(value: Value, callee: Value, argument: Value) -> bool:
    plain = value.op == "call" and value.data == (None,) and value.args[1] is argument
    return plain and same(value.args[0], callee)


# ------------------------------------------------------------------- projections


def _head_map(mixer: Mixer, up: Value) -> Method | None:
    """The forward of the module in `self.x`, if it is `x @ W^T` or, with a flag off, `x @ W`."""
    made = mixer.program.attribute(mixer.cls, up.data) if up.op == "attr" else None
    if made is None or made.op != "call" or made.args[0].op != "global":
        return None
    cls = mixer.program.class_of(made.args[0].data)
    found = mixer.program.method(cls, "__call__") if cls is not None else None
    return found[1] if found is not None and is_head_map(mixer.program, found[1]) else None


def _flag_name(mixer: Mixer, up: Value) -> str | None:
    forward = _head_map(mixer, up)
    return forward.function.parameters[2].name if forward is not None else None


def is_head_map(program: Program, forward: Method) -> bool:
    """`forward(x, flag=True)` is `x @ W.swapaxes(-1, -2)`, and `x @ W` with the flag off.

    Then `q . forward(c, False)` equals `forward(q) . c`, which makes the two arms one function.
    """
    if len(forward.params) != 3 or len(forward.returns) != 2:
        return False
    this, rows, flag = forward.params
    default = forward.function.parameters[2].default
    if default is None or default.op != "const" or default.data is not True:
        return False
    weights: list[Value] = []
    for effect in forward.returns:
        conditions = effect.path.conditions
        if len(conditions) != 1 or conditions[0][0] is not flag:
            return False
        value = effect.value
        if value.op != "binary" or value.data != "@" or value.args[0] is not rows:
            return False
        weight = value.args[1]
        if conditions[0][1]:
            turned = turned_rows(program, weight)
            if turned is None:
                return False
            weight = turned
        if weight.op != "attr" or weight.args[0] is not this:
            return False
        weights.append(weight)
    turned_arms = {effect.path.conditions[0][1] for effect in forward.returns}
    return turned_arms == {True, False} and same(weights[0], weights[1])


def method_with_both(mixer: Mixer) -> Method | None:
    """The one method that fetches and attends."""
    found = {id(f.method): f.method for f in mixer.fetches}
    both = {id(a.method) for a in mixer.attends}
    if len(found) == 1 and set(found) == both:
        return next(iter(found.values()))
    return None


# ------------------------------------------------------------------- the rewrite


def paged_latents(
    mixer: Mixer, kind: str, evidence: list[Evidence], *, selected: bool = False
) -> Match | Miss:
    """The match on the kernel route, or what stands in its way.

    With `selected`, attention must read ranked places, given by a class that is an indexer.
    """
    method = method_with_both(mixer)
    if method is None:
        return Miss(kind, 2, "one method fetches and attends")
    found = latent_attention(mixer, method, kind)
    if isinstance(found, Miss):
        return found
    if (found.places is not None) is not selected:
        return Miss(kind, 2, f"{'only some' if selected else 'all'} positions are attended to")
    if found.places is not None:
        wrong = _no_ranking(mixer, method, found.places, kind)
        if wrong is not None:
            return wrong
    flow = fetched_flow(mixer, method)
    attends = [a.call for a in (found.absorbed, found.materialised) if a is not None]
    spans = [value.span for value in (*flow.foreign, *flow.casts, *attends, found.result)]
    tails = [effect for effect in method.effects if is_pipeline_tail(mixer.program, effect)]
    held = {id(part) for effect in tails for part in _parts(effect)}
    reads = [read for read in mixer.cache_reads() if id(read) not in held]
    if reads:
        return Miss(kind, 2, "caches are only fetched from", mixer.place(reads[0]))
    region = region_of(method, spans)
    if region is None:
        return Miss(kind, 2, "attention stands in the method's own body", mixer.place(spans[0]))
    inside = [effect for effect in tails if region.holds(effect.statement.span)]
    problem = problem_with(region, found.result, inside)
    if problem is not None:
        where = mixer.place(problem)
        return Miss(kind, 2, "the statements of attention serve nothing else", where)
    name = result_name(region, found.result)
    if name is None:
        return Miss(kind, 2, "the output has a name", mixer.place(found.result))
    call = _call(mixer, found, region, kind)
    if isinstance(call, Miss):
        return call
    text = f"# mlxrewrite: {kind} reads latents from pages, for any number of tokens\n"
    fetch = found.fetch
    comment = f"{kind} keeps latent and rope key side by side in pages"
    edits = (
        site_comment(mixer.source, fetch.effect, comment, kind),
        insert(fetch.call.args[0].span.end, "_latents", kind),
        replace_region(mixer.source, region, f"{text}{name} = {call}", kind),
    )
    evidence = [*evidence, mixer.evidence("absorbed", found.absorbed.call)]
    if found.materialised is not None:
        evidence.append(mixer.evidence("materialised", found.materialised.call))
    evidence += [mixer.evidence("one matrix a head, used both ways", up) for up in found.ups or ()]
    if found.places is not None:
        evidence.append(mixer.evidence("places ranked by an indexer", found.places))
    sites = (
        Site("update_and_fetch_latents", mixer.place(fetch.call)),
        Site("paged_latent_attention", mixer.place(found.absorbed.call)),
    )
    features = ["absorbed only"] if found.ups is None else []
    features += ["ranked positions only"] if found.places is not None else []
    names = ("paged_latent_attention",)
    cls = mixer.cls.qualified
    return Match(kind, "kernel", cls, tuple(features), tuple(evidence), sites, edits, names)


def _no_ranking(mixer: Mixer, method: Method, places: Value, kind: str) -> Miss | None:
    """Why places do not come from an indexer that is rewritten too; None if they do."""
    reached = mixer.program.callees(places, mixer.cls, method) if places.op == "call" else []
    ranked = [isinstance(ranking(Mixer(mixer.program, cls), kind), Ranking) for cls, _ in reached]
    if reached and all(ranked):
        return None
    return Miss(kind, 2, "places come from an indexer", mixer.place(places))


def _parts(effect: Effect) -> Iterator[Value]:
    for value in (effect.value, effect.target):
        if value is not None:
            yield from value.walk()


def _call(mixer: Mixer, found: LatentAttention, region: Region, kind: str) -> str | Miss:
    """The text of the call, in names as they are before the replaced statements."""
    method = found.absorbed.method
    names = names_before(method, region.statements[0].span)
    texts: dict[str, str] = {}
    up_keys, up_values = found.ups or (None, None)
    for role, value in (
        ("queries", found.content),
        ("rope queries", found.rope),
        ("latent", found.latent),
        ("rope key", found.rope_key),
        ("projection of keys", up_keys),
        ("projection of values", up_values),
        ("scale", found.scale),
        ("mask", found.mask),
        ("places", found.places),
    ):
        if value is None:
            continue
        text = spell(mixer.source, value, names)
        text = text or verbatim(mixer.source, method, value, names)
        if text is None:
            return Miss(kind, 2, f"the {role} can be named", mixer.place(value))
        texts[role] = text
    named = ("scale", "mask", "places")
    words = [text if role not in named else f"{role}={text}" for role, text in texts.items()]
    return f"paged_latent_attention({', '.join(words)})"
