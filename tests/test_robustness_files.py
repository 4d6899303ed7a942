"""Hostile input of the command: one clear error each, exit code 2, the other files done."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from compiling import EXAMPLES
from mlxrewrite.cli import main
from mlxrewrite.passes.parse import DEEPEST
from mlxrewrite.sources import LARGEST

GOOD = (EXAMPLES / "gqa.py").read_bytes()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "good.py").write_bytes(GOOD)
    return folder


def run(capsys, *words: object) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    got = capsys.readouterr()
    assert "Traceback" not in got.err
    return status, got.out, got.err


def one_error(capsys, models: Path, where: str, said: str) -> None:
    """The folder gives exactly one error, with the path, and the good file is done."""
    out = models.parent / "out"
    before = everything(models.parent)
    status, _, err = run(capsys, models, "-o", out, "-q", "--no-cache")
    assert status == 2, err
    assert err.count("error[") == 1, err
    assert where in err and said in err, err
    assert (out / "good.py").exists()
    left = {p for p in everything(models.parent) if out not in (p, *p.parents)}
    assert left == before
    assert {p.name for p in out.iterdir()} == {"__init__.py", "good.py", "good.json"}


def everything(folder: Path) -> set[Path]:
    return {
        Path(inside, name) for inside, folders, files in os.walk(folder) for name in folders + files
    }


NESTED = {
    "parentheses": "x = " + "(" * 5000 + "1" + ")" * 5000,
    "sums": "x = " + "1 + " * 50000 + "1",
    "signs": "x = " + "-" * 50000 + "1",
    "nots": "x = " + "not " * 3000 + "1",
    "attributes": "x = a" + ".b" * 20000,
    "calls": "x = a" + "()" * 900,
    "powers": "x = " + "2 ** " * 3000 + "1",
    "lambdas": "x = " + "lambda: " * 3000 + "1",
    "choices": "x = " + "1 if a else " * 3000 + "1",
    "branches": "if a:\n    pass\n" + "elif a:\n    pass\n" * 3000,
    "blocks": "".join(" " * i + "if a:\n" for i in range(150)) + " " * 150 + "pass",
    "a level more than allowed": "x = " + "-" * DEEPEST + "a",
}


@pytest.mark.parametrize("kind", sorted(NESTED))
def test_deep_nesting(capsys, models, kind):
    (models / "deep.py").write_text(NESTED[kind] + "\n")
    one_error(capsys, models, "models/deep.py:", "error[syntax]")


def test_nesting_that_models_have_is_read(capsys, models):
    (models / "chain.py").write_bytes(GOOD + b"\nX = " + b"1 + " * (DEEPEST - 10) + b"1\n")
    status, _, err = run(capsys, models, "-o", models.parent / "out", "-q", "--no-cache")
    assert status == 0, err


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"x = '\xff'\n", "encoding"),
        (b"x = 1\n\x00\n", "null bytes"),
        (b"\xff\xfex\x00 \x00=\x00", "encoding"),
        (b"\xef\xbb\xbfx = 1\n", "byte order mark"),
        (b"# -*- coding: latin-1 -*-\nx = '\xe9'\n", "UTF-8"),
        (b"# -*- coding: no-such-thing -*-\nx = 1\n", "no-such-thing"),
        (b"# -*- coding: utf-7 -*-\nx = 1\n", "utf-7"),
        (b"class A:\r    pass\rclass Model: pass\r", "carriage return"),
        (b"x = 1\n\tif y:\n  z = 2\n", ""),
        (b"def f(:\n", ""),
        (b"x = '" + b"a" * 100000, ""),
        (b"<<<<<<< HEAD\nx = 1\n=======\n", ""),
        (GOOD[: len(GOOD) // 2] + b"\n(", ""),
    ],
)
def test_what_is_no_python_text(capsys, models, data, said):
    (models / "bad.py").write_bytes(data)
    one_error(capsys, models, "models/bad.py:", said)


def test_huge_file(capsys, models):
    with (models / "huge.py").open("wb") as file:
        file.write(GOOD)
        file.truncate(LARGEST + 1)
    one_error(capsys, models, "models.huge", "bytes")


def test_long_lines_and_many_lines_are_read(capsys, models):
    (models / "long.py").write_bytes(GOOD + b"\nX = '" + b"a" * 500_000 + b"'\n")
    (models / "many.py").write_bytes(GOOD + b"\n# line" * 20_000 + b"\n")
    status, _, err = run(capsys, models, "-o", models.parent / "out", "-q", "--no-cache")
    assert status == 0, err


def test_folder_named_like_a_module(capsys, models):
    (models / "x.py").mkdir()
    (models / "x.py" / "inner.py").write_bytes(GOOD)
    one_error(capsys, models, "models/x.py", "a folder")


def test_link_to_itself(capsys, models):
    (models / "loop.py").symlink_to("loop.py")
    one_error(capsys, models, "models/loop.py", "leads nowhere")


def test_link_to_nothing(capsys, models):
    (models / "gone.py").symlink_to("no_such_file.py")
    one_error(capsys, models, "models/gone.py", "leads nowhere")


def test_link_out_of_the_folder(capsys, models):
    outside = models.parent / "outside.py"
    outside.write_bytes(GOOD)
    (models / "linked.py").symlink_to(outside)
    one_error(capsys, models, "models/linked.py", "out of the folder")


def test_circles_of_folders_are_not_walked(capsys, models):
    (models / "circle").symlink_to(models, target_is_directory=True)
    status, _, err = run(capsys, models, "-o", models.parent / "out", "-q", "--no-cache")
    assert status == 0, err
    assert not (models.parent / "out" / "circle").exists()


def test_pipe(capsys, models):
    os.mkfifo(models / "pipe.py")
    one_error(capsys, models, "models/pipe.py", "not a regular file")


@pytest.mark.parametrize(
    "name",
    [
        "..evil.py",
        "a.b.py",
        "new\nline.py",
        "back\\slash.py",
        "escape\x1b[2J.py",
        " space.py",
        "col:on.py",
    ],
)
def test_hostile_names(capsys, models, name):
    (models / name).write_bytes(GOOD)
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    one_error(capsys, models, f"models/{shown}", "name")
    assert not Path("/evil.json").exists()


def test_name_that_is_no_text(capsys, models):
    path = os.path.join(os.fsencode(models), b"\xff\xfe.py")
    Path(os.fsdecode(path)).write_bytes(GOOD)
    one_error(capsys, models, "models/\\udcff\\udcfe.py", "name")


@pytest.mark.parametrize("name", ["import.py", "lambda.py", "größe.py", "a-b.py", "__main__.py"])
def test_odd_names_that_mlx_lm_could_import(capsys, models, name):
    (models / name).write_bytes(GOOD)
    out = models.parent / "out"
    status, _, err = run(capsys, models, "-o", out, "-q", "--no-cache")
    assert status == 0, err
    assert (out / name).exists()


def test_imports_of_impossible_names(capsys, models):
    long = "a" * 5000
    (models / "odd.py").write_bytes(
        f"from .{long} import x\nfrom .....good import y\nimport {long}.b\n".encode() + GOOD
    )
    status, _, err = run(capsys, models, "-o", models.parent / "out", "-q", "--no-cache")
    assert status == 0, err


def test_circles_of_imports(capsys, models):
    (models / "one.py").write_bytes(b"from .two import *\nfrom . import two\n" + GOOD)
    (models / "two.py").write_bytes(b"from .one import *\nfrom . import one\n" + GOOD)
    status, _, err = run(capsys, models, "-o", models.parent / "out", "-q", "--no-cache")
    assert status == 0, err


def test_circles_of_bases_and_names(capsys, models):
    text = b"class A(B):\n    pass\nclass B(A):\n    pass\nc = d\nd = c\n"
    (models / "bases.py").write_bytes(text + GOOD)
    status, _, err = run(capsys, models, "-o", models.parent / "out", "-q", "--no-cache")
    assert status == 0, err


def test_unreadable_file(capsys, models, monkeypatch):
    """As for a file without permission: tests may run as root, which can read everything."""
    (models / "secret.py").write_bytes(GOOD)
    read = Path.read_bytes

    def deny(path: Path) -> bytes:
        if path.name == "secret.py":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", deny)
    one_error(capsys, models, "models.secret", "Permission denied")


def test_file_that_changes_while_it_is_read(capsys, models, monkeypatch):
    (models / "moving.py").write_bytes(GOOD)
    read, seen = Path.read_bytes, []

    def growing(path: Path) -> bytes:
        data = read(path)
        if path.name == "moving.py":
            seen.append(path)
            return data + b"# line\n" * len(seen)
        return data

    monkeypatch.setattr(Path, "read_bytes", growing)
    one_error(capsys, models, "models.moving", "error[changed]")


def test_file_that_vanishes_while_it_is_read(capsys, models, monkeypatch):
    (models / "ghost.py").write_bytes(GOOD)
    read = Path.read_bytes

    def once(path: Path) -> bytes:
        data = read(path)
        if path.name == "ghost.py":
            path.unlink()
        return data

    monkeypatch.setattr(Path, "read_bytes", once)
    out = models.parent / "out"
    status, _, err = run(capsys, models, "-o", out, "-q", "--no-cache")
    assert status == 2 and "error[changed]" in err and "ghost" in err
    assert (out / "good.py").exists() and not (out / "ghost.py").exists()


def test_sources_that_are_no_names(capsys):
    for text in ("\0", "a" * 5000, "models\0.py"):
        status, out, err = run(capsys, text)
        assert (status, out) == (2, "") and err.startswith("mlxrewrite: ")
        assert err.count("\n") == 1 and len(err) < 300


# ------------------------------------------------------------------ the output folder


def test_link_inside_the_output_folder(capsys, models, tmp_path):
    """Nothing is written through a link to somewhere else."""
    (models / "part").mkdir()
    (models / "part" / "deep.py").write_bytes(GOOD)
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "part").symlink_to(elsewhere, target_is_directory=True)
    status, _, err = run(capsys, models, "-o", out, "-q")
    assert status == 2 and "part" in err and "link" in err
    assert not list(elsewhere.iterdir())
    assert not (out / "good.py").exists()  # checked before anything is written


def test_output_file_that_is_a_link_is_replaced_not_followed(capsys, models, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim.py"
    out.mkdir()
    victim.write_text("precious\n")
    (out / "good.py").symlink_to(victim)
    (out / "__init__.py").symlink_to(tmp_path / "missing.py")
    assert run(capsys, models, "-o", out, "-q")[0] == 0
    assert victim.read_text() == "precious\n"
    assert not (out / "good.py").is_symlink() and not (tmp_path / "missing.py").exists()


def test_orphans_behind_links_are_left_alone(capsys, models, tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    header = "# Code generated by mlxrewrite from x.py. DO NOT EDIT.\n"
    (elsewhere / "old.py").write_text(header)
    run(capsys, models, "-o", out, "-q")
    (out / "more").symlink_to(elsewhere, target_is_directory=True)
    (out / "old.py").symlink_to(elsewhere / "old.py")
    assert run(capsys, models, "-o", out, "-q")[0] == 0
    assert (elsewhere / "old.py").read_text() == header and (out / "old.py").is_symlink()


def test_folder_where_a_file_goes(capsys, models, tmp_path):
    out = tmp_path / "out"
    (out / "good.py").mkdir(parents=True)
    status, _, err = run(capsys, models, "-o", out, "-q")
    assert status == 2 and "good.py" in err and err.count("\n") == 1
    assert not (out / "good.json").exists()


@pytest.mark.parametrize("place", ["/proc/version/x", "/dev/null", "/dev/null/x", "a\0b"])
def test_output_in_odd_places(capsys, models, place):
    status, _, err = run(capsys, models, "-o", place, "-q")
    assert status == 2 and err.count("\n") == 1


def test_output_over_the_source(capsys, models):
    """The source is never overwritten by its own output."""
    status, _, err = run(capsys, models, "-o", models, "-q")
    assert status == 2 and "source" in err
    assert (models / "good.py").read_bytes() == GOOD


def test_read_only_folder(capsys, models, tmp_path, monkeypatch):
    """As on a read-only file system: nothing is left half-written."""
    out = tmp_path / "out"
    run(capsys, models, "-o", out, "-q")
    (models / "good.py").write_bytes(GOOD + b"\n# more\n")
    old = {p.name: p.read_bytes() for p in out.iterdir()}

    def deny(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(out))

    monkeypatch.setattr(os, "replace", deny)
    status, _, err = run(capsys, models, "-o", out, "-q")
    assert status == 2 and "Read-only" in err and err.count("\n") == 1
    assert {p.name: p.read_bytes() for p in out.iterdir()} == old


def test_full_disk_leaves_whole_files(capsys, models, tmp_path, monkeypatch):
    shutil.copy(models / "good.py", models / "second.py")
    out = tmp_path / "out"
    replace, count = os.replace, []

    def full(source: str, target: str) -> None:
        count.append(target)
        if len(count) > 3:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    status, _, err = run(capsys, models, "-o", out, "-q")
    assert status == 2 and "No space left" in err
    monkeypatch.undo()
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    assert run(capsys, models, "-o", out, "-q")[0] == 0
    assert run(capsys, models, "-o", out, "-q", "--check")[0] == 0
