"""Recorded decode steps: the same tokens without the model's Python, or no recording at all."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import engine_workloads
import mlx.core as mx
import pytest
from lazy_kernels import lazy_kernels
from mlx import nn
from mlx_lm.sample_utils import make_sampler
from mlxrewrite.runtime import engine as engine_module
from mlxrewrite.runtime.cache import PagedCache
from mlxrewrite.runtime.engine import Engine, Request
from mlxrewrite.runtime.load import rewritten_module
from mlxrewrite.runtime.recorded import Recorder, filled
from mlxrewrite.runtime.weights import randomise
from runtime_models.pairs import make_pair

PROMPTS = [[random.Random(i).randrange(60) for _ in range(3 + 4 * i)] for i in range(7)]


def generate(model: Any, *, record: bool = True, **options: Any) -> tuple[dict, Engine]:
    engine = Engine(model, block_size=4, num_blocks=120, **options)
    if not record:
        engine._make_store(engine._sizes(1))
        engine.store.cache.recorder.lacking = "not asked for"
    for i, prompt in enumerate(PROMPTS):
        engine.add(Request(prompt, max_tokens=8 + 3 * i))
    return engine.run(), engine


def rewritten(name: str) -> Any:
    config = json.loads((Path(__file__).parent / f"configs/{name}.json").read_text())
    module = rewritten_module(config)
    model = module.Model(module.ModelArgs.from_dict(config))
    randomise(model, 1)
    return model


@pytest.mark.parametrize("name", ["plain", "shared_windows"])
def test_the_same_tokens_as_without(name):
    """Windows, chunks, shared keys, sinks; batches that shrink; splits of the keys."""
    _, model = make_pair(name, 3)
    with lazy_kernels():
        wanted, _ = generate(model, record=False)
        got, engine = generate(model)
    recorder = engine.store.cache.recorder
    assert recorder.lacking is None
    assert recorder.replayed > engine.stats.steps // 2
    assert got == wanted == generate(model)[0]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "qwen3_next"])
def test_rewritten_files_are_recorded(name):
    """Experts, sinks beside windows, states: tokens of the engine, whose steps overlap."""
    model = rewritten(name)
    with lazy_kernels():
        wanted, _ = generate(model, record=False)
        got, engine = generate(model)
    assert engine.store.cache.recorder.replayed
    assert got == wanted


def test_python_of_the_model_does_not_run():
    _, model = make_pair("plain", 3)
    calls = []
    original = type(model).__call__

    def counted(self: Any, *args: Any, **words: Any) -> Any:
        calls.append(1)
        return original(self, *args, **words)

    with lazy_kernels(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "__call__", counted)
        _, engine = generate(model)
    recorder = engine.store.cache.recorder
    footprint = 1  # one more run measures what blocks cost
    # Each recorded shape was traced once; its steps run no Python.
    eager = engine.stats.steps - recorder.replayed
    assert len(calls) == eager + recorder.recorded + footprint * (engine._footprint is not None)


def test_new_weights_count_at_once():
    """Recorded steps have weights as inputs: as they are now, also in another type."""
    _, model = make_pair("plain", 3)
    _, other = make_pair("plain", 4)
    with lazy_kernels():
        cache = PagedCache(model, 4, num_blocks=40)
        sequence = cache.add_sequence()
        cache.step({sequence: [1, 2, 3]})
        for token in range(6):
            cache.step({sequence: [token]})
        assert cache.recorder.replayed
        for change in (other.parameters(), _halved(other)):
            model.update(change)
            before, eager = cache.recorder.replayed, PagedCache(model, 4, num_blocks=40)
            fresh = cache.add_sequence()
            mine = eager.add_sequence()
            cache.step({fresh: [1, 2, 3]})
            eager.step({mine: [1, 2, 3]})
            eager.recorder.lacking = "not asked for"
            for token in range(3):
                got, wanted = cache.step({fresh: [token]}), eager.step({mine: [token]})
                assert mx.allclose(got, wanted, atol=1e-5), (got, wanted)
            assert cache.recorder.replayed >= before + 2
            cache.free(fresh)


def _halved(model: Any) -> Any:
    from mlx.utils import tree_map

    return tree_map(lambda a: (a / 2).astype(mx.float32), model.parameters())


class _Counting(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.seen = 0

    def __call__(self, x: mx.array) -> mx.array:
        self.seen += 1
        return self.inner(x)


class _Remembering(_Counting):
    def __call__(self, x: mx.array) -> mx.array:
        out = self.inner(x)
        self.last = out
        return out


class _Noisy(_Counting):
    def __call__(self, x: mx.array) -> mx.array:
        return self.inner(x) + 0 * mx.random.normal((1,))


class _Looking(_Counting):
    def __call__(self, x: mx.array) -> mx.array:
        return self.inner(x) * (1.0 if x.max().item() < 1e9 else 2.0)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (_Counting, "_Counting changes itself"),
        (_Remembering, "_Remembering changes itself"),
        (_Noisy, "draws random numbers"),
        (_Looking, "eval"),
    ],
)
def test_what_cannot_be_recorded_runs_as_before(kind, says):
    """State in Python, arrays kept from step to step, noise, decisions by value."""
    _, model = make_pair("plain", 3)
    wanted, _ = generate(model)
    layer = model.layers[0]
    name, inner = next((n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear))
    holder = layer
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    setattr(holder, last, kind(inner))
    with lazy_kernels():
        got, engine = generate(model)
    recorder = engine.store.cache.recorder
    assert got == wanted
    assert recorder.replayed == 0
    assert says in recorder.lacking
    for _, value in nn.utils.tree_flatten(model.parameters()):
        mx.eval(value)  # no tracer was left behind


def test_sequences_of_their_own_run_as_before():
    """Mixers that run once per sequence keep what no recorded step can be given."""
    _, model = make_pair("hybrid", 3)
    with lazy_kernels():
        got, engine = generate(model)
    assert engine.store.cache.recorder.replayed == 0
    assert "once per sequence" in engine.store.cache.recorder.lacking
    assert got == generate(model)[0]


KINDS = [
    "deepseek_v3",  # latents
    "deepseek_v32@topk_7",  # ranked positions, of some steps
    "qwen3_next",  # gated delta net, convolution, paged attention
    "mamba2",  # state space dual
    "mamba",  # selective scan
    "rwkv7",  # token shift, on rows
    "bailing_moe_linear",  # lightning attention
    "lfm2",  # short convolution
    "recurrent_gemma",  # RG-LRU beside windows
]
MORE_KINDS = [
    "mistral4",  # latents, with a scale for each position
    "kimi_linear",  # Kimi delta beside latents
    "longcat_flash_ngram",  # the last ids, beside latents
    "baichuan_m1",  # the last keys, beside windows
]


def same_as_unrecorded(model: Any, seed: int, steps: int = 36, most: int = 64) -> Recorder:
    """Two caches, one of them without recorded steps, over one random schedule.

    Sequences join with prompts of any length, one token too, leave, go on together or in parts and
    in any order, and begin with what another has.
    """
    chance = random.Random(seed)
    caches = [PagedCache(model, 4, num_blocks=60, shuffle_seed=seed) for _ in range(2)]
    recorder = caches[0].recorder
    recorder._most = most
    caches[1].recorder.lacking = "not asked for"
    alive: list[int] = []

    def both(tokens: dict[int, list[int]]) -> None:
        got, wanted = (cache.step(tokens) for cache in caches)
        mx.eval(got, wanted, *(cache.arrays() for cache in caches))
        assert mx.allclose(got, wanted, atol=1e-4), mx.abs(got - wanted).max()
        assert mx.array_equal(mx.argmax(got, axis=-1), mx.argmax(wanted, axis=-1))

    while steps > 0:
        event = chance.random()
        if len(alive) < 2 or (event < 0.3 and len(alive) < 5):
            new = [cache.add_sequence() for cache in caches]
            assert new[0] == new[1]
            prompt = [chance.randrange(60) for _ in range(chance.choice([1, 2, 5, 9]))]
            together = {name: [chance.randrange(60)] for name in alive[: chance.randint(0, 2)]}
            both({new[0]: prompt} | together)
            alive.append(new[0])
        elif event < 0.4:
            gone = alive.pop(chance.randrange(len(alive)))
            for cache in caches:
                cache.free(gone)
        elif event < 0.5 and caches[0].snapshots_suffice:
            old, new = chance.choice(alive), []
            for cache in caches:
                length = cache.length(old)
                new.append(cache.adopt(cache.tables(old), length, cache.snapshot(old)))
            assert new[0] == new[1]
            alive.append(new[0])
        chosen = chance.sample(alive, chance.randint(1, len(alive)))
        for _ in range(chance.randint(2, 5)):
            both({name: [chance.randrange(60)] for name in chosen})
            steps -= 1
        for name in [name for name in alive if caches[0].length(name) > 40]:
            alive.remove(name)
            for cache in caches:
                cache.free(name)
    assert not caches[1].recorder.replayed
    return recorder


@pytest.mark.parametrize("name", KINDS)
def test_latents_and_states_are_recorded(name):
    """One model of each kind of mixer, over a random schedule."""
    with lazy_kernels():
        recorder = same_as_unrecorded(rewritten(name), 1)
    assert recorder.lacking is None
    assert recorder.replayed >= 6
    assert recorder.recorded


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KINDS, *MORE_KINDS])
def test_latents_and_states_over_longer_schedules(name):
    with lazy_kernels():
        recorder = same_as_unrecorded(rewritten(name), 2, steps=120, most=12)
    assert recorder.lacking is None
    assert recorder.replayed > 30
    assert len(recorder._shapes) <= 12


def test_shapes_of_states_are_bounded():
    with lazy_kernels():
        recorder = same_as_unrecorded(rewritten("lfm2"), 4, steps=60, most=3)
    assert len(recorder._shapes) == 3
    assert recorder.replayed


@pytest.mark.parametrize(
    ("name", "part"), [("rwkv7", "states"), ("qwen3_next", "states"), ("deepseek_v3", "tables")]
)
def test_what_is_stale_shows(monkeypatch, name, part):
    """Recorded steps that go on with the states or block tables of the first one are seen."""
    make = Recorder._recording

    def recording(self: Recorder, *given: Any) -> Any:
        run, first = make(self, *given), []

        def stale(step: Any, blocks: Any, stores: Any, tokens: Any, states: Any) -> Any:
            first.append((states, [arrays[1] for arrays in blocks]))
            if part == "states":
                states = first[0][0]
            else:
                blocks = [
                    [slots, tables, *rest]
                    for (slots, _, *rest), tables in zip(blocks, first[0][1], strict=True)
                ]
            return run(step, blocks, stores, tokens, states)

        return stale

    monkeypatch.setattr(Recorder, "_recording", recording)
    with lazy_kernels(), pytest.raises(AssertionError):
        same_as_unrecorded(rewritten(name), 1)


@pytest.mark.parametrize("lengths", [(3, 20, 3), (20, 3, 20)])
def test_what_is_asked_may_change(lengths):
    """Ranked positions: whether there are any decides what is asked of a step."""
    model = rewritten("deepseek_v32@topk_7")
    with lazy_kernels():
        cache = PagedCache(model, 4, num_blocks=60)
        for length in lengths:
            name = cache.add_sequence()
            cache.step({name: [1] * length})
            before = cache.recorder.replayed
            for token in range(4):
                cache.step({name: [token]})
            cache.free(name)
            assert cache.recorder.lacking is None
        assert cache.recorder.recorded <= 3  # one more, if a later question split a shape
        assert cache.recorder.replayed >= before + 3


def test_sequences_that_hold_different_things_run_as_before():
    """A sequence that begins with one token, among others that have states."""
    model = rewritten("mamba2")
    with lazy_kernels():
        cache = PagedCache(model, 4, num_blocks=60)
        old, new = cache.add_sequence(), cache.add_sequence()
        cache.step({old: [1, 2, 3]})
        for token in range(4):
            cache.step({old: [token]})
        assert cache.recorder.replayed == 2
        cache.step({old: [4], new: [5]})
        assert cache.recorder.replayed == 2
        for token in range(3):
            cache.step({old: [token], new: [token]})
        assert cache.recorder.replayed == 4


def test_a_model_that_is_no_module_runs_as_before():
    """Its weights would become constants."""
    _, model = make_pair("plain", 3)

    class Wrapper:
        layers = model.layers

        def __call__(self, *args: Any, **words: Any) -> Any:
            return model(*args, **words)

    with lazy_kernels():
        got, engine = generate(Wrapper())
    assert engine.store.cache.recorder.replayed == 0
    assert "no module" in engine.store.cache.recorder.lacking
    assert got == generate(model)[0]


def test_rows_are_not_wanted_of_all():
    """Logits come in the order of the sequences, of those that are wanted."""
    _, model = make_pair("plain", 3)
    found = []
    with lazy_kernels():
        for record in (True, False):
            cache = PagedCache(model, 4, num_blocks=60)
            names = [cache.add_sequence() for _ in range(11)]
            cache.step({name: [name, name + 1, 5] for name in names})
            for token in range(4):
                if not record:
                    cache.recorder.lacking = "not asked for"
                cache.step({name: [token] for name in names})
            some = {name: [0] for name in names[::3]}
            found.append(cache.step({name: [name] for name in names}, some))
            found.append(cache.step({name: [name] for name in names}, {}))
            found.append(cache.step({name: [name] for name in names}))
            assert bool(cache.recorder.replayed) == record
    for got, wanted, count in zip(found[:3], found[3:], (4, 0, 11), strict=True):
        assert got.shape == wanted.shape == (count, 97)
        assert count == 0 or mx.allclose(got, wanted, atol=1e-5)


def test_shapes_are_bounded():
    _, model = make_pair("plain", 3)
    with lazy_kernels():
        cache = PagedCache(model, 4, num_blocks=200)
        cache.recorder._most = 3
        names = [cache.add_sequence() for _ in range(12)]
        cache.step({name: [1, 2] for name in names})
        for count in (1, 2, 3, 4, 5, 6, 12):
            for token in range(3):
                cache.step({name: [token] for name in names[:count]})
        assert len(cache.recorder._shapes) == 3
        assert cache.recorder.recorded == 3


def test_sizes_of_batches():
    sizes = [filled(rows) for rows in range(1, 257)]
    assert all(rows <= size <= rows * 1.25 for rows, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 40


def test_draws_go_on():
    """Samplers draw outside of what is recorded."""
    _, model = make_pair("plain", 3)
    results = []
    with lazy_kernels():
        for record in (True, False):
            mx.random.seed(5)
            engine = Engine(model, block_size=4, num_blocks=100)
            engine._make_store(engine._sizes(1))
            if not record:
                engine.store.cache.recorder.lacking = "not asked for"
            engine.add(Request([1, 2, 3], max_tokens=20, sampler=make_sampler(1.0)))
            results.append(engine.run())
    assert results[0] == results[1]
    assert len(set(next(iter(results[0].values())))) > 3


def test_random_workloads():
    """What the engine must do holds with recorded steps and steps that overlap."""
    pairs = engine_workloads.Pairs()
    with lazy_kernels():
        for seed in range(900, 906):
            engine_workloads.run(seed, pairs)


def test_two_large_steps_are_not_under_way_at_once():
    """Chunks of prompts wait for each other; steps of single rows do not."""
    _, model = make_pair("plain", 3)
    log: list[str] = []
    with lazy_kernels(), pytest.MonkeyPatch.context() as patch:
        launch, land = mx.async_eval, Engine._land
        patch.setattr(engine_module, "LARGE_STEP", 8)
        patch.setattr(mx, "async_eval", lambda *a: (log.append("launch"), launch(*a)))
        patch.setattr(Engine, "_land", lambda *a: (log.append("land"), land(*a))[1])
        engine = Engine(model, block_size=4, num_blocks=60, max_rows=16)
        prompt = [random.Random(5).randrange(97) for _ in range(64)]
        name = engine.add(Request(prompt, max_tokens=8))
        found = engine.run()[name]
    # Four chunks, each launched when the one before has ended, and then single rows.
    assert log[:9] == ["launch", "land"] * 3 + ["launch", "launch", "land"]
    assert log[9:11] == ["launch", "land"]
    plain = Engine(model, block_size=4, num_blocks=60)
    name = plain.add(Request(prompt, max_tokens=8))
    assert plain.run()[name] == found
