"""linear_attention: a matrix state with a fixed or learned decay, scanned token by token.

Matches     a class that carries a state through a loop over tokens, cached, with no convolution
            and no token shift: lightning attention, gated linear attention. arXiv 2401.04658.
Refuses     convolutions (selective_scan) and token shift (token_shift_mixing).
Becomes     the original code, once for all sequences with equally many rows; a function of the
            file that is h <- h e^g + k^T v, y = scale q h, and nothing else, is an op
            (`lightning_scan`).
"""

from __future__ import annotations

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
    return per_length(mixer, NAME, evidence, ops=lightning_scans(mixer, NAME))


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
        q, k, v = mx.split(self.proj(x), 3, axis=-1)
        y, cache[0] = walk(q, k, v, self.rate, 0.5, cache[0])
        return y
"""

ACCEPTS = (
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
