"""The pool of one layer: keys and values in blocks, threaded through the ops as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from . import policy

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

    Only the newest Pool of a layer may be used: what an older one holds is unspecified.
    """

    keys: mx.array
    values: mx.array | None
    token: mx.array
    block_size: int
    layout: Layout

    @property
    def num_blocks(self) -> int:
        shape = self.keys.shape
        return shape[0] if self.layout == "pages" else shape[1] // self.block_size

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[2 if self.layout == "pages" else 0]

    @property
    def key_dim(self) -> int:
        return self.keys.shape[-1]

    @property
    def value_dim(self) -> int | None:
        return None if self.values is None else self.values.shape[-1]

    @property
    def dtype(self) -> mx.Dtype:
        return self.keys.dtype

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + (0 if self.values is None else self.values.nbytes)

    def after(self, token: mx.array) -> Pool:
        """The pool after a kernel that gave this token."""
        return Pool(self.keys, self.values, token, self.block_size, self.layout)

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
) -> Pool:
    """A pool of zeros. `value_dim` None: no values. `layout` None: the one of this back end."""
    chosen: Layout = layout or policy.layout()

    def zeros(width: int) -> mx.array:
        if chosen == "pages":
            return mx.zeros((num_blocks, block_size, kv_heads, width), dtype)
        return mx.zeros((kv_heads, num_blocks * block_size, width), dtype)

    return Pool(
        zeros(key_dim),
        None if value_dim is None else zeros(value_dim),
        mx.zeros((1,), mx.int32),
        block_size,
        chosen,
    )
