"""Whole models on a GPU: the engine's tokens beside mlx_lm's loop on the CPU, one by one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import gpu
import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlxrewrite.runtime.engine import Engine, Request
from mlxrewrite.runtime.verify import _models

pytestmark = gpu.MARKS
CONFIGS = Path(__file__).parent / "configs"
LENGTHS = (1, 2, 3, 9, 17, 33, 64, 65, 90, 40, 5, 70)
NEW = 20
# Wide enough for kernels, which smaller heads and states leave to plain ops; ropes of 16 wide heads
# do not launch for more than 63 rows of two heads on CUDA (MLX 0.32.4).
HEADS, WIDE = {"head_dim": 32}, {"hidden_size": 128}
MODELS: dict[str, dict[str, int]] = {
    "llama": HEADS,
    "gemma2": HEADS,
    "mamba": {},
    "mamba2": {"state_size": 32},
    "qwen3_next": {"head_dim": 64, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
    "lfm2": {**WIDE, "block_dim": 128},
    "jamba": WIDE,
    "nemotron_h": {**HEADS, "ssm_state_size": 32},
    "falcon_h1": {**HEADS, "mamba_d_state": 32},
    "granitemoehybrid": {**WIDE, "mamba_d_head": 32, "mamba_d_state": 32},
    "olmo_hybrid": {**WIDE, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
    "bailing_moe_linear": {"hidden_size": 256, "head_dim": 64},
    "rwkv7": {},
    "deepseek_v3": {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32},
}


@pytest.mark.parametrize("name", MODELS)
def test_tokens_of_the_engine(name):
    """Prompts of many lengths, read in parts beside others that decode, most in recorded steps."""
    config = {**json.loads((CONFIGS / f"{name}.json").read_text()), **MODELS[name]}
    config["max_position_embeddings"] = 256
    with mx.stream(mx.cpu):
        original, rewritten, _ = _models(config, None, 0, None, None)
    chance = random.Random(3)
    prompts = [[chance.randrange(32) for _ in range(length)] for length in LENGTHS]
    engine = Engine(rewritten, max_rows=128)
    names = [engine.add(Request(prompt, NEW)) for prompt in prompts]
    found = engine.run()
    assert engine.store is not None
    recorder = engine.store.cache.recorder
    assert recorder.replayed > 5, recorder.lacking
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        for request, prompt in zip(names, prompts, strict=True):
            steps = generate_step(mx.array(prompt), original, max_tokens=NEW)
            assert found[request] == [int(token) for token, _ in steps]
    finally:
        mx.set_default_device(device)
