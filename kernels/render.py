"""Specs to Metal text. One strict Jinja environment: an undefined name is an error."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from pathlib import Path

import jinja2
from jinja2 import meta

from .launch import MetalKernel
from .specs import KernelSpec

FOLDER = Path(__file__).parent
METAL_TYPES = {
    "float32": "float",
    "float16": "float16_t",
    "bfloat16": "bfloat16_t",
    "uint32": "uint",
}
METAL_WORDS = {2: "ushort", 4: "uint", 8: "uint2", 16: "uint4"}


@cache
def environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    made.filters["metal_type"] = METAL_TYPES.__getitem__
    made.filters["metal_word"] = METAL_WORDS.__getitem__
    return made


def template_name(template: str) -> str:
    return f"{template}.metal.jinja"


def template_variables(template: str) -> frozenset[str]:
    """The holes of a template."""
    text = (FOLDER / template_name(template)).read_text()
    return frozenset(meta.find_undeclared_variables(environment().parse(text)))


@cache
def header(names: tuple[str, ...]) -> str:
    """The helpers that stand before a kernel."""
    return "".join((FOLDER / name).read_text() for name in names)


@cache
def render(spec: KernelSpec) -> MetalKernel:
    """The kernel of a spec; the same object for the same spec, so that it is built once."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    return MetalKernel(
        name=spec.name,
        input_names=spec.inputs,
        output_names=spec.outputs,
        source=environment().get_template(template_name(spec.template)).render(values),
        header=header(spec.helpers),
        mutable_inputs=spec.mutable,
        threadgroup_memory=spec.threadgroup_memory,
    )
