"""Decode several prompts at once: a finite run of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.generate import StopSequences
from mlx_lm.sample_utils import greedy_sampler

from .engine import Engine, FinishReason, Request
from .errors import RuntimeRefusal
from .quantized import GROUP_SIZE
from .sampling import LogitsProcessor, Sampler

__all__ = ["PREFILL_CHUNK", "Decoded", "Decoding", "FinishReason", "LogitsProcessor", "Sampler"]

PREFILL_CHUNK = 512  # rows of a step


@dataclass(frozen=True, slots=True)
class Decoded:
    """One token of one prompt. "stop": the token ends the sequence and is not part of its text."""

    index: int
    token: int
    finish_reason: FinishReason | None


class Decoding:
    """Iterate to get `Decoded` tokens of all prompts as they come.

    A step has at most `prefill_chunk` rows. Raises RuntimeRefusal for an empty prompt, and for one
    that does not fit with its `max_tokens` in `num_blocks` blocks. `kv_bits`, `kv_group_size`: as
    for `Engine`.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampler: Sampler | None = None,
        logits_processors: Sequence[LogitsProcessor] | None = None,
        eos_token_ids: Sequence[int] = (),
        prefill_chunk: int = PREFILL_CHUNK,
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_bits: int | None = None,
        kv_group_size: int = GROUP_SIZE,
    ) -> None:
        for what, number in (("max_tokens", max_tokens), ("prefill_chunk", prefill_chunk)):
            if number < 1:
                raise RuntimeRefusal(f"{what}: expected at least 1, got {number}")
        for index, prompt in enumerate(prompts):
            if not len(prompt):
                raise RuntimeRefusal(f"prompt {index} is empty: expected at least one token")
        self._engine = Engine(
            model,
            block_size=block_size,
            num_blocks=num_blocks,
            max_rows=prefill_chunk,
            max_running=prefill_chunk,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
        )
        stop = StopSequences([(token,) for token in eos_token_ids]) if eos_token_ids else None
        self._places: dict[int, int] = {}
        for index, prompt in enumerate(prompts):
            capacity = self._engine.capacity
            if capacity is not None and len(prompt) + max_tokens > capacity:
                raise RuntimeRefusal(
                    f"prompt {index} has {len(prompt)} tokens; with max_tokens={max_tokens} it "
                    f"needs more than the {capacity} positions that the cache has: shorten it or "
                    "raise num_blocks"
                )
            request = Request(
                prompt,
                max_tokens=max_tokens,
                sampler=sampler or greedy_sampler,
                processors=tuple(logits_processors or ()),
                stop=stop,
            )
            self._places[self._engine.add(request)] = index

    def cancel(self, index: int) -> None:
        """Stop decoding a prompt: nothing more of it is given."""
        for name, place in self._places.items():
            if place == index:
                self._engine.abort(name)

    def __iter__(self) -> Iterator[Decoded]:
        while self._engine.busy:
            step = self._engine.step()
            for event in step.tokens:
                yield Decoded(self._places[event.request], event.token, event.finish_reason)
            for failure in step.failures:
                failure.error.add_note(f"prompt {self._places[failure.request]}")
                raise failure.error
