"""Compiles many modules: over several processes, and only what changed since the last run.

What a run produced is kept under the user's cache folder, by content: the hash of the compiler and
of every source that was read. Time stamps count for nothing.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from .diagnostics import error
from .ir import Diagnostic, Place
from .sources import Package, installed_package

Inputs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Built:
    """One module, compiled now or before."""

    module: str
    code: bytes | None
    manifest: bytes | None  # None: a support module without a model in it, or an error
    errors: tuple[Diagnostic, ...]
    inputs: Inputs = ()  # every module that was read, with its hash
    cached: bool = False

    @property
    def content(self) -> dict[str, Any]:
        return dict(json.loads(self.manifest)) if self.manifest is not None else {}


def build(
    package: Package,
    modules: Sequence[str],
    *,
    jobs: int,
    use_cache: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Built]:
    """Compile modules of a package; the result is in the order of `modules`."""
    done: dict[str, Built] = {}
    store = Store(package) if use_cache else None
    for name in modules:
        known = store.find(name) if store is not None else None
        if known is not None:
            done[name] = known
            progress(name)
    rest = [name for name in modules if name not in done]
    for built in _compile_all(package, rest, jobs):
        done[built.module] = built
        progress(built.module)
    settled = _settled(package, [done[name] for name in modules])
    for built in settled:
        if store is not None and not built.errors and not built.cached:
            store.keep(built)
    return settled


def _settled(package: Package, found: list[Built]) -> list[Built]:
    """The modules, with an error where a file that one was made from has changed since."""
    now: dict[str, str | None] = {}
    settled = []
    for built in found:
        for module, _ in built.inputs:
            if module not in now:
                now[module] = _current(package, module)
        other = next((name for name, digest in built.inputs if now[name] != digest), None)
        if other is not None:
            message = f"{built.module}: {other} changed while it was read; run it again"
            settled.append(Built(built.module, None, None, (error("changed", message),)))
        else:
            settled.append(built)
    return settled


def _current(package: Package, module: str) -> str | None:
    """The hash of a module's file as it is now."""
    inside = module == package.name or module.startswith(f"{package.name}.")
    found = package if inside else installed_package(module)
    path = found.path_of(module) if found is not None else None
    try:
        return sha256(path.read_bytes()).hexdigest() if path is not None else None
    except OSError:
        return None


def with_siblings(
    package: Package, modules: Sequence[str], *, jobs: int, use_cache: bool = True
) -> list[Built]:
    """The modules and the siblings whose generated files theirs import, sorted by name."""
    done: dict[str, Built] = {}
    queue = list(modules)
    while queue:
        for built in build(package, queue, jobs=jobs, use_cache=use_cache):
            done[built.module] = built
        read = {name for built in done.values() for name, _ in built.inputs}
        inside = {name for name in read if name.startswith(f"{package.name}.")}
        queue = sorted(inside - set(done))
    return [done[name] for name in sorted(done)]


def _compile_all(package: Package, modules: list[str], jobs: int) -> Iterator[Built]:
    if not modules:
        return
    jobs = max(1, min(jobs, len(modules) // 4))
    if jobs == 1:
        yield from _compile_chunk(package, modules)
        return
    chunks = [modules[start :: jobs * 4] for start in range(jobs * 4)]
    with ProcessPoolExecutor(jobs) as pool:
        waiting = {pool.submit(_chunk_list, package, chunk): chunk for chunk in chunks if chunk}
        for future in as_completed(waiting):
            try:
                yield from future.result()
            except BrokenProcessPool:  # out of memory, most likely
                for name in waiting[future]:
                    problem = error("unreadable", f"{name}: a worker process died", act="source")
                    yield Built(name, None, None, (problem,))


def _chunk_list(package: Package, modules: list[str]) -> list[Built]:
    # A worker makes trees that live as long as it does: looking for garbage in them takes a third
    # of its time and finds none.
    gc.disable()
    return list(_compile_chunk(package, modules))


_COMPILERS: dict[Package, Any] = {}


def _compile_chunk(package: Package, modules: list[str]) -> Iterator[Built]:
    from .pipeline import Compiler

    compiler = _COMPILERS.setdefault(package, Compiler(package))
    for name in modules:
        try:
            result = compiler.compile(name)
        except RecursionError:
            problem = error("syntax", f"{name}: nested too deeply")
            yield Built(name, None, None, (problem,))
            continue
        except Exception as bug:
            problem = error(
                "invalid-output",
                f"bug in mlxrewrite while compiling {name}: {type(bug).__name__}: {bug}",
                act="compiler",
            )
            if os.environ.get("MLXREWRITE_TRACEBACK"):
                raise
            yield Built(name, None, None, (problem,))
            continue
        emitted = result.emitted
        manifest = emitted.manifest if emitted is not None else None
        plan = emitted.plan if emitted is not None else None
        if plan is not None and plan.route == "none" and not plan.edits and not plan.notes:
            manifest = None
        code = emitted.code if emitted is not None and manifest is not None else None
        yield Built(name, code, manifest, result.errors, result.inputs)


# --------------------------------------------------------------------------- what is kept


class Store:
    """Results of earlier runs, found by the content of what they were made from."""

    def __init__(self, package: Package) -> None:
        self.package = package
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        place = sha256(f"{package.name}\0{package.upstream}\0{package.shown}".encode())
        self.folder = root / "mlxrewrite" / compiler_hash()[:16] / place.hexdigest()[:16]
        self.hashes: dict[str, str | None] = {}

    def find(self, name: str) -> Built | None:
        try:
            kept = json.loads((self.folder / f"{name}.json").read_bytes())
            if any(self.hash_of(module) != digest for module, digest in kept["inputs"]):
                return None
            code, manifest = (
                text.encode() if text is not None else None
                for text in (kept["code"], kept["manifest"])
            )
            if sha256((code or b"") + (manifest or b"")).hexdigest() != kept["digest"]:
                return None
            inputs = tuple((module, digest) for module, digest in kept["inputs"])
            return Built(name, code, manifest, (), inputs, cached=True)
        except (OSError, ValueError, KeyError, TypeError):
            return None  # absent, or from a run that was cut off: compile again

    def keep(self, built: Built) -> None:
        from .passes.write import _replace

        code, manifest = built.code, built.manifest
        content = {
            "inputs": built.inputs,
            "digest": sha256((code or b"") + (manifest or b"")).hexdigest(),
            "code": code.decode() if code is not None else None,
            "manifest": manifest.decode() if manifest is not None else None,
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _replace(self.folder / f"{built.module}.json", json.dumps(content).encode())
        except OSError:
            pass  # a cache that cannot be written costs time, nothing else

    def hash_of(self, module: str) -> str | None:
        if module not in self.hashes:
            self.hashes[module] = _current(self.package, module)
        return self.hashes[module]


@cache
def compiler_hash() -> str:
    """The hash of the compiler's own text and of the Python that parses."""
    digest = sha256(sys.version.encode())
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def diagnostic_json(diagnostic: Diagnostic) -> dict[str, Any]:
    return asdict(diagnostic)


def place_text(place: Place | None) -> str:
    return str(place) if place is not None else ""
