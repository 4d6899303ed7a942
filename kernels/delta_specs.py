"""Specs of the kernels of the delta rule, and which of them serve a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from .specs import DTYPES, KernelSpec


@dataclass(frozen=True, slots=True)
class DeltaStepSpec(KernelSpec):
    """One token of every sequence; each simdgroup holds `rows` value rows of one head's state.

    per_channel: a decay for each key channel, else one for a head.
    """

    template: ClassVar[str] = "delta_step"

    rows_dtype: str
    state_dtype: str
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    rows: int
    simdgroups: int
    per_channel: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("queries", "keys", "values", "decay", "beta", "state")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("output", "state_out")


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def supports(q: mx.array, k: mx.array, v: mx.array, state: mx.array) -> str | None:
    """Why the kernels cannot serve these arrays, None if they can; the plain form always can."""
    if k.shape[-1] % 32 or not 32 <= k.shape[-1] <= 256:
        return f"key dim {k.shape[-1]}: kernels exist for multiples of 32 from 32 to 256"
    if v.shape[-1] % 8:
        return f"value dim {v.shape[-1]}: kernels exist for multiples of 8"
    if dtype_name(q.dtype) not in DTYPES or dtype_name(state.dtype) not in DTYPES:
        return f"dtype {dtype_name(q.dtype)} over {dtype_name(state.dtype)}: kernels have none"
    return None


def delta_step_spec(q: mx.array, k: mx.array, v: mx.array, *, per_channel: bool) -> DeltaStepSpec:
    """The kernel for one token. Rows of a simdgroup are loads in flight."""
    rows = 4
    simdgroups = next(s for s in (4, 2, 1) if v.shape[-1] % (rows * s) == 0)
    return DeltaStepSpec(
        rows_dtype=dtype_name(q.dtype),
        state_dtype="float32",
        key_heads=k.shape[2],
        value_heads=v.shape[2],
        key_dim=k.shape[3],
        value_dim=v.shape[3],
        rows=rows,
        simdgroups=simdgroups,
        per_channel=per_channel,
    )
