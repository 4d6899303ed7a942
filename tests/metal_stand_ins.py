"""Plain MLX in place of the Metal kernels of files that have no other form.

They compute what the kernels are documented to compute, so that everything around them can be
compared where there is no Metal: see docs/upstream.md. `standing_in` puts them into a folder of
mlx_vlm, original and rewritten file alike. Towers whose sizes are written in the file, not in the
config, are made of fewer layers there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import mlx.core as mx
import pytest
from mlxrewrite.runtime.manifest import generated_folder, load_generated

# Folders of mlx_vlm whose originals run on Metal only: what they call there.
METAL_ONLY = {
    "bitnet": "all seven projections of a layer are BitLinear, a Metal kernel (bitlinear.py:83)",
    "muse_spark": "attention and experts run on Metal kernels chosen unconditionally "
    "(muse_spark/language.py calls ../kernels/qk_norm_rope.py first)",
}


@contextmanager
def standing_in(folder: str) -> Iterator[bool]:
    """Whether a folder of mlx_vlm runs on Metal only; if so, with stand-ins for the time being."""
    with pytest.MonkeyPatch.context() as patch:
        if folder == "bitnet":
            module = import_module("mlx_vlm.models.bitnet.bitlinear")
            patch.setattr(module.BitLinear, "execute_matmul_kernel", packed_product)
        elif folder == "muse_spark":
            original = import_module("mlx_vlm.models.muse_spark.language")
            rewritten = load_generated(generated_folder(None, "mlx_vlm"), "muse_spark/language")
            for module in (original, rewritten):
                for name, value in kernels().items():
                    patch.setattr(module, name, value, raising=False)
                patch.setattr(module, "mx", Float32())
        elif folder == "phi3_v":
            tower = import_module("mlx_vlm.models.phi3_v.vision").VisionModel
            patch.setattr(tower.CLIP_VIT_LARGE_PATCH14_336_CONFIG, "num_hidden_layers", 2)
            patch.setattr(tower.CLIP_VIT_LARGE_PATCH14_336_CONFIG, "intermediate_size", 32)
        elif folder == "gemma3n":
            patch.setattr(
                import_module("mlx_vlm.models.gemma3n.vision"),
                "gemma3n_mobilenet_def",
                one_block_each,
            )
        yield folder in METAL_ONLY


def one_block_each() -> list[list[Any]]:
    """Four stages of gemma3n's tower, each its first block, with the channels of the whole one."""
    vision = import_module("mlx_vlm.models.gemma3n.vision")
    mixed = vision.UniversalInvertedResidualConfig
    return [
        [vision.EdgeResidualConfig(3, 128, 2, 1.0, False)],
        *([mixed(3, 5, width, 2, 1.0, False)] for width in (256, 640, 1280)),
    ]


def packed_product(self: Any, x: mx.array, packed: mx.array) -> mx.array:
    """BitLinear's product: four matrices of -1, 0 and 1 in the bits of one."""
    parts = [((packed >> shift) & 3).astype(x.dtype) - 1 for shift in (0, 2, 4, 6)]
    weights = mx.concatenate(parts)[: self.out_features]
    scale = 1 / self.weight_scale if self.invert_weight_scales else self.weight_scale
    return (x @ weights.T) * scale


class Float32:
    """`mlx.core` whose bfloat16 is float32: rounding would hide what is compared."""

    bfloat16 = mx.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)


def kernels() -> dict[str, Any]:
    """What muse_spark's kernels are documented to compute, each row by itself."""

    def norm(x, eps, weight=None):
        return mx.fast.rms_norm(x, weight, eps)

    def qk_norm(qkvg, *, n_heads, n_kv_heads, head_dim, eps, query_scale):
        q, k = mx.split(
            qkvg[..., : (n_heads + n_kv_heads) * head_dim], [n_heads * head_dim], axis=-1
        )
        q = norm(q.reshape(*q.shape[:-1], n_heads, head_dim), eps) * query_scale
        return q, norm(k.reshape(*k.shape[:-1], n_kv_heads, head_dim), eps)

    def qk_norm_rope(qkvg, *, rope_base, offset, head_dim, **rest):
        def turned(x):
            x = x.swapaxes(1, 2)
            x = mx.fast.rope(
                x, head_dim, traditional=True, base=rope_base, scale=1.0, offset=offset
            )
            return x.swapaxes(1, 2)

        return tuple(turned(x) for x in qk_norm(qkvg, head_dim=head_dim, **rest))

    def rms_norm_sigmoid_gate(x, gate, *, eps):
        x = norm(x, eps).swapaxes(1, 2)
        return x.reshape(gate.shape) * mx.sigmoid(gate)

    def norm_add_norm(branch, stream, *, alpha, beta, post_weight, post_eps, next_norm):
        scaled = branch if post_weight is None else branch * post_weight
        total = alpha * stream + beta * norm(scaled, post_eps)
        return total, None if next_norm is None else next_norm(total)

    def expert_routing(logits, expert_bias, *, top_k, multiplier, score_eps, route_scale):
        scores = mx.sigmoid(logits * multiplier)
        chosen = mx.argsort(-(scores + expert_bias), axis=-1)[..., :top_k]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        weights = weights / (weights.sum(axis=-1, keepdims=True) + score_eps)
        return chosen.astype(mx.uint32), weights * route_scale

    def post_expert_norm_combine(experts, weights, *, norm_weight, eps):
        return (norm(experts * norm_weight, eps) * weights[..., None]).sum(axis=-2)

    found = {name: value for name, value in locals().items() if name != "norm"}
    return found | {"pre_norm": lambda stream, layer, *, dtype: layer(stream).astype(dtype)}
