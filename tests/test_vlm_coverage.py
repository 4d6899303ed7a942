"""Every folder of mlx_vlm with a language model is compared with the original, or says why not."""

from __future__ import annotations

import json
from pathlib import Path

TESTS = Path(__file__).parent
MANIFESTS = sorted((TESTS.parent / "generated" / "mlx_vlm").glob("*/language.json"))

# Folders that run and have no config to compare them with.
WITHOUT = {
    "diffusion_gemma": "generates by diffusion and is refused when loaded (docs/vlm.md)",
}


def routes() -> dict[str, dict[str, object]]:
    return {path.parent.name: json.loads(path.read_text()) for path in MANIFESTS}


def test_every_folder_that_runs_is_compared_or_says_why_not():
    lines = (TESTS / "vlm_text.txt").read_text().splitlines()
    shared = {name.lower().replace("-", "_") for name in lines if not name.startswith("#")}
    own = {path.stem for path in (TESTS / "vlm_configs").glob("*.json")}
    found = routes()
    runs = {name for name, told in found.items() if told["route"] not in ("refused", "none")}
    assert len(found) > 170
    assert runs - own - shared <= WITHOUT.keys()


def test_what_does_not_run_says_what_is_missing():
    for name, told in routes().items():
        if told["route"] in ("refused", "none", "model"):
            notes = told["notes"]
            assert notes, name
            assert all(note["message"] and note["slug"] for note in notes), name
