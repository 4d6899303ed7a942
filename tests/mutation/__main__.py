"""`python -m tests.mutation`: run mutants of many files over a few processes."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .corpus import config_names, config_of, mutants
from .judge import BUG, KEPT, SILENT, Judge
from .operators import all_operators
from .report import Row, save, summary, table
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


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.mutation", description=__doc__)
    add = parser.add_argument
    add("configs", nargs="*", help="names of tiny configs (default: one of every file)")
    add("--operator", action="append", default=[], help="only this operator, or family:NAME")
    add("--each", type=int, default=1, help="mutants of an operator and file (0: all)")
    add("--limit", type=int, default=0, help="mutants of a file, chosen by the seed (0: all)")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=2)
    add("--json", type=Path, help="write every row")
    add("--silent", type=Path, help="append every silent mutant as it is found")
    add("--list", action="store_true", help="list the operators")
    got = parser.parse_args(words)
    if got.list:
        for operator in all_operators().values():
            print(f"{operator.name:32} {operator.family:10} {operator.says}")
        return 0
    chosen = _operators(got.operator)
    jobs = [
        Job(config, chosen, got.each or None, got.seed, got.limit or None)
        for config in got.configs or config_names()
    ]
    rows: list[Row] = []
    start = time.monotonic()
    for row in _run(jobs, got.jobs):
        rows.append(row)
        if got.json is not None and len(rows) % 50 == 0:
            save(rows, got.json)  # a run that is cut off leaves what it found
        if row.outcome in (SILENT, BUG):
            print(
                f"{row.outcome}: {row.config} {row.operator} #{row.number} {row.where} "
                f"{row.delta:.3g} {row.reason if row.outcome == BUG else ''}",
                flush=True,
            )
            if got.silent is not None:
                with got.silent.open("a") as file:
                    file.write(row.text() + "\n\n")
    if got.json is not None:
        save(rows, got.json)
    print(table(rows))
    print(summary(rows))
    print(f"{time.monotonic() - start:.0f} seconds")
    return 1 if any(row.outcome in (SILENT, BUG) for row in rows) else 0


def _operators(wanted: list[str]) -> tuple[str, ...]:
    known = all_operators()
    found: list[str] = []
    for name in wanted:
        family = name.removeprefix("family:")
        matching = [
            o.name
            for o in known.values()
            if name == o.name or (name != family and o.family == family)
        ]
        if not matching:
            raise SystemExit(f"no operator or family {name!r}: see --list")
        found += matching
    return tuple(found)


def _run(jobs: list[Job], count: int) -> Iterator[Row]:
    if count == 1:
        for job in jobs:
            yield from run(job)
        return
    context = multiprocessing.get_context("spawn")
    # A fresh process for every file: compiled mutants leave classes and kernels behind.
    with context.Pool(count, maxtasksperchild=1) as pool:
        for found in pool.imap_unordered(_listed, jobs):
            yield from found


def _listed(job: Job) -> list[Row]:
    return list(run(job))


def run(job: Job) -> Iterator[Row]:
    """Judge the mutants of one config, the unchanged file first."""
    import random

    import mlx.core as mx

    mx.disable_compile()  # on the CPU it costs a compiler run for every function and shape
    sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    library = Library()
    name = job.config.split("@")[0]
    file = File(name, library.text(name))
    try:
        judge = Judge(library, name, config_of(job.config), job.seed)
        unchanged = judge.of({name: file.text})
    except Exception as problem:
        print(f"left out: {job.config}: {type(problem).__name__}: {problem}", flush=True)
        return
    if unchanged.outcome not in (KEPT, "whole model"):
        print(f"left out: {job.config}: unchanged it is {unchanged}", flush=True)
        return
    chosen = list(mutants(library, job.config, job.operators, job.each, job.seed))
    if job.limit is not None and len(chosen) > job.limit:
        chosen = random.Random(f"{job.seed} {job.config}").sample(chosen, job.limit)
    for mutant in chosen:
        yield Row.of(mutant, judge.of(mutant.texts(file)), file)


if __name__ == "__main__":
    sys.exit(main())
