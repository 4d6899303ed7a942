#!/usr/bin/env python3
"""Mixers on rows beside the same file once per length, in steps that decode and read prompts.

    python benchmarks/rows.py [--model rwkv7|mamba2|qwen3_next] [--hidden 1024] [--layers 4]
                              [--decode 32] [--prompts 200,120] [--spread 64:16:256]
                              [--rounds 7] [--dtype bfloat16] [--json FILE]

Both forms of RWKV-7 come from the compiler: what it writes, and what it would write if the rest of
the file were not proved to treat rows alone. The others' mixers take either decorator. Weights are
random and the same. A step gives one token to each of `--decode` sequences and reads prompts of
`--prompts` tokens, or of as many lengths as `--spread` says, evenly from the second number to the
third; `decode only` leaves those away. Medians of rounds in which both forms run, in changing
order: of the whole step, and of what the host spends until its graph is built.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlxrewrite.kernels import launch
from mlxrewrite.pipeline import Compiler, without_proof
from mlxrewrite.runtime.cache import PagedCache
from mlxrewrite.runtime.load import rewritten_module
from mlxrewrite.runtime.per_length import per_length
from mlxrewrite.runtime.row_states import on_rows
from mlxrewrite.sources import locate


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    hidden, head = options.hidden, options.head
    low, heads = max(8, hidden // 16), hidden // head
    own = {
        "rwkv7": {
            "intermediate_size": 4 * hidden,
            "norm_eps": 1e-5,
            "head_dim": head,
            "a_low_rank_dim": low,
            "v_low_rank_dim": low,
            "gate_low_rank_dim": low,
            "decay_low_rank_dim": low,
        },
        "mamba2": {
            "intermediate_size": 2 * hidden,
            "num_heads": 2 * heads,
            "head_dim": head,
            "state_size": 128,
            "n_groups": 1,
            "conv_kernel": 4,
            "layer_norm_epsilon": 1e-5,
            "use_bias": False,
            "use_conv_bias": True,
            "tie_word_embeddings": False,
            "time_step_limit": [0.001, 100.0],
            "time_step_rank": "auto",
        },
        "qwen3_next": {
            "intermediate_size": 3 * hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 4),
            "head_dim": head,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 4096,
            "linear_num_value_heads": heads,
            "linear_num_key_heads": max(1, heads // 2),
            "linear_key_head_dim": head,
            "linear_value_head_dim": head,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": min(4, options.layers),
            "num_experts": 0,
            "num_experts_per_tok": 1,
            "decoder_sparse_step": 1,
            "shared_expert_intermediate_size": hidden,
            "moe_intermediate_size": hidden,
            "mlp_only_layers": [],
        },
    }
    sizes = {"vocab_size": 512, "hidden_size": hidden, "num_hidden_layers": options.layers}
    return {"model_type": options.model, **sizes, **own[options.model]}


def compiled(model: str, folder: Path, *, proved: bool) -> Path:
    """A folder with the rewritten file, as if its proof had failed if not `proved`."""
    name = f"mlx_lm.models.{model}"
    compiler = Compiler(locate("mlx_lm.models").package)
    module = compiler.load(name)
    assert module is not None
    compiler.judged(module)
    if not proved:
        compiler.judgements[name] = without_proof(compiler.judgements[name])
        compiler.linked.clear()
    emitted = compiler.compile(name).emitted
    assert emitted is not None and emitted.code is not None
    if model == "rwkv7":
        assert (b"@per_length" in emitted.code) is not proved
    folder.mkdir()
    (folder / f"{model}.py").write_bytes(emitted.code)
    (folder / f"{model}.json").write_bytes(emitted.manifest)
    return folder


def put_per_length(module: Any) -> None:
    """Exchange the decorators of mixers on rows: off rows, windows are plain concatenations."""
    changed = 0
    for cls in [value for value in vars(module).values() if isinstance(value, type)]:
        call = vars(cls).get("__call__")
        if getattr(call, "__code__", None) is _ON_ROWS:
            cls.__call__ = per_length(call.__wrapped__)
            changed += 1
    assert changed, "no mixer of this file runs on rows"


@on_rows
def _anything(self: Any, x: Any) -> Any:
    raise NotImplementedError


_ON_ROWS = _anything.__code__  # what every decorated method runs


def models(options: argparse.Namespace, folder: Path) -> dict[str, nn.Module]:
    config, found = config_of(options), {}
    decorated = options.model != "rwkv7"
    for name, proved in (("rows", True), ("once per length", decorated)):
        made = compiled(options.model, folder / name.replace(" ", "_"), proved=proved)
        module = rewritten_module(config, made)
        if decorated and name != "rows":
            put_per_length(module)
        found[name] = module.Model(module.ModelArgs.from_dict(config))
        found[name].set_dtype(getattr(mx, options.dtype))
    found["once per length"].update(found["rows"].parameters())
    mx.eval(found["rows"].parameters())
    return found


def stepping(model: nn.Module, decode: int, prompts: list[int]) -> Callable[[], float]:
    """A step over sequences that decode and, anew each time, prompts; it gives the seconds until
    its graph was built."""
    blocks = sum(1 + (length + 8) // 16 for length in [*prompts, *[128] * decode])
    cache = PagedCache(model, 16, num_blocks=blocks)
    running = [cache.add_sequence() for _ in range(decode)]
    if running:
        cache.step({name: [1 + number % 50] * 3 for number, name in enumerate(running)})
        mx.eval(cache.arrays())

    def run() -> float:
        new = {cache.add_sequence(): [5] * length for length in prompts}
        start = time.perf_counter()
        logits = cache.step({**{name: [7] for name in running}, **new})
        built = time.perf_counter() - start
        mx.eval(logits, cache.arrays())
        for name in new:
            cache.free(name)
        return built

    return run


def alternate(
    runs: dict[str, Callable[[], float]], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each, in changing order, and of what the host spent on it; two rounds
    before are not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    built: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name in list(runs) if number % 2 else list(reversed(runs)):
            start = time.perf_counter()
            host = runs[name]()
            if number > 1:
                times[name].append(time.perf_counter() - start)
                built[name].append(host)
    return medians(times), medians(built)


def medians(spent: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def milliseconds(spent: dict[str, float]) -> dict[str, float]:
    return {name: round(1e3 * seconds, 3) for name, seconds in spent.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("rwkv7", "mamba2", "qwen3_next"), default="rwkv7")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--head", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--prompts", default="200,120")
    parser.add_argument("--spread", metavar="COUNT:FIRST:LAST")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    prompts = [int(part) for part in options.prompts.split(",") if part]
    if options.spread:
        count, first, last = map(int, options.spread.split(":"))
        prompts = [first + (last - first) * i // max(1, count - 1) for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        both = models(options, Path(folder))
        results = {
            what: alternate(
                {name: stepping(model, options.decode, given) for name, model in both.items()},
                options.rounds,
            )
            for what, given in (("decode only", []), ("with prompts", prompts))
            if given or options.decode
        }
    found = {
        "device": str(mx.default_device()),
        "kernels": launch.active(),
        "model": options.model,
        "hidden": options.hidden,
        "layers": options.layers,
        "decode": options.decode,
        "prompts": prompts,
        "dtype": options.dtype,
        "milliseconds": {what: milliseconds(times) for what, (times, _) in results.items()},
        "host_milliseconds": {what: milliseconds(built) for what, (_, built) in results.items()},
        "speedup": {
            what: round(times["once per length"] / times["rows"], 3)
            for what, (times, _) in results.items()
        },
    }
    print(json.dumps(found, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
