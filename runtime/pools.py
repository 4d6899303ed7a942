"""The pool of one paged entry: keys and values of all its blocks."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from . import gathered as ops
from .gathered import Ragged


class Pool:
    """Keys [num_blocks, block_size, Hkv, Dk] and values [num_blocks, block_size, Hkv, Dv].

    The arrays are made by the first write, from the shapes and type of what is written; `dtype`
    overrides the type. With `poison`, blocks that nobody holds are NaN.
    """

    __slots__ = ("_keys", "_values", "block_size", "dtype", "num_blocks", "poison", "serial")

    def __init__(
        self, num_blocks: int, block_size: int, dtype: mx.Dtype | None = None, poison: bool = False
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.poison = poison
        self.serial = -1
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    @property
    def made(self) -> bool:
        return self._keys is not None

    def arrays(self) -> tuple[mx.array, mx.array]:
        if self._keys is None or self._values is None:
            raise RuntimeError("a paged cache was read before anything was written to it")
        return self._keys, self._values

    def write(self, keys: mx.array, values: mx.array, ragged: Ragged | None, serial: int) -> None:
        """Store a step's rows, keys [T, Hkv, 1, Dk] and values [T, Hkv, 1, Dv]; once per step."""
        if self.serial == serial:
            raise RuntimeError("two layers write to one cache entry in the same step")
        if ragged is None:
            raise RuntimeError("a cache entry that paged nothing so far is written to now")
        if self._keys is None or self._values is None:
            self._make(keys, values)
        key_pool, value_pool = self.arrays()
        # The old arrays must have no other owner when the write is evaluated, or it copies them.
        self._keys = self._values = None
        self._keys, self._values = ops.write_kv(key_pool, value_pool, keys, values, ragged)
        self.serial = serial

    def require_written(self, serial: int) -> None:
        if self.serial != serial:
            raise RuntimeError("keys are shared before the layer that owns them wrote them")

    def fill_freed(self, blocks: Sequence[int]) -> None:
        """Overwrite freed blocks with NaN: whatever reads them afterwards shows."""
        if self._keys is None or self._values is None or not blocks:
            return
        where = mx.array(np.array(blocks, dtype=np.int32))
        self._keys[where] = mx.array(float("nan"), self._keys.dtype)
        self._values[where] = mx.array(float("nan"), self._values.dtype)

    def _make(self, keys: mx.array, values: mx.array) -> None:
        fill = float("nan") if self.poison else 0.0
        front = (self.num_blocks, self.block_size)

        def empty(rows: mx.array) -> mx.array:
            if rows.ndim != 4 or rows.shape[2] != 1:
                raise TypeError(
                    f"expected rows of one token, [T, heads, 1, width], got {list(rows.shape)}"
                )
            return mx.full((*front, rows.shape[1], rows.shape[3]), fill, self.dtype or rows.dtype)

        self._keys, self._values = empty(keys), empty(values)
