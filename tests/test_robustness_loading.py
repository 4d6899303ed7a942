"""What may be imported: files that the compiler wrote from what is installed, and nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import os
import py_compile
import shutil
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import pytest
from compiling import EXAMPLES
from mlxrewrite.cli import main
from mlxrewrite.runtime import manifest
from mlxrewrite.runtime.errors import BadModel, NotGenerated
from mlxrewrite.runtime.load import load_model, rewritten_module
from mlxrewrite.runtime.manifest import check, generated_folder, load_generated

SIBLINGS = "mistral3"  # its generated file imports those of llama and ministral3


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for name in (SIBLINGS, "phixtral"):
        assert main([f"mlx_lm.models.{name}", "-o", str(folder), "-q"]) == 0
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "generated"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


def refused(folder: Path, module: str, *said: str) -> str:
    with pytest.raises(NotGenerated) as caught:
        load_generated(folder, module)
    text = str(caught.value)
    assert "\n" not in text
    for part in said:
        assert part in text, text
    return text


FIX = "run `mlxrewrite mlx_lm.models"


def test_good_files_load(folder):
    assert load_generated(folder, "phixtral").Model.__module__.endswith(".phixtral")
    assert load_generated(folder, SIBLINGS).Model


def test_tampered_file(folder):
    path = folder / "phixtral.py"
    path.write_bytes(path.read_bytes() + b"\nprint('mine')\n")
    refused(folder, "phixtral", str(path), "edited", f"{FIX} -o {folder}`")


def test_tampered_sibling(folder):
    """Every generated file that a generated file imports is checked too, before it runs."""
    mark = folder / "executed"
    path = folder / "llama.py"
    path.write_bytes(path.read_bytes() + f"\nopen({str(mark)!r}, 'w').close()\n".encode())
    refused(folder, SIBLINGS, str(path), "edited", FIX)
    assert not mark.exists()


def test_missing_sibling(folder):
    (folder / "llama.py").unlink()
    refused(folder, SIBLINGS, "llama", "not rewritten", FIX)
    (folder / "llama.json").unlink()
    refused(folder, SIBLINGS, "llama", "not rewritten", FIX)


def test_a_refused_sibling_loads_after_the_fix(folder):
    good = (folder / "llama.py").read_bytes()
    (folder / "llama.py").write_bytes(b"x = 1\n")
    refused(folder, SIBLINGS, "llama")
    (folder / "llama.py").write_bytes(good)
    assert load_generated(folder, SIBLINGS).Model


def test_file_replaced_after_the_check(folder, monkeypatch):
    """The bytes that run are those that were compared, whatever the file holds by then."""
    path, mark = folder / "phixtral.py", folder / "executed"
    digest = manifest._digest
    read = Path.read_bytes

    def late(this: Path) -> bytes:
        data = read(this)
        if this == path:
            path.write_bytes(data + f"\nopen({str(mark)!r}, 'w').close()\n".encode())
        return data

    monkeypatch.setattr(Path, "read_bytes", late)
    with pytest.raises(NotGenerated):  # the second look sees the change
        load_generated(folder, "phixtral")
    assert not mark.exists()
    assert digest is manifest._digest


def test_cached_bytecode_is_never_run(folder, tmp_path):
    """No hash covers `__pycache__`: a planted one must not be read, and none is written."""
    path, mark = folder / "phixtral.py", folder / "executed"
    data, times = path.read_bytes(), os.stat(path)
    evil = tmp_path / "evil.py"
    evil.write_bytes(f"open({str(mark)!r}, 'w').close()\n".encode().ljust(len(data), b"#"))
    os.utime(evil, ns=(times.st_atime_ns, times.st_mtime_ns))
    cached = folder / "__pycache__" / "phixtral.cpython-311.pyc"
    cached.parent.mkdir(exist_ok=True)
    for name in {cached, Path(str(cached).replace("311", f"{os.sys.version_info[1]}"))}:
        py_compile.compile(str(evil), cfile=str(name), doraise=True)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    load_generated(folder, "phixtral")
    assert not mark.exists()
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_read_only_folder_loads(folder):
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        load_generated(folder, "phixtral")
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a manifest"),
        ("[]", "not a manifest"),
        ("{}", "not a manifest"),
        ('{"api": 1, "module": 3}', "not a manifest"),
        ("\x00", "not a manifest"),
    ],
)
def test_broken_manifest(folder, text, said):
    (folder / "phixtral.json").write_text(text)
    refused(folder, "phixtral", said, "phixtral.json", "mlxrewrite")


def test_manifest_of_another_interface(folder):
    edit(folder / "phixtral.json", api=manifest.API + 1)
    refused(folder, "phixtral", "API", FIX)


def test_manifest_of_another_module(folder):
    """`llama` saved under another name is not that other model."""
    shutil.copy(folder / "llama.json", folder / "phixtral.json")
    shutil.copy(folder / "llama.py", folder / "phixtral.py")
    refused(folder, "phixtral", "mlx_lm.models.llama", FIX)


def test_manifest_of_another_release(folder):
    edit(folder / "phixtral.json", upstream="mlx-lm 0.1.0")
    refused(folder, "phixtral", "mlx-lm 0.1.0", "is installed", FIX)


def test_installed_release_moved_on(folder, monkeypatch):
    """The same source in a newer release is refused too: what it imports may have changed."""
    monkeypatch.setattr(manifest, "version", lambda name: "99.0.0")
    refused(folder, "phixtral", "mlx-lm 99.0.0", FIX)
    assert importlib.metadata.version("mlx-lm") != "99.0.0"


def test_source_changed(folder):
    edit(folder / "phixtral.json", source_sha256=sha256(b"older").hexdigest())
    refused(folder, "phixtral", "another version", "phixtral.py", FIX)


def test_something_it_was_made_from_changed(folder):
    """`base.py` is not rewritten, but what the compiler concluded depends on it."""
    reads = json.loads((folder / "phixtral.json").read_bytes())["reads_sha256"]
    assert "mlx_lm.models.base" in reads
    reads["mlx_lm.models.base"] = sha256(b"older").hexdigest()
    edit(folder / "phixtral.json", reads_sha256=reads)
    refused(folder, "phixtral", "another version", "base.py", FIX)


def test_refused_model_has_the_reason(folder):
    edit(
        folder / "phixtral.json",
        output_sha256=None,
        refused=[{"class": "A", "diagnostics": [{"slug": "x", "message": "it mixes rows"}]}],
    )
    refused(folder, "phixtral", "refused by the compiler", "it mixes rows")


@pytest.mark.parametrize(
    "name",
    ["../phixtral", "/etc/passwd", "a/../../b", "..", ".", "", "a\\b", "a\0b", "c:d", ".hidden"],
)
def test_names_that_lead_elsewhere(folder, name):
    (folder.parent / "phixtral.py").write_bytes((folder / "phixtral.py").read_bytes())
    (folder.parent / "phixtral.json").write_bytes((folder / "phixtral.json").read_bytes())
    refused(folder, name, "not the name of a model file")
    with pytest.raises((NotGenerated, BadModel)):
        rewritten_module({"model_type": name}, folder)


def test_folders_that_are_none(tmp_path, monkeypatch):
    for place in (tmp_path / "absent", tmp_path / "file"):
        (tmp_path / "file").write_text("x")
        with pytest.raises(NotGenerated, match="no folder"):
            generated_folder(place)
        monkeypatch.setenv("MLXREWRITE_GENERATED", str(place))
        with pytest.raises(NotGenerated, match="no folder"):
            generated_folder()


# ------------------------------------------------------------------ checkpoints with custom code


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A model folder that brings its own file, under the name of one of mlx_lm's."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = json.loads((EXAMPLES / "gqa.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "llama.py"}))
    (folder / "llama.py").write_bytes((EXAMPLES / "gqa.py").read_bytes())
    mx.save_safetensors(str(folder / "model.safetensors"), {"none": mx.zeros(1)})
    return folder


def test_custom_code_wants_trust(checkpoint, folder):
    with pytest.raises(BadModel, match="trust_remote_code"):
        load_model(checkpoint, generated=folder)


def test_custom_code_is_not_confused_with_mlx_lm(checkpoint, folder):
    """Its file is called like one of mlx_lm's; the rewritten form of that one is another model."""
    with pytest.raises(NotGenerated, match="was not made from") as caught:
        load_model(checkpoint, generated=folder, trust_remote_code=True)
    assert f"run `mlxrewrite {checkpoint / 'llama.py'} -o {folder}`" in str(caught.value)


def test_custom_code_changed_since(checkpoint, tmp_path):
    out = tmp_path / "own"
    assert main([str(checkpoint / "llama.py"), "-o", str(out), "-q"]) == 0
    assert check(out, "llama").source_sha256
    with (checkpoint / "llama.py").open("a") as file:
        file.write("\n# edited\n")
    with pytest.raises(NotGenerated, match="was not made from"):
        load_model(checkpoint, generated=out, trust_remote_code=True)


def test_custom_code_is_never_imported_as_it_is(checkpoint, tmp_path):
    """Only the rewritten file runs, though mlx_lm itself would import the checkpoint's."""
    mark, out = tmp_path / "executed", tmp_path / "own"
    (checkpoint / "llama.py").write_bytes(
        (EXAMPLES / "gqa.py").read_bytes() + f"\nopen({str(mark)!r}, 'a').write('x')\n".encode()
    )
    with pytest.raises(BadModel):
        load_model(checkpoint, generated=out.parent)
    assert main([str(checkpoint / "llama.py"), "-o", str(out), "-q"]) == 0
    assert not mark.exists()  # compiling never runs it
    with pytest.raises(BadModel):  # weights of something else
        load_model(checkpoint, generated=out, trust_remote_code=True)
    assert mark.read_text() == "x"  # once: by the rewritten file, which holds the same line
