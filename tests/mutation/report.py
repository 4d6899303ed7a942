"""What a run found: rows as JSON, a table of operators by outcome, and every silent mutant."""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .corpus import Mutant
from .judge import BUG, INVALID, KEPT, LOUD, MODEL, OUTCOMES, REFUSED, SILENT, Verdict
from .operators import all_operators
from .source import File

UNSEEN = 1e-4  # an effect below this changed nothing that the schedule shows


@dataclass(frozen=True)
class Row:
    """One judged mutant."""

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
    def of(mutant: Mutant, verdict: Verdict, file: File) -> Row:
        diff = ""
        if verdict.outcome in (SILENT, BUG):
            diff = difference(file.text, mutant.texts(file), mutant.file)
        return Row(
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
    rows = list(rows)
    operators = all_operators()
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        line = counts.setdefault(row.operator, Counter())
        line[row.outcome] += 1
        line["acts"] += row.acts
    head = ["operator", "family", *OUTCOMES, "acts"]
    body = [
        [
            name,
            operators[name].family + (" (same)" if operators[name].same else ""),
            *(str(line[outcome] or "") for outcome in OUTCOMES),
            str(line["acts"] or ""),
        ]
        for name, line in sorted(counts.items())
    ]
    total: Counter[str] = sum(counts.values(), Counter())
    body.append(["total", "", *(str(total[o]) for o in OUTCOMES), str(total["acts"])])
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


def save(rows: Iterable[Row], path: Path) -> None:
    path.write_text(json.dumps([asdict(row) for row in rows], indent=0) + "\n")


def load(path: Path) -> list[Row]:
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return [Row(**row) for row in found]
