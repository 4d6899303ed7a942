"""Cases for the kernels: a pool with NaN wherever nothing lives, and the answer in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from mlxrewrite.kernels import ops, policy
from mlxrewrite.kernels.ops import Pool, Quantization, Ragged
from mlxrewrite.kernels.quantization import POISON, Packing

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Relative error, |out - exact| / |exact|: what rounding of the output, and on CUDA of the weights
# that matrix units multiply, comes to.
TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 6e-3}


@dataclass(frozen=True)
class Case:
    """Sequences of `query_lens` rows, which end at position `context_lens`."""

    query_lens: tuple[int, ...] = (1,)
    context_lens: tuple[int, ...] = (37,)
    query_heads: int = 4
    kv_heads: int = 2
    key_dim: int = 64
    value_dim: int = 64
    block_size: int = 16
    dtype: str = "float32"
    pool_dtype: str | None = None
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    shared_values: bool = False
    bits: int = 0
    code_group: int = 64
    seed: int = 0

    @property
    def store(self) -> str:
        return self.pool_dtype or self.dtype

    def packing(self, width: int) -> Packing:
        how = Quantization(self.bits, self.code_group)
        return Packing(how, self.kv_heads, width, DTYPES[self.store])


@dataclass(frozen=True)
class Made:
    case: Case
    ragged: Ragged
    pool: Pool  # before this step's rows are written
    queries: mx.array
    keys: mx.array
    values: mx.array | None
    sinks: mx.array | None
    whole_keys: list[np.ndarray]  # of each sequence, as stored: [positions, Hkv, D], float64
    whole_values: list[np.ndarray]


def rounded(values: np.ndarray, dtype: str) -> tuple[mx.array, np.ndarray]:
    """As an array of a type, and what it then holds."""
    array = mx.array(values.astype(np.float32)).astype(DTYPES[dtype])
    return array, np.array(array.astype(mx.float32)).astype(np.float64)


def make(case: Case) -> Made:
    rng = np.random.default_rng(case.seed)
    size, heads = case.block_size, case.kv_heads
    counts = [-(-context // size) for context in case.context_lens]
    total = sum(counts) + 3
    order = rng.permutation(total)
    tables, taken, dropped = [], 0, []
    for count, context, rows in zip(counts, case.context_lens, case.query_lens, strict=True):
        table = order[taken : taken + count]
        taken += count
        first = max(0, first_seen(context - rows, case.window, case.chunk))
        gone = first // size
        tables.append(tuple(int(block) for block in table[gone:]))
        dropped.append(gone)
    ragged = Ragged.build(case.query_lens, case.context_lens, tables, size, dropped)

    def page(width: int) -> np.ndarray:
        return np.full((total, size, heads, width), np.nan)

    widths = [case.key_dim] if case.shared_values else [case.key_dim, case.value_dim]
    pages, steps, wholes = [page(w) for w in widths], [], []
    packed = []
    for width, store in zip(widths, pages, strict=True):
        new, whole = [], []
        if case.bits:
            packing = case.packing(width)
            words = np.full((total, packing.block_words(size)), POISON, np.uint32)
            packed.append(words)
        for i, (rows, context) in enumerate(zip(case.query_lens, case.context_lens, strict=True)):
            array, exact = rounded(rng.standard_normal((context, heads, width)), case.store)
            new.append(exact[context - rows :])
            if case.bits:
                codes = packing.pack(array)
                exact, row_words = decoded(packing, codes), np.array(codes)
            whole.append(exact)
            for position in range(dropped[i] * size, context - rows):
                block = tables[i][position // size - dropped[i]]
                if case.bits:
                    words[block, packing.index(size)[position % size]] = row_words[position]
                else:
                    store[block, position % size] = exact[position]
        steps.append(rounded(np.concatenate(new), case.store)[0])
        wholes.append(whole)
    stores = [mx.array(words) for words in packed]
    stores = stores or [rounded(store, case.store)[0] for store in pages]
    mx.eval(stores)
    pool = ops.new_pool(
        num_blocks=total,
        block_size=size,
        kv_heads=heads,
        key_dim=case.key_dim,
        value_dim=None if case.shared_values else case.value_dim,
        dtype=DTYPES[case.store],
        layout="pages",
        quantization=Quantization(case.bits, case.code_group) if case.bits else None,
    )
    pool = replace(pool, keys=stores[0], values=None if case.shared_values else stores[1])
    if case.shared_values:
        wholes.append([keys[..., : case.value_dim] for keys in wholes[0]])
    queries, _ = rounded(
        rng.standard_normal((ragged.num_rows, case.query_heads, case.key_dim)), case.dtype
    )
    sinks = rounded(rng.standard_normal(case.query_heads), case.dtype)[0] if case.sinks else None
    return Made(
        case,
        ragged,
        pool,
        queries,
        steps[0],
        None if case.shared_values else steps[1],
        sinks,
        wholes[0],
        wholes[1],
    )


def decoded(packing: Packing, words: mx.array) -> np.ndarray:
    """What words stand for, in float64."""
    codes, *pairs = packing.parts(words)
    bits = packing.quantization.bits
    scales, biases = (np.array(pair.astype(mx.float32)).astype(np.float64) for pair in pairs)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    values = np.array(codes)[..., None] >> shifts & ((1 << bits) - 1)
    groups = values.reshape(*values.shape[:-2], -1, packing.quantization.group_size)
    found = groups * scales[..., None] + biases[..., None]
    return found.reshape(*values.shape[:-2], packing.dim)


def first_seen(position: int, window: int | None, chunk: int | None) -> int:
    low = 0 if window is None else position - window + 1
    return max(low, 0 if chunk is None else position // chunk * chunk, 0)


def exact(made: Made) -> np.ndarray:
    """[T, Hq, Dv] in float64, one query at a time."""
    case = made.case
    queries = np.array(made.queries.astype(mx.float32)).astype(np.float64)
    sinks = None if made.sinks is None else np.array(made.sinks.astype(mx.float32), np.float64)
    group, scale = case.query_heads // case.kv_heads, case.key_dim**-0.5
    out = np.zeros((*queries.shape[:2], case.value_dim))
    row = 0
    for i, (rows, context) in enumerate(zip(case.query_lens, case.context_lens, strict=True)):
        for position in range(context - rows, context):
            seen = slice(first_seen(position, case.window, case.chunk), position + 1)
            keys = np.repeat(made.whole_keys[i][seen], group, axis=1)
            values = np.repeat(made.whole_values[i][seen], group, axis=1)
            scores = np.einsum("hd,khd->hk", queries[row], keys) * scale
            if case.softcap is not None:
                scores = case.softcap * np.tanh(scores / case.softcap)
            top = scores.max(1)
            if sinks is not None:
                top = np.maximum(top, sinks)
            weights = np.exp(scores - top[:, None])
            below = weights.sum(1) + (0 if sinks is None else np.exp(sinks - top))
            out[row] = np.einsum("hk,khd->hd", weights, values) / below[:, None]
            row += 1
    return out


def run(made: Made, route: ops.Route | None = None) -> tuple[mx.array, Pool]:
    """Write this step's rows and attend."""
    case = made.case
    pool = ops.write_kv(made.keys, made.values, made.pool, made.ragged)
    return ops.attention(
        made.queries,
        pool,
        made.ragged,
        scale=case.key_dim**-0.5,
        window=case.window,
        chunk=case.chunk,
        softcap=case.softcap,
        sinks=made.sinks,
        value_dim=case.value_dim if case.shared_values else None,
        route=route,
    )


def as_written(made: Made, pool: Pool) -> Made:
    """With this step's rows as the pool's codes hold them.

    A value half-way between two codes gets the one or the other as a device rounds its division. In
    bfloat16 that is common, and for 4 bits it is more than attention may be off.
    """
    case, size = made.case, made.case.block_size
    found = []
    wholes = (made.whole_keys, case.key_dim), (made.whole_values, case.value_dim)
    for store, (whole, width) in zip((pool.keys, pool.values), wholes, strict=True):
        packing, words, held = case.packing(width), np.array(store), []
        for i, (rows, context) in enumerate(zip(case.query_lens, case.context_lens, strict=True)):
            table, gone = made.ragged.tables[i], made.ragged.dropped[i]
            written = np.stack(
                [
                    words[table[position // size - gone], packing.index(size)[position % size]]
                    for position in range(context - rows, context)
                ]
            )
            values = decoded(packing, mx.array(written))
            held.append(np.concatenate([whole[i][: context - rows], values]))
        found.append(held)
    return replace(made, whole_keys=found[0], whole_values=found[1])


def error(out: mx.array, want: np.ndarray) -> float:
    got = np.array(out.astype(mx.float32)).astype(np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def staged_as(monkeypatch: pytest.MonkeyPatch, **shape: int | bool) -> None:
    """Kernels with tiles in threadgroup memory get another shape than the policy's."""
    plain = policy.staged_spec

    def changed(layer, **words):
        spec = plain(layer, **words)
        return spec and replace(spec, **shape)

    monkeypatch.setattr(policy, "staged_spec", changed)
