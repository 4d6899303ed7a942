"""The package as it is installed: a wheel with all its data, and the command it brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(out), str(ROOT)]
    subprocess.run(command, check=True)
    return next(out.glob("mlxrewrite-*.whl"))


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for folder, package in (
        ("rewrite", "mlxrewrite"),
        ("kernels", "mlxrewrite/kernels"),
        ("runtime", "mlxrewrite/runtime"),
        ("generated", "mlxrewrite/generated"),
    ):
        tracked = subprocess.run(
            ["git", "ls-files", folder], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split()
        files = [Path(name).relative_to(folder) for name in tracked]
        expected |= {f"{package}/{file.as_posix()}" for file in files if file.name[0] != "."}
    assert expected, "not a checkout"
    assert not expected - names


def test_the_wheel_installs_and_rewrites(wheel: Path, tmp_path: Path) -> None:
    """In an environment that sees the dependencies, but not this checkout."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    site = environment / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    places = [p for p in sys.path if p.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(places) + "\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps",
         "--force-reinstall", "--ignore-installed", str(wheel)],
        check=True,
    )  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLXREWRITE_GENERATED")}
    where = subprocess.run(
        [python, "-c", "import mlxrewrite; print(mlxrewrite.__file__)"],
        check=True, capture_output=True, text=True, cwd=tmp_path, env=clean,
    ).stdout  # fmt: skip
    assert where.startswith(str(site))
    command = [environment / "bin" / "mlxrewrite"]
    subprocess.run([*command, "mlx_lm.models.llama", "-q"], check=True, cwd=tmp_path, env=clean)
    assert (site / "mlxrewrite" / "generated" / "mlx_lm" / "llama.py").is_file()
    config = tmp_path / "llama.json"
    config.write_text((ROOT / "tests" / "configs" / "llama.json").read_text())
    verified = subprocess.run(
        [*command, "verify", config, "--json"],
        check=True, capture_output=True, text=True, cwd=tmp_path, env=clean,
    )  # fmt: skip
    assert json.loads(verified.stdout)["passed"] is True
