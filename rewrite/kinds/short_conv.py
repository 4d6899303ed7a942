"""short_conv: a causal convolution with a window of a few tokens.

Matches     a class whose only state is the tail that its convolutions need. LFM2's gated short
            convolution and convolved key-value gates.
Refuses     a scan beside the convolution (selective_scan, gated_delta, state_space_dual).
Becomes     the original code, once for all sequences with equally many rows, its convolution an op
            (`convolve`).
"""

from __future__ import annotations

from ..convolutions import convolutions
from ..ir import Match, Miss
from ..match import Mixer
from ..per_length import per_length
from ..states import Reach
from . import Counter, Example
from .selective_scan import _SCAN

NAME = "short_conv"


def match(mixer: Mixer) -> Match | Miss:
    reach = Reach(mixer)
    if not mixer.state_stores or mixer.fetches:
        return Miss(NAME, 0, "state in a cache, and no keys")
    if not reach.convolutions():
        return Miss(NAME, 1, "a causal convolution")
    if reach.library_recurrence() or reach.token_loops():
        return Miss(NAME, 2, "no scan beside the convolution")
    evidence = [mixer.evidence("state stored", effect) for effect in mixer.state_stores]
    return per_length(mixer, NAME, evidence, ops=convolutions(mixer, NAME))


_CONV = """
import mlx.core as mx
import mlx.nn as nn

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.conv = nn.Conv1d(args.width, args.width, 4, groups=args.width)

    def __call__(self, x, mask=None, cache=None):
        past = mx.zeros((x.shape[0], 3, x.shape[2])) if cache[0] is None else cache[0]
        window = mx.concatenate([past, x], axis=1)
        cache[0] = window[:, -3:]
        return self.conv(window)
"""

ACCEPTS = (Example("Mix", _CONV, "kernel"),)
REJECTS = (Counter("Mix", _SCAN, "selective_scan"),)
