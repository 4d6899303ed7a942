"""id_history: an embedding of the last few token ids (n-grams).

Matches     a class that keeps the tail of the token ids in a cache and looks up embeddings of
            them joined. LongCat-Flash n-gram embeddings.
Refuses     state of hidden values (token_shift_mixing, short_conv).
Becomes     the original code, once for all sequences with equally many rows.
"""

from __future__ import annotations

from ..ir import Match, Miss
from ..match import Mixer
from ..per_length import per_length
from ..states import Reach
from . import Counter, Example

NAME = "id_history"


def match(mixer: Mixer) -> Match | Miss:
    reach = Reach(mixer)
    if not mixer.state_stores or mixer.fetches:
        return Miss(NAME, 0, "state in a cache, and no keys")
    if reach.convolutions() or reach.library_recurrence():
        return Miss(NAME, 1, "neither a convolution nor a recurrence")
    if not reach.embeds():
        return Miss(NAME, 1, "embeddings of the ids kept")
    if not reach.joins_state():
        return Miss(NAME, 2, "the ids kept joined with the new ones")
    evidence = [mixer.evidence("state stored", effect) for effect in mixer.state_stores]
    return per_length(mixer, NAME, evidence, rank=2)


_IDS = """
import mlx.core as mx
import mlx.nn as nn

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.table = nn.Embedding(args.size, args.width)

    def __call__(self, ids, cache=None):
        past = mx.zeros((ids.shape[0], 1), mx.int32) if cache[0] is None else cache[0]
        history = mx.concatenate([past, ids], axis=-1)
        cache[0] = history[..., -1:]
        return self.table(history[..., 1:] * 31 + history[..., :-1])
"""

ACCEPTS = (Example("Mix", _IDS, "gathered"),)
REJECTS = (Counter("Mix", _IDS.replace("self.table(", "abs("), None),)
