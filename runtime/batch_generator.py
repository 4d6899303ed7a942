"""mlx_lm's BatchGenerator on the engine: what runs on the one runs on the other."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import (
    GenerationBatch,
    PromptProcessingBatch,
    StopSequences,
    generation_stream,
)
from mlx_lm.generate import batch_generate as upstream_batch_generate
from mlx_lm.generate_utils import BatchCounters, BatchCountersSnapshot, BatchStats
from mlx_lm.sample_utils import greedy_sampler
from mlx_lm.utils import maybe_set_recommended_wired_limit

from .cache import cache_specs, fresh_caches
from .caches import RotatingKVCache
from .engine import Engine, Request, Token
from .errors import RuntimeRefusal
from .rebind import rebound
from .sampling import LogitsProcessor, Sampler, Seeded

Prompt = list[int]


@dataclass(slots=True, eq=False)
class _Entry:
    """What the generator knows of a request beside the engine."""

    before: int  # tokens that came before the prompt
    total: int  # tokens of the prompt
    caches: Any
    tokens: list[int]


class PagedBatchGenerator:
    """Continuous batching with the interface of `mlx_lm.generate.BatchGenerator`.

    All of one step's work is one ragged batch, so `prefill_batch_size` has no meaning here;
    `prefill_step_size` bounds the rows of a step and `completion_batch_size` the requests in it.
    `max_kv_size` makes windows of so many positions of all layers, as upstream, unless the model
    makes caches of its own.
    Further options are those of `Engine`. With `keep_caches` (the default) ended requests come with
    mlx_lm's prompt caches, as upstream; without, equal beginnings are found in the paged caches
    alone, segments are not reported, and nothing is ever copied out. `complete` may add to a
    request what only its owner knows.

    A request whose sampler or processor raises ends, and `next` raises its error, with the
    request's number in a note; calling it again goes on with the others. With `report_errors` it
    ends with a response whose `finish_reason` is a `Failed`.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_tokens: int = 128,
        stop_tokens: Sequence[Sequence[int]] | None = None,
        sampler: Sampler | None = None,
        logits_processors: list[LogitsProcessor] | None = None,
        completion_batch_size: int = 32,
        prefill_batch_size: int = 8,
        prefill_step_size: int = 2048,
        max_kv_size: int | None = None,
        stream: Any = None,
        keep_caches: bool = True,
        report_errors: bool = False,
        complete: Callable[[Request], Request] = lambda request: request,
        **options: Any,
    ) -> None:
        if max_kv_size is not None:
            model = _windowed(model, max_kv_size)
        running = max(completion_batch_size, prefill_batch_size)
        self.model = model
        self.max_tokens = max_tokens
        self.sampler = sampler or greedy_sampler
        self.logits_processors = logits_processors or []
        self.prefill_step_size = prefill_step_size
        self.prefill_batch_size = prefill_batch_size
        self.completion_batch_size = running
        self.max_kv_size = max_kv_size
        self._keep = keep_caches
        self._report_errors = report_errors
        self._errors: list[Exception] = []
        self._complete = complete
        self._stream = stream or generation_stream
        self._stop = StopSequences(stop_tokens or None)
        self._entries: dict[int, _Entry] = {}
        self._counters = BatchCounters()
        self._old_wired_limit = maybe_set_recommended_wired_limit()
        options.setdefault("max_rows", max(prefill_step_size, running))
        with mx.stream(self._stream):
            self.engine = Engine(model, max_running=running, **options)

    @property
    def stream(self) -> Any:
        return self._stream

    def close(self) -> None:
        """Give back what was set for the whole process; write prefixes to a disk cache."""
        self.engine.close()
        if self._old_wired_limit is not None:
            mx.synchronize(self._stream)
            mx.set_wired_limit(self._old_wired_limit)
            self._old_wired_limit = None

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.close()

    @contextlib.contextmanager
    def stats(self) -> Iterator[BatchStats]:
        """The work done while the block runs."""
        stats = BatchStats()
        start = BatchCountersSnapshot(**asdict(self._counters))
        try:
            yield stats
        finally:
            end = BatchCountersSnapshot(**asdict(self._counters))
            stats += BatchCountersSnapshot.between(start, end)

    # ------------------------------------------------------------------ requests

    def insert(
        self,
        prompts: list[Prompt],
        max_tokens: list[int] | None = None,
        caches: list[Any] | None = None,
        all_tokens: list[Prompt] | None = None,
        samplers: list[Sampler | None] | None = None,
        logits_processors: list[Any] | None = None,
        stop_sequences: list[StopSequences] | None = None,
    ) -> list[int]:
        """Take prompts; returns a number for each. See `insert_segments`."""
        return self.insert_segments(
            [[prompt] for prompt in prompts],
            max_tokens,
            caches,
            all_tokens,
            samplers,
            logits_processors,
            stop_sequences,
        )

    def insert_segments(
        self,
        segments: list[list[Prompt]],
        max_tokens: list[int] | None = None,
        caches: list[Any] | None = None,
        all_tokens: list[Prompt] | None = None,
        samplers: list[Sampler | None] | None = None,
        logits_processors: list[Any] | None = None,
        stop_sequences: list[StopSequences] | None = None,
    ) -> list[int]:
        """Take prompts in segments, at whose ends their caches can be taken out.

        `all_tokens` are the tokens that `caches` hold already. Where they are not given, nothing of
        such a request is shared with others.

        Raises ValueError for lists of unequal lengths, empty prompts and bad numbers,
        RuntimeRefusal for a prompt that can never fit; nothing is taken then.
        """
        count = len(segments)
        lists: dict[str, list[Any]] = {
            "max_tokens": max_tokens or [self.max_tokens] * count,
            "caches": caches or [None] * count,
            "all_tokens": all_tokens or [[] for _ in segments],
            "samplers": samplers or [None] * count,
            "logits_processors": logits_processors or [self.logits_processors] * count,
            "stop_sequences": stop_sequences or [self._stop] * count,
        }
        for name, values in lists.items():
            if len(values) != count:
                raise ValueError(f"{name}: expected {count} entries, got {len(values)}")
        made = []
        for parts, most, held, before, sampler, processors, stop in zip(
            segments, *lists.values(), strict=True
        ):
            full = [part for part in parts if part]
            prompt = [token for part in full for token in part]
            if not prompt:
                raise ValueError("an empty prompt: expected at least one token")
            if most <= 0:
                raise ValueError(f"max_tokens: expected at least 1, got {most}")
            chosen: Any = sampler or self.sampler
            seeded = isinstance(chosen, Seeded)
            request = Request(
                prompt,
                max_tokens=most,
                sampler=chosen.sampler if seeded else chosen,
                processors=tuple(processors or ()),
                stop=stop,
                seed=chosen.seed if seeded else None,
                logprobs=True,
                boundaries=_boundaries(full) if self._keep else (),
                caches=held,
                before=before,
                keep=self._keep,
            )
            with mx.stream(self._stream):
                request = self._complete(request)
                made.append((self.engine.prepare(request), held, before, len(prompt)))
        names = []
        for job, held, before, total in made:
            uid = self.engine.enqueue(job)
            self._entries[uid] = _Entry(job.prompt - total, total, held, list(before))
            names.append(uid)
        return names

    def remove(self, uids: Sequence[int], return_prompt_caches: bool = False) -> dict[int, Any]:
        """Forget requests; with `return_prompt_caches` what `extract_cache` gives for them."""
        with mx.stream(self._stream):
            found = self.extract_cache(uids) if return_prompt_caches else {}
            for uid in uids:
                self.engine.abort(uid)
                self._entries.pop(uid, None)
        return found

    def extract_cache(self, uids: Sequence[int]) -> dict[int, Any]:
        """Prompt caches of requests under way, each with the tokens that it holds."""
        found = {}
        for uid in uids:
            entry = self._entries.get(uid)
            if entry is None:
                continue
            with mx.stream(self._stream):
                caches, tokens = self.engine.caches(uid)
            if not caches:  # it waits
                fresh = fresh_caches(self.model, cache_specs(self.model))
                found[uid] = (entry.caches or fresh, entry.tokens)
            else:
                found[uid] = (caches, tokens)
        return found

    @property
    def prompt_cache_nbytes(self) -> int:
        """Bytes of the blocks that requests hold."""
        return self.engine.held_bytes

    # --------------------------------------------------------------------- steps

    def next(self) -> tuple[list[Any], list[Any]]:
        """What happened to prompts, and the next tokens; both empty if there is nothing to do."""
        with mx.stream(self._stream):
            while self.engine.busy and not self._errors:
                prompts, tokens = self._step()
                if prompts or tokens:
                    return prompts, tokens
        if self._errors:
            raise self._errors.pop(0)
        return [], []

    def next_generated(self) -> list[Any]:
        """The next tokens; empty if there is nothing to do."""
        while True:
            prompts, tokens = self.next()
            if tokens or not prompts:
                return tokens

    def _step(self) -> tuple[list[Any], list[Any]]:
        began, stats = time.perf_counter(), self.engine.stats
        rows, read = stats.rows, stats.prompt_rows
        result = self.engine.step()
        took = time.perf_counter() - began
        rows, read = stats.rows - rows, stats.prompt_rows - read
        # Prompts and answers are in one batch: its time is divided by rows.
        share = read / rows if rows else float(not result.tokens)
        self._counters.prompt_tokens += read
        self._counters.prompt_time += took * share
        self._counters.decode_time += took * (1 - share)
        self._counters.generation_tokens += len(result.tokens)
        self._counters.generation_steps += bool(result.tokens)
        prompts = []
        for event in result.progress:
            entry = self._entries.get(event.request)
            if entry is None:
                continue
            done = event.computed - entry.before
            if event.computed == event.total:
                response = (event.request, (entry.total, entry.total), True, True)
            else:
                response = (event.request, (done, entry.total), event.boundary, False)
            prompts.append(PromptProcessingBatch.Response(*response))
        tokens = [self._response(event) for event in result.tokens]
        for request, error in result.failures:
            del self._entries[request]
            if self._report_errors:
                tokens.append(_failed(request, error))
            else:
                error.add_note(f"request {request}")
                self._errors.append(error)
        return prompts, tokens

    def _response(self, event: Token) -> Any:
        if event.finish_reason is not None:
            del self._entries[event.request]
        return GenerationBatch.Response(
            uid=event.request,
            token=event.token,
            logprobs=event.logprobs if self._keep else Chosen(event),
            finish_reason=event.finish_reason,
            prompt_cache=event.caches if event.finish_reason is None or self._keep else [],
            all_tokens=event.tokens if event.finish_reason is None or self._keep else [],
        )


class Failed(str):
    """The word "error", and the error."""

    error: Exception

    def __new__(cls, error: Exception) -> Failed:
        made = super().__new__(cls, "error")
        made.error = error
        return made


def _failed(request: int, error: Exception) -> Any:
    return GenerationBatch.Response(
        uid=request,
        token=0,  # means nothing
        logprobs=mx.zeros((64,)),
        finish_reason=Failed(error),
        prompt_cache=[],
        all_tokens=[],
    )


class Chosen:
    """Log-probabilities [V] of a token, that one's already read: asking for it costs nothing."""

    __slots__ = ("_event",)

    def __init__(self, event: Token) -> None:
        self._event = event

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and index == self._event.token:
            return _Number(float(self._event.chosen or 0.0))
        return self._row[index]

    def __neg__(self) -> mx.array:
        return -self._row

    @property
    def _row(self) -> mx.array:
        assert self._event.logprobs is not None
        return self._event.logprobs


class _Number(float):
    def item(self) -> float:
        return float(self)


def _windowed(model: Any, size: int) -> Any:
    """The same model, weights included, with windows instead of full attention.

    Upstream's first caches would keep four positions for ever; those of a batch do not.
    """
    if size < 1:
        raise RuntimeRefusal(f"max_kv_size: expected at least 1, got {size}")
    if hasattr(model, "make_cache"):
        return model
    found = copy.copy(model)
    found.make_cache = lambda: [RotatingKVCache(size) for _ in model.layers]
    return found


def _boundaries(segments: list[Prompt]) -> list[int]:
    """Where upstream pauses: after each segment, and before the last token."""
    ends, length = [], 0
    for segment in segments:
        length += len(segment)
        ends.append(length)
    ends[-1] -= 1
    return [end for end in dict.fromkeys(ends) if end]


#: mlx_lm's batch_generate, on the engine. Options: those of `PagedBatchGenerator`.
batch_generate: Callable[..., Any] = rebound(
    upstream_batch_generate, BatchGenerator=PagedBatchGenerator
)
