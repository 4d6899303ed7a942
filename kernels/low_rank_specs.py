"""The spec of the kernel for one token of states whose transition is diagonal plus a product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from .specs import KernelSpec
from .state_specs import ROWS, dtype_name, shares

NARROW_ROWS = 8  # of a simdgroup, where a row is two floats a lane


@dataclass(frozen=True, slots=True)
class LowRankStepSpec(KernelSpec):
    """One token of every sequence; each simdgroup holds `rows` value rows of one head's state."""

    template: ClassVar[str] = "low_rank_step"

    rows_dtype: str
    state_dtype: str
    heads: int
    key_dim: int
    value_dim: int
    rows: int
    simdgroups: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("queries", "decay", "keys", "values", "reading", "writing", "state")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("output", "state_out")


def low_rank_step_spec(q: mx.array, v: mx.array) -> LowRankStepSpec:
    """The kernel for one token: narrow rows are taken more at a time, for loads in flight."""
    rows, simdgroups = shares(v.shape[-1], NARROW_ROWS if q.shape[-1] <= 64 else ROWS)
    return LowRankStepSpec(
        rows_dtype=dtype_name(q.dtype),
        state_dtype="float32",
        heads=v.shape[2],
        key_dim=q.shape[3],
        value_dim=v.shape[3],
        rows=rows,
        simdgroups=simdgroups,
    )
