"""selective_scan: Mamba, a selective state space scanned token by token.

Matches     a class with a causal convolution and a loop over tokens that carries a state through
            `state * exp(dt * A) + dt * x * B`, both states cached. Mamba, arXiv 2312.00752.
Refuses     gated recurrences with the sqrt(1 - a^2) input normaliser (gated_linear_recurrence).
Becomes     the original code, once for all sequences with equally many rows; a scan that is
            h <- h e^(dt A) + dt x B, y = sum(h C) + D x, and nothing else, is an op
            (`selective_scan`), and so are convolutions.
"""

from __future__ import annotations

from ..ir import Match, Miss
from ..match import Mixer
from ..per_length import per_length
from ..selective import selective_scans
from ..states import Reach
from . import Counter, Example

NAME = "selective_scan"


def match(mixer: Mixer) -> Match | Miss:
    reach = Reach(mixer)
    if not mixer.state_stores or mixer.fetches:
        return Miss(NAME, 0, "state in a cache, and no keys")
    if reach.library_recurrence():
        return Miss(NAME, 1, "the class scans its state itself")
    loops = reach.token_loops()
    if not loops or not reach.convolutions():
        return Miss(NAME, 1, "a loop over tokens and a causal convolution")
    if reach.complement_roots():
        return Miss(NAME, 2, "no sqrt(1 - a^2) normaliser")
    evidence = [mixer.evidence("state stored", effect) for effect in mixer.state_stores]
    return per_length(mixer, NAME, evidence, ops=selective_scans(mixer, NAME))


_SCAN = """
import mlx.core as mx
import mlx.nn as nn

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.conv = nn.Conv1d(args.width, args.width, 4, groups=args.width)
        self.proj = nn.Linear(args.width, args.width)

    def scan(self, x, state):
        decay = mx.exp(-self.proj(x))
        out = []
        state = mx.zeros_like(x[:, 0]) if state is None else state
        for t in range(x.shape[1]):
            state = decay[:, t] * state + x[:, t]
            out.append(state)
        return mx.stack(out, axis=1), state

    def __call__(self, x, cache):
        past = mx.zeros((x.shape[0], 3, x.shape[2])) if cache[0] is None else cache[0]
        window = mx.concatenate([past, x], axis=1)
        y, state = self.scan(self.conv(window), cache[1])
        cache[0] = window[:, -3:]
        cache[1] = state
        return y
"""

_HEAD = """
import mlx.core as mx
import mlx.nn as nn

@mx.compile
def joined(one, two, three):
    return three + one * two

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.conv = nn.Conv1d(args.width, args.width, 4, groups=args.width)
        self.proj = nn.Linear(args.width, args.rank + 2 * args.states)
        self.back = nn.Linear(args.rank, args.width)
        self.norm = nn.RMSNorm(args.states)
        self.rates = mx.zeros((args.width, args.states))
        self.skip = mx.zeros(args.width)
"""
_PARTS = """
        dt, b, c = mx.split(self.proj(x), [4, 8], axis=-1)
        b = self.norm(b)
        dt = nn.softplus(self.back(dt))
"""
_TOKEN = f"""{_HEAD}
    def one(self, x, rates, held=None):{_PARTS}
        new = mx.expand_dims(b, -2) * mx.expand_dims(x * dt, -1)
        if held is not None:
            new = mx.exp(rates * mx.expand_dims(dt, -1)) * held + new
        y = x * self.skip + (new @ mx.expand_dims(c, -1)).squeeze(-1)
        return y, new

    def __call__(self, x, cache):
        B, L, W = x.shape
        past = mx.zeros((x.shape[0], 3, x.shape[2])) if cache[0] is None else cache[0]
        window = mx.concatenate([past, x], axis=1)
        x = self.conv(window)
        held = cache[1]
        found = []
        for t in range(L):
            y, held = self.one(x[:, t], self.rates, held)
            found.append(y)
        z = mx.stack(found, axis=1)
        cache[0] = window[:, -3:]
        cache[1] = held
        return z
"""
_TOKENS = f"""{_HEAD}
    def every(self, x, rates, held=None):{_PARTS}
        new = mx.expand_dims(dt * x, -1) * mx.expand_dims(b, -2)
        kept = mx.exp(mx.expand_dims(dt, -1) * rates)
        for t in range(x.shape[1]):
            if held is not None:
                new[:, t] = joined(kept[:, t], held, new[:, t])
            held = new[:, t]
        y = (new @ mx.expand_dims(c, -1)).squeeze(-1) + self.skip * x
        return y, new[:, -1]

    def __call__(self, x, cache):
        past = mx.zeros((x.shape[0], 3, x.shape[2])) if cache[0] is None else cache[0]
        window = mx.concatenate([past, x], axis=1)
        y, held = self.every(self.conv(window), self.rates, cache[1])
        cache[0] = window[:, -3:]
        cache[1] = held
        return y
"""


def _changed(
    source: str, *changes: tuple[str, str], route: str = "gathered"
) -> tuple[Example, ...]:
    """Something else than the rule: the class runs as it is."""
    assert all(source.count(old) == 1 for old, _ in changes), changes
    return tuple(Example("Mix", source.replace(*change), route) for change in changes)


ACCEPTS = (
    Example("Mix", _SCAN, "gathered"),
    Example("Mix", _TOKEN, "kernel"),
    Example("Mix", _TOKENS, "kernel"),
    Example("Mix", _TOKENS.replace("three + one * two", "one * two + three"), "kernel"),
    *_changed(
        _TOKEN,
        ("* held + new", "* held - new"),
        ("expand_dims(x * dt, -1)", "expand_dims(x + dt, -1)"),
        ("expand_dims(b, -2)", "expand_dims(b, -1)"),
        ("mx.exp(rates", "mx.expm1(rates"),
        ("(dt, -1)) * held", "(c, -1)) * held"),
        ("x * self.skip", "dt * self.skip"),
        (".squeeze(-1)\n", ".squeeze(1)\n"),
        ("return y, new\n", "return y, held\n"),
        ("return y, new\n", "print(y)\n        return y, new\n"),
        ("        b = self.norm(b)", "        b = mx.roll(b, 1, axis=1)"),
        ("[4, 8], axis=-1", "[4, 8], axis=1"),
        ("self.one(x[:, t]", "self.one(x[:, t - 1]"),
        ("x[:, t], self.rates, held", "x[:, t], self.rates * t, held"),
        ("            found.append(y)", "            found.append(2 * y)"),
        ("mx.stack(found, axis=1)", "mx.stack(found, axis=2)"),
        ("        cache[1] = held", "        cache[1] = held + 0 * self.one(x[:, 0], held)[1]"),
        ("range(L)", "range(1, L)"),
    ),
    *_changed(  # arrays that line up for one sequence only, or a sequence kept on the mixer
        _TOKEN,
        ("* held + new", "* held + x"),
        ("return y, new\n", "self.seen = y\n        return y, new\n"),
        ("        b = self.norm(b)", "        b = b / b.sum(-1)"),
        ("x[:, t], self.rates, held", "held, self.rates, x[:, t]"),
        ("            found.append(y)", "            found.append(y)\n            held = y"),
        route="per-sequence",
    ),
    *_changed(
        _TOKENS,
        ("three + one * two", "three - one * two"),
        ("joined(kept[:, t], held, new[:, t])", "joined(kept[:, t], new[:, t], held)"),
        ("joined(kept[:, t], held, new[:, t])", "joined(kept[:, t - 1], held, new[:, t])"),
        ("            held = new[:, t]", "            held = kept[:, t]"),
        ("            if held is not None", "            if held is None"),
        ("new[:, -1]", "new[:, 0]"),
        ("(new @ mx", "(kept @ mx"),
        ("self.skip * x", "self.skip * dt"),
    ),
)
REJECTS = (
    Counter(
        "Mix",
        _SCAN.replace("+ x[:, t]", "+ mx.sqrt(1 - decay[:, t] ** 2) * x[:, t]"),
        "gated_linear_recurrence",
    ),
    Counter("Mix", _SCAN.replace("self.conv(window)", "window"), "linear_attention"),
)
