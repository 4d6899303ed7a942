"""block_sparse: softmax over a fixed pattern of key blocks, spelled out by the class.

Matches     a class that hands fetched keys to a method of its own with a softmax of products in it
            that is not plain masked attention: a block pattern is added to the mask. Phi-3-small,
            arXiv 2404.14219.
Refuses     plain masked softmax (handwritten_softmax) and selections by rank (sparse_selection).
Becomes     the original code, once per sequence.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..attention import fetched_flow
from ..ir import Match, Miss, Value
from ..match import Mixer, every_value, library_call
from ..per_sequence import per_sequence
from . import Counter, Example

NAME = "block_sparse"


def match(mixer: Mixer) -> Match | Miss:
    if not mixer.fetches or mixer.state_stores or mixer.cache_reads():
        return Miss(NAME, 0, "keys and values in a cache, and no other state")
    evidence = []
    for method in mixer.methods:
        for value in fetched_flow(mixer, method).foreign:
            if not _is_own_softmax(mixer, value.args[0].data if value.op == "call" else None):
                where = mixer.place(value)
                return Miss(NAME, 1, "fetched keys go to a softmax of the class", where)
            evidence.append(mixer.evidence("own softmax", value))
    if not evidence:
        return Miss(NAME, 1, "a method of the class with a softmax over fetched keys")
    return per_sequence(mixer, NAME, evidence)


def _is_own_softmax(mixer: Mixer, name: str | None) -> bool:
    method = mixer.cls.methods.get(name or "")
    if method is None:
        return False
    for value in every_value(method):
        scores = library_call(mixer.program, value, "mlx.core.softmax")
        if scores and _sums(scores[0].walk()) >= 1:
            return any(part.op == "binary" and part.data == "@" for part in scores[0].walk())
    return False


def _sums(values: Iterable[Value]) -> int:
    """How many masks are added to the scores."""
    return sum(value.op == "binary" and value.data == "+" for value in values)


_BLOCKS = """
import mlx.core as mx
import mlx.nn as nn

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.qkv = nn.Linear(args.width, 3 * args.width)

    def blocks(self, q, k, v, mask):
        scores = q @ k.swapaxes(-1, -2)
        near = mx.arange(k.shape[2]) // 4 == mx.arange(q.shape[2])[:, None] // 4
        scores = scores + mask
        scores = scores + mx.where(near, 0.0, -1e9)
        return mx.softmax(scores, axis=-1) @ v

    def __call__(self, x, mask=None, cache=None):
        q, k, v = (p[:, None] for p in mx.split(self.qkv(x), 3, axis=-1))
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        return self.blocks(q, k, v, mask)[:, 0]
"""

ACCEPTS = (Example("Mix", _BLOCKS, "per-sequence"),)
REJECTS = (Counter("Mix", _BLOCKS.replace("mx.softmax(scores, axis=-1)", "scores"), None),)
