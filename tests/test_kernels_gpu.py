"""The kernels on a GPU, against float64, and what only a GPU can show: that writes are in place."""

from __future__ import annotations

import itertools
from dataclasses import replace

import gpu
import kernel_cases as cases
import low_rank_cases
import mlx.core as mx
import pytest
import selective_cases
from kernel_cases import TOLERANCE, Case
from mlxrewrite.kernels import calls, launch, low_rank, ops, policy, selective, shift
from mlxrewrite.kernels.ops import Ragged
from mlxrewrite.runtime.cache import PagedCache
from mlxrewrite.runtime.engine import Engine, Request
from runtime_models.pairs import make_pair

pytestmark = gpu.MARKS

SINGLE = {"query_lens": (1,) * 5, "context_lens": (1, 37, 200, 1000, 129)}
MIXED = {"query_lens": (1, 5, 70, 3, 130), "context_lens": (9, 37, 170, 900, 130)}
FEATURES = [
    {},
    {"window": 50},
    {"chunk": 48},
    {"softcap": 5.0},
    {"sinks": True},
    {"window": 20, "sinks": True, "softcap": 3.0},
]
SHAPES = [
    {"key_dim": dim, "value_dim": dim}
    for dim in (32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 320, 512, 576)
]
SHAPES += [{"key_dim": 192, "value_dim": 128}, {"key_dim": 64, "value_dim": 128}]
LATENT = {"key_dim": 576, "value_dim": 512, "kv_heads": 1, "shared_values": True}
GROUPS = [(4, 4), (6, 2), (8, 2), (5, 1), (16, 2), (64, 8), (40, 1)]


@pytest.fixture(autouse=True)
def only_what_is_needed(monkeypatch):
    """Compile the kernels that a test calls, not all that its layer may come to need."""
    monkeypatch.setattr(calls, "prepare", lambda *args: None)


def check(case: Case, route: ops.Route | None = None) -> None:
    made = cases.make(case)
    out, pool = cases.run(made, route)
    if case.bits:
        mx.eval(out)  # a pool is written in place when what comes after it is worked out
        made = cases.as_written(made, pool)
    error = cases.error(out, cases.exact(made))
    assert error < TOLERANCE[case.dtype], (error, case)


@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
@pytest.mark.parametrize("lens", [SINGLE, MIXED], ids=["single", "mixed"])
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_features(features, lens, dtype):
    check(Case(**lens, **features, dtype=dtype, query_heads=8), "kernel")


@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
@pytest.mark.parametrize("shape", [*SHAPES, LATENT], ids=str)
def test_head_dims(shape, dtype):
    check(Case(**SINGLE, **shape, dtype=dtype), "kernel")
    check(Case(**MIXED, **shape, dtype=dtype, seed=1), "kernel")


@pytest.mark.parametrize("heads", GROUPS, ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
def test_groups_and_blocks(heads, block_size):
    many = {"query_heads": heads[0], "kv_heads": heads[1], "block_size": block_size}
    check(Case(**SINGLE, **many, dtype="float16"), "kernel")
    check(Case(**MIXED, **many, dtype="bfloat16", window=40), "kernel")


@pytest.mark.parametrize("pair", list(itertools.permutations(sorted(TOLERANCE), 2)), ids=str)
def test_rows_of_another_type_than_the_pool(pair):
    check(Case(**SINGLE, dtype=pair[0], pool_dtype=pair[1]), "kernel")
    check(Case(**MIXED, dtype=pair[0], pool_dtype=pair[1]), "kernel")


@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
def test_routes_agree(dtype, monkeypatch):
    monkeypatch.setattr(policy, "GATHER_ROWS", 100)
    case = Case(**MIXED, dtype=dtype, query_heads=8)
    check(case)
    for features in FEATURES:
        check(replace(case, **features), "gathered")


CODES = [{"bits": bits, "code_group": group} for bits in (8, 4) for group in (64, 32)]


@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_pools_of_codes(features, codes, dtype):
    """Few rows go to the kernel, many to the gathered route."""
    check(Case(**SINGLE, **features, **codes, dtype=dtype, query_heads=8))
    check(Case(**MIXED, **features, **codes, dtype=dtype, query_heads=8))


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256, 320])
def test_head_dims_of_codes(dim, codes):
    if dim % codes["code_group"] == 0:
        check(Case(**SINGLE, **codes, key_dim=dim, value_dim=dim, dtype="bfloat16"))
        check(Case(**SINGLE, **codes, key_dim=dim, value_dim=128, dtype="float16"))


@pytest.mark.parametrize("heads", GROUPS, ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
def test_groups_and_blocks_of_codes(heads, block_size):
    many = {"query_heads": heads[0], "kv_heads": heads[1], "block_size": block_size}
    check(Case(**SINGLE, **many, bits=8, dtype="bfloat16"))
    check(Case(**SINGLE, **many, bits=4, dtype="float16", window=40))


@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_nearly_those_of_mx_quantize(bits, dtype):
    """A division may round otherwise on a device: then a value near the middle of two codes gets
    the other one."""
    rows = mx.random.normal((40, 3, 128)).astype(cases.DTYPES[dtype])
    pool = ops.new_pool(
        num_blocks=7,
        block_size=8,
        kv_heads=3,
        key_dim=128,
        value_dim=128,
        dtype=rows.dtype,
        quantization=ops.Quantization(bits),
    )
    ragged = Ragged.build([3, 37], [3, 37], [[6], [5, 0, 3, 1, 2]], 8)
    pool = ops.write_kv(rows, rows * 2, pool, ragged)
    assert pool.packings is not None
    for column, factor in ((0, 1), (1, 2)):
        packing = (pool.packings.keys, pool.packings.values)[column]
        with mx.stream(mx.cpu):
            want = packing.unpack(packing.pack(rows * factor)).astype(mx.float32)
        step = float(mx.abs(rows * factor).max().item()) / 2 ** (bits - 1)
        for sequence, part in ((0, slice(0, 3)), (1, slice(3, 40))):
            *found, pool = ops.gather(pool, ragged, sequence, 0)
            got = found[column][0].swapaxes(0, 1).astype(mx.float32)
            off = mx.abs(got - want[part])
            assert off.max() <= 1.1 * step
            assert (off > step / 8).mean() < 1e-3
    blocks = [6, 5, 0, 3, 1, 2]
    keys, values, pool = ops.read_blocks(pool, blocks)
    pool = ops.write_blocks(pool, blocks[::-1], keys, values)
    again = ops.read_blocks(pool, blocks[::-1])
    assert mx.array_equal(again[0], keys) and mx.array_equal(again[1], values)


@pytest.mark.parametrize("bits", [8, 4])
def test_copies_of_blocks_of_codes(bits):
    made = cases.make(Case(**SINGLE, dtype="bfloat16", bits=bits))
    pool = ops.write_kv(made.keys, made.values, made.pool, made.ragged)
    used = [block for table in made.ragged.tables for block in table]
    free = [block for block in range(pool.num_blocks) if block not in used]
    moved = dict(zip(made.ragged.tables[1], free, strict=False))
    pool = ops.copy_blocks(pool, list(moved), list(moved.values()))
    tables = [[moved.get(block, block) for block in table] for table in made.ragged.tables]
    ragged = Ragged.build(made.case.query_lens, made.case.context_lens, tables, 16)
    out, _ = ops.attention(made.queries, pool, ragged, scale=64**-0.5)
    assert cases.error(out, cases.exact(made)) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("bits", [8, 4])
def test_an_engine_over_codes(bits):
    """Tokens of many requests, most in steps that are recorded, against one by one on the CPU."""
    _, model = make_pair("plain", 3, width=128)
    prompts = [[5, 9, 2, 7, 7, 1], [3], list(range(40, 75)), [5, 9, 2, 7, 7, 1, 4, 4]]
    engine = Engine(model, num_blocks=40, kv_bits=bits, kv_group_size=32)
    names = [engine.add(Request(prompt, 20)) for prompt in prompts]
    found = engine.run()
    assert engine.store is not None and engine.store.cache.recorder.replayed > 5
    with mx.stream(mx.cpu):
        for name, prompt in zip(names, prompts, strict=True):
            cache = PagedCache(model, num_blocks=8, quantization=ops.Quantization(bits, 32))
            text = [*prompt, *found[name]]
            logits = cache.step({cache.add_sequence(): text[:-1]}, "all")[len(prompt) - 1 :]
            for row, token in zip(logits, found[name], strict=True):
                assert row[token] >= row.max() - 1e-3


def test_copies_of_blocks():
    made = cases.make(Case(**SINGLE, dtype="bfloat16"))
    pool = ops.write_kv(made.keys, made.values, made.pool, made.ragged)
    used = [block for table in made.ragged.tables for block in table]
    free = [block for block in range(pool.num_blocks) if block not in used]
    moved = dict(zip(made.ragged.tables[1], free, strict=False))
    pool = ops.copy_blocks(pool, list(moved), list(moved.values()))
    tables = [[moved.get(block, block) for block in table] for table in made.ragged.tables]
    ragged = Ragged.build(made.case.query_lens, made.case.context_lens, tables, 16)
    out, _ = ops.attention(made.queries, pool, ragged, scale=64**-0.5)
    assert cases.error(out, cases.exact(made)) < TOLERANCE["bfloat16"]


def decoding(steps: int, *, lazily: bool, bits: int | None = None) -> tuple[float, int]:
    """Decode `steps` steps over a pool of half a gigabyte without waiting for any: the largest
    error against values known in advance, and the memory needed beyond the pool."""
    heads, width, size, blocks = 8, 128, 16, 8192
    pool = ops.new_pool(
        num_blocks=blocks,
        block_size=size,
        kv_heads=heads,
        key_dim=width,
        value_dim=width,
        dtype=mx.bfloat16,
        quantization=None if bits is None else ops.Quantization(bits),
    )
    mx.eval(pool.arrays())
    mx.synchronize()
    mx.reset_peak_memory()
    before, outs = mx.get_active_memory(), []
    queries = mx.zeros((4, heads, width), mx.bfloat16)
    tables = [list(range(i * 100, i * 100 + 100)) for i in range(4)]
    for step in range(steps):
        # Every position holds its step's number, and all weigh alike: the mean is known.
        rows = mx.full((4, heads, width), step, mx.bfloat16)
        ragged = Ragged.build([1] * 4, [step + 1] * 4, tables, size)
        pool = ops.write_kv(rows, rows, pool, ragged)
        out, pool = ops.attention(queries, pool, ragged, scale=1.0)
        outs.append(out[:, 0, 0])
        if not lazily:
            mx.async_eval(outs[-1], *pool.arrays())
    mx.eval(outs)
    mx.synchronize()
    peak = mx.get_peak_memory() - before
    wrong = max(
        abs(float(value) - step / 2) for step, out in enumerate(outs) for value in out.tolist()
    )
    return wrong, peak


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("lazily", [False, True])
def test_writes_are_in_place_and_in_order(lazily, bits):
    # Equal values in a group are kept exactly in any number of bits.
    wrong, peak = decoding(200 if not lazily else 60, lazily=lazily, bits=bits)
    assert wrong <= 0.5  # bfloat16 keeps 8 bits of means up to 100
    assert peak < 64 << 20, f"{peak / 2**20:.0f} MiB beyond the pool: it was copied"


def test_the_copying_form_is_right(monkeypatch):
    monkeypatch.setenv("MLXREWRITE_WRITES", "copy")
    wrong, _ = decoding(20, lazily=False)
    assert wrong <= 0.25


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("banded", [False, True])
def test_preparing(banded, bits, monkeypatch):
    monkeypatch.undo()
    codes = {"bits": bits, "code_group": 64 if bits else 0}
    layer = ops.AttentionSpec(64, 64, 8, 2, 16, "float16", "float16", sinks=True, **codes)
    calls.prepare(layer, banded, launch.active())
    mx.synchronize()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("length", [1, 2, 65, 300])
@pytest.mark.parametrize("width", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", sorted(low_rank_cases.TOLERANCE))
def test_low_rank_states(dtype, width, length, hard):
    """One token by the kernel, more by chunks; decays of 0 among the hard ones."""
    case = low_rank_cases.Case(3, length, 4, width, 64, dtype, hard)
    arrays = case.arrays()
    want, last = low_rank_cases.exact(arrays)
    y, state = low_rank.low_rank_rule(*arrays)
    assert low_rank_cases.error(y, want) < low_rank_cases.TOLERANCE[dtype]
    assert low_rank_cases.error(state, last) < 4e-6


def test_low_rank_states_of_many_sequences():
    arrays = low_rank_cases.Case(64, 1, 32, 64, 64, "bfloat16").arrays()
    want, last = low_rank_cases.exact(arrays)
    y, state = low_rank.low_rank_rule(*arrays)
    assert low_rank_cases.error(y, want) < 6e-3 and low_rank_cases.error(state, last) < 4e-6


def check_selective(case: selective_cases.Case, pieces: int | None = None) -> None:
    arrays = case.arrays()
    want, last = selective_cases.exact(arrays)
    assert selective.supports(case.channels, case.states, arrays[0].dtype, arrays[2].dtype) is None
    y, state = selective.selective_scan(*arrays, pieces=pieces)
    wide = case.weights == "float32"
    tolerance = 4e-6 if wide else selective_cases.TOLERANCE[case.dtype]
    assert selective_cases.error(y, want) < tolerance, case
    assert selective_cases.error(state, last) < 4e-6, case


@pytest.mark.parametrize("weights", ["rows", "float32"])
@pytest.mark.parametrize("length", [1, 2, 65, 700])
@pytest.mark.parametrize("states", [4, 16, 32, 128])
@pytest.mark.parametrize("dtype", sorted(selective_cases.TOLERANCE))
def test_selective_states(dtype, states, length, weights):
    """One token, and prompts in as many pieces as the policy wants."""
    kind = dtype if weights == "rows" else "float32"
    check_selective(selective_cases.Case(3, length, 72, states, dtype, kind))
    check_selective(selective_cases.Case(1, length, 33, states, dtype, kind, False, True))


@pytest.mark.parametrize("pieces", [1, 2, 7, 32])
def test_selective_states_in_pieces(pieces):
    check_selective(selective_cases.Case(2, 500, 130, hard=True), pieces)


def test_selective_states_of_many_sequences():
    check_selective(selective_cases.Case(64, 1, 1536, 16, "bfloat16", "bfloat16"))
    check_selective(selective_cases.Case(61, 1, 1536, 16, "float16", "float16"))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("width", [1, 40, 700, 4096])
def test_token_shift(width, dtype):
    rows, states = mx.random.normal((900, width)).astype(dtype), mx.ones((2, width), dtype)
    origins = shift.Origins.of((3, 5, 1, 891), (True, False, True, False))
    got = shift.shift(rows, states, origins)
    assert mx.array_equal(got, shift._plain(rows, states, origins))
    none = shift.Origins.of((900,), (False,))
    assert mx.array_equal(shift.shift(rows, None, none), shift._plain(rows, None, none))
