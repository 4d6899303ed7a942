"""Depthwise convolutions of a few taps: one product and sum for each tap.

MLX's general convolutions plan anew for every shape, and a ragged batch has a new one in every
step; this has no plan.
"""

from __future__ import annotations

import mlx.core as mx

from . import launch
from .metadata import sizes
from .render import render
from .specs import DTYPES
from .state_specs import DepthwiseSpec, dtype_name

MOST_TAPS = 16
ROWS = 16


def depthwise(windows: mx.array, weights: mx.array, bias: mx.array | None = None) -> mx.array:
    """windows [N, K - 1 + L, C], weights [C, K, 1], bias [C] -> [N, L, C], in float32 inside."""
    channels, taps = weights.shape[:2]
    count, length = windows.shape[0], windows.shape[1] - taps + 1
    if length < 1:
        raise ValueError(f"a convolution of {taps} taps over {windows.shape[1]} tokens")
    if launch.active() is None or dtype_name(windows.dtype) not in DTYPES:
        return _plain(windows, weights, bias)
    rows = min(ROWS, 1 << (length - 1).bit_length())
    spec = DepthwiseSpec(
        rows_dtype=dtype_name(windows.dtype),
        channels=channels,
        taps=taps,
        rows=rows,
        simdgroups=min(4, -(-channels // 32)),
        bias=bias is not None,
    )
    pieces = -(-length // rows)
    inputs = {"windows": windows, "weights": weights, "sizes": sizes(length, pieces)}
    if bias is not None:
        inputs["offsets"] = bias
    (out,) = render(spec)(
        inputs,
        [((count, length, channels), windows.dtype)],
        groups=count * pieces * -(-channels // (32 * spec.simdgroups)),
        threads=32 * spec.simdgroups,
    )
    return out


@mx.compile
def _plain(windows: mx.array, weights: mx.array, bias: mx.array | None) -> mx.array:
    taps = weights.shape[1]
    length = windows.shape[1] - taps + 1
    wide, factors = windows.astype(mx.float32), weights.astype(mx.float32)
    total = wide[:, :length] * factors[:, 0, 0]
    for i in range(1, taps):
        total = total + wide[:, i : i + length] * factors[:, i, 0]
    if bias is not None:
        total = total + bias.astype(mx.float32)
    return total.astype(windows.dtype)
