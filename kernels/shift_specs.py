"""The spec of the kernel for token shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .specs import KernelSpec


@dataclass(frozen=True, slots=True)
class ShiftSpec(KernelSpec):
    """Each row's predecessor; a thread copies `each` entries of one row. `states`: there are some
    from before the batch."""

    template: ClassVar[str] = "shift"

    rows_dtype: str
    width: int
    each: int
    simdgroups: int
    states: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("rows", *(("states",) if self.states else ()), "origins")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("output",)
