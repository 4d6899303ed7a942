"""Kernels against float64: small shapes, NaN wherever nothing lives.

They run through the CPU runner; MLXREWRITE_BACKEND=metal or cuda runs them on that device instead
(on Metal, not yet tried).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import fields, replace

import kernel_cases as cases
import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import TOLERANCE, Case
from mlxrewrite.kernels import calls, inspect, launch, ops, plans, policy
from mlxrewrite.kernels.ops import AttentionSpec, Ragged
from mlxrewrite.kernels.render import render, template_variables
from mlxrewrite.runtime.cache import PagedCache
from mlxrewrite.runtime.errors import RuntimeRefusal
from runtime_models.pairs import make_pair

SINGLE = {"query_lens": (1, 1, 1), "context_lens": (1, 37, 200)}
MIXED = {"query_lens": (1, 5, 35, 2), "context_lens": (9, 37, 70, 130)}


BACK_END = os.environ.get("MLXREWRITE_BACKEND", "runner")


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


# ------------------------------------------------------------------ specs and text


def test_templates_use_the_fields_of_their_specs_and_nothing_else():
    kinds = inspect.templates()
    assert set(kinds) == {path.name.split(".")[0] for path in _templates()}
    for name, kind in kinds.items():
        assert template_variables(name) == {field.name for field in fields(kind)}, name


def _templates():
    from mlxrewrite.kernels.render import FOLDER

    return list(FOLDER.glob("*.metal.jinja"))


def test_names_spell_their_specs():
    names = inspect.list_specs()
    assert len(names) == len(set(names))
    for name in names:
        assert inspect.parse(name).name == name
    for name in names:
        shown, kernel = inspect.show(name), render(inspect.parse(name))
        assert kernel.source in shown and kernel.header in shown
        assert f"[[kernel]] void custom_kernel_{name}_" in shown
        token = "const constant int32_t* token_in [[buffer(" in shown
        assert token == ("token_in" in kernel.input_names)
    sinks = "decode_f32_f32_kd64_vd64_kh{}_g2_bs16_h2_kg4_t8_v4_sinks"
    assert "const constant float* sinks" in inspect.show(sinks.format(2))
    assert "const device float* sinks" in inspect.show(sinks.format(4))
    for wrong in ("nothing", "reduce", "reduce_bf16", names[0] + "_more"):
        with pytest.raises((KeyError, ValueError)):
            inspect.parse(wrong)


def test_a_kernel_is_rendered_once():
    spec = policy.kernels(inspect.USUAL[0])[0]
    assert render(spec) is render(replace(spec))


@pytest.mark.skipif(launch.active() is not None, reason="of the CPU back end")
def test_no_kernel_runs_on_the_cpu_unasked():
    kernel = render(policy.kernels(inspect.USUAL[0])[0])
    assert launch.active() is None and policy.layout() == "heads"
    with pytest.raises(RuntimeError, match="runner"):
        kernel(
            dict.fromkeys(kernel.input_names, mx.zeros(8)), [((1,), mx.int32)], groups=1, threads=1
        )
    with pytest.raises(ValueError, match="expected inputs"):
        kernel({}, [], groups=1, threads=1)
    with pytest.raises(ValueError, match="expected one of"), launch.backend("cpu"):  # type: ignore[arg-type]
        pass


# ------------------------------------------------------------------ answers


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "case",
    [
        Case(**SINGLE),
        Case(**SINGLE, dtype="bfloat16", query_heads=3, kv_heads=1, key_dim=80, value_dim=48),
        Case(**SINGLE, dtype="float16", window=20, sinks=True, softcap=3.0, block_size=8),
        Case(**SINGLE, dtype="float16", query_heads=8, kv_heads=1, key_dim=32, value_dim=32),
        Case(**MIXED, dtype="bfloat16"),
        Case(**MIXED, window=20, sinks=True, softcap=4.0, block_size=32),
        Case(**MIXED, dtype="float16", chunk=24, query_heads=6, key_dim=32, value_dim=32),
    ],
    ids=str,
)
def test_attention(case: Case):
    check(case)


@pytest.mark.usefixtures("kernels")
def test_attention_with_the_registers_of_another_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(policy.REGISTERS, BACK_END, 235)
    check(Case(**SINGLE, dtype="float16", query_heads=8, kv_heads=1, sinks=True))


@pytest.mark.usefixtures("kernels")
def test_few_keys_in_a_turn():
    case = Case(**SINGLE, query_heads=2, kv_heads=1, key_dim=256, value_dim=256, block_size=8)
    assert (
        policy.decode_spec(ops.AttentionSpec(256, 256, 2, 1, 8, "float16", "float16"), False).tile
        == 4
    )
    check(replace(case, dtype="float16"))


def test_shapes_that_were_measured():
    """What an H100 was measured with stays what it gets: heads of a simdgroup, keys of a turn."""
    wanted = {(4, 128): (4, 16), (8, 128): (8, 8), (2, 256): (2, 8), (4, 64): (4, 32)}
    for (group, dim), shape in wanted.items():
        layer = AttentionSpec(dim, dim, 8 * group, 8, 16, "bfloat16", "bfloat16")
        with launch.backend("cuda"):
            spec = policy.decode_spec(layer, False)
            assert (spec.heads, spec.tile) == shape, (group, dim)
            assert spec.simdgroups == 4
            assert policy.tiled_spec(layer, banded=False, partial=False).parts == max(1, dim // 128)
        assert policy.decode_spec(layer, False).heads == 2


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("case", "rows"),
    [
        (Case(**SINGLE, sinks=True, query_heads=2, kv_heads=1), 1),
        (Case(**MIXED, dtype="bfloat16", query_heads=2, kv_heads=1, window=100), 1),
        (Case(**SINGLE, key_dim=96, value_dim=80, kv_heads=1, shared_values=True), 0),
    ],
    ids=str,
)
def test_split_rows(case: Case, rows: int, monkeypatch: pytest.MonkeyPatch):
    """Rows in several parts, through both kernels (rows: fewest rows of the tiled one)."""
    monkeypatch.setitem(policy.LEAST_SPLIT, "decode", 32)
    monkeypatch.setitem(policy.LEAST_SPLIT, "tiled", 32)
    monkeypatch.setitem(policy.THREADGROUPS, BACK_END, 1000)
    monkeypatch.setattr(policy, "DECODE_ROWS", 2 if rows else 0)
    check(case)


SHAPES = [
    {"row_tiles": 2, "parts": 1, "tile": 16, "stages": 2, "ahead": True},
    {"row_tiles": 2, "parts": 2, "tile": 32, "stages": 2},
    {"row_tiles": 1, "parts": 1, "tile": 16, "stages": 1},
]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steep", [False, True])
def test_tiles_in_threadgroup_memory(shape, steep: bool, monkeypatch: pytest.MonkeyPatch):
    """Each form of the kernel; steep: scores far apart, so that sums are often rescaled."""
    cases.staged_as(monkeypatch, **shape)
    lens = {"query_lens": (5, 35, 2), "context_lens": (37, 70, 130)}
    case = Case(**lens, dtype="float16", query_heads=8, key_dim=32, value_dim=32)
    made = cases.make(replace(case, key_dim=48, window=40, sinks=True) if steep else case)
    if steep:
        made = replace(made, queries=made.queries * 16)
    out, _ = cases.run(made, "kernel")
    assert cases.error(out, cases.exact(made)) < TOLERANCE[case.dtype]
    if not shape.get("ahead"):
        shared = replace(case, shared_values=True, kv_heads=1, query_heads=20)
        check(shared, "kernel")


@pytest.mark.usefixtures("kernels")
def test_negative_scales():
    """Kernels compare scores before they are scaled."""
    made = cases.make(Case(**MIXED, dtype="float16"))
    pool = ops.write_kv(made.keys, made.values, made.pool, made.ragged)
    out, _ = ops.attention(-made.queries, pool, made.ragged, scale=-(64**-0.5), route="kernel")
    assert cases.error(out, cases.exact(made)) < TOLERANCE["float16"]


@pytest.mark.usefixtures("kernels")
def test_three_routes_in_one_call(monkeypatch: pytest.MonkeyPatch):
    """Single rows, a few and many go to a kernel each, and come back in order."""
    monkeypatch.setattr(policy, "GATHER_ROWS", 40)
    lens = {"query_lens": (50, 1, 7, 1, 45), "context_lens": (60, 30, 7, 2, 45)}
    case = Case(**lens, query_heads=4, kv_heads=1)
    made = cases.make(case)
    layer = ops.attention_spec(made.queries, made.pool)
    goes = policy.assign(made.ragged, layer, band=None, route=None)
    assert goes == policy.Assignment((1, 3), (2,), (0, 4))
    check(case)


@pytest.mark.usefixtures("kernels")
def test_what_no_kernel_has_is_gathered():
    case = Case(**MIXED, query_heads=2, kv_heads=2, key_dim=20, value_dim=12, block_size=5)
    check(case)
    check(replace(case, softcap=2.0, sinks=True))
    with pytest.raises(ValueError, match="key head dim 20: kernels exist for multiples of 16"):
        check(case, "kernel")


@pytest.mark.usefixtures("kernels")
def test_a_model_says_which_layers_have_no_kernel():
    """Head dims of 8: the gathered route serves them, and the cache names them."""
    _, model = make_pair("plain")
    for block_size, words in ((16, "key head dim"), (5, "block size 5|key head dim")):
        cache = PagedCache(model, block_size, num_blocks=8)
        assert not cache.gathered_layers
        cache.step({cache.add_sequence(): [1, 2, 3]})
        assert len(cache.gathered_layers) == len(cache.specs)
        for name, reason in cache.gathered_layers.items():
            assert name.startswith("cache entry ") and re.match(words, reason), (name, reason)
    with pytest.raises(RuntimeRefusal, match="expected float32, float16 or bfloat16, got"):
        PagedCache(model, 16, dtype=mx.int8)


def test_reasons():
    layer = AttentionSpec(64, 64, 4, 2, 16, "float32", "float32")
    assert ops.supports(layer) is None
    for change, words in {
        "key_dim": (600, "key head dim 600"),
        "value_dim": (24, "value head dim 24"),
        "dtype": ("float64", "dtype float64"),
        "pool_dtype": ("int8", "over int8"),
        "block_size": (24, "block size 24"),
        "query_heads": (3, "do not divide"),
    }.items():
        assert words[1] in str(ops.supports(replace(layer, **{change: words[0]})))
    shared = replace(layer, shared_values=True, value_dim=80)
    assert "cannot be a part of keys" in str(ops.supports(shared))


@pytest.mark.usefixtures("kernels")
def test_seeded_bugs_are_seen(monkeypatch: pytest.MonkeyPatch):
    """A window one too narrow, a row that sees one key more: the float64 reference tells."""
    case = Case(**SINGLE, window=20)
    plain = plans.first_seen
    with monkeypatch.context() as patch:
        patch.setattr(plans, "first_seen", lambda *args: np.minimum(plain(*args) + 1, args[0]))
        with pytest.raises(AssertionError):
            check(case)
    narrow = Case((4,), (30,), query_heads=8, window=20)
    with monkeypatch.context() as patch:
        patch.setattr(plans, "first_seen", lambda *args: plain(*args) // 2)
        with pytest.raises(AssertionError):
            check(narrow, "kernel")


def test_dropped_blocks_are_not_read():
    ragged = Ragged.build([1], [40], [[3, 1]], 16, [1])
    with pytest.raises(ValueError, match="position 9 of sequence 0"):
        plans.decode_plan(ragged, (0,), window=31, chunk=None, tile=16, split=64)
    with pytest.raises(ValueError, match="position 0 of sequence 0"):
        words = {"group": 1, "row_tiles": 1, "tile": 32, "split": 64}
        plans.tiled_plan(ragged, (0,), window=None, chunk=None, **words)


# ------------------------------------------------------------------ the pool


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("form", ["in place", "copy"])
@pytest.mark.parametrize("values", [True, False])
def test_write_gather_copy(form: str, values: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLXREWRITE_WRITES", form)
    assert policy.writes_in_place() == (form == "in place")
    rng = np.random.default_rng(0)
    pool = ops.new_pool(
        num_blocks=6,
        block_size=4,
        kv_heads=3,
        key_dim=6,
        value_dim=10 if values else None,
        dtype=mx.float16,
    )
    assert pool.layout == "pages"
    ragged = Ragged.build([3, 9], [3, 9], [[5], [2, 0, 3]], 4)
    rows = [mx.array(rng.standard_normal((12, 3, width)).astype(np.float16)) for width in (6, 10)]
    pool = ops.write_kv(rows[0], rows[1] if values else None, pool, ragged)
    pool = ops.copy_blocks(pool, [0, 5], [1, 4])
    moved = Ragged.build([3, 9], [3, 9], [[4], [2, 1, 3]], 4)
    for tables in (ragged, moved):
        for sequence, low, high in ((0, 0, 3), (1, 0, 9), (1, 5, 9)):
            keys, got_values, pool = ops.gather(pool, tables, sequence, low)
            start = 3 * sequence
            for got, want in zip((keys, got_values), rows, strict=True):
                if got is not None:
                    assert mx.array_equal(got[0], want[start + low : start + high].swapaxes(0, 1))
            assert (got_values is not None) == values


@pytest.mark.parametrize("where", [BACK_END, None])
@pytest.mark.parametrize("count", [3, 20])
def test_take(where: launch.Backend | None, count: int):
    """Slots that the device worked out, a few and many, on kernels and in the plain form."""
    with launch.backend(where):
        pool = ops.new_pool(
            num_blocks=4, block_size=8, kv_heads=2, key_dim=6, value_dim=4, dtype=mx.float16
        )
        ragged = Ragged.build([32], [32], [[2, 0, 3, 1]], 8)
        rows = [mx.random.normal((32, 2, width)).astype(mx.float16) for width in (6, 4)]
        pool = ops.write_kv(*rows, pool, ragged)
        positions = np.random.default_rng(count).integers(0, 32, count)
        keys, values, pool = ops.take(pool, mx.array(ragged.host_slots[positions].astype(np.int32)))
        assert mx.array_equal(keys, rows[0][mx.array(positions)].swapaxes(0, 1))
        assert mx.array_equal(values, rows[1][mx.array(positions)].swapaxes(0, 1))


@pytest.mark.usefixtures("kernels")
def test_rows_are_cast_to_the_pool():
    check(Case(**SINGLE, dtype="float32", pool_dtype="bfloat16"))


@pytest.mark.skipif(launch.active() is not None, reason="of the CPU back end")
def test_wrong_calls_are_refused():
    made = cases.make(Case())
    with pytest.raises(ValueError, match="no kernel runs on this back end"):
        cases.run(made, "kernel")
    with pytest.raises(ValueError, match="a target appears twice"):
        ops.copy_blocks(made.pool, [0, 1], [2, 2])
    with pytest.raises(ValueError, match="queries: expected"):
        ops.attention(made.queries[..., :32], made.pool, made.ragged, scale=1.0)


# ------------------------------------------------------------------ serving


def test_nothing_is_built_in_mid_serving(monkeypatch: pytest.MonkeyPatch):
    """A long random run asks for the forms that the first calls prepared, no others, and in the
    end for each of them."""
    asked: set[tuple[object, ...]] = set()
    ran: set[str] = set()
    counts: list[int] = []
    monkeypatch.setattr(launch, "_forms", asked)

    def pretend(kernel, where):
        def call(*, output_shapes, output_dtypes, grid, threadgroup, **_):
            if counts:
                ran.add(kernel.name)
            assert all(g % t == 0 for g, t in zip(grid, threadgroup, strict=True))
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return call

    monkeypatch.setattr(launch.MetalKernel, "_make", pretend)
    layer = AttentionSpec(64, 64, 4, 2, 16, "float16", "float16", sinks=True)
    with launch.backend("cuda"):
        known = {spec.name: render(spec) for spec in policy.kernels(layer)}
    for kernel in known.values():
        monkeypatch.delitem(kernel._made, "cuda", raising=False)
    calls.prepare.cache_clear()
    rng = np.random.default_rng(0)
    sinks = mx.zeros(4, mx.float16)
    with launch.backend("cuda"):
        pool = ops.new_pool(
            num_blocks=4096, block_size=16, kv_heads=2, key_dim=64, value_dim=64, dtype=mx.float16
        )
        for step in range(400):
            sequences = int(rng.choice([1, 2, 3, 9, 40]))
            rows = rng.choice([1, 1, 1, 1, 2, 3, 17, 40, 300], sequences)
            contexts = rows + rng.integers(0, 1500, sequences)
            tables = [list(range(-(-int(c) // 16))) for c in contexts]
            ragged = Ragged.build(rows.tolist(), contexts.tolist(), tables, 16)
            new = mx.zeros((ragged.num_rows, 2, 64), mx.float16)
            queries = mx.zeros((ragged.num_rows, 4, 64), mx.float16)
            pool = ops.write_kv(new, new, pool, ragged)
            window = [None, 200][step % 2]
            _, pool = ops.attention(queries, pool, ragged, scale=1.0, window=window, sinks=sinks)
            pool = ops.copy_blocks(pool, list(range(step % 5)), list(range(100, 100 + step % 5)))
            counts.append(launch.builds())
    for kernel in known.values():
        kernel._made.pop("cuda", None)
    calls.prepare.cache_clear()
    names = [form[1] for form in asked]
    assert len(names) == len(set(names)), "one kernel in two forms"
    assert set(names) == set(known)
    assert counts[1] == counts[-1], "built in mid-serving"
    assert ran == set(known), ("never needed", set(known) - ran)


def test_every_metadata_array_is_bound_alike():
    """At least 8 entries, for one row and for many."""
    for lens in (([1], [1]), ([1] * 20, [50] * 20)):
        tables = [[i] * 4 for i in range(len(lens[0]))]
        ragged = Ragged.build(*lens, tables, 16)
        plan = plans.decode_plan(ragged, (0,), window=None, chunk=None, tile=16, split=16)
        words = {"group": 1, "row_tiles": 1, "tile": 32, "split": 32}
        tiled = plans.tiled_plan(ragged, (0,), window=None, chunk=None, **words)
        for array in (
            ragged.block_tables,
            ragged.slot_mapping,
            plans.row_spans(ragged, None, None),
            plan.items,
            tiled.items,
            ragged.padded_index(0, 0, 1),
            *(p.row_items for p in (plan, tiled) if p.row_items is not None),
        ):
            assert array.size >= launch.CONSTANT_BELOW


# ------------------------------------------------------------------ more shapes, more time


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
@pytest.mark.parametrize(
    "case",
    [
        Case(**SINGLE, key_dim=112, value_dim=112, kv_heads=1, block_size=64),
        Case(**MIXED, key_dim=192, value_dim=128, kv_heads=4),
        Case(**MIXED, key_dim=256, value_dim=256, kv_heads=4, softcap=5.0, window=40),
        Case(**MIXED, key_dim=576, value_dim=512, kv_heads=1, shared_values=True),
        Case(**SINGLE, key_dim=576, value_dim=512, kv_heads=1, query_heads=20, shared_values=True),
        Case(**MIXED, query_heads=16, kv_heads=2, key_dim=128, value_dim=128, sinks=True),
    ],
    ids=str,
)
def test_more_shapes(case: Case, dtype: str):
    check(replace(case, dtype=dtype))


def test_settings_put_scores_in_base_2():
    assert np.allclose(np.array(calls.settings(0.5, 3.0, None)), [0.5 / 3, 3 * np.log2(np.e)])
    assert np.allclose(np.array(calls.settings(0.5, None, None)), [0.5 * np.log2(np.e), 1])


@pytest.mark.usefixtures("kernels")
@pytest.mark.slow
def test_preparing_runs_every_kernel():
    layer = AttentionSpec(32, 48, 2, 1, 8, "float16", "float16", sinks=True)
    for banded in (False, True):
        calls.prepare(layer, banded, launch.active())
