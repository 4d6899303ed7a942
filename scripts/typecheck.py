"""Run mypy over the packages as they are imported: folders here are parts of one package."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary) / "mlxrewrite"
        package.mkdir()
        for part in (ROOT / "rewrite").iterdir():
            (package / part.name).symlink_to(part)
        for name in ("kernels", "runtime"):
            (package / name).symlink_to(ROOT / name)
        generated = package / "generated"
        generated.mkdir()
        (generated / "__init__.py").touch()
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        command += ["--cache-dir", str(ROOT / ".mypy_cache"), "-p", "mlxrewrite", *sys.argv[1:]]
        return subprocess.run(command, cwd=temporary, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
