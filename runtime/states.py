"""State of recurrent mixers: one slot for each sequence, the slots of a batch next to each other.

A slot is a row of an array [n, ...] that holds the state of the n sequences that were last run
together. A step hands that array to the mixer as it is, and keeps what the mixer returns in its
place: one read and one write of each state, nothing written in place, nothing to reset when a slot
is used again. Rows move only when sequences join or leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np


@dataclass(slots=True, eq=False)
class _Rows:
    """States [n, ...] of the sequences in `members`. Rows of sequences that left are dead."""

    members: tuple[int, ...]
    states: mx.array


@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    rows: _Rows
    place: int


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A sequence's states after its first `length` positions: of each entry, arrays [1, ...]."""

    length: int
    states: tuple[tuple[mx.array | None, ...], ...]

    @property
    def nbytes(self) -> int:
        """Memory that the snapshot holds."""
        return sum(a.nbytes for entry in self.states for a in entry if a is not None)


class StateTable:
    """The slots of one entry of a cache list, with `size` arrays for every sequence."""

    __slots__ = ("_slots", "_writes", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._slots: tuple[dict[int, _Slot], ...] = tuple({} for _ in range(size))
        self._writes = [0] * size

    @property
    def used(self) -> bool:
        """Whether any sequence has a state here."""
        return any(self._slots)

    def known(self, index: int, sequences: Sequence[int]) -> tuple[bool, ...]:
        """Which of the sequences have array `index`."""
        slots = self._slots[index]
        return tuple(sequence in slots for sequence in sequences)

    def alike(self, index: int, sequences: tuple[int, ...]) -> bool:
        """Whether all of the sequences have array `index`, of one shape, or none of them has."""
        slots = self._slots[index]
        first = slots.get(sequences[0])
        if first is not None and first.rows.members == sequences:
            return True
        found = (slots.get(sequence) for sequence in sequences)
        return len({None if slot is None else slot.rows.states.shape[1:] for slot in found}) == 1

    def holds(self, sequence: int) -> tuple[tuple[int, ...] | None, ...]:
        """The shape of each of a sequence's arrays; None for those it does not have (yet).

        Histories have different shapes in sequences that are shorter than what is kept.
        """
        found = [slots.get(sequence) for slots in self._slots]
        return tuple(None if slot is None else slot.rows.states.shape[1:] for slot in found)

    def read(self, index: int, sequences: tuple[int, ...]) -> mx.array | None:
        """States [n, ...] of sequences that agree in what they hold; None if they are new."""
        slots = self._slots[index]
        found = [slots.get(sequence) for sequence in sequences]
        held = [slot for slot in found if slot is not None]
        if not held:
            return None
        if len(held) != len(found):
            raise RuntimeError("sequences with and without a state were put together")
        rows = held[0].rows
        if rows.members == sequences:
            return rows.states
        runs = list(_runs(held))
        arrays = {id(rows): rows for rows, _ in runs}
        if len(runs) == len(arrays):
            parts = [_taken(rows, places) for rows, places in runs]
            return parts[0] if len(parts) == 1 else mx.concatenate(parts)
        # Sequences of a few arrays in turn: one gather from each, and one that puts them in order.
        parts, order = [], []
        for number, rows in arrays.items():
            mine = [i for i, slot in enumerate(held) if id(slot.rows) == number]
            parts.append(_taken(rows, [held[i].place for i in mine]))
            order += mine
        places = np.argsort(np.array(order)).astype(np.int32)
        return mx.take(mx.concatenate(parts), mx.array(places), axis=0)

    def writes(self, index: int) -> int:
        """How often array `index` was written, of any sequences."""
        return self._writes[index]

    def write(self, index: int, sequences: tuple[int, ...], states: mx.array) -> None:
        """Replace array `index` of the sequences by the rows of `states` [n, ...]."""
        if states.ndim == 0 or states.shape[0] != len(sequences):
            raise TypeError(
                f"state {index}: expected [{len(sequences)}, ...], one row for each sequence, got "
                f"{list(states.shape)}"
            )
        self._writes[index] += 1
        slots = self._slots[index]
        first = slots.get(sequences[0])
        if first is not None and first.rows.members == sequences:
            first.rows.states = states
            return
        new = _Rows(sequences, states)
        left = {}
        for place, sequence in enumerate(sequences):
            old = slots.get(sequence)
            if old is not None:
                left[id(old.rows)] = old.rows
            slots[sequence] = _Slot(new, place)
        for rows in left.values():
            self._shrink(index, rows)

    def snapshot(self, sequence: int) -> tuple[mx.array | None, ...]:
        """A sequence's arrays, each [1, ...] and its own copy; None for those it does not have."""
        found = [slots.get(sequence) for slots in self._slots]
        return tuple(None if s is None else _copied(s.rows, [s.place]) for s in found)

    def restore(self, sequence: int, states: Sequence[mx.array | None]) -> None:
        """Give a sequence the arrays of a snapshot."""
        if len(states) != self.size:
            raise ValueError(f"expected {self.size} arrays of state, got {len(states)}")
        for index, state in enumerate(states):
            if state is not None:
                self.write(index, (sequence,), state)

    def free(self, sequence: int) -> None:
        """Forget a sequence's states. Its row goes when the others are next run, or with them."""
        for slots in self._slots:
            slots.pop(sequence, None)

    def arrays(self) -> Iterator[mx.array]:
        """All states, each array once: what a later step depends on."""
        seen = set()
        for slots in self._slots:
            for slot in slots.values():
                if id(slot.rows) not in seen:
                    seen.add(id(slot.rows))
                    yield slot.rows.states

    def _shrink(self, index: int, rows: _Rows) -> None:
        """Let go of an array most of whose rows have moved: keep a copy of those that have not."""
        slots = self._slots[index]
        kept = [s for s in rows.members if s in slots and slots[s].rows is rows]
        if not kept:
            return
        smaller = _Rows(tuple(kept), _copied(rows, [slots[s].place for s in kept]))
        for place, sequence in enumerate(kept):
            slots[sequence] = _Slot(smaller, place)


def _runs(slots: Sequence[_Slot]) -> Iterator[tuple[_Rows, list[int]]]:
    """Neighbours that lie in one array, with their places in it."""
    start = 0
    for stop in range(1, len(slots) + 1):
        if stop == len(slots) or slots[stop].rows is not slots[start].rows:
            yield slots[start].rows, [slot.place for slot in slots[start:stop]]
            start = stop


def _taken(rows: _Rows, places: list[int]) -> mx.array:
    if places == list(range(rows.states.shape[0])):
        return rows.states
    return _copied(rows, places)


def _copied(rows: _Rows, places: list[int]) -> mx.array:
    """Not a slice: that would keep the whole array."""
    return mx.take(rows.states, mx.array(np.array(places, dtype=np.int32)), axis=0)
