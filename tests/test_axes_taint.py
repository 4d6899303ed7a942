"""`verify --taint`: one changed token changes its own sequence from there on, and nothing else."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import mlx.core as mx
import pytest
from compiling import EXAMPLES
from mlx import nn
from mlxrewrite.cli import main
from mlxrewrite.runtime.schedule import random_schedule
from mlxrewrite.runtime.taint import spread, taint
from mlxrewrite.runtime.verify import _models, _read


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taint")
    assert main([str(EXAMPLES / "gqa.py"), "-o", str(folder), "-q", "--no-cache"]) == 0
    return folder


def test_rows_of_a_rewritten_model_are_independent(made):
    report = taint(EXAMPLES / "gqa.json", generated=made, source=EXAMPLES / "gqa.py", probes=3)
    assert report.passed, report.text()
    assert any(probe.later > report.allowed for probe in report.probes), report.text()


class Mixed(nn.Module):
    """A norm that lets every row see a little of all others."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, x):
        return self.inner(x + 0.01 * x.mean(axis=0, keepdims=True))


def test_a_model_that_mixes_rows_is_caught(made):
    _, config, folder = _read(EXAMPLES / "gqa.json")
    _, model, _ = _models(config, folder, 0, made, EXAMPLES / "gqa.py")
    model.model.norm = Mixed(model.model.norm)
    schedule = random_schedule(0, [(5, 2), (3, 3), (4, 1)], 100, max_chunk=4)
    report = spread("mixed", model, schedule, 100, probes=2)
    assert not report.passed
    assert any(probe.others > report.allowed for probe in report.probes)


CONFIGS = sorted((Path(__file__).parent / "configs").glob("*.json"))
# Every fifth; docs/taint.md has all of them.
SOME = [path for path in CONFIGS[::5] if not path.stem.startswith(("bitnet", "muse_spark"))]


@pytest.mark.slow
@pytest.mark.parametrize("config", SOME, ids=lambda path: path.stem)
def test_rows_of_models_are_independent(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "hf_olmo", types.ModuleType("hf_olmo"))
    report = taint(config, probes=2)
    assert report.passed, report.text()
    assert not report.looks_ahead or config.stem.startswith("phi3small"), report.text()


class Ahead(nn.Module):
    """A norm that lets every row see a little of the next one of its chunk."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, x):
        axis = int(x.shape[1] == 1)  # rows of ours stand on the first axis
        later = (
            mx.concatenate([x[1:], x[-1:]]) if axis else mx.concatenate([x[:, 1:], x[:, -1:]], 1)
        )
        return self.inner(x + 0.1 * later)


def test_rows_that_see_later_ones_need_an_original_that_does(made):
    _, config, folder = _read(EXAMPLES / "gqa.json")
    original, model, _ = _models(config, folder, 0, made, EXAMPLES / "gqa.py")
    schedule = random_schedule(0, [(9, 1)], 100, max_chunk=9)
    model.model.norm = Ahead(model.model.norm)
    assert not spread("ahead", model, schedule, 100, probes=4, original=original).passed
    original.model.norm = Ahead(original.model.norm)
    assert spread("ahead", model, schedule, 100, probes=4, original=original).looks_ahead
