"""Addresses in a compiled kernel to lines of its text."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

TIMEOUT = 60


@cache
def _program() -> tuple[str, ...] | None:
    """llvm-symbolizer, else binutils' addr2line, as a command without file and address."""
    names = ["llvm-symbolizer", *(f"llvm-symbolizer-{n}" for n in range(30, 13, -1))]
    for name in names:
        path = shutil.which(name)
        if path:
            return (path, "--output-style=GNU", "--no-demangle", "-i", "-f", "-e")
    path = shutil.which("addr2line")
    return (path, "-i", "-f", "-e") if path else None


def available() -> bool:
    """Whether reports can name lines."""
    return _program() is not None


@cache
def location(library: Path, offset: int) -> str:
    """Where in the kernel's own text an instruction comes from, outermost call first, as
    "at decode.metal:97, in load_words decode.header:12"; "" where nothing tells."""
    program = _program()
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [*program, str(library), hex(offset)],
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.splitlines()
    frames: list[str] = []
    for function, place in zip(lines[::2], lines[1::2], strict=False):
        match = re.match(r"(.*?):(\d+)", place)
        if match is None:
            continue
        file = os.path.basename(match.group(1))
        if file.endswith(".metal"):
            frames.append(f"at {file}:{match.group(2)}")
        elif file.endswith(".header"):
            frames.append(f"in {_plain(function)} {file}:{match.group(2)}")
    return ", ".join(reversed(frames))


def _plain(mangled: str) -> str:
    """The name of a helper in its mangled one: the last length-prefixed word before templates."""
    match = re.match(r"_ZN?K?(\d+)", mangled)
    if match is None:
        return mangled
    start = match.end()
    return mangled[start : start + int(match.group(1))]
