#!/usr/bin/env python3
"""What a decode step costs the host: steps whose kernels compute nothing, of a narrow Qwen3.

    python benchmarks/host.py [--layers 28] [--requests 64] [--json FILE]

Processor time for building the graph of a step, in ms, median over decode steps, with recorded
steps and without: scheduler, metadata, the model's forward or its recorded form, sampling. What
MLX takes to evaluate the graph comes on top of it. Runs on the CPU: the engine takes the routes of
a GPU, and kernels are replaced by views of zeros.
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

CONFIG = {
    "model_type": "qwen3",
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
STEPS = 60


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
    return {
        "build_ms": round(1e3 * statistics.median(taken[-STEPS:]), 2),
        "recorded_steps": recorder.replayed,
        "recorded_shapes": recorder.recorded,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = {**CONFIG, "num_hidden_layers": options.layers}
    module = rewritten_module(config)
    model = module.Model(module.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    with (
        mock.patch.object(launch.MetalKernel, "__call__", nothing),
        mock.patch.object(calls, "prepare", lambda *args: None),
        launch.backend("cuda"),
    ):
        report = {
            "layers": options.layers,
            "requests": options.requests,
            "as_written": measure(model, options.requests, record=False),
            "recorded": measure(model, options.requests, record=True),
        }
    print(json.dumps(report, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
