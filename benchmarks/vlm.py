#!/usr/bin/env python3
"""Long and short prompts at once: models of mlx_vlm in the engine beside mlx_vlm's BatchGenerator.

    python benchmarks/vlm.py [--json FILE] [--long 384] [--short 10] [--tokens 16] [--rounds 2]

Small models with random weights, float32: one like Qwen2-VL (positions of three axes), one like
Gemma 3 (windows beside full attention). Two prompts of `--long` tokens, one of them with an image
where the model is Qwen2-VL's, and `--short` prompts of 8 to 48 tokens, all there from the start;
`--tokens` new ones each, greedy. Both contenders have the same weights and prompts, run once to
warm up and then take turns in one process; the best run counts. Peak memory is MLX's beyond the
weights: caches and activations. `equal` are the prompts with the same tokens from both.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_vlm.generate.ar import BatchGenerator
from mlxrewrite.runtime.engine import Engine
from mlxrewrite.runtime.vision import VisionModel
from mlxrewrite.runtime.vision_engine import PromptKeys, request
from mlxrewrite.runtime.vision_verify import build

Prompt = tuple[list[int], dict[str, Any]]
SIZE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 4096,
    "max_position_embeddings": 8192,
}
TOWER = {"depth": 2, "embed_dim": 64, "hidden_size": 256, "num_heads": 2, "mlp_ratio": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "model_type": "qwen2_vl",
        **SIZE,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "default", "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": False,
        "image_token_id": 4090,
        "video_token_id": 4091,
        "vision_start_token_id": 4092,
        "eos_token_id": 1,
        "vision_config": {
            "model_type": "qwen2_vl",
            **TOWER,
            "image_size": 64,
            "patch_size": 4,
            "in_channels": 3,
            "spatial_patch_size": 4,
        },
    },
    "gemma3": {
        "model_type": "gemma3",
        "vocab_size": 4096,
        "image_token_index": 4090,
        "boi_token_index": 4091,
        "eoi_token_index": 4092,
        "eos_token_id": 1,
        "hidden_size": 256,
        "text_config": {
            "model_type": "gemma3_text",
            **SIZE,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 128,
            "sliding_window_pattern": 4,
            "mm_tokens_per_image": 4,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "intermediate_size": 128,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "num_channels": 3,
        },
    },
}


class Endless:
    """What mlx_vlm's generator asks of a tokenizer: no token ends a text."""

    def __init__(self) -> None:
        self.stopping_criteria = self

    def add_eos_token_ids(self, tokens: object) -> None:
        del tokens

    def __call__(self, token: int) -> bool:
        del token
        return False


def prompts_of(name: str, long: int, short: int) -> list[Prompt]:
    """Prompts in random order, the same in every run."""
    chance = random.Random(0)

    def text(count: int) -> list[int]:
        return [chance.randrange(3, 4000) for _ in range(count)]

    found: list[Prompt] = [(text(long), {}), (text(long), {})]
    if name == "qwen2_vl":
        pixels = np.random.default_rng(0).normal(size=(256, 96)).astype(np.float32)
        ids = [*text(9), 4092, *[4090] * 64, *text(long - 74)]
        grid = mx.array([[1, 16, 16]])
        found[0] = (ids, {"pixel_values": mx.array(pixels), "image_grid_thw": grid})
    found += [(text(chance.randint(8, 48)), {}) for _ in range(short)]
    chance.shuffle(found)
    return found


def ours(model: VisionModel, prompts: list[Prompt], count: int) -> list[list[int]]:
    """All prompts through the engine."""
    engine, keys = Engine(model, reuse=False), PromptKeys()
    names = []
    for ids, inputs in prompts:
        prepared = model.prepare(ids, **inputs)
        names.append(engine.add(request(model, prepared, keys, max_tokens=count)))
    found = engine.run()
    return [found[name] for name in names]


def theirs(model: Any, prompts: list[Prompt], count: int) -> list[list[int]]:
    """All prompts through mlx_vlm's generator, as its server hands them over."""
    generator = BatchGenerator(
        model.language_model,
        Endless(),
        max_tokens=count,
        prefill_batch_size=len(prompts),
        completion_batch_size=len(prompts),
        compute_logprobs=False,
    )
    given = []
    for ids, inputs in prompts:
        more = dict(inputs)
        pixels = more.pop("pixel_values", None)
        made = model.get_input_embeddings(mx.array([ids]), pixels, **more)
        features = {k: v for k, v in made.to_dict().items() if v is not None}
        given.append({**more, **features})
    names = generator.insert([ids for ids, _ in prompts], count, prompt_kwargs=given)
    found: dict[int, list[int]] = {name: [] for name in names}
    left = set(names)
    while left:
        for event in generator.next()[1]:
            found[event.uid].append(event.token)
            if event.finish_reason is not None:
                left.discard(event.uid)
    return [found[name] for name in names]


def timed(run: Callable[[], list[list[int]]]) -> tuple[float, float, list[list[int]]]:
    """Seconds, bytes of MLX's memory beyond what was there before, and the tokens."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    tokens = run()
    return time.perf_counter() - start, mx.get_peak_memory() - before, tokens


def measure(name: str, got: argparse.Namespace) -> dict[str, Any]:
    original, rewritten = build(CONFIGS[name], 0), build(CONFIGS[name], 0)
    rewritten.update(original.parameters())
    model = VisionModel(rewritten)
    assert model.rewritten, model.why
    prompts = prompts_of(name, got.long, got.short)
    contenders: dict[str, Callable[[], list[list[int]]]] = {
        "mlxrewrite": lambda: ours(model, prompts, got.tokens),
        "mlx_vlm": lambda: theirs(original, prompts, got.tokens),
    }
    runs: dict[str, list[tuple[float, float, list[list[int]]]]] = {n: [] for n in contenders}
    for round_ in range(got.rounds + 1):
        for contender, run in contenders.items():
            result = timed(run)
            if round_:
                runs[contender].append(result)
    new = got.tokens * len(prompts)
    found: dict[str, Any] = {
        contender: {
            "seconds": min(seconds for seconds, _, _ in results),
            "tokens_per_second": new / min(seconds for seconds, _, _ in results),
            "peak_mb": min(peak for _, peak, _ in results) / 1e6,
        }
        for contender, results in runs.items()
    }
    pairs = zip(runs["mlxrewrite"][0][2], runs["mlx_vlm"][0][2], strict=True)
    found["equal"] = sum(a == b for a, b in pairs)
    found["prompts"] = len(prompts)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", type=int, default=384)
    parser.add_argument("--short", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    got = parser.parse_args()
    found: dict[str, Any] = {"mlx": mx.__version__, "device": str(mx.default_device())}
    for name in CONFIGS:
        found[name] = measure(name, got)
        print(name, json.dumps(found[name], indent=1), flush=True)
    if got.json is not None:
        got.json.write_text(json.dumps({**found, "options": vars(got)}, indent=1, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
