"""What can be said of a kernel's text without running it.

Three readers, none of them Metal's compiler, each of which sees what the others miss: C++ with
address spaces as attributes, C++ for OpenCL, and a lint of rules that neither language has
(docs/runner.md says which rule is seen by whom).
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from .source import (
    Input,
    Signature,
    TemplateValue,
    signature,
    template_argument,
    with_threadgroup_macros,
    without_comments,
)
from .toolchain import PRELUDE, compiler

Reader = Literal["address spaces", "OpenCL", "lint"]

TIMEOUT = 120


@dataclass(frozen=True, slots=True)
class Finding:
    """One violation; `line` counts in the body or the header, as `file` says."""

    reader: Reader
    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message} [{self.reader}]"


def check(
    *,
    name: str,
    inputs: Sequence[Input],
    output_names: Sequence[str],
    output_dtypes: Sequence[mx.Dtype],
    source: str,
    header: str = "",
    template: Sequence[tuple[str, TemplateValue]] = (),
    atomic_outputs: bool = False,
) -> list[Finding]:
    """Everything that speaks against a kernel; inputs of fewer than 8 elements are `constant`, so
    check with the sizes that occur."""
    made = signature(
        name=name,
        inputs=inputs,
        output_names=output_names,
        output_dtypes=output_dtypes,
        source=source,
        header=header,
        template=template,
        atomic_outputs=atomic_outputs,
    )
    return [
        *_front_end("address spaces", made, name, template),
        *_front_end("OpenCL", made, name, template),
        *lint(header, source, name),
    ]


# ---- the front ends ------------------------------------------------------------------------------
_CONSTRUCTED = re.compile(
    r"(?<![\w.])((?:metal::)?(?:vec\s*<[^<>;(){}]*>|"
    r"(?:float|half|bfloat|u?int|u?short|u?char|u?long)[234]))\s*\("
)
_FLAGS = (
    "--target=aarch64-linux-gnu",
    "-fsigned-char",
    "-fsyntax-only",
    "-DMSL_CHECK",
    "-ferror-limit=8",
    "-fno-caret-diagnostics",
    "-Wno-everything",
    "-Werror=vla",
    "-Werror=vla-extension",
    "-Werror=vla-cxx-extension",
    "-Werror=return-type",
)


def _constructors(text: str) -> str:
    """float4(a, b, c, d) as a call, for front ends whose vectors are no classes."""
    return _CONSTRUCTED.sub(r"msl_made<\1>(", text)


def _front_end(
    reader: Reader,
    made: Signature,
    name: str,
    template: Sequence[tuple[str, TemplateValue]],
) -> list[Finding]:
    head, body, header = made.head, made.body, _constructors(without_comments(made.header))
    instance = ""
    flags: tuple[str, ...] = ("-x", "c++", "-std=c++17", "-nostdinc++")
    if reader == "OpenCL":
        # A kernel of C++ for OpenCL is no template: its arguments go in front of it.
        flags = ("-x", "cl", "-cl-std=CLC++", "-cl-no-stdinc", "-Xclang", "-cl-ext=+cl_khr_fp16")
        given = [
            f"using {key} = {template_argument(value)};\n"
            if isinstance(value, mx.Dtype)
            else f"#define {key} {template_argument(value)}\n"
            for key, value in template
        ]
        head = re.sub(r"^template <.*>\n", "", head).replace("[[kernel]]", "__kernel")
        head = "".join(given) + head
        body = without_comments(body)
    else:
        head = head.replace("[[kernel]] ", "")
        body = with_threadgroup_macros(body)
        header = with_threadgroup_macros(header)
        if template:
            call = f"{made.function}{made.arguments}"
            instance = f"template decltype({call}) {call};\n"
    text = "\n".join(
        [
            "#include <metal_stdlib>",
            f'#line 1 "{name}.header"',
            header,
            '#line 1 "signature"',
            re.sub(r" \[\[\w+(?:\(\d+\))?\]\]", "", head),
            f'#line 1 "{name}.metal"',
            _constructors(body),
            "}",
            instance,
        ]
    )
    command = list(compiler().command)
    if compiler().zig:
        command = [*command[:3], "clang"]  # its C front end knows neither OpenCL nor -fsyntax-only
    handle, path = tempfile.mkstemp(suffix=".txt")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        done = subprocess.run(
            [*command, *flags, *_FLAGS, "-I", str(PRELUDE), path],
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
        )
    finally:
        os.unlink(path)
    found = [
        Finding(reader, match.group(1), int(match.group(2)), match.group(3))
        for match in re.finditer(
            r"^(.*?):(\d+):(?:\d+:)? (?:fatal )?error: (.*)$", done.stderr, re.MULTILINE
        )
    ]
    if done.returncode and not found:
        found = [Finding(reader, name, 0, done.stderr.strip()[:500] or "the front end failed")]
    return found


# ---- the lint ------------------------------------------------------------------------------------
_FORBIDDEN = (
    (r"\bgoto\b", "Metal has no goto"),
    (
        r"\b(?:new|delete|throw|try|catch|dynamic_cast|typeid|virtual|thread_local)\b",
        "not in Metal's language",
    ),
    (r"\bstd::", "Metal has no std::"),
    (r"\[[&=]?\]\s*\(", "a lambda: Metal has them from version 3.2 on only"),
    (r"\blong\s+long\b", "Metal has no long long"),
    (r"\b(?:printf|assert)\s*\(", "not in Metal's language"),
    (
        r"(?<![\w.])(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\dfFhHeE.\w])",
        "a literal without f is a double",
    ),
    (r"(?<![\w.])\d+[eE][-+]?\d+(?![fFhH\d.])", "a literal without f is a double"),
    (r"\bstatic\s+(?!constexpr\b|constant\b|const\b|inline\b|METAL_FUNC\b)", "a static variable"),
    (r"\b__(?:syncthreads|shared__|device__|global__|shfl\w*)", "a word of CUDA"),
    (r"\b(?:threadIdx|blockIdx|blockDim)\b", "a word of CUDA"),
)
_SPACES = r"device|constant|threadgroup_imageblock|threadgroup|thread"
_PARAMETER = re.compile(
    r"(?<=[(,])\s*(?:(?:const|volatile)\s+)*"
    rf"(?!(?:const|volatile|{_SPACES})\b)([A-Za-z_][\w:]*(?:\s*<[^<>()]*>)?)"
    rf"(?P<after>(?:\s*\b(?:const|volatile|{_SPACES})\b)*)\s*[*&]\s*(?:const\s+)?\w+\s*"
    r"(?=(?:\[[^\]]*\]\s*)?[,)])(?=[^;{}]*\)\s*(?:const\s*)?\{)"
)
_FUNCTION = re.compile(r"\b(\w+)\s*(?:<[^<>;{}()]*>\s*)?\([^;{}()]*\)\s*\{")
_GLOBAL = re.compile(r"^(?:const|constexpr|static)\s[^;(){}]*=[^;]*;", re.MULTILINE)
_GROUP_VARIABLE = re.compile(r"[{}]|\bthreadgroup\s+[\w:]+(?:\s*<[^;{}]*?>)?\s+\w+\s*(?:\[[^;]*)?;")


def lint(header: str, source: str, name: str = "kernel") -> list[Finding]:
    """Rules of Metal's language that C++ front ends do not enforce."""
    found = []
    for text, file, depth in ((header, f"{name}.header", 0), (source, f"{name}.metal", 1)):
        plain = without_comments(text)
        found += [
            Finding("lint", file, plain.count("\n", 0, at) + 1, message)
            for at, message in sorted({*_violations(plain, depth)})
        ]
    return found


def _violations(text: str, depth: int) -> Iterator[tuple[int, str]]:
    """Offsets and messages; depth 0 is a header, 1 the body of the kernel function."""
    for pattern, message in _FORBIDDEN:
        for match in re.finditer(pattern, text):
            yield match.start(), f"{message}: {match.group().strip()}"
    for match in _PARAMETER.finditer(text):
        # `device T* const thread* p`: the space of the outer pointer comes after the type.
        if not re.search(rf"\b(?:{_SPACES})\b", match.group("after")):
            word = match.group().strip()
            yield match.start(), f"a pointer or reference parameter without address space: {word}"
    for match in _FUNCTION.finditer(text):
        if match.group(1) in ("if", "for", "while", "switch"):
            continue
        level, end = 1, match.end()
        while level and end < len(text):
            level += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if re.search(rf"\b{match.group(1)}\s*(?:<[^<>;]*>)?\s*\(", text[match.end() : end]) and (
            not _calls_another(match.group(), text[match.end() : end], match.group(1))
        ):
            yield match.start(), f"recursion: {match.group(1)}"
    if depth == 0:
        for match in _GLOBAL.finditer(text):
            before = text[: match.start()]
            if before.count("{") == before.count("}") and " constant " not in f" {match.group()} ":
                yield match.start(), f"a global variable must be constant: {match.group()}"
    level = 0
    for match in _GROUP_VARIABLE.finditer(text):
        if match.group() in "{}":
            level += 1 if match.group() == "{" else -1
        elif level or depth == 0:
            yield match.start(), f"a threadgroup variable outside the kernel: {match.group()}"


def _calls_another(head: str, body: str, function: str) -> bool:
    """Whether a template's body only calls instances of it with other arguments, as recursion over
    a template parameter does."""
    instances = re.findall(rf"\b{function}\s*(<[^<>;]*>)", body)
    plain = re.search(rf"\b{function}\s*\(", body)
    return bool(instances) and plain is None and all(i not in head for i in instances)
