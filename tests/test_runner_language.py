"""The runner's version of Metal's language and library, function by function, against numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlxrewrite.kernels.dialects.cpu import metal_kernel

LANES = np.arange(32)
Array = np.ndarray[Any, Any]
FLOATS = {"float": mx.float32, "half": mx.float16, "bfloat": mx.bfloat16}


def run(
    source: str,
    arrays: dict[str, mx.array],
    outputs: dict[str, tuple[int, mx.Dtype]],
    *,
    threads: int = 32,
    groups: int = 1,
    header: str = "",
    **words: Any,
) -> dict[str, Array]:
    """Checked; outputs as float64."""
    atomic = "init_value" in words
    made = metal_kernel(
        "probe", list(arrays), list(outputs), source, header, atomic_outputs=atomic
    )(
        inputs=list(arrays.values()),
        grid=(threads * groups, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(size,) for size, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        **words,
    )
    return {
        name: np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)
        for name, array in zip(outputs, made, strict=True)
    }


def shifted(x: Array, by: int) -> Array:
    """x[lane + by], one's own where there is none."""
    source = LANES + by
    return np.where((source >= 0) & (source < 32), x[source.clip(0, 31)], x)


ACROSS: dict[str, tuple[str, Callable[[Array], Any]]] = {
    "sum": ("simd_sum(x)", lambda x: x.sum()),
    "max": ("simd_max(x)", lambda x: x.max()),
    "min": ("simd_min(x)", lambda x: x.min()),
    "product": ("simd_product(x)", lambda x: x.prod()),
    "inclusive": ("simd_prefix_inclusive_sum(x)", lambda x: x.cumsum()),
    "exclusive": ("simd_prefix_exclusive_sum(x)", lambda x: x.cumsum() - x),
    "shuffle": ("simd_shuffle(x, ushort((i * 7) % 32))", lambda x: x[LANES * 7 % 32]),
    "xor": ("simd_shuffle_xor(x, 5)", lambda x: x[LANES ^ 5]),
    "down": ("simd_shuffle_down(x, 3)", lambda x: shifted(x, 3)),
    "up": ("simd_shuffle_up(x, 3)", lambda x: shifted(x, -3)),
    "rotate_down": ("simd_shuffle_rotate_down(x, 3)", lambda x: np.roll(x, -3)),
    "rotate_up": ("simd_shuffle_rotate_up(x, 3)", lambda x: np.roll(x, 3)),
    "fill_up": (
        "simd_shuffle_and_fill_up(x, T(2), 4)",
        lambda x: np.where(LANES < 4, 2, np.roll(x, 4)),
    ),
    "fill_down": (
        "simd_shuffle_and_fill_down(x, T(2), 4)",
        lambda x: np.where(LANES > 27, 2, np.roll(x, -4)),
    ),
    "broadcast": ("simd_broadcast(x, 9)", lambda x: x[9]),
    "broadcast_first": ("simd_broadcast_first(x)", lambda x: x[0]),
    "quad_sum": ("quad_sum(x)", lambda x: np.repeat(x.reshape(8, 4).sum(1), 4)),
    "quad_max": ("quad_max(x)", lambda x: np.repeat(x.reshape(8, 4).max(1), 4)),
    "quad_xor": ("quad_shuffle_xor(x, 2)", lambda x: x[LANES ^ 2]),
    "any": ("T(simd_any(x == T(1)))", lambda x: (x == 1).any()),
    "all": ("T(simd_all(x == T(1)))", lambda x: (x == 1).all()),
    "votes": ("T(popcount(uint(ulong(simd_ballot(x == T(1))))))", lambda x: (x == 1).sum()),
}
BITWISE: dict[str, tuple[str, Callable[[Array], Any]]] = {
    "and": ("simd_and(x)", np.bitwise_and.reduce),
    "or": ("simd_or(x)", np.bitwise_or.reduce),
    "bits": ("simd_xor(x)", np.bitwise_xor.reduce),
}
TYPES = {**FLOATS, "int": mx.int32, "uint": mx.uint32, "short": mx.int16, "ushort": mx.uint16}


@pytest.mark.parametrize("name", TYPES)
def test_functions_across_lanes(name: str) -> None:
    dtype = TYPES[name]
    # Values whose sums and products every type holds exactly.
    x = np.random.default_rng(0).integers(1, 3, 32).astype(np.int64)
    x[5:] = np.where(np.arange(5, 32) % 9 == 0, 2, 1)
    cases = ACROSS if name in FLOATS else {**ACROSS, **BITWISE}
    lines = [f"typedef {name} T;", "const uint i = thread_index_in_simdgroup;", "T x = a[i];"]
    lines += [f"o_{key}[i] = {text};" for key, (text, _) in cases.items()]
    got = run(
        "\n".join(lines),
        {"a": mx.array(x).astype(dtype)},
        {f"o_{key}": (32, dtype) for key in cases},
    )
    for key, (_, expected) in cases.items():
        np.testing.assert_array_equal(
            got[f"o_{key}"], np.broadcast_to(expected(x), 32), err_msg=key
        )


@pytest.mark.parametrize("name", FLOATS)
def test_matrices(name: str) -> None:
    """d = a b + c with strides, an origin, a transposed load and a transposed store."""
    rng = np.random.default_rng(0)
    a, b, c = (mx.array(rng.integers(-4, 5, (16, 16))).astype(FLOATS[name]) for _ in range(3))
    got = run(
        f"simdgroup_matrix<{name}, 8, 8> ma, mb; simdgroup_{name}8x8 mc;\n"
        "simdgroup_load(ma, a, 16, ulong2(8, 2));\n"
        "simdgroup_load(mb, b, 16, ulong2(3, 1), true);\n"
        "simdgroup_load(mc, c + 5, 16);\n"
        f"simdgroup_matrix<{name}, 8, 8> one({name}(1.0f));\n"
        "simdgroup_multiply(ma, ma, one);\n"
        "simdgroup_multiply_accumulate(mc, ma, mb, mc);\n"
        "simdgroup_store(mc, d, 8); simdgroup_store(mc, e, 8, ulong2(0, 0), true);\n"
        "const uint i = thread_index_in_simdgroup;\n"
        f"f[i] = mc.thread_elements()[0] + make_filled_simdgroup_matrix<{name}, 8, 8>({name}(1.0f))"
        ".thread_elements()[1];",
        {"a": a, "b": b, "c": c},
        {"d": (64, FLOATS[name]), "e": (64, FLOATS[name]), "f": (32, FLOATS[name])},
    )
    na, nb, nc = (np.array(x.astype(mx.float32)) for x in (a, b, c))
    # The origin is (column, row); of a transposed matrix, in memory as it lies.
    expected = na[2:10, 8:16] @ nb[1:9, 3:11].T + nc[:8, 5:13]
    np.testing.assert_array_equal(got["d"].reshape(8, 8), expected)
    np.testing.assert_array_equal(got["e"].reshape(8, 8).T, expected)
    lanes = np.arange(32)
    row, column = (lanes // 4 & 4) + lanes // 2 % 4, (lanes // 4 & 2) * 2 + lanes % 2 * 2
    np.testing.assert_array_equal(got["f"], expected[row, column] + 1)


@pytest.mark.parametrize("name", ["half", "bfloat"])
def test_rounding_is_that_of_mlx(name: str) -> None:
    """Random bit patterns, with subnormals, infinities and NaN; both ways."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32)
    bits[:6] = [0, 1 << 31, 0x7F800000, 0xFF800000, 0x387FC000, 0x33800000]
    floats = mx.array(bits.view(np.float32))
    got = run(
        f"uint i = thread_position_in_grid.x; {name} x = {name}(a[i]); b[i] = float(x);",
        {"a": floats},
        {"b": (4096, mx.float32)},
        groups=128,
    )
    expected = np.array(floats.astype(FLOATS[name]).astype(mx.float32))
    np.testing.assert_array_equal(got["b"], expected)


def test_atomics() -> None:
    """All threads of several threadgroups on the same elements."""
    got = run(
        "uint i = thread_position_in_grid.x;\n"
        "atomic_fetch_add_explicit(&o[0], int(i), memory_order_relaxed);\n"
        "atomic_fetch_sub_explicit(&o[1], 1, memory_order_relaxed);\n"
        "atomic_fetch_max_explicit(&o[2], int(i * 37 % 101), memory_order_relaxed);\n"
        "atomic_fetch_min_explicit(&o[3], -int(i), memory_order_relaxed);\n"
        "atomic_fetch_or_explicit(&o[4], 1 << (i % 5), memory_order_relaxed);\n"
        "atomic_fetch_xor_explicit(&o[5], int(i), memory_order_relaxed);\n"
        "int old = atomic_load_explicit(&o[6], memory_order_relaxed);\n"
        "while (!atomic_compare_exchange_weak_explicit(&o[6], &old, old + 2,"
        " memory_order_relaxed, memory_order_relaxed)) {}\n"
        "if (i == 3) { atomic_store_explicit(&o[7], 5, memory_order_relaxed);\n"
        "  atomic_exchange_explicit(&o[8], a[0], memory_order_relaxed); }",
        {"a": mx.full((8,), 9, mx.int32)},
        {"o": (9, mx.int32)},
        groups=4,
        init_value=0,
    )
    i = np.arange(128)
    expected = [i.sum(), -128, (i * 37 % 101).max(), -127, 31, np.bitwise_xor.reduce(i), 256, 5, 9]
    np.testing.assert_array_equal(got["o"], expected)


def test_vectors_and_casts() -> None:
    values = mx.arange(1, 33).astype(mx.float16)
    got = run(
        "uint i = thread_position_in_grid.x;\n"
        "if (i == 0) {\n"
        "const half4 h = *reinterpret_cast<const device half4*>(a + 4);\n"
        "float4 v = float4(h); v.xy = v.zw; v.w += 1.0f; v *= 2.0f;\n"
        "for (int k = 0; k < 4; k++) { o[k] = v[k]; }\n"
        "const half2 pair = as_type<half2>(reinterpret_cast<const device uint*>(a)[1]);\n"
        "o[4] = pair.x; o[5] = pair.y;\n"
        "const bfloat2 narrow = bfloat2(float2(1.0f, 3.0f)); o[6] = narrow.x + narrow.y;\n"
        "o[7] = dot(float3(1.0f, 2.0f, 3.0f), float3(float2(4.0f, 5.0f), 6.0f));\n"
        "o[8] = as_type<float>(0x40490fdbu);\n"
        "o[9] = float(sizeof(float3) + sizeof(packed_float3));\n"
        "o[10] = fast::exp2(3.0f) + precise::tanh(0.0f) + clamp(7.0f, 0.0f, 2.0f);\n"
        "const uint4 u = uint4(1u, 2u, 3u, 4u) << 2u; o[11] = float((u & 12u).z);\n"
        "o[12] = select(1.0f, 2.0f, v.x > v.y); o[13] = fma(2.0f, 3.0f, 4.0f);\n"
        "o[14] = float(any(v > float4(15.0f))); o[15] = max(NAN, 1.0f) + min(2.0f, NAN);\n"
        "}",
        {"a": values},
        {"o": (16, mx.float32)},
    )
    expected = [14, 16, 14, 18, 3, 4, 4, 32, np.float32(np.pi), 28, 10, 12, 1, 10, 1, 3]
    np.testing.assert_array_equal(got["o"], expected)


def test_positions() -> None:
    """Attributes in a grid of three dimensions whose last threadgroups are smaller."""
    names = ["thread_position_in_grid", "thread_position_in_threadgroup"]
    names += ["threadgroup_position_in_grid", "threads_per_threadgroup", "threadgroups_per_grid"]
    body = [
        "const uint3 at = thread_position_in_grid;",
        "const uint k = (at.z * 3 + at.y) * 6 + at.x;",
        *(
            f"p{n}[k] = int({name}.x + 10 * {name}.y + 100 * {name}.z);"
            for n, name in enumerate(names)
        ),
        "p5[k] = int(thread_index_in_threadgroup);",
    ]
    made = metal_kernel("probe", ["a"], [f"p{n}" for n in range(6)], "\n".join(body))(
        inputs=[mx.zeros((8,))],
        grid=(6, 3, 2),
        threadgroup=(4, 2, 1),
        output_shapes=[(36,)] * 6,
        output_dtypes=[mx.int32] * 6,
    )
    got = [np.array(array).reshape(2, 3, 6) for array in made]
    z, y, x = np.meshgrid(np.arange(2), np.arange(3), np.arange(6), indexing="ij")

    def packed(x: Array, y: Array, z: Array) -> Array:
        result: Array = x + 10 * y + 100 * z
        return result

    size = np.minimum(4, 6 - x // 4 * 4), np.minimum(2, 3 - y // 2 * 2)
    np.testing.assert_array_equal(got[0], packed(x, y, z))
    np.testing.assert_array_equal(got[1], packed(x % 4, y % 2, 0 * z))
    np.testing.assert_array_equal(got[2], packed(x // 4, y // 2, z))
    np.testing.assert_array_equal(got[3], packed(*size, z * 0 + 1))
    assert (got[4] == 2 + 20 + 200).all()
    np.testing.assert_array_equal(got[5], x % 4 + y % 2 * size[0])
