"""`taint` for models of mlx_vlm: tokens of text prompts, and the pixels of prompts with images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .schedule import Schedule, Step
from .taint import PROBES, Probe, TaintReport, changes, compared, paged_logits
from .verify import _retained, _schedule, _windows
from .vision import VisionModel
from .vision_verify import _cases, _special, _vocabulary, build, mixed


def taint(
    config: Mapping[str, Any] | Path,
    *,
    images: Sequence[tuple[Sequence[int], Mapping[str, Any]]] = (),
    seed: int = 0,
    generated: str | Path | None = None,
    block_size: int = 4,
    probes: int = PROBES,
) -> TaintReport:
    """Change single tokens of a ragged batch of text; then the pixels of each prompt with images.

    Changed pixels may change their own sequence alone.

    Raises:
        RuntimeRefusal: a config that cannot be used, no rewritten file, no room.
    """
    if isinstance(config, Path):
        config = json.loads(config.read_text())
    assert isinstance(config, Mapping)
    original = build(config, seed)
    rewritten = build(config, seed)
    rewritten.update(original.parameters())
    model, single = VisionModel(rewritten, generated), VisionModel(original, generated, whole=True)
    vocabulary = _vocabulary(config, original)
    barred = _special(config)  # of images: a text has none
    words = [token for token in range(vocabulary) if token not in barred]
    windows = tuple(sorted({*_windows(config), *_retained(model)}))
    schedule = _schedule(len(words), seed, windows, block_size)

    def run(schedule: Schedule) -> list[np.ndarray]:
        return paged_logits(model, _spoken(schedule, words), block_size, seed)

    def alone(schedule: Schedule, sequence: int) -> np.ndarray:
        parts = tuple(Step(((0, chunk),)) for chunk in schedule.chunks(sequence))
        return paged_logits(single, _spoken(Schedule(parts, 1), words), block_size, seed)[0]

    name = str(config["model_type"])
    report = compared(name, run, schedule, len(words), seed, probes, alone)
    pixels = _pixels(model, config, vocabulary, seed, block_size, images) if images else ()
    return replace(report, probes=(*report.probes, *pixels))


def _spoken(schedule: Schedule, words: Sequence[int]) -> Schedule:
    """The schedule with the ids of the words that it counts."""
    steps = []
    for step in schedule.steps:
        parts = tuple((name, tuple(words[t] for t in tokens)) for name, tokens in step.parts)
        steps.append(Step(parts, step.leaving))
    return Schedule(tuple(steps), schedule.num_sequences)


def _pixels(
    model: VisionModel,
    config: Mapping[str, Any],
    vocabulary: int,
    seed: int,
    block_size: int,
    images: Sequence[tuple[Sequence[int], Mapping[str, Any]]],
) -> Sequence[Probe]:
    """One probe for each prompt with images: its floating inputs with another sign."""
    cases = _cases(config, vocabulary, seed, images)
    before, _ = mixed(model, cases, seed, block_size)
    found = []
    for index, case in enumerate(cases):
        given = {k: v for k, v in case.inputs.items() if isinstance(v, mx.array)}
        turned = {k: -v for k, v in given.items() if mx.issubdtype(v.dtype, mx.floating)}
        if not turned:
            continue
        other = replace(case, inputs={**case.inputs, **turned})
        after, _ = mixed(model, [*cases[:index], other, *cases[index + 1 :]], seed, block_size)
        deltas = [float(d.max()) for d in changes(before, after)]
        others = max((d for i, d in enumerate(deltas) if i != index), default=0.0)
        found.append(Probe(index, -1, deltas[index], 0.0, 0.0, others))
    return found
