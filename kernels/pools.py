"""The pool of one layer: keys and values in blocks, threaded through the ops as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from . import policy
from .quantization import Packing, Packings, Quantization

Layout = Literal["pages", "heads"]


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Keys and values of one layer's blocks. Every op that touches a pool returns the next one.

    layout "pages" (the kernels'): keys [num_blocks, block_size, Hkv, Dk], values the same with Dv.
    layout "heads" (MLX's CPU back end): keys [Hkv, num_blocks * block_size, Dk]; a run of blocks is
    then one contiguous matrix per head, which is the only form that MLX's CPU matmul does not copy.

    values: None for a cache without values of its own (a latent cache); attention then reads them
        from the first entries of each key.
    token: int32 [1]. Writes happen in place under "pages", behind the back of MLX's graph. Each op
        takes the token of the op before it as an input of its kernel and returns its own, so reads
        and writes of a pool run in the order in which they were made.
    packings: of a pool of codes: keys are then words, [num_blocks, words of a block] under "pages",
        [Hkv, num_blocks * block_size, words of a row] under "heads"; values the same.

    Only the newest Pool of a layer may be used: what an older one holds is unspecified.
    """

    keys: mx.array
    values: mx.array | None
    token: mx.array
    block_size: int
    layout: Layout
    packings: Packings | None = None

    @property
    def num_blocks(self) -> int:
        shape = self.keys.shape
        return shape[0] if self.layout == "pages" else shape[1] // self.block_size

    @property
    def kv_heads(self) -> int:
        if self.packings is not None:
            return self.packings.keys.heads
        return self.keys.shape[2 if self.layout == "pages" else 0]

    @property
    def key_dim(self) -> int:
        if self.packings is not None:
            return self.packings.keys.dim
        return self.keys.shape[-1]

    @property
    def value_dim(self) -> int | None:
        if self.packings is not None:
            return self.packings.values.dim
        return None if self.values is None else self.values.shape[-1]

    @property
    def dtype(self) -> mx.Dtype:
        """Of what is read from the pool."""
        return self.keys.dtype if self.packings is None else self.packings.dtype

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + (0 if self.values is None else self.values.nbytes)

    def after(self, token: mx.array) -> Pool:
        """The pool after a kernel that gave this token."""
        return Pool(self.keys, self.values, token, self.block_size, self.layout, self.packings)

    def arrays(self) -> tuple[mx.array, ...]:
        """What to evaluate so that everything done to the pool so far has happened."""
        parts = (self.keys, self.values, self.token)
        return tuple(part for part in parts if part is not None)


def new_pool(
    *,
    num_blocks: int,
    block_size: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int | None,
    dtype: mx.Dtype,
    layout: Layout | None = None,
    quantization: Quantization | None = None,
) -> Pool:
    """A pool of zeros. `value_dim` None: no values. `layout` None: the one of this back end.

    quantization: rows are kept as codes, scales as `dtype`. Raises ValueError for widths that are
    no whole groups, and for pools without values.
    """
    chosen: Layout = layout or policy.layout()
    token = mx.zeros((1,), mx.int32)
    if quantization is not None:
        if value_dim is None:
            raise ValueError("new_pool: a pool without values is not quantised")
        packings = Packings.of(quantization, kv_heads, key_dim, value_dim, dtype)

        def words(packing: Packing) -> mx.array:
            if chosen == "pages":
                return mx.zeros((num_blocks, packing.block_words(block_size)), mx.uint32)
            return mx.zeros((kv_heads, num_blocks * block_size, packing.row_words), mx.uint32)

        made = words(packings.keys), words(packings.values)
        return Pool(*made, token, block_size, chosen, packings)

    def zeros(width: int) -> mx.array:
        if chosen == "pages":
            return mx.zeros((num_blocks, block_size, kv_heads, width), dtype)
        return mx.zeros((kv_heads, num_blocks * block_size, width), dtype)

    return Pool(
        zeros(key_dim),
        None if value_dim is None else zeros(value_dim),
        token,
        block_size,
        chosen,
    )
