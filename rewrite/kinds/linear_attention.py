"""linear_attention: a matrix state with a fixed or learned decay, scanned token by token.

Matches     a class that carries a state through a loop over tokens, cached, with no convolution
            and no token shift: lightning attention, gated linear attention. arXiv 2401.04658.
Refuses     convolutions (selective_scan) and token shift (token_shift_mixing).
Becomes     the original code, once for all sequences with equally many rows; a function of the
            file that is h <- h e^g + k^T v, y = scale q h, and nothing else, is an op
            (`lightning_scan`), token by token or in chunks of its own.
"""

from __future__ import annotations

from ..chunked import chunked_lightning
from ..ir import Match, Miss
from ..match import Mixer
from ..per_length import per_length
from ..scans import lightning_scans
from ..states import Reach
from . import Counter, Example
from .selective_scan import _SCAN

NAME = "linear_attention"


def match(mixer: Mixer) -> Match | Miss:
    reach = Reach(mixer)
    if not mixer.state_stores or mixer.fetches:
        return Miss(NAME, 0, "state in a cache, and no keys")
    if reach.library_recurrence() or not reach.token_loops():
        return Miss(NAME, 1, "the class scans its state itself")
    if reach.convolutions() or reach.token_shifts():
        return Miss(NAME, 2, "no convolution and no token shift")
    evidence = [mixer.evidence("state stored", effect) for effect in mixer.state_stores]
    ops = lightning_scans(mixer, NAME) or chunked_lightning(mixer, NAME)
    return per_length(mixer, NAME, evidence, ops=ops)


_FUNCTION = """
import mlx.core as mx
import mlx.nn as nn

def walk(queries, keys, values, rate, factor, before=None):
    count = queries.shape[2]
    kept = mx.exp(rate)[:, None, None]
    queries = queries * factor
    found = []
    for t in range(count):
        new = keys[:, :, t : t + 1].transpose(0, 1, 3, 2) @ values[:, :, t : t + 1]
        before = new if before is None else before * kept + new
        found.append(queries[:, :, t : t + 1] @ before)
    return mx.concatenate(found, axis=2), before

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.proj = nn.Linear(args.width, 3 * args.width)
        self.rate = mx.zeros((args.heads,))

    def __call__(self, x, cache):
        B, L, _ = x.shape
        x = self.proj(x).reshape(B, L, 2, -1).transpose(0, 2, 1, 3)
        q, k, v = mx.split(x, 3, axis=-1)
        y, cache[0] = walk(q, k, v, self.rate, 0.5, cache[0])
        return y.transpose(0, 2, 1, 3).reshape(B, L, -1)
"""

_CHUNKS = """
import mlx.core as mx
import mlx.nn as nn

@mx.compile
def one(query, key, value, held, kept):
    held = key.transpose(0, 1, 3, 2) @ value + held * kept
    return (query @ held).astype(query.dtype), held

def chunk(query, key, value, rate, before):
    return (query @ key.swapaxes(-1, -2)) @ value, before

def walk(queries, keys, values, rate, factor, before=None, mask=None, size=64):
    count = queries.shape[2]
    if before is None:
        before = mx.zeros((queries.shape[0], 2, 32, 32))
    if count == 1:
        kept = mx.exp(rate)[:, None, None].astype(before.dtype)
        y, after = one(queries * factor, keys, values, before, kept)
        if mask is None:
            return y, after
        return mx.where(mask, y, 0), mx.where(mask, after, before)
    found = []
    for start in range(0, count, size):
        part = slice(start, start + size)
        y, before = chunk(queries[:, :, part], keys[:, :, part], values[:, :, part], rate, before)
        found.append(y)
    return mx.concatenate(found, axis=2), before

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.proj = nn.Linear(args.width, 3 * args.width)
        self.rate = mx.zeros((args.heads,))

    def __call__(self, x, cache):
        B, L, _ = x.shape
        x = self.proj(x).reshape(B, L, 2, -1).transpose(0, 2, 1, 3)
        q, k, v = mx.split(x, 3, axis=-1)
        y, cache[0] = walk(q, k, v, self.rate, 0.5, before=cache[0])
        return y.transpose(0, 2, 1, 3).reshape(B, L, -1)
"""

ACCEPTS = (
    Example("Mix", _CHUNKS, "kernel"),
    Example("Mix", _CHUNKS.replace(" + held * kept", " - held * kept"), "gathered"),
    Example("Mix", _CHUNKS.replace("query @ held)", "query @ key)"), "gathered"),
    Example("Mix", _CHUNKS.replace("one(queries * factor,", "one(queries,"), "gathered"),
    Example("Mix", _CHUNKS.replace("mx.exp(rate)", "mx.exp(-rate)"), "gathered"),
    Example("Mix", _CHUNKS.replace("count == 1", "count == 2"), "gathered"),
    Example("Mix", _CHUNKS.replace("queries.shape[2]", "queries.shape[1]"), "gathered"),
    Example("Mix", _CHUNKS.replace("before = mx.zeros", "before = mx.ones"), "gathered"),
    Example("Mix", _CHUNKS.replace("axis=2), before", "axis=2), mask"), "gathered"),
    Example("Mix", _SCAN.replace("self.conv(window)", "window"), "gathered"),
    Example("Mix", _FUNCTION.replace("count = queries.shape[2]", "_, _, count, _ = queries.shape"),
            "kernel"),
    Example("Mix", _FUNCTION.replace("kept + new", "kept - new"), "gathered"),
    Example("Mix", _FUNCTION.replace("t : t + 1] @ before", "t : t + 2] @ before"), "gathered"),
    Example("Mix", _FUNCTION.replace("keys[:, :, t :", "keys[:, :, t - 1 :"), "gathered"),
    Example("Mix", _FUNCTION.replace("found.append(", "found.append(2 * "), "gathered"),
    Example("Mix", _FUNCTION.replace("axis=2)", "axis=1)"), "gathered"),
)  # fmt: skip
REJECTS = (Counter("Mix", _SCAN, "selective_scan"),)
