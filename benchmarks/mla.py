#!/usr/bin/env python3
"""Latent attention of a rewritten model beside mlx_lm's own, in one process, taking turns.

    python benchmarks/mla.py [--layers 4] [--heads 128] [--rank 512] [--rope 64] [--rounds 7]
                             [--decode 1x8192,16x4096,64x2048] [--prefill 2048+0,512+8192]
                             [--alone 64x2048,64x2049] [--dtype bfloat16] [--json FILE]
                             [--sweep [--rows 2,4,8,...] [--contexts 0,512,...] [--beside 0,32]]

Both run the same stack of latent attention layers, whose model is narrow so that little but the
attention is timed, on the default device. `--decode BxT`: one token for each of B sequences of T
positions. `--prefill N+T`: N tokens of one sequence that has T positions; the rewritten model is
timed as its policy decides and with each form forced. Times are medians of rounds, a layer.

`--alone BxT`: attention itself, in a chain of calls that is built before the clock runs, over
blocks in random order.

Decode is set against two bounds, measured here: an elementwise copy (GB/s of latents, queries and
outputs, each moved once) and a square matrix product (arithmetic of scores and values, all heads).
The larger time of the two is the bound, `of_bound` the share of it that is reached.

`--sweep` looks for the policy's limits instead: pieces of few and many rows that continue few and
many positions, absorbed and materialised in turn, alone and beside sequences that decode. It tells
for each context from how many rows on the materialised form is faster, and what the count of
multiplications says; `best_rows` is the `MATERIALISE_ROWS` with which the policy loses least.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models import deepseek_v3 as upstream
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache
from mlxrewrite.kernels import ops, policy
from mlxrewrite.kernels.ops import Ragged
from mlxrewrite.runtime.cache import PagedCache
from mlxrewrite.runtime.caches import KVCache as KVSpec
from mlxrewrite.runtime.load import rewritten_module
from mlxrewrite.runtime.sites import paged_mask

WIDTH = 128  # of the model around the attention
CALLS = 12  # of a chain
BESIDE = 1024  # positions of sequences that decode beside a piece


class Stack(nn.Module):
    """Attention layers with residuals; ids choose random rows."""

    def __init__(self, attention: type, arguments: Any, layers: int, mask: Callable) -> None:
        super().__init__()
        self.rows = nn.Embedding(64, WIDTH)
        self.layers = [attention(arguments) for _ in range(layers)]
        self._mask = mask

    def make_cache(self) -> list[KVSpec]:
        return [KVSpec() for _ in self.layers]

    def __call__(self, ids: mx.array, cache: list[Any]) -> mx.array:
        h = self.rows(ids)
        mask = self._mask(h, cache[0], return_array=True)
        for layer, entry in zip(self.layers, cache, strict=True):
            h = h + layer(h, mask, entry)
        return h


def arguments_of(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model_type": "deepseek_v3",
        "hidden_size": WIDTH,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads,
        "kv_lora_rank": options.rank,
        "q_lora_rank": None,
        "qk_rope_head_dim": options.rope,
        "qk_nope_head_dim": options.content,
        "v_head_dim": options.content,
        "max_position_embeddings": 1 << 17,
        "rope_scaling": None,
    }


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    mx.eval(run())
    return time.perf_counter() - start


def median(times: list[float]) -> float:
    return statistics.median(times)


def copy_rate(size: int, dtype: mx.Dtype) -> float:
    """Bytes read and written a second by an elementwise operation."""
    x = mx.zeros((size // dtype.size,), dtype)
    mx.eval(x)
    times = [seconds(lambda: x + mx.array(1, dtype)) for _ in range(8)]
    return 2 * x.nbytes / median(times[2:])


def product_rate(size: int, dtype: mx.Dtype) -> float:
    """Operations a second of a square matrix product."""
    x = mx.random.normal((size, size)).astype(dtype)
    mx.eval(x)
    times = [seconds(lambda: x @ x) for _ in range(8)]
    return 2 * size**3 / median(times[2:])


class Theirs:
    """mlx_lm's layers over its own caches: all sequences as one batch of equal lengths."""

    def __init__(self, model: Stack, sequences: int, positions: int, dtype: mx.Dtype) -> None:
        self.model, self.sequences, self.positions = model, sequences, positions
        config = model.layers[0].config
        self.cache = [KVCache() for _ in model.layers]
        for entry in self.cache if positions else ():
            shape = (sequences, 1, positions)
            entry.update_and_fetch(
                mx.random.normal((*shape, config.kv_lora_rank)).astype(dtype),
                mx.random.normal((*shape, config.qk_rope_head_dim)).astype(dtype),
            )
            mx.eval(entry.state)

    def run(self, tokens: int) -> mx.array:
        for entry in self.cache:
            entry.trim(entry.offset - self.positions)
        ids = mx.arange(self.sequences * tokens).reshape(self.sequences, tokens) % 64
        return self.model(ids, self.cache)


class Ours:
    """The rewritten layers over pages."""

    def __init__(
        self, model: Stack, sequences: int, positions: int, tokens: int, beside: int = 0
    ) -> None:
        """`beside`: sequences of 1024 positions that get one token in each step."""
        size, rows = 16, 512
        blocks = sequences * (-(-(positions + tokens) // size) + 1)
        blocks += beside * (BESIDE // size + 2)
        self.cache = PagedCache(model, size, num_blocks=blocks, rollback=tokens)
        self.lengths = {self.cache.add_sequence(): (positions, tokens) for _ in range(sequences)}
        self.lengths |= {self.cache.add_sequence(): (BESIDE, 1) for _ in range(beside)}
        for name, (length, _) in self.lengths.items():
            for start in range(0, length, rows):
                count = min(rows, length - start)
                mx.eval(self.cache.step({name: [1] * count}), self.cache.arrays())

    def run(self) -> list[mx.array]:
        new = {}
        for number, (name, (length, tokens)) in enumerate(self.lengths.items()):
            if self.cache.length(name) > length:
                self.cache.truncate(name, length)
            new[name] = [(number + i) % 64 for i in range(tokens)]
        return [self.cache.step(new), *self.cache.arrays()]

    def forced(self, materialised: bool) -> Callable[[], list[mx.array]]:
        """A step in which pieces of more than one row take one of the two forms."""

        def run() -> list[mx.array]:
            decided = policy.materialise_latents
            policy.materialise_latents = lambda rows, *_, **__: materialised and rows > 1
            try:
                return self.run()
            finally:
                policy.materialise_latents = decided

        return run


def alternate(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Times of each run, in changing order; the first two rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name in list(runs) if number % 2 else list(reversed(runs)):
            spent = seconds(runs[name])
            if number > 1:
                times[name].append(spent)
    return times


def decode(options: argparse.Namespace, models: tuple[Stack, Stack], case: str) -> dict[str, Any]:
    sequences, positions = (int(part) for part in case.split("x"))
    dtype = getattr(mx, options.dtype)
    theirs = Theirs(models[0], sequences, positions, dtype)
    ours = Ours(models[1], sequences, positions, 1)
    runs = {"mlx_lm": lambda: theirs.run(1), "mlxrewrite": ours.run}
    times = alternate(runs, options.rounds)
    recorder = ours.cache.recorder
    return {
        "case": f"decode {case}",
        **report(times, options),
        **bounds(times, options, sequences, positions + 1, options.layers),
        "recorded_steps": recorder.replayed,
        "not_recorded": recorder.lacking,
    }


def decided(options: argparse.Namespace, rows: int, positions: int) -> bool:
    """What the policy says of a piece."""
    sizes = {"rank": options.rank, "heads": options.heads, "content_dim": options.content}
    return policy.materialise_latents(rows, positions + rows, **sizes)


def sweep(options: argparse.Namespace, model: Stack) -> dict[str, Any]:
    """Both forms over rows and positions, and the smallest number of rows that suits them."""
    given = policy.MATERIALISE_ROWS
    cases = []
    for beside, positions in itertools.product(options.beside, options.contexts):
        for rows in options.rows:
            ours = Ours(model, 1, positions, rows, beside)
            runs = {"absorbed": ours.forced(False), "materialised": ours.forced(True)}
            times = alternate(runs, options.rounds)
            spent = {name: median(found) / options.layers for name, found in times.items()}
            policy.MATERIALISE_ROWS = 0
            fewer = decided(options, rows, positions)
            policy.MATERIALISE_ROWS = given
            cases.append(
                {
                    "beside": beside,
                    "positions": positions,
                    "rows": rows,
                    "us_per_layer": {name: round(t * 1e6, 1) for name, t in spent.items()},
                    "materialised_is_faster": round(spent["absorbed"] / spent["materialised"], 3),
                    "fewer_multiplications": fewer,
                    "policy": decided(options, rows, positions),
                }
            )
    limits = sorted({1, *options.rows, max(options.rows) + 1})
    losses = {limit: loss(cases, limit) for limit in limits}
    return {
        "cases": cases,
        "rows_from_which_it_is_faster": crossings(cases),
        "mean_loss_by_materialise_rows": losses,
        "best_rows": min(losses, key=lambda limit: losses[limit]),
        "materialise_rows": given,
    }


def loss(cases: list[dict[str, Any]], limit: int) -> float:
    """How much longer than the faster form the policy's takes with this limit, on the average."""
    over = []
    for case in cases:
        spent = case["us_per_layer"]
        taken = case["fewer_multiplications"] and case["rows"] >= limit
        over.append(spent["materialised" if taken else "absorbed"] / min(spent.values()) - 1)
    return round(statistics.mean(over), 4)


def crossings(cases: list[dict[str, Any]]) -> dict[str, int | None]:
    """From how many rows on the materialised form is faster, for each context; None: never."""
    found: dict[str, int | None] = {}
    ended: set[str] = set()
    for case in sorted(cases, key=lambda case: -case["rows"]):
        key = f"{case['positions']} positions beside {case['beside']}"
        found.setdefault(key, None)
        if case["materialised_is_faster"] <= 1:
            ended.add(key)
        elif key not in ended:
            found[key] = case["rows"]
    return found


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def prefill(options: argparse.Namespace, models: tuple[Stack, Stack], case: str) -> dict[str, Any]:
    tokens, positions = (int(part) for part in case.split("+"))
    dtype = getattr(mx, options.dtype)
    theirs = Theirs(models[0], 1, positions, dtype)
    ours = Ours(models[1], 1, positions, tokens)
    runs = {"mlx_lm": lambda: theirs.run(tokens), "mlxrewrite": ours.run}
    runs |= {"absorbed": ours.forced(False), "materialised": ours.forced(True)}
    times = alternate(runs, options.rounds)
    chosen = "materialised" if decided(options, tokens, positions) else "absorbed"
    return {"case": f"prefill {case}", "policy": chosen, **report(times, options)}


def report(times: dict[str, list[float]], options: argparse.Namespace) -> dict[str, Any]:
    medians = {name: median(values) / options.layers for name, values in times.items()}
    return {
        "us_per_layer": {name: round(value * 1e6, 1) for name, value in medians.items()},
        "speedup": round(medians["mlx_lm"] / medians["mlxrewrite"], 3),
        "all_us": {
            name: [round(value * 1e6 / options.layers, 1) for value in values]
            for name, values in times.items()
        },
    }


def alone(options: argparse.Namespace, case: str) -> dict[str, Any]:
    """The absorbed form's kernels over latents of equally long sequences."""
    sequences, positions = (int(part) for part in case.split("x"))
    dtype, width, block = getattr(mx, options.dtype), options.rank + options.rope, 16
    each = -(-positions // block)
    order = np.random.default_rng(0).permutation(sequences * each).reshape(sequences, each)
    pool = ops.new_pool(
        num_blocks=sequences * each,
        block_size=block,
        kv_heads=1,
        key_dim=width,
        value_dim=None,
        dtype=dtype,
    )
    latents = mx.random.normal(pool.keys.shape).astype(dtype)
    pool = replace(pool, keys=latents)
    ragged = Ragged.build([1] * sequences, [positions] * sequences, order.tolist(), block)
    queries = mx.random.normal((sequences, options.heads, width)).astype(dtype)
    mx.eval(latents, queries)
    spent = []
    for _ in range(options.rounds + 2):
        made = []
        for _ in range(CALLS):
            out, pool = ops.attention(
                queries, pool, ragged, scale=width**-0.5, value_dim=options.rank
            )
            made.append(out)
        mx.synchronize()
        spent.append(seconds(lambda made=made: made) / CALLS)
    times = {"attention": spent[2:]}
    found = bounds(times, options, sequences, positions)
    return {"case": f"alone {case}", "us": round(median(spent[2:]) * 1e6, 1), **found}


def bounds(
    times: dict[str, list[float]],
    options: argparse.Namespace,
    sequences: int,
    positions: int,
    layers: int = 1,
) -> dict[str, Any]:
    entries, size = sequences * positions, getattr(mx, options.dtype).size
    held = entries * (options.rank + options.rope) * size
    rows = sequences * options.heads * (2 * options.rank + options.rope) * size
    work = 2 * entries * options.heads * (2 * options.rank + options.rope)
    by_bytes, by_work = (held + rows) / options.copy, work / options.product
    found: dict[str, Any] = {"bound": "bytes" if by_bytes > by_work else "arithmetic"}
    for name, values in times.items():
        spent = median(values) / layers
        found[name] = {
            "latent_gb_per_s": round(held / spent / 1e9, 1),
            "of_copy": round(by_bytes / spent, 3),
            "latents_of_copy": round(held / options.copy / spent, 3),
            "tflop_per_s": round(work / spent / 1e12, 2),
            "of_bound": round(max(by_bytes, by_work) / spent, 3),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--rope", type=int, default=64)
    parser.add_argument("--content", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--decode", default="1x8192,16x4096,64x2048")
    parser.add_argument("--alone", default="1x8192,16x4096,64x2048,64x4096")
    parser.add_argument("--prefill", default="2048+0,512+8192,64+8192")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--copy-bytes", type=int, default=1 << 30)
    parser.add_argument("--product", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sweep", action="store_true", help="measure the policy's limits instead")
    parser.add_argument("--rows", type=numbers, default=numbers("2,4,8,12,16,24,32,64,128,256"))
    parser.add_argument("--contexts", type=numbers, default=numbers("0,512,2048,8192"))
    parser.add_argument("--beside", type=numbers, default=numbers("0,32"))
    options = parser.parse_args()

    dtype = getattr(mx, options.dtype)
    given = arguments_of(options)
    rewritten = rewritten_module(given)
    models = tuple(
        Stack(m.DeepseekV3Attention, m.ModelArgs.from_dict(given), options.layers, mask)
        for m, mask in ((upstream, create_attention_mask), (rewritten, paged_mask))
    )
    for model in models:
        model.set_dtype(dtype)
        model.eval()
    models[1].update(models[0].parameters())
    mx.eval(models[0].parameters())
    about = {
        "device": str(mx.default_device()),
        "layers": options.layers,
        "heads": options.heads,
        "rank": options.rank,
        "rope": options.rope,
        "content": options.content,
        "dtype": options.dtype,
    }
    result = about | (sweep(options, models[1]) if options.sweep else measure(options, models))
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace, models: tuple[Stack, Stack]) -> dict[str, Any]:
    """All cases beside mlx_lm's layers, and the device's two rates."""
    dtype = getattr(mx, options.dtype)
    options.copy = copy_rate(options.copy_bytes, dtype)
    options.product = product_rate(options.product, dtype)
    results = [decode(options, models, case) for case in options.decode.split(",") if case]
    results += [alone(options, case) for case in options.alone.split(",") if case]
    results += [prefill(options, models, case) for case in options.prefill.split(",") if case]
    return {
        "copy_gb_per_s": round(options.copy / 1e9, 1),
        "product_tflop_per_s": round(options.product / 1e12, 2),
        "results": results,
    }


if __name__ == "__main__":
    sys.exit(main())
