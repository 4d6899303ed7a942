"""Latent attention: both forms against dense arithmetic, models against their originals, and the
latent pool as a cache that is shared, cut back and copied."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.mla import MultiLinear
from mlxrewrite.kernels import launch, policy
from mlxrewrite.kernels.ops import Ragged
from mlxrewrite.runtime import latents, rankings, sites
from mlxrewrite.runtime.cache import PagedCache
from mlxrewrite.runtime.caches import KVCache, Retention
from mlxrewrite.runtime.errors import OutOfBlocks
from mlxrewrite.runtime.extract import extract, restore
from mlxrewrite.runtime.load import original_module, rewritten_module
from mlxrewrite.runtime.masks import MaskSpec
from mlxrewrite.runtime.memory import footprint
from mlxrewrite.runtime.pools import EntryPool
from mlxrewrite.runtime.verify import verify
from mlxrewrite.runtime.views import Handle, Leaf
from mlxrewrite.runtime.weights import randomise

CONFIGS = Path(__file__).parent / "configs"
RANK, CONTENT, VALUE, HEADS = 24, 16, 12, 4
MODELS = [
    "deepseek_v3",
    "deepseek_v3@dynamic_ntk",
    "deepseek_v3@no_q_lora",
    "glm4_moe_lite",
    "longcat_flash@bias",
    "longcat_flash_ngram",
    "mistral4",
    "mistral3@mistral4",
    "kimi_vl",
    "kimi_k25",
    "kimi_linear",
    "kimi_k3",
    "bailing_hybrid",
    "bailing_moe_v3",
]
QUICK = {"deepseek_v3", "mistral4", "kimi_linear"}


def always(*_, **__) -> bool:
    return True


def never(*_, **__) -> bool:
    return False


def mixed(rows: int, *_, **__) -> bool:
    """Every other length: materialised and absorbed sequences alternate."""
    return rows % 2 == 0


# ------------------------------------------------------------------------- the op


def dense(q, rope, c, k, *, up_keys, up_values, scale, low, end):
    """One row over the positions low..end-1, from the definition: q [H, N], c [S, rank]."""
    keys = np.einsum("hrn,sr->hsn", up_keys, c[low:end])
    scores = np.einsum("hn,hsn->hs", q, keys) + np.einsum("hp,sp->hs", rope, k[low:end])
    scores = scores * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hs,hvr,sr->hv", weights, up_values, c[low:end])


@pytest.mark.parametrize("rule", [always, never, mixed], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("rope_dim", [0, 8])
@pytest.mark.parametrize("window", [None, 5])
def test_both_forms_are_the_definition(monkeypatch, rule, rope_dim, window):
    monkeypatch.setattr(policy, "materialise_latents", rule)
    mx.random.seed(rope_dim)
    up_keys, up_values = MultiLinear(CONTENT, RANK, HEADS), MultiLinear(RANK, VALUE, HEADS)
    lengths = [(3, 3), (4, 9), (1, 7), (6, 6), (2, 5), (5, 11)]  # rows in the last step, positions
    size, chance = 4, np.random.default_rng(7)
    blocks = list(chance.permutation(40))
    tables = [[int(blocks.pop()) for _ in range(-(-end // size))] for _, end in lengths]
    pool = EntryPool(40, size, poison=True)
    stored = [
        (
            chance.standard_normal((end, RANK), np.float32),
            chance.standard_normal((end, rope_dim), np.float32),
        )
        for _, end in lengths
    ]
    before = [(i, end - rows) for i, (rows, end) in enumerate(lengths) if end > rows]
    steps = [
        Ragged.build(
            [n for _, n in before], [n for _, n in before], [tables[i] for i, _ in before], size
        ),
        Ragged.build([r for r, _ in lengths], [e for _, e in lengths], tables, size),
    ]
    news = [
        [(stored[i][0][:n], stored[i][1][:n]) for i, n in before],
        [
            (c[end - rows :], k[end - rows :])
            for (c, k), (rows, end) in zip(stored, lengths, strict=True)
        ],
    ]
    for serial, (step, new) in enumerate(zip(steps, news, strict=True)):
        joined = [mx.array(np.concatenate([part[j] for part in new])) for j in (0, 1)]
        pool.write_latents(*(rows[:, None, None] for rows in joined), step, serial)
    total = steps[1].num_rows
    content = chance.standard_normal((total, HEADS, CONTENT), np.float32)
    rope = chance.standard_normal((total, HEADS, rope_dim), np.float32)
    queries = latents.Queries(
        mx.array(content)[:, :, None], mx.array(rope)[:, :, None], up_keys, up_values
    )
    out = latents.attend(pool, steps[1], queries, scale=0.3, window=window, chunk=None)
    assert out.shape == (total, HEADS, 1, VALUE)
    row = 0
    for (c, k), (rows, end) in zip(stored, lengths, strict=True):
        for position in range(end - rows, end):
            low = 0 if window is None else max(0, position - window + 1)
            expected = dense(
                content[row],
                rope[row],
                c,
                k,
                up_keys=np.array(up_keys.weight),
                up_values=np.array(up_values.weight),
                scale=0.3,
                low=low,
                end=position + 1,
            )
            np.testing.assert_allclose(np.array(out[row, :, 0]), expected, atol=2e-5)
            row += 1


def test_without_projections_the_output_is_a_latent():
    pool = EntryPool(4, 4, poison=True)
    step = Ragged.build([3], [3], [[2]], 4)
    c, k = mx.random.normal((3, 1, 1, 16)), mx.random.normal((3, 1, 1, 8))
    pool.write_latents(c, k, step, 0)
    queries = latents.Queries(mx.random.normal((3, 2, 1, 16)), mx.zeros((3, 2, 1, 8)), None, None)
    out = latents.attend(pool, step, queries, scale=1.0, window=None, chunk=None)
    assert out.shape == (3, 2, 1, 16)
    assert mx.allclose(out[0], mx.broadcast_to(c[0], (2, 1, 16)), atol=1e-6)


def test_few_rows_are_absorbed_and_many_are_not():
    sizes = {"rank": 512, "heads": 128, "content_dim": 128}
    assert not policy.materialise_latents(1, 4096, **sizes)
    assert not policy.materialise_latents(policy.MATERIALISE_ROWS - 1, 15, **sizes)
    assert policy.materialise_latents(2048, 4096, **sizes)
    # A short continuation of a long prompt would project the whole prompt again.
    assert not policy.materialise_latents(32, 8192, **sizes)
    # Keys and values of all heads would take more than they may.
    assert not policy.materialise_latents(4096, 131072, **sizes)


# ------------------------------------------------------------------------- models


def models(rule, chosen=MODELS):
    return [
        pytest.param(
            rule,
            name,
            marks=() if name in QUICK else pytest.mark.slow,
            id=f"{rule.__name__}-{name}",
        )
        for name in chosen
    ]


@pytest.mark.parametrize(("rule", "name"), models(always) + models(never) + models(mixed))
def test_models_agree_in_either_form(monkeypatch, rule, name):
    used = {"_absorbed": 0, "_materialised": 0}
    for form in used:
        plain = getattr(latents, form)

        def counted(*args, plain=plain, form=form, **kwargs):
            used[form] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(latents, form, counted)
    monkeypatch.setattr(policy, "materialise_latents", rule)
    report = verify(CONFIGS / f"{name}.json", seed=3)
    assert report.passed, report.text()
    assert bool(used["_materialised"]) is (rule is not never)
    assert bool(used["_absorbed"]) is (rule is not always)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32"])
def test_a_model_on_the_text_of_the_kernels(monkeypatch, name):
    """The Metal text for latent pools, on the CPU runner, under a whole model: every kernel of the
    route runs (single rows, many rows, writes, gathered pages)."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    config |= {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "num_hidden_layers": 2}
    if name == "deepseek_v32":
        config |= {"index_topk": 20, "index_head_dim": 32}
    used = set()
    plain = launch.MetalKernel.__call__

    def counted(self, *args, **kwargs):
        used.add(self.name)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(launch.MetalKernel, "__call__", counted)
    with launch.backend("runner"):
        report = verify(config, block_size=8)
    assert report.passed, report.text()
    shared = {name.split("_")[0] for name in used if "shared_values" in name}
    assert shared == {"decode", "staged"}
    assert {name.split("_")[0] for name in used} == {"decode", "staged", "write", "gather"}


def test_keys_and_values_of_a_sequence_go_to_the_kernels_for_pages(monkeypatch):
    """Where MLX has no fused attention for them (CUDA, wide heads): made position by position."""
    config = json.loads((CONFIGS / "deepseek_v3.json").read_text())
    config |= {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32}
    config |= {"v_head_dim": 32, "num_hidden_layers": 2}
    served = []

    def serves(layer):
        served.append(layer)
        return True

    monkeypatch.setattr(policy, "serves_arrays", serves)
    monkeypatch.setattr(policy, "materialise_latents", lambda *_, **__: True)
    with launch.backend("runner"):
        report = verify(config, block_size=8)
    assert report.passed, report.text()
    assert served and {(layer.key_dim, layer.value_dim) for layer in served} == {(48, 32)}


def pair(name: str):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    made = []
    for module in (original_module(config), rewritten_module(config)):
        mx.random.seed(0)
        made.append(module.Model(module.ModelArgs.from_dict(json.loads(json.dumps(config)))))
    randomise(made[0], 0)
    made[1].update(made[0].parameters())
    return made


def last_logits(model, tokens: list[int]) -> np.ndarray:
    return np.array(model(mx.array([tokens]))[0, -1])


@pytest.mark.parametrize("name", ["deepseek_v3", "longcat_flash", "mistral4", "deepseek_v32"])
def test_latent_pools_are_shared_cut_back_and_copied(name):
    """`adopt` with a partly shared block, `truncate`, and both sequences going their own ways."""
    original, rewritten = pair(name)
    cache = PagedCache(rewritten, 4, num_blocks=16, poison=True, shuffle_seed=1, rollback=8)
    first, other, mine = list(range(1, 12)), [30, 31, 32], [40, 41]
    a = cache.add_sequence()
    mx.eval(cache.step({a: first}), cache.arrays())
    assert cache.pages_everything
    b = cache.adopt(list(cache.tables(a)), 11)
    pages = {leaf.pool.pool.values for group in cache._groups for leaf in group.leaves}
    assert pages == {None}
    out = cache.step({b: other, a: mine})
    mx.eval(out, cache.arrays())
    both = np.array(out)
    np.testing.assert_allclose(both[0], last_logits(original, first + other), atol=1e-4)
    np.testing.assert_allclose(both[1], last_logits(original, first + mine), atol=1e-4)
    cache.truncate(b, 10)
    again = cache.step({b: [50, 51]})
    mx.eval(again, cache.arrays())
    expected = last_logits(original, [*first[:10], 50, 51])
    np.testing.assert_allclose(np.array(again)[0], expected, atol=1e-4)
    cache.free(a)
    cache.free(b)
    assert all(free == 16 for free in cache.free_blocks.values())
    with pytest.raises(OutOfBlocks):
        cache.step({cache.add_sequence(): list(range(65))})


@pytest.mark.parametrize("name", ["deepseek_v3", "longcat_flash", "deepseek_v32"])
def test_prompt_caches_come_out_of_pages_and_go_back(name):
    original, rewritten = pair(name)
    cache = PagedCache(rewritten, 4, num_blocks=16, poison=True, shuffle_seed=1)
    prompt, rest = list(range(1, 12)), [50, 51]
    sequence = cache.add_sequence()
    mx.eval(cache.step({sequence: prompt}), cache.arrays())
    taken = extract(cache, sequence)
    expected = last_logits(original, prompt + rest)
    again = restore(cache, footprint(rewritten, 4), taken, len(prompt))
    out = cache.step({again: rest})
    mx.eval(out, cache.arrays())
    np.testing.assert_allclose(np.array(out)[0], expected, atol=1e-4)
    theirs = np.array(original(mx.array([rest]), cache=taken)[0, -1])
    np.testing.assert_allclose(theirs, expected, atol=1e-4)


def test_a_latent_entry_is_as_wide_as_latent_and_rope_key():
    _, rewritten = pair("deepseek_v3")
    cache = PagedCache(rewritten, 4, num_blocks=2)
    cache.step({cache.add_sequence(): [1, 2]})
    for group in cache._groups:
        for leaf in group.leaves:
            assert (leaf.pool.rank, leaf.pool.pool.key_dim) == (24, 32)
            assert leaf.pool.pool.kv_heads == 1
            assert leaf.pool.pool.nbytes == 2 * 4 * 32 * 4


# ------------------------------------------------------------------------- ranked positions


@pytest.mark.parametrize(
    ("lengths", "chosen"),
    [
        ([(1, 9), (4, 12), (1, 3), (1, 21), (2, 6)], (True, True, False, True, True)),
        ([(1, 9), (1, 3), (1, 21)], (True, True, True)),
        ([(1, 4), (1, 3), (1, 5)], (False, False, False)),
    ],
)
def test_the_best_positions_are_those_of_each_rows_own_sequence(lengths, chosen):
    """Single rows side by side, several rows of one sequence, and sequences with too few.

    `lengths` are rows in the last step and positions. Single rows alone are all ranked, or none.
    """
    size, count, width, heads = 4, 5, 16, 3
    chance = np.random.default_rng(3)
    blocks = list(chance.permutation(40))
    tables = [[int(blocks.pop()) for _ in range(-(-end // size))] for _, end in lengths]
    stored = [chance.standard_normal((end, width), np.float32) for _, end in lengths]
    pool = EntryPool(40, size, poison=True)
    before = [i for i, (rows, end) in enumerate(lengths) if end > rows]
    steps = [
        ([lengths[i][1] - lengths[i][0] for i in before], before),
        ([rows for rows, _ in lengths], list(range(len(lengths)))),
    ]
    for serial, (counts, members) in enumerate(steps):
        ends = [lengths[i][1] if serial else n for n, i in zip(counts, members, strict=True)]
        step = Ragged.build(counts, ends, [tables[i] for i in members], size)
        new = [stored[i][end - n : end] for i, end, n in zip(members, ends, counts, strict=True)]
        keys = mx.array(np.concatenate(new))[:, None, None]
        pool.write_index(keys, keys, step, serial)
    total = step.num_rows
    queries = chance.standard_normal((total, heads, 1, width), np.float32)
    weights = chance.standard_normal((total, heads, 1, 1), np.float32)
    leaf = Leaf(KVCache(), Retention(), 0, 0, (), pool)
    batch = SimpleNamespace(ragged=(step,))
    best = rankings.paged_top_positions(
        mx.array(queries),
        Handle(leaf, batch, "index"),
        mx.array(weights),
        count,
        mask=MaskSpec(),
    )
    assert best.ranked.chosen == chosen
    if not any(chosen):
        assert best.positions is None
        return
    found, taken = np.array(best.positions), 0
    for i, (rows, end) in enumerate(lengths):
        for row in range(rows) if chosen[i] else ():
            at, position = step.starts[i] + row, end - rows + row
            products = np.einsum("hd,sd->hs", queries[at, :, 0], stored[i][: position + 1])
            scores = (np.maximum(products, 0) * weights[at, :, 0]).sum(0)
            wanted = set(np.argsort(-scores)[:count].tolist())  # all there are, of too few
            mine = {place for place in found[taken].tolist() if place <= position}
            assert wanted == mine, (i, row)
            taken += 1
    assert taken == len(found)


@pytest.mark.parametrize("limit", [1, 1 << 28])
def test_ranked_positions_are_read_in_pieces_that_fit(monkeypatch, limit):
    monkeypatch.setattr(latents, "SELECTED_BYTES", limit)
    report = verify(CONFIGS / "deepseek_v32.json", seed=5)
    assert report.passed and report.route == "kernel", report.text()


def test_later_positions_of_a_piece_are_not_looked_at(monkeypatch):
    """The comparison sees it: a row with fewer positions than wanted gets later ones too."""
    plain = mx.fast.scaled_dot_product_attention

    def careless(queries, keys, values, *, scale, mask=None, **rest):
        if isinstance(mask, mx.array) and mask.dtype == mx.bool_ and mask.ndim == 4:
            mask = mx.ones_like(mask)
        return plain(queries, keys, values, scale=scale, mask=mask, **rest)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", careless)
    assert not verify(CONFIGS / "deepseek_v32.json", seed=5).passed


# ------------------------------------------------------------------------- misuse


def handles(kind: str):
    """What a view returned, by the method that wrote it, in a model's first layer."""
    _, rewritten = pair("deepseek_v3")
    cache = PagedCache(rewritten, 4, num_blocks=2)
    rows = cache._rows({cache.add_sequence(): [1]})
    cache._reserve(rows)
    batch = cache._batch(rows, [[1]], [0])
    view = cache._view(cache.specs[0], batch, 0, ())
    return getattr(view, kind)(mx.zeros((1, 1, 1, 24)), mx.zeros((1, 1, 1, 8)))


def test_latents_and_keys_are_not_taken_for_each_other():
    content, rope, mask = mx.zeros((1, 4, 1, 24)), mx.zeros((1, 4, 1, 8)), MaskSpec()
    one, two = handles("update_and_fetch_latents")
    assert (one.shape[-1], two.shape[-1]) == (24, 8)
    with pytest.raises(TypeError, match="not keys and their values"):
        sites.paged_attention(content, one, two, scale=1.0, mask=mask)
    with pytest.raises(TypeError, match="not latents and their rope keys"):
        latents.paged_latent_attention(content, rope, two, one, scale=1.0, mask=mask)
    keys, values = handles("update_and_fetch")
    with pytest.raises(TypeError, match="not latents and their rope keys"):
        latents.paged_latent_attention(content, rope, keys, values, scale=1.0, mask=mask)
    with pytest.raises(TypeError, match="expected what"):
        latents.paged_latent_attention(content, rope, content, rope, scale=1.0, mask=mask)


@pytest.mark.parametrize("mask", [None, MaskSpec(kind="sequence"), MaskSpec(prefix=3)])
def test_latent_attention_wants_a_mask_it_understands(mask):
    one, two = handles("update_and_fetch_latents")
    content, rope = mx.zeros((1, 4, 1, 24)), mx.zeros((1, 4, 1, 8))
    with pytest.raises(TypeError, match="paged_latent_attention"):
        latents.paged_latent_attention(content, rope, one, two, scale=1.0, mask=mask)


# ------------------------------------------------------------------------- the benchmark


def test_the_benchmark_runs_on_small_sizes(tmp_path):
    script = Path(__file__).parent.parent / "benchmarks" / "mla.py"
    target = tmp_path / "result.json"
    sizes = "--layers 2 --heads 4 --rank 32 --rope 8 --content 16 --dtype float32 --rounds 1"
    cases = "--decode 2x16 --alone 3x20 --prefill 20+8 --copy-bytes 100000 --product 64 --json"
    run = [sys.executable, str(script), *sizes.split(), *cases.split(), str(target)]
    subprocess.run(run, check=True, capture_output=True)
    decode, attention, prefill = json.loads(target.read_text())["results"]
    assert set(decode["us_per_layer"]) == {"mlx_lm", "mlxrewrite"}
    assert attention["us"] > 0
    assert set(prefill["us_per_layer"]) >= {"absorbed", "materialised"}
    assert min(decode["us_per_layer"].values()) > 0 and decode["bound"] in ("bytes", "arithmetic")


def test_the_sweep_finds_from_where_a_form_is_faster(tmp_path):
    script = Path(__file__).parent.parent / "benchmarks" / "mla.py"
    target = tmp_path / "result.json"
    sizes = "--layers 1 --heads 4 --rank 32 --rope 8 --content 16 --dtype float32 --rounds 1"
    cases = "--sweep --rows 2,9 --contexts 0,20 --beside 0,1 --json"
    run = [sys.executable, str(script), *sizes.split(), *cases.split(), str(target)]
    subprocess.run(run, check=True, capture_output=True)
    found = json.loads(target.read_text())
    assert len(found["cases"]) == 8 and found["best_rows"] in (1, 2, 9, 10)
    bench = runpy.run_path(str(script))
    made = [
        {
            "beside": 0,
            "positions": 0,
            "rows": rows,
            "us_per_layer": {"absorbed": 100.0, "materialised": 100.0 / faster},
            "materialised_is_faster": faster,
            "fewer_multiplications": rows > 2,
        }
        for rows, faster in ((2, 1.1), (4, 0.5), (8, 1.25), (16, 2.0))
    ]
    assert bench["crossings"](made) == {"0 positions beside 0": 8}
    assert bench["loss"](made, 8) == pytest.approx(0.025)
    assert bench["loss"](made, 4) == pytest.approx((0.1 + 1) / 4)


def test_ranked_positions_belong_to_their_step():
    content, rope = mx.zeros((1, 4, 1, 24)), mx.zeros((1, 4, 1, 8))
    one, two = handles("update_and_fetch_latents")
    stale = rankings.Selection(rankings.Ranked((False,)), None, Ragged.build([1], [1], [[0]], 4))
    for places in (stale, mx.zeros((1, 1, 1, 4), mx.int32)):
        with pytest.raises(TypeError, match="in this step"):
            latents.paged_latent_attention(
                content, rope, one, two, scale=1.0, mask=MaskSpec(), places=places
            )
    with pytest.raises(TypeError, match="update_and_fetch_index"):
        rankings.paged_top_positions(content, one, rope[..., :1], 4, mask=MaskSpec())
