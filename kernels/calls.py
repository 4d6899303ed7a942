"""Ops as kernel calls on a pool of pages: arrays in, arrays and the next token out.

`ops` checks what comes in and threads the pool; `policy` chose the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial

import mlx.core as mx
import numpy as np

from . import launch, policy, reference
from .metadata import MIN_METADATA, padded
from .plans import DecodePlan, TiledPlan, decode_plan, row_spans, rows_of, tiled_plan
from .pools import Pool
from .quantization import Packing, Packings, Quantization
from .ragged import Ragged
from .render import render
from .specs import (
    AttentionSpec,
    CopySpec,
    DecodeSpec,
    DequantizeSpec,
    GatherSpec,
    KernelSpec,
    QuantizeSpec,
    ReduceSpec,
    StagedSpec,
    TiledSpec,
    WriteSpec,
    supports,
)

LOG2E = 1.4426950408889634
TOKEN = ((1,), mx.int32)
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@cache
def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def write_kv(keys: mx.array, values: mx.array | None, pool: Pool, ragged: Ragged) -> Pool:
    """The rows of a step into their slots, in place."""
    if values is not None and values.dtype != keys.dtype:
        values = values.astype(keys.dtype)
    sizes = dtype_name(pool.dtype), pool.kv_heads, pool.key_dim
    spec: WriteSpec | QuantizeSpec
    if pool.packings is not None:
        spec = policy.quantize_spec(dtype_name(keys.dtype), *sizes, *_codes(pool, pool.packings))
    else:
        spec = policy.write_spec(dtype_name(keys.dtype), *sizes, pool.value_dim)
    inputs = {"keys": keys, "slots": ragged.slot_mapping, **_pools(pool), "token_in": pool.token}
    if values is not None:
        inputs["values"] = values
    (token,) = render(spec)(inputs, [TOKEN], groups=ragged.num_rows, threads=spec.threads)
    return pool.after(token)


def copy_blocks(pool: Pool, sources: Sequence[int], targets: Sequence[int]) -> Pool:
    """Whole blocks inside a pool, in place."""
    key_size = pool.keys.size // pool.num_blocks
    value_size = None if pool.values is None else pool.values.size // pool.num_blocks
    spec = policy.copy_spec(dtype_name(pool.keys.dtype), key_size, value_size)
    pairs = padded(list(zip(sources, targets, strict=True)))
    inputs = {**_pools(pool), "pairs": pairs, "token_in": pool.token}
    (token,) = render(spec)(inputs, [TOKEN], groups=len(sources), threads=spec.threads)
    return pool.after(token)


def gather(
    pool: Pool, ragged: Ragged, sequence: int, low: int
) -> tuple[mx.array, mx.array | None, Pool]:
    """Positions low.. of one sequence: [1, Hkv, positions, Dk], the same with Dv, the next pool."""
    high = ragged.context_lens[sequence]
    keys, values, pool = take(pool, ragged.padded_index(sequence, low, high), high - low)
    return keys[None], None if values is None else values[None], pool


def take(pool: Pool, slots: mx.array, count: int) -> tuple[mx.array, mx.array | None, Pool]:
    """The first `count` of some slots, int32 of at least MIN_METADATA entries: [Hkv, count, Dk],
    the same with Dv, the next pool."""
    sizes = dtype_name(pool.dtype), pool.kv_heads, pool.key_dim
    spec: GatherSpec | DequantizeSpec
    if pool.packings is not None:
        spec = policy.dequantize_spec(*sizes, *_codes(pool, pool.packings))
    else:
        spec = policy.gather_spec(*sizes, pool.value_dim)
    widths = [pool.key_dim] if pool.value_dim is None else [pool.key_dim, pool.value_dim]
    inputs = {
        **_pools(pool),
        "slots": slots,
        "lengths": _lengths(count, launch.active()),
        "token_in": pool.token,
    }
    made = render(spec)(
        inputs,
        [*(((pool.kv_heads, count, width), pool.dtype) for width in widths), TOKEN],
        groups=count,
        threads=spec.threads,
    )
    values = None if pool.values is None else made[1]
    return made[0], values, pool.after(made[-1])


def read_blocks(pool: Pool, blocks: Sequence[int]) -> tuple[mx.array, mx.array, Pool]:
    """Whole blocks of a pool of codes, as words [n, words of a block], and the next pool."""
    sizes = pool.keys.shape[1], _words(pool)
    spec = policy.gather_spec("uint32", 1, *sizes)
    count = len(blocks)
    made = render(spec)(
        {
            **_pools(pool),
            "slots": padded(blocks),
            "lengths": _lengths(count, launch.active()),
            "token_in": pool.token,
        },
        [*(((count, size), mx.uint32) for size in sizes), TOKEN],
        groups=count,
        threads=spec.threads,
    )
    return made[0], made[1], pool.after(made[2])


def write_blocks(pool: Pool, blocks: Sequence[int], keys: mx.array, values: mx.array) -> Pool:
    """Words [n, words of a block] into blocks of a pool of codes, in place."""
    spec = policy.write_spec("uint32", "uint32", 1, pool.keys.shape[1], _words(pool))
    inputs = {"keys": keys, "values": values, "slots": padded(blocks), **_pools(pool)}
    inputs["token_in"] = pool.token
    (token,) = render(spec)(inputs, [TOKEN], groups=len(blocks), threads=spec.threads)
    return pool.after(token)


def _words(pool: Pool) -> int:
    """Words of a block of values."""
    assert pool.values is not None
    return pool.values.shape[1]


def _codes(pool: Pool, packings: Packings) -> tuple[int, int, int, int]:
    """What the kernels of codes need to know beside the keys' sizes."""
    how = packings.quantization
    return packings.values.dim, pool.block_size, how.bits, how.group_size


@lru_cache(maxsize=256)
def _lengths(count: int, where: launch.Backend | None) -> mx.array:
    del where  # an array for each back end
    return mx.array([count] * MIN_METADATA, mx.int32)


@lru_cache(maxsize=256)
def settings(scale: float, softcap: float | None, where: launch.Backend | None) -> mx.array:
    """Factor of the scores and soft cap, so that scores come out in base 2. Made once: a new array
    from the host costs a GPU more than the kernel that reads it."""
    del where  # an array for each back end
    if softcap is None:
        made = mx.array([scale * LOG2E, 1.0], mx.float32)
    else:
        made = mx.array([scale / softcap, softcap * LOG2E], mx.float32)
    mx.eval(made)
    return made


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """What one call asks: queries [T, Hq(, 1), Dk] and how they see; see `ops.attention`."""

    queries: mx.array
    layer: AttentionSpec
    scale: float
    window: int | None
    chunk: int | None
    softcap: float | None
    sinks: mx.array | None

    @property
    def band(self) -> int | None:
        """How many positions a row sees at most, None: all before it."""
        bands = [band for band in (self.window, self.chunk) if band is not None]
        return min(bands, default=None)

    def inputs(self, pool: Pool, ragged: Ragged) -> dict[str, mx.array]:
        """The inputs that both attention kernels have."""
        return {
            "queries": self.queries,
            **_pools(pool),
            "block_tables": ragged.block_tables,
            "settings": settings(self.scale, self.softcap, launch.active()),
            "token_in": pool.token,
        }


def attention(
    query: Query,
    pool: Pool,
    ragged: Ragged,
    route: policy.Route | None,
    *,
    arrays: bool = False,
) -> tuple[mx.array, Pool]:
    """`ops.attention` on the routes that the policy assigns to the sequences; arrays: the pool was
    made for this call."""
    if query.scale < 0:  # kernels compare scores before they are scaled
        query = replace(query, queries=-query.queries, scale=-query.scale)
    layer, band = query.layer, query.band
    goes = ragged.ask(
        ("assignment", layer, band, route),
        lambda step: policy.assign(step, layer, band=band, route=route),
    )
    where = launch.active()
    if where != "runner":
        prepare(layer, band is not None, where, arrays)
    outputs, order = [], (*goes.decode, *goes.few, *goes.tiled, *goes.gathered)
    for serve, sequences in (
        (_decode, goes.decode),
        (partial(_tiled, few=True), goes.few),
        (partial(_tiled, few=False), goes.tiled),
    ):
        if sequences:
            out, pool = serve(query, pool, ragged, sequences)
            outputs.append(out)
    for sequence in goes.gathered:
        out, pool = _gathered(query, pool, ragged, sequence)
        outputs.append(out)
    result = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    if order != tuple(sorted(order)):
        back = ragged.once(
            ("order", order),
            lambda: mx.array(np.argsort(rows_of(ragged, order)).astype(np.int32)),
        )
        result = mx.take(result, back, axis=0)
    return result.reshape(*query.queries.shape[:-1], query.layer.value_dim), pool


def _decode(
    query: Query, pool: Pool, ragged: Ragged, sequences: tuple[int, ...]
) -> tuple[mx.array, Pool]:
    """Row by row: the sequences' rows, [rows, Hq, Dv]."""
    layer, window, chunk, band = query.layer, query.window, query.chunk, query.band
    whole = policy.decode_spec(layer, False)
    some = None if len(sequences) == ragged.num_sequences else sequences

    def make(step: Ragged) -> DecodePlan:
        chosen = step.everyone if some is None else some
        lengths = np.array(step.query_lens)[list(chosen)]
        seen = np.minimum(np.array(step.context_lens)[list(chosen)], band or 1 << 30)
        return decode_plan(
            step,
            chosen,
            window=window,
            chunk=chunk,
            tile=whole.tile,
            split=policy.split(
                "decode",
                whole.tile,
                int(lengths @ seen),
                layer.kv_heads,
                even=bool(seen.max() <= 1.25 * seen.mean()),
            ),
        )

    key = ("decode", some, window, chunk, whole.tile, layer.kv_heads)
    plan = ragged.ask(key, make)
    inputs = {**query.inputs(pool, ragged), "items": plan.items}
    spec = policy.decode_spec(layer, plan.row_items is not None)
    groups, threads = plan.num_items * layer.kv_heads, 32 * spec.simdgroups
    return _run(spec, inputs, query, pool, plan.num_items, plan, groups, threads)


def _tiled(
    query: Query, pool: Pool, ragged: Ragged, sequences: tuple[int, ...], *, few: bool
) -> tuple[mx.array, Pool]:
    """Many rows at a time: the sequences' rows, [rows, Hq, Dv]."""
    layer, window, chunk, band = query.layer, query.window, query.chunk, query.band
    whole = policy.many_spec(layer, banded=band is not None, partial=False, few=few)
    some = None if len(sequences) == ragged.num_sequences else sequences

    def make(step: Ragged) -> TiledPlan:
        chosen = list(step.everyone if some is None else some)
        lengths = np.array(step.query_lens)[chosen]
        pieces = -(-lengths * whole.group // (16 * whole.row_tiles))
        seen = np.minimum(np.array(step.context_lens)[chosen], (band or 1 << 30) + lengths)
        return tiled_plan(
            step,
            tuple(chosen),
            window=window,
            chunk=chunk,
            group=whole.group,
            row_tiles=whole.row_tiles,
            tile=whole.tile,
            split=policy.many_split(whole, seen, pieces),
        )

    shape = (whole.row_tiles, whole.tile, whole.group, policy.alone(whole))
    key = ("tiled", some, window, chunk, layer.kv_heads, shape)
    plan = ragged.ask(key, make)
    spans = ragged.ask(("spans", window, chunk), lambda step: row_spans(step, window, chunk))
    inputs = {**query.inputs(pool, ragged), "items": plan.items, "row_spans": spans}
    spec = policy.many_spec(
        layer, banded=band is not None, partial=plan.row_items is not None, few=few
    )
    groups, threads = plan.num_items * layer.kv_heads, 32 * spec.simdgroups
    return _run(spec, inputs, query, pool, plan.num_parts, plan, groups, threads)


def _run(
    spec: DecodeSpec | StagedSpec | TiledSpec,
    inputs: dict[str, mx.array],
    query: Query,
    pool: Pool,
    num_parts: int,
    plan: DecodePlan | TiledPlan,
    groups: int,
    threads: int,
) -> tuple[mx.array, Pool]:
    """Run an attention kernel, and the reduction if it left parts."""
    layer = query.layer
    if query.sinks is not None and "sinks" in spec.inputs:
        inputs["sinks"] = query.sinks
    rows = (plan.num_rows, layer.query_heads, layer.value_dim)
    if plan.row_items is None:
        out, token = render(spec)(
            inputs, [(rows, query.queries.dtype), TOKEN], groups=groups, threads=threads
        )
        return out, pool.after(token)
    parts = max(MIN_METADATA, num_parts)
    values, stats, token = render(spec)(
        inputs,
        [
            ((parts, layer.query_heads, layer.value_dim), mx.float32),
            ((parts, layer.query_heads, 2), mx.float32),
            TOKEN,
        ],
        groups=groups,
        threads=threads,
    )
    merge = policy.reduce_spec(layer)
    inputs = {"partial_values": values, "partial_stats": stats, "row_items": plan.row_items}
    if query.sinks is not None:
        inputs["sinks"] = query.sinks
    (out,) = render(merge)(
        inputs,
        [(rows, query.queries.dtype)],
        groups=plan.num_rows * layer.query_heads,
        threads=32 * merge.simdgroups,
    )
    return out, pool.after(token)


def _gathered(query: Query, pool: Pool, ragged: Ragged, sequence: int) -> tuple[mx.array, Pool]:
    """MLX's own attention over the gathered pages: one sequence's rows, [rows, Hq, Dv]."""
    start = ragged.context_lens[sequence] - ragged.query_lens[sequence]
    low = reference.first_seen(start, query.window, query.chunk)
    keys, values, pool = gather(pool, ragged, sequence, low)
    out = reference.sequence_attention(
        query.queries,
        keys,
        keys[..., : query.layer.value_dim] if values is None else values,
        ragged,
        sequence,
        low,
        scale=query.scale,
        window=query.window,
        chunk=query.chunk,
        softcap=query.softcap,
        sinks=query.sinks,
    )
    return out.squeeze(2) if out.ndim == 4 else out, pool


@cache
def prepare(
    layer: AttentionSpec, banded: bool, where: launch.Backend | None, arrays: bool = False
) -> None:
    """Run every kernel that may serve a layer once, on two blocks, so that MLX compiles them now
    and none in mid-serving."""
    del where  # kernels are compiled for each back end
    if supports(layer) is not None:
        return
    tokens = [_prepare(spec, layer) for spec in policy.kernels(layer, banded, arrays)]
    mx.eval(tokens)


def _prepare(spec: KernelSpec, layer: AttentionSpec) -> list[mx.array]:
    rows, pool = DTYPES[layer.dtype], DTYPES[layer.pool_dtype]
    heads, kv_heads, size = layer.query_heads, layer.kv_heads, layer.block_size
    key_dim, value_dim = layer.key_dim, layer.value_dim

    def pages(dim: int) -> mx.array:
        if not layer.bits:
            return mx.zeros((2, size, kv_heads, dim), pool)
        packing = Packing(Quantization(layer.bits, layer.code_group), kv_heads, dim, pool)
        return mx.zeros((2, packing.block_words(size)), mx.uint32)

    def ints(*first: int) -> mx.array:
        return mx.array([*first, *[0] * 16][:16], mx.int32).reshape(-1, 2)

    dummies: dict[str, mx.array] = {
        "queries": mx.zeros((1, heads, key_dim), rows),
        "keys": mx.zeros((1, kv_heads, key_dim), rows),
        "values": mx.zeros((1, kv_heads, value_dim), rows),
        "key_pool": pages(key_dim),
        "value_pool": pages(value_dim),
        "sinks": mx.zeros((heads,), rows),
        "settings": mx.zeros((2,), mx.float32),
        "token_in": mx.zeros((1,), mx.int32),
        # A tiled item has one packed row; in an item of the decode kernel 1 is never looked at.
        "items": ints(0, 0, 1 if isinstance(spec, StagedSpec | TiledSpec) else 0, 0, 0, 0, 0, 1),
        "partial_values": mx.zeros((8, heads, value_dim), mx.float32),
        "partial_stats": mx.ones((8, heads, 2), mx.float32),
        "row_items": ints(0, 1).flatten(),
        "pairs": ints(0, 1),
        "lengths": mx.ones((8,), mx.int32),
    }
    inputs = {name: dummies.get(name, ints()) for name in spec.inputs}
    parts = [((8, heads, value_dim), mx.float32), ((8, heads, 2), mx.float32)]
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]] = {
        "output": ((1, heads, value_dim), rows),
        "partial_values": parts[0],
        "partial_stats": parts[1],
        "gathered_keys": ((1, kv_heads, 1, key_dim), pool),
        "gathered_values": ((1, kv_heads, 1, value_dim), pool),
        "token_out": TOKEN,
    }
    groups, threads = 1, 32
    if isinstance(spec, DecodeSpec | StagedSpec | TiledSpec):
        groups, threads = kv_heads, 32 * spec.simdgroups
    elif isinstance(spec, ReduceSpec):
        groups, threads = heads, 32 * spec.simdgroups
    elif isinstance(spec, WriteSpec | QuantizeSpec | GatherSpec | DequantizeSpec | CopySpec):
        threads = spec.threads
    made = [outputs[name] for name in spec.outputs]
    return render(spec)(inputs, made, groups=groups, threads=threads)


def _pools(pool: Pool) -> dict[str, mx.array]:
    if pool.values is None:
        return {"key_pool": pool.keys}
    return {"key_pool": pool.keys, "value_pool": pool.values}
