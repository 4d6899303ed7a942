"""Blocks of a pool: which are free, who holds the others, and each sequence's table of them."""

from __future__ import annotations

import heapq
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from .caches import Retention
from .errors import OutOfBlocks


class BlockAllocator:
    """Hands out block numbers, lowest first, and counts references.

    Lowest first keeps a lone sequence contiguous, which the gathered route turns into a slice.
    With `shuffle_seed` the order is random but repeatable: for tests. With `spread`, which is for
    back ends that read a contiguous sequence in place and gather others, blocks follow each other
    where they can, and a new run begins in the middle of the largest gap, so that those before and
    after it have room to grow.

    A block can be marked as worth keeping. When nobody holds it any more it is free like others,
    but handed out only when no other is left, the one released longest ago first; until then
    `share` revives it. `on_evict` is told when such a block is handed out.
    """

    def __init__(
        self,
        num_blocks: int,
        shuffle_seed: int | None = None,
        on_evict: Callable[[int], None] | None = None,
        spread: bool = False,
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"expected at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self.on_evict = on_evict
        self._free = list(range(num_blocks))  # a heap; in rising order with `spread`
        self._spread = spread and shuffle_seed is None
        self._references = [0] * num_blocks
        self._random = None if shuffle_seed is None else random.Random(shuffle_seed)
        self._worthy: set[int] = set()
        self._kept: dict[int, None] = {}  # worthy blocks that nobody holds, oldest first

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, those kept for their content included."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Free blocks whose content is still worth something."""
        return len(self._kept)

    def references(self, block: int) -> int:
        """How many hold the block."""
        return self._references[block]

    def keep(self, block: int) -> None:
        """Mark a block that somebody holds as worth keeping once nobody does."""
        if self._references[block] < 1:
            raise ValueError(f"block {block} is free and cannot be marked")
        self._worthy.add(block)

    def forget(self, block: int) -> None:
        """Take the mark off a block; harmless if it has none."""
        self._worthy.discard(block)
        if block in self._kept:
            del self._kept[block]
            self._give_back(block)

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """`count` blocks with one reference each. Raises OutOfBlocks and changes nothing.

        `after` is the block that these follow in their sequence, if there is one.
        """
        if count > self.num_free:
            raise OutOfBlocks(f"needs {count} blocks, {self.num_free} are free")
        blocks: list[int] = []
        while len(blocks) < count:
            if self._spread and self._free:
                blocks += self._run(count - len(blocks), blocks[-1] if blocks else after)
            else:
                blocks.append(self._take())
        for block in blocks:
            self._references[block] = 1
        return blocks

    def _take(self) -> int:
        if not self._free:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            self._worthy.discard(oldest)
            if self.on_evict is not None:
                self.on_evict(oldest)
            return oldest
        if self._random is None:
            return heapq.heappop(self._free)
        chosen = self._random.randrange(len(self._free))
        self._free[chosen], self._free[-1] = self._free[-1], self._free[chosen]
        return self._free.pop()

    def _run(self, count: int, after: int | None) -> list[int]:
        """Up to `count` blocks side by side, those that follow `after` if they are free."""
        free = self._free
        first = len(free) if after is None else bisect_left(free, after + 1)
        if first == len(free) or free[first] != (after or 0) + 1:
            first = self._middle(count)
        last = first + 1
        while last < len(free) and last - first < count and free[last] == free[last - 1] + 1:
            last += 1
        taken = free[first:last]
        del free[first:last]
        return taken

    def _middle(self, count: int) -> int:
        """Where in the free blocks a run of `count` begins: amid the largest gap between others, or
        at the front of one that nobody stands before."""
        free = np.array(self._free)
        starts = np.concatenate([[0], np.flatnonzero(np.diff(free) != 1) + 1])
        sizes = np.diff([*starts, len(free)])
        largest = int(sizes.argmax())
        start, size = int(starts[largest]), int(sizes[largest])
        return start if free[start] == 0 else start + max(0, size - count) // 2

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each block; one that nobody holds must be a kept one."""
        for block in blocks:
            if self._references[block] < 1:
                if block not in self._kept:
                    raise ValueError(f"block {block} is free and cannot be shared")
                del self._kept[block]
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> list[int]:
        """One reference less to each block; returns those that nobody holds or keeps any more."""
        freed = []
        for block in blocks:
            if self._references[block] < 1:
                raise ValueError(f"block {block} is free already")
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._worthy:
                    self._kept[block] = None
                else:
                    freed.append(block)
                    self._give_back(block)
        return freed

    def _give_back(self, block: int) -> None:
        if self._spread:
            insort(self._free, block)
        elif self._random is None:
            heapq.heappush(self._free, block)
        else:
            self._free.append(block)


@dataclass(slots=True)
class BlockTable:
    """One sequence's blocks in one group of layers.

    `dropped` leading blocks were released since no later row can see them; `blocks[i]` holds the
    positions from `(dropped + i) * block_size`.
    """

    blocks: list[int] = field(default_factory=list)
    dropped: int = 0

    @property
    def last(self) -> int | None:
        """The block that the next one follows."""
        return self.blocks[-1] if self.blocks else None

    def missing(self, length: int, block_size: int) -> int:
        """Blocks to add so that positions below `length` have a place."""
        return max(0, -(-length // block_size) - self.dropped - len(self.blocks))

    def drop_unseen(self, length: int, block_size: int, retention: Retention) -> list[int]:
        """Take out the blocks that rows from position `length` on cannot see."""
        count = retention.first_needed(length) // block_size - self.dropped
        count = min(max(count, 0), len(self.blocks))
        gone, self.blocks = self.blocks[:count], self.blocks[count:]
        self.dropped += count
        return gone
