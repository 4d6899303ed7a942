"""selective_scan: Mamba, a selective state space scanned token by token.

Matches     a class with a causal convolution and a loop over tokens that carries a state through
            `state * exp(dt * A) + dt * x * B`, both states cached. Mamba, arXiv 2312.00752.
Refuses     gated recurrences with the sqrt(1 - a^2) input normaliser (gated_linear_recurrence).
Becomes     the original code, once for all sequences with equally many rows.
"""

from __future__ import annotations

from ..ir import Match, Miss
from ..match import Mixer
from ..per_length import per_length
from ..states import Reach
from . import Counter, Example

NAME = "selective_scan"


def match(mixer: Mixer) -> Match | Miss:
    reach = Reach(mixer)
    if not mixer.state_stores or mixer.fetches:
        return Miss(NAME, 0, "state in a cache, and no keys")
    if reach.library_recurrence():
        return Miss(NAME, 1, "the class scans its state itself")
    loops = reach.token_loops()
    if not loops or not reach.convolutions():
        return Miss(NAME, 1, "a loop over tokens and a causal convolution")
    if reach.complement_roots():
        return Miss(NAME, 2, "no sqrt(1 - a^2) normaliser")
    evidence = [mixer.evidence("state stored", effect) for effect in mixer.state_stores]
    return per_length(mixer, NAME, evidence)


_SCAN = """
import mlx.core as mx
import mlx.nn as nn

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.conv = nn.Conv1d(args.width, args.width, 4, groups=args.width)
        self.proj = nn.Linear(args.width, args.width)

    def scan(self, x, state):
        decay = mx.exp(-self.proj(x))
        out = []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + x[:, t]
            out.append(state)
        return mx.stack(out, axis=1), state

    def __call__(self, x, cache):
        window = mx.concatenate([cache[0], x], axis=1)
        y, state = self.scan(self.conv(window), cache[1])
        cache[0] = window[:, -3:]
        cache[1] = state
        return y
"""

ACCEPTS = (Example("Mix", _SCAN, "gathered"),)
REJECTS = (
    Counter(
        "Mix",
        _SCAN.replace("+ x[:, t]", "+ mx.sqrt(1 - decay[:, t] ** 2) * x[:, t]"),
        "gated_linear_recurrence",
    ),
    Counter("Mix", _SCAN.replace("self.conv(window)", "window"), "linear_attention"),
)
