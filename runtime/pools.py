"""The pool of one paged entry, made when the first keys arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
from mlxrewrite.kernels import ops
from mlxrewrite.kernels.ops import Quantization, Ragged
from mlxrewrite.kernels.quantization import POISON

from .errors import RuntimeRefusal


class EntryPool:
    """Keys and values of one entry's blocks, threaded through the ops.

    The first write makes the pool, from the shapes and the type of what is written; `dtype`
    overrides the type. `lacking` says why no kernel serves its attention, once there was some.
    With `quantization` it holds codes, which latents and keys that are only ranked are refused for;
    `name` says whose it is. With `poison`, blocks that nobody holds are NaN. Latents lie side by
    side with their rope keys, as keys without values; `rank` is then the width of a latent. Keys
    that are only ranked (`index`) have no values either.
    """

    __slots__ = (
        "_asked",
        "_pool",
        "_rows_dtype",
        "block_size",
        "dtype",
        "index",
        "lacking",
        "name",
        "num_blocks",
        "poison",
        "quantization",
        "rank",
        "serial",
    )

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        dtype: mx.Dtype | None = None,
        poison: bool = False,
        quantization: Quantization | None = None,
        name: str = "a cache entry",
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.poison = poison
        self.quantization = quantization
        self.name = name
        self.rank: int | None = None
        self.lacking: str | None = None
        self._asked = False
        self.index = False
        self.serial = -1
        self._pool: ops.Pool | None = None
        self._rows_dtype = mx.float32

    @property
    def made(self) -> bool:
        return self._pool is not None

    @property
    def pool(self) -> ops.Pool:
        if self._pool is None:
            raise RuntimeError("a paged cache was read before anything was written to it")
        return self._pool

    @pool.setter
    def pool(self, pool: ops.Pool) -> None:
        self._pool = pool

    @property
    def rows_dtype(self) -> mx.Dtype:
        """The type of the rows that were written, which `dtype` may have overridden."""
        return self._rows_dtype

    def write_latents(
        self, latents: mx.array, ropes: mx.array, ragged: Ragged | None, serial: int
    ) -> None:
        """Store a step's rows, latents [T, 1, 1, rank] and rope keys [T, 1, 1, R]; once per step.

        R may be 0: latents without positions.
        """
        self._require_plain("latents")
        rank = latents.shape[-1]
        if self.made and self.rank != rank:
            raise TypeError(f"latents of {rank} entries are written where {self.rank} lie")
        joined = mx.concatenate([latents, ropes], axis=-1) if ropes.shape[-1] else latents
        self.write(joined, None, ragged, serial)
        self.rank = rank

    def write_index(
        self, keys: mx.array, values: mx.array, ragged: Ragged | None, serial: int
    ) -> None:
        """Store a step's rows of keys that are only ranked, [T, 1, 1, D]; once per step."""
        self._require_plain("keys that are only ranked")
        del values  # mlx_lm's caches want some; nobody reads them
        if self.made and not self.index:
            raise TypeError("keys to rank are written where other keys lie")
        self.write(keys, None, ragged, serial)
        self.index = True

    def write(
        self, keys: mx.array, values: mx.array | None, ragged: Ragged | None, serial: int
    ) -> None:
        """Store a step's rows, keys [T, Hkv, 1, Dk] and values [T, Hkv, 1, Dv]; once per step."""
        if self.serial == serial:
            raise RuntimeError("two layers write to one cache entry in the same step")
        if ragged is None:
            raise RuntimeError("a cache entry that paged nothing so far is written to now")
        if self._pool is None:
            self._pool = self._make(keys, values)
        self._pool = ops.write_kv(keys, values, self._pool, ragged)
        self.serial = serial

    def read_words(self, blocks: Sequence[int]) -> tuple[mx.array, mx.array]:
        """Blocks of codes as they are stored: `ops.read_blocks`."""
        keys, values, self._pool = ops.read_blocks(self.pool, blocks)
        return keys, values

    def write_words(
        self, blocks: Sequence[int], keys: mx.array, values: mx.array, serial: int
    ) -> None:
        """Put what `read_words` gave into blocks; once per step, as `write`."""
        if self.serial == serial:
            raise RuntimeError("two layers write to one cache entry in the same step")
        self._pool = ops.write_blocks(self.pool, blocks, keys, values)
        self.serial = serial

    def make_for(self, kv_heads: int, key_dim: int, value_dim: int, dtype: mx.Dtype) -> None:
        """Make the pool before any keys arrive, if there is none yet."""
        if self._pool is None:
            self._pool = self._make(
                mx.zeros((1, kv_heads, 1, key_dim), dtype),
                mx.zeros((1, kv_heads, 1, value_dim), dtype),
            )

    def attend(
        self,
        queries: mx.array,
        ragged: Ragged,
        *,
        scale: float,
        window: int | None,
        chunk: int | None,
        sinks: mx.array | None,
        softcap: float | None,
    ) -> mx.array:
        """Each row over its sequence: [T, Hq, 1, Dk] -> [T, Hq, 1, Dv], promoted as upstream.

        The values of latents are the latents: Dv is then their rank.
        """
        if queries.dtype != self._rows_dtype:
            zeros = mx.array(0, queries.dtype), mx.array(0, self._rows_dtype)
            queries = queries.astype(mx.result_type(*zeros))
        if not self._asked:
            self._asked = True
            spec = ops.attention_spec(queries, self.pool, self.rank, softcap, sinks)
            self.lacking = ops.supports(spec)
        out: mx.array
        out, self._pool = ops.attention(
            queries,
            self.pool,
            ragged,
            scale=scale,
            window=window,
            chunk=chunk,
            sinks=sinks,
            softcap=softcap,
            value_dim=self.rank,
        )
        return out

    def gather(self, ragged: Ragged, sequence: int, low: int) -> mx.array:
        """The keys of the positions low.. of one sequence of a step, [1, Hkv, positions, Dk]."""
        keys: mx.array
        keys, _, self._pool = ops.gather(self.pool, ragged, sequence, low)
        return keys

    def entries_at(self, slots: mx.array) -> mx.array:
        """The keys of one head at slots of the pool: int32 [...] -> [..., Dk]."""
        keys: mx.array
        keys, _, self._pool = ops.take(self.pool, slots.flatten().astype(mx.int32))
        return keys[0].reshape(*slots.shape, -1)

    def require_written(self, serial: int) -> None:
        if self.serial != serial:
            raise RuntimeError("keys are shared before the layer that owns them wrote them")

    def arrays(self) -> tuple[mx.array, ...]:
        """What to evaluate so that all writes have happened."""
        return () if self._pool is None else self._pool.arrays()

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks; nothing to do where nothing was ever written."""
        if self._pool is not None:
            self._pool = ops.copy_blocks(self._pool, sources, targets)

    def fill_freed(self, blocks: Sequence[int]) -> None:
        """Overwrite freed blocks with NaN: whatever reads them afterwards shows. For tests."""
        if self._pool is None or not blocks:
            return
        mx.eval(self._pool.arrays())
        self._pool = _filled(self._pool, np.array(blocks))
        mx.eval(self._pool.arrays())

    def _make(self, keys: mx.array, values: mx.array | None) -> ops.Pool:
        for rows in (keys,) if values is None else (keys, values):
            if rows.ndim != 4 or rows.shape[2] != 1:
                raise TypeError(
                    f"expected rows of one token, [T, heads, 1, width], got {list(rows.shape)}"
                )
        self._rows_dtype = keys.dtype
        try:
            pool = ops.new_pool(
                num_blocks=self.num_blocks,
                block_size=self.block_size,
                kv_heads=keys.shape[1],
                key_dim=keys.shape[3],
                value_dim=None if values is None else values.shape[3],
                dtype=self.dtype or keys.dtype,
                quantization=self.quantization,
            )
        except ValueError as problem:
            raise RuntimeRefusal(f"kv_bits: {self.name}: {problem}") from None
        return _filled(pool, np.arange(self.num_blocks)) if self.poison else pool

    def _require_plain(self, what: str) -> None:
        if self.quantization is not None:
            raise RuntimeRefusal(
                f"kv_bits: {self.name} keeps {what}, which are not quantised; leave kv_bits out"
            )


def _filled(pool: ops.Pool, blocks: np.ndarray) -> ops.Pool:
    """The pool with NaN in some blocks."""
    slots = (blocks[:, None] * pool.block_size + np.arange(pool.block_size)).ravel()

    def filled(store: mx.array) -> mx.array:
        nan = mx.array(float("nan") if pool.packings is None else POISON, store.dtype)
        if pool.layout == "pages":
            store[mx.array(blocks.astype(np.int32))] = nan
        else:
            store[:, mx.array(slots.astype(np.int32))] = nan
        return store

    values = None if pool.values is None else filled(pool.values)
    return replace(pool, keys=filled(pool.keys), values=values)
