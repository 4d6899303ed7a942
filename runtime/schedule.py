"""Random ragged schedules: sequences that join, prefill in chunks, decode and leave."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens for some sequences, in this order, and the sequences that leave afterwards."""

    parts: tuple[tuple[int, tuple[int, ...]], ...]
    leaving: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(len(tokens) for _, tokens in self.parts)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps over sequences 0 .. num_sequences - 1; a sequence joins when it first has tokens."""

    steps: tuple[Step, ...]
    num_sequences: int

    def chunks(self, sequence: int) -> list[tuple[int, ...]]:
        """The sequence's tokens, as they come step by step."""
        return [tokens for step in self.steps for name, tokens in step.parts if name == sequence]

    def peak_blocks(self, block_size: int) -> int:
        """Blocks that hold all present sequences at the fullest step, if nothing is dropped."""
        lengths: dict[int, int] = {}
        peak = 0
        for step in self.steps:
            for name, tokens in step.parts:
                lengths[name] = lengths.get(name, 0) + len(tokens)
            peak = max(peak, sum(-(-length // block_size) for length in lengths.values()))
            for name in step.leaving:
                del lengths[name]
        return peak


def random_schedule(
    seed: int, lengths: Sequence[tuple[int, int]], vocab_size: int, max_chunk: int
) -> Schedule:
    """Sequences of (prompt, generated) lengths, their tokens at random.

    Prompts come in chunks of 1 to `max_chunk` tokens, the rest one at a time; about half of the
    sequences are present at a time, in a changing order, and some sit out a step.
    """
    chance = random.Random(seed)
    waiting = [
        (name, _chunks(chance, prompt, generated, vocab_size, max_chunk))
        for name, (prompt, generated) in enumerate(lengths)
    ]
    together = max(2, (len(lengths) + 1) // 2)
    present: list[tuple[int, list[tuple[int, ...]]]] = []
    steps = []
    while waiting or present:
        while waiting and len(present) < together:
            present.append(waiting.pop(0))
        chosen = [part for part in present if chance.random() < 0.8] or [chance.choice(present)]
        chance.shuffle(chosen)
        parts = tuple((name, chunks.pop(0)) for name, chunks in chosen)
        leaving = tuple(name for name, chunks in chosen if not chunks)
        present = [part for part in present if part[1]]
        steps.append(Step(parts, leaving))
    return Schedule(tuple(steps), len(lengths))


def _chunks(
    chance: random.Random, prompt: int, generated: int, vocab_size: int, max_chunk: int
) -> list[tuple[int, ...]]:
    def some(count: int) -> tuple[int, ...]:
        return tuple(chance.randrange(vocab_size) for _ in range(count))

    chunks = []
    while prompt > 0:
        count = chance.randint(1, min(prompt, max_chunk))
        chunks.append(some(count))
        prompt -= count
    return chunks + [some(1) for _ in range(generated)]
