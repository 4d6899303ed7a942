"""Mistakes of mlx_lm's own, each reproduced on the original, and what the rewritten model does.

docs/upstream.md lists them with file and line. `tests/test_configs.py` has those that show on one
sequence of the original alone; here are the ones that concern batches, and which of two behaviours
of the original a rewritten model follows.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from metal_stand_ins import Float32, kernels, packed_product
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlxrewrite.runtime.batch import logits_of
from mlxrewrite.runtime.cache import PagedCache
from mlxrewrite.runtime.load import original_module, rewritten_module
from mlxrewrite.runtime.verify import verify
from mlxrewrite.runtime.weights import randomise
from uncompiled import without_compile  # noqa: F401 - for all tests here

CONFIGS = Path(__file__).parent / "configs"
PROMPTS = (
    [5, 15, 39, 77, 40, 17, 8, 13, 32, 65, 23, 84, 3, 9, 71],
    [40, 2, 17],
    [61, 62, 63, 64, 8, 9, 10, 11, 3],
)


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return config


def pair(config: dict[str, Any], seed: int = 1) -> tuple[Any, Any]:
    """The original and the rewritten model with the same random weights."""
    made = []
    for module in (original_module(config), rewritten_module(config)):
        mx.random.seed(seed)
        made.append(module.Model(module.ModelArgs.from_dict(json.loads(json.dumps(config)))))
    randomise(made[0], seed)
    made[1].update(made[0].parameters())
    return made[0], made[1]


def finite(logits: mx.array) -> np.ndarray:
    return np.array(mx.where(logits == -float("inf"), 0, logits).astype(mx.float32))


def one_by_one(model: Any) -> np.ndarray:
    """Logits after each prompt, whose last two tokens come singly: the original on its own."""
    rows = []
    for prompt in PROMPTS:
        cache = make_prompt_cache(model)
        for piece in (prompt[:-2], prompt[-2:-1], prompt[-1:]):
            out = logits_of(model(mx.array([piece]), cache=cache))
        rows.append(finite(out[0, -1]))
    return np.stack(rows)


def in_a_batch(model: Any) -> np.ndarray:
    """The same from mlx_lm's own batches: prompts padded on the right, then moved to the left."""
    generate = importlib.import_module("mlx_lm.generate")
    caches = [make_prompt_cache(model) for _ in PROMPTS]
    batch = generate.PromptProcessingBatch(model, list(range(len(PROMPTS))), caches)
    batch.prompt([prompt[:-2] for prompt in PROMPTS])
    for place in (-2, -1):
        ids = mx.array([[prompt[place]] for prompt in PROMPTS])
        out = logits_of(model(ids, cache=batch.prompt_cache))
    return finite(out[:, -1])


def rewritten_batch(model: Any) -> np.ndarray:
    cache = PagedCache(model, 4, num_blocks=32, poison=True, shuffle_seed=0)
    names = [cache.add_sequence() for _ in PROMPTS]
    for low, high in ((None, -2), (-2, -1), (-1, None)):
        out = cache.step(dict(zip(names, (p[low:high] for p in PROMPTS), strict=True)))
        mx.eval(out, cache.arrays())
    return finite(out)


def apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Each row's largest difference, in spreads of the logits."""
    worst: np.ndarray = np.abs(one - other).max(axis=-1) / one.std()
    return worst


# Ragged batches of the original: other logits for every sequence that was padded.
WRONG_IN_BATCHES = [
    "afm7",
    "baichuan_m1",
    "bailing_moe_linear",
    "jamba",
    "longcat_flash_ngram",
    "mamba",
    "nemotron_h",
    "olmo_hybrid",
    "recurrent_gemma",
    "rwkv7",
]


@pytest.mark.parametrize("name", WRONG_IN_BATCHES)
def test_padding_changes_the_originals_logits_in_batches(name):
    original, rewritten = pair(config_of(name))
    alone = one_by_one(original)
    padded = apart(alone, in_a_batch(original))
    assert padded[0] < 1e-3, "the longest prompt is not padded"
    assert padded[1:].min() > 0.01, f"{name} is right in batches now: update docs/upstream.md"
    assert apart(alone, rewritten_batch(rewritten)).max() < 1e-3


FAILS_IN_BATCHES = {
    "gemma2": (ValueError, "broadcast_shapes"),
    "phi3small": (ValueError, "broadcast_shapes"),
    "gpt_bigcode": (ValueError, "Only length-1 arrays"),
    "llama@dynamic_ntk": (ValueError, "Only length-1 arrays"),
    "llama4": (ValueError, "does not yet support batching"),
    "deepseek_v41": (ValueError, "does not yet support batching"),
    "nemotron-nas": (AttributeError, "'NoneType' object has no attribute 'shape'"),
}


@pytest.mark.parametrize("name", FAILS_IN_BATCHES)
def test_the_original_has_no_ragged_batches(name):
    original, rewritten = pair(config_of(name))
    error, text = FAILS_IN_BATCHES[name]
    with pytest.raises(error, match=text):
        in_a_batch(original)
    assert apart(one_by_one(original), rewritten_batch(rewritten)).max() < 1e-3


# ----------------------------------------------------------- one sequence, two behaviours

FOLLOWS = {
    "plamo3": "tokens",  # a window of W keys, as its cache keeps, not W + 1 as its prompts see
    "olmo": "tokens",  # it cannot run prompts at all
    "phi3small": "same",  # its blocks of tokens are not causal, and neither are ours
    "llama@dynamic_ntk": "same",  # keys keep the base of the time when they were written
    "gemma3n": "same",  # with a cache; without one its shared layers use other projections
    "gemma2": "same",
}


@pytest.mark.parametrize("name", FOLLOWS)
def test_which_behaviour_a_rewritten_model_follows(name, monkeypatch):
    import sys
    import types

    monkeypatch.setitem(sys.modules, "hf_olmo", types.ModuleType("hf_olmo"))
    report = verify(CONFIGS / f"{name}.json")
    assert report.passed, report.text()
    assert report.reference == FOLLOWS[name]
    assert bool(report.notes) is (report.reference == "tokens")


def test_phi3small_writes_beside_a_small_vocabulary():
    """phi3small.py bars ids up to 100351 in logits of any width."""
    config = {**config_of("phi3small"), "vocab_size": 1000}
    module = original_module(config)
    model = module.Model(module.ModelArgs.from_dict(config))
    assert int(model._dummy_tokenizer_ids.max().item()) == 100351


def test_phi3small_masks_partial_blocks_wrongly(monkeypatch):
    """Even with a causal mask, the block pattern hangs on the end of a prompt: in one that ends
    inside a block, some rows see no key at all."""
    from mlx_lm.models import phi3small

    def additive(h: mx.array, cache: Any = None, **_: Any) -> mx.array:
        allowed = create_causal_mask(h.shape[1], cache.offset if cache is not None else 0)
        return mx.where(allowed, 0.0, -float("inf"))

    monkeypatch.setattr(phi3small, "create_attention_mask", additive)
    original, _ = pair({**config_of("phi3small"), "blocksparse_vert_stride": 2})
    tokens = [(7 * i) % 95 for i in range(104)]

    def last(pieces: list[int]) -> np.ndarray:
        cache, start = make_prompt_cache(original), 0
        for piece in pieces:
            out = original(mx.array([tokens[start : start + piece]]), cache=cache)
            start += piece
        return finite(out[0, -1])[None]

    assert apart(last([96]), last([64, 32]))[0] < 1e-3
    assert np.isnan(last([104])).any()


@pytest.mark.parametrize("name", ["mistral3@ministral3", "smollm3"])
def test_wrappers_without_make_cache_keep_all_keys(name):
    """Nothing is wrong but memory: windows come from the masks."""
    config = config_of(name)
    original, rewritten = pair(config)
    assert {type(entry) for entry in make_prompt_cache(original)} == {KVCache}
    assert not any(isinstance(entry, RotatingKVCache) for entry in make_prompt_cache(original))
    assert apart(one_by_one(original), rewritten_batch(rewritten)).max() < 1e-3


# ----------------------------------------------------------- Metal only


def test_bitnet_with_a_stand_in_for_its_kernel(monkeypatch):
    """Everything but the packed product runs: attention and caches of the rewritten file agree."""
    from mlx_lm.models.bitlinear_layers import BitLinear

    monkeypatch.setattr(BitLinear, "execute_matmul_kernel", packed_product)
    for name in ("bitnet", "bitnet@tied_bias"):
        report = verify(CONFIGS / f"{name}.json")
        assert report.passed and report.route == "kernel", report.text()


def test_muse_spark_with_stand_ins_for_its_kernels(monkeypatch):
    config = config_of("muse_spark")
    for module in (original_module(config), rewritten_module(config)):
        for name, value in kernels().items():
            monkeypatch.setattr(module, name, value, raising=False)
        monkeypatch.setattr(module, "mx", Float32())
    report = verify(CONFIGS / "muse_spark.json")
    assert report.passed, report.text()
    assert not report.unreached
