#!/usr/bin/env python3
"""Decode speed of a rewritten model beside mlx_lm's own, in one process, taking turns.

    python benchmarks/decode.py MODEL_DIR [--tokens 64] [--prompt-tokens 64] [--rounds 5]
                                [--batch 1] [--json FILE]

Both generate greedily from the same random prompt with the same weights. Only the time between the
first and the last token counts, so the prompt does not. Each round runs both, in changing order;
the ratio is that of the medians. With `--batch N`, mlx_lm runs its `BatchGenerator`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import BatchGenerator, generate_step
from mlxrewrite.runtime.decoding import Decoding
from mlxrewrite.runtime.load import load


def upstream_tokens(model: Any, prompts: list[list[int]], count: int) -> Iterator[int]:
    """Tokens of mlx_lm: its own loop for one prompt, its batch generator for several."""
    if len(prompts) == 1:
        for token, _ in generate_step(mx.array(prompts[0]), model, max_tokens=count):
            yield int(token)
        return
    generator = BatchGenerator(model, max_tokens=count)
    generator.insert(prompts)
    while responses := generator.next_generated():
        yield from (response.token for response in responses)


def our_tokens(model: Any, prompts: list[list[int]], count: int) -> Iterator[int]:
    yield from (event.token for event in Decoding(model, prompts, max_tokens=count))


def rate(tokens: Iterator[int], batch: int) -> tuple[float, list[int]]:
    """Tokens per second from the first complete step on, and the tokens."""
    seen = [next(tokens) for _ in range(batch)]
    start = time.perf_counter()
    rest = list(tokens)
    return len(rest) / (time.perf_counter() - start), seen + rest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    theirs, _ = mlx_lm.load(str(options.model))
    ours, _ = load(options.model)
    chance = random.Random(0)
    prompts = [
        [chance.randrange(1000) for _ in range(options.prompt_tokens)] for _ in range(options.batch)
    ]
    runs = {"mlx_lm": (upstream_tokens, theirs), "mlxrewrite": (our_tokens, ours)}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    texts: dict[str, list[int]] = {}
    for number in range(options.rounds + 1):
        order = list(runs) if number % 2 else list(reversed(runs))
        for name in order:
            generator, model = runs[name]
            speed, tokens = rate(generator(model, prompts, options.tokens), options.batch)
            texts[name] = sorted(tokens)
            if number > 0:  # the first round warms up
                rates[name].append(speed)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    result = {
        "model": options.model.name,
        "device": str(mx.default_device()),
        "batch": options.batch,
        "prompt_tokens": options.prompt_tokens,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "tokens_per_second": {name: round(value, 2) for name, value in medians.items()},
        "all": {name: [round(v, 2) for v in values] for name, values in rates.items()},
        "ratio": round(medians["mlxrewrite"] / medians["mlx_lm"], 3),
        "same_tokens": texts["mlx_lm"] == texts["mlxrewrite"],
    }
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
