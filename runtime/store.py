"""What the scheduler needs of a paged cache: room, admission, prompts that are known already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .blocks import BlockAllocator, BlockTable
from .cache import PagedCache
from .caches import Retention
from .errors import OutOfBlocks
from .prefix import ROOT, Found, PrefixIndex


@dataclass(slots=True)
class StoreStats:
    """Tokens that were asked for at admission, and those of them that blocks held already."""

    queried: int = 0
    reused: int = 0
    copied_blocks: int = 0


class PagedStore:
    """The sequences of one `PagedCache`. With `reuse`, equal beginnings are computed once."""

    def __init__(self, cache: PagedCache, *, reuse: bool = True) -> None:
        self.cache = cache
        self.stats = StoreStats()
        self._reuse = reuse
        self._index: PrefixIndex | None = None
        self._hashes: dict[int, list[bytes]] = {}  # of each sequence's blocks that have a name
        self._reading: dict[int, int] = {}  # sequences that are shorter than they were admitted for

    # ------------------------------------------------------------ the scheduler's view

    def admit(self, tokens: Sequence[int], spare: int) -> tuple[int, int] | None:
        """A new sequence for tokens, and how many of them it has already; None: no room now."""
        index = self._names()
        found = None if index is None else index.find(tokens, len(tokens) - 1)
        if found is not None and not self._fits(len(tokens), spare, found):
            found = None
        if found is None and not self._fits(len(tokens), spare, None):
            return None
        try:
            sequence = self._begin(found)
        except OutOfBlocks:
            return None
        length = 0 if found is None else found.length
        self._hashes[sequence] = []
        self._reading[sequence] = len(tokens)
        if index is not None:
            self.stats.queried += len(tokens)
            self.stats.reused += length
        return sequence, length

    def reserve(self, sequence: int, count: int) -> int:
        """Places for up to `count` more positions; returns for how many."""
        return self.cache.reserve(sequence, count)

    def free(self, sequence: int) -> None:
        """Give the sequence's blocks back; those with a name stay known while there are others."""
        del self._hashes[sequence]
        self._reading.pop(sequence, None)
        self.cache.free(sequence)

    # ---------------------------------------------------------------------- names

    def name(self, sequence: int, tokens: Sequence[int], *, ending: bool = False) -> None:
        """Name the blocks that hold these first tokens of a sequence.

        Only those that are full, since others are still being written; with `ending`, the last one
        too. No more tokens than the sequence has positions.
        """
        index = self._names()
        if index is None:
            return
        size, tables = self.cache.block_size, self.cache.tables(sequence)
        hashes = self._hashes[sequence]
        while (len(hashes) + 1) * size <= len(tokens):
            start = len(hashes) * size
            parent = hashes[-1] if hashes else ROOT
            block = tokens[start : start + size]
            hashes.append(index.name(tables, len(hashes), parent, block))
        rest = tokens[len(hashes) * size :]
        if ending and rest:
            index.name(tables, len(hashes), hashes[-1] if hashes else ROOT, rest)

    def forget_names(self) -> None:
        """No block is known any more: what they hold is lost."""
        if self._index is not None:
            self._index.clear()

    @property
    def named_blocks(self) -> int:
        return 0 if self._index is None else len(self._index)

    def _names(self) -> PrefixIndex | None:
        """The index, from the moment that the cache is known to be in blocks entirely."""
        if self._index is None and self._reuse and self.cache.pages_everything:
            self._index = PrefixIndex(self.cache.groups, self.cache.block_size)
        return self._index

    # ----------------------------------------------------------------------- room

    def most_positions(self) -> int:
        """Positions that one sequence can have if it is alone; a great number for windows only."""
        sizes = [
            allocator.num_blocks * self.cache.block_size
            for retention, allocator in self.cache.groups
            if allocator is not None and retention == Retention()
        ]
        return min(sizes, default=1 << 40)

    def _begin(self, found: Found | None) -> int:
        if found is None:
            return self.cache.add_sequence()
        sequence = self.cache.adopt(found.tables, found.length)
        self.stats.copied_blocks += found.length % self.cache.block_size != 0
        return sequence

    def _fits(self, length: int, spare: int, found: Found | None) -> bool:
        """Whether a sequence of this length has room beside what running ones still need."""
        size = self.cache.block_size
        reading = self._reading = {
            sequence: admitted
            for sequence, admitted in self._reading.items()
            if self.cache.length(sequence) < admitted
        }
        for index, (retention, allocator) in enumerate(self.cache.groups):
            if allocator is None:
                continue
            needed = self._most_blocks(retention, length)
            if found is not None:
                needed -= _shared(found.tables[index], found.length, size)
                needed += _revived(found.tables[index], allocator)
            for sequence, admitted in reading.items():
                table = self.cache.tables(sequence)[index]
                most = min(
                    -(-admitted // size) - table.dropped, self._most_blocks(retention, admitted)
                )
                needed += max(0, most - len(table.blocks))
            if needed + spare > allocator.num_free:
                return False
        return True

    def _most_blocks(self, retention: Retention, length: int) -> int:
        """Blocks that a sequence of this length has at a time, if it grows by single rows."""
        total = -(-length // self.cache.block_size)
        kept = retention.window or retention.chunk
        if kept is None:
            return total
        return min(total, -(-kept // self.cache.block_size) + 1)


def _shared(table: BlockTable, length: int, size: int) -> int:
    """Blocks of a found table that need no new one: all but a last one that is copied."""
    return len(table.blocks) - (length % size != 0)


def _revived(table: BlockTable, allocator: BlockAllocator) -> int:
    """Blocks of a found table that nobody holds: taking them leaves fewer free ones."""
    return sum(allocator.references(block) == 0 for block in table.blocks)
