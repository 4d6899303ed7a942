#!/usr/bin/env python3
"""RWKV-7 on rows beside the same file once per length, in steps that decode and read prompts.

    python benchmarks/rows.py [--hidden 1024] [--layers 4] [--decode 32] [--prompts 200,120]
                              [--rounds 7] [--dtype bfloat16] [--json FILE]

Both forms come from the compiler: what it writes, and what it would write if the rest of the file
were not proved to treat rows alone. Weights are random and the same. A step gives one token to each
of `--decode` sequences and reads prompts of `--prompts` tokens, one more sequence each; `decode
only` leaves those away. Medians of rounds in which both forms run, in changing order.
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
from mlxrewrite.sources import locate

NAME = "mlx_lm.models.rwkv7"


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    low = max(8, options.hidden // 16)
    return {
        "model_type": "rwkv7",
        "vocab_size": 512,
        "hidden_size": options.hidden,
        "intermediate_size": 4 * options.hidden,
        "norm_eps": 1e-5,
        "head_dim": options.head,
        "num_hidden_layers": options.layers,
        "a_low_rank_dim": low,
        "v_low_rank_dim": low,
        "gate_low_rank_dim": low,
        "decay_low_rank_dim": low,
    }


def compiled(folder: Path, *, proved: bool) -> Path:
    """A folder with the rewritten file, as if its proof had failed if not `proved`."""
    compiler = Compiler(locate("mlx_lm.models").package)
    module = compiler.load(NAME)
    assert module is not None
    compiler.judged(module)
    if not proved:
        compiler.judgements[NAME] = without_proof(compiler.judgements[NAME])
        compiler.linked.clear()
    emitted = compiler.compile(NAME).emitted
    assert emitted is not None and emitted.code is not None
    assert (b"@per_length" in emitted.code) is not proved
    folder.mkdir()
    (folder / "rwkv7.py").write_bytes(emitted.code)
    (folder / "rwkv7.json").write_bytes(emitted.manifest)
    return folder


def models(options: argparse.Namespace, folder: Path) -> dict[str, nn.Module]:
    config, found = config_of(options), {}
    for name, proved in (("rows", True), ("once per length", False)):
        module = rewritten_module(config, compiled(folder / name.replace(" ", "_"), proved=proved))
        found[name] = module.Model(module.ModelArgs.from_dict(config))
        found[name].set_dtype(getattr(mx, options.dtype))
    found["once per length"].update(found["rows"].parameters())
    mx.eval(found["rows"].parameters())
    return found


def stepping(model: nn.Module, decode: int, prompts: list[int]) -> Callable[[], None]:
    """A step over sequences that decode and, anew each time, prompts."""
    cache = PagedCache(model, 16, num_blocks=8)
    running = [cache.add_sequence() for _ in range(decode)]
    cache.step({name: [1 + number % 50] * 3 for number, name in enumerate(running)})
    mx.eval(cache.arrays())

    def run() -> None:
        new = {cache.add_sequence(): [5] * length for length in prompts}
        logits = cache.step({**{name: [7] for name in running}, **new})
        mx.eval(logits, cache.arrays())
        for name in new:
            cache.free(name)

    return run


def alternate(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in changing order; two rounds before are not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name in list(runs) if number % 2 else list(reversed(runs)):
            start = time.perf_counter()
            runs[name]()
            if number > 1:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(spent) for name, spent in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--head", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--prompts", default="200,120")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    prompts = [int(part) for part in options.prompts.split(",") if part]
    with tempfile.TemporaryDirectory() as folder:
        both = models(options, Path(folder))
        results = {
            what: alternate(
                {name: stepping(model, options.decode, given) for name, model in both.items()},
                options.rounds,
            )
            for what, given in (("decode only", []), ("with prompts", prompts))
        }
    found = {
        "device": str(mx.default_device()),
        "kernels": launch.active(),
        "hidden": options.hidden,
        "layers": options.layers,
        "decode": options.decode,
        "prompts": prompts,
        "dtype": options.dtype,
        "milliseconds": {
            what: {name: round(1e3 * spent, 3) for name, spent in times.items()}
            for what, times in results.items()
        },
        "speedup": {
            what: round(times["once per length"] / times["rows"], 3)
            for what, times in results.items()
        },
    }
    print(json.dumps(found, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
