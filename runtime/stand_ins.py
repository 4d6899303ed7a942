"""What a forward may know of a step while it is traced: stand-ins for batches, blocks and states.

They have what every step of a shape has alike, and tracers for what differs. Anything else that is
asked of them ends the trace (`mlxrewrite.runtime.recorded`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import mlx.core as mx

Made = tuple[tuple[object, Any], ...]  # what a step was asked, and what came of it


class NotRecordableError(Exception):
    """A forward asked for something that only this one step has."""


class RecordedRagged:
    """Stands for a `Ragged` of single rows."""

    def __init__(self, rows: int, size: int, slots: mx.array, tables: mx.array, made: Made) -> None:
        self.num_rows = self.num_sequences = rows
        self.query_lens = (1,) * rows
        self.starts = tuple(range(rows + 1))
        self.everyone = tuple(range(rows))
        self.max_query_len = 1
        self.block_size = size
        self.slot_mapping = slots
        self.block_tables = tables
        self._made = dict(made)

    def ask(self, key: object, make: object) -> Any:
        del make  # it would read this step's lengths
        if key not in self._made:
            raise NotRecordableError(f"of its blocks: {key}")
        return self._made[key]

    def __getattr__(self, name: str) -> NoReturn:
        raise NotRecordableError(f"of its blocks: {name}")


@dataclass(frozen=True)
class RecordedRow:
    """Stands for the `Rows` of one sequence, whose number is that of its only row."""

    sequence: int
    length: int = field(default=1, init=False)

    @property
    def start(self) -> int:
        return self.sequence

    @property
    def stop(self) -> int:
        return self.sequence + 1

    def __getattr__(self, name: str) -> NoReturn:
        raise NotRecordableError(f"of a row: {name}")


class RecordedTable:
    """Stands for a `StateTable`: the states of all sequences of the step, and of no others.

    `states` are arrays [rows, ...] by their number; sequences have none of the others.
    """

    def __init__(self, size: int, rows: int, states: Mapping[int, mx.array]) -> None:
        self.size = size
        self.written: dict[int, mx.array] = {}
        self._everyone = tuple(range(rows))
        self._states = dict(states)
        self._writes = [0] * size

    def known(self, index: int, sequences: Sequence[int]) -> tuple[bool, ...]:
        return (index in self._states,) * len(sequences)

    def holds(self, sequence: int) -> tuple[tuple[int, ...] | None, ...]:
        del sequence  # the same for all
        found = [self._states.get(index) for index in range(self.size)]
        return tuple(None if states is None else states.shape[1:] for states in found)

    def read(self, index: int, sequences: tuple[int, ...]) -> mx.array | None:
        self._require_everyone(sequences)
        return self._states.get(index)

    def writes(self, index: int) -> int:
        return self._writes[index]

    def write(self, index: int, sequences: tuple[int, ...], states: mx.array) -> None:
        self._require_everyone(sequences)
        if states.ndim == 0 or states.shape[0] != len(sequences):
            raise NotRecordableError(f"state {index} of {list(states.shape)}")
        self._writes[index] += 1
        self._states[index] = self.written[index] = states

    def _require_everyone(self, sequences: tuple[int, ...]) -> None:
        if sequences != self._everyone:
            raise NotRecordableError("the states of some sequences")

    def __getattr__(self, name: str) -> NoReturn:
        raise NotRecordableError(f"of its states: {name}")


class RecordedBatch:
    """Stands for a `Batch` of single rows."""

    logit_rows = None

    def __init__(
        self, ids: mx.array, positions: mx.array, ragged: Sequence[Any], serial: int
    ) -> None:
        self.ids = ids
        self.positions = positions
        self.ragged = tuple(ragged)
        self.serial = serial
        self.num_rows = self.num_logits = ids.shape[0]
        self.rows = tuple(RecordedRow(i) for i in range(self.num_rows))
        self.memo: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> NoReturn:
        raise NotRecordableError(name)
