"""token_shift_mixing: each token is mixed with the one before it (RWKV).

Matches     a class that joins its cached last token with all but the last of its input, with or
            without a matrix state scanned over tokens. RWKV-7, arXiv 2503.14456.
Refuses     convolutions (short_conv) and joins along the features.
Becomes     the original code, once for all sequences with equally many rows.
"""

from __future__ import annotations

from ..ir import Match, Miss
from ..match import Mixer
from ..per_length import per_length
from ..states import Reach
from . import Counter, Example

NAME = "token_shift_mixing"


def match(mixer: Mixer) -> Match | Miss:
    reach = Reach(mixer)
    if not mixer.state_stores or mixer.fetches:
        return Miss(NAME, 0, "state in a cache, and no keys")
    if reach.library_recurrence() or reach.convolutions():
        return Miss(NAME, 1, "neither a convolution nor a library recurrence")
    if reach.embeds():
        return Miss(NAME, 1, "hidden states, not ids")
    if not reach.token_shifts():
        return Miss(NAME, 2, "the last token joined with all but the last of the input")
    features = ("matrix state",) if reach.token_loops() else ()
    evidence = [mixer.evidence("state stored", effect) for effect in mixer.state_stores]
    return per_length(mixer, NAME, evidence, features)


_SHIFT = """
import mlx.core as mx
import mlx.nn as nn

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.proj = nn.Linear(args.width, args.width)

    def __call__(self, x, cache):
        before = mx.concatenate([cache[0], x[:, :-1]], axis=1)
        cache[0] = x[:, -1:]
        return self.proj(x + before)
"""

ACCEPTS = (Example("Mix", _SHIFT, "gathered"),)
REJECTS = (
    Counter("Mix", _SHIFT.replace("[cache[0], x[:, :-1]], axis=1", "[cache[0], x], axis=-1"), None),
)
