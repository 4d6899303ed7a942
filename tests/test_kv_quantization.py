"""Caches of codes under the engine: mlx_lm's quantised caches give the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_checkpoint
from engine_workloads import Outcome, Pairs, QuantisedPairs, run
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from mlxrewrite.cli import main
from mlxrewrite.kernels.ops import Quantization
from mlxrewrite.runtime.batch_generator import PagedBatchGenerator
from mlxrewrite.runtime.cache import PagedCache
from mlxrewrite.runtime.decoding import Decoding
from mlxrewrite.runtime.disk import fingerprint
from mlxrewrite.runtime.engine import Engine, Request
from mlxrewrite.runtime.errors import RuntimeRefusal
from mlxrewrite.runtime.extract import extract
from mlxrewrite.runtime.memory import footprint
from mlxrewrite.runtime.metrics import Metrics
from mlxrewrite.runtime.pools import EntryPool
from mlxrewrite.runtime.verify import _models, _read
from runtime_models.pairs import make_pair

CONFIGS = Path(__file__).parent / "configs"
PROMPT = list(range(40, 75))


def wide(name: str = "plain", seed: int = 3, **args):
    """A pair whose heads are 32 wide."""
    return make_pair(name, seed, width=128, **args)


def codes(bits: int = 8) -> dict[str, int]:
    return {"kv_bits": bits, "kv_group_size": 32}


# ------------------------------------------------------------------ the engine


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("first", "count"), [(0, 20), pytest.param(10_000, 150, marks=pytest.mark.slow)]
)
def test_random_workloads(first: int, count: int, bits: int) -> None:
    """Ragged and mixed batches, shared beginnings, preemptions, aborts, guesses, prompt caches."""
    pairs, total = QuantisedPairs(bits), Outcome()
    for seed in range(first, first + count):
        total += run(seed, pairs)
    assert total.reused > 100 and total.copied > 10 and total.accepted > 10
    assert total.preemptions > 0
    assert total.ties <= total.tokens / 1000


def test_workloads_would_see_another_quantisation() -> None:
    """Keys of 4 bits are not keys of 8, nor those of the original."""

    class Mixed(QuantisedPairs):
        models = ("plain",)

        def make(self, name: str):
            original, rewritten = super().make(name)
            self.options = {"kv_bits": 4, "kv_group_size": 32}
            return original, rewritten

    class Plain(Mixed):
        def make(self, name: str):
            rewritten = super().make(name)[1]
            return wide(seed=1, num_layers=1)[0], rewritten

    for pairs in (Mixed(8), Plain(8)):
        assert isinstance(pairs, Pairs)
        with pytest.raises(AssertionError, match="another token than the original's"):
            for seed in range(20):
                run(seed, pairs)


def test_scales_of_another_block_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy on write that forgets the pairs."""

    def copy(self: EntryPool, sources: list[int], targets: list[int]) -> None:
        keys, values = self.read_words(sources)
        packings = self.pool.packings
        assert packings is not None
        old = self.read_words(targets)
        cut = packings.keys.code_words, packings.values.code_words
        made = [
            mx.concatenate([new[..., :at], before[..., at:]], axis=-1)
            for new, before, at in zip((keys, values), old, cut, strict=True)
        ]
        serial, self.serial = self.serial, -2
        self.write_words(targets, *made, serial=-3)
        self.serial = serial

    monkeypatch.setattr(EntryPool, "copy", copy)
    pairs = QuantisedPairs(8)
    with pytest.raises(AssertionError):
        for seed in range(40):
            run(seed, pairs)


def test_the_options_reach_the_engine_by_every_way_in() -> None:
    """And mlx_lm's original model goes on with the prompt caches that come out."""
    original, rewritten = wide()
    generator = PagedBatchGenerator(rewritten, max_tokens=12, **codes(4))
    generator.insert([PROMPT])
    responses = []
    while found := generator.next_generated():
        responses += found
    generator.close()
    tokens = [response.token for response in responses]
    engine = Engine(rewritten, **codes(4))
    name = engine.add(Request(PROMPT, 12))
    assert engine.run()[name] == tokens
    decoding = Decoding(rewritten, [PROMPT], max_tokens=12, **codes(4))
    assert [event.token for event in decoding] == tokens
    caches = responses[-1].prompt_cache
    assert all(isinstance(entry, QuantizedKVCache) and entry.bits == 4 for entry in caches)
    fresh = [QuantizedKVCache(32, 4) for _ in original.layers]
    logits = original(mx.array([[*PROMPT, *tokens, 7]]), cache=fresh)[0, -1]
    mine = original(mx.array([[7]]), cache=caches)[0, -1]
    assert mx.abs(logits - mine).max() < 1e-4
    plain = original(mx.array([[*PROMPT, *tokens, 7]]))[0, -1]
    assert mx.abs(logits - plain).max() > 1e-2


def test_prompt_caches_go_in() -> None:
    """Codes as they are, plain ones are quantised; others are refused."""
    original, rewritten = wide()
    want = _alone(rewritten, [*PROMPT, 5], 8)
    for fresh in (
        [QuantizedKVCache(32, 8) for _ in original.layers],
        [KVCache() for _ in original.layers],
    ):
        if isinstance(fresh[0], QuantizedKVCache):
            original(mx.array([PROMPT]), cache=fresh)
        else:  # keys and values that were never rounded, but computed from rounded ones
            _fill(original, fresh)
        engine = Engine(rewritten, block_size=4, **codes())
        name = engine.add(Request([5], 8, caches=fresh, before=PROMPT))
        assert engine.run()[name] == want
    for bits, group in ((4, 32), (8, 64)):
        other = [QuantizedKVCache(group, bits) for _ in original.layers]
        original_64 = make_pair("plain", 3, width=256)[0] if group == 64 else original
        original_64(mx.array([PROMPT]), cache=other)
        with pytest.raises(RuntimeRefusal, match="give it the same kv_bits and kv_group_size"):
            Engine(rewritten, **codes()).add(Request([5], 8, caches=other, before=PROMPT))
    fresh = [QuantizedKVCache(32, 8) for _ in original.layers]
    original(mx.array([PROMPT]), cache=fresh)
    with pytest.raises(RuntimeRefusal, match="and the engine has none"):
        Engine(rewritten).add(Request([5], 8, caches=fresh, before=PROMPT))


def _alone(model, prompt, count, bits=8) -> list[int]:
    """One request, one step for the prompt, nothing else."""
    cache = PagedCache(model, 16, num_blocks=8, quantization=Quantization(bits, 32))
    sequence = cache.add_sequence()
    tokens = [int(cache.step({sequence: prompt}).argmax())]
    while len(tokens) < count:
        tokens.append(int(cache.step({sequence: tokens[-1:]}).argmax()))
    return tokens


def _fill(original, caches) -> None:
    """Plain caches of what mlx_lm's quantised ones are made of."""
    from mlx_lm.models import cache as upstream

    class Both(QuantizedKVCache):
        def __init__(self, plain):
            super().__init__(32, 8)
            self.plain = plain

        def update_and_fetch(self, keys, values):
            self.plain.update_and_fetch(keys, values)
            return super().update_and_fetch(keys, values)

    assert upstream.QuantizedKVCache is QuantizedKVCache
    original(mx.array([PROMPT]), cache=[Both(entry) for entry in caches])


def test_blocks_on_disk_come_back_as_they_were(tmp_path: Path) -> None:
    """Codes, not values: nothing is quantised twice. Files of other bits are not found."""
    _, rewritten = wide()

    def engine(**options) -> Engine:
        return Engine(rewritten, block_size=4, num_blocks=13, disk=(tmp_path, 1 << 20), **options)

    first = engine(**codes())
    name = first.add(Request(PROMPT, 6))
    tokens = first.run()[name]
    for other in range(3):  # these need all blocks
        first.add(Request([90 + other] * 40, 6))
        first.run()
    name = first.add(Request(PROMPT, 6))
    assert first.run()[name] == tokens
    assert first.store.stats.from_disk >= 32
    first.close()
    second = engine(**codes())
    name = second.add(Request(PROMPT, 6))
    assert second.run()[name] == tokens
    assert second.store.stats.from_disk == 32
    second.close()
    # Files of another kind are none of its own.
    for options in (codes(4), {}, {**codes(), "dtype": mx.float16}):
        another = engine(**options)
        name = another.add(Request(PROMPT, 6))
        another.run()
        assert another.store.stats.from_disk == 0
        another.close()
    names = {
        fingerprint(rewritten, 4, None, how)
        for how in (None, Quantization(8, 32), Quantization(4, 32), Quantization(8, 64))
    }
    assert len(names) == 4
    # Not even where somebody moves them.
    mine, theirs = (
        tmp_path / fingerprint(rewritten, 4, None, how) for how in (Quantization(8, 32), None)
    )
    moved = 0
    for path in theirs.glob("*.safetensors"):
        if (mine / path.name).exists():
            assert path.stat().st_size > 1.4 * (mine / path.name).stat().st_size
            (mine / path.name).write_bytes(path.read_bytes())
            moved += 1
    assert moved > 4
    last = engine(**codes())
    name = last.add(Request(PROMPT, 6))
    assert last.run()[name] == tokens
    assert last.store.stats.from_disk < 32 and last.disk.stats.broken == 1
    last.close()


def test_tampered_files_are_computed(tmp_path: Path) -> None:
    _, rewritten = wide()

    def run_once() -> tuple[list[int], int, int]:
        engine = Engine(rewritten, block_size=4, num_blocks=13, disk=(tmp_path, 1 << 20), **codes())
        name = engine.add(Request(PROMPT, 6))
        tokens = engine.run()[name]
        found = engine.store.stats.from_disk, engine.disk.stats.broken
        engine.close()
        return (tokens, *found)

    tokens, *_ = run_once()
    for path in tmp_path.rglob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-5] ^= 1  # a code
        path.write_bytes(bytes(data))
    assert run_once() == (tokens, 0, 1)


# ------------------------------------------------------------------ whole models


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3_next", {"head_dim": 32}),  # states beside keys
        ("gemma2", {"head_dim": 32}),  # soft caps
        ("gpt_oss", {"head_dim": 32}),  # sinks, windows
    ],
)
def test_models(name: str, changes: dict[str, int]) -> None:
    """Ragged, in chunks, as alone in one step; and not far from the model itself."""
    rewritten = _model(name, changes)
    prompts = [[5, 9, 2, 7, 7, 1], [3], list(range(40, 75))]
    engine = Engine(rewritten, block_size=4, num_blocks=40, max_rows=9, max_running=4, **codes())
    names = [engine.add(Request(prompt, 6)) for prompt in prompts]
    found = engine.run()
    for request, prompt in zip(names, prompts, strict=True):
        assert found[request] == _alone(rewritten, prompt, 6)
    logits = {}
    for bits in (None, 8, 4):
        how = None if bits is None else Quantization(bits, 32)
        cache = PagedCache(rewritten, 16, num_blocks=8, quantization=how)
        logits[bits] = np.array(cache.step({cache.add_sequence(): prompts[2]}, "all"))
    spread = logits[None].std()
    fine, coarse = (np.abs(logits[bits] - logits[None]).mean() / spread for bits in (8, 4))
    assert 0 < fine < 0.01 and fine < coarse / 4 < 0.1, (fine, coarse)


def _model(name: str, changes: dict[str, int]):
    _, config, _ = _read(CONFIGS / f"{name}.json")
    return _models({**config, **changes}, None, 0, None, None)[1]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("deepseek_v3", {}, "cache entry 0 keeps latents, which are not quantised"),
        ("deepseek_v32", {}, r"cache entry 0\.0 keeps latents"),
        ("llama", {}, "cache entry 0: keys: heads of 16 are not groups of 32"),
        ("mamba", {}, "keeps no keys and values"),
    ],
)
def test_what_is_not_quantised_is_refused_with_its_layer(
    name: str, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(RuntimeRefusal, match=f"kv_bits: .*{message}"):
        Engine(_model(name, changes), **codes())


def test_mixers_that_keep_their_own_keys_are_refused() -> None:
    """Windows that their layer reads once per sequence, and models that run so as a whole."""
    for name in ("hybrid", "hybrid_model"):
        with pytest.raises(RuntimeRefusal, match=r"kv_bits: cache entry .*(once per sequence|own)"):
            Engine(make_pair(name, 3, width=128)[1], **codes())


def test_numbers_that_there_is_nothing_for_are_refused() -> None:
    _, rewritten = wide()
    for options, message in (
        ({"kv_bits": 3}, "kv_bits: expected 4 or 8, got 3"),
        ({"kv_bits": 8, "kv_group_size": 48}, "kv_group_size: expected 32, 64 or 128, got 48"),
        ({"kv_bits": 8}, "heads of 32 are not groups of 64: a group size of 32 divides it"),
    ):
        with pytest.raises(RuntimeRefusal, match=message):
            Engine(rewritten, **options)


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("dtype", [None, mx.float16])
def test_bytes_are_the_true_ones(dtype: mx.Dtype | None) -> None:
    """3 layers, 2 heads of 32, keys and values: a byte or half of one each, and a pair a group."""
    _, rewritten = wide()
    pair = 8 if dtype is None else 4
    for bits, code_bytes in ((8, 32), (4, 16)):
        how = Quantization(bits, 32)
        known = footprint(rewritten, 4, dtype, how)
        assert sum(known.block_bytes.values()) == 4 * 3 * 2 * 2 * (code_bytes + pair)
        engine = Engine(
            rewritten, block_size=4, num_blocks=20, dtype=dtype, kv_bits=bits, kv_group_size=32
        )
        name = engine.add(Request(PROMPT, 4))
        engine.step()
        pools = [leaf.pool.pool for leaf in engine.store.cache.leaves.values()]
        assert sum(pool.nbytes for pool in pools) == 20 * sum(known.block_bytes.values())
        text = Metrics(lambda engine=engine: engine).text().decode()
        assert f"mlxrewrite_kv_bits {float(bits)}" in text
        each = 3 * 2 * 2 * (code_bytes + pair)
        assert f"mlxrewrite_kv_bytes_per_token {float(each)}" in text
        assert f"mlxrewrite_kv_held_bytes {float(9 * 4 * each)}" in text
        engine.abort(name)
    budget = 1 << 20
    sizes = [
        Engine(rewritten, block_size=4, kv_memory=budget, max_running=1, **options).capacity
        for options in ({}, codes(8), codes(4))
    ]
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[1] == pytest.approx(sizes[0] * 128 / 40, rel=0.02)
    assert sizes[2] == pytest.approx(sizes[0] * 128 / 24, rel=0.02)


def test_freed_blocks_are_poisoned() -> None:
    _, rewritten = wide()
    cache = PagedCache(rewritten, 4, num_blocks=4, poison=True, quantization=Quantization(8, 32))
    sequence = cache.add_sequence()
    mx.eval(cache.step({sequence: PROMPT[:8]}))
    assert all(not mx.isnan(entry.keys[1]).any() for entry in extract(cache, sequence))
    blocks = list(cache.tables(sequence)[0].blocks)
    cache.free(sequence)
    pool = cache.leaves[(0,)].pool
    packings = pool.pool.packings
    words, _ = pool.read_words(blocks)
    assert mx.isnan(packings.keys.unpack(words)).all()


def test_the_command_line(tmp_path: Path, capsys) -> None:
    folder = write_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    call = ["generate", "--model", str(folder), "--prompt", "x", "--max-tokens", "3", "--no-chat"]
    for words, code, message in (
        (["--kv-bits", "5"], 2, "kv_bits: expected 4 or 8, got 5"),
        (["--kv-bits", "8"], 2, "kv_bits: cache entry 0: keys: heads of 16 are not groups of 64"),
    ):
        assert main([*call, *words]) == code
        assert message in capsys.readouterr().err
    assert config["head_dim"] == 16
