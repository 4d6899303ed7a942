"""Brings changed files to life: as originals beside mlx_lm's own files, and as compiled.

Nothing is written to disk. While a changed original runs its imports, mlx_lm's entry of the same
name in `sys.modules` makes room for it; afterwards everything is as it was.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import itertools
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

from mlxrewrite.ir import ModuleFacts, Source
from mlxrewrite.pipeline import Compiled, Compiler
from mlxrewrite.sources import Package, locate

MODELS = "mlx_lm.models"
_COUNT = itertools.count()


@dataclass(frozen=True, slots=True)
class Changed(Package):
    """mlx_lm's models, some of whose files read otherwise or exist only here."""

    texts: tuple[tuple[str, bytes], ...] = ()

    def path_of(self, module: str) -> Path | None:
        if any(module == name for name, _ in self.texts):
            return self.root / f"{module.rsplit('.', 1)[-1]}.py"
        return Package.path_of(self, module)

    def read(self, module: str) -> Source | None:
        for name, data in self.texts:
            if module == name:
                return Source.of(module, f"{self.shown}/{module.rsplit('.', 1)[-1]}.py", data)
        return Package.read(self, module)


class Library:
    """mlx_lm's own files: read once, their facts shared by all compilations of a process."""

    def __init__(self) -> None:
        self.package = locate(MODELS).package
        self.compiler = Compiler(self.package)

    def text(self, name: str) -> str:
        source = self.package.read(f"{MODELS}.{name}")
        assert source is not None
        return source.data.decode()

    def compiler_for(self, texts: Mapping[str, str]) -> Compiler:
        """A compiler for the package with these files in place of (or beside) its own."""
        changed = {f"{MODELS}.{name}": text.encode() for name, text in texts.items()}
        package = self.package
        shape = (package.name, package.root, package.shown, package.upstream, package.entry)
        compiler = Compiler(Changed(*shape, texts=tuple(changed.items())))
        known: dict[str, ModuleFacts | None] = dict(self.compiler.facts)
        compiler.facts.update({n: f for n, f in known.items() if n not in changed and f})
        return compiler

    def learn(self, compiler: Compiler, texts: Mapping[str, str]) -> None:
        """Keep facts of unchanged files for later compilations."""
        for name, facts in compiler.facts.items():
            if facts is not None and name.rsplit(".", 1)[-1] not in texts:
                self.compiler.facts.setdefault(name, facts)


class Original:
    """The changed model as mlx_lm would run it. Every call of `module` makes a new one."""

    def __init__(self, entry: str, texts: Mapping[str, str]) -> None:
        self.entry = entry
        self.codes: dict[str, CodeType] = {
            name: compile(text, f"<{name}>", "exec", dont_inherit=True)
            for name, text in texts.items()
        }

    def module(self) -> ModuleType:
        with _in_place(set(self.codes)):
            finder = _Codes(self.codes)
            sys.meta_path.insert(0, finder)
            try:
                return importlib.import_module(f"{MODELS}.{self.entry}")
            finally:
                sys.meta_path.remove(finder)


@contextmanager
def _in_place(names: set[str]) -> Iterator[None]:
    package = importlib.import_module(MODELS)
    kept = {name: sys.modules.pop(f"{MODELS}.{name}", None) for name in names}
    attributes = {name: getattr(package, name, None) for name in names}
    try:
        yield
    finally:
        for name, module in kept.items():
            sys.modules.pop(f"{MODELS}.{name}", None)
            if module is not None:
                sys.modules[f"{MODELS}.{name}"] = module
            if attributes[name] is not None:
                setattr(package, name, attributes[name])


class _Codes(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports modules of a package from compiled texts."""

    def __init__(self, codes: Mapping[str, CodeType], package: str = MODELS) -> None:
        self.codes, self.package = codes, package

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        package, _, name = fullname.rpartition(".")
        if package == self.package and name in self.codes:
            return importlib.util.spec_from_loader(fullname, self)
        return None

    def create_module(self, spec):  # type: ignore[no-untyped-def]
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(self.codes[module.__name__.rpartition(".")[2]], module.__dict__)


class NoFile(Exception):
    """A sibling of a rewritten file has no rewritten file."""


class Rewritten:
    """What the compiler made of changed files, importable as a package of its own."""

    def __init__(self, library: Library, entry: str, texts: Mapping[str, str]) -> None:
        self.texts, self.library = texts, library
        self.compiler = library.compiler_for(texts)
        self.entry = entry
        self.compiled: Compiled = self.compiler.compile(f"{MODELS}.{entry}")
        library.learn(self.compiler, texts)

    @contextmanager
    def module(self) -> Iterator[ModuleType]:
        """The rewritten entry, importable while the context lasts."""
        package = f"mutant_{next(_COUNT)}"
        root = types.ModuleType(package)
        root.__path__ = []
        sys.modules[package] = root
        finder = _Generated(self, package)
        # Files that exist only here are imported by routes that leave imports as they are.
        own = self.library.package
        new = {n: t for n, t in self.texts.items() if own.path_of(f"{MODELS}.{n}") is None}
        beside = _Codes(Original(self.entry, new).codes)
        sys.meta_path[:0] = [finder, beside]
        try:
            yield importlib.import_module(f"{package}.{self.entry}")
        finally:
            sys.meta_path.remove(finder)
            sys.meta_path.remove(beside)
            for name in new:
                sys.modules.pop(f"{MODELS}.{name}", None)
            for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
                del sys.modules[name]


class _Generated(_Codes):
    def __init__(self, rewritten: Rewritten, package: str) -> None:
        super().__init__({}, package)
        self.rewritten = rewritten

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        package, _, name = fullname.rpartition(".")
        if package != self.package:
            return None
        mine = self.rewritten
        compiled = (
            mine.compiled if name == mine.entry else mine.compiler.compile(f"{MODELS}.{name}")
        )
        if compiled.emitted is None or compiled.emitted.code is None:
            raise NoFile(f"no rewritten file for {name}")
        code = compile(compiled.emitted.code, f"<rewritten {name}>", "exec", dont_inherit=True)
        self.codes = {**self.codes, name: code}
        return importlib.util.spec_from_loader(fullname, self)
