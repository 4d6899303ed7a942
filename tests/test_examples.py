"""The example models: what they become is committed, and runs like the original."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from compiling import EXAMPLES
from mlxrewrite.cli import main
from mlxrewrite.passes.write import compare

GOLDEN = EXAMPLES.parent / "generated"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
# Not token by token: the whole model runs once per sequence.
WHOLE = {
    "row_mixing": ("row-mixing", "row_mixing.py:85:23"),
    "reads_cache": ("no-kind", "reads_cache.py:"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    status = main([str(EXAMPLES), "-o", str(folder), "-q", "--no-cache"])
    assert status == 0
    return folder


def test_golden_files(made):
    """`MLXREWRITE_UPDATE=1 pytest tests/test_examples.py` writes them anew."""
    outputs = {
        path.name: path.read_bytes() for path in made.iterdir() if path.name != "__init__.py"
    }
    if os.environ.get("MLXREWRITE_UPDATE"):
        main([str(EXAMPLES), "-o", str(GOLDEN), "-q", "--no-cache"])
    differences = compare(
        GOLDEN, {n: d for n, d in outputs.items() if n != "__pycache__"}, whole=True
    )
    assert not differences, "".join(difference.diff() for difference in differences)


@pytest.mark.parametrize("name", NAMES)
def test_example_agrees_with_its_original(made, name):
    from mlxrewrite.runtime.verify import verify

    report = verify(EXAMPLES / f"{name}.json", generated=made, source=EXAMPLES / f"{name}.py")
    assert report.passed, report.text()
    assert not report.unreached, report.text()


@pytest.mark.parametrize("name", NAMES)
def test_what_mixes_rows_is_named(made, name):
    content = json.loads((made / f"{name}.json").read_text())
    if name not in WHOLE:
        assert content["route"] != "model"
        return
    slug, place = WHOLE[name]
    note = content["notes"][0]
    assert content["route"] == "model" and note["slug"] == slug and place in note["at"]
