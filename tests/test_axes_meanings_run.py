"""Fused Metal kernels of mlx_vlm through the CPU runner: they compute what is said of them.

The kernels' own text runs here, on a model of a GPU that checks accesses and races; on Metal itself
it was not run.
"""

from __future__ import annotations

import importlib
import sys

import mlx.core as mx
import pytest
from mlx_vlm.models import fast_ops, rope_utils, switch_layers
from mlxrewrite.kernels.dialects.cpu.runner import metal_kernel
from test_axes_meanings import KERNELS, LAYERS, ROPES, close, fused_calls, meaning, random


@pytest.fixture(autouse=True)
def runner(monkeypatch):
    def kernel(*args, ensure_row_contiguous=True, **more):
        return metal_kernel(*args, **more)  # inputs here are contiguous

    monkeypatch.setattr(mx.fast, "metal_kernel", kernel)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(rope_utils, "_HAS_METAL", True)
    caches = [
        f for m in (rope_utils, fast_ops) for f in vars(m).values() if hasattr(f, "cache_clear")
    ]
    for made in caches:
        made.cache_clear()
    yield
    for made in caches:
        made.cache_clear()
    for name in [name for name in sys.modules if name.startswith("mlx_vlm.kernels")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", fused_calls())
def test_fused_norms_and_routing(name):
    args, more = fused_calls()[name]
    module, _, function = (KERNELS + name).rpartition(".")
    for known in [known for known in sys.modules if known.startswith("mlx_vlm.kernels")]:
        del sys.modules[known]
    theirs = getattr(importlib.import_module(module), function)(*args, **more)
    ours = meaning(KERNELS + name)(*args, **more)
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    assert all(close(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("pairing", "sectioned", "layout"),
    [
        ("half_split", False, "half"),
        ("half_split", True, "half"),
        ("even_odd", False, "half"),
        ("even_odd", False, "full"),
        ("even_odd", True, "half"),
    ],
)
def test_fused_rope(pairing, sectioned, layout):
    section = [1, 2, 1] if sectioned else None
    q, k = random(2, 3, 5, 12), random(2, 1, 5, 12, seed=1)
    angles = random(*((3,) if sectioned else ()), 2, 5, 8, seed=2)
    cos, sin = mx.cos(angles), mx.sin(angles)
    kernel = rope_utils._rotary_apply_kernel.__wrapped__
    made = kernel(8, pairing, cos.ndim, sectioned, layout)
    chosen = rope_utils.mrope_position_selector("chunked", section, 4) if sectioned else None
    theirs = rope_utils._fast_rotary_apply(
        made,
        q,
        k,
        cos,
        sin,
        chosen,
        pairing=pairing,
        cos_layout=layout,
        sectioned=sectioned,
        mrope_section=section,
    )
    ours = meaning(f"{ROPES}_compiled_rotary_apply")(
        8, pairing, cos.ndim, sectioned, layout, tuple(section or ())
    )(q, k, cos, sin, None)
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("style", ["interleaved", "chunked", "split_select"])
def test_fused_rope_of_several_axes(style):
    rope = rope_utils.MRoPERotaryEmbedding(8, mrope_section=[2, 1, 1], style=style)
    q, k = random(2, 3, 5, 8), random(2, 1, 5, 8, seed=1)
    places = mx.random.randint(0, 30, (3, 2, 5))
    kernel = rope_utils._mrope_apply_kernel.__wrapped__(8, 3, rope.pairing)
    theirs = rope_utils._fast_mrope_apply(
        kernel, q, k, places, rope.inv_freq, rope.position_selector, rope.pairing
    )
    ours = meaning(f"{ROPES}MRoPERotaryEmbedding.apply_rotary")(rope, q, k, places)
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("bits", [4, 5])
def test_fused_experts(bits):
    def layers(dtype):
        """The same quantized weights, with scales of a type."""
        made = switch_layers.SwitchGLU(512, 512, 4)
        for name, known in projections.items():
            layer = switch_layers.QuantizedSwitchLinear(512, 512, 4, False, 64, bits)
            layer.weight = known.weight
            for part in ("scales", "biases"):
                setattr(layer, part, getattr(known, part).astype(mx.bfloat16).astype(dtype))
            setattr(made, name, layer)
        made.eval()
        return made

    plain = switch_layers.SwitchGLU(512, 512, 4)
    names = ("up_proj", "gate_proj", "down_proj")
    projections = {name: getattr(plain, name).to_quantized(64, bits) for name in names}
    half, full = layers(mx.bfloat16), layers(mx.float32)
    x = random(1, 3, 512).astype(mx.bfloat16)
    chosen = mx.array([[[0, 1], [2, 1], [3, 0]]])  # two neighbours share an expert
    weights = mx.softmax(random(1, 3, 2, seed=1))
    shared = random(1, 3, 512, seed=2).astype(mx.bfloat16)

    theirs = fast_ops.exact_affine_switch_gate_up(half, x, chosen)
    ours = meaning(f"{LAYERS}exact_affine_switch_gate_up")(full, x.astype(mx.float32), chosen)
    assert all(close(a, b, 1e-2) for a, b in zip(ours, theirs, strict=True))

    rows = half.activation(*theirs)
    theirs = fast_ops.exact_affine_moe_down(half.down_proj, rows, chosen, weights, shared)
    down = meaning(f"{LAYERS}exact_affine_moe_down")
    given = rows.astype(mx.float32), chosen, weights, shared.astype(mx.float32)
    assert close(down(full.down_proj, *given), theirs, 2e-2)
