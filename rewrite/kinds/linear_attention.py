"""linear_attention: a matrix state with a fixed or learned decay, scanned token by token.

Matches     a class that carries a state through a loop over tokens, cached, with no convolution
            and no token shift: lightning attention, gated linear attention. arXiv 2401.04658.
Refuses     convolutions (selective_scan) and token shift (token_shift_mixing).
Becomes     the original code, once for all sequences with equally many rows.
"""

from __future__ import annotations

from ..ir import Match, Miss
from ..match import Mixer
from ..per_length import per_length
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
    return per_length(mixer, NAME, evidence)


ACCEPTS = (Example("Mix", _SCAN.replace("self.conv(window)", "window"), "gathered"),)
REJECTS = (Counter("Mix", _SCAN, "selective_scan"),)
