"""handwritten_softmax: attention spelled out as matrix product, softmax, matrix product.

Matches     `softmax(cap * tanh(q @ k^T / cap) + mask) @ v` over fetched keys, with or without the
            cap, the groups made by a five-dimensional reshape or by repeating keys, in the method
            itself or in a function of the module that the method calls with the fetched keys.
Refuses     anything else between the two products; block patterns; keys selected by rank.
Becomes     one call of `paged_attention` in the place of the second product; the statements that
            only made the scores go.
"""

from __future__ import annotations

from ..attention import Sites, attend_sites, attention_match, fetched_flow
from ..edits import names_before, replace, site_comment, spell
from ..ir import Edit, Match, Method, Miss, Site, Span, Value
from ..match import (
    ATTENTION_MASK,
    UNPACKED,
    Flow,
    Mixer,
    arguments,
    callee_name,
    every_value,
    library_call,
    live,
)
from ..softmax import Spelled, spelled_attention
from . import Counter, Example

NAME = "handwritten_softmax"


def match(mixer: Mixer) -> Match | Miss:
    if not mixer.fetches:
        return Miss(NAME, 0, "a fetch from a cache")
    if mixer.state_stores or mixer.cache_reads():
        return Miss(NAME, 1, "caches are only fetched from")
    parts: list[Sites] = []
    written, added = 0, False
    for method in mixer.methods:
        inline = _inline(mixer, method)
        called = _called(mixer, method)
        consumers = [value for value, _ in called]
        found = fetched_flow(mixer, method, consumers)
        if inline is None and found.foreign:
            where = mixer.place(found.foreign[0])
            return Miss(NAME, 2, "fetched keys only enter a spelled-out softmax", where)
        if inline is not None:
            made = _replace_inline(mixer, method, inline, found)
            if isinstance(made, Miss):
                return made
            parts.append(made)
            written += 1
            added |= inline.added
        for call, spelled in called:
            made = _replace_call(mixer, method, call, spelled)
            if isinstance(made, Miss):
                return made
            parts.append(made)
            written += 1
            added |= spelled.added
        here = attend_sites(mixer, method, found, NAME)
        if isinstance(here, Miss):
            return here
        parts.append(here)
    if not written:
        return Miss(NAME, 1, "a softmax of products with fetched keys")
    if added and _boolean_masks(mixer):
        return Miss(NAME, 2, "only a mask of numbers is added to scores")
    return attention_match(mixer, NAME, parts)


def _boolean_masks(mixer: Mixer) -> bool:
    """The file makes masks as arrays, which are boolean: added, they hide nothing."""
    file = mixer.program.modules[mixer.cls.module]
    return any(
        callee_name(mixer.program, effect.value) in ATTENTION_MASK and len(effect.value.args) > 3
        for method in file.methods()
        for effect in method.calls()
    )


def _inline(mixer: Mixer, method: Method) -> Spelled | None:
    """The spelled-out attention in the method's own statements."""
    roots = {id(f.call) for f in mixer.fetches if f.method is method}
    if not roots:
        return None

    def fetched(value: Value, position: int) -> bool:
        value = live(value)
        if value.op != "item" or value.data != position:
            return False
        given = library_call(mixer.program, value.args[0], UNPACKED)
        if given is not None and len(given) == 3:
            return fetched(given[1 + position], position)
        return id(value.args[0]) in roots

    for value in every_value(method):
        if value.op == "binary" and value.data == "@":
            found = spelled_attention(mixer.program, value, fetched)
            if found is not None:
                return found
    return None


def _called(mixer: Mixer, method: Method) -> list[tuple[Value, Spelled]]:
    """Calls of module functions that spell out attention over their parameters."""
    found = []
    for effect in method.calls():
        callee = effect.value.args[0]
        function = mixer.program.function_of(callee.data) if callee.op == "global" else None
        if function is None or len(function.returns) != 1:
            continue
        result = function.returns[0].value
        spelled = spelled_attention(mixer.program, result, lambda value, _: value.op == "param")
        if spelled is not None and _all_parameters(spelled):
            found.append((effect.value, spelled))
    return found


def _all_parameters(spelled: Spelled) -> bool:
    parts = [spelled.queries, spelled.keys, spelled.values]
    parts += [spelled.rescale[1]] if spelled.rescale is not None else []
    parts += [part for part in (spelled.scale, spelled.softcap, spelled.mask) if part is not None]
    return all(part.op == "param" for part in parts)


def _replace_call(mixer: Mixer, method: Method, call: Value, spelled: Spelled) -> Sites | Miss:
    function = mixer.program.function_of(call.args[0].data)
    assert function is not None
    order = [parameter.name for parameter in function.function.parameters]
    given = arguments(call, order)
    names = names_before(method, call)
    roles = {
        "queries": spelled.queries,
        "keys": spelled.keys,
        "values": spelled.values,
        "scale": spelled.scale,
        "mask": spelled.mask,
        "softcap": spelled.softcap,
        "rescale": spelled.rescale[1] if spelled.rescale is not None else None,
    }
    texts: dict[str, str] = {}
    for role, part in roles.items():
        if part is None:
            continue
        value = given.get(part.data[1])
        text = spell(mixer.source, value, names) if value is not None else None
        if text is None:
            return Miss(NAME, 2, f"the {role} of the call can be named", mixer.place(call))
        texts[role] = text
    if "mask" not in texts:
        return Miss(NAME, 2, "scores are masked", mixer.place(call))
    new = f"{texts['queries']}, {texts['keys']}, {texts['values']}, "
    scale = texts.get("scale", "1.0")
    if spelled.rescale is not None:
        scale = f"{scale} {spelled.rescale[0]} {texts['rescale']}"
    new += f"scale={scale}, mask={texts['mask']}"
    if "softcap" in texts:
        new += f", softcap={texts['softcap']}"
    effect = next(e for e in method.calls() if e.value is call)
    edit = replace(mixer.source, call.span, f"paged_attention({new})", NAME)
    return _site(mixer, call, [edit], effect.statement.span)


def _named(value: Value, names: dict[str, Value]) -> str | None:
    wanted = live(value)
    return next((name for name, held in names.items() if live(held) is wanted), None)


def _site(mixer: Mixer, value: Value, edits: list[Edit], statement: Span) -> Sites:
    comment = site_comment(
        mixer.source, statement, f"{NAME} reads its keys and values from pages", NAME
    )
    where = mixer.place(value)
    evidence = (mixer.evidence("softmax over products with fetched keys", value),)
    return Sites((comment, *edits), evidence, (Site("paged_attention", where),))


def _replace_inline(mixer: Mixer, method: Method, spelled: Spelled, found: Flow) -> Sites | Miss:
    body = method.function.body
    product = spelled.product
    last = next(
        (i for i, s in enumerate(body) if s.span.start <= product.span.start < s.span.end), None
    )
    if last is None:
        return Miss(NAME, 2, "the softmax stands in the method's own body", mixer.place(product))
    starts = [value.span.start for value in found.foreign]
    first = min(
        (i for i, s in enumerate(body) if any(s.span.start <= x < s.span.end for x in starts)),
        default=last,
    )
    region = Span(body[first].span.start, body[last].span.start)
    if any(
        effect.kind in ("store", "return")
        and region.start <= effect.statement.span.start < region.end
        for effect in method.effects
    ):
        return Miss(NAME, 2, "nothing is stored between the products", mixer.place(product))
    if spelled.mask is None:
        return Miss(NAME, 2, "scores are masked", mixer.place(product))
    names = method.before[body[first].span.start]

    def text(value: Value | None) -> str | None:
        return spell(mixer.source, value, names) if value is not None else None

    queries, scale = _named(spelled.raw_queries, names), "1.0"
    if queries is None and spelled.scale is not None:
        queries, scale = _named(spelled.queries, names), text(spelled.scale) or ""
    if spelled.rescale is not None:
        factor = text(spelled.rescale[1])
        scale = f"{scale} {spelled.rescale[0]} {factor}" if factor else ""
        scale = scale.removeprefix("1.0 * ")
    parts = (queries, text(spelled.raw_keys), text(spelled.raw_values), text(spelled.mask))
    if None in parts or not scale:
        return Miss(NAME, 2, "queries, keys, values and mask have names", mixer.place(product))
    arguments_ = f"{parts[0]}, {parts[1]}, {parts[2]}, scale={scale}, mask={parts[3]}"
    if spelled.softcap is not None:
        softcap = text(spelled.softcap)
        if softcap is None:
            return Miss(NAME, 2, "the cap can be named", mixer.place(product))
        arguments_ += f", softcap={softcap}"
    edits = [replace(mixer.source, product.span, f"paged_attention({arguments_})", NAME)]
    if first < last:
        start = mixer.source.line_start(body[first].span.start)
        end = mixer.source.line_start(body[last].span.start)
        edits.append(replace(mixer.source, Span(start, end), "", NAME))
    return _site(mixer, product, edits, body[last].span)


_SPELLED = """
import mlx.core as mx
import mlx.nn as nn

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.qkv = nn.Linear(args.width, 3 * args.width)

    def __call__(self, x, mask=None, cache=None):
        B, L, D = x.shape
        q, k, v = mx.split(self.qkv(x), 3, axis=-1)
        q = q.reshape(B, L, 4, -1).transpose(0, 2, 1, 3)
        k = k.reshape(B, L, 4, -1).transpose(0, 2, 1, 3)
        v = v.reshape(B, L, 4, -1).transpose(0, 2, 1, 3)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        scores = (q * 0.5) @ k.transpose(0, 1, 3, 2)
        if mask is not None:
            scores += mask
        weights = mx.softmax(scores.astype(mx.float32), axis=-1).astype(scores.dtype)
        y = (weights @ v).transpose(0, 2, 1, 3).reshape(B, L, -1)
        return y
"""

_UNPACKED = _SPELLED.replace(
    "            k, v = cache.update_and_fetch(k, v)\n",
    "            k, v = cache.update_and_fetch(k, v)\n"
    "            k, v = dequantize_kv_state(cache, k, v)\n",
).replace(
    "import mlx.nn as nn",
    "import mlx.nn as nn\nfrom mlx_vlm.models.base import dequantize_kv_state",
)

ACCEPTS = (
    Example("Mix", _UNPACKED),
    Example("Mix", _SPELLED),
    Example(
        "Mix",
        _SPELLED.replace(
            "        if mask is",
            "        scores = mx.tanh(scores / 30.0)\n        scores *= 30.0\n        if mask is",
        ),
    ),
)
REJECTS = (
    Counter("Mix", _UNPACKED.replace("(cache, k, v)", "(cache, v, k)"), None),
    Counter(
        "Mix",
        _SPELLED.replace("        weights =", "        scores = scores ** 2\n        weights ="),
        None,
    ),
    Counter("Mix", _SPELLED.replace("(weights @ v)", "(weights @ mx.abs(v))"), None),
)
