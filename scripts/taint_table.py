"""Write docs/taint.md: `verify --taint` over every tiny config of mlx_lm and mlx_vlm.

    python scripts/taint_table.py [--json FILE] [--page] [CONFIG.json ...]

Every config runs in a process that the next ones share until one ends it. Results are kept in the
JSON file: CONFIG measures some again, and `--page` only writes the page.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_parity_table import apart, arguments, print_outcomes

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT / "tests" / "configs", ROOT / "tests" / "vlm_configs")
PROBES = 2


def main() -> int:
    parser = arguments(__doc__.splitlines()[0], "taint.json")
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG.json")
    options = parser.parse_args()
    if options.measure:
        print_outcomes(measure, options.measure, options.seed)
        return 0
    found: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    configs = options.configs or [
        p for folder in reversed(FOLDERS) for p in sorted(folder.glob("*.json"))
    ]
    named = {f"{path.parent.name}/{path.stem}": path.resolve() for path in configs}
    for name, result in apart({} if options.page else named, options.seed, __file__):
        found[name] = result
        print(name, result, flush=True)
        options.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    (ROOT / "docs" / "taint.md").write_text(page(found, options.seed))
    return int(any(row.get("passed") is False for row in found.values()))


def measure(config: Path, seed: int) -> dict[str, Any]:
    # mlx_lm's olmo file ends the process where a package it never uses is absent.
    sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    if config.parent == FOLDERS[1]:
        from metal_stand_ins import standing_in
        from mlxrewrite.runtime.vision_taint import taint as vision
        from vlm_prompts import read

        given, images = read(config)
        with standing_in(config.stem):
            report = vision(given, images=images, seed=seed, probes=PROBES)
    else:
        from mlxrewrite.runtime.taint import taint

        report = taint(config, seed=seed, probes=PROBES)
    must_not = [
        max(probe.others, 0.0 if report.looks_ahead else probe.earlier) for probe in report.probes
    ]
    return {
        "passed": report.passed,
        "ahead": report.looks_ahead,
        "probes": len(report.probes),
        "rows": report.rows,
        "pixels": sum(probe.position < 0 for probe in report.probes),
        "moved": max(must_not) / report.allowed,
        "own": min(probe.own for probe in report.probes) / report.allowed,
    }


def page(found: Mapping[str, Any], seed: int) -> str:
    version = {n: importlib.metadata.version(n) for n in ("mlx-lm", "mlx-vlm", "mlx")}
    lines = [
        "# Which rows a changed token changes",
        "",
        f"mlx-lm {version['mlx-lm']}, mlx-vlm {version['mlx-vlm']}, MLX {version['mlx']} on its",
        f"CPU back end, float32, seed {seed}. Made by `python scripts/taint_table.py`.",
        "",
        f"Every tiny config runs a ragged batch, then again with each of {PROBES} tokens changed.",
        "Its own row must change, later rows of its sequence may, no other row may by more than",
        "1e-4 of the spread of the logits. Changed pixels may change rows of their prompt only.",
        "",
        "| configs | run | as they must | not run |",
        "|---|---|---|---|",
    ]
    for folder in FOLDERS:
        rows = {k: v for k, v in found.items() if k.startswith(f"{folder.name}/")}
        ran = [row for row in rows.values() if "failed" not in row]
        passed = sum(row["passed"] for row in ran)
        missing = len(rows) - len(ran)
        lines.append(f"| tests/{folder.name} | {len(ran)} of {len(rows)} | {passed} | {missing} |")
    ran = {k: row for k, row in found.items() if "failed" not in row}
    probes, pixels = (sum(row[key] for row in ran.values()) for key in ("probes", "pixels"))
    told = [row for row in ran.values() if row["passed"] and "moved" in row]
    still = sum(row["moved"] == 0 for row in told)
    most = max((row["moved"] for row in told), default=0.0)
    least = min((row["own"] for row in told), default=0.0)
    lines += [
        "",
        f"{probes} probes, {pixels} of them of pixels. Where changes were kept",
        f"({len(told)} configs) no other row changes at all in {still}; the most that one does",
        f"is {most:.1e} of what is allowed. A changed row changes by {least:.0f} times that or",
        "more.",
    ]
    wrong = sorted(k for k, row in ran.items() if not row["passed"])
    ahead = sorted(k.split("/")[1] for k, row in ran.items() if row["ahead"])
    if wrong:
        lines += ["", f"ROWS MIX: {', '.join(wrong)}."]
    if ahead:
        lines += [
            "",
            "Rows see later rows of their own chunk, in the original as in ours (a prefix that is",
            f"read both ways, or a mask that mlx_lm gets wrong): {', '.join(ahead)}.",
        ]
    reasons = Counter(row["failed"] for row in found.values() if "failed" in row)
    if reasons:
        lines += ["", "| not run, because | configs |", "|---|---|"]
        for reason in sorted(reasons):
            names = sorted(
                k.split("/")[1] for k, row in found.items() if row.get("failed") == reason
            )
            lines.append(f"| {reason} | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    sys.exit(main())
