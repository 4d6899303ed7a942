"""Quantised pools: groups of codes along the head dimension, each with a scale and a bias.

The arithmetic is that of `mx.quantize` (affine): value = scale * code + bias, rounded once when a
row is written. A row of one head is `dim * bits / 32` words of codes and a pair for each group of
`group_size` entries, in the type of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np
import numpy.typing as npt

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
POISON = 0xFFFFFFFF  # a word of codes, and pairs of NaN in every type


@dataclass(frozen=True, slots=True)
class Quantization:
    """Bits of a code, and entries that share a scale. Raises ValueError for unknown numbers."""

    bits: int
    group_size: int = 64

    def __post_init__(self) -> None:
        for what, value, known in (
            ("bits", self.bits, BITS),
            ("group_size", self.group_size, GROUP_SIZES),
        ):
            if value not in known:
                words = ", ".join(map(str, known[:-1]))
                raise ValueError(f"{what}: expected {words} or {known[-1]}, got {value}")

    def lacks(self, dim: int) -> str | None:
        """Why rows of this width cannot be stored, None if they can."""
        if dim % self.group_size == 0:
            return None
        fitting = [size for size in GROUP_SIZES if dim % size == 0]
        cure = (
            f"a group size of {fitting[-1]} divides it" if fitting else "no group size divides it"
        )
        return f"heads of {dim} are not groups of {self.group_size}: {cure}"


@dataclass(frozen=True)
class Packing:
    """How rows [..., dim] of `heads` heads lie in words. `dtype`: of rows, scales and biases."""

    quantization: Quantization
    heads: int
    dim: int
    dtype: mx.Dtype

    @property
    def code_words(self) -> int:
        return self.dim * self.quantization.bits // 32

    @property
    def pair_words(self) -> int:
        return self.dim // self.quantization.group_size * 2 * self.dtype.size // 4

    @property
    def row_words(self) -> int:
        """Words of one row of one head."""
        return self.code_words + self.pair_words

    def block_words(self, block_size: int) -> int:
        return block_size * self.heads * self.row_words

    def pack(self, rows: mx.array) -> mx.array:
        """[..., dim] of `dtype` -> uint32 [..., row_words]."""
        how = self.quantization
        codes, scales, biases = mx.quantize(rows, group_size=how.group_size, bits=how.bits)
        return self.joined(codes, scales, biases)

    def joined(self, codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        """What `mx.quantize` returned, as words [..., row_words]."""
        pairs = mx.stack([scales, biases], axis=-1).flatten(-2).view(mx.uint32)
        return mx.concatenate([codes, pairs], axis=-1)

    def parts(self, words: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Words [..., row_words] as codes, scales and biases: what `mx.quantize` returned."""
        codes = words[..., : self.code_words]
        pairs = mx.contiguous(words[..., self.code_words :]).view(self.dtype)
        return codes, pairs[..., 0::2], pairs[..., 1::2]

    def unpack(self, words: mx.array) -> mx.array:
        """uint32 [..., row_words] -> [..., dim] of `dtype`, worked out in float32.

        Byte by byte: `mx.dequantize` takes two to three times as long on the CPU.
        """
        how, (codes, scales, biases) = self.quantization, self.parts(words)
        entries = codes.view(mx.uint8)
        if how.bits == 4:
            entries = mx.stack([entries & 15, entries >> 4], axis=-1).flatten(-2)
        groups = entries.astype(mx.float32).reshape(*scales.shape, how.group_size)
        values = groups * scales[..., None].astype(mx.float32)
        values = values + biases[..., None].astype(mx.float32)
        return values.flatten(-2).astype(self.dtype)

    @cached_property
    def _indices(self) -> dict[int, npt.NDArray[np.int32]]:
        return {}

    def index(self, block_size: int) -> npt.NDArray[np.int32]:
        """Where in a block of pages the words of its rows lie: [block_size, heads, row_words].

        The codes of all rows, then the pairs of all rows, head by head: codes then begin at a
        multiple of 16 bytes, and few bytes of pairs are read together.
        """
        if block_size not in self._indices:
            rows = np.arange(block_size)[:, None, None]
            heads = np.arange(self.heads)[None, :, None]
            codes = (rows * self.heads + heads) * self.code_words + np.arange(self.code_words)
            pairs = (heads * block_size + rows) * self.pair_words + np.arange(self.pair_words)
            pairs = pairs + block_size * self.heads * self.code_words
            self._indices[block_size] = np.concatenate([codes, pairs], -1).astype(np.int32)
        return self._indices[block_size]

    def unfold(self, blocks: mx.array, block_size: int) -> mx.array:
        """Blocks of pages [n, words] as rows, [n, block_size, heads, row_words]."""
        return blocks[:, mx.array(self.index(block_size))]

    def fold(self, rows: mx.array, block_size: int) -> mx.array:
        """The way back."""
        back = np.argsort(self.index(block_size).ravel()).astype(np.int32)
        return rows.flatten(1)[:, mx.array(back)]


@dataclass(frozen=True)
class Packings:
    """Of keys and values of one pool."""

    keys: Packing
    values: Packing

    @staticmethod
    def of(
        quantization: Quantization, kv_heads: int, key_dim: int, value_dim: int, dtype: mx.Dtype
    ) -> Packings:
        """Raises ValueError for widths that are no whole groups."""
        for what, dim in (("keys", key_dim), ("values", value_dim)):
            lacking = quantization.lacks(dim)
            if lacking is not None:
                raise ValueError(f"{what}: {lacking}")
        return Packings(
            Packing(quantization, kv_heads, key_dim, dtype),
            Packing(quantization, kv_heads, value_dim, dtype),
        )

    @property
    def quantization(self) -> Quantization:
        return self.keys.quantization

    @property
    def dtype(self) -> mx.Dtype:
        return self.keys.dtype
