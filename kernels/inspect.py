"""`mlxrewrite kernels list` and `show`: specs by name, and the text that Metal's compiler gets."""

from __future__ import annotations

import importlib
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import mlx.core as mx

from . import policy
from .dialects.cpu.source import Input, signature
from .render import render
from .specs import DTYPES, SHORT, AttentionSpec, KernelSpec, initials

TYPES = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "uint32": mx.uint32,
}
# One of each structure that occurs among the models that mlx_lm has.
USUAL = (
    AttentionSpec(128, 128, 32, 8, 16, "bfloat16", "bfloat16"),
    AttentionSpec(64, 64, 32, 8, 16, "float16", "float16"),
    AttentionSpec(64, 64, 64, 8, 16, "bfloat16", "bfloat16", sinks=True),
    AttentionSpec(256, 256, 8, 4, 16, "bfloat16", "bfloat16", softcap=True),
    AttentionSpec(80, 80, 32, 32, 16, "float16", "float16"),
    AttentionSpec(192, 128, 16, 16, 16, "bfloat16", "bfloat16"),
    AttentionSpec(576, 512, 16, 1, 16, "bfloat16", "bfloat16", shared_values=True),
    AttentionSpec(128, 128, 32, 8, 16, "bfloat16", "bfloat16", bits=8, code_group=64),
    AttentionSpec(128, 128, 32, 8, 16, "bfloat16", "bfloat16", bits=4, code_group=64),
)


def templates() -> dict[str, type[KernelSpec]]:
    """Every kind of kernel, by the name of its template; modules `*specs.py` hold them."""
    for path in sorted(Path(__file__).parent.glob("*specs.py")):
        importlib.import_module(f".{path.stem}", __package__)
    found: dict[str, type[KernelSpec]] = {}
    pending: list[type[KernelSpec]] = [KernelSpec]
    while pending:
        for kind in pending.pop().__subclasses__():
            pending.append(kind)
            if "template" in vars(kind):
                found[kind.template] = kind
    return dict(sorted(found.items()))


def list_specs() -> list[str]:
    """Names of the kernels that the policy picks for usual layers; `show` takes any other too."""
    return sorted({spec.name for layer in USUAL for spec in policy.kernels(layer)})


def parse(name: str) -> KernelSpec:
    """The spec that a name spells. Raises KeyError for an unknown template, else ValueError."""
    kinds = templates()
    stem = max((t for t in kinds if name == t or name.startswith(f"{t}_")), key=len, default=None)
    if stem is None:
        raise KeyError(f"no template for it; there are {', '.join(kinds)}")
    kind, words = kinds[stem], name[len(stem) + 1 :].split("_")
    hints, values = get_type_hints(kind), dict[str, Any]()
    long = {short: dtype for dtype, short in SHORT.items()}
    whole = "_".join(words)
    for part in fields(kind):
        form, short = hints[part.name], initials(part.name)
        if form is bool:
            values[part.name] = whole.startswith(part.name)
            taken = part.name if values[part.name] else ""
        else:
            taken = whole.split("_")[0]
            digits = taken.removeprefix(short)
            spelled = digits.isdigit() and taken.startswith(short)
            if form is int and part.default == 0 and not spelled:
                values[part.name], taken = 0, ""
            elif form is str and taken in long:
                values[part.name] = long[taken]
            elif form is int and spelled:
                values[part.name] = int(digits)
            else:
                want = f"one of {', '.join(DTYPES.keys())}" if form is str else f"{short}<number>"
                raise ValueError(f"expected {want} for {part.name}, got {taken or 'nothing'!r}")
        if taken:
            whole = whole[len(taken) :].removeprefix("_")
    spec = kind(**values)
    if whole or spec.name != name:
        raise ValueError(f"{whole!r} is none of the words of {stem}")
    return spec


def show(name: str) -> str:
    """The text of a kernel as Metal's compiler gets it after MLX's own headers."""
    spec = parse(name)
    kernel = render(spec)
    if type(spec).__module__ != KernelSpec.__module__:  # types of inputs are known to its op only
        names = ", ".join(kernel.input_names), ", ".join(kernel.output_names)
        heads = f"// {kernel.name}\n// inputs: {names[0]}\n// outputs: {names[1]}\n"
        return f"{kernel.header}\n{heads}{kernel.source}"
    made = signature(
        name=kernel.name,
        inputs=[
            Input(array, array_dtype(spec, array), _size(spec, array), 1)
            for array in kernel.input_names
        ],
        output_names=kernel.output_names,
        output_dtypes=[array_dtype(spec, array) for array in kernel.output_names],
        source=kernel.source,
        header=kernel.header,
    )
    return made.text


def array_dtype(spec: KernelSpec, array: str) -> mx.Dtype:
    """The type of an input or output of the kernels in `specs`."""
    if array in ("key_pool", "value_pool") and getattr(spec, "bits", False):
        return mx.uint32
    rows = ("query_dtype", "rows_dtype", "dtype")
    for arrays, names in (
        (("queries", "keys", "values", "sinks", "output"), rows),
        (("key_pool", "value_pool", "gathered_keys", "gathered_values"), ("pool_dtype", "dtype")),
    ):
        if array in arrays:
            return TYPES[next(getattr(spec, name) for name in names if hasattr(spec, name))]
    if array in ("settings", "partial_values", "partial_stats"):
        return mx.float32
    return mx.int32


def _size(spec: KernelSpec, array: str) -> int:
    """How many elements, as far as it matters: fewer than 8 are `constant`."""
    if array == "sinks":
        heads = getattr(spec, "query_heads", 0)
        return int(heads or getattr(spec, "kv_heads", 1) * getattr(spec, "group", 1))
    return {"token_in": 1, "settings": 2}.get(array, 4096)
