"""Exit codes for folders of mlx_vlm that are refused."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx_vlm")
from mlxrewrite.cli import main

REFUSED, FINE = "mlx_vlm.models.falcon_perception", "mlx_vlm.models.llava"


@pytest.mark.parametrize(("source", "status"), [(REFUSED, 1), (FINE, 0)])
def test_a_refusal_is_told_when_it_is_made_and_is_no_difference(tmp_path, source, status):
    words = ["-q", "-o", str(tmp_path), source]
    assert main(words) == status
    assert main(["--check", *words]) == 0
    (tmp_path / source.rpartition(".")[2] / "language.json").write_text("{}")
    assert main(["--check", *words]) == 1
