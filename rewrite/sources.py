"""Finds what is to be compiled: a folder, a file or an import name, without importing anything."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

from .ir import Source


class SourceError(Exception):
    """SRC names nothing that can be compiled."""


@dataclass(frozen=True, slots=True)
class Package:
    """A folder of modules under one dotted name.

    `root` holds the files; `shown` is how paths in it start in messages; `upstream` names the
    release they come from, or is empty.
    """

    name: str
    root: Path
    shown: str
    upstream: str

    def path_of(self, module: str) -> Path | None:
        """The file of a dotted module name inside the package."""
        if module == self.name:
            candidate = self.root / "__init__.py"
            return candidate if candidate.is_file() else None
        if not module.startswith(f"{self.name}."):
            return None
        parts = module[len(self.name) + 1 :].split(".")
        base = self.root.joinpath(*parts)
        for candidate in (base.with_name(base.name + ".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
        return None

    def module_of(self, path: Path) -> str:
        relative = path.relative_to(self.root)
        parts = [*relative.parts[:-1], relative.stem]
        if parts[-1] == "__init__":
            parts.pop()
        return ".".join([self.name, *parts])

    def modules(self) -> list[str]:
        """Dotted names of all modules, sorted; links that lead out of the folder are left out."""
        found = []
        root = self.root.resolve()
        for folder, folders, files in os.walk(self.root, followlinks=False):
            folders[:] = sorted(f for f in folders if not f.startswith((".", "__pycache__")))
            for name in sorted(files):
                path = Path(folder) / name
                if name.endswith(".py") and path.resolve().is_relative_to(root):
                    found.append(self.module_of(path))
        return sorted(found)

    def read(self, module: str) -> Source | None:
        """The source of a module, or None if it is not in the package.

        Raises:
            OSError: if the file cannot be read.
        """
        path = self.path_of(module)
        if path is None:
            return None
        shown = f"{self.shown}/{path.relative_to(self.root).as_posix()}"
        return Source.of(module, shown, path.read_bytes(), is_package=path.name == "__init__.py")


@dataclass(frozen=True, slots=True)
class Request:
    """A package and the modules of it to compile; None means all."""

    package: Package
    modules: tuple[str, ...] | None


def locate(text: str) -> Request:
    """Turn SRC into a request.

    Raises:
        SourceError: if it is neither a folder, nor a Python file, nor an installed module.
    """
    path = Path(text)
    if path.is_dir():
        return Request(_package_at(path), None)
    if path.is_file():
        if path.suffix != ".py":
            raise SourceError(f"{text}: not a Python file")
        package = _package_at(path.parent)
        return Request(package, (package.module_of(package.root / path.name),))
    if path.suffix == ".py" or os.sep in text:
        raise SourceError(f"{text}: no such file or folder")
    return _installed(text)


def _package_at(folder: Path) -> Package:
    """Name a folder by the packages it lies in; a folder outside any is its own package."""
    root = folder.resolve()
    names = [root.name]
    parent = root.parent
    if (root / "__init__.py").is_file():
        while (parent / "__init__.py").is_file():
            names.insert(0, parent.name)
            parent = parent.parent
    name = ".".join(names)
    return Package(name, root, name.replace(".", "/"), _release(name, root))


def _installed(name: str) -> Request:
    parts = name.split(".")
    if not all(parts):
        raise SourceError(f"{name}: not a module name")
    spec = PathFinder.find_spec(parts[0])
    if spec is None:
        raise SourceError(f"{name}: no folder, file or installed module of this name")
    folders = list(spec.submodule_search_locations or [])
    if not folders:
        raise SourceError(f"{name}: not a package")
    base = Path(folders[0])
    folder = base.joinpath(*parts[1:])
    if folder.is_dir():
        package = Package(name, folder, "/".join(parts), _release(name, folder))
        return Request(package, None)
    parent = ".".join(parts[:-1])
    package = Package(parent, folder.parent, "/".join(parts[:-1]), _release(parent, folder.parent))
    if len(parts) < 2 or package.path_of(name) is None:
        raise SourceError(f"{name}: {parts[0]} is installed, but it has no such module")
    return Request(package, (name,))


def _release(name: str, folder: Path) -> str:
    """`mlx-lm 0.32.2` for modules of an installed distribution, else nothing."""
    top = name.split(".", maxsplit=1)[0]
    spec = PathFinder.find_spec(top)
    locations = list(spec.submodule_search_locations or []) if spec is not None else []
    if not any(folder.resolve().is_relative_to(Path(place).resolve()) for place in locations):
        return ""
    for distribution in packages_distributions().get(top, [top]):
        try:
            return f"{distribution} {version(distribution)}"
        except PackageNotFoundError:
            continue
    return ""


def installed_package(module: str) -> Package | None:
    """The installed package a dotted module lies in, for imports of other packages."""
    parent = module.rsplit(".", 1)[0]
    try:
        return locate(parent).package if "." in module else None
    except SourceError:
        return None
