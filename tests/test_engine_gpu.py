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
# Wide enough for the kernels of single tokens, which smaller ones leave to plain ops.
WIDE = {
    "mamba2": {"state_size": 32},
    "qwen3_next": {"linear_key_head_dim": 32, "linear_value_head_dim": 32},
}
NAMES = (
    "llama", "gemma2", "mamba2", "qwen3_next", "mamba", "lfm2", "kimi_linear", "jamba",
    "olmo_hybrid", "bailing_moe_linear", "bailing_hybrid", "nemotron_h", "falcon_h1",
    "granitemoehybrid", "rwkv7", "recurrent_gemma", "plamo2", "deepseek_v3",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "more"), [*((n, {}) for n in NAMES), *WIDE.items()], ids=lambda part: str(part)[:40]
)
def test_tokens_of_the_engine(name, more):
    """Prompts of many lengths, read in parts beside others that decode, most in recorded steps."""
    config = {**json.loads((CONFIGS / f"{name}.json").read_text()), **more}
    with mx.stream(mx.cpu):
        original, rewritten, _ = _models(config, None, 0, None, None)
    chance = random.Random(3)
    prompts = [[chance.randrange(32) for _ in range(length)] for length in LENGTHS]
    engine = Engine(rewritten, max_rows=128)
    names = [engine.add(Request(prompt, NEW)) for prompt in prompts]
    found = engine.run()
    assert engine.store is not None and engine.store.cache.recorder.replayed > 5
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        for request, prompt in zip(names, prompts, strict=True):
            steps = generate_step(mx.array(prompt), original, max_tokens=NEW)
            assert found[request] == [int(token) for token, _ in steps]
    finally:
        mx.set_default_device(device)
