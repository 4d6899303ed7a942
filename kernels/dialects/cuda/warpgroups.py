"""Hopper's products of a warpgroup, as text: an instruction of each width with all its registers.

An instruction multiplies 64 rows, 16 of each warp, which are a tile or weights in registers, with
16 rows of `width` pieces of 8 columns. Sums lie in a lane as those of mma.m16n8k16, piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

# In pieces of 8 columns; `msl_width` in staging.h takes sums apart into these.
WIDTHS = (2, 4, 6, 8, 16, 24, 32)
TYPES = {"half": "f16", "bfloat": "bf16"}


@cache
def products() -> str:
    """Specialisations of msl_wgmma: `tiles` takes both operands by descriptor, `weights` the left
    one in registers, and a right one that has its columns side by side."""
    lines = ["template <typename T, int PIECES> struct msl_wgmma;"]
    for kind, name in TYPES.items():
        for width in WIDTHS:
            lines += [
                f"template <> struct msl_wgmma<{kind}, {width}> {{",
                *_function("tiles", "ulong left, ulong right, int add", ['"l"(left)'], width, name),
                *_function(
                    "weights",
                    f"const Left<{kind}>& left, ulong right",
                    [f'"r"(left.part[{i}])' for i in range(4)],
                    width,
                    name,
                ),
                "};",
            ]
    return "\n".join(lines) + "\n"


def _function(
    function: str, parameters: str, left: list[str], width: int, name: str
) -> Iterator[str]:
    """Sums are the operands 0.., then come left and right, and whether sums are added to."""
    count = 4 * width
    sums = ", ".join(f"%{i}" for i in range(count))
    of_left = ", ".join(f"%{count + i}" for i in range(len(left)))
    right = count + len(left)
    tiles = function == "tiles"
    yield f"  static METAL_FUNC void {function}(Sums* sums, {parameters}) {{"
    yield f'    asm volatile("{{\\n.reg .pred added;\\nsetp.ne.b32 added, %{right + 1}, 0;\\n"'
    yield f'      "wgmma.mma_async.sync.aligned.m64n{8 * width}k16.f32.{name}.{name} "'
    yield f'      "{{{sums}}}, {of_left if tiles else "{" + of_left + "}"}, %{right}, added, "'
    yield f'      "1, 1, {"0, 0" if tiles else "1"};\\n}}"'
    registers = [
        f'"+f"(sums[{i}].part[{j}].e[{k}])' for i in range(width) for j in (0, 1) for k in (0, 1)
    ]
    yield f"      : {', '.join(registers)}"
    yield f'      : {", ".join(left)}, "l"(right), "r"({"add" if tiles else 1}));'
    yield "  }"
