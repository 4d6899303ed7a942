"""The engine: many requests over one model, a step at a time, the next one built while one runs.

    engine = Engine(model)
    name = engine.add(Request(prompt, max_tokens=64))
    while engine.busy:
        for event in engine.step().tokens:
            ...

A step is one ragged batch (`Scheduler`) over paged caches (`PagedCache`). What its rows sample
enters the next step as values that are not known yet, so the host builds that step while the device
computes this one; end tokens are therefore seen one step late, and the row that was computed in
vain is thrown away with its sequence.
"""

from __future__ import annotations

import gc
import logging
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import StopSequences
from mlx_lm.sample_utils import greedy_sampler
from mlxrewrite.kernels import policy

from . import memory
from .batch import Sampled
from .cache import PagedCache
from .caches import Retention
from .disk import DiskTier, fingerprint
from .errors import RuntimeRefusal
from .extract import check, extract, length_of
from .memory import Footprint, Load
from .quantized import GROUP_SIZE, quantization
from .sampling import Chooser, LogitsProcessor, Row, Sampler, choose
from .scheduler import Brought, Job, Part, Scheduler
from .speculative import require_cut_back
from .store import PagedStore

FinishReason = Literal["stop", "length"]

CLEAR_EVERY = 256  # steps
ELASTIC_POSITIONS = 16384  # of a pool whose size nobody chose, if nothing needs more
USUAL_TOKENS = 512  # of an answer
LARGE_STEP = 256  # rows, more than those of requests that only continue
TABLES = (nn.Embedding, nn.QuantizedEmbedding)  # rows of weights, one for each token
UNKNOWN = -1  # stands for a token that only a prompt cache knows


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What to generate.

    `sampler`, `processors` and `stop` are mlx_lm's objects. `seed` makes the draws those of mlx_lm
    after `mx.random.seed(seed)`. `logprobs`: each token comes with all log-probabilities [V].
    `boundaries` are lengths of the prompt at which the engine pauses the request for one step and
    reports it. `caches` are mlx_lm's prompt caches: they hold the first of the tokens, or what came
    before them if `before` (the tokens that they hold) is shorter. `keep`: the last token is
    computed too, and comes with prompt caches of all tokens. `prepared` is a prompt of a model of
    mlx_vlm (`vision_engine.request`): its tokens here only name its rows.
    """

    prompt: Sequence[int]
    max_tokens: int = 256
    sampler: Sampler = greedy_sampler
    processors: Sequence[LogitsProcessor] = ()
    stop: StopSequences | None = None
    seed: int | None = None
    logprobs: bool = False
    boundaries: Sequence[int] = ()
    caches: Sequence[Any] | None = None
    before: Sequence[int] = ()
    keep: bool = False
    prepared: Any = None


class Token(NamedTuple):
    """One token of one request; the last one says why. "stop": the token ends the text."""

    request: int
    token: int
    finish_reason: FinishReason | None
    logprobs: mx.array | None = None  # [V]
    chosen: float | None = None  # the token's own
    caches: list[Any] | None = None
    tokens: list[int] | None = None  # those that the caches hold


class Failure(NamedTuple):
    """A request has ended since its own sampler, processor or stop rule raised this."""

    request: int
    error: Exception


class Progress(NamedTuple):
    """A request's prompt is in the cache up to here; `boundary`: one of the request's."""

    request: int
    computed: int
    total: int
    boundary: bool


@dataclass(slots=True)
class Step:
    """What one call of `Engine.step` has to tell."""

    tokens: list[Token] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


@dataclass(slots=True)
class Stats:
    """Sums since the engine was made.

    `seconds` are those in steps; of them `waited` for the device and `scheduling` to decide who
    runs. What is left is building graphs and handing them to the device.
    """

    steps: int = 0
    rows: int = 0
    prompt_rows: int = 0
    tokens: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    scheduling: float = 0.0
    drafted: int = 0
    accepted: int = 0


class Drafter(Protocol):
    """Guesses tokens that follow."""

    most: int

    def propose(self, texts: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        """Up to `most` guesses for each request, given all its tokens."""

    def forget(self, request: int) -> None:
        """A request has ended."""


class Observer(Protocol):
    """Is told when things happen, in seconds; for metrics."""

    def first_token(self, seconds: float) -> None: ...

    def later_tokens(self, seconds: float, count: int) -> None: ...

    def finished(self, reason: str) -> None: ...


@dataclass(slots=True, eq=False)
class Prepared(Job):
    """A request that was checked, and all that is known of it while it runs."""

    name: int = -1
    request: Request = field(default_factory=lambda: Request(()))
    chooser: Chooser = field(default_factory=Chooser)
    matcher: Any = None
    prompt: int = 0  # tokens of the prompt, those of prompt caches included
    generated: int = 0
    last: Token | None = None  # held back until its own row is in the cache
    done: bool = False
    arrived: float = 0.0
    first: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """A step that was launched: its parts, and tokens [S] of those that sample."""

    parts: list[tuple[Prepared, Part]]
    sampling: list[tuple[Prepared, Part, int, list[int]]]  # first row of the logits, guesses
    places: dict[Prepared, int]
    tokens: mx.array | None
    logprobs: mx.array | None
    chosen: mx.array | None
    arrays: list[mx.array]
    failed: list[tuple[Prepared, Exception]] = field(default_factory=list)


class Engine:
    """Requests in, tokens out. Not for several threads at once.

    `num_blocks` blocks of `block_size` positions for each group of layers, or as many as fit in
    `kv_memory` bytes; without either as many as the requests at hand need, within what the device
    has, and more when nothing runs and a request needs more. A step has at most `max_rows` rows
    (`max_running` requests at most). `reuse`: equal beginnings are computed once. `dtype` is that
    of the caches, the model's own by default. `kv_bits` (8 or 4) keeps keys and values as codes of
    so many bits, `kv_group_size` of them with one scale. `disk` is a folder and a number of bytes:
    blocks that leave memory go there (`DiskTier`).
    """

    def __init__(
        self,
        model: Any,
        *,
        block_size: int = 16,
        num_blocks: int | Mapping[Retention, int] | None = None,
        kv_memory: int | None = None,
        max_rows: int | None = None,
        max_running: int = 256,
        reuse: bool = True,
        dtype: mx.Dtype | None = None,
        kv_bits: int | None = None,
        kv_group_size: int = GROUP_SIZE,
        drafter: Drafter | None = None,
        observer: Observer | None = None,
        disk: tuple[str | Path, int] | None = None,
        poison: bool = False,
        shuffle_seed: int | None = None,
    ) -> None:
        in_place = policy.writes_in_place()
        if max_rows is None:
            max_rows = max(2048 if in_place else 512, max_running)
        least = {"block_size": block_size, "max_rows": max_rows, "max_running": max_running}
        for what, number in least.items():
            if number < 1:
                raise RuntimeRefusal(f"{what}: expected at least 1, got {number}")
        self.model = model
        self.stats = Stats()
        self._vocabulary = _vocabulary(model)
        self.max_rows = max_rows
        self._block_size = block_size
        self._max_running = min(max_running, max_rows)
        self._num_blocks = num_blocks
        self._kv_memory = kv_memory
        self._reuse = reuse
        self._dtype = dtype
        self.quantization = quantization(kv_bits, kv_group_size)
        self._drafter = drafter
        self._observer = observer
        self._disk: DiskTier | None = None
        self._poison = poison
        self._shuffle_seed = shuffle_seed
        # In-place kernels order their reads and writes themselves; elsewhere a step is only
        # launched when the one before it has ended, or its writes would copy the pools.
        self._overlap = in_place
        self._footprint: Footprint | None = None
        self._store: PagedStore | None = None
        self._scheduler: Scheduler | None = None
        self._early: list[Prepared] = []  # requests from before there was a pool
        self._jobs: dict[int, Prepared] = {}
        self._flight: _Flight | None = None
        self._next = 0
        self._preemptions = 0
        if self.quantization is not None:
            self._known()  # refuses a model whose caches are not quantised
        if disk is not None:
            known = self._known()
            if not known.everything or set(known.block_bytes) != {Retention()}:
                raise RuntimeRefusal(
                    "disk cache: it needs a model whose layers all have full attention"
                )
            folder, limit = disk
            name = fingerprint(model, block_size, dtype, self.quantization)
            self._disk = DiskTier(folder, limit, name)
        if drafter is not None:
            require_cut_back(self._known().everything)
        if num_blocks is not None or kv_memory is not None:
            self._make_store(self._sizes(1))

    # ------------------------------------------------------------------ requests

    def add(self, request: Request) -> int:
        """Take a request; returns its name. Raises RuntimeRefusal if it can never run."""
        return self.enqueue(self.prepare(request))

    def prepare(self, request: Request) -> Prepared:
        """Check a request; nothing is changed. Raises RuntimeRefusal if it can never run."""
        job = self._job(request)
        if job.brought is not None:
            known = self._known()
            check(known.specs, known, job.brought.caches, job.brought.length)
        capacity = self._possible(job) if self._elastic else self._capacity()
        _require(len(job.tokens) + request.keep, capacity)
        job.limit = min(job.limit, capacity)
        return job

    def require_room(self, length: int) -> None:
        """Raise RuntimeRefusal if a prompt of so many tokens could never run."""
        if not self._elastic:
            _require(length, self._capacity())

    def require_tokens(self, tokens: Sequence[int]) -> None:
        """Raise RuntimeRefusal for tokens that the model does not have.

        MLX does not look whether a row of a table is there, and may read beyond it.
        """
        if self._vocabulary and tokens:
            least, most = min(tokens), max(tokens)
            if least < 0 or most >= self._vocabulary:
                raise RuntimeRefusal(
                    f"token {least if least < 0 else most}: the model has tokens 0 to "
                    f"{self._vocabulary - 1}; the tokenizer is not this model's, or has tokens "
                    "that its embeddings lack"
                )

    def known_length(self, tokens: Sequence[int]) -> int:
        """How many of a prompt's first tokens need not be computed now; never all of them."""
        return 0 if self._store is None else self._store.known_length(tokens)

    def enqueue(self, job: Prepared) -> int:
        """Take a request that was prepared; returns its name."""
        job.name = self._next
        job.arrived = time.perf_counter()
        self._next += 1
        self._jobs[job.name] = job
        if self._scheduler is None:
            self._early.append(job)
        else:
            self._scheduler.add(job)
        return job.name

    def abort(self, name: int) -> None:
        """Forget a request; harmless if it has ended."""
        job = self._jobs.get(name)
        if job is not None:
            self.stats.aborted += 1
            self._end(job)

    def caches(self, name: int) -> tuple[list[Any], list[int]]:
        """Prompt caches of what a request has computed, and the tokens; nothing if it waits."""
        job = self._jobs[name]
        if job.sequence < 0:
            return [], []
        return self._extract(job)

    def computed(self, name: int) -> list[int]:
        """The tokens that a request has in the cache."""
        job = self._jobs[name]
        return job.tokens[: min(job.computed, len(job.tokens))]

    def close(self) -> None:
        """Write known prefixes to disk, if there is a disk cache. Harmless otherwise."""
        if self._disk is not None:
            if self._store is not None:
                self._store.save_all()
            self._disk.close()
            self._disk = None

    @property
    def disk(self) -> DiskTier | None:
        return self._disk

    @property
    def busy(self) -> bool:
        return bool(self._jobs) or self._flight is not None

    @property
    def waiting(self) -> int:
        waiting = 0 if self._scheduler is None else len(self._scheduler.waiting)
        return waiting + len(self._early)

    @property
    def running(self) -> int:
        return 0 if self._scheduler is None else len(self._scheduler.running)

    @property
    def preemptions(self) -> int:
        return self._preemptions + (0 if self._scheduler is None else self._scheduler.preemptions)

    @property
    def store(self) -> PagedStore | None:
        """The paged caches, once there are some."""
        return self._store

    @property
    def held_bytes(self) -> int:
        """Bytes of the blocks that requests hold."""
        if self._store is None:
            return 0
        cache, costs = self._store.cache, self._known().block_bytes
        return sum(
            costs[retention] * (cache.num_blocks(retention) - free)
            for retention, free in cache.free_blocks.items()
        )

    @property
    def position_bytes(self) -> float:
        """Bytes of one position of one request, in all layers that page it."""
        return sum(self._known().block_bytes.values()) / self._block_size

    @property
    def capacity(self) -> int | None:
        """Positions that one request can have; None while that is not fixed."""
        return None if self._elastic else self._capacity()

    # --------------------------------------------------------------------- steps

    def step(self) -> Step:
        """Run one step further; returns the tokens that are known by now."""
        began = time.perf_counter()
        result = Step()
        self._resume()
        if self._store is None or self._must_grow():
            self._grow()
        before = self._flight
        if self._drafter is not None:
            self._draft(self._drafter)
        following = self._launch(before)
        self._flight = following
        early = before is None or (self._overlap and not _large(before, following))
        if following is not None and early:
            mx.async_eval(following.arrays)  # type: ignore[no-untyped-call]
        if before is not None:
            if not early:  # tokens of steps that sample nothing are not waited for elsewhere
                self._wait(before)
            self._land(before, result)
            if following is not None and not early:
                mx.async_eval(following.arrays)  # type: ignore[no-untyped-call]
        for job, error in following.failed if following is not None else ():
            # Unless the step before has shown that the text ends, and this row was for nothing.
            if not job.done and job.last is None:
                self._fail(job, error, result)
        if self._drafter is not None and following is not None:
            self._flight = None
            self._land(following, result)
        self._report(result, following)
        if following is not None:
            self.stats.steps += 1
            if self.stats.steps % CLEAR_EVERY == 0:
                mx.clear_cache()
        self.stats.seconds += time.perf_counter() - began
        return result

    def run(self) -> dict[int, list[int]]:
        """Run until nothing is left; all tokens of each request, the ending ones included.

        Raises what the first request that failed raised, once all others have ended.
        """
        found: dict[int, list[int]] = {name: [] for name in self._jobs}
        failures: list[Failure] = []
        while self.busy:
            step = self.step()
            failures += step.failures
            for event in step.tokens:
                found[event.request].append(event.token)
        if failures:
            raise failures[0].error
        return found

    def _launch(self, before: _Flight | None) -> _Flight | None:
        """Build the graph of the next step; nothing is computed yet."""
        if self._scheduler is None or self._store is None:
            return None
        began = time.perf_counter()
        planned = self._scheduler.schedule()
        self.stats.scheduling += time.perf_counter() - began
        if not planned:
            return None
        cache = self._store.cache
        parts: list[tuple[Prepared, Part]] = []
        sampling: list[tuple[Prepared, Part, int, list[int]]] = []
        tokens: dict[int, Any] = {}
        wanted: dict[int, list[int]] = {}
        rows: list[Row] = []
        places: dict[Prepared, int] = {}
        read = False
        for part in planned:
            job = part.job
            assert isinstance(job, Prepared)
            parts.append((job, part))
            stop = part.start + part.count - part.drafted
            guesses, latest = job.draft[: part.drafted], None
            job.draft = []
            if part.start >= len(job.tokens):
                assert before is not None and before.tokens is not None
                place = before.places[job]
                tokens[job.sequence] = Sampled(before.tokens, place)
                if job.chooser.processors:
                    latest = before.tokens[place : place + 1]
            else:
                tokens[job.sequence] = _ids(job, part.start, stop) + guesses
            read = read or part.count > 1
            if part.start < job.prompt:
                self.stats.prompt_rows += part.count
            if part.samples:
                places[job] = len(rows)
                sampling.append((job, part, len(rows), guesses))
                first = part.count - part.drafted - 1
                wanted[job.sequence] = list(range(first, part.count))
                text = _ids(job, 0, len(job.tokens)) if job.chooser.processors else job.tokens
                rows += [Row(job.chooser, text, latest)] * (1 + part.drafted)
        if hasattr(self.model, "attach_all"):
            jobs = (job for job, _ in parts if job.request.prepared is not None)
            self.model.attach_all({job.sequence: job.request.prepared for job in jobs})
        logits = cache.step(tokens, logit_rows=wanted)
        for job, part in parts:
            known = min(part.start + part.count, len(job.tokens))
            self._store.name(job.sequence, job.tokens, known)
        self.stats.rows += sum(part.count for part in planned)
        arrays = cache.arrays(states=read)
        if not sampling:
            return _Flight(parts, sampling, places, None, None, None, arrays)
        choice = choose(logits, rows)
        sampled, logprobs = choice.tokens, choice.logprobs
        arrays.append(sampled)
        kept = chosen = None
        if any(job.request.logprobs for job, *_ in sampling):
            kept = logprobs
            chosen = mx.take_along_axis(logprobs, sampled[:, None], axis=-1)[:, 0]
            chosen = chosen.astype(mx.float32)
            arrays += [kept, chosen]
        for job, *_ in sampling:
            job.pending += 1
        failed: list[tuple[Prepared, Exception]] = []
        for job, _, first, guesses in sampling if choice.failed else ():
            of_job = (choice.failed.get(first + row) for row in range(1 + len(guesses)))
            failed += [(job, error) for error in of_job if error is not None][:1]
        return _Flight(parts, sampling, places, sampled, kept, chosen, arrays, failed)

    def _wait(self, flight: _Flight) -> None:
        """Until the device has done a step, whether it samples anything or not."""
        began = time.perf_counter()
        if self._overlap:
            mx.eval(flight.arrays)
        elif flight.tokens is None:
            # Not by the pools: the next step's writes have replaced them in the meantime.
            mx.synchronize()
        self.stats.waited += time.perf_counter() - began

    def _land(self, flight: _Flight, result: Step) -> None:
        """Wait for a step's tokens and take them."""
        began = time.perf_counter()
        if flight.tokens is None:
            values: list[int] = []
        else:
            values = flight.tokens.tolist()  # type: ignore[assignment]
        chosen = None if flight.chosen is None else flight.chosen.tolist()
        self.stats.waited += time.perf_counter() - began
        now = time.perf_counter()
        for job, part in flight.parts:
            if not job.done and part.start < job.prompt:
                done = min(part.start + part.count, job.prompt)
                result.progress.append(Progress(job.name, done, job.prompt, False))
        for job, part, first, guesses in flight.sampling:
            job.pending -= 1
            if job.done or job.last is not None:
                continue
            count = 0
            for row, guess in enumerate([*guesses, None]):
                token = values[first + row]
                count += 1
                try:
                    event = self._event(job, token, flight, first + row, chosen)
                except Exception as problem:
                    self._fail(job, problem, result)
                    break
                if event.finish_reason is None:
                    result.tokens.append(event)
                else:
                    job.last = event
                    job.limit = len(job.tokens) + job.request.keep  # its own row, and no further
                    break
                if token != guess:
                    break
            if job.done:
                continue
            self._timed(job, now, count)
            if guesses:
                self.stats.drafted += len(guesses)
                self.stats.accepted += count - 1
                self._cut_back(job, part.start + part.count - part.drafted + count - 1)
        for job in [j for j in self._jobs.values() if j.last is not None]:
            self._close(job, result)

    def _event(self, job: Prepared, token: int, flight: _Flight, row: int, chosen: Any) -> Token:
        job.tokens.append(token)
        job.generated += 1
        self.stats.tokens += 1
        reason: FinishReason | None = None
        allowed = job.limit - job.request.keep
        if job.generated >= job.request.max_tokens or len(job.tokens) >= allowed:
            reason = "length"
        if job.matcher is not None and job.matcher.advance(token):
            reason = "stop"
        if not job.request.logprobs or flight.logprobs is None:
            return Token(job.name, token, reason)
        return Token(job.name, token, reason, flight.logprobs[row], chosen[row])

    def _close(self, job: Prepared, result: Step) -> None:
        """Give the last token, unless its row is still wanted and not computed yet."""
        event = job.last
        assert event is not None
        if job.request.keep:
            if job.computed < len(job.tokens) or job.sequence < 0:
                return
            caches, tokens = self._extract(job)
            event = event._replace(caches=caches, tokens=tokens)
        result.tokens.append(event)
        self.stats.finished += 1
        self._tell("finished", str(event.finish_reason))
        self._end(job)

    def _fail(self, job: Prepared, error: Exception, result: Step) -> None:
        """End one request with its error; whatever of it is under way is thrown away."""
        result.failures.append(Failure(job.name, error))
        self.stats.failed += 1
        self._tell("finished", "error")
        self._end(job)

    def _tell(self, what: str, *words: Any) -> None:
        """An observer that raises is not asked again, and nobody's request fails for it."""
        if self._observer is None:
            return
        try:
            getattr(self._observer, what)(*words)
        except Exception:
            logging.exception("The engine's observer failed; it is told nothing more.")
            self._observer = None

    def _end(self, job: Prepared) -> None:
        job.done = True
        del self._jobs[job.name]
        if self._drafter is not None:
            self._drafter.forget(job.name)
        if self._scheduler is None or self._store is None or job in self._early:
            self._early.remove(job)
            return
        if job.sequence >= 0:
            known = min(job.computed, len(job.tokens), self._store.cache.length(job.sequence))
            self._store.name(job.sequence, job.tokens, known, ending=True)
        self._scheduler.remove(job)

    def _report(self, result: Step, following: _Flight | None) -> None:
        """Requests that have reached a boundary, as soon as nothing of them is under way."""
        busy = {job for job, _ in following.parts} if following is not None else set()
        if self._drafter is not None:
            busy = set()
        for job in self._jobs.values():
            if job.stops and job.computed == job.stops[0] and job not in busy:
                result.progress.append(Progress(job.name, job.computed, job.prompt, True))

    def _resume(self) -> None:
        """Requests at a boundary that was reported go on."""
        busy = {job for job, _ in self._flight.parts} if self._flight is not None else set()
        for job in self._jobs.values():
            if job.stops and job.computed == job.stops[0] and job not in busy:
                job.stops.pop(0)

    def _timed(self, job: Prepared, now: float, count: int) -> None:
        if self._observer is None:
            return
        if job.generated == count:
            self._tell("first_token", now - job.arrived)
        else:
            self._tell("later_tokens", now - job.first, count)
        job.first = now

    # ------------------------------------------------------------------ guesses

    def _draft(self, drafter: Drafter) -> None:
        assert self._flight is None
        running = [] if self._scheduler is None else self._scheduler.running
        for job in running:
            job.draft = []
        texts = {
            job.name: job.tokens
            for job in running
            if isinstance(job, Prepared)
            and not job.chooser.alone
            and not job.nameless
            and job.request.prepared is None
            and job.last is None
            and job.todo == 1
            and not job.stops
        }
        if not texts:
            return
        for name, guesses in drafter.propose(texts).items():
            job = self._jobs[name]
            # The last of the request's tokens is never followed by anything.
            job.draft = guesses[: max(0, job.limit - len(job.tokens) - 1)]

    def _cut_back(self, job: Prepared, length: int) -> None:
        """Forget the rows of guesses that were wrong."""
        assert self._store is not None
        if job.computed > length:
            self._store.cache.truncate(job.sequence, length)
            job.computed = length

    # ---------------------------------------------------------------- the pool

    @property
    def _elastic(self) -> bool:
        return self._num_blocks is None and self._kv_memory is None

    @property
    def _load(self) -> Load:
        rollback = 0 if self._drafter is None else self._drafter.most + 1
        return Load(self._max_running, self.max_rows, rollback)

    def _job(self, request: Request) -> Prepared:
        if not len(request.prompt):
            raise RuntimeRefusal("an empty prompt: expected at least one token")
        if request.max_tokens < 1:
            raise RuntimeRefusal(f"max_tokens: expected at least 1, got {request.max_tokens}")
        prompt, said = _tokens(request.prompt), _tokens(request.before)
        if request.prepared is None:
            self.require_tokens([*said, *prompt])
        held = 0 if request.caches is None else length_of(request.caches, len(said))
        if request.caches is not None and not held and said:
            raise RuntimeRefusal("prompt caches: they are empty, and some tokens are said to be in")
        unknown = held - len(said) if held else 0
        if unknown < 0:
            raise RuntimeRefusal(
                f"prompt caches: they hold {held} positions and {len(said)} tokens are "
                "said to be in them"
            )
        tokens = [UNKNOWN] * unknown + said + prompt
        return Prepared(
            tokens=tokens,
            limit=len(tokens) + request.max_tokens + request.keep,
            stops=[unknown + len(said) + at for at in request.boundaries],
            brought=Brought(list(request.caches or ()), held) if held else None,
            # Names of rows that are no text are good for this process only.
            nameless=unknown > 0 or (self._disk is not None and min(tokens) < 0),
            request=request,
            chooser=Chooser(
                request.sampler,
                tuple(request.processors),
                request.seed,
                skipped=unknown,
            ),
            matcher=None if request.stop is None else request.stop.matcher(),
            prompt=len(tokens),
        )

    def _possible(self, job: Prepared) -> int:
        """The positions that a pool made for one request would have."""
        known, least = self._known(), len(job.tokens) + 1 + job.request.keep
        if job.limit <= ELASTIC_POSITIONS:
            return job.limit
        sizes = memory.plan(known, memory.device_memory(), self._load, job.limit, least)
        whole = sizes.get(Retention())
        return job.limit if whole is None else whole * self._block_size

    def _capacity(self) -> int:
        assert self._store is not None
        return self._store.most_positions()

    def _known(self) -> Footprint:
        if self._footprint is None:
            self._footprint = memory.footprint(
                self.model, self._block_size, self._dtype, self.quantization
            )
        return self._footprint

    def _sizes(self, least: int) -> dict[Retention, int]:
        """Blocks of each group of layers for what the engine was made with."""
        known = self._known()
        if self._num_blocks is None:
            budget = memory.device_memory() if self._kv_memory is None else self._kv_memory
            most = self._max_running * _context(self.model)
            if self._elastic:
                most = least
            return memory.plan(known, budget, self._load, most, least)
        if isinstance(self._num_blocks, int):
            sizes = dict.fromkeys(known.block_bytes, self._num_blocks)
        else:
            sizes = dict(self._num_blocks)
        for retention, count in sizes.items():
            kept = retention.window or retention.chunk
            size = self._block_size
            needed = -(-((kept or 1) + self._load.rollback) // size) + (kept is not None)
            if known.block_bytes[retention] and count < needed:
                raise RuntimeRefusal(
                    f"num_blocks: {retention} needs at least {needed} blocks of {size} positions, "
                    f"got {count}"
                )
        return sizes

    def _make_store(self, sizes: Mapping[Retention, int]) -> None:
        known = self._known()
        cache = PagedCache(
            self.model,
            self._block_size,
            num_blocks=sizes,
            dtype=self._dtype,
            poison=self._poison,
            shuffle_seed=self._shuffle_seed,
            rollback=self._load.rollback,
            quantization=self.quantization,
        )
        if self._disk is not None:  # pools are made by the first step, and are to be filled before
            probe = cache.add_sequence()
            mx.eval(cache.step({probe: [0]}), cache.arrays())
            cache.free(probe)
        jobs, self._early = self._early, []
        self._store = PagedStore(cache, reuse=self._reuse, known=known, disk=self._disk)
        self._scheduler = Scheduler(self._store, self.max_rows, self._max_running)
        for job in jobs:
            self._scheduler.add(job)

    def _must_grow(self) -> bool:
        """Whether nothing runs and the pool is too small for what comes next."""
        if not self._elastic or self._flight is not None or self._scheduler is None:
            return False
        scheduler = self._scheduler
        if scheduler.running or not scheduler.waiting:
            return False
        return scheduler.waiting[0].limit > self._capacity()

    def _grow(self) -> None:
        jobs = self._early if self._scheduler is None else list(self._scheduler.waiting)
        if not jobs:
            return
        size = self._block_size
        least = max(-(-job.limit // size) * size for job in jobs)
        # Long answers are rare: what a request may have at most is not put aside for all of them.
        wanted = sum(min(job.limit, len(job.tokens) + USUAL_TOKENS) + size for job in jobs)
        if self._scheduler is not None:
            self._preemptions += self._scheduler.preemptions
            self._early, self._scheduler, self._store = jobs, None, None  # type: ignore[assignment]
            gc.collect()  # its parts hold each other
            mx.clear_cache()
        budget = memory.device_memory()
        wanted = max(least, min(wanted, ELASTIC_POSITIONS * 16), ELASTIC_POSITIONS)
        sizes = memory.plan(self._known(), budget, self._load, wanted, least)
        self._make_store(sizes)

    def _extract(self, job: Prepared) -> tuple[list[Any], list[int]]:
        assert self._store is not None
        length = self._store.cache.length(job.sequence)
        return extract(self._store.cache, job.sequence), job.tokens[:length]


def _ids(job: Prepared, start: int, stop: int) -> list[int]:
    """A request's tokens as the model gets them."""
    prepared = job.request.prepared
    known = [] if prepared is None else prepared.ids[start:stop]
    return [*known, *job.tokens[start + len(known) : stop]]


def _large(before: _Flight, following: _Flight | None) -> bool:
    """Whether two steps would need much memory together: MLX allocates what a step computes when it
    is launched, and gives it back as the device gets there. The device idles for a launch."""
    if following is None:
        return False
    rows = [sum(part.count for _, part in flight.parts) for flight in (before, following)]
    return min(rows) > LARGE_STEP


def _require(length: int, capacity: int) -> None:
    if length + 1 > capacity:
        raise RuntimeRefusal(
            f"a prompt of {length} tokens does not fit: there is memory for {capacity} positions, "
            "those of the tokens to come included; shorten the prompt or give the caches more "
            "memory"
        )


def _tokens(given: Sequence[int]) -> list[int]:
    """Tokens as a list of Python's numbers. Raises RuntimeRefusal for anything else."""
    try:
        return list(map(operator.index, given.tolist() if hasattr(given, "tolist") else given))
    except TypeError as problem:
        raise RuntimeRefusal(f"a prompt: expected the numbers of tokens, {problem}") from problem


def _vocabulary(model: Any) -> int:
    """How many tokens a model has, or more; 0 if that cannot be told.

    The longest of its tables: a smaller one may be of positions, or a part of several processes.
    """
    language = getattr(model, "language", model)
    modules = language.modules() if hasattr(language, "modules") else []
    tables = [m.weight.shape[0] for m in modules if isinstance(m, TABLES)]
    said = getattr(getattr(language, "args", None), "vocab_size", 0)
    return max(*tables, said if isinstance(said, int) else 0) if tables else 0


def _context(model: Any) -> int:
    """The longest text that a model was made for, as far as its config says."""
    args = getattr(model, "args", None)
    found = getattr(args, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else 1 << 17
