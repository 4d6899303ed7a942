"""Small int32 arrays that tell a kernel about its step."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

# MLX binds inputs of fewer elements as `constant`, longer ones as `device`: another kernel. Padding
# keeps every metadata array on one side of the limit, so that nothing compiles in mid-serving.
MIN_METADATA = 8


def padded(values: npt.ArrayLike, fill: int = 0) -> mx.array:
    """Numbers [n, ...] as int32 [max(n, MIN_METADATA), ...], `fill` behind them."""
    given = np.asarray(values, np.int32)
    result = np.full((max(MIN_METADATA, len(given)), *given.shape[1:]), fill, np.int32)
    result[: len(given)] = given
    return mx.array(result)


@cache
def sizes(*numbers: int) -> mx.array:
    """A few sizes, the same array for the same ones."""
    return padded(numbers)
