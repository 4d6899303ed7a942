"""The example models run as ordinary mlx_lm models: the compiler's inputs are right to begin with.

Each example gets random float32 weights and a tiny configuration. One pass over the whole
sequence is the reference; the same tokens fed in pieces to a cache must give the same logits.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache

EXAMPLES = Path(__file__).parents[1] / "examples" / "models"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))

# These mix tokens in a place where nothing carries the past from one call to the next, so that
# feeding them in pieces cannot give what one pass gives. The compiler must refuse them.
NOT_DIVISIBLE = {"row_mixing"}

# 21 tokens: longer than every window and chunk in the configurations, and no multiple of them.
LENGTH = 21
# Pieces of many tokens, single tokens, and pieces that cross a window or chunk edge.
SPLITS = {
    "prompt_then_tokens": [13, *[1] * 8],
    "chunked_prompt": [3, 5, 1, 4, 8],
    "tokens_only": [1] * LENGTH,
}


def load_example(name: str) -> ModuleType:
    """Import `examples/models/<name>.py` by path: the folder is not a package."""
    key = f"mlxrewrite_example_{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        spec.loader.exec_module(module)
    return sys.modules[key]


def build(name: str, seed: int = 0) -> nn.Module:
    """A model of the example with its tiny configuration and random float32 weights.

    Every weight is moved away from its initial value: sinks, biases and norms that start at zero or
    one would hide a term that is left out.
    """
    module = load_example(name)
    config = json.loads((EXAMPLES / f"{name}.json").read_text())
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(tree_map(lambda w: w + 0.1 * mx.random.normal(w.shape), model.parameters()))
    # Norms are one at the start, so that the sum above keeps them away from zero.
    model.eval()
    mx.eval(model.parameters())
    return model


def tokens(model: Any, length: int = LENGTH, rows: int = 2) -> mx.array:
    """Fixed token ids, int32 `[rows, length]`, with no two rows equal."""
    generator = np.random.default_rng(7)
    return mx.array(generator.integers(0, model.args.vocab_size, (rows, length)).astype(np.int32))


def run_in_pieces(model: Any, ids: mx.array, pieces: list[int]) -> np.ndarray:
    """Logits `[rows, length, vocab]` of `ids` fed in pieces of the given lengths to one cache."""
    cache = make_prompt_cache(model)
    out, start = [], 0
    for piece in pieces:
        out.append(model(ids[:, start : start + piece], cache=cache))
        mx.eval(out[-1])
        start += piece
    assert start == ids.shape[1]
    return np.array(mx.concatenate(out, axis=1))


def test_every_example_has_a_configuration() -> None:
    assert NAMES, f"no example models in {EXAMPLES}"
    assert sorted(path.stem for path in EXAMPLES.glob("*.json")) == NAMES
    for name in NAMES:
        assert json.loads((EXAMPLES / f"{name}.json").read_text())["model_type"] == name


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_finite_float32(name: str) -> None:
    model = build(name)
    assert {w.dtype for _, w in tree_flatten(model.parameters())} == {mx.float32}
    ids = tokens(model)
    logits = model(ids)
    assert logits.dtype == mx.float32
    assert logits.shape == (*ids.shape, model.args.vocab_size)
    assert np.isfinite(np.array(logits)).all()
    # A model whose layers do nothing would pass everything else here.
    assert np.std(np.array(logits), axis=1).max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_later_tokens_do_not_change_earlier_logits(name: str) -> None:
    model = build(name)
    ids = tokens(model)
    changed = mx.concatenate([ids[:, :-1], (ids[:, -1:] + 1) % model.args.vocab_size], axis=1)
    before, after = np.array(model(ids)), np.array(model(changed))
    np.testing.assert_allclose(before[:, :-1], after[:, :-1], rtol=1e-5, atol=1e-5)
    assert np.abs(before[:, -1] - after[:, -1]).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_earlier_tokens_change_later_logits(name: str) -> None:
    """The mixer does mix: the token before the last one reaches the last logits."""
    model = build(name)
    ids = tokens(model)
    second = (ids[:, -2:-1] + 1) % model.args.vocab_size
    changed = mx.concatenate([ids[:, :-2], second, ids[:, -1:]], axis=1)
    assert np.abs(np.array(model(ids) - model(changed))[:, -1]).max() > 1e-3


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_pieces_through_the_cache_give_the_logits_of_one_pass(name: str, split: str) -> None:
    model = build(name)
    ids = tokens(model)
    whole = np.array(model(ids))
    pieces = run_in_pieces(model, ids, SPLITS[split])
    if name in NOT_DIVISIBLE:
        assert np.abs(whole - pieces).max() > 1e-2
    else:
        np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-4)


def test_packed_qkv_sanitize_stacks_separate_projections() -> None:
    model = build("packed_qkv")
    weights = dict(tree_flatten(model.parameters()))
    args: Any = model.args
    head_dim = args.hidden_size // args.num_attention_heads
    edge = args.num_attention_heads * head_dim
    step = args.num_key_value_heads * head_dim
    apart = {}
    for key, value in weights.items():
        if "query_key_value" in key:
            for letter, part in zip("qkv", mx.split(value, [edge, edge + step]), strict=True):
                apart[key.replace("query_key_value", f"{letter}_proj")] = part
        else:
            apart[key] = value
    again = model.sanitize(apart)
    assert again.keys() == weights.keys()
    assert all(mx.array_equal(again[key], weights[key]).item() for key in weights)
    assert model.sanitize(weights).keys() == weights.keys()
