"""Decode several prompts at once: chunked prefill mixed with decode, one ragged step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler

from .cache import PagedCache, cache_retentions
from .caches import Retention
from .errors import RuntimeRefusal

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
FinishReason = Literal["stop", "length"]

PREFILL_CHUNK = 512  # rows of a step
MOST_POSITIONS = 16384  # of a pool whose size nobody chose; prompts beyond it wait their turn
CLEAR_EVERY = 256  # steps


@dataclass(frozen=True, slots=True)
class Decoded:
    """One token of one prompt. "stop": the token ends the sequence and is not part of its text."""

    index: int
    token: int
    finish_reason: FinishReason | None


@dataclass(slots=True, eq=False)
class _Request:
    index: int
    prompt: list[int]
    sequence: int = -1
    fed: int = 0  # tokens of the prompt that are in the cache
    sampled: int = 0  # tokens sampled, by steps under way too
    given: int = 0  # tokens handed out
    done: bool = False
    history: mx.array | None = None  # for logits processors: all tokens before the next one

    @property
    def prefilled(self) -> bool:
        return self.fed == len(self.prompt)


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """A step that was launched: the requests that got a token, and those tokens [S]."""

    requests: tuple[_Request, ...]
    tokens: mx.array | None
    arrays: list[mx.array]


class Decoding:
    """Iterate to get `Decoded` tokens of all prompts as they come.

    A step has at most `prefill_chunk` rows: one for each prompt that is being continued, the rest
    for prompts that are being read. A prompt starts when there are blocks for all of it and
    `max_tokens` more, so none ever has to be interrupted. The graph of a step is built while the
    step before it is computed, and evaluated after that: its writes are then in place.
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
    ) -> None:
        for what, number in (("max_tokens", max_tokens), ("prefill_chunk", prefill_chunk)):
            if number < 1:
                raise RuntimeRefusal(f"{what}: expected at least 1, got {number}")
        for index, prompt in enumerate(prompts):
            if not len(prompt):
                raise RuntimeRefusal(f"prompt {index} is empty: expected at least one token")
        self._max_tokens = max_tokens
        self._sampler: Sampler = sampler or greedy_sampler
        self._processors = tuple(logits_processors or ())
        self._eos = frozenset(eos_token_ids)
        self._chunk = prefill_chunk
        self._block_size = block_size
        self._waiting = [_Request(i, list(prompt)) for i, prompt in enumerate(prompts)]
        self._active: list[_Request] = []
        sizes = self._pool_sizes(model, num_blocks)
        self._cache = PagedCache(model, block_size, num_blocks=sizes)

    def cancel(self, index: int) -> None:
        """Stop decoding a prompt: nothing more of it is given."""
        self._waiting = [request for request in self._waiting if request.index != index]
        for request in self._active:
            if request.index == index:
                self._finish(request)

    def __iter__(self) -> Iterator[Decoded]:
        flight: _Flight | None = None
        steps = 0
        while True:
            following = self._launch(flight)
            if flight is not None:
                yield from self._land(flight)
            if following is None:
                if not self._active and not self._waiting:
                    return
            else:
                mx.async_eval(following.arrays)  # type: ignore[no-untyped-call]
                steps += 1
                if steps % CLEAR_EVERY == 0:
                    mx.clear_cache()
            flight = following

    # ------------------------------------------------------------------ steps

    def _launch(self, before: _Flight | None) -> _Flight | None:
        """Build the graph of the next step; nothing is computed yet."""
        tokens: dict[int, Sequence[int] | mx.array] = {}
        wanted: dict[int, list[int]] = {}
        sampling: list[_Request] = []
        for request in self._active:
            if request.prefilled and not request.done and request.sampled < self._max_tokens:
                assert before is not None and before.tokens is not None
                place = before.requests.index(request)
                tokens[request.sequence] = before.tokens[place : place + 1]
                wanted[request.sequence] = [0]
                sampling.append(request)
        rest = max(self._chunk - len(sampling), 1)
        prefilling = False
        while rest > 0 and (reading := self._next_to_read()) is not None:
            part = reading.prompt[reading.fed : reading.fed + rest]
            tokens[reading.sequence] = part
            reading.fed += len(part)
            rest -= len(part)
            prefilling = True
            if reading.prefilled:
                wanted[reading.sequence] = [len(part) - 1]
                sampling.append(reading)
        if not tokens:
            return None
        logits = self._cache.step(tokens, logit_rows=wanted)
        sampled = self._sample(logits, sampling, before) if sampling else None
        for request in sampling:
            request.sampled += 1
        arrays = self._cache.arrays(states=prefilling)
        if sampled is not None:
            arrays.append(sampled)
        return _Flight(tuple(sampling), sampled, arrays)

    def _next_to_read(self) -> _Request | None:
        """A prompt that still has tokens to read, a new one if there is room for it."""
        for request in self._active:
            if not request.prefilled:
                return request
        if not self._waiting or not self._room(self._waiting[0]):
            return None
        request = self._waiting.pop(0)
        request.sequence = self._cache.add_sequence()
        self._active.append(request)
        return request

    def _sample(
        self, logits: mx.array, requests: list[_Request], before: _Flight | None
    ) -> mx.array:
        """The next token of each row of logits [S, V]: int [S]."""
        if self._processors:
            rows = []
            for place, request in enumerate(requests):
                if request.history is None:
                    request.history = mx.array(request.prompt)
                else:
                    assert before is not None and before.tokens is not None
                    at = before.requests.index(request)
                    latest = before.tokens[at : at + 1].astype(request.history.dtype)
                    request.history = mx.concatenate([request.history, latest])
                row = logits[place : place + 1]
                for processor in self._processors:
                    row = processor(request.history, row)
                rows.append(row)
            logits = mx.concatenate(rows)
        return self._sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    def _land(self, flight: _Flight) -> Iterator[Decoded]:
        """Wait for a step and give its tokens."""
        if flight.tokens is None:
            # Not by the pools: the next step's writes have replaced them in the meantime.
            mx.synchronize()
            return
        values: list[int] = flight.tokens.tolist()  # type: ignore[assignment]
        for request, token in zip(flight.requests, values, strict=True):
            if request.done:  # it ended while this step was under way
                continue
            request.given += 1
            reason: FinishReason | None = None
            if token in self._eos:
                reason = "stop"
            elif request.given == self._max_tokens:
                reason = "length"
            if reason is not None:
                self._finish(request)
            yield Decoded(request.index, token, reason)

    # ----------------------------------------------------------------- blocks

    def _pool_sizes(self, model: Any, num_blocks: int | None) -> dict[Retention, int]:
        """Blocks of each group of layers; refuses a prompt that could never run."""
        sizes = {}
        for retention in cache_retentions(model):
            needs = [self._need(retention, request) for request in self._waiting]
            most = max(needs, default=1)
            if num_blocks is None:
                sizes[retention] = max(most, min(sum(needs), MOST_POSITIONS // self._block_size))
                continue
            if most > num_blocks:
                request = self._waiting[needs.index(most)]
                raise RuntimeRefusal(
                    f"prompt {request.index} has {len(request.prompt)} tokens; with max_tokens="
                    f"{self._max_tokens} it needs {most} blocks of {self._block_size} positions, "
                    f"and the cache has {num_blocks}: shorten it or raise num_blocks"
                )
            sizes[retention] = num_blocks
        return sizes

    def _need(self, retention: Retention, request: _Request) -> int:
        """Blocks that a request has at most at a time."""
        total = len(request.prompt) + self._max_tokens
        kept = retention.window or retention.chunk
        if kept is not None:
            # What is seen at the start of a step, the step's rows, and two blocks that begin or
            # end in between.
            total = min(total, kept + self._chunk + 2 * self._block_size)
        return -(-total // self._block_size)

    def _room(self, request: _Request) -> bool:
        for retention in self._cache.free_blocks:
            taken = sum(self._need(retention, other) for other in self._active)
            if taken + self._need(retention, request) > self._cache.num_blocks(retention):
                return False
        return True

    def _finish(self, request: _Request) -> None:
        if not request.done:
            request.done = True
            self._active.remove(request)
            self._cache.free(request.sequence)
