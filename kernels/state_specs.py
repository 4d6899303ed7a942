"""Specs of the kernels of recurrences on matrix states, and which of them serve a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from .specs import DTYPES, KernelSpec

ROWS = 4  # of a simdgroup in a step: loads in flight
MOST_SIMDGROUPS = 4


@dataclass(frozen=True, slots=True)
class StateStepSpec(KernelSpec):
    """One token of every sequence; each simdgroup holds `rows` value rows of one head's state.

    per_channel: a decay for each key channel, else one for a head. delta: what the state has for a
    key already is taken from the value (the delta rule), else values are added as they are.
    """

    template: ClassVar[str] = "state_step"

    rows_dtype: str
    state_dtype: str
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    rows: int
    simdgroups: int
    per_channel: bool
    delta: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        gates = ("decay", "beta") if self.delta else ("decay",)
        return ("queries", "keys", "values", *gates, "state")

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
    if dtype_name(v.dtype) not in DTYPES:
        return f"values of {dtype_name(v.dtype)}: kernels exist for {', '.join(DTYPES)}"
    if dtype_name(q.dtype) not in DTYPES or state.dtype != mx.float32:
        return f"dtype {dtype_name(q.dtype)} over {dtype_name(state.dtype)}: states are float32"
    return None


def shares(value_dim: int, rows: int) -> tuple[int, int]:
    """How many value rows a simdgroup holds, and how many simdgroups a threadgroup has: whole
    threadgroups cover a head."""
    while value_dim % rows:
        rows //= 2
    simdgroups = MOST_SIMDGROUPS
    while value_dim % (rows * simdgroups):
        simdgroups //= 2
    return rows, simdgroups


def state_step_spec(
    q: mx.array, k: mx.array, v: mx.array, *, per_channel: bool, delta: bool
) -> StateStepSpec:
    """The kernel for one token."""
    rows, simdgroups = shares(v.shape[-1], ROWS)
    return StateStepSpec(
        rows_dtype=dtype_name(q.dtype),
        state_dtype="float32",
        key_heads=k.shape[2],
        value_heads=v.shape[2],
        key_dim=k.shape[3],
        value_dim=v.shape[3],
        rows=rows,
        simdgroups=simdgroups,
        per_channel=per_channel,
        delta=delta,
    )


@dataclass(frozen=True, slots=True)
class DepthwiseSpec(KernelSpec):
    """A depthwise convolution; a thread slides along `rows` tokens of one channel."""

    template: ClassVar[str] = "depthwise"

    rows_dtype: str
    channels: int
    taps: int
    rows: int
    simdgroups: int
    bias: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        offsets = ("offsets",) if self.bias else ()
        return ("windows", "weights", *offsets, "sizes")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("output",)


@dataclass(frozen=True, slots=True)
class ScanSpec(KernelSpec):
    """A diagonal recurrence; a thread walks along one channel, `ahead` tokens at a time."""

    template: ClassVar[str] = "scan"

    rows_dtype: str
    channels: int
    simdgroups: int
    ahead: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("inputs", "factors", "start", "sizes")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("output", "last")


@dataclass(frozen=True, slots=True)
class SelectiveStepSpec(KernelSpec):
    """One token of every sequence through a selective state space; a lane holds 4 states of a
    channel for `sequences_each` sequences, which share its rates."""

    template: ClassVar[str] = "selective_step"

    rows_dtype: str
    weights_dtype: str
    output_dtype: str
    channels: int
    states: int
    sequences_each: int
    groups_of_lanes: int

    @property
    def inputs(self) -> tuple[str, ...]:
        rows = ("inputs", "deltas", "entering", "leaving")
        return (*rows, "rates", "skips", "state", "sizes")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("output", "state_out")


@dataclass(frozen=True, slots=True)
class SelectiveScanSpec(KernelSpec):
    """A selective state space along tokens; a lane holds `part` states of a channel.

    ends: how each piece of the tokens ends if it begins with nothing. joined: pieces that begin
    with what follows from those ends. Neither: all tokens in one piece.
    """

    template: ClassVar[str] = "selective_scan"

    rows_dtype: str
    weights_dtype: str
    output_dtype: str
    channels: int
    states: int
    part: int
    ahead: int
    groups_of_lanes: int
    ends: bool
    joined: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        if self.ends:
            return ("inputs", "deltas", "entering", "rates", "sizes")
        rows = ("inputs", "deltas", "entering", "leaving")
        found = ("ends", "sums") if self.joined else ()
        return (*rows, "rates", "skips", "state", *found, "sizes")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("ends", "sums") if self.ends else ("output", "last")
