"""Launches of our own kernels, as the ops make them, for tests of the CPU runner: recorded, or with
a bug put into a kernel's text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import kernel_cases as cases
import mlx.core as mx
import numpy as np
from mlxrewrite.kernels import calls, launch
from mlxrewrite.kernels.dialects.cpu.source import Input
from mlxrewrite.kernels.launch import MetalKernel
from mlxrewrite.kernels.render import render
from mlxrewrite.kernels.specs import KernelSpec

# An entry of a block table that no kernel may read.
NOWHERE = 1 << 29
Outputs = Sequence[tuple[Sequence[int], mx.Dtype]]


@dataclass(frozen=True, eq=False)
class Launch:
    """One call of a kernel."""

    kernel: MetalKernel
    inputs: dict[str, mx.array]
    outputs: Outputs
    results: list[mx.array]
    groups: int
    threads: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.groups * self.threads, 1, 1

    @property
    def threadgroup(self) -> tuple[int, int, int]:
        return self.threads, 1, 1

    @property
    def described(self) -> dict[str, Any]:
        """The arguments of `signature` and of the static `check`."""
        return {
            "name": self.kernel.name,
            "inputs": [Input.of(name, self.inputs[name]) for name in self.kernel.input_names],
            "output_names": self.kernel.output_names,
            "output_dtypes": [dtype for _, dtype in self.outputs],
            "source": self.kernel.source,
            "header": self.kernel.header,
        }


@dataclass(frozen=True, eq=False)
class _Recorder:
    kernel: MetalKernel
    launches: list[Launch]

    def __call__(
        self, inputs: Mapping[str, mx.array], outputs: Outputs, *, groups: int, threads: int
    ) -> list[mx.array]:
        results: list[mx.array] = []
        made = Launch(self.kernel, dict(inputs), outputs, results, groups, threads)
        self.launches.append(made)
        results += self.kernel(inputs, outputs, groups=groups, threads=threads)
        return results


@contextlib.contextmanager
def recorded(template: str = "", old: str = "", new: str = "") -> Iterator[list[Launch]]:
    """Run ops on the CPU runner inside the block; yields every launch, the failed one last.

    template, old, new: a bug to put into the kernels of a template, see `changed`.
    """
    launches: list[Launch] = []

    def render_recorded(spec: KernelSpec) -> Any:
        kernel = render(spec)
        if spec.template == template:
            kernel = changed(kernel, old, new)
        return _Recorder(kernel, launches)

    with launch.backend("runner"), mock.patch.object(calls, "render", render_recorded):
        yield launches


def changed(kernel: MetalKernel, old: str, new: str) -> MetalKernel:
    """With a piece of the text replaced where it first stands, in the body or in the helpers."""
    if old in kernel.source:
        return replace(kernel, source=kernel.source.replace(old, new, 1), _made={})
    if old in kernel.header:
        return replace(kernel, header=kernel.header.replace(old, new, 1), _made={})
    raise ValueError(f"{kernel.name} has no {old!r}")


def hostile(case: cases.Case) -> cases.Made:
    """A case whose block tables end in block numbers out of range."""
    made = cases.make(case)
    tables = np.array(made.ragged.block_tables)
    for row, table in zip(tables, made.ragged.tables, strict=True):
        row[len(table) :] = NOWHERE
    vars(made.ragged)["block_tables"] = mx.array(tables)
    return made
