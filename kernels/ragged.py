"""One step's rows for one group of layers: which sequence, which position, which slot of the pool.

Host lists come first and arrays are made from them when something asks for them, once per step:
a decode step on the CPU route needs none of the arrays that the kernels read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .metadata import MIN_METADATA, padded

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of several sequences below each other, and the blocks of their keys and values.

    query_lens: rows of each sequence in this step, each >= 1.
    context_lens: positions of each sequence once this step is written (this step's rows included).
    tables: each sequence's live block numbers. The first entry is block `dropped[i]` of the
        sequence: a windowed layer frees blocks at the front and keeps a short table.
    block_size: positions in a block.
    """

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    tables: tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...]
    block_size: int
    _memo: dict[object, Any] = field(default_factory=dict, repr=False)
    _asked: dict[object, Callable[[Ragged], Any]] = field(default_factory=dict, repr=False)

    @staticmethod
    def build(
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        dropped: Sequence[int] | None = None,
    ) -> Ragged:
        """Check one step and describe it. Raises ValueError where the lists contradict each other.

        `block_tables[i]` must cover positions dropped[i] * block_size .. context_lens[i] - 1;
        entries beyond that are ignored. Every live block must be one that no other sequence of the
        step writes to.
        """
        missing = (0,) * len(query_lens) if dropped is None else tuple(dropped)
        counts = {len(query_lens), len(context_lens), len(block_tables), len(missing)}
        if len(counts) != 1 or not query_lens:
            raise ValueError(
                "Ragged.build: expected one entry per sequence and at least one sequence, got "
                f"{len(query_lens)} query lengths, {len(context_lens)} context lengths, "
                f"{len(block_tables)} block tables, {len(missing)} dropped counts"
            )
        for i, (rows, context, table, gone) in enumerate(
            zip(query_lens, context_lens, block_tables, missing, strict=True)
        ):
            if not 1 <= rows <= context:
                raise ValueError(
                    f"Ragged.build: sequence {i} has {rows} rows in this step and {context} "
                    "positions after it; expected 1 <= rows <= positions"
                )
            if (gone + len(table)) * block_size < context or gone * block_size > context - rows:
                raise ValueError(
                    f"Ragged.build: sequence {i} has {len(table)} blocks of {block_size} after "
                    f"{gone} dropped ones, which do not hold positions {context - rows}.."
                    f"{context - 1}; allocate blocks before building the step"
                )
        return Ragged(
            tuple(query_lens),
            tuple(context_lens),
            tuple(tuple(table) for table in block_tables),
            missing,
            block_size,
        )

    @property
    def num_sequences(self) -> int:
        return len(self.query_lens)

    @property
    def everyone(self) -> tuple[int, ...]:
        """The numbers of all sequences."""
        return tuple(range(self.num_sequences))

    @cached_property
    def num_rows(self) -> int:
        return sum(self.query_lens)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first row of each sequence, and the number of rows at the end."""
        return (0, *np.cumsum(self.query_lens).tolist())

    @cached_property
    def max_query_len(self) -> int:
        return max(self.query_lens)

    @cached_property
    def max_context_len(self) -> int:
        return max(self.context_lens)

    # Arrays for the kernels, int32, padded with zeros to at least MIN_METADATA entries.

    @cached_property
    def cu_seqlens(self) -> mx.array:
        """First row of each sequence, then the number of rows: [>= S + 1]."""
        return padded(self.starts)

    @cached_property
    def context_lengths(self) -> mx.array:
        """Positions of each sequence, this step's included: [>= S]."""
        return padded(self.context_lens)

    @cached_property
    def first_blocks(self) -> mx.array:
        """How many blocks each sequence's table lacks at its front: [>= S]."""
        return padded(self.dropped)

    @cached_property
    def positions(self) -> mx.array:
        """Each row's position in its sequence: [>= T]."""
        return padded(self.host_positions)

    @cached_property
    def row_sequence(self) -> mx.array:
        """Each row's sequence: [>= T]."""
        return padded(np.repeat(np.arange(self.num_sequences), self.query_lens))

    @cached_property
    def block_tables(self) -> mx.array:
        """Block numbers, [S, max blocks], at least MIN_METADATA of them; padding is 0."""
        width = rounded(max(len(table) for table in self.tables))
        packed = np.zeros((self.num_sequences, width), np.int32)
        for row, table in zip(packed, self.tables, strict=True):
            row[: len(table)] = table
        return mx.array(packed)

    @cached_property
    def slot_mapping(self) -> mx.array:
        """Where each row is written, block * block_size + offset: int32 [>= T]."""
        return padded(self.host_slots)

    # Host side.

    @cached_property
    def host_positions(self) -> npt.NDArray[np.int64]:
        if self.max_query_len == 1:
            return np.array(self.context_lens) - 1
        ends = zip(self.query_lens, self.context_lens, strict=True)
        return np.concatenate([np.arange(end - rows, end) for rows, end in ends])

    @cached_property
    def host_slots(self) -> npt.NDArray[np.int64]:
        if self.max_query_len == 1:  # each row's block is the one that its sequence writes to
            positions, size = self.host_positions, self.block_size
            places = (positions // size - np.array(self.dropped)).tolist()
            blocks = [table[place] for table, place in zip(self.tables, places, strict=True)]
            return np.array(blocks) * size + positions % size
        return np.concatenate(
            [
                self.slots(i, end - rows, end)
                for i, (rows, end) in enumerate(
                    zip(self.query_lens, self.context_lens, strict=True)
                )
            ]
        )

    def slots(self, sequence: int, low: int, high: int) -> npt.NDArray[np.int64]:
        """Slots of the positions low..high-1 of one sequence."""
        self.require_live(sequence, low)
        positions = np.arange(low, high)
        table = np.array(self.tables[sequence], np.int64)
        blocks = table[positions // self.block_size - self.dropped[sequence]]
        slots: npt.NDArray[np.int64] = blocks * self.block_size + positions % self.block_size
        return slots

    @cached_property
    def single_run(self) -> int | None:
        """The slot of the first row if all rows of the step are written side by side."""
        if self.num_sequences > 1:
            return None
        rows, end = self.query_lens[0], self.context_lens[0]
        return self.run(0, end - rows, end)

    @cached_property
    def scatter(self) -> mx.array:
        """Each row's slot without padding, int32 [T]: the index of the functional write."""
        return mx.array(self.host_slots.astype(np.int32))

    @cached_property
    def _consecutive(self) -> tuple[bool, ...]:
        return tuple(
            table[-1] - table[0] == len(table) - 1 and all(b - a == 1 for a, b in pairwise(table))
            for table in self.tables
        )

    def require_live(self, sequence: int, low: int) -> None:
        """Refuse to read a position whose block was given back: it may be another sequence's."""
        first = self.dropped[sequence] * self.block_size
        if low < first:
            raise ValueError(
                f"Ragged: position {low} of sequence {sequence} is asked for, but its blocks "
                f"before position {first} were given back; the layer sees further than its cache "
                "keeps"
            )

    def run(self, sequence: int, low: int, high: int) -> int | None:
        """The slot of position `low` if positions low..high-1 lie side by side in the pool."""
        self.require_live(sequence, low)
        size, gone, table = self.block_size, self.dropped[sequence], self.tables[sequence]
        first, last = low // size - gone, (high - 1) // size - gone
        if first != last and not self._consecutive[sequence]:
            part = table[first : last + 1]
            if any(b - a != 1 for a, b in pairwise(part)):
                return None
        return table[first] * size + low % size

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What `make` returns, made once per step; `key` names it and all it depends on."""
        if key not in self._memo:
            self._memo[key] = make()
        made: T = self._memo[key]
        return made

    def ask(self, key: object, make: Callable[[Ragged], T]) -> T:
        """What `make` returns of this step, made once; `key` names it and all else it depends on.

        `make` must serve the steps of other rows too: what a forward asks of its step is all that a
        recorded one needs to know (`mlxrewrite.runtime.recorded`).
        """
        if key not in self._asked:
            self._asked[key] = make
            self._memo[key] = make(self)
        made: T = self._memo[key]
        return made

    @property
    def asked(self) -> dict[object, Callable[[Ragged], Any]] | None:
        """All that this step was asked; None where something else was taken from it."""
        return self._asked if len(self._asked) == len(self._memo) else None

    def index(self, sequence: int, low: int, high: int) -> mx.array:
        """Slots of the positions low..high-1 as an int32 array, made once per step."""
        return self.once(
            ("index", sequence, low, high),
            lambda: mx.array(self.slots(sequence, low, high).astype(np.int32)),
        )

    def padded_index(self, sequence: int, low: int, high: int) -> mx.array:
        """The same for the kernels, padded."""
        return self.once(
            ("padded index", sequence, low, high), lambda: padded(self.slots(sequence, low, high))
        )

    def seen(self, sequence: int, low: int, window: int | None, chunk: int | None) -> mx.array:
        """Which of the positions low.. each row of a sequence sees: bool [rows, end - low]."""

        def make() -> mx.array:
            end = self.context_lens[sequence]
            mine = np.arange(end - self.query_lens[sequence], end)[:, None]
            theirs = np.arange(low, end)[None]
            visible = theirs <= mine
            if window is not None:
                visible &= theirs > mine - window
            if chunk is not None:
                visible &= theirs // chunk == mine // chunk
            return mx.array(visible)

        return self.once(("seen", sequence, low, window, chunk), make)


def rounded(count: int) -> int:
    """A little more than `count`, and at least MIN_METADATA: arrays that grow keep their shape."""
    step = max(MIN_METADATA, 1 << max(0, count.bit_length() - 4))
    return max(MIN_METADATA, -(-count // step) * step)
