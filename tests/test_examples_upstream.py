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


def build(name: str, **changes: Any) -> nn.Module:
    """A model of the example with its tiny configuration, changed, and random float32 weights.

    Every weight is moved away from its initial value: sinks, biases and norms that start at zero or
    one would hide a term that is left out.
    """
    module = load_example(name)
    config = json.loads((EXAMPLES / f"{name}.json").read_text()) | changes
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(tree_map(lambda w: w + 0.1 * mx.random.normal(w.shape), model.parameters()))
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


@pytest.mark.parametrize("name", NAMES)
def test_mlx_lm_loads_a_saved_example(name: str, tmp_path: Path) -> None:
    """The example's configuration, `sanitize` and weight names suit mlx_lm's own loader."""
    from mlx_lm.utils import load_model, save_model

    model = build(name)
    save_model(tmp_path, model)
    (tmp_path / "config.json").write_text((EXAMPLES / f"{name}.json").read_text())
    module = load_example(name)
    loaded, _ = load_model(
        tmp_path, get_model_classes=lambda config: (module.Model, module.ModelArgs)
    )
    assert mx.array_equal(loaded(tokens(model)), model(tokens(model))).item()


# Settings that take out what the example is about, and leave the shapes of all weights as they are.
WITHOUT: list[tuple[str, dict[str, Any]]] = [
    ("packed_qkv", {"partial_rotary_factor": 1.0}),
    ("sliding", {"sliding_window": 2 * LENGTH}),
    ("sinks", {"sliding_window": 2 * LENGTH}),
    ("softcap", {"attn_logit_softcapping": 1e6}),
    ("softcap", {"query_pre_attn_scalar": 1.0}),
    ("output_gate", {"partial_rotary_factor": 1.0}),
    ("nope", {"no_rope_layers": [1, 1, 1]}),
    ("wide_values", {"value_scale": 1.0}),
    ("shared_cache", {"sliding_window": 2 * LENGTH}),
    ("chunked", {"attention_chunk_size": 2 * LENGTH}),
    ("chunked", {"attn_scale": 0.0}),
    ("dual_loop", {"loop_window_size": 2 * LENGTH}),
    ("state_space", {"time_step_limit": [0.0, 0.5]}),
]


@pytest.mark.parametrize(("name", "changes"), WITHOUT)
def test_the_structure_shows_in_the_logits(name: str, changes: dict[str, Any]) -> None:
    """The tiny configuration exercises the structure: without it the logits are others."""
    model, without = build(name), build(name, **changes)
    ids = tokens(model)
    assert np.abs(np.array(model(ids) - without(ids))).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_shows_in_the_logits(name: str) -> None:
    """No weight is dead: a compiled model that drops one cannot pass by accident.

    Only the last row is moved, which in a packed projection is the last of the parts.
    """
    model = build(name)
    ids = tokens(model)
    reference = np.array(model(ids))
    dead = []
    for path, weight in tree_flatten(model.parameters()):
        start = weight.shape[0] // 2 if is_table(path) else weight.shape[0] - 1
        # Not by a constant: a layer norm takes that out again.
        step = mx.random.normal(weight[start:].shape)
        moved = mx.concatenate([weight[:start], weight[start:] + step])
        model.load_weights([(path, moved)], strict=False)
        if np.abs(np.array(model(ids)) - reference).max() < 1e-4:
            dead.append(path)
        model.load_weights([(path, weight)], strict=False)
    assert not dead


def is_table(path: str) -> bool:
    """Whether a weight is looked up by token or position, so that its last row may go unread."""
    return any(part in path for part in ("embed_tokens", "embeddings", "embed_in", "wte", "wpe"))


def test_linear_attention_decays() -> None:
    """Against the closed form: token s reaches token t with the decay to the power t - s."""
    generator = np.random.default_rng(5)
    q, k, v = (generator.normal(size=(2, 3, 7, 4)) for _ in range(3))
    decay = np.array([0.9, 0.5, 0.1])[:, None, None]
    distance = np.arange(7)[:, None] - np.arange(7)
    weights = np.where(distance >= 0, decay ** np.maximum(distance, 0), 0)
    expected = (q @ k.swapaxes(-1, -2) * weights) @ v
    arrays = [mx.array(x.astype(np.float32)) for x in (q, k, v, decay)]
    out, _ = load_example("linear_attention").recurrence(*arrays)
    np.testing.assert_allclose(np.array(out), expected, rtol=1e-5, atol=1e-5)


def test_refused_examples_are_the_two_that_say_so() -> None:
    """The other tests and the compiler's own rely on this list."""
    refused = {
        name for name in NAMES if (load_example(name).__doc__ or "").startswith("Must be refused")
    }
    assert refused == {"row_mixing", "reads_cache"}
    assert refused >= NOT_DIVISIBLE


def same_after_sanitize(model: Any, stored: dict[str, mx.array]) -> None:
    """`sanitize` turns the stored weights into the model's, and changes the model's own not."""
    weights = dict(tree_flatten(model.parameters()))
    for given in (stored, dict(weights)):
        clean = model.sanitize(given)
        assert clean.keys() == weights.keys()
        assert all(mx.array_equal(clean[key], weights[key]).item() for key in weights)


@pytest.mark.parametrize(("name", "part"), [("short_conv", "conv.conv"), ("state_space", "conv1d")])
def test_convolution_sanitize_takes_torch_kernels(name: str, part: str) -> None:
    model = build(name)
    weights = dict(tree_flatten(model.parameters()))
    stored = {k: w.swapaxes(1, 2) if f"{part}.weight" in k else w for k, w in weights.items()}
    assert sum(stored[k].shape != weights[k].shape for k in weights) >= 2
    same_after_sanitize(model, stored)


def test_latent_mla_sanitize_splits_the_joint_matrix() -> None:
    model = build("latent_mla")
    stored = dict(tree_flatten(model.parameters()))
    for key in [k for k in stored if "embed_q" in k]:
        to_keys = stored.pop(key).swapaxes(1, 2)
        to_values = stored.pop(key.replace("embed_q", "unembed_out"))
        both = mx.concatenate([to_keys, to_values], axis=1)
        joint = key.replace("embed_q", "kv_b_proj")
        stored[joint] = both.reshape(-1, both.shape[-1])
    same_after_sanitize(model, stored)


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
    same_after_sanitize(model, apart)
