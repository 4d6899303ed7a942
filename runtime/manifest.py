"""Generated files: where they are, whether they are what the compiler wrote, and importing them."""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from types import ModuleType
from typing import Any

from . import API
from .errors import NotGenerated

ENVIRONMENT = "MLXREWRITE_GENERATED"
PACKAGE = "mlx_lm"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the compiler recorded about one module: the fields the runtime needs."""

    module: str
    upstream: str
    api: int
    source_sha256: str
    reads_sha256: tuple[tuple[str, str], ...]
    output_sha256: str | None
    route: str
    refused: tuple[str, ...]
    contract: Mapping[str, Any] | None = None  # of a language model inside a larger one
    kinds: frozenset[str] = frozenset()


def generated_folder(chosen: str | Path | None = None, package: str = PACKAGE) -> Path:
    """The folder with `<module>.py` and `<module>.json`.

    `chosen`, else the environment variable MLXREWRITE_GENERATED, else the installed
    `mlxrewrite/generated`; each may be the folder of the package or the one above it.
    """
    named = chosen if chosen is not None else os.environ.get(ENVIRONMENT) or None
    if named is None:
        return _installed() / package
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise NotGenerated(f"no folder {folder}: expected one that `mlxrewrite -o` wrote")
    inner = folder / package
    return inner if inner.is_dir() else folder


def load_generated(folder: Path, module: str) -> ModuleType:
    """Import `<folder>/<module>.py`, after checking it and every sibling that it imports.

    Of a folder in the folder, `module` is `inner/module`.

    Raises:
        NotGenerated: a file is missing, stale, or not what the compiler wrote; the text names the
            command that fixes it.
    """
    check(folder, module)
    name = _package(folder.resolve())
    return importlib.import_module(f"{name}.{module.replace('/', '.')}")


def load_own(folder: Path, source: Path) -> ModuleType:
    """The rewritten form of a checkpoint's own model file, `source`, from a generated folder.

    Raises:
        NotGenerated: as `load_generated`, and if the file of that name was made from another source
            than this one.
    """
    module = source.stem
    fix = f"run `mlxrewrite {source} -o {folder}`"
    if not source.is_file():
        raise NotGenerated(f"{source}: no such file")
    if not (folder / f"{module}.json").is_file():
        raise NotGenerated(f"{source} is not rewritten: no {folder / module}.json; {fix}")
    if check(folder, module).source_sha256 != _digest(source):
        raise NotGenerated(f"{folder / module}.py was not made from {source}; {fix}")
    return load_generated(folder, module)


def check(folder: Path, module: str) -> Manifest:
    """Compare a generated file with its manifest, and the manifest with what is installed.

    Raises:
        NotGenerated: the file is missing, was edited, was made from other sources or another
            release than what is installed, or the compiler refused the model.
    """
    return _checked(folder, module)[0]


def _checked(folder: Path, module: str) -> tuple[Manifest, bytes]:
    """The manifest and the very bytes that were compared with it: only these may be run."""
    if not all(_is_name(part) for part in module.split("/", 1)):
        raise NotGenerated(f"{module!r} is not the name of a model file")
    path, record = folder / f"{module}.py", folder / f"{module}.json"
    if not record.is_file():
        raise NotGenerated(f"{module} is not rewritten: no {record}; {_fix('', folder)}")
    manifest = _read(record)
    if manifest.api != API:
        raise NotGenerated(
            f"{record} is for runtime API {manifest.api}, this runtime has {API}; "
            f"{_fix(manifest.module, folder)}"
        )
    if not f".{manifest.module}".endswith(f".{module.replace('/', '.')}"):
        raise NotGenerated(
            f"{record} is the manifest of {manifest.module}, not of {module}; "
            f"{_fix(manifest.module, folder)}"
        )
    _check_sources(path, manifest, folder)
    if manifest.output_sha256 is None and manifest.contract and manifest.route == "model":
        return manifest, b""  # the original runs, once per sequence
    if manifest.output_sha256 is None:
        why = "; ".join(manifest.refused) or "no reason recorded"
        raise NotGenerated(f"{manifest.module} was refused by the compiler: {why}")
    if not path.is_file():
        raise NotGenerated(f"{module} is not rewritten: no {path}; {_fix(manifest.module, folder)}")
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise NotGenerated(f"{path}: {problem.strerror}; {_fix(manifest.module, folder)}") from None
    if sha256(data).hexdigest() != manifest.output_sha256:
        raise NotGenerated(
            f"{path} is not the file that its manifest describes: it is stale, or was edited; "
            f"{_fix(manifest.module, folder)}"
        )
    return manifest, data


def _is_name(part: str) -> bool:
    return bool(part) and not part.startswith(".") and not any(c in part for c in "/\\\0:")


def _check_sources(path: Path, manifest: Manifest, folder: Path) -> None:
    """The file was made from what is installed: its source, all that was read for it, the release.

    Raises:
        NotGenerated: naming the first that differs.
    """
    installed = _release(manifest.module)
    if manifest.upstream and installed and installed != manifest.upstream:
        raise NotGenerated(
            f"{path} was made from {manifest.upstream}, and {installed} is installed; "
            f"{_fix(manifest.module, folder)}"
        )
    for name, digest in ((manifest.module, manifest.source_sha256), *manifest.reads_sha256):
        source = _source(name)
        if source is not None and _digest(source) != digest:
            release = f" ({manifest.upstream})" if manifest.upstream else ""
            raise NotGenerated(
                f"{path} was made from another version of {source}{release}; "
                f"{_fix(manifest.module, folder)}"
            )


def _release(module: str) -> str:
    """`mlx-lm 0.32.2` for a module of an installed distribution, else nothing."""
    top = module.partition(".")[0]
    for distribution in _distributions().get(top, [top]):
        try:
            return f"{distribution} {version(distribution)}"
        except PackageNotFoundError:
            continue
    return ""


@cache
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()


def _installed() -> Path:
    return Path(str(importlib.import_module("mlxrewrite.generated").__file__)).parent


def _read(record: Path) -> Manifest:
    try:
        got: dict[str, Any] = json.loads(record.read_bytes())
        refused = [d["message"] for item in got["refused"] for d in item["diagnostics"]]
        if not isinstance(got["module"], str) or not got["module"].rpartition(".")[2]:
            raise ValueError("no module name")
        return Manifest(
            got["module"],
            got["upstream"],
            got["api"],
            got["source_sha256"],
            tuple(sorted(got["reads_sha256"].items())),
            got["output_sha256"],
            got["route"],
            tuple(refused),
            got.get("contract"),
            frozenset(item["kind"] for item in got["classes"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise NotGenerated(
            f"{record} is not a manifest: {problem!r}; {_fix('', record.parent)}"
        ) from None


def _fix(module: str, folder: Path) -> str:
    package = module.rpartition(".")[0] or "mlx_lm.models"
    out = "" if folder.resolve().is_relative_to(_installed().resolve()) else f" -o {folder}"
    return f"run `mlxrewrite {package}{out}`"


def _source(module: str) -> Path | None:
    """The file of an installed module, found without importing anything of it."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    for place in spec.submodule_search_locations:
        path = Path(place, *rest).with_name(f"{rest[-1]}.py") if rest else None
        if path is not None and path.is_file():
            return path
    return None


def _digest(path: Path) -> str:
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError as problem:
        raise NotGenerated(f"{path}: {problem.strerror}") from None


class _Loader(importlib.abc.Loader):
    """Runs the bytes that were checked: a file may change in between, and `__pycache__` is not
    covered by any hash, so neither is read."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path = data, path

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.data, str(self.path), "exec", dont_inherit=True), module.__dict__)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of one generated folder, each checked before it runs.

    Module names need not be identifiers, and siblings import each other relatively, so the folder
    is a package of its own with this as its only way in.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.loaded: dict[str, str | None] = {}

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{self.name}."):
            return None
        module = fullname.removeprefix(f"{self.name}.").replace(".", "/")
        if (self.folder / module).is_dir():
            return ModuleSpec(fullname, None, is_package=True)
        manifest, data = _checked(self.folder, module)
        if manifest.output_sha256 is None:
            raise NotGenerated(f"{manifest.module} is not rewritten: it runs once per sequence")
        self.loaded[module] = manifest.output_sha256
        path = self.folder / f"{module}.py"
        spec = ModuleSpec(fullname, _Loader(data, path), origin=str(path))
        spec.has_location = True
        return spec

    def changed(self) -> bool:
        """Whether a loaded file is another one by now."""
        for module, digest in self.loaded.items():
            path = self.folder / f"{module}.py"
            if not path.is_file() or _digest(path) != digest:
                return True
        return False


def _package(folder: Path) -> str:
    """The name of the package made of a folder; loaded anew if its files have changed."""
    name = f"_mlxrewrite_{folder.name}_{sha256(str(folder).encode()).hexdigest()[:8]}"
    finder = next((f for f in sys.meta_path if isinstance(f, _Finder) and f.name == name), None)
    if finder is not None and finder.changed():
        for loaded in [m for m in sys.modules if m.startswith(f"{name}.")]:
            del sys.modules[loaded]
        finder.loaded.clear()
    if finder is None:
        sys.meta_path.append(_Finder(name, folder))
        package = ModuleType(name, f"The rewritten models in {folder}.")
        package.__path__ = []
        sys.modules[name] = package
    return name
