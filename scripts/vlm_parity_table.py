"""Write docs/vlm_parity.md: every folder of mlx_vlm, what it became, how far it is from mlx_vlm.

    python scripts/vlm_parity_table.py [--seed 0] [--json FILE] [FOLDER...]

Runs `vision_verify.verify` over one tiny config for each folder, in another process: a crash of
a folder's original is a row of the table, not its end. Results are kept in the JSON file, so
FOLDER measures some folders again, and `--page` only writes the page.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MANIFESTS = ROOT / "generated" / "mlx_vlm"
OWN, SHARED = ROOT / "tests" / "vlm_configs", ROOT / "tests" / "configs"
Measure = Callable[[Path, int], dict[str, Any]]
SHOWN = {"model": "per-sequence (whole model)"}


def main() -> int:
    parser = arguments(__doc__.splitlines()[0], "vlm_parity.json")
    parser.add_argument("folders", nargs="*", metavar="FOLDER")
    options = parser.parse_args()
    if options.measure:
        print_outcomes(measure, options.measure, options.seed)
        return 0
    found: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    names = options.folders or sorted(path.parent.name for path in MANIFESTS.glob("*/*.json"))
    configs = {name: config_of(name) for name in ([] if options.page else names)}
    for name, config in configs.items():
        if config is None:
            found.pop(name, None)
    left = {name: config for name, config in configs.items() if config is not None}
    for name, result in apart(left, options.seed):
        found[name] = result
        print(name, result, flush=True)
        options.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    (ROOT / "docs" / "vlm_parity.md").write_text(page(found, options.seed))
    return int(any(row.get("passed") is False for row in found.values()))


def arguments(about: str, kept: str) -> argparse.ArgumentParser:
    """The options of a script that measures configs apart and keeps results in docs/`kept`."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / kept)
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--measure", type=Path, nargs="*", help=argparse.SUPPRESS)
    return parser


def print_outcomes(measure: Measure, configs: Iterable[Path], seed: int) -> None:
    """A line for `apart` to read for each config: what came of it, or why nothing did."""
    for config in configs:
        try:
            result = measure(config, seed)
        except Exception as problem:
            result = {"failed": " ".join(str(problem).split())[:90]}
        print(json.dumps(result), flush=True)


def config_of(folder: str) -> Path | None:
    """The folder's tiny config: its own, or that of mlx_lm's file that it is a copy of."""
    own = OWN / f"{folder}.json"
    if own.exists():
        return own
    lines = (ROOT / "tests" / "vlm_text.txt").read_text().splitlines()
    known = {name.lower().replace("-", "_"): name for name in lines if not name.startswith("#")}
    return SHARED / f"{known[folder]}.json" if folder in known else None


def apart(
    configs: Mapping[str, Path], seed: int, script: str = __file__
) -> Iterator[tuple[str, dict[str, Any]]]:
    """`measure` in another process: a new one goes on behind a folder that ended it."""
    left = list(configs)
    while left:
        words = [str(configs[name]) for name in left]
        command = [sys.executable, script, "--seed", str(seed), "--measure", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield left.pop(0), json.loads(line)
        if left:
            code = process.returncode
            yield left.pop(0), {"failed": f"ends the process ({code})"}


def measure(config: Path, seed: int) -> dict[str, Any]:
    """Route, and the largest difference over the spread, of text and of prompts with images."""
    sys.path.insert(0, str(ROOT / "tests"))
    from metal_stand_ins import standing_in
    from mlxrewrite.runtime.vision_verify import verify
    from vlm_prompts import read

    given, images = read(config)
    with standing_in(config.stem) as stand_ins:
        report = verify(given, images=images, seed=seed)
    parts = {"text": report.text, "images": report.images}
    deltas = {k: p.max_delta / p.spread for k, p in parts.items() if p is not None}
    rows = sum(p.rows for p in parts.values() if p is not None)
    wrong = sum(p.disagreeing for p in parts.values() if p is not None)
    return {
        "route": report.route,
        "why": report.why.partition(":")[0],  # without a path
        "read": report.read,
        "passed": report.passed,
        "rows": rows,
        "disagreeing": wrong,
        **({"stand_ins": True} if stand_ins else {}),
        **deltas,
    }


def row(manifest: Path, found: dict[str, Any]) -> str:
    content: dict[str, Any] = json.loads(manifest.read_text())
    name, route = manifest.parent.name, content["route"]
    kinds = ", ".join(sorted({item["kind"] for item in content["classes"]}))
    note = ""
    if route in ("model", "refused", "none"):
        told = [d for item in content["refused"] for d in item["diagnostics"]]
        slugs = [
            item["slug"] for item in [*content["notes"], *(told if route == "refused" else ())]
        ]
        note = ", ".join(sorted(set(slugs)))
    elif not kinds:
        kinds = "those of the folder it imports"
    got = found.get(name)
    start = f"| {name} | {kinds or '-'} | {SHOWN.get(route, route)} |"
    if got is None:
        return f"{start} - | - | - | {note or 'no config'} |"
    if "failed" in got:
        return f"{start} - | - | - | {got['failed']} |"
    if got["route"] == "model" and route != "model":
        note = f"whole model with this config: {got['why'].partition(':')[0]}"
    if got.get("stand_ins"):
        note = "with plain MLX in place of its Metal kernels, which run nowhere else"
    agree = f"{got['rows'] - got['disagreeing']} of {got['rows']}"
    agree += "" if got["passed"] else " DIFFERS"
    image = f"{got['images']:.1e} ({got['read']})" if "images" in got else "-"
    return f"{start} {got['text']:.1e} | {image} | {agree} | {note} |"


def page(found: dict[str, Any], seed: int) -> str:
    manifests = sorted(MANIFESTS.glob("*/language.json"))
    routes = Counter(json.loads(path.read_text())["route"] for path in manifests)
    counted = ", ".join(f"{n} {SHOWN.get(route, route)}" for route, n in sorted(routes.items()))
    names = {path.parent.name for path in manifests}
    agree = sum(bool(row.get("passed")) for name, row in found.items() if name in names)
    images = sum("images" in row for name, row in found.items() if name in names)
    version = {name: importlib.metadata.version(name) for name in ("mlx-vlm", "mlx")}
    lines = [
        "# Parity of every folder of mlx_vlm",
        "",
        f"mlx-vlm {version['mlx-vlm']}, MLX {version['mlx']} on its CPU back end, float32, seed",
        f"{seed}. Made by `python scripts/vlm_parity_table.py`. Mixed batches of prompts with and",
        "without images (random pixels), joining while others decode, over blocks in random order",
        "with NaN in free ones, against mlx_vlm's own generation of one sequence at a time. `text`",
        "and `images` are the largest difference of two logits over the spread of the logits",
        "(allowed: 1e-4), `tokens` the rows whose greedy token is the same. Folders that use",
        "another folder's language model have no row.",
        "",
        f"{len(manifests)} folders: {counted}. {agree} agree, {images} of them with images too.",
        "",
        "| folder | kinds | route | text | images | tokens | note |",
        "|---|---|---|---|---|---|---|",
        *(row(path, found) for path in manifests),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
