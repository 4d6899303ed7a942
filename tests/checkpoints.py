"""Small checkpoints as mlx_lm loads them: random weights of a tiny config, and a tokenizer."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import quantize_model, save_config, save_model
from mlxrewrite.runtime.weights import randomise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONFIGS = Path(__file__).parent / "configs"
END = "<end>"


def write_checkpoint(
    folder: Path,
    name: str = "llama",
    *,
    seed: int = 0,
    dtype: mx.Dtype = mx.float32,
    bits: int | None = None,
) -> Path:
    """A model folder for the tiny config `name`; with `bits`, quantised in groups of 32."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(dict(config)))
    randomise(model, seed)
    model.set_dtype(dtype)
    if bits is not None:
        model, config = quantize_model(model, config, group_size=32, bits=bits)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, model)
    write_tokenizer(folder, config["vocab_size"])
    config["eos_token_id"] = 0
    save_config(config, folder / "config.json")
    return folder


def write_tokenizer(folder: Path, size: int) -> None:
    """One token a byte, as far as the vocabulary goes; token 0 ends a text."""
    alphabet = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = [*alphabet, *(f"<{i}>" for i in range(len(alphabet), size))][:size]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token=words[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
