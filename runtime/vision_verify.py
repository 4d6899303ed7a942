"""`verify` for models of mlx_vlm: the original, one sequence at a time, against a mixed batch.

The reference follows mlx_vlm's generation: `get_input_embeddings` on the whole prompt, the language
model on all of it with its own caches, then one token at a time. The rewritten model runs all
prompts at once, with and without images, in chunks where it can.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_vlm import utils as upstream
from mlx_vlm.models import cache as own_caches

from .cache import PagedCache
from .compare import Comparison, compare
from .errors import BadModel
from .load import BROKEN, said
from .manifest import Manifest
from .verify import LONGEST, TOLERANCE, _windows
from .vision import Prepared, VisionModel, own, state_places
from .vision_rows import equally_wide, stacked
from .weights import randomise


@dataclass(frozen=True, slots=True)
class Case:
    """One sequence: a prompt with what the processor would return, and the tokens that follow."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VisionReport:
    """The outcome: of text prompts and, where there are such, of prompts with images."""

    model: str
    route: str
    why: str
    text: Comparison
    images: Comparison | None
    read: str  # how prompts with images were read: "by rows", "alone", "whole" or nothing
    tolerance: float

    @property
    def passed(self) -> bool:
        parts = [self.text, *([self.images] if self.images is not None else [])]
        return all(part.within(self.tolerance) for part in parts)


def build(config: Mapping[str, Any], seed: int) -> nn.Module:
    """The original model of a config, as mlx_vlm's loader builds it, with random weights."""
    model = _built(config, seed)
    randomise(model, seed)
    return model


def _built(config: Mapping[str, Any], seed: int) -> nn.Module:
    given = copy.deepcopy(dict(config))
    try:
        arch, _ = upstream.get_model_and_args(given)
        given.setdefault("text_config", given.pop("llm_config", {}))
        given.setdefault("vision_config", {})
        given.setdefault("audio_config", {})
        parts = ["text", "vision", "perceiver", "projector", "audio"]
        made = arch.ModelConfig.from_dict(given)
        made = upstream.update_module_configs(made, arch, given, parts)
        mx.random.seed(seed)
        model: nn.Module = arch.Model(made)
    except BROKEN as problem:
        raise BadModel(f"the config of {config.get('model_type')!r}: {said(problem)}") from problem
    model.eval()
    return model


def verify(
    config: Mapping[str, Any] | Path,
    *,
    images: Sequence[tuple[Sequence[int], Mapping[str, Any]]] = (),
    seed: int = 0,
    generated: str | Path | None = None,
    block_size: int = 4,
    tolerance: float = TOLERANCE,
) -> VisionReport:
    """Compare all logits of a mixed batch with the original's, one sequence at a time.

    `images` are prompts with their inputs. Raises RuntimeRefusal where the config is unusable.
    """
    if isinstance(config, Path):
        config = json.loads(config.read_text())
    assert isinstance(config, Mapping)
    original = build(config, seed)
    rewritten = _built(config, seed)
    rewritten.update(original.parameters())
    model = VisionModel(rewritten, generated)
    vocabulary = _vocabulary(config, original)
    cases = _cases(config, vocabulary, seed, images)
    theirs = []
    for case in cases:
        with as_loaded(original.language_model, model.manifest):
            theirs.append(reference(original, case))
    ours, read = mixed(model, cases, seed, block_size)
    both = [np.array(part) for part in equally_wide([*map(mx.array, (*theirs, *ours))])]
    theirs, ours = both[: len(cases)], both[len(cases) :]
    text = [i for i, case in enumerate(cases) if not case.inputs]
    seen = [i for i, case in enumerate(cases) if case.inputs]
    return VisionReport(
        str(config["model_type"]),
        model.route,
        model.why,
        compare([theirs[i] for i in text], [ours[i] for i in text]),
        compare([theirs[i] for i in seen], [ours[i] for i in seen]) if seen else None,
        read,
        tolerance,
    )


@contextmanager
def as_loaded(language: nn.Module, manifest: Manifest | None) -> Iterator[None]:
    """What the language model keeps on itself, put back afterwards.

    mlx_vlm's falcon_ocr reads a text prompt with the rope deltas of the image before it: every
    sequence of the reference is the first one of its process.
    """
    places = state_places(language, manifest)
    kept = [(m, name, own(getattr(m, name, None))) for m, names in places for name in names]
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def reference(model: Any, case: Case) -> np.ndarray:
    """Logits [n, V] of the last prompt token and all that follow, as mlx_vlm generates."""
    given = dict(case.inputs)
    pixels, mask = given.pop("pixel_values", None), given.pop("mask", None)
    ids = mx.array([case.prompt], mx.int32)
    embedding = model.get_input_embeddings(ids, pixels, mask=mask, **given)
    features = {k: v for k, v in embedding.to_dict().items() if v is not None}
    embeds = features.pop("inputs_embeds")
    caches = own_caches.make_prompt_cache(model.language_model)
    output = model.language_model(ids, inputs_embeds=embeds, cache=caches, **{**given, **features})
    rows = [output.logits[:, -1]]
    for token in case.tokens:
        mx.eval(rows[-1], [entry.state for entry in caches])
        more = {
            name: value
            for name in ("cross_attention_states", "encoder_outputs")
            if (value := getattr(output, name, None)) is not None
        }
        output = model.language_model(mx.array([[token]], mx.int32), cache=caches, **more)
        rows.append(output.logits[:, -1])
    return np.array(mx.concatenate(rows).astype(mx.float32))


def mixed(
    model: VisionModel, cases: Sequence[Case], seed: int, block_size: int
) -> tuple[list[np.ndarray], str]:
    """The same logits from one ragged batch after another, sequences joining as others decode."""
    chance = random.Random(seed)
    total = sum(len(model.prepare(case.prompt, **case.inputs)) + len(case.tokens) for case in cases)
    blocks = -(-total // block_size) + 2 * len(cases)
    cache = PagedCache(model, block_size, num_blocks=blocks, poison=True, shuffle_seed=seed)
    rows: list[list[mx.array]] = [[] for _ in cases]
    waiting = list(range(len(cases)))
    names: dict[int, int] = {}
    fed: dict[int, int] = {}
    prompts: dict[int, Prepared] = {}
    whole: dict[int, bool] = {}
    read = ""
    while waiting or names:
        if waiting and len(names) < 3:
            index = waiting.pop(0)
            case = cases[index]
            prompt = prompts[index] = model.prepare(case.prompt, **case.inputs)
            whole[index] = not model.by_rows(prompt)
            if whole[index] and model.rewritten:
                names[index], logits = model.read_alone(cache, prompt)
                rows[index].append(logits)
                fed[index] = len(prompt)
                read = "alone"
            else:
                names[index] = cache.add_sequence()
                model.attach(names[index], prompt)
                fed[index] = 0
                if case.inputs:
                    read = "whole" if whole[index] else "by rows"
        tokens: dict[int, list[int]] = {}
        order = list(names)
        chance.shuffle(order)
        for index in order:
            prompt_ids, start = prompts[index].ids, fed[index]
            if start < len(prompt_ids):
                rest = len(prompt_ids) - start
                count = rest if whole[index] else chance.randint(1, min(rest, 9))
                tokens[names[index]] = prompt_ids[start : start + count]
            else:
                tokens[names[index]] = [cases[index].tokens[start - len(prompt_ids)]]
        logits = cache.step(tokens)
        mx.eval(logits, cache.arrays())
        for place, index in enumerate(order):
            fed[index] += len(tokens[names[index]])
            if fed[index] >= len(prompts[index]):
                rows[index].append(logits[place : place + 1])
            if fed[index] == len(prompts[index]) + len(cases[index].tokens):
                model.detach(names[index])
                cache.free(names.pop(index))
    return [np.array(stacked(part).astype(mx.float32)) for part in rows], read


def _cases(
    config: Mapping[str, Any],
    vocabulary: int,
    seed: int,
    images: Sequence[tuple[Sequence[int], Mapping[str, Any]]],
) -> list[Case]:
    chance = random.Random(seed)
    reach = max((w for w in _windows(config) if 2 * w + 8 <= LONGEST), default=12)
    barred = _special(config)
    plain = [token for token in range(vocabulary) if token not in barred]

    def some(count: int) -> tuple[int, ...]:
        return tuple(chance.choice(plain) for _ in range(count))

    cases = [Case(tuple(ids), some(6), inputs) for ids, inputs in images]
    for prompt, tokens in ((2 * reach + 3, 5), (max(1, reach - 2), 6), (1, 9), (reach + 1, 3)):
        cases.append(Case(some(prompt), some(tokens)))
    chance.shuffle(cases)
    return cases


def _special(config: Any) -> set[int]:
    """Ids that stand for images and the like: a text prompt has none of them."""
    found: set[int] = set()
    if isinstance(config, Mapping):
        for name, value in config.items():
            named = name.endswith(("_token_id", "_token_index", "_token"))
            if named and type(value) is int:
                found.add(value)
            elif isinstance(value, Mapping):
                found |= _special(value)
    return found


def _vocabulary(config: Mapping[str, Any], model: Any) -> int:
    nested = [value for value in config.values() if isinstance(value, dict)]
    sizes = [c["vocab_size"] for c in (config, *nested) if isinstance(c.get("vocab_size"), int)]
    caches = own_caches.make_prompt_cache(model.language_model)
    embedding = model.get_input_embeddings(mx.array([[1]], mx.int32), None)
    features = {k: v for k, v in embedding.to_dict().items() if v is not None}
    embeds = features.pop("inputs_embeds")
    output = model.language_model(
        mx.array([[1]], mx.int32), inputs_embeds=embeds, cache=caches, **features
    )
    return int(min([*sizes, output.logits.shape[-1]]))
