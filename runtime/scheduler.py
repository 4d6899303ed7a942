"""Which requests run in the next step, and how many rows each: iteration-level scheduling.

Every step serves whoever has something to compute: requests that continue bring one row (more with
a draft), requests whose prompt is being read bring a chunk of it, all in one batch of at most
`max_rows` rows. After Yu et al., Orca (OSDI 2022), and Agrawal et al., Sarathi-Serve (OSDI 2024);
the blocks and the preemption are those of Kwon et al., PagedAttention (SOSP 2023).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Store(Protocol):
    """What the scheduler asks of the cache."""

    def admit(self, job: Job, spare: int) -> tuple[int, int] | None:
        """A new sequence for a job, and how many of its tokens it has already; None: no room now.

        There is room when all tokens fit and `spare` blocks of each group of layers stay free.
        """

    def reserve(self, sequence: int, count: int) -> int:
        """Places for up to `count` more positions; returns for how many."""

    def free(self, sequence: int) -> None:
        """Give the sequence's blocks back."""


@dataclass(frozen=True, slots=True, eq=False)
class Brought:
    """Prompt caches of mlx_lm that hold the first `length` tokens of a request."""

    caches: Sequence[Any]
    length: int


@dataclass(slots=True, eq=False)
class Job:
    """What the scheduler knows of a request.

    `tokens` are the prompt and all tokens generated so far. `pending` more are being sampled by a
    step under way: they count, but their values are not known yet. `computed` positions are in the
    cache, steps under way included. `limit` is the length at which the request ends. `draft` holds
    guesses that follow the tokens, to be computed with them. `stops` are lengths, in rising order,
    that no step goes across: nothing is computed until whoever set the first one takes it out.
    `brought` are prompt caches that hold its first tokens; with `nameless` what those were is not
    known, so that nobody else can share them.
    """

    tokens: list[int]
    limit: int
    pending: int = 0
    computed: int = 0
    sequence: int = -1
    draft: list[int] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    brought: Brought | None = None
    nameless: bool = False

    @property
    def length(self) -> int:
        return len(self.tokens) + self.pending

    @property
    def todo(self) -> int:
        """Rows that must be computed before the next token can be sampled; 0: nothing to do."""
        length = len(self.tokens) + self.pending
        if length >= self.limit:
            return 0
        goal = min(length, self.stops[0]) if self.stops else length
        return max(0, goal - self.computed)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """`count` rows of one job from position `start`; `drafted` of them are guesses."""

    job: Job
    start: int
    count: int
    drafted: int = 0

    @property
    def samples(self) -> bool:
        """Whether the job's next token comes out of this step."""
        return self.start + self.count - self.drafted == self.job.length


class Scheduler:
    """First come, first served; when blocks run out the youngest gives way and starts again.

    `running` jobs hold blocks and are older than all `waiting` ones. No more than `max_running` of
    them, which must not exceed `max_rows`, so that a step always has room for one row of each.
    """

    def __init__(self, store: Store, max_rows: int, max_running: int) -> None:
        if not 1 <= max_running <= max_rows:
            raise ValueError(
                f"expected 1 <= max_running <= max_rows, got {max_running}, {max_rows}"
            )
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.preemptions = 0
        self._store = store
        self._max_rows = max_rows
        self._max_running = max_running

    def add(self, job: Job) -> None:
        self.waiting.append(job)

    def remove(self, job: Job) -> None:
        """Forget a job and give its blocks back."""
        if job.sequence >= 0:
            self.running.remove(job)
            self._store.free(job.sequence)
            job.sequence = -1
        else:
            self.waiting.remove(job)

    def schedule(self) -> list[Part]:
        """The parts of the next step, those that continue first; counts them as computed."""
        before = self.preemptions
        step = _Step(self._max_rows)
        continuing: list[Job] = []
        reading: list[Job] = []
        for job in self.running:
            todo = job.todo
            if todo:
                (continuing if todo == 1 else reading).append(job)
        # Guesses take what nobody else needs: each job's own row comes first, and prompts that are
        # being read get half of the rest at least.
        guesses = self._max_rows - len(continuing)
        if reading or self.waiting:
            guesses //= 2
        for job in continuing:
            drafted = min(len(job.draft), guesses)
            guesses -= drafted
            self._plan(job, 1 + drafted, step)
        for job in reading:
            self._plan(job, job.todo, step)
        # Whoever gave way in this step must not come back in the same one.
        while step.left > 0 and self.waiting and self.preemptions == before:
            job = self.waiting[0]
            if not self._admit(job):
                break
            self._plan(job, job.todo, step)
        for part in step.parts.values():
            part.job.computed += part.count
        return list(step.parts.values())

    def _admit(self, job: Job) -> bool:
        if len(self.running) >= self._max_running or job.pending:
            return False
        got = self._store.admit(job, len(self.running))
        if got is None:
            return False
        job.sequence, job.computed = got
        self.running.append(self.waiting.popleft())
        return True

    def _plan(self, job: Job, wanted: int, step: _Step) -> None:
        """Add rows of a job to the step, as many as there is room for; the youngest make room."""
        count = min(wanted, step.left)
        while job.sequence >= 0 and count > 0:
            given = self._store.reserve(job.sequence, count)
            if given > 0:
                step.add(Part(job, job.computed, given, max(0, given - job.todo)))
                return
            self._preempt(self.running[-1], step)

    def _preempt(self, job: Job, step: _Step) -> None:
        step.drop(job)
        self.remove(job)
        job.computed = 0
        self.waiting.appendleft(job)
        self.preemptions += 1


@dataclass(slots=True, eq=False)
class _Step:
    """The parts of a step, and the rows that are left in it."""

    left: int
    parts: dict[Job, Part] = field(default_factory=dict)

    def add(self, part: Part) -> None:
        self.parts[part.job] = part
        self.left -= part.count

    def drop(self, job: Job) -> None:
        part = self.parts.pop(job, None)
        if part is not None:
            self.left += part.count
