"""MLX's own kernels, from the headers of the installed wheel, through the runner: they are known to
work on Apple's GPUs, so what they compute here says that the runner's language is the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlxrewrite.kernels.dialects.cpu import KernelError
from mlxrewrite.kernels.dialects.cpu.runner import Memory, Options, launch
from mlxrewrite.kernels.dialects.cpu.source import (
    ATTRIBUTES,
    IDS,
    PREAMBLE,
    entry,
    with_threadgroup_macros,
)
from mlxrewrite.kernels.dialects.cpu.toolchain import PRELUDE, kernel_library, mlx_headers

KERNELS = "mlx/backend/metal/kernels"
GROUP = ATTRIBUTES["threadgroup_position_in_grid"][1]
GROUPS = ATTRIBUTES["threadgroups_per_grid"][1]
POSITION = ATTRIBUTES["thread_position_in_grid"][1]
IN_GROUP = ATTRIBUTES["thread_position_in_threadgroup"][1]
Array = np.ndarray[Any, Any]


def flattened(name: str, seen: set[str]) -> str:
    """A header with those it includes: threadgroup variables are rewritten in all of them."""
    if name in seen:
        return ""
    seen.add(name)

    def include(match: re.Match[str]) -> str:
        other = match.group(1)
        stands_in = (PRELUDE / other).exists() or other == f"{KERNELS}/utils.h"
        found = (mlx_headers() / other).exists()
        return match.group() if stands_in or not found else flattened(other, seen)

    text = (mlx_headers() / name).read_text().replace("#pragma once", "")
    text = re.sub(r'#include "([^"]+)"', include, text)
    return re.sub(r"\[\[threadgroup\(\d+\)\]\]", "", text)


def run(
    header: str,
    call: str,
    arrays: Sequence[Array],
    outputs: Sequence[int],
    *,
    grid: Sequence[int],
    threadgroup: Sequence[int],
    before: str = "",
    lockstep: bool = False,
) -> list[Array]:
    """Checked. Arrays are passed in order; `outputs` are those that the kernel writes."""
    text = "\n".join(
        [
            PREAMBLE,
            with_threadgroup_macros(flattened(f"{KERNELS}/{header}", set())),
            IDS,
            entry(f"{before} {call}"),
        ]
    )
    memories = [
        Memory(f"argument {i}", "data", array, writable=i in outputs)
        for i, array in enumerate(arrays)
    ]
    launch(
        kernel_library(text, True),
        memories,
        grid=grid,
        threadgroup=threadgroup,
        check=True,
        options=Options(lockstep=lockstep),
    )
    return [arrays[i] for i in outputs]


def one(value: float, dtype: Any) -> Array:
    return np.array([value], dtype)


def rows(seed: int, *shape: int, dtype: Any = np.float16) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def sdpa(q: Array, k: Array, v: Array, mask: str | None = None) -> Array:
    out = mx.fast.scaled_dot_product_attention(
        mx.array(q), mx.array(k), mx.array(v), scale=q.shape[-1] ** -0.5, mask=mask, stream=mx.cpu
    )
    return np.array(out.astype(mx.float32))


@pytest.mark.parametrize(("width", "keys", "heads", "kv_heads"), [(64, 300, 4, 2), (128, 77, 2, 2)])
def test_sdpa_vector(width: int, keys: int, heads: int, kv_heads: int) -> None:
    """1024 threads, threadgroup memory, reductions over lanes."""
    q = rows(0, 1, heads, 1, width)
    k, v = rows(1, 1, kv_heads, keys, width), rows(2, 1, kv_heads, keys, width)
    unused = np.zeros(64, np.uint8)
    strides = [one(keys * width, np.uint64), one(width, np.uint64)]
    none = one(0, np.int32)
    arrays = [q, k, v, np.zeros_like(q), one(heads // kv_heads, np.int32), one(keys, np.int32)]
    arrays += [*strides, *strides, one(width**-0.5, np.float32), unused, unused]
    arrays += [none, none, none, unused, one(heads, np.int32)]
    pointers = ["const half*"] * 3 + ["half*"]
    references = ["int"] * 2 + ["size_t"] * 4 + ["float"]
    types = [
        *pointers,
        *references,
        "const bool*",
        "const half*",
        *["int"] * 3,
        "const half*",
        "int",
    ]
    passed = [
        f"({kind})a[{i}]" if kind.endswith("*") else f"*(const {kind}*)a[{i}]"
        for i, kind in enumerate(types)
    ]
    call = f"sdpa_vector<half, {width}, {width}>({', '.join(passed)}, {GROUP}, {GROUPS}, "
    (got,) = run(
        "sdpa_vector.h",
        call + "d->simdgroup, d->lane)",
        arrays,
        [3],
        grid=(1024 * heads, 1, 1),
        threadgroup=(1024, 1, 1),
    )
    assert np.abs(got.astype(np.float32) - sdpa(q, k, v)).max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "length", "heads", "kv_heads", "causal"),
    [(64, 96, 2, 1, False), (64, 77, 2, 2, True), (128, 64, 1, 1, True)],
)
def test_steel_attention(width: int, length: int, heads: int, kv_heads: int, causal: bool) -> None:
    """Simdgroup matrices by element, which depends on the layout of Apple's."""
    tile, turn = 32, 32 if width < 128 else 16
    q = rows(0, 1, heads, length, width)
    k, v = rows(1, 1, kv_heads, length, width), rows(2, 1, kv_heads, length, width)
    tiles, turns = -(-length // tile), -(-length // turn)
    whole_tiles, whole_turns = length // tile, length // turn
    sizes = [1, heads, width, length, length, heads // kv_heads]
    rest = [tiles, turns, whole_tiles, whole_turns]
    rest += [length - whole_tiles * tile, length - whole_turns * turn, 0]
    strides = [count * length * width for count in (heads, kv_heads, kv_heads, heads)]
    parameters = (
        np.array(sizes, np.int32).tobytes()
        + np.array([width**-0.5], np.float32).tobytes()
        + np.array(rest, np.int32).tobytes()
        + np.array([[s, length * width, width] for s in strides], np.int64).tobytes()
    )
    unused = np.zeros(64, np.uint8)
    arrays = [q, k, v, np.zeros_like(q), np.frombuffer(parameters, np.uint8).copy()]
    arrays += [unused, unused, unused, unused]
    constants = {
        "align_Q": length % tile == 0,
        "align_K": length % turn == 0,
        "has_mask": False,
        "do_causal": causal,
        "has_sinks": False,
        "save_lse": False,
    }
    call = (
        f"attention<half, {tile}, {turn}, {width}, {width}, 4, 1, half, float>((const half*)a[0], "
        "(const half*)a[1], (const half*)a[2], (half*)a[3], (const mlx::steel::AttnParams*)a[4], "
        "(const mlx::steel::AttnMaskParams*)a[5], (const half*)a[6], (const half*)a[7], "
        f"(float*)a[8], d->lane, d->simdgroup, {GROUP}, {IN_GROUP})"
    )
    (got,) = run(
        "steel/attn/kernels/steel_attention.h",
        call,
        arrays,
        [3],
        grid=(32 * tiles, 4 * heads, 1),
        threadgroup=(32, 4, 1),
        before=" ".join(f"{name} = {int(value)};" for name, value in constants.items()),
    )
    expected = sdpa(q, k, v, "causal" if causal else None)
    assert np.abs(got.astype(np.float32) - expected).max() < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["gated_delta_seq", "gated_delta_fused_chunk"])
def test_gated_delta(kernel: str) -> None:
    """A recurrence, step by step and in chunks with matrices. The latter writes what other lanes of
    its simdgroup read with no barrier between: the runner reports it unless lanes are in step."""
    length, key_heads, value_heads, key_dim, value_dim = 64, 2, 4, 64, 32
    rng = np.random.default_rng(0)
    q, k = (rows(i, 1, length, key_heads, key_dim, dtype=np.float32) / 8 for i in range(2))
    v = rows(2, 1, length, value_heads, value_dim, dtype=np.float32)
    decay, rate = (
        rng.uniform(low, 1, (1, length, value_heads)).astype(np.float32) for low in (0.8, 0.0)
    )
    start = rows(3, 1, value_heads, value_dim, key_dim, dtype=np.float32)
    state, expected = start[0].astype(np.float64), np.zeros((length, value_heads, value_dim))
    for t in range(length):
        for h in range(value_heads):
            g = h // (value_heads // key_heads)
            state[h] *= decay[0, t, h]
            change = (v[0, t, h] - state[h] @ k[0, t, g]) * rate[0, t, h]
            state[h] += np.outer(change, k[0, t, g])
            expected[t, h] = state[h] @ q[0, t, g]
    chunked = kernel.endswith("chunk")
    arrays = [q, k, v, start, decay, rate, np.zeros_like(v), np.zeros_like(start)]
    arrays += [one(length, np.int32)]
    passed = ", ".join(f"(const float*)a[{i}]" for i in range(6)) + ", (float*)a[6], (float*)a[7]"
    last = 8 if chunked else 1
    call = (
        f"{kernel}<float, {key_dim}, {value_dim}, {key_heads}, {value_heads}, {last}>({passed}, "
        f"*(int*)a[8]{'' if chunked else ', (float*)a[7]'}, {POSITION}, {IN_GROUP}, d->lane)"
    )
    size: dict[str, Any] = {
        "grid": (32, value_dim // 8 if chunked else value_dim, value_heads),
        "threadgroup": (32, 4, 1),
    }
    if chunked:
        with pytest.raises(KernelError, match="race on threadgroup 'gamma_all'"):
            run("gated_delta_update.h", call, arrays, [6, 7], **size)
    y, final = run("gated_delta_update.h", call, arrays, [6, 7], **size, lockstep=chunked)
    assert np.abs(y[0] - expected).max() < 1e-5
    assert np.abs(final[0] - state).max() < 1e-5


def test_the_headers_are_those_of_the_installed_mlx() -> None:
    assert (mlx_headers() / KERNELS / "sdpa_vector.h").exists()
    assert Path(mlx_headers()).parent.name == "mlx"
