"""The text of a kernel: what MLX writes around a body, what the runner makes of it for a CPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

TemplateValue = bool | int | mx.Dtype
Role = Literal["data", "shape", "strides", "ndim", "output"]

METAL_TYPES: dict[mx.Dtype, str] = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
}
# Inputs with fewer elements are bound in the constant address space.
CONSTANT_BELOW = 8


def _triple(field: str) -> str:
    return f"uint3(d->{field}[0], d->{field}[1], d->{field}[2])"


# Attributes that MLX passes when the body names them: type, and what the runner passes (d is the
# Ids of runtime.cpp).
ATTRIBUTES: dict[str, tuple[str, str]] = {
    "dispatch_quadgroups_per_threadgroup": ("uint", "d->dispatch_simdgroups * 8"),
    "dispatch_simdgroups_per_threadgroup": ("uint", "d->dispatch_simdgroups"),
    "dispatch_threads_per_threadgroup": ("uint3", _triple("dispatch_size")),
    "grid_origin": ("uint3", "uint3(0)"),
    "grid_size": ("uint3", _triple("grid")),
    "quadgroup_index_in_threadgroup": ("uint", "d->index / 4"),
    "quadgroups_per_threadgroup": ("uint", "d->simdgroups * 8"),
    "simdgroup_index_in_threadgroup": ("uint", "d->simdgroup"),
    "simdgroups_per_threadgroup": ("uint", "d->simdgroups"),
    "thread_execution_width": ("uint", "32u"),
    "thread_index_in_quadgroup": ("uint", "d->index % 4"),
    "thread_index_in_simdgroup": ("uint", "d->lane"),
    "thread_index_in_threadgroup": ("uint", "d->index"),
    "thread_position_in_grid": ("uint3", _triple("thread_in_grid")),
    "thread_position_in_threadgroup": ("uint3", _triple("thread_in_group")),
    "threadgroup_position_in_grid": ("uint3", _triple("group_in_grid")),
    "threadgroups_per_grid": ("uint3", _triple("groups")),
    "threads_per_grid": ("uint3", _triple("grid")),
    "threads_per_simdgroup": ("uint", "32u"),
    "threads_per_threadgroup": ("uint3", _triple("group_size")),
}
IDS = """
struct MslIds {
  unsigned thread_in_grid[3], thread_in_group[3], group_in_grid[3], group_size[3], dispatch_size[3];
  unsigned groups[3], grid[3], index, lane, simdgroup, simdgroups, dispatch_simdgroups;
};
"""
# What MLX puts before every kernel: its own headers, as they are in the installed wheel.
PREAMBLE = '#include "mlx/backend/metal/kernels/utils.h"\n'


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a call, as far as its text depends on it."""

    name: str
    dtype: mx.Dtype
    size: int
    ndim: int

    @classmethod
    def of(cls, name: str, array: mx.array) -> Input:
        return cls(name, array.dtype, array.size, array.ndim)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One buffer of the kernel function. `array` is the input or output that it belongs to."""

    array: str
    role: Role
    type: str
    reference: bool

    @property
    def name(self) -> str:
        return self.array if self.role in ("data", "output") else f"{self.array}_{self.role}"


@dataclass(frozen=True, slots=True)
class Signature:
    """The kernel function that MLX makes: header, head and body with `}`, and the line that
    instantiates a template ("" without one)."""

    function: str
    arguments: str  # of the template, with the angle brackets
    header: str
    head: str
    body: str
    instantiation: str
    parameters: tuple[Parameter, ...]
    attributes: tuple[str, ...]

    @property
    def text(self) -> str:
        """What MLX hands to the Metal compiler after its own headers."""
        return f"{self.header}{self.head}{self.body}\n}}\n{self.instantiation}"


def template_argument(value: TemplateValue) -> str:
    return METAL_TYPES[value] if isinstance(value, mx.Dtype) else str(int(value))


def _template_parameter(name: str, value: TemplateValue) -> str:
    kind = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "typename"
    return f"{kind} {name}"


def signature(
    *,
    name: str,
    inputs: Sequence[Input],
    output_names: Sequence[str],
    output_dtypes: Sequence[mx.Dtype],
    source: str,
    header: str = "",
    template: Sequence[tuple[str, TemplateValue]] = (),
    atomic_outputs: bool = False,
) -> Signature:
    """Just what MLX 0.32 writes, of which the tests make sure: the name of an input's shape,
    strides or rank, or of an attribute, makes it a parameter wherever it occurs in the body."""
    arguments = f"<{', '.join(template_argument(value) for _, value in template)}>"
    function = f"custom_kernel_{name}"
    head = ""
    if template:
        function += "_" + re.sub("<|, |-", "_", arguments[:-1])
        head = f"template <{', '.join(_template_parameter(*pair) for pair in template)}>\n"
    for item in inputs:
        binding = "s" if item.ndim == 0 else "c" if item.size < CONSTANT_BELOW else ""
        function += f"_{METAL_TYPES[item.dtype]}{binding}"
    function += "".join(f"_{METAL_TYPES[dtype]}" for dtype in output_dtypes)

    parameters: list[Parameter] = []
    declared: list[str] = []
    for item in inputs:
        kind = METAL_TYPES[item.dtype]
        space = "constant" if item.size < CONSTANT_BELOW else "device"
        declared.append(f"  const {space} {kind}{'*' if item.ndim else '&'} {item.name}")
        parameters.append(Parameter(item.name, "data", kind, item.ndim == 0))
        facts: tuple[tuple[Role, str, bool], ...] = (
            ("shape", "int", False),
            ("strides", "int64_t", False),
            ("ndim", "int", True),
        )
        for role, fact_type, reference in facts if item.ndim else ():
            if f"{item.name}_{role}" in source:
                mark = "&" if reference else "*"
                declared.append(f"  const constant {fact_type}{mark} {item.name}_{role}")
                parameters.append(Parameter(item.name, role, fact_type, reference))
    for output, dtype in zip(output_names, output_dtypes, strict=True):
        kind = METAL_TYPES[dtype]
        kind = f"atomic<{kind}>" if atomic_outputs else kind
        declared.append(f"  device {kind}* {output}")
        parameters.append(Parameter(output, "output", kind, False))
    attributes = tuple(name for name in ATTRIBUTES if name in source)

    buffers = [f"{line} [[buffer({i})]]" for i, line in enumerate(declared)]
    # MLX ends the list where it has as many buffers as arrays, whatever shapes came between.
    arrays = len(inputs) + len(output_names)
    first_output = len(buffers) - len(output_names)
    head += f"[[kernel]] void {function}(\n"
    for i, line in enumerate(buffers):
        ends = i >= first_output and not (i < arrays - 1 or attributes)
        head += line + (") {\n" if ends else ",\n")
    if attributes:
        head += ",\n".join(f"  {ATTRIBUTES[name][0]} {name} [[{name}]]" for name in attributes)
        head += ") {\n"
    instantiation = ""
    if template:
        instance = f"{function}{arguments}"
        instantiation = (
            f'\ntemplate [[host_name("{function}")]] [[kernel]] decltype({instance}) {instance};\n'
        )
    return Signature(
        function,
        arguments if template else "",
        header,
        head,
        source,
        instantiation,
        tuple(parameters),
        attributes,
    )


# ---- for a CPU -----------------------------------------------------------------------------------
_THREADGROUP = re.compile(
    r"(?P<before>(?:^|[;{}])\s*(?:alignas\([^)]*\)\s*)?)"
    r"threadgroup\s+(?P<type>(?!_)[\w:]+(?:\s*<[^;{}()]*?>)?)\s+"
    r"(?P<name>\w+)\s*(?P<dims>(?:\[[^\]]*\]\s*)*);",
    re.MULTILINE,
)
_UNROLL = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+unroll\b.*$", re.MULTILINE)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def without_comments(text: str) -> str:
    """The text with comments blanked; lines and columns stay."""
    return _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def with_threadgroup_macros(text: str) -> str:
    """The one change to a kernel's text that matters: a declaration of threadgroup variables
    becomes a macro, on the same line. Pointers and references to threadgroup memory stay as they
    are."""
    text = without_comments(text)
    count = 1
    while count:
        text, count = _THREADGROUP.subn(
            lambda match: "{before}MSL_THREADGROUP({name}, {dims}, {type});".format(
                **match.groupdict()
            ),
            text,
        )
    return text


def _for_cpu(text: str) -> str:
    """Unrolled loops take a CPU's compiler three times as long and change nothing else."""
    return _UNROLL.sub("", with_threadgroup_macros(text))


def cpu_text(made: Signature, name: str) -> str:
    """The kernel as C++ for the runner, with the entry function that runtime.cpp calls."""
    passed = []
    for i, parameter in enumerate(made.parameters):
        const = "" if parameter.role == "output" else "const "
        pointer = f"({const}{parameter.type}*)a[{i}]"
        passed.append(f"*{pointer}" if parameter.reference else pointer)
    passed += [ATTRIBUTES[attribute][1] for attribute in made.attributes]
    return "\n".join(
        [
            PREAMBLE,
            f'#line 1 "{name}.header"',
            _for_cpu(made.header),
            '#line 1 "signature"',
            made.head,
            f'#line 1 "{name}.metal"',
            _for_cpu(made.body),
            "}",
            '#line 1 "entry"',
            IDS,
            entry(f"{made.function}{made.arguments}({', '.join(passed)})"),
        ]
    )


def entry(call: str) -> str:
    """The function that the runtime calls for each thread."""
    return (
        'extern "C" __attribute__((no_sanitize("address", "undefined")))\n'
        f"void msl_entry(void** a, const MslIds* d) {{\n  {call};\n}}\n"
    )
