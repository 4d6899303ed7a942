"""token_shift_mixing: each token is mixed with the one before it (RWKV).

Matches     a class that joins its cached last token with all but the last of its input, with or
            without a matrix state scanned over tokens. RWKV-7, arXiv 2503.14456.
Refuses     convolutions (short_conv) and joins along the features.
Becomes     the original code, on rows: a function that gives each token the one before it is an op
            (`shifted_rows`), as is a scan that is h <- h diag(w) + (h a) b^T + v k^T, y = h r, and
            nothing else (`low_rank_scan`). Where such a function has another form, or the rest of
            the class is not proved to treat rows alone, the code runs once for all sequences with
            equally many rows.
"""

from __future__ import annotations

from ..ir import Match, Miss
from ..low_rank import low_rank_scans
from ..match import Mixer
from ..per_length import per_length
from ..states import Reach
from ..token_rows import token_rows
from . import Counter, Example

NAME = "token_shift_mixing"


def match(mixer: Mixer) -> Match | Miss:
    reach = Reach(mixer)
    if not mixer.state_stores or mixer.fetches:
        return Miss(NAME, 0, "state in a cache, and no keys")
    if reach.library_recurrence() or reach.convolutions():
        return Miss(NAME, 1, "neither a convolution nor a library recurrence")
    if reach.embeds():
        return Miss(NAME, 1, "hidden states, not ids")
    if not reach.token_shifts():
        return Miss(NAME, 2, "the last token joined with all but the last of the input")
    features = ("matrix state",) if reach.token_loops() else ()
    evidence = [mixer.evidence("state stored", effect) for effect in mixer.state_stores]
    scans = low_rank_scans(mixer, NAME)
    found = per_length(mixer, NAME, evidence, features, scans)
    if isinstance(found, Miss):
        return found
    return token_rows(mixer, NAME, evidence, features, scans, found) or found


_SHIFT = """
import mlx.core as mx
import mlx.nn as nn

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.proj = nn.Linear(args.width, args.width)

    def __call__(self, x, cache):
        past = mx.zeros((x.shape[0], 1, x.shape[2])) if cache[0] is None else cache[0]
        before = mx.concatenate([past, x[:, :-1]], axis=1)
        cache[0] = x[:, -1:]
        return self.proj(x + before)
"""

_MATRIX = """
from functools import partial

import mlx.core as mx
import mlx.nn as nn

@partial(mx.compile, shapeless=True)
def one(query, keep, key, value, read, write, held):
    turned = (held @ read[..., None]) @ write[..., None, :]
    held = held * keep[:, :, None, :] + value[..., None] @ key[..., None, :] + turned
    return held @ query[..., None], held

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.heads = args.heads
        self.proj = nn.Linear(args.width, 6 * args.width)

    def walk(self, query, keep, key, value, read, write, held):
        B, L, H, D = query.shape
        if held is None:
            held = mx.zeros((B, H, D, D), dtype=query.dtype)
        if mx.default_device() == mx.gpu and mx.metal.is_available():
            return fast(query, keep, key, value, read, write, held)
        else:
            found = []
            for t in range(L):
                y, held = one(query[:, t], keep[:, t], key[:, t], value[:, t], read[:, t],
                              write[:, t], held)
                found.append(y)
            return mx.stack(found, axis=1).astype(query.dtype), held

    def __call__(self, x, cache):
        B, L, _ = x.shape
        past = mx.zeros((x.shape[0], 1, x.shape[2])) if cache[0] is None else cache[0]
        mixed = mx.concatenate([past, x[:, :-1]], axis=1)
        parts = mx.split(self.proj(x + mixed).reshape(B, L, self.heads, -1), 6, axis=-1)
        y, held = self.walk(*parts, cache[1])
        cache[0] = x[:, -1:]
        cache[1] = held
        return y.reshape(B, L, -1)

kernel = mx.fast.metal_kernel("fast", input_names=[], output_names=[], source="")

def fast(query, keep, key, value, read, write, held):
    return kernel(
        inputs=[query, keep, key, value, read, write, held],
        grid=(32, 1, 1), threadgroup=(32, 1, 1),
        output_shapes=[query.shape, held.shape], output_dtypes=[query.dtype, held.dtype])
"""

_ROWS = """
import mlx.core as mx
import mlx.nn as nn

class Before(nn.Module):
    def __call__(self, x, last):
        B, L, D = x.shape
        if last is None:
            last = mx.zeros((B, 1, D), x.dtype)
        if L == 1:
            return last
        return mx.concatenate([last, x[:, :-1]], axis=1)

class Mix(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.before = Before()
        self.proj = nn.Linear(args.width, args.width)

    def __call__(self, x, cache):
        y = self.proj(x + self.before(x, cache[0]))
        cache[0] = x[:, -1:]
        cache[1] = y[:, -1:, :]
        return y
"""

ACCEPTS = (
    Example("Mix", _SHIFT, "gathered"),
    Example("Mix", _ROWS, "kernel"),
    Example("Mix", _ROWS.replace("x[:, -1:]", "x[:, :1]"), "gathered"),
    Example("Mix", _ROWS.replace("x[:, -1:]", "x[:, -1:][:, :, :9]"), "gathered"),
    Example("Mix", _ROWS.replace("= y[:, -1:, :]", "= y[:, -2:, :]"), "gathered"),
    Example("Mix", _ROWS.replace("mx.zeros(", "mx.ones("), "gathered"),
    Example("Mix", _ROWS.replace("(B, 1, D)", "(B, 2, D)"), "gathered"),
    Example("Mix", _ROWS.replace("L == 1:", "L == 2:"), "gathered"),
    Example("Mix", _ROWS.replace("L == 1:", "D == 1:"), "gathered"),
    Example("Mix", _ROWS.replace("return last", "return 2 * last"), "gathered"),
    Example("Mix", _ROWS.replace("last, x[:, :-1]", "x[:, :-1], last"), "gathered"),
    Example("Mix", _ROWS.replace("[:, :-1]], axis=1", "[:, :-1]], axis=2"), "gathered"),
    Example("Mix", _ROWS.replace("    def __call__(self, x, la", """    @two
    def __call__(self, x, la"""), "per-sequence"),
    Example("Mix", _MATRIX, "kernel"),
    # What is no op is taken with its kernel, which nobody has read.
    Example("Mix", _MATRIX.replace("query[..., None], held", "key[..., None], held"),
            "per-sequence"),
    Example("Mix", _MATRIX.replace("y[..., None], held", "y[..., None], turned"), "per-sequence"),
    Example("Mix", _MATRIX.replace("+ turned", "- turned"), "per-sequence"),
    Example("Mix", _MATRIX.replace("* keep[:, :, None, :]", "* keep[:, :, :, None]"),
            "per-sequence"),
    Example("Mix", _MATRIX.replace("value[:, t], read", "value[:, t - 1], read"), "per-sequence"),
    Example("Mix", _MATRIX.replace("(found, axis=1)", "(found[1:], axis=1)"), "per-sequence"),
    Example("Mix", _MATRIX.replace("range(L)", "range(1, L)"), "per-sequence"),
    Example("Mix", _MATRIX.replace("found.append(y)", "found.append(y * 2)"), "per-sequence"),
    Example("Mix", _MATRIX.replace("mx.metal.is_available()", "B > 1"), "per-sequence"),
    Example("Mix", _MATRIX.replace("mx.metal.is_available()", "L > 9"), "per-sequence"),
    Example("Mix", _MATRIX.replace("return fast(query,", "return fast(key,"), "per-sequence"),
    Example("Mix", _MATRIX.replace("@partial(mx.compile, shapeless=True)", "@twice"),
            "per-sequence"),
)  # fmt: skip
REJECTS = (Counter("Mix", _SHIFT.replace("[past, x[:, :-1]], axis=1", "[past, x], axis=-1"), None),)
