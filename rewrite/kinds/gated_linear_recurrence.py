"""gated_linear_recurrence: RG-LRU, a diagonal gated recurrence behind a causal convolution.

Matches     a class with a causal convolution and a scan over tokens whose input is scaled by
            sqrt(1 - a^2). Griffin, arXiv 2402.19427, section 2.4.
Refuses     scans without that normaliser (selective_scan).
Becomes     the original code, once for all sequences with equally many rows.
"""

from __future__ import annotations

from ..ir import Match, Miss
from ..match import Mixer
from ..per_length import per_length
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
    return per_length(mixer, NAME, evidence)


ACCEPTS = (
    Example(
        "Mix",
        _SCAN.replace("+ x[:, t]", "+ mx.sqrt(1 - decay[:, t] ** 2) * x[:, t]"),
        "gathered",
    ),
)
REJECTS = (Counter("Mix", _SCAN, "selective_scan"),)
