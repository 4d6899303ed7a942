"""gated_delta: gated delta net, one decay per head.

Matches     a class that updates a matrix state with the library's gated delta rule, with a scalar
            gate per head, usually behind a causal convolution. Gated Delta Networks, arXiv
            2412.06464.
Refuses     a gate per key channel (kimi_delta).
Becomes     the original code, once for all sequences with equally many rows, its recurrence an op
            (`delta_rule`).
"""

from __future__ import annotations

from ..ir import Match, Miss
from ..match import Mixer
from ..per_length import per_length, recurrences
from ..states import delta_gate_is_per_channel, delta_updates
from . import Counter, Example

NAME = "gated_delta"


def match(mixer: Mixer) -> Match | Miss:
    updates = delta_updates(mixer)
    if not updates:
        return Miss(NAME, 0, "a call of the gated delta rule")
    stores = [*mixer.state_stores, *mixer.state_updates]
    if not stores and not any("cache" in effect.value.data for effect in updates):
        return Miss(NAME, 1, "the state is stored in a cache")
    if any(delta_gate_is_per_channel(effect.value) for effect in updates):
        return Miss(NAME, 2, "one gate per head", mixer.place(updates[0]))
    evidence = [mixer.evidence("gated delta rule", effect) for effect in updates]
    evidence += [mixer.evidence("state stored", effect) for effect in stores]
    ops = recurrences(mixer, updates, None, "delta_rule", NAME)
    return per_length(mixer, NAME, evidence, ops=ops)


_DELTA = """
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gated_delta import gated_delta_update

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.qkv = nn.Linear(args.width, 3 * args.width)
        self.gates = nn.Linear(args.width, 2 * args.heads)
        self.A_log = mx.zeros((args.heads,))
        self.dt_bias = mx.zeros((args.heads,))

    def __call__(self, x, mask=None, cache=None):
        B, L, _ = x.shape
        q, k, v = (part.reshape(B, L, 2, -1) for part in mx.split(self.qkv(x), 3, axis=-1))
        a, b = mx.split(self.gates(x), 2, axis=-1)
        state = cache[0] if cache is not None else None
        y, state = gated_delta_update(q, k, v, a, b, self.A_log, self.dt_bias, state, mask)
        if cache is not None:
            cache[0] = state
        return y.reshape(B, L, -1)
"""

_VLM = _DELTA.replace("mlx_lm.", "mlx_vlm.")
_KEPT = _VLM.replace("self.dt_bias, state, mask)", "self.dt_bias, mask=mask, cache=cache)")
_KEPT = _KEPT.replace("cache[0] = state", "cache.update_window(0, x, 3, lengths=cache.lengths)")
ACCEPTS = (
    Example("Mix", _DELTA, "kernel"),
    Example("Mix", _VLM, "kernel"),
    Example("Mix", _VLM.replace("state, mask)", "state, mask, cache=None)"), "kernel"),
    Example("Mix", _VLM.replace("state, mask)", "state, mask, state_steps=1)"), "per-sequence"),
    Example("Mix", _KEPT),
)
REJECTS = (
    Counter("Mix", _DELTA.replace("k, v, a, b,", "k, v, a.reshape(B, L, 2, -1), b,"), "kimi_delta"),
    Counter("Mix", _DELTA.replace("cache[0] = state", "pass"), None),
)
