"""sparse_selection: attention over a selection of the cached keys.

Matches     a class that ranks cached keys (an indexer, block scores) and attends to the best, or
            that reads the cache's arrays to do so. DeepSeek-V3.2 sparse attention (DSA), MiniMax
            block selection.
Refuses     everything that attends to all keys it may see.
Becomes     the original code, once per sequence.
"""

from __future__ import annotations

from ..ir import Match, Miss
from ..match import Mixer
from ..per_sequence import per_sequence
from . import Counter, Example

NAME = "sparse_selection"

_RANKINGS = ("mlx.core.argpartition", "mlx.core.argsort", "mlx.core.topk", "mlx.core.partition")


def match(mixer: Mixer) -> Match | Miss:
    if not mixer.fetches:
        return Miss(NAME, 0, "a fetch from a cache")
    if mixer.state_stores:
        return Miss(NAME, 1, "no state beside keys and values")
    rankings = mixer.calls(*_RANKINGS)
    reads = [read for read in mixer.cache_reads() if read.data in ("keys", "values")]
    if not rankings and not reads:
        return Miss(NAME, 1, "keys are ranked, or the cache's arrays are read")
    evidence = [mixer.evidence("keys ranked", effect) for effect in rankings]
    evidence += [mixer.evidence("cache array read", read) for read in reads]
    return per_sequence(mixer, NAME, evidence)


_INDEX = """
import mlx.core as mx
import mlx.nn as nn

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.q = nn.Linear(args.width, args.width)
        self.k = nn.Linear(args.width, args.width)

    def __call__(self, x, mask=None, cache=None):
        q, k = self.q(x)[:, None], self.k(x)[:, None]
        if cache is not None:
            k, _ = cache.update_and_fetch(k, k)
        scores = q @ k.swapaxes(-1, -2)
        return mx.argpartition(scores, kth=-4, axis=-1)[..., -4:]
"""

ACCEPTS = (Example("Mix", _INDEX, "per-sequence"),)
REJECTS = (Counter("Mix", _INDEX.replace("mx.argpartition(scores, kth=-4, axis=-1)", "mx.exp(scores)"), None),)
