"""The example models: what they become is committed, and runs like the original."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from compiling import EXAMPLES
from mlxrewrite.cli import main
from mlxrewrite.passes.write import compare

GOLDEN = EXAMPLES.parent / "generated"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
REFUSED = {"row_mixing"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    status = main([str(EXAMPLES), "-o", str(folder), "-q", "--no-cache"])
    assert status == (1 if REFUSED else 0)
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


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_example_agrees_with_its_original(made, name):
    from mlxrewrite.runtime.verify import verify

    report = verify(EXAMPLES / f"{name}.json", generated=made, source=EXAMPLES / f"{name}.py")
    assert report.passed, report.text()
    assert not report.unreached, report.text()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_examples_have_no_output(made, name):
    assert not (made / f"{name}.py").exists()
    assert (made / f"{name}.json").exists()
