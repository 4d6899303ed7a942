"""`verify`: the original and the rewritten model on the same weights and the same tokens.

The original runs one sequence at a time with its own caches. The rewritten model runs all of them
as ragged batches over paged caches, with blocks in random order and NaN wherever nobody wrote.
Every row's logits are compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from .batch import logits_of
from .cache import PagedCache, cache_retentions
from .compare import Chunking, Comparison, compare, original_logits, rewritten_logits
from .errors import BadModel
from .load import (
    BROKEN,
    checked_config,
    import_file,
    load_model,
    model_folder,
    module_name,
    original_module,
    read_config,
    rewritten_module,
    said,
)
from .manifest import check, generated_folder
from .schedule import Schedule, random_schedule
from .weights import randomise

TOLERANCE = 1e-4  # of the spread of the logits, in float32
LONGEST = 400  # positions; windows beyond it are reported as not reached


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of one verification.

    `reference` is how the original was fed: "same" chunks as the rewritten model, "whole" prompts,
    or single "tokens". `windows` are the window and chunk lengths found in the config and the
    caches, `unreached` those that no sequence went beyond.
    """

    model: str
    route: str
    weights: str
    seed: int
    reference: Chunking
    sequences: int
    steps: int
    longest: int
    windows: tuple[int, ...]
    unreached: tuple[int, ...]
    comparison: Comparison
    tolerance: float
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.comparison.within(self.tolerance)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "passed": self.passed}, indent=1)

    def text(self) -> str:
        """A few lines for a terminal."""
        c = self.comparison
        lines = [
            f"{self.model} ({self.route}): {'agrees' if self.passed else 'DIFFERS'}",
            f"  weights       {self.weights}, seed {self.seed}",
            f"  schedule      {self.sequences} sequences up to {self.longest} positions, "
            f"{c.rows} rows in {self.steps} steps",
            f"  reference     the original, one sequence at a time, {_FED[self.reference]}",
            f"  max |delta|   {c.max_delta:.3g} (allowed {self.tolerance:g} x spread = "
            f"{self.tolerance * c.spread:.3g})",
            f"  logits        spread {c.spread:.3g}, largest {c.peak:.3g}",
            f"  greedy        {c.rows - c.disagreeing} of {c.rows} rows agree",
        ]
        if self.windows:
            lines.append(f"  windows       {', '.join(map(str, self.windows))}")
        if self.unreached:
            lines.append(f"  not reached   {', '.join(map(str, self.unreached))}")
        return "\n".join(lines + [f"  note          {note}" for note in self.notes])


_FED = {
    "same": "in the same chunks",
    "whole": "each prompt at once",
    "tokens": "token by token",
}


def verify(
    config_or_dir: str | Path | dict[str, Any],
    *,
    seed: int = 0,
    generated: str | Path | None = None,
    source: str | Path | None = None,
    reference: Chunking = "same",
    block_size: int = 4,
    tolerance: float = TOLERANCE,
) -> Report:
    """Verify the rewritten model for a config file, a model folder or a config.

    A folder with weights is verified with them, as float32; everything else with random weights
    from the seed. `source` is the original model file where it is not one of mlx_lm's.

    Raises:
        RuntimeRefusal: a config that cannot be used, no rewritten file, no room.
    """
    where, config, folder = _read(config_or_dir)
    original, rewritten, weights = _models(config, folder, seed, generated, source)
    windows = tuple(sorted({*_windows(config), *_retained(rewritten)}))
    schedule = _schedule(_vocabulary(config, original), seed, windows, block_size)
    notes: list[str] = []
    cache = PagedCache(
        rewritten,
        block_size,
        num_blocks=schedule.peak_blocks(block_size) + 2,
        poison=True,
        shuffle_seed=seed,
    )
    try:
        theirs = original_logits(original, schedule, reference)
    except Exception as problem:
        if reference == "tokens":
            raise
        notes.append(
            f"the original fails on several tokens at once ({type(problem).__name__}: {problem}); "
            "compared token by token"
        )
        reference = "tokens"
        theirs = original_logits(original, schedule, reference)
    ours = rewritten_logits(cache, schedule)
    result = compare(theirs, ours)
    if not result.within(tolerance) and reference == "same":
        stepwise = original_logits(original, schedule, "tokens")
        if not compare(theirs, stepwise).within(tolerance):
            delta = compare(theirs, stepwise).max_delta
            notes.append(
                f"the original's own logits change by {delta:.3g} with the cutting of a prompt "
                "into chunks; the rewritten model has those of tokens that come one by one"
            )
            other = compare(stepwise, ours)
            if other.within(tolerance):
                result, reference = other, "tokens"
    name = module_name(config)
    manifest = check(generated_folder(generated), name)
    longest = max(sum(map(len, schedule.chunks(i))) for i in range(schedule.num_sequences))
    return Report(
        model=where,
        route=manifest.route,
        weights=weights,
        seed=seed,
        reference=reference,
        sequences=schedule.num_sequences,
        steps=len(schedule.steps),
        longest=longest,
        windows=windows,
        unreached=tuple(window for window in windows if window >= longest),
        comparison=result,
        tolerance=tolerance,
        notes=tuple(notes),
    )


def _read(given: str | Path | dict[str, Any]) -> tuple[str, dict[str, Any], Path | None]:
    if isinstance(given, dict):
        config = checked_config(given, Path("the config"))
        return str(config["model_type"]), config, None
    path = Path(given)
    if path.suffix == ".json" or path.is_file():
        try:
            config = json.loads(path.read_bytes())
        except OSError as problem:
            raise BadModel(f"{path}: {problem.strerror}") from None
        except ValueError as problem:
            raise BadModel(f"{path}: not valid JSON: {problem}") from None
        return path.stem, checked_config(config, path), None
    folder = model_folder(given)
    return str(given), read_config(folder), folder


def _models(
    config: dict[str, Any],
    folder: Path | None,
    seed: int,
    generated: str | Path | None,
    source: str | Path | None,
) -> tuple[nn.Module, nn.Module, str]:
    if folder is not None and any(folder.glob("model*.safetensors")):
        trust = source is not None or config.get("model_file") is not None
        pair = [
            load_model(folder, generated=generated, original=o, trust_remote_code=trust)[0]
            for o in (True, False)
        ]
        for model in pair:
            model.set_dtype(mx.float32)
        return pair[0], pair[1], str(folder)
    module = import_file(Path(source)) if source else original_module(config, folder)
    made = []
    for part in (module, rewritten_module(config, generated)):
        mx.random.seed(seed)
        try:
            # `from_dict` may change the dict, and the second model must see the same one.
            model = part.Model(part.ModelArgs.from_dict(json.loads(json.dumps(config))))
        except BROKEN as problem:
            raise BadModel(f"the config of {config['model_type']!r}: {said(problem)}") from problem
        model.eval()
        made.append(model)
    original, rewritten = made
    randomise(original, seed)
    names = [sorted(k for k, _ in tree_flatten(m.parameters())) for m in made]
    if names[0] != names[1]:
        different = sorted(set(names[0]) ^ set(names[1]))
        raise BadModel(f"original and rewritten model differ in parameters: {different[:5]}")
    rewritten.update(original.parameters())
    return original, rewritten, "random"


def _schedule(vocab_size: int, seed: int, windows: tuple[int, ...], block_size: int) -> Schedule:
    """Sequences that end before, at and well past every window that is not too long."""
    reach = max((w for w in windows if 2 * w + 8 <= LONGEST), default=4 * block_size)
    lengths = [
        (2 * reach + 3, 5),
        (max(1, reach - 2), 6),
        (1, 9),
        (reach + 1, 3),
        (block_size, block_size + 1),
    ]
    return random_schedule(seed, lengths, vocab_size, max_chunk=max(6, min(reach + 2, 24)))


def _vocabulary(config: dict[str, Any], model: nn.Module) -> int:
    """Tokens that the model knows: no more than it has logits, nor than its config says."""
    nested = [value for value in config.values() if isinstance(value, dict)]
    sizes = [c["vocab_size"] for c in (config, *nested) if isinstance(c.get("vocab_size"), int)]
    # Nothing is computed: the shape is known without.
    logits = logits_of(model(mx.array([[0]]), cache=make_prompt_cache(model)))
    return int(min([*sizes, logits.shape[-1]]))


def _windows(config: Any) -> Iterator[int]:
    """Lengths in a config, at any depth, whose names speak of windows or chunks."""
    if isinstance(config, list):
        for part in config:
            yield from _windows(part)
    elif isinstance(config, dict):
        for name, value in config.items():
            named = "window" in name or "chunk" in name
            if named and type(value) is int and value > 1:
                yield value
            elif named and isinstance(value, list):
                yield from (v for v in value if type(v) is int and v > 1)
            else:
                yield from _windows(value)


def _retained(model: nn.Module) -> Iterator[int]:
    for retention in cache_retentions(model):
        if length := retention.window or retention.chunk:
            yield length
