#!/usr/bin/env python3
"""Many requests at once: the engine beside mlx_lm's BatchGenerator, in one process.

    python benchmarks/serving.py [MODEL_DIR] [--model-type NAME] [--json FILE] [--rows N] [--quick]
                                 [--requests N] [--longest N] [--new N] [--batch-only]
    python benchmarks/serving.py --json FILE --plot PNG

On a GPU, without MODEL_DIR: a Qwen3 of 0.6B parameters (or another of the types below, about as
large) with random weights in bfloat16, 64 prompts of 16 to 2048 tokens, 128 new tokens each. On the
CPU: MODEL_DIR (such as SmolLM2), 16 prompts of 16 to 160 tokens, 32 new tokens each, and mlx_lm's
loop over one request after the other too. `--batch-only`: nothing but that comparison, not the
crowd of 256 requests and not the prompts with one beginning.

Everything is greedy, with the same weights and prompts. Each contender runs once to warm up, then
they take turns; the best run counts. One request after the other runs once, last. Tokens per second
are new tokens over the time from the first request's arrival to the last token, prompts included.
TTFT is the time from the arrival of all requests to the first token of each. Peak memory is MLX's,
weights included.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step
from mlxrewrite.runtime.batch_generator import PagedBatchGenerator
from mlxrewrite.runtime.engine import Engine, Request
from mlxrewrite.runtime.load import load, rewritten_module

ALONE = "mlx_lm one by one"
COMMON = {"vocab_size": 32000, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
QWEN3 = {
    **COMMON,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
# Shapes of mixers as in the published models; depth and width as of a small one.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": QWEN3,
    "qwen3_next": {
        **QWEN3,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_value_heads": 16,
        "linear_num_key_heads": 8,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": 0,
        "num_experts_per_tok": 1,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 512,
        "moe_intermediate_size": 512,
        "mlp_only_layers": [],
        "partial_rotary_factor": 0.25,
    },
    "mamba2": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "num_hidden_layers": 48,
        "num_heads": 32,
        "head_dim": 64,
        "intermediate_size": 2048,
        "state_size": 128,
        "n_groups": 1,
        "conv_kernel": 4,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": [0.001, 100.0],
        "time_step_rank": "auto",
    },
    "deepseek_v3": {
        **COMMON,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "max_position_embeddings": 40960,
        "first_k_dense_replace": 1000,
    },
}


@dataclass
class Result:
    tokens_per_second: float
    seconds: float
    ttft_p50: float
    ttft_p99: float
    peak_gb: float
    outputs: dict[int, list[int]] = field(repr=False)
    more: dict[str, float] = field(default_factory=dict)


def random_model(config: dict[str, Any]) -> tuple[Any, Any]:
    """The original and the rewritten model with the same random weights."""
    upstream = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(0)
    original = upstream.Model(upstream.ModelArgs.from_dict(config))
    original.set_dtype(mx.bfloat16)
    module = rewritten_module(config)
    rewritten = module.Model(module.ModelArgs.from_dict(config))
    rewritten.update(original.parameters())
    mx.eval(rewritten.parameters())
    return original, rewritten


def drain(generator: Any, prompts: list[list[int]], new: int) -> Result:
    gc.collect()  # pools of the run before, which hold each other
    mx.clear_cache()
    mx.reset_peak_memory()
    outputs: dict[int, list[int]] = {}
    first: dict[int, float] = {}
    began = time.perf_counter()
    generator.insert(prompts, [new] * len(prompts))
    while responses := generator.next_generated():
        now = time.perf_counter() - began
        for response in responses:
            first.setdefault(response.uid, now)
            outputs.setdefault(response.uid, []).append(response.token)
    return finished(began, first, outputs)


def finished(began: float, first: dict[int, float], outputs: dict[int, list[int]]) -> Result:
    seconds = time.perf_counter() - began
    count = sum(map(len, outputs.values()))
    times = sorted(first.values())
    return Result(
        count / seconds,
        seconds,
        statistics.median(times),
        times[min(len(times) - 1, int(0.99 * len(times)))],
        mx.get_peak_memory() / 1e9,
        outputs,
    )


def theirs(model: Any, prompts: list[list[int]], new: int) -> Result:
    return drain(BatchGenerator(model, completion_batch_size=len(prompts)), prompts, new)


def one_by_one(model: Any, prompts: list[list[int]], new: int) -> Result:
    gc.collect()  # pools of the run before, which hold each other
    mx.clear_cache()
    mx.reset_peak_memory()
    outputs: dict[int, list[int]] = {}
    first: dict[int, float] = {}
    began = time.perf_counter()
    for uid, prompt in enumerate(prompts):
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=new):
            first.setdefault(uid, time.perf_counter() - began)
            outputs.setdefault(uid, []).append(int(token))
    return finished(began, first, outputs)


def ours(model: Any, prompts: list[list[int]], new: int, **options: Any) -> Result:
    generator = PagedBatchGenerator(
        model, completion_batch_size=len(prompts), keep_caches=False, **options
    )
    mx.clear_cache()
    gc.collect()
    before = mx.get_active_memory()
    result = drain(generator, prompts, new)
    stats, store = generator.engine.stats, generator.engine.store
    assert store is not None
    result.more = {
        "steps": stats.steps,
        "ms_per_step": round(1e3 * stats.seconds / stats.steps, 3),
        "host_ms_per_step": round(1e3 * (stats.seconds - stats.waited) / stats.steps, 3),
        "schedule_ms_per_step": round(1e3 * stats.scheduling / stats.steps, 3),
        "preemptions": generator.engine.preemptions,
        "reused_tokens": store.stats.reused,
        "recorded_steps": store.cache.recorder.replayed,
        "recorded_shapes": store.cache.recorder.recorded,
        # What the peak is made of: weights (and whatever else was there), blocks, one step.
        "before_gb": round(before / 1e9, 2),
        "blocks_gb": round(sum(leaf.pool.pool.nbytes for leaf in _made(store)) / 1e9, 2),
    }
    if store.cache.recorder.lacking is not None:
        print(f"nothing is recorded: {store.cache.recorder.lacking}", file=sys.stderr)
    return result


def _made(store: Any) -> list[Any]:
    return [leaf for leaf in store.cache.leaves.values() if leaf.pool.made]


def agreement(one: Result, other: Result) -> float:
    """The share of tokens up to the first difference of each request: sums have other orders."""
    same = total = 0
    for uid, tokens in one.outputs.items():
        pairs = zip(tokens, other.outputs[uid], strict=True)
        same += next((i for i, (a, b) in enumerate(pairs) if a != b), len(tokens))
        total += len(tokens)
    return round(same / total, 4)


def shared_prompt(model: Any, vocabulary: int, length: int, count: int) -> dict[str, float]:
    """`count` requests with one long beginning, after it was read once: with and without reuse."""
    chance = random.Random(5)
    shared = [chance.randrange(vocabulary) for _ in range(length)]
    found: dict[str, float] = {}
    for name, reuse in (("without", False), ("with", True)):
        engine = Engine(model, reuse=reuse)
        # The pool is made for all of them at once, before anything is timed.
        for _ in range(count):
            engine.add(Request(shared[: length // 2], 1))
        engine.add(Request([*shared, 1], 1))
        engine.run()
        began = time.perf_counter()
        for _ in range(count):
            engine.add(Request([*shared, *(chance.randrange(vocabulary) for _ in range(16))], 8))
        engine.run()
        found[f"seconds_{name}"] = round(time.perf_counter() - began, 4)
        began = time.perf_counter()
        engine.add(Request([*shared, *(chance.randrange(vocabulary) for _ in range(16))], 1))
        engine.run()
        found[f"ttft_{name}"] = round(time.perf_counter() - began, 4)
    found["speed_up"] = round(found["seconds_without"] / found["seconds_with"], 2)
    found["ttft_speed_up"] = round(found["ttft_without"] / found["ttft_with"], 2)
    return found


def plot(report: dict[str, Any], file: Path) -> None:
    """Bars for each contender: tokens per second, time to the first token, memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["results"]
    labels = list(rows)
    panels = {
        "tokens/s (more is better)": [("tokens_per_second", "")],
        "seconds to the first token": [("ttft_p50", "p50"), ("ttft_p99", "p99")],
        "peak memory, GB": [("peak_gb", "")],
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 3.4))
    for axis, (title, bars) in zip(axes, panels.items(), strict=True):
        width = 0.8 / len(bars)
        for i, (key, name) in enumerate(bars):
            places = [at + (i - (len(bars) - 1) / 2) * width for at in range(len(labels))]
            drawn = axis.bar(places, [rows[label][key] for label in labels], width, label=name)
            axis.bar_label(drawn, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
        axis.margins(y=0.15)
        if len(bars) > 1:
            axis.legend(fontsize=8)
    figure.suptitle(
        f"{report['model']}, {report['device']}: {report['requests']} requests, "
        f"{report['prompt_tokens']:,} prompt tokens, {report['new_tokens_each']} new tokens each",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--model-type", choices=CONFIGS, default="qwen3", help="of random weights")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--longest", type=int, help="prompt, in tokens")
    parser.add_argument("--new", type=int, help="tokens of each request")
    parser.add_argument("--batch-only", action="store_true", help="no crowd, no shared prompts")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-single", action="store_true", help="leave out one by one, on the CPU")
    parser.add_argument("--rows", type=int, default=2048, help="of a step (default: 2048)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw what --json FILE holds")
    parser.add_argument("--quick", action="store_true", help="a smoke test, not a measurement")
    options = parser.parse_args()
    if options.plot is not None:
        if options.json is None:
            parser.error("--plot draws what is in --json FILE")
        plot(json.loads(options.json.read_text()), options.plot)
        return 0
    on_gpu = mx.default_device() != mx.cpu
    if options.model is not None:
        original, _ = mlx_lm.load(str(options.model))
        rewritten, _ = load(options.model)
        rewritten.update(original.parameters())  # one copy of the weights in memory
        name, vocabulary = options.model.name, min(1000, original.args.vocab_size)
    elif on_gpu:
        config = {"model_type": options.model_type, **CONFIGS[options.model_type]}
        original, rewritten = random_model(config)
        size = sum(part.size for _, part in tree_flatten(original.parameters())) / 1e9
        name, vocabulary = f"{options.model_type}-{size:.1f}b-random-bfloat16", config["vocab_size"]
    else:
        parser.error("on the CPU a model folder is needed")
    count, longest, new = (64, 2048, 128) if on_gpu else (16, 160, 32)
    if options.quick:
        count, longest, new = 4, 40, 6
    count, longest = options.requests or count, options.longest or longest
    new = options.new or new
    chance = random.Random(1)
    prompts = [
        [chance.randrange(vocabulary) for _ in range(chance.randint(16, longest))]
        for _ in range(count)
    ]
    contenders: dict[str, Callable[[], Result]] = {
        "mlxrewrite": lambda: ours(rewritten, prompts, new, prefill_step_size=options.rows),
        "mlx_lm BatchGenerator": lambda: theirs(original, prompts, new),
    }
    if not on_gpu and not options.no_single:
        contenders[ALONE] = lambda: one_by_one(original, prompts, new)
    runs: dict[str, list[Result]] = {label: [] for label in contenders}
    for number in range(options.rounds + 1):
        for label in list(contenders) if number % 2 else list(reversed(contenders)):
            if label == ALONE and number < options.rounds:
                continue  # it takes longer than all others together
            result = contenders[label]()
            print(f"{label}: {result.tokens_per_second:.1f} tok/s", file=sys.stderr, flush=True)
            if number > 0 or not options.rounds:  # the first round warms up
                runs[label].append(result)
    best = {label: max(part, key=lambda r: r.tokens_per_second) for label, part in runs.items()}
    report: dict[str, Any] = {
        "model": name,
        "device": str(mx.default_device()),
        "requests": count,
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens_each": new,
        "results": {
            label: {
                "tokens_per_second": round(r.tokens_per_second, 1),
                "ttft_p50": round(r.ttft_p50, 3),
                "ttft_p99": round(r.ttft_p99, 3),
                "peak_gb": round(r.peak_gb, 2),
                "all": [round(x.tokens_per_second, 1) for x in runs[label]],
                **r.more,
            }
            for label, r in best.items()
        },
    }
    mine, upstream = best["mlxrewrite"], best["mlx_lm BatchGenerator"]
    report["ratio"] = round(mine.tokens_per_second / upstream.tokens_per_second, 3)
    report["same_tokens"] = agreement(mine, upstream)
    if (on_gpu or options.quick) and not options.batch_only:
        many = 256 if not options.quick else 12
        crowd = [
            [chance.randrange(vocabulary) for _ in range(chance.randint(32, min(512, longest)))]
            for _ in range(many)
        ]
        result = ours(rewritten, crowd, new // 2)
        complete = sum(len(tokens) == new // 2 for tokens in result.outputs.values())
        report["crowd"] = {
            "requests": many,
            "complete": complete,
            "tokens_per_second": round(result.tokens_per_second, 1),
            "peak_gb": round(result.peak_gb, 2),
            **result.more,
        }
    length = 64 if options.quick else 2048 if on_gpu else 512
    if not options.batch_only:
        report["shared_prompt"] = {
            "tokens": length,
            **shared_prompt(rewritten, vocabulary, length, 8 if on_gpu else 4),
        }
    print(
        f"{name} on {report['device']}: {count} requests, {report['prompt_tokens']} prompt tokens"
    )
    print(f"{'':24}{'tok/s':>10}{'TTFT p50':>10}{'p99':>8}{'peak GB':>9}")
    for label, row in report["results"].items():
        print(
            f"{label:24}{row['tokens_per_second']:>10}{row['ttft_p50']:>10}{row['ttft_p99']:>8}"
            f"{row['peak_gb']:>9}"
        )
    print(json.dumps(report, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
