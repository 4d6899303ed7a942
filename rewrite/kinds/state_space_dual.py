"""state_space_dual: Mamba-2, a selective state space with a scalar decay per head.

Matches     a class that calls the library's `ssm_update` and keeps its state, usually behind a
            causal convolution. Transformers are SSMs, arXiv 2405.21060.
Refuses     state spaces scanned by the class itself (selective_scan).
Becomes     the original code, once for all sequences with equally many rows, its recurrence an op
            (`state_space_dual`).
"""

from __future__ import annotations

from ..ir import Match, Miss
from ..match import Mixer
from ..per_length import per_length, recurrences
from . import Counter, Example

NAME = "state_space_dual"
_UPDATES = tuple(f"{p}.models.ssm.ssm_update" for p in ("mlx_lm", "mlx_vlm"))


def match(mixer: Mixer) -> Match | Miss:
    updates = mixer.calls_into(("mlx_lm.models.ssm.", "mlx_vlm.models.ssm."))
    if not updates:
        return Miss(NAME, 0, "a call of ssm_update")
    if not mixer.state_stores:
        return Miss(NAME, 1, "the state is stored in a cache")
    evidence = [mixer.evidence("state space update", effect) for effect in updates]
    evidence += [mixer.evidence("state stored", effect) for effect in mixer.state_stores]
    ops = recurrences(mixer, updates, _UPDATES, "state_space_dual", NAME)
    return per_length(mixer, NAME, evidence, ops=ops)


_SSD = """
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.ssm import ssm_update

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.proj = nn.Linear(args.width, 4 * args.width)
        self.A_log = mx.zeros((args.heads,))
        self.D = mx.zeros((args.heads,))
        self.dt_bias = mx.zeros((args.heads,))

    def __call__(self, x, mask=None, cache=None):
        B, L, _ = x.shape
        h, b, c, dt = mx.split(self.proj(x).reshape(B, L, 4, -1), 4, axis=-1)
        state = cache[0] if cache is not None else None
        y, state = ssm_update(h, self.A_log, b, c, self.D, dt[..., 0], self.dt_bias, state)
        if cache is not None:
            cache[0] = state
        return y.reshape(B, L, -1)
"""

ACCEPTS = (
    Example("Mix", _SSD, "kernel"),
    Example("Mix", _SSD.replace("mlx_lm.", "mlx_vlm."), "kernel"),
)
REJECTS = (Counter("Mix", _SSD.replace("cache[0] = state", "pass"), None),)
