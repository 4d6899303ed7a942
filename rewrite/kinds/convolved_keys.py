"""convolved_keys: softmax attention whose keys and values pass a causal convolution first.

Matches     a class that fetches keys and values and keeps the tail of a convolution over them.
            Baichuan-M1, arXiv 2502.12671.
Refuses     attention without that tail, and convolutions without attention.
Becomes     `paged_attention`, where the tail is the last token's row: each row gets the one before
            it in its own sequence (`previous_rows`), zeros in the beginning. Else the original
            code, once per sequence.
"""

from __future__ import annotations

from dataclasses import replace

from ..attention import attend_sites, attention_match, fetched_flow
from ..ir import Match, Miss
from ..match import Mixer
from ..per_sequence import per_sequence
from ..previous import KEEP, READ, previous_rows_sites
from . import Counter, Example

NAME = "convolved_keys"


def match(mixer: Mixer) -> Match | Miss:
    if not mixer.fetches or not mixer.attends:
        return Miss(NAME, 0, "a fetch and a fused attention call")
    if not mixer.state_stores:
        return Miss(NAME, 1, "state beside keys and values")
    paged = _paged(mixer)
    if isinstance(paged, Match):
        return paged
    evidence = [mixer.evidence("fetch", f.call) for f in mixer.fetches]
    evidence += [mixer.evidence("state stored", effect) for effect in mixer.state_stores]
    return per_sequence(mixer, NAME, evidence)


def _paged(mixer: Mixer) -> Match | Miss:
    reads = mixer.cache_reads()
    if reads:
        return Miss(NAME, 2, "caches are only fetched from", mixer.place(reads[0]))
    parts = []
    for method in mixer.methods:
        found = fetched_flow(mixer, method)
        if found.foreign:
            where = mixer.place(found.foreign[0])
            return Miss(NAME, 3, "fetched keys are not computed with", where)
        here = attend_sites(mixer, method, found, NAME)
        if isinstance(here, Miss):
            return here
        parts.append(here)
    states = previous_rows_sites(mixer, NAME)
    if isinstance(states, Miss):
        return states
    whole = attention_match(mixer, NAME, [*parts, states])
    return replace(whole, imports=(*whole.imports, READ, KEEP))


_KEYS = """
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.qkv = nn.Linear(args.width, 3 * args.width)

    def __call__(self, x, mask=None, cache=None):
        B, L, D = x.shape
        q, k, v = (p[:, None] for p in mx.split(self.qkv(x), 3, axis=-1))
        last = k[:, :, -1:]
        k = k + mx.concatenate([cache[0][0], k[:, :, :-1]], axis=2)
        cache[0][0] = last
        k, v = cache[1].update_and_fetch(k, v)
        y = scaled_dot_product_attention(q, k, v, cache=cache[1], scale=1.0, mask=mask)
        return y.reshape(B, L, D)
"""

_ROWS = """
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.qkv = nn.Linear(args.width, 3 * args.width)
        self.taps = mx.zeros((2, args.width))

    def joined(self, rows, taps, before=None):
        if before is None:
            before = mx.zeros_like(rows[:, :, :1])
        if rows.shape[2] > 1:
            before = mx.concatenate([before, rows[:, :, :-1]], axis=2)
        return before * taps[0] + rows * taps[1]

    def __call__(self, x, mask=None, cache=None):
        B, L, D = x.shape
        q, k, v = (p[:, None] for p in mx.split(self.qkv(x), 3, axis=-1))
        raw = k
        last = cache[0][0] if cache is not None else None
        k = self.joined(raw, self.taps, before=last)
        if cache is not None:
            k, v = cache[1].update_and_fetch(k, v)
            if L > 0:
                cache[0][0] = raw[:, :, -1:]
        y = scaled_dot_product_attention(q, k, v, cache=None, scale=1.0, mask=mask)
        return y.reshape(B, L, D)
"""


def _changed(*changes: tuple[str, str]) -> tuple[Example, ...]:
    """The state is not the last token's row, or not only that: the class runs as it is."""
    assert all(_ROWS.count(old) == 1 for old, _ in changes), changes
    return tuple(Example("Mix", _ROWS.replace(*change), "per-sequence") for change in changes)


ACCEPTS = (
    Example("Mix", _KEYS, "per-sequence"),
    Example("Mix", _ROWS, "kernel"),
    Example("Mix", _ROWS.replace("if L > 0", "if L >= 1"), "kernel"),
    *_changed(
        ("mx.zeros_like(rows[:, :, :1])", "mx.ones_like(rows[:, :, :1])"),
        ("rows[:, :, :-1]], axis=2", "rows[:, :, 1:]], axis=2"),
        ("rows[:, :, :-1]], axis=2", "rows[:, :, :-1]], axis=1"),
        ("rows[:, :, :-1]]", "taps[:, :, :-1]]"),
        ("[before, rows[:, :, :-1]]", "[rows[:, :, :-1], before]"),
        ("self.joined(raw, ", "self.joined(q, "),
        ("raw[:, :, -1:]", "raw[:, :, :1]"),
        ("raw[:, :, -1:]", "raw[:, -1:]"),
        ("raw[:, :, -1:]", "raw[:, :, -2:]"),
        ("if L > 0", "if L > 1"),
        ("if L > 0", "if mask is not None"),
        ("cache[0][0] = ", "cache[0][1] = "),
        ("        y = ", "        print(cache[0])\n        y = "),
        ("        y = ", "        v = self.joined(q, self.taps)\n        y = "),
        ("before=last)", "before=last)\n        q = q + last"),
    ),
)
REJECTS = (Counter("Mix", _KEYS.replace("        cache[0][0] = last\n", ""), "softmax_attention"),)
