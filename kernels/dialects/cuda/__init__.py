"""The text of Metal kernels on NVIDIA GPUs: keywords for `mx.fast.cuda_kernel`.

The text stays as it is but for address spaces: declarations of threadgroup variables become
__shared__, other qualifiers go. (They cannot be macros: CUDA's own __device__ expands to one.)
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import mlx.core as mx

from ..cpu.source import ATTRIBUTES, METAL_TYPES, without_comments

HERE = Path(__file__).parent
_SHARED = re.compile(
    r"(?P<before>(?:^|[;{}])\s*)threadgroup\s+"
    r"(?P<rest>(?!_)[\w:]+(?:\s*<[^;{}()]*?>)?\s+\w+\s*(?:\[[^\]]*\]\s*)*;)",
    re.MULTILINE,
)
_SPACE = re.compile(r"\b(?:device|constant|thread|threadgroup)\b")


def _triple(of: str) -> str:
    return f"metal::uint3({of}.x, {of}.y, {of}.z)"


def _product(a: str, b: str) -> str:
    return f"metal::uint3({a}.x * {b}.x, {a}.y * {b}.y, {a}.z * {b}.z)"


_SIMDGROUPS = "(blockDim.x * blockDim.y * blockDim.z + 31u) / 32u"
# What stands for the attributes of a Metal kernel.
_VALUES = {
    "dispatch_simdgroups_per_threadgroup": _SIMDGROUPS,
    "dispatch_threads_per_threadgroup": _triple("blockDim"),
    "grid_size": _product("gridDim", "blockDim"),
    "simdgroup_index_in_threadgroup": "metal::msl_index() / 32u",
    "simdgroups_per_threadgroup": _SIMDGROUPS,
    "thread_execution_width": "32u",
    "thread_index_in_simdgroup": "metal::msl_index() % 32u",
    "thread_index_in_threadgroup": "metal::msl_index()",
    "thread_position_in_grid": (
        "metal::uint3(blockIdx.x * blockDim.x + threadIdx.x, "
        "blockIdx.y * blockDim.y + threadIdx.y, blockIdx.z * blockDim.z + threadIdx.z)"
    ),
    "thread_position_in_threadgroup": _triple("threadIdx"),
    "threadgroup_position_in_grid": _triple("blockIdx"),
    "threadgroups_per_grid": _triple("gridDim"),
    "threads_per_grid": _product("gridDim", "blockDim"),
    "threads_per_simdgroup": "32u",
    "threads_per_threadgroup": _triple("blockDim"),
}


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
) -> Callable[..., list[mx.array]]:
    """What `mx.fast.metal_kernel` returns, for CUDA: the same keywords, without templates.

    MLX compiles one kernel for each set of types and ranks, as on Metal.
    """
    made: dict[tuple[object, ...], Callable[..., list[mx.array]]] = {}

    def call(
        *,
        inputs: Sequence[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        init_value: float | None = None,
        stream: mx.Stream | None = None,
    ) -> list[mx.array]:
        if any(whole % part for whole, part in zip(grid, threadgroup, strict=True)):
            raise ValueError(f"{name}: the grid {grid} is not made of threadgroups {threadgroup}")
        types = tuple((array.dtype, array.ndim == 0) for array in inputs)
        key = (*types, *output_dtypes)
        if key not in made:
            made[key] = mx.fast.cuda_kernel(  # type: ignore[assignment]
                name=name,
                input_names=[f"{item}__in" for item in input_names],
                output_names=[f"{item}__out" for item in output_names],
                header=_included(f"{name}-header", cuda_header(header)),
                source=_included(
                    name,
                    cuda_body(
                        source,
                        [(item, *kind) for item, kind in zip(input_names, types, strict=True)],
                        list(zip(output_names, output_dtypes, strict=True)),
                    ),
                ),
            )
        return made[key](
            inputs=list(inputs),
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[tuple(shape) for shape in output_shapes],
            output_dtypes=list(output_dtypes),
            init_value=init_value,
            stream=stream,
        )

    return call


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Texts of this process. MLX copies the text of a kernel at each call, which for 30 KB takes
    longer than a small kernel runs (15 us beside an H100), so it gets a line that includes it."""
    return tempfile.TemporaryDirectory(prefix="mlxrewrite-")


def _included(name: str, text: str) -> str:
    """A line of text that stands for `text`."""
    path = Path(_folder().name) / f"{name}-{sha256(text.encode()).hexdigest()[:16]}.h"
    path.write_text(text)
    return f'\n#include "{path}"\n'


def cuda_header(header: str) -> str:
    """The prelude, then a kernel's helpers in a namespace of their own."""
    pieces = (HERE / "matrix.h").read_text() if "MATRIX_PIECES" in header else ""
    prelude = (HERE / "prelude.h").read_text()
    return (
        f"{prelude}\nnamespace msl_user {{\nMSL_NAMES\n{pieces}\n"
        f"{_spaces(header)}\n}}  // namespace msl_user\nusing namespace msl_user;\n"
    )


def cuda_body(
    source: str,
    inputs: Sequence[tuple[str, mx.Dtype, bool]],
    outputs: Sequence[tuple[str, mx.Dtype]],
) -> str:
    """The body between declarations of what Metal passes as parameters. MLX's own parameters have
    CUDA's types. inputs: name, type, whether it is a scalar, which Metal passes by reference."""
    lines = ["{", "MSL_NAMES"]
    for name, dtype, scalar in inputs:
        kind = METAL_TYPES[dtype]
        pointer = f"reinterpret_cast<const {kind}*>({name}__in)"
        lines.append(f"const {kind}{'&' if scalar else '*'} {name} = {'*' * scalar}{pointer};")
    for name, dtype in outputs:
        kind = METAL_TYPES[dtype]
        lines.append(f"{kind}* {name} = reinterpret_cast<{kind}*>({name}__out);")
    for name, value in _VALUES.items():
        if name in source:
            kind = ATTRIBUTES[name][0]
            lines.append(f"const {'metal::uint3' if kind == 'uint3' else kind} {name} = {value};")
    return "\n".join([*lines, '#line 1 "kernel.metal"', _spaces(source), "}", ""])


def _spaces(text: str) -> str:
    text, count = without_comments(text), 1
    while count:
        text, count = _SHARED.subn(r"\g<before>__shared__ \g<rest>", text)
    return _SPACE.sub("", text)
