"""Every tiny config: the rewritten model against the original, on ragged schedules."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

CONFIGS = sorted((Path(__file__).parent / "configs").glob("*.json"))
METAL_ONLY = {"bitnet", "muse_spark"}  # their kernels have no other form; see docs/upstream.md


@pytest.fixture(autouse=True)
def probe_module(monkeypatch):
    """mlx_lm's olmo file ends the process where a package it never uses is absent."""
    monkeypatch.setitem(sys.modules, "hf_olmo", types.ModuleType("hf_olmo"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_rewritten_model_agrees(config):
    from mlxrewrite.runtime.verify import verify

    if config.stem.split("@")[0] in METAL_ONLY:
        pytest.skip("Metal-only upstream code")
    report = verify(config)
    assert report.passed, report.text()
    assert not report.unreached, report.text()
    assert report.comparison.spread > 0


def test_a_wrong_model_is_noticed(tmp_path, monkeypatch):
    """The comparison can fail: a rewritten file with a wrong scale does not pass."""
    from hashlib import sha256

    from compiling import mlx_lm
    from mlxrewrite.cli import default_folder
    from mlxrewrite.runtime.verify import verify

    folder = default_folder(mlx_lm())
    target = tmp_path / "mlx_lm"
    target.mkdir()
    (target / "__init__.py").write_text("")
    code = (folder / "llama.py").read_text()
    wrong = code.replace("self.scale = head_dim**-0.5", "self.scale = head_dim**-0.51")
    assert wrong != code
    manifest = json.loads((folder / "llama.json").read_text())
    manifest["output_sha256"] = sha256(wrong.encode()).hexdigest()
    (target / "llama.py").write_text(wrong)
    (target / "llama.json").write_text(json.dumps(manifest))
    report = verify(CONFIGS[0].parent / "llama.json", generated=tmp_path)
    assert not report.passed
