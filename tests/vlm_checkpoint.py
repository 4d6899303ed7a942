"""A checkpoint of a tiny qwen2_vl with random weights: a tokenizer of words, two pictures."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlxrewrite.runtime.vision_verify import build
from vlm_prompts import FOLDER, read

IMAGE, VIDEO, START, END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def make_checkpoint(folder: Path, wide: bool = False) -> Path:
    """Write it into a folder that is there; `wide`: with heads of 32."""
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config, _ = read(FOLDER / "qwen2_vl.json")
    if wide:
        config["hidden_size"] = config["text_config"]["hidden_size"] = 128
        config["vision_config"]["hidden_size"] = 128
        for part in (config, config["text_config"]):
            part["rope_scaling"]["mrope_section"] = [8, 4, 4]
    names = {
        config["image_token_id"]: IMAGE,
        config["video_token_id"]: VIDEO,
        config["vision_start_token_id"]: START,
    }
    words = {names.get(i, f"w{i}"): i for i in range(config["vocab_size"])}
    words[END] = words.pop("w159")
    words["<unk>"] = words.pop("w0")
    words["</s>"] = words.pop("w1")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="</s>",
        additional_special_tokens=[IMAGE, VIDEO, START, END],
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "patch_size": 4,
                "merge_size": 2,
                "temporal_patch_size": 2,
                "min_pixels": 64,
                "max_pixels": 1024,
                "size": {"shortest_edge": 64, "longest_edge": 1024},
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2VLProcessor",
            }
        )
    )
    weights = dict(tree_flatten(build(config, 0).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    for name, size in (("a.png", (16, 16)), ("b.png", (24, 16))):
        pixels = np.random.default_rng(len(name)).integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder
