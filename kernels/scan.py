"""Diagonal linear recurrences h <- a h + x, as in RG-LRU (arXiv 2402.19427)."""

from __future__ import annotations

import mlx.core as mx

from . import launch
from .metadata import sizes
from .render import render
from .specs import DTYPES
from .state_specs import ScanSpec, dtype_name

AHEAD = 8


def diagonal(x: mx.array, a: mx.array, start: mx.array | None) -> tuple[mx.array, mx.array]:
    """All h and the last: x, a [N, L, D] and start [N, D], None for zeros, to [N, L, D] in the type
    of x and [N, D] float32."""
    if start is None:
        start = mx.zeros((x.shape[0], x.shape[2]), mx.float32)
    start = start.astype(mx.float32)
    if x.shape[1] == 1 or launch.active() is None or dtype_name(x.dtype) not in DTYPES:
        return doubled(x, a, start)
    count, length, channels = x.shape
    spec = ScanSpec(rows_dtype=dtype_name(x.dtype), channels=channels, simdgroups=1, ahead=AHEAD)
    inputs = {"inputs": x, "factors": a, "start": start, "sizes": sizes(length)}
    y, last = render(spec)(
        inputs,
        [(x.shape, x.dtype), (start.shape, mx.float32)],
        groups=count * -(-channels // 32),
        threads=32,
    )
    return y, last


def doubled(x: mx.array, a: mx.array, start: mx.array) -> tuple[mx.array, mx.array]:
    """In doubling steps: after each, every h holds twice as many of the tokens before it."""
    factors, sums = a.astype(mx.float32), x.astype(mx.float32)
    first = sums[:, :1] + factors[:, :1] * start[:, None]
    sums = mx.concatenate([first, sums[:, 1:]], axis=1)
    reach = 1
    while reach < x.shape[1]:
        more = factors[:, reach:] * sums[:, :-reach]
        sums = mx.concatenate([sums[:, :reach], sums[:, reach:] + more], axis=1)
        grown = factors[:, reach:] * factors[:, :-reach]
        factors = mx.concatenate([factors[:, :reach], grown], axis=1)
        reach *= 2
    return sums.astype(x.dtype), sums[:, -1]
