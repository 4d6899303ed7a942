"""Finds what is to be compiled: a folder, a file or an import name, without importing anything."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import (
    PackageNotFoundError,
    distribution,
    packages_distributions,
    version,
)
from pathlib import Path

from .ir import Source

LARGEST = 4 << 20  # bytes of one file; the largest of mlx_lm has 60 thousand


# The classes that the loaders of mlx_lm and mlx_vlm ask a model's file or folder for.
MODEL, LANGUAGE_MODEL = "Model", "LanguageModel"


class SourceError(Exception):
    """SRC names nothing that can be compiled."""


@dataclass(frozen=True, slots=True)
class Package:
    """A folder of modules under one dotted name.

    `root` holds the files; `shown` is how paths in it start in messages; `upstream` names the
    release they come from, or is empty. `entry` is the class that the package's loader builds a
    text model from: mlx_lm's `Model`, one file each, or mlx_vlm's `LanguageModel` in a folder.
    """

    name: str
    root: Path
    shown: str
    upstream: str
    entry: str = MODEL

    def path_of(self, module: str) -> Path | None:
        """The file of a dotted module name inside the package."""
        if module == self.name:
            candidate = self.root / "__init__.py"
            return candidate if _is_file(candidate) else None
        if not module.startswith(f"{self.name}."):
            return None
        parts = module[len(self.name) + 1 :].split(".")
        base = self.root.joinpath(*parts)
        for candidate in (base.with_name(base.name + ".py"), base / "__init__.py"):
            if _is_file(candidate):
                return candidate
        return None

    def module_of(self, path: Path) -> str:
        relative = path.relative_to(self.root)
        parts = [*relative.parts[:-1], relative.stem]
        if parts[-1] == "__init__":
            parts.pop()
        return ".".join([self.name, *parts])

    def modules(self) -> list[str]:
        """Dotted names of all modules, sorted."""
        return sorted(self.module_of(path) for path, problem in self._walk() if problem is None)

    def unusable(self) -> list[tuple[str, str]]:
        """What looks like a module and is none: paths as shown, and why, sorted."""
        return sorted(
            (printable(f"{self.shown}/{path.relative_to(self.root).as_posix()}"), problem)
            for path, problem in self._walk()
            if problem is not None
        )

    def _walk(self) -> Iterator[tuple[Path, str | None]]:
        """Every `*.py` of the folder; with a reason where it cannot be a module of the package."""
        root = self.root.resolve()
        for folder, folders, files in os.walk(self.root, followlinks=False):
            entered = []
            for name in sorted(folders):
                path = Path(folder) / name
                if name.endswith(".py"):
                    yield path, "a folder, not a file"
                elif not name.startswith((".", "__pycache__")) and not path.is_symlink():
                    if _problem_of_name(name) is None:
                        entered.append(name)
            folders[:] = entered
            for name in sorted(files):
                path = Path(folder) / name
                if name.endswith(".py"):
                    yield path, _problem_of_name(name[:-3]) or _problem_of_file(path, root)

    @property
    def nested(self) -> bool:
        """A model is a folder of files, and its language model is one class among others."""
        return self.entry == LANGUAGE_MODEL

    def targets(self) -> list[str]:
        """The modules to compile: of folders only those that define a language model.

        Their vision towers and processors are neither read nor written.
        """
        if not self.nested:
            return self.modules()
        defines = re.compile(rb"^class %s\b" % self.entry.encode(), re.MULTILINE)
        paths = {name: self.path_of(name) for name in self.modules()}
        return [name for name, path in paths.items() if path and defines.search(path.read_bytes())]

    def folders(self) -> list[str]:
        """The folders with Python files in them, one a model where the layout is nested."""
        return sorted(path.parent.name for path in self.root.glob("*/__init__.py"))

    def followed(self, own: set[str]) -> dict[str, set[str]]:
        """For each folder the folders of `own` whose language model it takes: it imports the class
        that generates, or else a whole `Model`, whose language model may be another folder's."""
        known = set(self.folders())
        direct: dict[str, set[str]] = {}
        models: dict[str, set[str]] = {}
        for name in known:
            direct[name], models[name] = set(), set()
            for path in sorted((self.root / name).glob("*.py")):
                for other, names in self._siblings(path.read_bytes()):
                    for wanted, found in ((self.entry, direct), ("Model", models)):
                        if wanted in names and other in known and other != name:
                            found[name].add(other)

        def taken(name: str, seen: frozenset[str]) -> set[str]:
            if name in own:
                return {name}
            others = (direct[name] or models[name]) - seen
            return set().union(*(taken(other, seen | {name}) for other in others))

        return {name: taken(name, frozenset()) - {name} for name in known}

    def _siblings(self, text: bytes) -> Iterator[tuple[str, set[str]]]:
        """Folders that a file imports from, with the names it takes there."""
        dotted = re.escape(self.name.encode())
        pattern = rb"^[ \t]*from (?:\.\.|%s\.)(\w+)[\w.]* import[ \t]*(\([^)]*\)|[^\n]*)" % dotted
        for folder, names in re.findall(pattern, text, re.MULTILINE):
            parts = re.sub(rb"#[^\n]*|[()]", b"", names).split(b",")
            yield folder.decode(), {part.split()[0].decode() for part in parts if part.strip()}

    def read(self, module: str) -> Source | None:
        """The source of a module, or None if it is not in the package.

        Raises:
            OSError: if the file cannot be read, or is larger than any source of a model.
        """
        path = self.path_of(module)
        if path is None:
            return None
        if (size := path.stat().st_size) > LARGEST:
            raise OSError(errno.EFBIG, f"{size} bytes, more than the {LARGEST} a source may have")
        shown = f"{self.shown}/{path.relative_to(self.root).as_posix()}"
        return Source.of(module, shown, path.read_bytes(), is_package=path.name == "__init__.py")


def _is_file(path: Path) -> bool:
    """False for names that the file system cannot have, too."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def printable(text: str) -> str:
    """A path as one line that every terminal takes: odd characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _problem_of_name(stem: str) -> str | None:
    """Why a file name is no module name. mlx_lm imports by name, so `lfm2-vl` is one."""
    if "." in stem or not stem:
        return "a dot in its name: it cannot be imported"
    if not stem.isprintable() or any(c in stem for c in "\\/:") or stem != stem.strip():
        return "its name has characters that no module name has"
    return None


def _problem_of_file(path: Path, root: Path) -> str | None:
    if not path.is_symlink():
        return None if path.is_file() else "not a regular file"
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a circle of links, before Python 3.13
        return "a link that leads nowhere"
    if not target.is_relative_to(root):
        return "a link that leads out of the folder"
    return None if target.is_file() else "not a regular file"


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
    if "\0" in text or len(text) > 4096:
        raise SourceError(f"{printable(text)[:200]}: not a name of anything")
    if path.is_dir():
        return Request(_package_at(path), None)
    if path.is_file():
        if path.suffix != ".py":
            raise SourceError(f"{text}: not a Python file")
        if (problem := _problem_of_name(path.name[:-3])) is not None:
            raise SourceError(f"{printable(text)}: {problem}")
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
    return Package(name, root, name.replace(".", "/"), _release(name, root), _entry(root))


def _entry(folder: Path) -> str:
    """Folders with a `language.py` in them are mlx_vlm's layout."""
    return LANGUAGE_MODEL if next(folder.glob("*/language.py"), None) is not None else MODEL


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
        package = _part_of(name, folder)
        if package.name == name:
            return Request(package, None)
        return Request(package, tuple(m for m in package.targets() if m.startswith(f"{name}.")))
    parent = ".".join(parts[:-1])
    package = _part_of(parent, folder.parent)
    if len(parts) < 2 or package.path_of(name) is None:
        raise SourceError(f"{name}: {parts[0]} is installed, but it has no such module")
    return Request(package, (name,))


def _part_of(name: str, folder: Path) -> Package:
    """The package to name a module in: a model's folder is a part of the package around it."""
    above = name.rpartition(".")[0]
    if above and _entry(folder) == MODEL and _entry(folder.parent) == LANGUAGE_MODEL:
        name, folder = above, folder.parent
    shown = name.replace(".", "/")
    return Package(name, folder, shown, _release(name, folder), _entry(folder))


def _release(name: str, folder: Path) -> str:
    """`mlx-lm 0.32.2` for modules of an installed distribution, else nothing."""
    top = name.split(".", maxsplit=1)[0]
    spec = PathFinder.find_spec(top)
    locations = list(spec.submodule_search_locations or []) if spec is not None else []
    if not any(folder.resolve().is_relative_to(Path(place).resolve()) for place in locations):
        return ""
    if (named := _of_the_same_name(top)) is not None:
        return named
    for name_ in _distributions().get(top, [top]):
        try:
            return f"{name_} {version(name_)}"
        except PackageNotFoundError:
            continue
    return ""


def _of_the_same_name(top: str) -> str | None:
    """The release of the distribution called like the package, if the package is in it."""
    try:
        found = distribution(top)
    except PackageNotFoundError:
        return None
    listed = found.read_text("RECORD") or ""
    if not any(line.startswith(f"{top}/") for line in listed.splitlines()):
        return None
    return f"{found.metadata['Name']} {found.version}"


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Reading the metadata of everything that is installed takes a second."""
    return packages_distributions()


def installed_package(module: str) -> Package | None:
    """The installed package a dotted module lies in, for imports of other packages."""
    return _package_named(module.rsplit(".", 1)[0]) if "." in module else None


@cache
def _package_named(name: str) -> Package | None:
    try:
        return locate(name).package
    except SourceError:
        return None
