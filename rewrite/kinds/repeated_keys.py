"""repeated_keys: keys and values are repeated over the query heads after the fetch.

Matches     `mx.tile(keys, [1, n, 1, 1])` (query head h reads key head h mod the number of key
            heads; n a number or kept on self) or `mx.repeat(keys, n, axis=1)` (h divided by the
            group) between fetch and attention.
Refuses     repeats along any other axis, and everything else done with fetched keys.
Becomes     `paged_attention` on the keys as cached; the head order is an argument.
"""

from __future__ import annotations

from ..attention import attend_sites, attention_match, fetched_flow
from ..edits import add_argument, argument_text, replace
from ..ir import Edit, Match, Method, Miss, Value
from ..match import Flow, Mixer, library_call
from . import Counter, Example
from .softmax_attention import _PLAIN

NAME = "repeated_keys"


def match(mixer: Mixer) -> Match | Miss:
    if not mixer.attends or not mixer.fetches:
        return Miss(NAME, 0, "a fused attention call and a fetch from a cache")
    if mixer.state_stores or mixer.cache_reads():
        return Miss(NAME, 1, "caches are only fetched from")
    parts = []
    repeats = 0
    for method in mixer.methods:
        found = fetched_flow(mixer, method)
        orders = {id(value): _order(mixer, value) for value in found.foreign}
        unknown = [value for value in found.foreign if orders[id(value)] is None]
        if unknown:
            where = mixer.place(unknown[0])
            return Miss(NAME, 2, "fetched keys are only repeated over heads", where)
        repeats += len(found.foreign)
        widened = Flow(found.members | frozenset(orders), (), found.casts)
        here = attend_sites(mixer, method, widened, NAME)
        if isinstance(here, Miss):
            return here
        parts.append(here)
        if not found.foreign:
            continue
        if len(set(orders.values())) != 1:
            return Miss(NAME, 2, "keys and values are repeated alike")
        edits = [_unrepeat(mixer, value) for value in found.foreign]
        if "tile" in orders.values():
            counts = {_count(mixer, method, value) for value in found.foreign}
            count = counts.pop()
            if count is None or counts:
                where = mixer.place(found.foreign[0])
                return Miss(NAME, 2, "keys and values tiled by one number kept on self", where)
            edits += [
                add_argument(attend.call, f"tiled_heads={count}", NAME)
                for attend in mixer.attends
                if attend.method is method
            ]
        parts.append(type(here)(tuple(edits), (), ()))
    if not repeats:
        return Miss(NAME, 2, "keys repeated over heads")
    return attention_match(mixer, NAME, parts)


def _order(mixer: Mixer, value: Value) -> str | None:
    """ "tile" or "repeat" for a repetition along the head axis."""
    tiled = library_call(mixer.program, value, "mlx.core.tile")
    if tiled and len(tiled) == 2 and tiled[1].op in ("list", "tuple"):
        counts = tiled[1].args
        ones = [part.op == "const" and part.data == 1 for part in counts]
        if len(counts) == 4 and ones[0] and ones[2] and ones[3]:
            return "tile"
    repeated = library_call(mixer.program, value, "mlx.core.repeat")
    if repeated and len(repeated) == 3 and repeated[2].op == "const" and repeated[2].data == 1:
        return "repeat"
    return None


def _count(mixer: Mixer, method: Method, tiled: Value) -> str | None:
    """How often heads are tiled, as text that means the same wherever the method reads it."""
    count = tiled.args[2].args[1]
    text = mixer.source.text(count.span)
    if count.op == "const":
        return text
    names: list[str] = []
    while count.op == "attr":
        names.append(count.data)
        count = count.args[0]
    this = method.params[0]
    chain = ".".join([this.data[1], *reversed(names)])
    return text if names and count is this and text == chain else None


def _unrepeat(mixer: Mixer, call: Value) -> Edit:
    return replace(mixer.source, call.span, argument_text(mixer.source, call, 0), NAME)


_TILED = _PLAIN.replace(
    "        y = ",
    "        k, v = mx.tile(k, [1, 4, 1, 1]), mx.tile(v, [1, 4, 1, 1])\n        y = ",
)

ACCEPTS = (
    Example("Mix", _TILED),
    Example(
        "Mix",
        _PLAIN.replace(
            "        y = ",
            "        k, v = mx.repeat(k, 4, axis=1), mx.repeat(v, 4, axis=1)\n        y = ",
        ),
    ),
)
REJECTS = (
    Counter("Mix", _PLAIN, "softmax_attention"),
    Counter("Mix", _TILED.replace("[1, 4, 1, 1]", "[1, 1, 4, 1]"), None),
    Counter("Mix", _TILED.replace("[1, 4, 1, 1]", "[1, q.shape[1] // k.shape[1], 1, 1]"), None),
)
