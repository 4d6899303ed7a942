"""The paged kernels in MLX's own operations, for tests of what surrounds them on the CPU.

They are lazy, so that they can be traced, and no memory is written behind the back of MLX's graph:
the token of a pool carries what was written so far. Whoever takes a token that is too old, or none,
reads what is not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx
from mlxrewrite.kernels import (
    calls,
    depthwise,
    launch,
    low_rank,
    ops,
    policy,
    scan,
    selective,
    shift,
    state_step,
)


@contextmanager
def lazy_kernels() -> Iterator[None]:
    """Steps take the routes of a GPU; write, decode, reduce, gather and copy are emulated.

    Prompts take the route of single rows. Recurrences and convolutions take their plain forms."""
    patches = (
        mock.patch.object(launch.MetalKernel, "__call__", _run),
        mock.patch.object(calls, "prepare", lambda *args: None),
        mock.patch.object(policy, "DECODE_ROWS", 1 << 30),
        *(mock.patch.object(m, "supports", lambda *a: None) for m in (calls, ops, policy)),
        mock.patch.object(policy, "_word", lambda *args: 2),
        *(mock.patch.object(m, "supports", _none) for m in (low_rank, selective, state_step)),
        *(mock.patch.object(m, "DTYPES", {}) for m in (depthwise, scan, shift)),
        launch.backend("metal"),
    )
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _none(*given: Any) -> str:
    return "kernels of states are not emulated"


def _run(
    self: launch.MetalKernel,
    inputs: Mapping[str, mx.array],
    outputs: Sequence[tuple[Sequence[int], mx.Dtype]],
    *,
    groups: Any,
    threads: Any,
    backend: Any = None,
) -> list[mx.array]:
    del threads, backend
    assert set(inputs) == set(self.input_names)
    count = groups if isinstance(groups, int) else groups[0]
    run = next(run for name, run in _KINDS.items() if name in self.name)
    made = run(inputs, outputs, count)
    assert [tuple(a.shape) for a in made[:-1]] == [tuple(s) for s, _ in outputs[:-1]]
    return made


def _stores(inputs: Mapping[str, mx.array]) -> tuple[mx.array, mx.array | None]:
    """Keys and values as [slots, heads, width]: the token's, once something was written."""
    keys, values, token = inputs["key_pool"], inputs.get("value_pool"), inputs["token_in"]
    sizes = [keys.size, 0 if values is None else values.size]
    if token.size > 1:
        flat = token.astype(keys.dtype)
        keys = flat[: sizes[0]].reshape(keys.shape)
        values = None if values is None else flat[sizes[0] :].reshape(values.shape)
    return keys.flatten(0, 1), None if values is None else values.flatten(0, 1)


def _token(keys: mx.array, values: mx.array | None) -> mx.array:
    parts = [keys.flatten()] + ([] if values is None else [values.flatten()])
    return mx.concatenate(parts).astype(mx.float32)


def _write(inputs: Mapping[str, mx.array], outputs: Any, count: int) -> list[mx.array]:
    slots = inputs["slots"][:count]
    stores = list(_stores(inputs))
    for at, name in enumerate(("keys", "values")):
        store = stores[at]
        if store is not None:
            rows = inputs[name].reshape(count, *store.shape[1:]).astype(store.dtype)
            stores[at] = mx.put_along_axis(store, slots[:, None, None], rows, axis=0)
    return [_token(*stores)]


def _copy(inputs: Mapping[str, mx.array], outputs: Any, count: int) -> list[mx.array]:
    pairs, size = inputs["pairs"][:count], inputs["key_pool"].shape[1]
    offsets = mx.arange(size)
    read, wrote = ((pairs[:, i, None] * size + offsets).flatten()[:, None, None] for i in (0, 1))
    stores = [
        None
        if store is None
        else mx.put_along_axis(store, wrote, mx.take_along_axis(store, read, axis=0), axis=0)
        for store in _stores(inputs)
    ]
    return [_token(*stores)]


def _gather(inputs: Mapping[str, mx.array], outputs: Any, count: int) -> list[mx.array]:
    slots, stores = inputs["slots"][:count], _stores(inputs)
    found = [mx.take(s, slots, axis=0).swapaxes(0, 1) for s in stores if s is not None]
    return [*found, _token(*stores)]


def _decode(inputs: Mapping[str, mx.array], outputs: Any, count: int) -> list[mx.array]:
    """Each item over its keys, masked out of as many as a table holds."""
    keys, values = _stores(inputs)
    (shape, dtype), heads, size = outputs[0], keys.shape[1], inputs["key_pool"].shape[1]
    items, tables = inputs["items"], inputs["block_tables"].flatten()
    items = items[: count // heads]
    first, last = items[:, 1:2], items[:, 2:3]
    # From the first block that is seen on: tables of windows lack what came before.
    positions = first // size * size + mx.arange(inputs["block_tables"].shape[1] * size)
    places, length = items[:, 3:4] + positions // size, tables.shape[0]
    seen = (positions >= first) & (positions <= last)
    blocks = tables[mx.clip(places, 0, length - 1)]
    slots = blocks * size + positions % size
    queries = inputs["queries"].reshape(-1, shape[1], keys.shape[2])[items[:, 0]]
    group = shape[1] // heads
    queries = queries.reshape(queries.shape[0], heads, group, -1).astype(mx.float32)
    read = keys[slots].astype(mx.float32).swapaxes(1, 2)
    scores = (queries * inputs["settings"][0]) @ read.swapaxes(-1, -2)
    scores = mx.where(seen[:, None, None], scores, -mx.inf)
    best = scores.max(-1, keepdims=True)
    weights = mx.where(seen[:, None, None], _exp2(scores - best), 0)
    width = shape[2]
    held = read[..., :width] if values is None else values[slots].astype(mx.float32).swapaxes(1, 2)
    held = mx.where(seen[:, None, :, None], held, 0)  # blocks that nobody holds may be NaN
    total, sums = weights.sum(-1, keepdims=True), weights @ held
    token = _token(keys, values)
    if len(outputs) == 2:
        if "sinks" in inputs:
            sinks = inputs["sinks"].reshape(1, heads, group, 1).astype(mx.float32)
            total = total + mx.exp(sinks) / _exp2(best)
        rows = (sums / total).reshape(-1, shape[1], width).astype(dtype)
        out = mx.zeros(shape, dtype)
        return [mx.put_along_axis(out, items[:, 4][:, None, None], rows, axis=0), token]
    stats = mx.concatenate([best, total], axis=-1).reshape(-1, shape[1], 2)
    sums = sums.reshape(-1, shape[1], width)
    missing = shape[0] - sums.shape[0]
    return [*(mx.pad(a, [(0, missing), (0, 0), (0, 0)]) for a in (sums, stats)), token]


def _reduce(inputs: Mapping[str, mx.array], outputs: Any, count: int) -> list[mx.array]:
    (shape, dtype), ends = outputs[0], inputs["row_items"]
    values, stats = inputs["partial_values"], inputs["partial_stats"]
    item = mx.arange(values.shape[0])
    mine = (item >= ends[: shape[0], None]) & (item < ends[1 : shape[0] + 1, None])
    mine = mine[:, :, None]  # [rows, items, 1]
    scores = mx.where(mine, stats[None, ..., 0], -mx.inf)
    factor = _exp2(scores - scores.max(1, keepdims=True))
    total = mx.where(mine, factor * stats[None, ..., 1], 0).sum(1)
    if "sinks" in inputs:
        total = total + mx.exp(inputs["sinks"].astype(mx.float32)) / _exp2(scores.max(1))
    sums = mx.where(mine[..., None], factor[..., None] * values[None], 0).sum(1)
    return [(sums / total[..., None]).astype(dtype)]


def _exp2(x: mx.array) -> mx.array:
    return mx.exp(x * math.log(2))


_KINDS = {
    "write": _write,
    "copy": _copy,
    "gather": _gather,
    "decode": _decode,
    "reduce": _reduce,
}
