"""kimi_delta: Kimi delta attention, a delta rule with one decay per key channel.

Matches     a class that updates a matrix state with the gated delta rule where the gate has the
            shape of the keys. Kimi Linear, arXiv 2510.26692, section 3.
Refuses     one gate per head (gated_delta).
Becomes     the original code, once for all sequences with equally many rows, its recurrence an op
            (`delta_rule`).
"""

from __future__ import annotations

from ..ir import Match, Miss
from ..match import Mixer
from ..per_length import per_length, recurrences
from ..states import delta_gate_is_per_channel, delta_updates
from . import Counter, Example
from .gated_delta import _DELTA

NAME = "kimi_delta"
_UPDATES = tuple(f"{p}.models.gated_delta.gated_delta_update" for p in ("mlx_lm", "mlx_vlm"))


def match(mixer: Mixer) -> Match | Miss:
    updates = delta_updates(mixer)
    if not updates:
        return Miss(NAME, 0, "a call of the gated delta rule")
    if not mixer.state_stores:
        return Miss(NAME, 1, "the state is stored in a cache")
    if not all(delta_gate_is_per_channel(effect.value) for effect in updates):
        return Miss(NAME, 2, "one gate per key channel", mixer.place(updates[0]))
    evidence = [mixer.evidence("delta rule, gate per channel", effect) for effect in updates]
    evidence += [mixer.evidence("state stored", effect) for effect in mixer.state_stores]
    ops = recurrences(mixer, updates, _UPDATES, "delta_rule", NAME)
    return per_length(mixer, NAME, evidence, ops=ops)


_CHANNELS = _DELTA.replace("k, v, a, b,", "k, v, a.reshape(B, L, 2, -1), b,")
ACCEPTS = (
    Example("Mix", _CHANNELS, "kernel"),
    Example("Mix", _CHANNELS.replace("mlx_lm.", "mlx_vlm."), "kernel"),
)
REJECTS = (Counter("Mix", _DELTA, "gated_delta"),)
