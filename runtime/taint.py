"""`verify --taint`: change one token of a ragged batch and see which rows of logits change.

The compiler proves that rows do not mix outside recognised sites; this looks at a running model
whether they do. Allowed to change are the rows of the same sequence from that position on, and the
changed row itself must. Everything else must stay as it was, up to what a different order of
additions does.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .cache import PagedCache
from .compare import original_logits, rewritten_logits
from .schedule import Schedule, Step
from .verify import TOLERANCE, _models, _read, _retained, _schedule, _vocabulary, _windows

PROBES = 4


@dataclass(frozen=True, slots=True)
class Probe:
    """One changed token and the largest change of logits it made.

    `position` is -1 where the pixels of a prompt were changed, not a token; `own` is then that of
    all its rows. Otherwise `own` is that of its own row, `later` of later rows of its sequence,
    `earlier` of earlier ones, `others` of rows of other sequences. `ahead` is how much the
    original's earlier rows change in the same chunks, asked only where ours do: some models see the
    rest of a chunk.
    """

    sequence: int
    position: int
    own: float
    later: float
    earlier: float
    others: float
    ahead: float = 0.0


@dataclass(frozen=True, slots=True)
class TaintReport:
    """The outcome for one model. `allowed` is how much a row may change that must not."""

    model: str
    rows: int
    probes: tuple[Probe, ...]
    allowed: float

    @property
    def passed(self) -> bool:
        return bool(self.probes) and all(
            probe.own > self.allowed
            and (probe.earlier <= self.allowed or probe.ahead > self.allowed)
            and probe.others <= self.allowed
            for probe in self.probes
        )

    @property
    def looks_ahead(self) -> bool:
        """Rows see later ones of their chunk, as they do in the original."""
        return any(probe.earlier > self.allowed for probe in self.probes) and self.passed

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "passed": self.passed}, indent=1)

    def text(self) -> str:
        lines = [f"{self.model}: {'rows are independent' if self.passed else 'ROWS MIX'}"]
        lines.append(f"  rows          {self.rows}, allowed change {self.allowed:.3g}")
        for p in self.probes:
            what = "pixels" if p.position < 0 else f"token {p.position}"
            lines.append(
                f"  {what} of sequence {p.sequence}: own {p.own:.3g}, later "
                f"{p.later:.3g}, earlier {p.earlier:.3g}, others {p.others:.3g}"
            )
        if self.looks_ahead:
            lines.append("  the original's rows see later ones of their chunk, too")
        return "\n".join(lines)


def taint(
    config_or_dir: str | Path | dict[str, Any],
    *,
    seed: int = 0,
    generated: str | Path | None = None,
    source: str | Path | None = None,
    block_size: int = 4,
    probes: int = PROBES,
) -> TaintReport:
    """Change single tokens of a random ragged schedule of the rewritten model.

    Raises:
        RuntimeRefusal: a config that cannot be used, no rewritten file, no room.
    """
    where, config, folder = _read(config_or_dir)
    original, rewritten, _ = _models(config, folder, seed, generated, source)
    windows = tuple(sorted({*_windows(config), *_retained(rewritten)}))
    vocabulary = _vocabulary(config, original)
    schedule = _schedule(vocabulary, seed, windows, block_size)
    return spread(where, rewritten, schedule, vocabulary, seed, block_size, probes, original)


def spread(
    name: str,
    model: Any,
    schedule: Schedule,
    vocabulary: int,
    seed: int = 0,
    block_size: int = 4,
    probes: int = PROBES,
    original: Any = None,
) -> TaintReport:
    """Run the schedule as it is and with each of `probes` tokens changed.

    Where earlier rows change the `original`, if there is one, is asked whether its rows do.
    """

    def alone(schedule: Schedule, sequence: int) -> np.ndarray:
        return original_logits(original, schedule, "same")[sequence]

    def run(schedule: Schedule) -> list[np.ndarray]:
        return paged_logits(model, schedule, block_size, seed)

    given = alone if original is not None else None
    return compared(name, run, schedule, vocabulary, seed, probes, given)


def compared(
    name: str,
    run: Callable[[Schedule], list[np.ndarray]],
    schedule: Schedule,
    vocabulary: int,
    seed: int,
    probes: int,
    alone: Callable[[Schedule, int], np.ndarray] | None,
) -> TaintReport:
    """`spread` of what gives the logits of a schedule; `alone` those of one sequence's original."""
    chance = random.Random(seed)
    before = run(schedule)
    allowed = TOLERANCE * spread_of(before)
    found = []
    for _ in range(probes):
        sequence = chance.randrange(schedule.num_sequences)
        position = chance.randrange(len(before[sequence]))
        other = _changed(schedule, sequence, position, vocabulary)
        deltas = changes(before, run(other))
        own = deltas[sequence]
        others = [float(d.max()) for i, d in enumerate(deltas) if i != sequence]
        earlier, ahead = float(own[:position].max(initial=0)), 0.0
        if earlier > allowed and alone is not None:
            (delta,) = changes([alone(schedule, sequence)], [alone(other, sequence)])
            ahead = float(delta[:position].max(initial=0))
        found.append(
            Probe(
                sequence,
                position,
                float(own[position]),
                float(own[position + 1 :].max(initial=0)),
                earlier,
                max(others, default=0.0),
                ahead,
            )
        )
    return TaintReport(name, sum(map(len, before)), tuple(found), allowed)


def spread_of(logits: list[np.ndarray]) -> float:
    """The standard deviation of all finite logits."""
    rows = np.concatenate(logits)
    return float(rows[np.isfinite(rows)].std())


def changes(before: list[np.ndarray], after: list[np.ndarray]) -> list[np.ndarray]:
    """The largest change in each row of each sequence."""
    return [_change(a, b) for a, b in zip(before, after, strict=True)]


def _change(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """The largest change in each row; infinite where a logit became finite or ceased to be."""
    same = np.isfinite(one) == np.isfinite(two)
    both = np.isfinite(one) & np.isfinite(two)
    delta = np.where(both, np.abs(np.where(both, one, 0) - np.where(both, two, 0)), 0)
    result: np.ndarray = np.where(same.all(axis=-1), delta.max(axis=-1), np.inf)
    return result


def paged_logits(model: Any, schedule: Schedule, block_size: int, seed: int) -> list[np.ndarray]:
    """Each sequence's logits from a model over shuffled pages with NaN in free ones."""
    blocks = schedule.peak_blocks(block_size) + 2
    cache = PagedCache(model, block_size, num_blocks=blocks, poison=True, shuffle_seed=seed)
    return rewritten_logits(cache, schedule)


def _changed(schedule: Schedule, sequence: int, position: int, vocabulary: int) -> Schedule:
    """The schedule with another token at one position of one sequence."""
    steps = []
    seen = 0
    for step in schedule.steps:
        parts = []
        for name, tokens in step.parts:
            new = tokens
            if name == sequence:
                if seen <= position < seen + len(tokens):
                    at = position - seen
                    other = (tokens[at] + 1) % vocabulary
                    new = (*tokens[:at], other, *tokens[at + 1 :])
                seen += len(tokens)
            parts.append((name, new))
        steps.append(Step(tuple(parts), step.leaving))
    return Schedule(tuple(steps), schedule.num_sequences)
