"""Kernels with inputs and a float64 reference, for tests of the CPU runner and of what it catches.

Every case is hostile: ragged lengths, shuffled blocks, NaN in whatever no row may see, a block
number far out of range where the tables are not to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlxrewrite.kernels import plans
from mlxrewrite.kernels.dialects.cpu import Options, metal_kernel
from mlxrewrite.kernels.launch import MetalKernel
from mlxrewrite.kernels.ragged import Ragged
from mlxrewrite.kernels.render import render
from mlxrewrite.kernels.specs import DecodeSpec, ReduceSpec

Floats = npt.NDArray[np.float64]
MLX_TYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# What rounding the result, and the inputs' products, may cost.
TOLERANCES = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
NOWHERE = 1 << 29


@dataclass(frozen=True, eq=False)
class Case:
    """One launch. `expected`: of the outputs that have one."""

    kernel: MetalKernel
    inputs: dict[str, mx.array]
    outputs: list[tuple[tuple[int, ...], mx.Dtype]]
    groups: int
    threads: int
    expected: dict[str, Floats]
    tolerance: float

    def run(self, *, check: bool = True, options: Options | None = None) -> dict[str, mx.array]:
        made = metal_kernel(
            self.kernel.name,
            self.kernel.input_names,
            self.kernel.output_names,
            self.kernel.source,
            self.kernel.header,
            mutable_inputs=self.kernel.mutable_inputs,
            check=check,
            options=options,
        )
        results = made(
            inputs=[self.inputs[name] for name in self.kernel.input_names],
            grid=(self.groups * self.threads, 1, 1),
            threadgroup=(self.threads, 1, 1),
            output_shapes=[shape for shape, _ in self.outputs],
            output_dtypes=[dtype for _, dtype in self.outputs],
        )
        return dict(zip(self.kernel.output_names, results, strict=True))

    def error(self, results: dict[str, mx.array]) -> float:
        """The largest difference from the reference; NaN counts as infinite."""
        worst = 0.0
        for name, expected in self.expected.items():
            difference = np.abs(float64(results[name]).reshape(expected.shape) - expected)
            worst = max(worst, float(np.nan_to_num(difference, nan=np.inf).max()))
        return worst

    def altered(self, old: str, new: str) -> Case:
        """With a piece of the kernel's text (or of its helpers) replaced, once."""
        kernel = self.kernel
        if old in kernel.source:
            return replace(self, kernel=replace(kernel, source=kernel.source.replace(old, new, 1)))
        if old in kernel.header:
            return replace(self, kernel=replace(kernel, header=kernel.header.replace(old, new, 1)))
        raise ValueError(f"{kernel.name} has no {old!r}")

    def given(self, **inputs: mx.array) -> Case:
        return replace(self, inputs={**self.inputs, **inputs})


def float64(array: mx.array) -> Floats:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def rows(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> mx.array:
    return mx.array(rng.standard_normal(tuple(shape)).astype(np.float32)).astype(MLX_TYPES[dtype])


def attend(
    queries: Floats,
    keys: Floats,
    values: Floats,
    *,
    scale: float,
    cap: float | None = None,
    sinks: Floats | None = None,
    mask: npt.NDArray[np.bool_] | None = None,
) -> Floats:
    """queries [rows, heads, Dk], keys [n, kv heads, Dk], values with Dv, mask [rows, n]."""
    group = queries.shape[1] // keys.shape[1]
    scores = np.einsum("rhd,nhd->rhn", queries, np.repeat(keys, group, 1)) * scale
    if cap is not None:
        scores = np.tanh(scores / cap) * cap
    if mask is not None:
        scores = np.where(mask[:, None], scores, -np.inf)
    highest = scores.max(-1, keepdims=True)
    if sinks is not None:
        highest = np.maximum(highest, sinks[None, :, None])
    weights = np.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[None, :, None] - highest)
    result: Floats = np.einsum("rhn,nhd->rhd", weights / total, np.repeat(values, group, 1))
    return result


@dataclass(frozen=True, eq=False)
class Paged:
    """Pools in shuffled blocks: NaN in free blocks and behind the last position of a sequence."""

    ragged: Ragged
    key_pool: mx.array
    value_pool: mx.array | None
    keys: list[Floats]
    values: list[Floats]
    tables: mx.array


def paged(
    rng: np.random.Generator,
    contexts: Sequence[int],
    lengths: Sequence[int],
    *,
    block_size: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: str,
    shared: bool = False,
    dropped: Sequence[int] | None = None,
) -> Paged:
    counts = [-(-context // block_size) for context in contexts]
    order = rng.permutation(sum(counts) + 3)
    tables, at = [], 0
    for i, count in enumerate(counts):
        gone = dropped[i] if dropped else 0
        tables.append([int(block) for block in order[at : at + count]][gone:])
        at += count
    ragged = Ragged.build(lengths, contexts, tables, block_size, dropped)

    def pool(width: int) -> tuple[mx.array, list[Floats]]:
        store = np.full((sum(counts) + 3, block_size, kv_heads, width), np.nan, np.float32)
        for i, context in enumerate(contexts):
            gone = dropped[i] if dropped else 0
            for position in range(gone * block_size, context):
                block = tables[i][position // block_size - gone]
                store[block, position % block_size] = rng.standard_normal((kv_heads, width))
        made = mx.array(store).astype(MLX_TYPES[dtype])
        exact = float64(made)
        read = []
        for i, context in enumerate(contexts):
            gone = dropped[i] if dropped else 0
            where = np.arange(context)
            blocks = np.array([0] * gone + tables[i])[where // block_size]
            read.append(exact[blocks, where % block_size])
        return made, read

    key_pool, keys = pool(key_dim)
    value_pool, values = (None, [k[..., :value_dim] for k in keys]) if shared else pool(value_dim)
    packed = np.array(ragged.block_tables)
    for row, table in zip(packed, tables, strict=True):
        row[len(table) :] = NOWHERE
    return Paged(ragged, key_pool, value_pool, keys, values, mx.array(packed))


DECODE = DecodeSpec(
    query_dtype="float16",
    pool_dtype="float16",
    key_dim=64,
    value_dim=64,
    kv_heads=2,
    group=4,
    block_size=16,
    heads=4,
    key_groups=2,
    tile=16,
    vector=4,
    softcap=False,
    sinks=False,
    shared_values=False,
    partial=False,
)


def decode(
    spec: DecodeSpec = DECODE,
    contexts: Sequence[int] = (70, 33, 5),
    *,
    window: int | None = None,
    chunk: int | None = None,
    split: int = 1 << 20,
    cap: float = 3.0,
    dropped: Sequence[int] | None = None,
    seed: int = 0,
) -> Case:
    """The decode kernel over one row of each sequence, or the two of the last."""
    rng = np.random.default_rng(seed)
    lengths = [1] * (len(contexts) - 1) + [min(2, contexts[-1])]
    made = paged(
        rng,
        contexts,
        lengths,
        block_size=spec.block_size,
        kv_heads=spec.kv_heads,
        key_dim=spec.key_dim,
        value_dim=spec.value_dim,
        dtype=spec.pool_dtype,
        shared=spec.shared_values,
        dropped=dropped,
    )
    heads = spec.kv_heads * spec.group
    queries = rows(rng, (sum(lengths), heads, spec.key_dim), spec.query_dtype)
    sinks = rows(rng, (heads,), spec.query_dtype)
    plan = plans.decode_plan(
        made.ragged,
        tuple(range(len(contexts))),
        window=window,
        chunk=chunk,
        tile=spec.tile,
        split=split,
    )
    scale = spec.key_dim**-0.5
    log2e = 1 / np.log(2)
    settings = np.zeros(8, np.float32)
    settings[0] = scale / cap if spec.softcap else scale * log2e
    settings[1] = cap * log2e
    exact, expected, at = float64(queries), [], 0
    for i, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        for position in range(context - length, context):
            low = int(plans.first_seen(np.array([position]), window, chunk)[0])
            expected.append(
                attend(
                    exact[at : at + 1],
                    made.keys[i][low : position + 1],
                    made.values[i][low : position + 1],
                    scale=scale,
                    cap=cap if spec.softcap else None,
                    sinks=float64(sinks) if spec.sinks else None,
                )
            )
            at += 1
    inputs = {
        "queries": queries,
        "key_pool": made.key_pool,
        "value_pool": made.value_pool,
        "block_tables": made.tables,
        "items": plan.items,
        "settings": mx.array(settings),
        "token_in": mx.zeros((1,), mx.int32),
        "sinks": sinks,
        "row_items": plan.row_items,
    }
    kernel = render(spec)
    token: tuple[tuple[int, ...], mx.Dtype] = ((1,), mx.int32)
    results: list[tuple[tuple[int, ...], mx.Dtype]] = [
        ((sum(lengths), heads, spec.value_dim), MLX_TYPES[spec.query_dtype]),
        token,
    ]
    if spec.partial:
        results = [
            ((plan.num_items, heads, spec.value_dim), mx.float32),
            ((plan.num_items, heads, 2), mx.float32),
            token,
        ]
    return Case(
        kernel,
        {name: array for name, array in inputs.items() if array is not None},
        results,
        groups=plan.num_items * spec.kv_heads,
        threads=spec.simdgroups * 32,
        expected={} if spec.partial else {"output": np.concatenate(expected)},
        tolerance=TOLERANCES[spec.query_dtype],
    )


def reduction(
    dtype: str = "float16",
    *,
    value_dim: int = 64,
    heads: int = 8,
    simdgroups: int = 4,
    sinks: bool = False,
    parts: Sequence[int] = (3, 1, 40),
    seed: int = 0,
) -> Case:
    """The reduction over rows of several parts, with partial results made up by the reference."""
    rng = np.random.default_rng(seed)
    spec = ReduceSpec(dtype, value_dim, heads, simdgroups, sinks)
    total = sum(parts)
    values = rng.standard_normal((total, heads, value_dim)).astype(np.float32)
    stats = np.empty((total, heads, 2), np.float32)
    stats[..., 0] = 3 * rng.standard_normal((total, heads))
    stats[..., 1] = rng.uniform(0.5, 2, (total, heads))
    sink = rows(rng, (heads,), dtype)
    ends = np.zeros(8, np.int32)
    ends[1 : len(parts) + 1] = np.cumsum(parts)
    expected = np.empty((len(parts), heads, value_dim))
    for i in range(len(parts)):
        part = slice(ends[i], ends[i + 1])
        factors = np.exp2(stats[part, :, 0].astype(np.float64))
        weight = (factors * stats[part, :, 1]).sum(0)
        if sinks:
            weight += np.exp(float64(sink))
        expected[i] = (factors[..., None] * values[part]).sum(0) / weight[:, None]
    return Case(
        render(spec),
        {
            "partial_values": mx.array(values),
            "partial_stats": mx.array(stats),
            "row_items": mx.array(ends),
            "sinks": sink,
        },
        [((len(parts), heads, value_dim), MLX_TYPES[dtype])],
        groups=len(parts) * heads,
        threads=simdgroups * 32,
        expected={"output": expected},
        tolerance=TOLERANCES[dtype],
    )


def variant(**fields: Any) -> DecodeSpec:
    """The usual decode kernel with other fields."""
    return replace(DECODE, **fields)
