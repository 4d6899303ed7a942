"""Write docs/parity.md: every model file, what it became, and how far it is from the original.

    python scripts/parity_table.py [--seed 0] [--json FILE]

Runs `verify` over all tiny configs in tests/configs: ragged batches over shuffled, NaN-filled
blocks against the original model with its own caches. A file's row is the worst of its configs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "tests" / "configs"
NO_BACK_END = "needs Metal: the original runs nowhere else"


@dataclass
class Row:
    """One model file."""

    name: str
    kinds: str
    route: str
    configs: int = 0
    delta: float = 0.0  # largest difference over the spread of the logits
    rows: int = 0
    disagreeing: int = 0
    failed: list[str] = field(default_factory=list)

    def text(self) -> str:
        if self.failed:
            outcome = f"| {self.configs} | - | {'; '.join(self.failed)} |"
        elif not self.configs:
            outcome = "| 0 | - | no config |"
        else:
            agree = f"{self.rows - self.disagreeing} of {self.rows}"
            outcome = f"| {self.configs} | {self.delta:.1e} | {agree} |"
        return f"| {self.name} | {self.kinds} | {self.route} {outcome}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # mlx_lm's olmo file ends the process where a package it never uses is absent.
    sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    rows = {path.stem: row_of(path) for path in sorted((ROOT / "generated/mlx_lm").glob("*.json"))}
    from mlxrewrite.runtime.verify import verify

    for config in sorted(CONFIGS.glob("*.json")):
        row = rows[config.stem.split("@")[0]]
        try:
            report = verify(config, seed=options.seed)
        except RuntimeError as problem:
            if "Metal" not in str(problem) and "metal" not in str(problem):
                raise
            row.failed = [NO_BACK_END]
            continue
        got = report.comparison
        row.configs += 1
        row.delta = max(row.delta, got.max_delta / got.spread)
        row.rows += got.rows
        row.disagreeing += got.disagreeing
        if not report.passed:
            row.failed.append(f"{config.stem} DIFFERS")
        print(config.stem, report.passed, flush=True)
    (ROOT / "docs" / "parity.md").write_text(page(list(rows.values()), options.seed))
    if options.json is not None:
        options.json.write_text(json.dumps([row.__dict__ for row in rows.values()], indent=1))
    return int(any("DIFFERS" in text for row in rows.values() for text in row.failed))


def row_of(manifest: Path) -> Row:
    content: dict[str, Any] = json.loads(manifest.read_text())
    kinds = sorted({item["kind"] for item in content["classes"]})
    route = content["route"]
    shown = {"model": "per-sequence (whole model)"}.get(route, route)
    return Row(manifest.stem, ", ".join(kinds) or "that of the file it imports", shown)


def page(rows: list[Row], seed: int) -> str:
    version = importlib.metadata.version("mlx-lm")
    mlx = importlib.metadata.version("mlx")
    routes: dict[str, int] = {}
    for row in rows:
        routes[row.route] = routes.get(row.route, 0) + 1
    agree = sum(bool(row.configs) and not row.failed for row in rows)
    counted = ", ".join(f"{n} {route}" for route, n in sorted(routes.items()))
    lines = [
        "# Parity of every model file",
        "",
        f"mlx-lm {version}, MLX {mlx} on its CPU back end, float32, seed {seed}. Made by",
        "`python scripts/parity_table.py`. Ragged batches (chunked prefill among decode, blocks",
        "in random order, NaN in free ones) against the original with its own caches, one sequence",
        "at a time. `difference` is the largest difference of two logits over the spread of the",
        "logits (allowed: 1e-4), `tokens` the rows whose greedy token is the same. A file's row is",
        "the worst of its tiny configs (`tests/configs`).",
        "",
        f"{len(rows)} files: {counted}. {agree} agree.",
        "",
        "| file | kinds | route | configs | difference | tokens |",
        "|---|---|---|---|---|---|",
        *(row.text() for row in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
