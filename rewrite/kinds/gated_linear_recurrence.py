"""gated_linear_recurrence: RG-LRU, a diagonal gated recurrence behind a causal convolution.

Matches     a class with a causal convolution and a scan over tokens whose input is scaled by
            sqrt(1 - a^2). Griffin, arXiv 2402.19427, section 2.4.
Refuses     scans without that normaliser (selective_scan).
Becomes     the original code, once for all sequences with equally many rows; a scan that is a
            function of the file, and nothing but h <- a h + x, is an op (`diagonal_scan`).
"""

from __future__ import annotations

from ..ir import Match, Miss
from ..match import Mixer
from ..per_length import per_length
from ..scans import diagonal_scans
from ..states import Reach
from . import Counter, Example
from .selective_scan import _SCAN

NAME = "gated_linear_recurrence"


def match(mixer: Mixer) -> Match | Miss:
    reach = Reach(mixer)
    if not mixer.state_stores or mixer.fetches:
        return Miss(NAME, 0, "state in a cache, and no keys")
    if not reach.token_loops() or not reach.convolutions():
        return Miss(NAME, 1, "a loop over tokens and a causal convolution")
    if not reach.complement_roots():
        return Miss(NAME, 2, "the sqrt(1 - a^2) normaliser")
    evidence = [mixer.evidence("state stored", effect) for effect in mixer.state_stores]
    return per_length(mixer, NAME, evidence, ops=diagonal_scans(mixer, NAME))


_SCANNED = _SCAN.replace("+ x[:, t]", "+ mx.sqrt(1 - decay[:, t] ** 2) * x[:, t]")
_FUNCTION = """
import mlx.core as mx
import mlx.nn as nn

def walk(inputs, keep, before=None):
    if inputs.shape[1] == 1:
        if before is not None:
            one = keep * before[:, None] + inputs
            return one, one[:, -1]
    held = mx.zeros((inputs.shape[0], inputs.shape[2])) if before is None else before
    whole = mx.zeros_like(inputs)
    for t in range(inputs.shape[1]):
        held = keep[:, t] * held + inputs[:, t]
        whole[:, t] = held
    return whole, held

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.conv = nn.Conv1d(args.width, args.width, 4, groups=args.width)
        self.proj = nn.Linear(args.width, args.width)

    def __call__(self, x, cache):
        past = mx.zeros((x.shape[0], 3, x.shape[2])) if cache[0] is None else cache[0]
        window = mx.concatenate([past, x], axis=1)
        x = self.conv(window)
        keep = mx.exp(-self.proj(x))
        y, state = walk(x * mx.sqrt(1 - keep**2), keep, cache[1])
        cache[0] = window[:, -3:]
        cache[1] = state
        return y
"""

ACCEPTS = (
    Example("Mix", _SCANNED, "gathered"),
    Example("Mix", _FUNCTION, "kernel"),
    Example("Mix", _FUNCTION.replace("keep[:, t] * held +", "keep[:, t] * held -"), "gathered"),
    Example("Mix", _FUNCTION.replace("whole[:, t] = held", "whole[:, t] = 2 * held"), "gathered"),
    Example("Mix", _FUNCTION.replace("[1] == 1:", "[1] == 2:"), "gathered"),
    Example(
        "Mix", _FUNCTION.replace("before[:, None] + inputs", "before + inputs"), "per-sequence"
    ),
    Example("Mix", _FUNCTION.replace("(inputs.shape[1]):", "(1, inputs.shape[1]):"), "gathered"),
)
REJECTS = (Counter("Mix", _SCAN, "selective_scan"),)
