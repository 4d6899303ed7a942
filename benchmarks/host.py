#!/usr/bin/env python3
"""What a decode step costs the host: steps whose kernels compute nothing, of a narrow model.

    python benchmarks/host.py [--model qwen3] [--layers 28] [--requests 64] [--json FILE]

Models: qwen3 (attention), deepseek_v3 (latent attention), qwen3_next (gated delta nets, and
attention in every fourth layer), mamba2.

Processor time for building the graph of a step, in ms, median over decode steps, with recorded
steps and without, in turn: scheduler, metadata, the model's forward or its recorded form, sampling.
What MLX takes to evaluate the graph comes on top of it. Runs on the CPU: the engine takes the
routes of a GPU, and kernels are replaced by views of zeros.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
from mlxrewrite.kernels import calls, launch
from mlxrewrite.runtime.engine import Engine, Request
from mlxrewrite.runtime.load import rewritten_module

QWEN3 = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "qwen3": QWEN3,
    "deepseek_v3": {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": None,
        "first_k_dense_replace": 10000,
    },
    "qwen3_next": {
        **QWEN3,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "num_experts": 0,
        "num_experts_per_tok": 1,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 32,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [],
        "partial_rotary_factor": 0.25,
    },
    "mamba2": {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_heads": 4,
        "head_dim": 32,
        "intermediate_size": 128,
        "state_size": 16,
        "n_groups": 1,
        "conv_kernel": 4,
        "layer_norm_epsilon": 1e-6,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": [0.001, 100.0],
        "time_step_rank": "auto",
    },
}
STEPS = 40
TURNS = 3


def nothing(
    self: launch.MetalKernel,
    inputs: Mapping[str, mx.array],
    outputs: Sequence[tuple[Sequence[int], mx.Dtype]],
    **sizes: Any,
) -> list[mx.array]:
    """Outputs that depend on the inputs, as those of a kernel do, and cost nothing."""
    del sizes
    one = inputs[self.input_names[0]].flatten()[0]
    return [mx.broadcast_to(one.astype(dtype), shape) for shape, dtype in outputs]


def measure(model: Any, requests: int, *, record: bool) -> dict[str, float]:
    chance = random.Random(1)
    engine = Engine(model, max_rows=2048)
    for _ in range(requests):
        prompt = [chance.randrange(128) for _ in range(chance.randint(16, 40))]
        engine.add(Request(prompt, max_tokens=STEPS + 20, logprobs=True))
    taken, spent = [], []
    build = engine._launch

    def timed(flight: Any) -> Any:
        before = time.thread_time()
        try:
            return build(flight)
        finally:
            spent.append(time.thread_time() - before)

    engine._launch = timed  # type: ignore[method-assign]
    while engine.busy:
        if engine.store is not None and not record:
            engine.store.cache.recorder.lacking = "not asked for"
        spent.clear()
        if len(engine.step().tokens) == requests:
            taken.append(sum(spent))
    assert engine.store is not None
    recorder = engine.store.cache.recorder
    if record != bool(recorder.replayed):
        raise SystemExit(f"recorded steps: {recorder.replayed}, lacking: {recorder.lacking}")
    return {
        "build_ms": 1e3 * statistics.median(taken[-STEPS:]),
        "recorded_steps": recorder.replayed,
        "recorded_shapes": recorder.recorded,
    }


def middle(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="qwen3")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = {
        "model_type": options.model,
        **CONFIGS[options.model],
        "num_hidden_layers": options.layers,
    }
    module = rewritten_module(config)
    model = module.Model(module.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    with (
        mock.patch.object(launch.MetalKernel, "__call__", nothing),
        mock.patch.object(calls, "prepare", lambda *args: None),
        launch.backend("cuda"),
    ):
        runs = [
            measure(model, options.requests, record=record)
            for _ in range(TURNS)
            for record in (False, True)
        ]
    report = {
        "model": options.model,
        "layers": options.layers,
        "requests": options.requests,
        "as_written": middle(runs[::2]),
        "recorded": middle(runs[1::2]),
    }
    print(json.dumps(report, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
