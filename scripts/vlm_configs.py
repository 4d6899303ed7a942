"""Tiny configs for folders of mlx_vlm, from the fields of their config classes.

`scripts/vlm_configs.py FOLDER...` writes tests/vlm_configs/FOLDER.json, which can then be edited by
hand: a file that is there is not written again without --force.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "tests" / "vlm_configs"

# By field name; whatever is not here keeps its default.
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 160,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "sliding_window": 8,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 8,
    "rope_scaling": None,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "moe_k": 2,
    "n_shared_experts": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 160,
    "num_kv_shared_layers": 1,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "out_hidden_size": 32,
    "projection_dim": 32,
    "output_dim": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "depth": 2,
    "layers": 2,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "spatial_patch_size": 4,
    "image_size": 16,
    "num_position_embeddings": 16,
    "window_size": 16,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
    "num_channels": 3,
    "in_channels": 3,
    "mlp_ratio": 2,
}
# Model types that a folder's code asks for where its config classes have no default.
TEXT_TYPES = {
    "llava": "llama",
    "llava_next": "llama",
    "llava_bunny": "qwen2",
    "llmjpvl": "qwen3",
    "multi_modality": "llama",
    "molmo": "molmo",
    "mistral3": "ministral3",
    "plamo2vl": "plamo2",
}
SIGLIP = "siglip_vision_model"
VISION_TYPES = {
    **dict.fromkeys(("gemma3", "idefics3", "internvl_chat", "llava_bunny", "llmjpvl"), SIGLIP),
    **dict.fromkeys(("aya_vision", "paligemma", "plamo2vl", "smolvlm", "granite_vision"), SIGLIP),
    **dict.fromkeys(("llava", "llava_next"), "clip_vision_model"),
    **dict.fromkeys(("deepseek_vl_v2", "deepseekocr", "deepseekocr_2", "multi_modality"), "vision"),
    **dict.fromkeys(("kimi_vl", "locateanything"), "moonvit"),
    "gemma3n": "gemma3n_vision",
    "idefics2": "idefics2",
    "molmo": "molmo",
    "cohere_compass": "cohere_compass_vision",
    "llama4": "llama4_vision_model",
    "lfm2_vl": "lfm2_vl",
    "phi4_siglip": "siglip2_vision_model",
}
# Folders whose config class takes the fields of the text model from the top level.
FLAT = ("qwen2_vl", "qwen2_5_vl", "zaya1_vl", "fastvlm", "llava_bunny")
MROPE = {"type": "default", "mrope_section": [2, 1, 1]}


def config_of(folder: str) -> dict[str, Any]:
    """A config for a folder of mlx_vlm.models."""
    arch = importlib.import_module(f"mlx_vlm.models.{folder}")
    config = importlib.import_module(f"mlx_vlm.models.{folder}.config")
    taken = iter(range(120, 160))
    made = _fields(arch.ModelConfig, {**TEXT, "num_hidden_layers": 3}, taken)
    made["model_type"] = folder
    text = getattr(config, "TextConfig", None)
    if text is not None:
        made["text_config"] = _fields(text, TEXT, taken)
        known = made["text_config"].get("model_type", folder)
        made["text_config"]["model_type"] = TEXT_TYPES.get(folder, known)
        made["hidden_size"] = made["text_config"].get("hidden_size", 32)
        source = Path(str(config.__file__)).read_text()
        if "mrope_section" in source and "rope_scaling" in made["text_config"]:
            made["text_config"]["rope_scaling"] = MROPE
        if "rope_parameters" in {item.name for item in dataclasses.fields(text)}:
            made["text_config"]["rope_parameters"] = {**MROPE, "rope_theta": 10000.0}
    vision = getattr(config, "VisionConfig", None)
    if vision is not None:
        made["vision_config"] = _fields(vision, VISION, taken)
        known = made["vision_config"].get("model_type", folder)
        known = folder if known == "test" else known
        made["vision_config"]["model_type"] = VISION_TYPES.get(folder, known)
    for part in ("perceiver", "projector", "audio"):
        cls = getattr(config, f"{part.title()}Config", None)
        if cls is not None:
            made[f"{part}_config"] = _fields(cls, VISION, taken)
    if folder in FLAT:
        made = {**made["text_config"], **made}
    return {name: value for name, value in made.items() if _plain(value)}


def _fields(cls: type, table: dict[str, Any], taken: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        name = item.name
        default = item.default if item.default is not dataclasses.MISSING else None
        if name == "eos_token_id":
            found[name] = 1
            continue
        if name.endswith(("_token_id", "_token_index")) and "pad" not in name:
            if isinstance(default, int) or default is None:
                found[name] = next(taken)
            continue
        if name in table:
            found[name] = table[name]
        elif name == "model_type":
            found[name] = default if isinstance(default, str) else "test"
        elif default is None and item.default_factory is dataclasses.MISSING:
            if item.default is dataclasses.MISSING and not name.endswith("_config"):
                found[name] = 2
    return found


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--force", action="store_true", help="write over files that are there")
    got = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    for folder in got.folders:
        path = FOLDER / f"{folder}.json"
        if got.force or not path.exists():
            path.write_text(json.dumps(config_of(folder), indent=1) + "\n")


if __name__ == "__main__":
    main()
