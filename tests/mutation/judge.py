"""Runs one mutant as it is and as compiled, and says what became of it."""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlxrewrite.runtime.batch import logits_of
from mlxrewrite.runtime.cache import PagedCache
from mlxrewrite.runtime.errors import UpstreamDifference
from mlxrewrite.runtime.schedule import Schedule, random_schedule
from mlxrewrite.runtime.weights import randomise

from .worlds import Library, Original, Rewritten

BLOCK = 4
TOLERANCE = 1e-4  # of the spread of the logits
UNIT = 2.0**-23  # of float32, in its last place
SMALL = 1e-3  # of the spread; more than that is no rounding, whatever the weights do
# Draws of weights that are one unit larger: the most that a row moves is known the better the more
# there are. Few suffice where rounding is all that differs, but for a cast to fewer bits: of a row,
# only entries next to the border of two of its values change, and most draws change none.
DRAWS = 24
OTHERS = (1009, 2003)  # added to the seed: a difference by rounding is one under all of them
SECONDS = 60  # of processor time for one mutant, all runs together

KEPT = "kept"  # token-major, equal to the changed original
MODEL = "whole model"  # refused token-major; runs once per sequence, and is equal
REFUSED = "refused"  # no output at all
LOUD = "loud"  # the rewritten model raises, or warns that the original has two answers
UNSTEADY = "unsteady"  # no row further apart than rounding moves it, under three seeds
INVALID = "invalid"  # the changed original means nothing: it raises, or gives NaN
SILENT = "SILENT"  # different, and nobody said so
BUG = "bug"  # the compiler itself failed
OUTCOMES = (KEPT, MODEL, REFUSED, LOUD, UNSTEADY, INVALID, SILENT, BUG)


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    `delta` is the largest difference of logits between the changed original and the rewritten
    model, over the spread of the logits; `effect` that between the changed and the unchanged
    original; `stepwise` that between the changed original in chunks and token by token; NaN where
    not known.
    """

    outcome: str
    route: str = ""
    reason: str = ""
    delta: float = float("nan")
    effect: float = float("nan")
    stepwise: float = float("nan")


class TooLong(Exception):
    """A mutant ran too long."""


@dataclass
class Judge:
    """Judges mutants of one entry file under one config."""

    library: Library
    entry: str
    config: dict[str, Any]
    seed: int = 0
    schedule: Schedule = field(init=False)
    weights: dict[str, mx.array] = field(init=False)
    base: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        original = Original(self.entry, {self.entry: self.library.text(self.entry)})
        model = self._model(original.module())
        randomise(model, self.seed)
        self.weights = dict(tree_flatten(model.parameters()))
        self.schedule = _schedule(self.config, self.seed)
        self.base = self._original(original, self.weights, stepwise=False)

    def of(self, texts: Mapping[str, str]) -> Verdict:
        """Judge the entry with these files in place of mlx_lm's."""
        try:
            with _limited(SECONDS):
                return self._of(texts)
        except TooLong:
            return Verdict(INVALID, reason=f"longer than {SECONDS} seconds")

    def _of(self, texts: Mapping[str, str]) -> Verdict:
        try:
            original = Original(self.entry, texts)
            model = self._model(original.module())
            weights = self._weights(model)
            theirs = self._original(original, weights, stepwise=False)
        except TooLong:
            raise
        except BaseException as problem:
            if isinstance(problem, KeyboardInterrupt):
                raise
            return Verdict(INVALID, reason=f"the original: {_said(problem)}")
        if not all(np.isfinite(rows).any(axis=-1).all() for rows in theirs):
            return Verdict(INVALID, reason="the original: not a number")
        if any(np.isnan(rows).any() or np.isposinf(rows).any() for rows in theirs):
            return Verdict(INVALID, reason="the original: not a number")
        spread = _spread(theirs)
        if not spread > 1e-6:
            return Verdict(INVALID, reason="the original: all logits equal")
        effect = _delta(self.base, theirs, spread)
        try:
            rewritten = Rewritten(self.library, self.entry, texts)
        except TooLong:
            raise
        except Exception as problem:
            return Verdict(BUG, reason=f"compiler: {_said(problem)}", effect=effect)
        compiled = rewritten.compiled
        if compiled.errors or compiled.emitted is None:
            worst = next((e for e in compiled.errors if e.act == "compiler"), None)
            if worst is not None:
                return Verdict(BUG, reason=f"{worst.slug}: {worst.message}", effect=effect)
            reason = "; ".join(f"{e.slug}: {e.message}" for e in compiled.errors)
            return Verdict(REFUSED, "error", reason, effect=effect)
        plan = compiled.emitted.plan
        slugs = [d for refusal in plan.refusals for d in refusal.diagnostics] + list(plan.notes)
        reason = "; ".join(dict.fromkeys(f"{d.slug}: {d.message}" for d in slugs))
        if compiled.emitted.code is None:
            return Verdict(REFUSED, plan.route, reason, effect=effect)
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always", UpstreamDifference)
                ours, last = self._rewritten(rewritten, weights)
        except TooLong:
            raise
        except Exception as problem:
            return Verdict(LOUD, plan.route, _said(problem), effect=effect)
        delta = max(
            _delta(theirs, ours, spread),
            _delta([r[i] for r, i in zip(theirs, self._ends(theirs), strict=True)], last, spread),
        )
        if delta <= TOLERANCE:
            outcome = MODEL if plan.route == "model" else KEPT
            return Verdict(outcome, plan.route, reason, delta, effect)
        said = next((w for w in warned if issubclass(w.category, UpstreamDifference)), None)
        if said is not None:
            return Verdict(LOUD, plan.route, str(said.message), delta, effect)
        if delta <= SMALL and self._only_rounding(original, rewritten):
            return Verdict(UNSTEADY, plan.route, reason, delta, effect)
        stepwise = self._stepwise(original, weights, theirs, spread)
        return Verdict(SILENT, plan.route, reason, delta, effect, stepwise)

    # ------------------------------------------------------------------ details

    def _only_rounding(self, original: Original, rewritten: Rewritten) -> bool:
        """Whether two models agree but for rounding, under this seed and under others.

        Other weights, tokens and chunks: a real difference does not stay below what rounding does
        to each row of each of them. What cannot be shown is no rounding.
        """
        try:
            others = [Judge(self.library, self.entry, self.config, self.seed + n) for n in OTHERS]
            return all(judge._rounds(original, rewritten) for judge in (self, *others))
        except Exception:
            return False

    def _rounds(self, original: Original, rewritten: Rewritten) -> bool:
        weights = self._weights(self._model(original.module()))
        theirs = self._original(original, weights, stepwise=False)
        ours, last = self._rewritten(rewritten, weights)
        spread = _spread(theirs)
        apart = _apart(theirs, ours, spread)
        ends = np.concatenate([[], *self._ends(theirs, counted=True)]).astype(int)
        picked = [r[i] for r, i in zip(theirs, self._ends(theirs), strict=True)]
        apart[ends] = np.maximum(apart[ends], _apart(picked, last, spread))
        if apart.max() <= TOLERANCE:
            return True
        moved = np.zeros_like(apart)
        for draw in range(DRAWS):
            moved = np.maximum(moved, self._moved(original, weights, theirs, spread, draw))
            most = min(SMALL, float(moved.max()))
            # Twice, row by row: what a few draws move is less than what rounding may.
            if apart.max() <= most and (apart <= np.maximum(2 * moved, TOLERANCE)).all():
                return True
        return False

    def _moved(
        self,
        original: Original,
        weights: dict[str, mx.array],
        theirs: list[np.ndarray],
        spread: float,
        draw: int,
    ) -> np.ndarray:
        """How far each row of the original moves if weights, chosen at random, are one unit in
        their last place larger. Float32 cannot tell two ways to compute a row apart that are
        closer."""
        mx.random.seed(draw)
        near = {
            name: w * (1 + UNIT * mx.random.randint(0, 2, w.shape).astype(w.dtype))
            if w.dtype == mx.float32
            else w
            for name, w in weights.items()
        }
        return _apart(theirs, self._original(original, near, stepwise=False), spread)

    def _model(self, module: ModuleType) -> Any:
        # `from_dict` may change the dict.
        config = json.loads(json.dumps(self.config))
        mx.random.seed(self.seed)
        model = module.Model(module.ModelArgs.from_dict(config))
        model.eval()
        return model

    def _weights(self, model: Any) -> dict[str, mx.array]:
        """Those of the unchanged model where the names and shapes are the same."""
        own = dict(tree_flatten(model.parameters()))
        if {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in self.weights.items()}:
            return self.weights
        randomise(model, self.seed)
        return dict(tree_flatten(model.parameters()))

    def _original(
        self, original: Original, weights: dict[str, mx.array], *, stepwise: bool
    ) -> list[np.ndarray]:
        """Logits of each sequence. A sequence has a module and a model of its own, so nothing that
        a file keeps beside its caches gets from one sequence into another."""
        results = []
        for name in range(self.schedule.num_sequences):
            with _bounded():
                rows = self._sequence(original, weights, name, stepwise=stepwise)
            results.append(np.concatenate(rows))
        return results

    def _sequence(
        self, original: Original, weights: dict[str, mx.array], name: int, *, stepwise: bool
    ) -> list[np.ndarray]:
        model = self._model(original.module())
        model.update(tree_unflatten(list(weights.items())))
        cache = make_prompt_cache(model)
        rows = []
        for chunk in self.schedule.chunks(name):
            for part in ((token,) for token in chunk) if stepwise else (chunk,):
                logits = logits_of(model(mx.array([part]), cache=cache))
                if logits.ndim != 3 or logits.shape[0] != 1:
                    raise ValueError(f"logits of shape {list(logits.shape)}")
                rows.append(_padded(np.array(logits[0].astype(mx.float32)), len(part)))
        return rows

    def _rewritten(
        self, rewritten: Rewritten, weights: dict[str, mx.array]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Each sequence's logits with all rows wanted, and with the last rows only."""
        with rewritten.module() as module:
            everything = self._ragged(self._fresh(module, weights), "all")
        with rewritten.module() as module:
            last = self._ragged(self._fresh(module, weights), "last")
        return everything, last

    def _fresh(self, module: ModuleType, weights: dict[str, mx.array]) -> Any:
        model = self._model(module)
        own = {k: v.shape for k, v in tree_flatten(model.parameters())}
        if own != {k: v.shape for k, v in weights.items()}:
            raise TypeError("the rewritten model has other parameters")
        model.update(tree_unflatten(list(weights.items())))
        return model

    def _ragged(self, model: Any, wanted: str) -> list[np.ndarray]:
        schedule = self.schedule
        cache = PagedCache(
            model,
            BLOCK,
            num_blocks=schedule.peak_blocks(BLOCK) + 2,
            poison=True,
            shuffle_seed=self.seed,
        )
        names: dict[int, int] = {}
        rows: list[list[np.ndarray]] = [[] for _ in range(schedule.num_sequences)]
        for step in schedule.steps:
            for name, _ in step.parts:
                if name not in names:
                    names[name] = cache.add_sequence()
            tokens = {names[name]: new for name, new in step.parts}
            logits = np.array(cache.step(tokens, logit_rows=wanted).astype(mx.float32))
            start = 0
            for name, new in step.parts:
                count = len(new) if wanted == "all" else 1
                rows[name].append(logits[start : start + count])
                start += count
            for name in step.leaving:
                cache.free(names.pop(name))
        return [np.concatenate(parts) for parts in rows]

    def _ends(self, theirs: list[np.ndarray], *, counted: bool = False) -> list[np.ndarray]:
        """The last row of each chunk of each sequence: among its rows, or counted among all."""
        starts = np.cumsum([0, *(len(rows) for rows in theirs)]) if counted else [0] * len(theirs)
        return [
            starts[name] + np.cumsum([len(c) for c in self.schedule.chunks(name)]) - 1
            for name in range(len(theirs))
        ]

    def _stepwise(
        self,
        original: Original,
        weights: dict[str, mx.array],
        theirs: list[np.ndarray],
        spread: float,
    ) -> float:
        try:
            return _delta(theirs, self._original(original, weights, stepwise=True), spread)
        except Exception:
            return float("inf")


def _padded(logits: np.ndarray, count: int) -> np.ndarray:
    """Rows that the original does not give are minus infinity, and are not compared."""
    if logits.shape[0] == count:
        return logits
    if logits.shape[0] > count:
        raise ValueError(f"{logits.shape[0]} rows of logits for {count} tokens")
    if logits.shape[0] != 1:
        raise ValueError(f"{logits.shape[0]} rows of logits for {count} tokens")
    missing = np.full((count - 1, logits.shape[1]), np.nan, dtype=np.float32)
    missing[:] = _ABSENT
    return np.concatenate([missing, logits])


_ABSENT = np.float32(-3.0e38)


def _spread(logits: list[np.ndarray]) -> float:
    rows = np.concatenate(logits)
    rows = rows[rows[:, 0] != _ABSENT]
    known = np.isfinite(rows)
    return float(rows.std(axis=-1, where=known).mean())


def _delta(left: list[np.ndarray], right: list[np.ndarray], spread: float) -> float:
    """The largest difference over the spread; infinity where one is no number and one is."""
    return float(_apart(left, right, spread).max())


def _apart(left: list[np.ndarray], right: list[np.ndarray], spread: float) -> np.ndarray:
    """The same for each row. Rows that one of them does not give are zero apart."""
    one, two = np.concatenate(left), np.concatenate(right)
    if one.shape != two.shape:
        return np.array([np.inf])
    absent = (one[:, 0] == _ABSENT) | (two[:, 0] == _ABSENT)
    barred = np.isneginf(one)
    with np.errstate(invalid="ignore", over="ignore"):
        delta = np.abs(np.where(barred, 0, one) - np.where(barred, 0, two))
    wrong = (barred != np.isneginf(two)) | ~np.isfinite(delta)
    return np.where(absent, 0, np.where(wrong, np.inf, delta).max(axis=-1) / spread)


def _schedule(config: dict[str, Any], seed: int) -> Schedule:
    """Short sequences, one of them well past the windows of the tiny configs (3 to 5)."""
    sizes = [
        c["vocab_size"]
        for c in (config, *(v for v in config.values() if isinstance(v, dict)))
        if isinstance(c.get("vocab_size"), int)
    ]
    lengths = [(14, 3), (3, 5), (1, 4), (7, 2)]
    return random_schedule(seed, lengths, min([*sizes, 96]), max_chunk=6)


def _said(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text[:200]}"


@contextmanager
def _bounded() -> Iterator[None]:
    """An embedding asked for a row past its end raises: MLX reads whatever lies there."""
    right = nn.Embedding.__call__

    def call(self: nn.Embedding, ids: mx.array) -> mx.array:
        size = self.weight.shape[0]
        if ids.size and not (-size <= ids.min().item() and ids.max().item() < size):
            raise IndexError(f"a row that an embedding of {size} rows has not")
        return right(self, ids)

    nn.Embedding.__call__ = call
    try:
        yield
    finally:
        nn.Embedding.__call__ = right


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong

    # Processor time: on a busy machine nothing may become invalid by waiting.
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
