"""Which compiler builds kernels for the CPU, and where the results are kept.

Kernels are cached by what they were made from (text, prelude, compiler, flags) in
$XDG_CACHE_HOME/mlxrewrite/kernels, ~/.cache without that variable. The folder may be deleted at any
time and may be shared by processes: files are written aside and renamed.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from .errors import CompileError, NoCompilerError

FOLDER = Path(__file__).parent
PRELUDE = FOLDER / "prelude"
RUNTIME = FOLDER / "runtime.cpp"
OVERRIDE = "MLXREWRITE_CXX"

COMMON_FLAGS = (
    "-std=c++17",
    "-nostdinc++",
    "-O2",
    "-g1",
    "-gdwarf-4",
    "-fPIC",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
)
KERNEL_FLAGS = (
    *COMMON_FLAGS,
    "-fstack-clash-protection",
    "-Wno-unused-command-line-argument",
    "-Wall",
    "-Wno-unknown-warning-option",
    "-Wno-unknown-attributes",
    "-Wno-ignored-attributes",
    "-Wno-unknown-pragmas",
    "-Wno-unused",
    "-Wno-user-defined-literals",
    "-Wno-reserved-user-defined-literal",
    "-Wno-pragma-once-outside-header",
    "-Wno-pass-failed",
    "-Werror=uninitialized",
    "-Werror=sometimes-uninitialized",
    "-Werror=vla",
    "-Werror=vla-extension",
    "-Werror=vla-cxx-extension",
    "-Werror=return-type",
)
# A call at every load, store and copy that is left after optimisation, none merged with another
# (asan-opt); nothing of AddressSanitizer but these calls is used.
CHECK_FLAGS = (
    "-fsanitize=address,alignment,bounds,integer-divide-by-zero,signed-integer-overflow",
    "-fno-sanitize-recover=all",
    "-fno-sanitize-link-runtime",
    "-mllvm",
    "-asan-instrumentation-with-call-threshold=0",
    "-mllvm",
    "-asan-opt=0",
    "-mllvm",
    "-asan-stack=0",
    "-mllvm",
    "-asan-globals=0",
    "-ftrivial-auto-var-init=pattern",
    "-fno-vectorize",
    "-fno-slp-vectorize",
)


@dataclass(frozen=True, slots=True)
class Compiler:
    """A clang: the command that compiles C++, and what tells it from others in a cache key."""

    command: tuple[str, ...]
    identity: str
    zig: bool = False

    @property
    def machine_flags(self) -> tuple[str, ...]:
        if platform.machine() not in ("x86_64", "AMD64") or not _has_avx2():
            return ()
        return ("-mcpu=x86_64_v3",) if self.zig else ("-march=x86-64-v3",)

    @property
    def link_flags(self) -> tuple[str, ...]:
        """A shared library without C++'s own."""
        return ("-shared",) if self.zig else ("-shared", "-nostdlib++")


@cache
def _has_avx2() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return found is not None and {"avx2", "f16c", "fma", "bmi2"} <= set(found.group(1).split())


def _identity(program: str) -> str:
    real = Path(program).resolve()
    status = real.stat()
    return f"{real}:{status.st_size}:{status.st_mtime_ns}"


def _clangs() -> list[str]:
    """Every clang++ on PATH, newest first; one without a number in its name last."""
    found: dict[int, str] = {}
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if not os.path.isdir(folder):
            continue
        for name in os.listdir(folder):
            match = re.fullmatch(r"clang\+\+(?:-(\d+))?", name)
            path = os.path.join(folder, name)
            if match and os.access(path, os.X_OK):
                found.setdefault(int(match.group(1) or 0), path)
    return [found[number] for number in sorted(found, reverse=True)]


@cache
def compiler() -> Compiler:
    """The compiler to use: $MLXREWRITE_CXX, else the newest clang on PATH, else the one of PyPI's
    ziglang.

    Raises NoCompilerError.
    """
    named = os.environ.get(OVERRIDE, "").split()
    if named and named != ["ziglang"]:
        program = shutil.which(named[0])
        if program is None:
            raise NoCompilerError(f"{OVERRIDE} names {named[0]}, which is not a program on PATH")
        return Compiler((program, *named[1:]), _identity(program))
    clangs = [] if named else _clangs()
    if clangs:
        return Compiler((clangs[0],), _identity(clangs[0]))
    found = importlib.util.find_spec("ziglang")
    if found is not None and found.origin is not None:
        command = (sys.executable, "-m", "ziglang", "cc", "-x", "c++")
        return Compiler(command, _identity(found.origin), zig=True)
    raise NoCompilerError(
        "the CPU runner compiles kernels and found no clang: install one "
        "(Debian: apt install clang), or `pip install ziglang`"
    )


@cache
def cache_folder() -> Path:
    """Where compiled kernels are kept; a folder of this process where that cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "mlxrewrite" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        pass
    else:
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    own = tempfile.TemporaryDirectory(prefix="mlxrewrite-kernels-")
    atexit.register(own.cleanup)
    return Path(own.name)


@cache
def mlx_headers() -> Path:
    """Where the installed MLX keeps the sources of its Metal kernels."""
    found = importlib.util.find_spec("mlx")
    places = list(found.submodule_search_locations or ()) if found else []
    for place in places:
        folder = Path(place) / "include"
        if (folder / "mlx" / "backend" / "metal" / "kernels" / "utils.h").exists():
            return folder
    raise NoCompilerError("MLX is installed without its Metal headers (mlx/include)")


@cache
def _prelude_hash() -> bytes:
    digest = hashlib.sha256()
    for path in sorted(PRELUDE.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(PRELUDE)}\0".encode() + path.read_bytes())
    digest.update(version("mlx").encode())
    return digest.digest()


def _key(flags: tuple[str, ...], *parts: bytes) -> str:
    digest = hashlib.sha256(" ".join((compiler().identity, *flags)).encode())
    for part in parts:
        digest.update(b"\0" + part)
    return digest.hexdigest()[:24]


def _compile(flags: tuple[str, ...], source: Path, target: Path) -> None:
    """target appears whole or not at all, whoever else makes it at the same time."""
    handle, made = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    os.close(handle)
    command = [*compiler().command, *flags, str(source), "-o", made]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"{source.name} does not compile:\n{done.stderr[-8000:].strip()}")
        os.replace(made, target)
    finally:
        Path(made).unlink(missing_ok=True)


@cache
def runtime_library() -> Path:
    """runtime.cpp, compiled."""
    flags = (
        *COMMON_FLAGS,
        *compiler().machine_flags,
        "-ftls-model=initial-exec",
        "-pthread",
        "-fno-sanitize=undefined",
        *compiler().link_flags,
    )
    target = cache_folder() / f"runtime_{_key(flags, RUNTIME.read_bytes())}.so"
    if not target.exists():
        _compile(flags, RUNTIME, target)
    return target


@cache
def kernel_library(text: str, check: bool) -> Path:
    """A kernel's C++ text, compiled.

    Raises CompileError.
    """
    own = CHECK_FLAGS if check else ("-fno-sanitize=undefined",)
    flags = (*KERNEL_FLAGS, *compiler().machine_flags, *own, *compiler().link_flags)
    key = _key(flags, text.encode(), _prelude_hash())
    target = cache_folder() / f"kernel_{key}.so"
    if not target.exists():
        source = cache_folder() / f"kernel_{key}.cpp"
        handle, made = tempfile.mkstemp(dir=source.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(made, source)
        folders = ("-I", str(PRELUDE), "-I", str(mlx_headers()))
        _compile((*flags, *folders), source, target)
    return target
