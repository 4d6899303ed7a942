"""Judges the mutants of many configs, in this process or a few of them.

Not in `__main__`: a new process cannot import that module of a package, so nothing defined there
can be sent to it.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from .corpus import config_of, mutants, sample
from .judge import KEPT, MODEL, Judge
from .report import Key, Row
from .source import File
from .worlds import Library


@dataclass(frozen=True)
class Job:
    """Some mutants of one config."""

    config: str
    operators: tuple[str, ...]
    each: int | None
    seed: int
    limit: int | None
    known: frozenset[Key] = frozenset()  # judged before
    until: float = float("inf")  # a time


class Died(Exception):
    """A process ended before it had judged all its mutants."""


def rows_of(jobs: list[Job], count: int) -> Iterator[Row]:
    """The rows of all jobs as they come, from at most `count` processes at a time.

    A fresh process for every job: compiled mutants leave classes and kernels behind. A process
    that ends without its rows raises `Died`, which a pool of processes would wait for instead.
    """
    if count == 1:
        for job in jobs:
            yield from run(job)
        return
    context = multiprocessing.get_context("spawn")
    waiting = jobs[::-1]
    at_work: dict[Connection, tuple[SpawnProcess, Job]] = {}
    try:
        while waiting or at_work:
            while waiting and len(at_work) < count:
                job = waiting.pop()
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_send, args=(job, there), daemon=True)
                process.start()
                there.close()
                at_work[here] = process, job
            for end in wait(list(at_work)):
                assert isinstance(end, Connection)
                process, job = at_work[end]
                try:
                    row = end.recv()
                except EOFError:
                    row = None
                    process.join()
                    if process.exitcode:
                        raise Died(f"{job.config}: exit status {process.exitcode}") from None
                if row is None:
                    del at_work[end]
                    end.close()
                else:
                    yield row
    finally:
        for process, _ in at_work.values():
            process.terminate()


def _send(job: Job, there: Connection) -> None:
    with there:
        for row in run(job):
            there.send(row)


@functools.cache
def _library() -> Library:
    return Library()


def run(job: Job) -> Iterator[Row]:
    """Judge the mutants of one config, the unchanged file first."""
    import mlx.core as mx

    mx.disable_compile()  # on the CPU it costs a compiler run for every function and shape
    sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    if time.time() > job.until:
        return
    library = _library()
    name = job.config.split("@")[0]
    file = File(name, library.text(name))
    if job.limit is not None and not job.operators:
        chosen = sample(library, job.config, job.limit, job.seed)
    else:
        chosen = list(mutants(library, job.config, job.operators, job.each, job.seed))[: job.limit]
    chosen = [
        m for m in chosen if (job.config, m.operator.name, m.number, job.seed) not in job.known
    ]
    if not chosen:
        return
    try:
        judge = Judge(library, name, config_of(job.config), job.seed)
        unchanged = judge.of({name: file.text})
    except Exception as problem:
        print(f"left out: {job.config}: {type(problem).__name__}: {problem}", flush=True)
        return
    if unchanged.outcome not in (KEPT, MODEL):
        print(f"left out: {job.config}: unchanged it is {unchanged}", flush=True)
        return
    for mutant in chosen:
        if time.time() > job.until:
            return
        yield Row.of(mutant, judge.of(mutant.texts(file)), file, job.seed)
