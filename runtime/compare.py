"""Run the original and the rewritten model over one schedule and compare all their logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from .batch import logits_of
from .cache import PagedCache
from .schedule import Schedule

Chunking = Literal["same", "whole", "tokens"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences over all rows of a schedule.

    `max_delta` is the largest absolute difference of two logits, `spread` the standard deviation
    and `peak` the largest absolute value of the original's logits, `disagreeing` the number of rows
    whose greedy token differs. `finite` is false where a logit is NaN or infinite; minus infinity
    is allowed where the original has it too.
    """

    rows: int
    max_delta: float
    spread: float
    peak: float
    disagreeing: int
    finite: bool

    def within(self, tolerance: float) -> bool:
        """Whether the two agree up to `tolerance` times the spread of the logits."""
        good = self.finite and self.spread > 0 and self.disagreeing == 0
        return good and self.max_delta <= tolerance * self.spread


def original_logits(model: Any, schedule: Schedule, chunking: Chunking) -> list[np.ndarray]:
    """Each sequence's logits [length, V] from the original model with its own caches.

    "same" feeds the chunks of the schedule, "whole" everything up to the first single token at
    once, "tokens" one token at a time.
    """
    results = []
    for name in range(schedule.num_sequences):
        cache = make_prompt_cache(model)
        rows = []
        for chunk in _chunked(schedule.chunks(name), chunking):
            logits = logits_of(model(mx.array([chunk]), cache=cache))[0].astype(mx.float32)
            mx.eval(logits, [entry.state for entry in cache])
            rows.append(np.array(logits))
        results.append(np.concatenate(rows))
    return results


def _chunked(chunks: list[tuple[int, ...]], chunking: Chunking) -> Iterator[tuple[int, ...]]:
    if chunking == "same":
        yield from chunks
    elif chunking == "tokens":
        for chunk in chunks:
            yield from ((token,) for token in chunk)
    else:
        decode = len(chunks)
        while decode > 1 and len(chunks[decode - 1]) == 1:
            decode -= 1
        yield tuple(token for chunk in chunks[:decode] for token in chunk)
        yield from chunks[decode:]


def rewritten_logits(
    cache: PagedCache, schedule: Schedule, progress: Callable[[int], None] | None = None
) -> list[np.ndarray]:
    """Each sequence's logits [length, V] from the rewritten model, as one ragged batch per step."""
    names: dict[int, int] = {}
    rows: list[list[np.ndarray]] = [[] for _ in range(schedule.num_sequences)]
    for number, step in enumerate(schedule.steps):
        for name, _ in step.parts:
            if name not in names:
                names[name] = cache.add_sequence()
        tokens = {names[name]: new for name, new in step.parts}
        logits = cache.step(tokens, logit_rows="all").astype(mx.float32)
        mx.eval(logits, cache.arrays())
        values, start = np.array(logits), 0
        for name, new in step.parts:
            rows[name].append(values[start : start + len(new)])
            start += len(new)
        for name in step.leaving:
            cache.free(names.pop(name))
        if progress is not None:
            progress(number + 1)
    return [np.concatenate(parts) for parts in rows]


def compare(original: list[np.ndarray], rewritten: list[np.ndarray]) -> Comparison:
    """Compare two lists of logits [length, V], one of each sequence."""
    left, right = np.concatenate(original), np.concatenate(rewritten)
    barred = np.isneginf(left)  # tokens that a model never gives
    known = np.isfinite(left)
    finite = bool((known | barred).all() and (np.isfinite(right) | barred).all())
    finite = finite and bool((np.isneginf(right) == barred).all()) and bool(known.any())
    delta = float(np.abs(left[known] - right[known]).max()) if finite else float("nan")
    disagreeing = int((left.argmax(axis=-1) != right.argmax(axis=-1)).sum())
    spread = float(left.std(axis=-1, where=known).mean()) if finite else float("nan")
    peak = float(np.abs(left[known]).max()) if finite else float("nan")
    return Comparison(left.shape[0], delta, spread, peak, disagreeing, finite)
