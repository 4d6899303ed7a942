"""Which rows of a step belong to which sequence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rows:
    """One sequence's part of a step: `length` rows from row `start`, the first at `position`."""

    sequence: int
    start: int
    length: int
    position: int

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + self.length

    @property
    def end(self) -> int:
        """The sequence's length once this step is done."""
        return self.position + self.length
