"""What the parts may know of each other."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlxrewrite.diagnostics import EXPLANATIONS, SLUGS

ROOT = Path(__file__).parent.parent
COMPILER = sorted((ROOT / "rewrite").rglob("*.py"))
# The two modules that wire sub-commands to the runtime, inside functions.
WIRING = {"__init__.py", "commands.py"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


@pytest.mark.parametrize("path", COMPILER, ids=lambda path: path.name)
def test_the_compiler_imports_no_mlx(path):
    if path.name in WIRING and path.parent.name == "rewrite":
        return
    assert not [name for name in imported(path) if name.split(".")[0] in ("mlx", "mlx_lm")]
    assert not [name for name in imported(path) if "runtime" in name]


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "runtime").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]),
    ids=lambda path: path.name,
)
def test_the_runtime_knows_no_syntax(path):
    assert not {"ast", "libcst"} & set(imported(path))
    assert not [name for name in imported(path) if "passes" in name or "kinds" in name]


def test_only_parse_knows_the_parser():
    knowing = {p.name for p in COMPILER if "ast" in imported(p)}
    assert knowing == {"parse.py", "verify.py"}  # verify parses what was made, once more
    assert {p.name for p in COMPILER if "libcst" in imported(p)} == {"parse.py"}


def test_kinds_see_facts_not_syntax():
    for path in (ROOT / "rewrite" / "kinds").glob("*.py"):
        assert not [name for name in imported(path) if name.endswith(("parse", "ast"))], path


def test_compiling_loads_no_mlx():
    script = (
        "import sys\n"
        "from mlxrewrite.cli import main\n"
        "assert main(['mlx_lm.models.llama', '--diff', '-q', '--no-cache']) in (0, 1)\n"
        "assert not [n for n in sys.modules if n.split('.')[0] in ('mlx', 'mlx_lm')]\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_slugs_are_known_and_used():
    text = "".join(path.read_text() for path in COMPILER if path.name != "diagnostics.py")
    used = set(re.findall(r'(?:Diagnostic|error)\(\s*"([a-z-]+)"', text))
    assert used <= set(SLUGS)
    assert set(EXPLANATIONS) <= set(SLUGS)


def test_nothing_names_a_model_in_the_compiler():
    """The structure is matched, never the model."""
    package = __import__("compiling").mlx_lm()
    names = {n.rsplit(".", 1)[-1] for n in package.modules()} - {
        "base", "cache", "mla", "ssm", "gear", "models", "pipeline", "gated_delta", "rope_utils",
        "activations", "switch_layers", "bitlinear_layers", "mamba", "phi", "llama", "mimo",
    }  # fmt: skip
    for path in COMPILER:
        tree = ast.parse(path.read_text())
        strings = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        assert not names & set(strings), path
