"""`python -m tests.mutation`: run mutants of many files over a few processes."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from .corpus import EVERY_KIND, config_names
from .judge import BUG, SILENT
from .operators import all_operators
from .report import add as add_row
from .report import families, load, summary, table
from .running import Job, rows_of


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.mutation", description=__doc__)
    add = parser.add_argument
    add("configs", nargs="*", help="names of tiny configs (default: every kind)")
    add("--every-file", action="store_true", help="a config of every file")
    add("--operator", action="append", default=[], help="only this operator, or family:NAME")
    add("--each", type=int, default=1, help="mutants of an operator and file (0: all)")
    add("--limit", type=int, default=0, help="mutants of a file, by other operators (0: all)")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=2)
    add("--minutes", type=float, default=float("inf"), help="begin no mutant after that")
    add("--json", type=Path, help="add every row, a line each; mutants in the file are not run")
    add("--silent", type=Path, help="append every silent mutant as it is found")
    add("--list", action="store_true", help="list the operators")
    got = parser.parse_args(words)
    if got.list:
        for operator in all_operators().values():
            print(f"{operator.name:32} {operator.family:10} {operator.says}")
        return 0
    chosen = _operators(got.operator)
    start = time.time()
    rows = load(got.json) if got.json is not None else []
    known = frozenset(row.key for row in rows)
    until = start + 60 * got.minutes
    jobs = [
        Job(config, chosen, got.each or None, got.seed, got.limit or None, known, until)
        for config in got.configs or (config_names() if got.every_file else EVERY_KIND)
    ]
    for row in rows_of(jobs, got.jobs):
        rows.append(row)
        if got.json is not None:
            add_row(row, got.json)
        if row.outcome in (SILENT, BUG):
            print(
                f"{row.outcome}: {row.config} {row.operator} #{row.number} {row.where} "
                f"{row.delta:.3g} {row.reason if row.outcome == BUG else ''}",
                flush=True,
            )
            if got.silent is not None:
                with got.silent.open("a") as file:
                    file.write(row.text() + "\n\n")
    print(table(rows))
    print(families(rows))
    print(summary(rows))
    print(f"{time.time() - start:.0f} seconds")
    if time.time() > until:
        print("the time is over: call again with the same file to go on")
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


if __name__ == "__main__":
    sys.exit(main())
