"""Functions known by their text: they are what is installed, and compute what is said of them."""

from __future__ import annotations

import metal_stand_ins
import mlx.core as mx
import numpy as np
import pytest
from mlx_vlm.models import linear, rope_utils, switch_layers
from mlxrewrite.axes.meanings import MEANINGS, TOKENWISE, digest
from mlxrewrite.axes.world import text_of
from mlxrewrite.pipeline import Compiler
from mlxrewrite.sources import locate

LAYERS = "mlx_vlm.models.fast_ops."
ROPES = "mlx_vlm.models.rope_utils."
KERNELS = "mlx_vlm.kernels."


def meaning(name):
    """The meaning of a function, as a function."""
    names = {"mx": mx}
    exec(MEANINGS[name].text, names)
    return names["meaning"]


def random(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def close(one, two, tolerance=1e-5):
    one, two = (np.array(x.astype(mx.float32)) for x in (one, two))
    return np.abs(one - two).max() < tolerance


def mx_norm(width):
    from mlx import nn

    norm = nn.RMSNorm(width, eps=1e-5)
    norm.weight = random(width, seed=11)
    return norm


def fused_calls():
    """Arguments for each of muse_spark's kernels."""
    sizes = {"n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "eps": 1e-5, "query_scale": 0.5}
    rows, gate = random(3, 1, 48), random(3, 1, 16, seed=1)
    norm = mx_norm(16)
    return {
        "qk_norm.qk_norm": ((rows,), sizes),
        "qk_norm_rope.qk_norm_rope": (
            (rows,), sizes | {"rope_base": 1e4, "offset": mx.array([0, 3, 7])}
        ),
        "rms_norm_sigmoid_gate.rms_norm_sigmoid_gate": (
            (random(3, 2, 1, 8, seed=2), gate), {"eps": 1e-5}
        ),
        "norm_add_norm.norm_add_norm": (
            (gate, random(3, 1, 16, seed=3)),
            {"alpha": mx.ones(16), "beta": random(16), "post_weight": random(16, seed=4),
             "post_eps": 1e-5, "next_norm": norm},
        ),
        "norm_add_norm.pre_norm": ((gate, norm), {"dtype": mx.float32}),
        "expert_routing.expert_routing": (
            (random(3, 1, 8, seed=5), random(8, seed=6)),
            {"top_k": 2, "multiplier": 1.5, "score_eps": 1e-6, "route_scale": 2.0},
        ),
        "post_expert_norm_combine.post_expert_norm_combine": (
            (random(3, 1, 2, 16, seed=7), random(3, 1, 2, seed=8)),
            {"norm_weight": random(16, seed=9), "eps": 1e-5},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", [*MEANINGS, *TOKENWISE])
def test_the_text_is_the_one_that_was_read(name):
    compiler = Compiler(locate("mlx_vlm.models").package)
    module = name
    while compiler.load(module) is None:
        module = module.rpartition(".")[0]
    facts = compiler.load(module)
    found = digest(text_of(facts.module, facts.source), name.split(".")[module.count(".") + 1])
    assert found == (TOKENWISE[name] if name in TOKENWISE else MEANINGS[name].digest)


def test_another_text_has_another_hash():
    compiler = Compiler(locate("mlx_vlm.models").package)
    facts = compiler.load("mlx_vlm.models.linear")
    source = facts.source
    changed = source.data.replace(b"range(x.shape[axis])", b"range(1, x.shape[axis])")
    assert changed != source.data
    from mlxrewrite.ir import Source
    from mlxrewrite.passes.parse import parse

    other = Source.of(source.module, source.path, changed)
    assert digest(text_of(parse(other), other), "tokenwise") not in TOKENWISE.values()


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 5, 8, 9])
def test_short_chunks_go_through_experts_as_single_tokens_do(length, experts):
    """Both ways of the branch on the chunk's length, where it is not fused."""
    layer = switch_layers.SwitchGLU(16, 8, 4)
    layer.eval()
    x, chosen = random(1, length, 16), mx.random.randint(0, 4, (1, length, experts))
    alone = [layer(x[:, i : i + 1], chosen[:, i : i + 1]) for i in range(length)]
    assert close(layer(x, chosen), mx.concatenate(alone, axis=1))


def test_fused_experts_mean_the_products_of_their_layers():
    layer = switch_layers.SwitchGLU(64, 32, 4)
    for name in ("up_proj", "gate_proj", "down_proj"):
        setattr(layer, name, getattr(layer, name).to_quantized(group_size=32, bits=4))
    layer.eval()
    x, chosen = random(1, 3, 64), mx.array([[[0, 1], [2, 1], [3, 0]]])
    weights, shared = mx.softmax(random(1, 3, 2)), random(1, 3, 64, seed=1)
    up, gate = meaning(f"{LAYERS}exact_affine_switch_gate_up")(layer, x, chosen)
    rows = layer.activation(up, gate)
    down = meaning(f"{LAYERS}exact_affine_moe_down")
    ours = down(layer.down_proj, rows, chosen, weights, shared)
    assert close(ours, layer(x, chosen, weights, shared))


def test_tokenwise_is_a_call_for_each_position():
    x, y = random(2, 5, 4), random(2, 5, 1, seed=1)
    assert close(linear.tokenwise(lambda a, b: mx.tanh(a) * b, x, y), mx.tanh(x) * y)


@pytest.mark.parametrize("pairing", ["half_split", "even_odd"])
@pytest.mark.parametrize("sectioned", [False, True])
@pytest.mark.parametrize("layout", ["half", "full"])
def test_the_fused_rope_means_its_own_plain_form(pairing, sectioned, layout):
    """mlx_vlm differentiates the kernel through this form."""
    section = [1, 2, 1] if sectioned else None
    q, k = random(2, 3, 5, 12), random(2, 1, 5, 12, seed=1)
    angles = random(*((3,) if sectioned else ()), 2, 5, 8, seed=2)
    cos, sin = mx.cos(angles), mx.sin(angles)
    made = meaning(f"{ROPES}_compiled_rotary_apply")(
        8, pairing, cos.ndim, sectioned, layout, tuple(section or ())
    )
    theirs = rope_utils._precomputed_rotary(
        q,
        k,
        cos,
        sin,
        pairing=pairing,
        cos_layout=layout,
        sectioned=sectioned,
        mrope_section=section,
    )
    assert all(close(a, b) for a, b in zip(made(q, k, cos, sin, None), theirs, strict=True))


@pytest.mark.parametrize(
    "style",
    ["interleaved", "chunked", "split_select", "sectioned_half_split", "sectioned_even_odd"],
)
def test_the_fused_rope_of_several_axes_means_its_own_plain_form(style):
    rope = rope_utils.MRoPERotaryEmbedding(8, mrope_section=[2, 1, 1], style=style)
    q, k = random(2, 3, 5, 8), random(2, 1, 5, 8, seed=1)
    places = mx.random.randint(0, 30, (3, 2, 5))
    ours = meaning(f"{ROPES}MRoPERotaryEmbedding.apply_rotary")(rope, q, k, places)
    theirs = rope_utils._mrope_apply(
        q, k, places, rope.inv_freq, rope.position_selector, rope.pairing
    )
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", fused_calls())
def test_fused_norms_and_routing_mean_what_stands_in_for_them(name):
    """What the parity of muse_spark was measured with."""
    args, more = fused_calls()[name]
    ours = meaning(KERNELS + name)(*args, **more)
    theirs = metal_stand_ins.kernels()[name.rpartition(".")[2]](*args, **more)
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    assert all(close(a, b) for a, b in pairs)
