"""sparse_selection: attention over a selection of the cached keys.

Matches     a class that ranks cached keys (an indexer, block scores), itself or by a module it
            holds, and attends to the best. DeepSeek-V3.2 sparse attention (DSA), MiniMax blocks.
Refuses     everything that attends to all keys it may see.
Becomes     the original code, once per sequence.
"""

from __future__ import annotations

from ..ir import Match, Miss
from ..match import Mixer, callee_name
from ..per_sequence import per_sequence
from ..states import Reach
from . import Counter, Example

NAME = "sparse_selection"

_RANKINGS = ("mlx.core.argpartition", "mlx.core.argsort", "mlx.core.topk", "mlx.core.partition")


def match(mixer: Mixer) -> Match | Miss:
    if not mixer.fetches:
        return Miss(NAME, 0, "a fetch from a cache")
    if mixer.state_stores:
        return Miss(NAME, 1, "no state beside keys and values")
    names = Reach(mixer)
    rankings = [e for e in names.calls() if callee_name(mixer.program, e.value) in _RANKINGS]
    if not rankings:
        return Miss(NAME, 1, "keys are ranked, by the class or a module it holds")
    own = {id(effect) for method in mixer.methods for effect in method.effects}
    evidence = [mixer.evidence("keys ranked", e) for e in rankings if id(e) in own]
    evidence += [mixer.evidence("cache array read", read) for read in mixer.cache_reads()]
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
REJECTS = (
    Counter(
        "Mix", _INDEX.replace("mx.argpartition(scores, kth=-4, axis=-1)", "mx.exp(scores)"), None
    ),
)
