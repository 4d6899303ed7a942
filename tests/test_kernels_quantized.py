"""Kernels over pools of codes against float64, and against mx.quantize to the bit.

They run through the CPU runner, as those in test_kernels.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import kernel_cases as cases
import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import TOLERANCE, Case
from mlxrewrite.kernels import calls, launch, ops, policy
from mlxrewrite.kernels.ops import AttentionSpec, Quantization, Ragged
from mlxrewrite.kernels.quantization import POISON, Packing

BACK_END = os.environ.get("MLXREWRITE_BACKEND", "runner")
SINGLE = {"query_lens": (1, 1, 1), "context_lens": (1, 37, 200)}
MIXED = {"query_lens": (1, 5, 35, 2), "context_lens": (9, 37, 70, 130)}


@pytest.fixture
def kernels() -> Iterator[None]:
    with launch.backend(BACK_END):  # type: ignore[arg-type]
        yield


def check(case: Case, route: ops.Route | None = None) -> None:
    made = cases.make(case)
    out, _ = cases.run(made, route)
    assert out.dtype == cases.DTYPES[case.dtype]
    error = cases.error(out, cases.exact(made))
    assert error < TOLERANCE[case.dtype], (error, case)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "case",
    [
        Case(**SINGLE, bits=8),
        Case(**SINGLE, bits=4, code_group=32, dtype="bfloat16", query_heads=3, kv_heads=1),
        Case(**SINGLE, bits=4, dtype="float16", window=20, sinks=True, softcap=3.0, block_size=8),
        Case(**SINGLE, bits=8, code_group=32, key_dim=96, value_dim=32, dtype="float16"),
        Case(**SINGLE, bits=4, query_heads=8, kv_heads=1, key_dim=256, value_dim=256),
        Case(**MIXED, bits=8, dtype="bfloat16", chunk=24),
        Case(**MIXED, bits=4, window=20, sinks=True, softcap=4.0, block_size=32, kv_heads=1),
        Case(**SINGLE, bits=8, dtype="float32", pool_dtype="bfloat16"),
    ],
    ids=str,
)
def test_attention(case: Case):
    check(case)


@pytest.mark.usefixtures("kernels")
def test_quantised_rows_go_to_decode_or_are_gathered():
    made = cases.make(Case(**MIXED, bits=8))
    layer = ops.attention_spec(made.queries, made.pool)
    goes = policy.assign(made.ragged, layer, band=None, route=None)
    assert goes == policy.Assignment((0, 1, 3), (), (2,))
    goes = policy.assign(made.ragged, layer, band=None, route="kernel")
    assert goes == policy.Assignment((0, 1, 2, 3), (), ())
    for wide in (replace(layer, key_dim=320), replace(layer, query_heads=34)):
        goes = policy.assign(made.ragged, wide, band=None, route=None)
        assert goes == policy.Assignment((), (), (0, 1, 2, 3))
        with pytest.raises(ValueError, match="no kernel reads codes for heads or groups"):
            policy.assign(made.ragged, wide, band=None, route="kernel")


@pytest.mark.usefixtures("kernels")
def test_split_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(policy.LEAST_SPLIT, "decode", 32)
    monkeypatch.setitem(policy.THREADGROUPS, BACK_END, 1000)
    check(Case(**SINGLE, bits=8, sinks=True, query_heads=2, kv_heads=1))
    check(Case(**SINGLE, bits=4, sinks=True, query_heads=16, kv_heads=1, dtype="bfloat16"))


def rows_to_quantise(dtype: str, width: int, heads: int = 3) -> mx.array:
    """Normal ones, constant ones, zeros, tiny and great ones, of one sign and of two."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, heads, width))
    rows[1] = 0
    rows[2] = 2.5
    rows[3] = -1e-3
    rows[4] *= 1e-6
    rows[5] *= 1e4
    rows[6] = np.abs(rows[6])
    rows[7] = -np.abs(rows[7]) - 4
    rows[8, :, ::2] = 0
    rows[9] = np.round(rows[9] * 4) / 4
    return mx.array(rows.astype(np.float32)).astype(cases.DTYPES[dtype])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
def test_codes_are_those_of_mx_quantize(dtype: str, group_size: int, bits: int):
    """To the bit on the CPU: words of codes, scales and biases; and what is read from them."""
    how = Quantization(bits, group_size)
    keys, values = rows_to_quantise(dtype, 128), rows_to_quantise(dtype, 256)
    made = {}
    for layout in ("pages", "heads"):
        pool = ops.new_pool(
            num_blocks=7,
            block_size=8,
            kv_heads=3,
            key_dim=128,
            value_dim=256,
            dtype=keys.dtype,
            layout=layout,
            quantization=how,
        )
        assert (pool.key_dim, pool.value_dim, pool.kv_heads, pool.num_blocks) == (128, 256, 3, 7)
        ragged = Ragged.build([3, 37], [3, 37], [[6], [5, 0, 3, 1, 2]], 8)
        with launch.backend(BACK_END if layout == "pages" else None):
            pool = ops.write_kv(keys, values, pool, ragged)
            words = ops.read_blocks(pool, [6, 5, 0, 3, 1, 2])[:2]
            read = [ops.gather(pool, ragged, i, 0)[:2] for i in range(2)]
        mx.eval(words, read)
        made[layout] = (words, read)
    for column, rows in enumerate((keys, values)):
        packing = Packing(how, 3, rows.shape[-1], rows.dtype)
        want = packing.pack(rows)
        for words, read in made.values():
            got = words[column].flatten(0, 1)
            assert mx.array_equal(mx.concatenate([got[:3], got[8 : 8 + 37]]), want)
            for i, part in enumerate((slice(0, 3), slice(3, 40))):
                assert mx.array_equal(read[i][column][0].swapaxes(0, 1), packing.unpack(want)[part])
        exact = cases.decoded(packing, want)
        steps = np.abs(exact - np.array(rows.astype(mx.float32)))
        _, scales, _ = packing.parts(want)
        largest = np.repeat(np.abs(np.array(scales.astype(mx.float32))), group_size, axis=-1)
        # Half a step; as much again at the far end, since zero has a code; the scale's rounding.
        epsilon = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
        bound = 1.07 + (2**bits - 1) * epsilon
        normal = [0, *range(10, 40)]
        assert (steps[normal] <= largest[normal] * bound).all()


@pytest.mark.parametrize("form", ["in place", "copy"])
@pytest.mark.parametrize("where", [BACK_END, None])
def test_blocks_are_copied_and_moved(
    where: launch.Backend | None, form: str, monkeypatch: pytest.MonkeyPatch
):
    """Copies inside a pool, and words taken out of one pool and put into another."""
    monkeypatch.setenv("MLXREWRITE_WRITES", form)
    words = {"kv_heads": 2, "key_dim": 32, "value_dim": 64, "dtype": mx.float16}
    rows = [mx.random.normal((12, 2, width)).astype(mx.float16) for width in (32, 64)]
    ragged = Ragged.build([3, 9], [3, 9], [[5], [2, 0, 3]], 4)
    with launch.backend(where):
        pool, other = (
            ops.new_pool(num_blocks=n, block_size=4, quantization=Quantization(4, 32), **words)
            for n in (6, 9)
        )
        pool = ops.write_kv(*rows, pool, ragged)
        pool = ops.copy_blocks(pool, [0, 5], [1, 4])
        keys, values, pool = ops.read_blocks(pool, [2, 1, 3])
        other = ops.write_blocks(other, [8, 7, 1], keys, values)
        tables = [(pool, [[5], [2, 0, 3]]), (pool, [[4], [2, 1, 3]]), (other, [[0], [8, 7, 1]])]
        found = []
        for place, table in tables:
            moved = Ragged.build([3, 9], [3, 9], table, 4)
            found.append([*ops.gather(place, moved, 1, 2)[:2], *ops.gather(place, moved, 0, 0)[:2]])
        slots = mx.array(ragged.host_slots[[4, 11, 3]].astype(np.int32))
        taken = ops.take(pool, slots)
    for column in range(2):
        packing = Packing(Quantization(4, 32), 2, rows[column].shape[-1], mx.float16)
        want = packing.unpack(packing.pack(rows[column])).swapaxes(0, 1)
        assert all(mx.array_equal(part[column][0], want[:, 5:]) for part in found)
        assert all(mx.array_equal(part[2 + column][0], want[:, :3]) for part in found[:2])
        assert mx.array_equal(taken[column], want[:, mx.array([4, 11, 3])])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("bits", [4, 8])
def test_what_no_kernel_has_is_gathered(bits: int):
    check(Case(**MIXED, bits=bits, code_group=32, key_dim=320, value_dim=32, block_size=5))


def test_wrong_quantisations_are_refused():
    for words, message in (
        ({"bits": 3}, "bits: expected 4 or 8, got 3"),
        ({"bits": 8, "group_size": 16}, "group_size: expected 32, 64 or 128, got 16"),
    ):
        with pytest.raises(ValueError, match=message):
            Quantization(**words)
    sizes = {"num_blocks": 2, "block_size": 8, "kv_heads": 1, "dtype": mx.float16}
    for dims, message in (
        ((80, 64), "keys: heads of 80 are not groups of 64: no group size divides it"),
        ((64, 96), "values: heads of 96 are not groups of 64: a group size of 32 divides it"),
        ((64, None), "a pool without values is not quantised"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.new_pool(key_dim=dims[0], value_dim=dims[1], quantization=Quantization(8), **sizes)
    plain = ops.new_pool(key_dim=64, value_dim=64, **sizes)
    with pytest.raises(ValueError, match="in pools of codes only"):
        ops.read_blocks(plain, [0])
    pool = ops.new_pool(key_dim=64, value_dim=64, quantization=Quantization(8), **sizes)
    keys, values, pool = ops.read_blocks(pool, [0])
    with pytest.raises(ValueError, match="write_blocks: expected words"):
        ops.write_blocks(pool, [0, 1], keys, values)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_read_as_mx_dequantize_reads_them(bits: int):
    rows = rows_to_quantise("float32", 128)
    packing = Packing(Quantization(bits, 64), 3, 128, rows.dtype)
    words = packing.pack(rows)
    want = mx.dequantize(*packing.parts(words), group_size=64, bits=bits)
    assert mx.array_equal(packing.unpack(words), want)


def test_poison_is_nan_in_every_type():
    for dtype in cases.DTYPES.values():
        packing = Packing(Quantization(4, 32), 1, 32, dtype)
        words = mx.full((1, packing.row_words), POISON, mx.uint32)
        assert mx.all(mx.isnan(packing.unpack(words)))


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_preparing_runs_every_kernel():
    layer = AttentionSpec(32, 64, 2, 1, 8, "float16", "float16", sinks=True, bits=8, code_group=32)
    calls.prepare(layer, False, launch.active())
