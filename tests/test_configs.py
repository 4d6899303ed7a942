"""The tiny configs under mlx_lm itself: every branch runs, and mlx_lm agrees with itself.

The compiled models are compared with mlx_lm on these configs, so a config must first be a fair
reference there: logits that are finite and depend on position and past, and the same logits
whether a prompt is fed whole or in pieces. Where mlx_lm disagrees with itself the reason is in
`DEVIATIONS`, each with a repair: with the cause removed the agreement must come back, so a
mistake in a config cannot hide there. `mx.compile` is off: it changes no result and costs a
C++ compiler run per compiled function and shape class on the CPU backend.
"""

from __future__ import annotations

import ast
import copy
import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import rope_utils
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import BatchKVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import _get_classes
from mlxrewrite.runtime.weights import randomise
from uncompiled import without_compile  # noqa: F401 - for all tests here

CONFIGS = {path.stem: path for path in (Path(__file__).parent / "configs").glob("*.json")}
PROMPT = [5, 15, 39, 77, 40, 17, 8, 13, 32, 65, 23, 84]
# A prompt, a piece of it, then single tokens; and pieces after single tokens.
SPLITS = ([7, 3, 1, 1], [4, 1, 1, 3, 1, 2])
TOLERANCE = 1e-4

METAL_ONLY = {
    "bitnet": "all seven projections of a layer are BitLinear, a Metal kernel "
    "(bitlinear_layers.py:130) without any other route; no config avoids it",
    "muse_spark": "attention and experts run on Metal kernels chosen unconditionally "
    "(muse_spark.py calls kernels/qk_norm_rope.py:83 first); no config avoids them",
}
PARAMETER_LIMIT = 1_000_000
LARGER = {"phi3small": 4_000_000}


@dataclass(frozen=True)
class Deviation:
    """Configs on which mlx_lm's cached runs disagree, why, and what removes the cause."""

    pattern: str
    reason: str
    repair: Callable[[pytest.MonkeyPatch], None]
    raises: str | None = None


def fixed_rope_base(patch: pytest.MonkeyPatch) -> None:
    def call(self: Any, x: mx.array, offset: int = 0) -> mx.array:
        length = 2 * self.max_position_embeddings
        ratio = self.factor * length / self.max_position_embeddings - (self.factor - 1)
        base = self.base * ratio ** (self.dims / (self.dims - 2))
        return mx.fast.rope(
            x, self.dims, traditional=self.traditional, base=base, scale=1.0, offset=offset
        )

    patch.setattr(rope_utils.DynamicNTKScalingRoPE, "__call__", call)


def additive_mask(h: mx.array, cache: Any = None, **_: Any) -> mx.array:
    offset = cache.offset if cache is not None else 0
    allowed = create_causal_mask(h.shape[1], offset)
    return mx.where(allowed, 0.0, -float("inf"))


def additive_olmo_mask(patch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import olmo

    patch.setattr(olmo, "create_attention_mask", additive_mask)


def additive_block_sparse_mask(patch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import phi3small

    patch.setattr(phi3small, "create_attention_mask", additive_mask)


def plamo3_cache_as_wide_as_mask(patch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import plamo3

    patch.setattr(plamo3, "RotatingKVCache", lambda max_size: RotatingKVCache(max_size + 1))


DEVIATIONS = (
    Deviation(
        "*@dynamic_ntk",
        "rope_utils.py:260: the rope base depends on the number of tokens seen so far, and keys "
        "already cached keep the base of their time",
        fixed_rope_base,
    ),
    Deviation(
        "olmo*",
        "olmo.py:93 adds the mask to the scores, but create_attention_mask returns the string "
        "'causal' or booleans: only single tokens run",
        additive_olmo_mask,
        raises="mlx.core.array and str",
    ),
    Deviation(
        "phi3small*",
        "phi3small.py:143 adds a boolean mask to the scores (0 or 1 instead of -inf or 0), so "
        "block-sparse layers see the tokens of the same piece that come later",
        additive_block_sparse_mask,
    ),
    Deviation(
        "plamo3",
        "plamo3.py:233 masks with window_size + 1 keys while plamo3.py:293 caches window_size: "
        "single tokens see one key less than a prompt",
        plamo3_cache_as_wide_as_mask,
    ),
)
# olmo2, olmo3, olmo_hybrid and olmoe share a prefix with olmo and nothing else.
NOT_OLMO = ("olmo2*", "olmo3*", "olmo_hybrid*", "olmoe*")


@dataclass(frozen=True)
class Failure:
    """A config mlx_lm accepts and cannot run: what is changed in a config that runs."""

    config: str
    changes: dict[str, Any]
    error: type[Exception]
    match: str
    reason: str


FAILURES = (
    Failure(
        "baichuan_m1",
        {"tie_word_embeddings": True},
        AttributeError,
        "lm_head",
        "baichuan_m1.py:247 uses lm_head, which :219 builds only for untied embeddings",
    ),
    Failure(
        "longcat_flash",
        {"mla_scale_q_lora": False},
        AttributeError,
        "mla_scale_q_lora",
        "longcat_flash.py:137 reads an attribute :99 sets only when the flag is true; "
        "q_lora_rank = None needs the flag off, so it cannot run either",
    ),
    Failure(
        "longcat_flash",
        {"mla_scale_kv_lora": False},
        AttributeError,
        "mla_scale_kv_lora",
        "longcat_flash.py:147 reads an attribute :101 sets only when the flag is true",
    ),
    Failure(
        "plamo2",
        {"num_hidden_layers": 2, "mamba_step": 4},
        IndexError,
        "out of range",
        "plamo2.py:391 takes the mask from cache[mamba_step // 2], though is_mamba (:371) has a "
        "rule for models with no more layers than that",
    ),
)


def deviation_of(name: str) -> Deviation | None:
    if any(fnmatchcase(name, pattern) for pattern in NOT_OLMO):
        return None
    return next((d for d in DEVIATIONS if fnmatchcase(name, d.pattern)), None)


def module_of(name: str) -> str:
    return name.partition("@")[0]


def read(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(CONFIGS[name].read_text())
    return config


def build(config: dict[str, Any], seed: int = 1) -> Any:
    """Build mlx_lm's own model for a config, with random weights."""
    model_class, arguments_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(arguments_class.from_dict(copy.deepcopy(config)))
    randomise(model, seed)
    return model


def call(model: Any, tokens: list[int], cache: Any) -> mx.array:
    """Logits [len(tokens), vocab], without the columns a model sets to -inf on purpose."""
    output = model(mx.array([tokens]), cache=cache)
    # olmo with tied embeddings returns a pair (olmo.py:143).
    logits = output[0] if isinstance(output, tuple) else output
    return mx.where(logits == -float("inf"), 0.0, logits)[0]


def run(model: Any, pieces: list[int], tokens: list[int] | None = None) -> mx.array:
    """Feed the prompt in pieces of the given lengths to the model's own cache."""
    tokens = PROMPT if tokens is None else tokens
    cache, start, rows = make_prompt_cache(model), 0, []
    for length in pieces:
        rows.append(call(model, tokens[start : start + length], cache))
        start += length
    logits = mx.concatenate(rows)
    mx.eval(logits)
    return logits


def number(value: mx.array) -> float:
    item = value.item()
    assert not isinstance(item, complex)
    return item


def difference(got: mx.array, expected: mx.array) -> float:
    """Largest difference, relative to the largest expected logit; NaN counts as infinite."""
    worst = mx.abs(got - expected).max() / mx.abs(expected).max()
    return number(mx.where(mx.isnan(worst), float("inf"), worst))


@pytest.fixture(scope="module", autouse=True)
def plain_mlx_lm() -> Iterator[None]:
    """A stand-in for the package olmo.py wants to see (and never uses)."""
    stub = ModuleType("hf_olmo")
    stub.__spec__ = importlib.machinery.ModuleSpec("hf_olmo", None)
    added = "hf_olmo" not in sys.modules
    sys.modules.setdefault("hf_olmo", stub)
    yield
    if added:
        del sys.modules["hf_olmo"]


def model_modules() -> set[str]:
    """Names of the mlx_lm model files: those that bind `Model` at top level."""
    package = importlib.util.find_spec("mlx_lm.models")
    assert package is not None and package.submodule_search_locations
    found = set()
    for path in Path(package.submodule_search_locations[0]).glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            imported = isinstance(node, ast.ImportFrom) and any(
                (alias.asname or alias.name) == "Model" for alias in node.names
            )
            if imported or (isinstance(node, ast.ClassDef) and node.name == "Model"):
                found.add(path.stem)
    return found


def test_every_model_file_has_a_config() -> None:
    modules = model_modules()
    assert len(modules) == 126
    assert modules - {module_of(name) for name in CONFIGS} == set()
    assert {module_of(name) for name in CONFIGS} - modules == set()
    assert all(module in CONFIGS for module in modules), "each needs a plain <module>.json"


RUNNABLE = sorted(name for name in CONFIGS if module_of(name) not in METAL_ONLY)


@pytest.mark.parametrize("name", RUNNABLE)
def test_config(name: str) -> None:
    config = read(name)
    assert _get_classes(config)[1].__module__ == f"mlx_lm.models.{module_of(name)}"
    model = build(config)
    size = sum(value.size for _, value in tree_flatten(model.parameters()))
    assert size < LARGER.get(module_of(name), PARAMETER_LIMIT)
    deviation = deviation_of(name)
    with pytest.MonkeyPatch.context() as patch:
        if deviation is not None:
            patch_if_raises(deviation, model, patch)
        whole = run(model, [len(PROMPT)])
        check_informative(model, whole)
        apart = [difference(run(model, split), whole) for split in SPLITS]
        if deviation is None:
            assert max(apart) < TOLERANCE, apart
            return
        if deviation.raises is None:
            assert max(apart) > 10 * TOLERANCE, f"{name} no longer deviates: {deviation.reason}"
            deviation.repair(patch)
        whole = run(model, [len(PROMPT)])
        apart = [difference(run(model, split), whole) for split in SPLITS]
        assert max(apart) < TOLERANCE, f"the cause is not only: {deviation.reason}"


def patch_if_raises(deviation: Deviation, model: Any, patch: pytest.MonkeyPatch) -> None:
    """Where mlx_lm cannot run a prompt at all, the single-token run is its word."""
    if deviation.raises is None:
        return
    with pytest.raises(ValueError, match=deviation.raises):
        run(model, [len(PROMPT)])
    single = run(model, [1] * len(PROMPT))
    deviation.repair(patch)
    assert difference(run(model, [len(PROMPT)]), single) < TOLERANCE


def check_informative(model: Any, logits: mx.array) -> None:
    """Finite logits of a usual size that depend on the position and on the token before."""
    assert mx.isfinite(logits).all().item()
    deviation = number(logits[:, : max(PROMPT)].std())
    assert 0.4 < deviation < 20, deviation
    steps = mx.abs(logits[1:] - logits[:-1]).max(axis=1)
    assert number(steps.min()) > 0.5 * deviation
    changed = [*PROMPT[:-2], PROMPT[-2] + 1, PROMPT[-1]]
    assert difference(run(model, [len(PROMPT)], changed)[-1], logits[-1]) > 0.01


# Layers that share keys and values take them from the cache object, and without one they use
# projections that trained checkpoints do not have (gemma3n.py:131).
NEEDS_CACHE = {"gemma3n": {"num_kv_shared_layers": 0}}


@pytest.mark.parametrize("name", [n for n in RUNNABLE if module_of(n) != "olmo" or "olmo_" in n])
def test_without_cache(name: str) -> None:
    config = read(name)
    model = build(config)
    apart = difference(call(model, PROMPT, None), run(model, [len(PROMPT)]))
    if name in NEEDS_CACHE:
        assert apart > 0.01
        config["text_config"].update(NEEDS_CACHE[name])
        model = build(config)
        apart = difference(call(model, PROMPT, None), run(model, [len(PROMPT)]))
    assert apart < TOLERANCE


@pytest.mark.parametrize("name", sorted(n for n in CONFIGS if module_of(n) in METAL_ONLY))
def test_metal_only(name: str) -> None:
    model = build(read(name))
    if mx.metal.is_available():
        pytest.skip("runs on Metal; this test is about what fails without")
    with pytest.raises(RuntimeError, match="No Metal back-end"):
        run(model, [1])


@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: f"{f.config}-{next(iter(f.changes))}")
def test_upstream_failure(failure: Failure) -> None:
    model = build({**read(failure.config), **failure.changes})
    with pytest.raises(failure.error, match=failure.match):
        run(model, [len(PROMPT)])


def test_grouped_softcap_attention_has_no_batches() -> None:
    """gemma2.py:96 applies 4-D masks to the 5-D scores of grouped queries.

    With as many rows as key-value heads it runs and masks heads instead of rows.
    """
    tokens = mx.array([PROMPT[:6]] * 3)
    for name, works in (("gemma2@mha", True), ("gemma2", False)):
        model = build(read(name))
        cache = [BatchKVCache([0, 1, 2]) for _ in model.layers]
        if works:
            mx.eval(model(tokens, cache=cache))
        else:
            with pytest.raises(ValueError, match="broadcast"):
                mx.eval(model(tokens, cache=cache))


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def test_weights_depend_on_the_seed_and_the_path_only() -> None:
    config = read("qwen3_next")
    first, again, other = (parameters(build(config, seed)) for seed in (3, 3, 4))
    assert all(mx.array_equal(first[path], again[path]).item() for path in first)
    assert not any(mx.array_equal(first[path], other[path]).item() for path in first)
    longer = parameters(build({**config, "num_hidden_layers": 5}, 3))
    drawn = [path for path in first if "layers.1." in path]
    assert drawn
    assert all(mx.array_equal(first[path], longer[path]).item() for path in drawn)


def test_weight_ranges() -> None:
    mamba, recurrent, convolution = (
        parameters(build(read(name))) for name in ("mamba", "recurrent_gemma", "lfm2")
    )
    log_decay = mamba["backbone.layers.0.mixer.A_log"]
    assert number(mx.log(mx.array(0.05))) <= number(log_decay.min()) <= number(log_decay.max()) <= 0
    assert number(recurrent["model.layers.0.temporal_block.rg_lru.recurrent_param"].mean()) < -2.5
    taps = convolution["model.layers.0.conv.conv.weight"]
    assert taps.shape == (64, 3, 1)
    assert abs(number(taps.std()) * 3**0.5 - 1) < 0.2
    assert abs(number(convolution["model.embed_tokens.weight"].std()) - 0.5) < 0.05
    assert all(value.dtype == mx.float32 for value in mamba.values())


def test_zeroed_gains_sinks_and_routers_are_filled() -> None:
    norms = parameters(build(read("cohere@qk_norm")))
    assert number(norms["model.layers.0.self_attn.q_norm.weight"].std()) > 0.7
    sinks = parameters(build(read("gpt_oss")))
    assert number(mx.abs(sinks["model.layers.0.self_attn.sinks"]).min()) > 0
    router = parameters(build(read("deepseek_v3")))
    assert number(mx.abs(router["model.layers.1.mlp.gate.e_score_correction_bias"]).max()) > 0.1


def test_packed_weights_stand_for_a_matrix_of_the_usual_size() -> None:
    layer = nn.QuantizedLinear(128, 64, bias=True, group_size=32, bits=4)
    randomise(layer, 5)
    dense = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=32, bits=4)
    assert abs(number(dense.std()) * 128**0.5 - 1) < 0.1
    assert layer.weight.dtype == mx.uint32


def test_randomise_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="without any"):
        randomise(nn.Identity(), 1)
    with pytest.raises(ValueError, match="32-bit"):
        randomise(nn.Linear(2, 2), -1)
