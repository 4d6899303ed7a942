"""Token independence of mlx_vlm's language models: which are proved, and what the others lack."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import test_vlm_compile as vlm
from mlxrewrite.pipeline import Compiler
from mlxrewrite.sources import locate

TABLE = Path(__file__).parent / "vlm_proofs.txt"


def outcome(compiler: Compiler, name: str) -> str | None:
    proof = compiler.language_proof(name)
    if proof is None:
        return None
    failure = proof.failure
    return f"{failure.slug}: {failure.message}" if failure is not None else "proved"


def tabled() -> dict[str, str]:
    lines = TABLE.read_text().splitlines()
    return {name: said for name, _, said in (line.partition("  ") for line in lines)}


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "phi3", "qwen2_vl"])
def test_some_language_models(name):
    compiler = Compiler(locate("mlx_vlm.models").package)
    assert outcome(compiler, f"mlx_vlm.models.{name}.language") == tabled()[name]


@pytest.mark.slow
def test_the_table_of_proofs():
    package = locate("mlx_vlm.models").package
    compiler = Compiler(package)
    found = {
        name.split(".")[2]: said
        for name in package.targets()
        if (said := outcome(compiler, name)) is not None
    }
    if os.environ.get("MLXREWRITE_UPDATE"):
        TABLE.write_text("".join(f"{name}  {said}\n" for name, said in sorted(found.items())))
    assert found == tabled()


@pytest.mark.parametrize(
    ("new", "slug"),
    [
        ("h - h.mean(axis=1, keepdims=True)", "row-mixing"),
        ("h / h.shape[1]", "token-count"),
        ("h[:, ::-1]", "position-special"),
        ("h", None),
    ],
)
def test_an_attack_on_a_language_model_is_seen(tmp_path, new, slug):
    text = vlm.LANGUAGE.replace("logits=self.head(h)", f"logits=self.head({new})")
    vlm.compiled(tmp_path, text)
    compiler = Compiler(locate(str(tmp_path / "models")).package)
    proof = compiler.language_proof("models.seen.language")
    assert proof is not None
    assert (proof.failure.slug if proof.failure is not None else None) == slug
