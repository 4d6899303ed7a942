"""What a run found: rows as JSON, a table of operators by outcome, and every silent mutant."""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from .corpus import Mutant
from .judge import BUG, INVALID, KEPT, LOUD, MODEL, OUTCOMES, REFUSED, SILENT, Verdict
from .operators import all_operators
from .source import File

Key = tuple[str, str, int, int]  # config, operator, number, seed of weights and schedule
UNSEEN = 1e-4  # an effect below this changed nothing that the schedule shows


@dataclass(frozen=True)
class Row:
    """One judged mutant."""

    seed: int
    config: str
    file: str
    operator: str
    number: int
    where: str
    outcome: str
    route: str
    reason: str
    delta: float
    effect: float
    stepwise: float
    diff: str

    @staticmethod
    def of(mutant: Mutant, verdict: Verdict, file: File, seed: int = 0) -> Row:
        diff = ""
        if verdict.outcome in (SILENT, BUG):
            diff = difference(file.text, mutant.texts(file), mutant.file)
        return Row(
            seed,
            mutant.config,
            mutant.file,
            mutant.operator.name,
            mutant.number,
            mutant.change.where,
            verdict.outcome,
            verdict.route,
            verdict.reason,
            verdict.delta,
            verdict.effect,
            verdict.stepwise,
            diff,
        )

    @property
    def key(self) -> Key:
        return self.config, self.operator, self.number, self.seed

    @property
    def acts(self) -> bool:
        """The mutant differs from the unchanged file."""
        return self.outcome != INVALID and (math.isnan(self.effect) or self.effect > UNSEEN)

    def text(self) -> str:
        chunks = ""
        if not math.isnan(self.stepwise):
            chunks = "the same in chunks and token by token"
            if self.stepwise > UNSEEN:
                chunks = f"itself {self.stepwise:.2g} apart between chunks and single tokens"
        return (
            f"=== {self.config} | {self.operator} #{self.number} | {self.where} | route "
            f"{self.route or '-'} | delta {self.delta:.3g} of the spread, effect "
            f"{self.effect:.3g}; the changed original is {chunks}\n"
            f"{self.reason}\n{self.diff}"
        )


def difference(before: str, texts: dict[str, str], name: str) -> str:
    lines: list[str] = []
    for file, text in texts.items():
        old = before if file == name else ""
        lines += difflib.unified_diff(
            old.splitlines(), text.splitlines(), f"{file}.py", f"{file}.py, changed", "", "", 2, ""
        )
    return "\n".join(lines)


def table(rows: Iterable[Row]) -> str:
    """Operators by outcome, with totals; `acts` counts mutants that differ from the original."""
    known = all_operators()

    def family(name: str) -> str:
        return known[name].family + (" (same)" if known[name].same else "")

    rows = list(rows)
    return _table("operator", [(row.operator, row) for row in rows], ("family", family))


def families(rows: Iterable[Row]) -> str:
    """Families of operators by outcome, with totals."""
    known = all_operators()
    rows = list(rows)

    def count(family: str) -> str:
        return str(len({r.operator for r in rows if known[r.operator].family == family}))

    return _table("family", [(known[row.operator].family, row) for row in rows], ("by", count))


def _table(
    title: str, rows: list[tuple[str, Row]], beside: tuple[str, Callable[[str], str]]
) -> str:
    counts: dict[str, Counter[str]] = {}
    for name, row in rows:
        line = counts.setdefault(name, Counter())
        line[row.outcome] += 1
        line["mutants"] += 1
        line["acts"] += row.acts
    columns = (*OUTCOMES, "mutants", "acts")
    head = [title, beside[0], *columns]
    body = [
        [name, beside[1](name), *(str(line[column] or "") for column in columns)]
        for name, line in sorted(counts.items())
    ]
    total: Counter[str] = sum(counts.values(), Counter())
    body.append(["total", "", *(str(total[column]) for column in columns)])
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *body]
    )


def summary(rows: Iterable[Row]) -> str:
    rows = list(rows)
    operators = all_operators()
    counts = Counter(row.outcome for row in rows)
    judged = [row for row in rows if row.outcome != INVALID]
    fine = [row for row in judged if operators[row.operator].same]
    cautious = [row for row in fine if row.outcome in (MODEL, REFUSED)]
    return (
        f"{len(rows)} mutants of {len({row.file for row in rows})} files by "
        f"{len({row.operator for row in rows})} operators: "
        + ", ".join(f"{counts[o]} {o}" for o in OUTCOMES)
        + f"\n{len(judged)} valid, {sum(row.acts for row in judged)} of them differ from the "
        f"unchanged file"
        + f"\nover-cautious: {len(cautious)} of {len(fine)} mutants that every token computes "
        f"alone, or that spell the same, were refused ({_percent(len(cautious), len(fine))})"
        + f"\nloud at run time: {counts[LOUD]}, kept: {counts[KEPT]}"
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "none"


def add(row: Row, path: Path) -> None:
    """One line of JSON more: a run that is cut off leaves all that it found."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def load(path: Path) -> list[Row]:
    """The rows of a file, if there is one; a line that was cut off is left out."""
    if not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text().split("\n")[:-1] if line]
