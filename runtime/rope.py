"""Rotary embeddings whose base depends on how long a sequence is, for batches of many sequences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models import rope_utils

__all__ = [
    "RaggedDynamicNTK",
    "apart",
    "in_step",
    "initialize_rope",
    "positions_are",
    "sequence_ends",
]


@dataclass(frozen=True, slots=True)
class _Ends:
    positions: mx.array
    ends: mx.array


_STEP: ContextVar[_Ends | None] = ContextVar("mlxrewrite_sequence_ends", default=None)


@contextmanager
def sequence_ends(positions: mx.array, ends: mx.array) -> Iterator[None]:
    """During a step: `ends` [T] is the length of each row's sequence once the step is done.

    `positions` [T] is the array that views give as their offset; ropes know the step by it.
    """
    token = _STEP.set(_Ends(positions, ends))
    try:
        yield
    finally:
        _STEP.reset(token)


def in_step() -> bool:
    """Whether a model runs on rows of many sequences."""
    return _STEP.get() is not None


@contextmanager
def apart() -> Iterator[None]:
    """While code runs on the rows of single sequences, as in their own models."""
    token = _STEP.set(None)
    try:
        yield
    finally:
        _STEP.reset(token)


@contextmanager
def positions_are(positions: mx.array) -> Iterator[None]:
    """While code has this copy of the step's positions, which it may add to in place."""
    step = _STEP.get()
    token = _STEP.set(None if step is None else replace(step, positions=positions))
    try:
        yield
    finally:
        _STEP.reset(token)


class RaggedDynamicNTK(nn.Module):  # type: ignore[misc]
    """NTK-aware rope with a dynamic base, each row by the length of its own sequence.

    The base grows with the length that a sequence has at the end of the step, as in mlx_lm's
    `DynamicNTKScalingRoPE`, which knows one length for all rows. bloc97's NTK-aware scaling.
    """

    def __init__(self, original: rope_utils.DynamicNTKScalingRoPE) -> None:
        super().__init__()
        self._original = original

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """x [T, heads, 1, width], offset [T] int32; or [B, heads, L, width] with an int offset."""
        if not isinstance(offset, mx.array) or offset.ndim == 0:
            plain: mx.array = self._original(x, offset=offset)
            return plain
        step = _STEP.get()
        if step is None or step.positions is not offset:
            raise TypeError("dynamic rope: expected the positions of a paged cache's step")
        rope = self._original
        longest = rope.max_position_embeddings
        lengths = mx.maximum(step.ends, longest).astype(mx.float32)
        growth = rope.factor * lengths / longest - (rope.factor - 1)
        base = rope.base * growth ** (rope.dims / (rope.dims - 2))
        half = rope.dims // 2
        powers = mx.arange(half, dtype=mx.float32) / half
        angles = offset[:, None] * mx.exp(-mx.log(base)[:, None] * powers)
        cosine, sine = (f(angles)[:, None, None, :] for f in (mx.cos, mx.sin))
        return rotate(x, cosine, sine, traditional=rope.traditional)


def rotate(x: mx.array, cosine: mx.array, sine: mx.array, *, traditional: bool) -> mx.array:
    """Rotate the first 2 * half features of x by angles with `half` cosines and sines."""
    half = cosine.shape[-1]
    turned, rest = x[..., : 2 * half].astype(mx.float32), x[..., 2 * half :]
    if traditional:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    parts = [first * cosine - second * sine, first * sine + second * cosine]
    joined = mx.stack(parts, axis=-1).flatten(-2) if traditional else mx.concatenate(parts, axis=-1)
    joined = joined.astype(x.dtype)
    return mx.concatenate([joined, rest], axis=-1) if rest.shape[-1] else joined


def initialize_rope(*args: Any, **kwargs: Any) -> nn.Module:
    """mlx_lm's `initialize_rope`; a rope that knows one length only is replaced by one for rows."""
    made = rope_utils.initialize_rope(*args, **kwargs)
    if isinstance(made, rope_utils.DynamicNTKScalingRoPE):
        return RaggedDynamicNTK(made)
    return made
