"""Token shift over a ragged batch: each row's predecessor in its own sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from . import launch
from .metadata import padded
from .render import render
from .shift_specs import ShiftSpec
from .specs import DTYPES
from .state_specs import dtype_name


@dataclass(frozen=True, slots=True, eq=False)
class Origins:
    """Where each row's predecessor is: row i of the batch as i, zeros as -1, state i as -2 - i."""

    NONE: ClassVar[int] = -1

    count: int
    array: mx.array  # [count], padded with -1 to at least MIN_METADATA

    @staticmethod
    def of(lengths: Sequence[int], begun: Sequence[bool]) -> Origins:
        """Of sequences below each other; the states of those that have begun are in order."""
        found = np.arange(-1, sum(lengths) - 1, dtype=np.int32)
        starts = np.cumsum([0, *lengths[:-1]])
        states = np.cumsum([0, *begun[:-1]])
        found[starts] = np.where(begun, -2 - states, Origins.NONE)
        return Origins(len(found), padded(found, Origins.NONE))


def shift(rows: mx.array, states: mx.array | None, origins: Origins) -> mx.array:
    """Predecessors [T, D] of rows [T, D]; states [S, D] in the type of the rows."""
    if rows.shape[0] != origins.count:
        raise ValueError(f"expected {origins.count} rows, got {list(rows.shape)}")
    if states is not None and states.shape[1:] != rows.shape[1:]:
        raise ValueError(f"states {list(states.shape)} before rows {list(rows.shape)}")
    states = None if states is None else states.astype(rows.dtype)
    if launch.active() is None or dtype_name(rows.dtype) not in DTYPES:
        return _plain(rows, states, origins)
    width = rows.shape[1]
    simdgroups = min(4, -(-width // 32))
    each = min(4, -(-width // (32 * simdgroups)))
    spec = ShiftSpec(dtype_name(rows.dtype), width, each, simdgroups, states is not None)
    inputs = {"rows": rows, "origins": origins.array}
    if states is not None:
        inputs["states"] = states
    (out,) = render(spec)(
        inputs,
        [(rows.shape, rows.dtype)],
        groups=origins.count * -(-width // (32 * simdgroups * each)),
        threads=32 * simdgroups,
    )
    return out


def _plain(rows: mx.array, states: mx.array | None, origins: Origins) -> mx.array:
    """States in reverse, zeros, rows: an origin is a place in this, counted from the zeros."""
    parts = [mx.zeros_like(rows[:1]), rows]
    if states is not None:
        parts.insert(0, states[::-1])
    before = 0 if states is None else states.shape[0]
    return mx.concatenate(parts)[origins.array[: origins.count] + 1 + before]
