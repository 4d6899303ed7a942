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
from . import warpgroups

HERE = Path(__file__).parent
_SHARED = re.compile(
    r"(?P<before>(?:^|[;{}])\s*)threadgroup\s+"
    r"(?P<rest>(?P<type>(?!_)[\w:]+(?:\s*<[^;{}()]*?>)?)\s+(?P<name>\w+)\s*"
    r"(?P<sizes>(?:\[[^\]]*\]\s*)*);)",
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
    threadgroup_memory: int = 0,
) -> Callable[..., list[mx.array]]:
    """What `mx.fast.metal_kernel` returns, for CUDA: the same keywords, without templates.

    MLX compiles one kernel for each set of types and ranks, as on Metal. threadgroup_memory: bytes
    for its threadgroup variables if they may be more than 48 KB, for which CUDA wants to be asked.
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
            top = cuda_header(header)
            body = cuda_body(
                source,
                [(item, *kind) for item, kind in zip(input_names, types, strict=True)],
                list(zip(output_names, output_dtypes, strict=True)),
                threadgroup_memory,
            )
            # MLX keeps compiled kernels in a folder, by name: a name says which text it is of.
            text = sha256(f"{top}{body}".encode()).hexdigest()[:12]
            made[key] = mx.fast.cuda_kernel(  # type: ignore[assignment]
                name=f"{name}_{text}",
                input_names=[f"{item}__in" for item in input_names],
                output_names=[f"{item}__out" for item in output_names],
                header=_included(f"{name}-header", top),
                source=_included(name, body),
                shared_memory=threadgroup_memory,
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
    if "STAGED_TILES" in header:
        tiles = (HERE / "staging.h").read_text()
        pieces += tiles.replace("// MSL_PRODUCTS\n", warpgroups.products())
    prelude = (HERE / "prelude.h").read_text()
    return (
        f"{prelude}\nnamespace msl_user {{\nMSL_NAMES\n{pieces}\n"
        f"{_spaces(header)}\n}}  // namespace msl_user\nusing namespace msl_user;\n"
    )


def cuda_body(
    source: str,
    inputs: Sequence[tuple[str, mx.Dtype, bool]],
    outputs: Sequence[tuple[str, mx.Dtype]],
    threadgroup_memory: int = 0,
) -> str:
    """The body between declarations of what Metal passes as parameters. MLX's own parameters have
    CUDA's types. inputs: name, type, whether it is a scalar, which Metal passes by reference.
    threadgroup_memory: bytes that the launch brings for threadgroup variables; 0: static ones."""
    lines = ["{", "MSL_NAMES"]
    if threadgroup_memory:
        lines.append("extern __shared__ __align__(1024) unsigned char msl_threadgroup[];")
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
    body = _spaces(source, threadgroup_memory)
    return "\n".join([*lines, '#line 1 "kernel.metal"', body, "}", ""])


def _spaces(text: str, threadgroup_memory: int = 0) -> str:
    """Without address spaces. Variables of a threadgroup become __shared__, or parts of the memory
    that the launch brings, one after the other."""
    last = "0"

    def place(found: re.Match[str]) -> str:
        nonlocal last
        kind, name, sizes = found["type"], found["name"], found["sizes"]
        count = sizes.replace("[", "* (").replace("]", ")")
        begin, last = f"({last} + 1023) / 1024 * 1024", f"{name}__end"
        return (
            f"{found['before']}{kind}* {name} = "
            f"reinterpret_cast<{kind}*>(msl_threadgroup + {begin}); "
            f"constexpr int {last} = {begin} + int(sizeof({kind})) {count}; "
            f'static_assert({last} <= {threadgroup_memory}, "threadgroup memory");'
        )

    text, count = without_comments(text), 1
    while count:
        shared = place if threadgroup_memory else r"\g<before>__shared__ \g<rest>"
        text, count = _SHARED.subn(shared, text)
    return _SPACE.sub("", text)
