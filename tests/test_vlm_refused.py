"""Folders of mlx_vlm that are refused, and why: by the compiler, or when a model is loaded."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("mlx_vlm")
from mlxrewrite.runtime.errors import RuntimeRefusal
from mlxrewrite.runtime.vision_generate import wrapped
from mlxrewrite.runtime.vision_verify import build
from vlm_prompts import FOLDER

REFUSED = json.loads((FOLDER.parent / "vlm_refused.json").read_text())


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_folder_is_refused_with_its_reason(name):
    """Before anything of the model runs: phi3small's original would end the process."""
    case, name = REFUSED[name], name.partition("@")[0]
    with pytest.raises(RuntimeRefusal) as problem:
        wrapped(build({"model_type": name, **case["config"]}, 0))
    assert name in str(problem.value) and case["why"] in str(problem.value)
