"""Which blocks hold the keys of which tokens, so that equal prompts need not be read twice.

A whole block is known by a hash of its tokens and of the hash of the block before it: equal hashes
mean equal tokens from the first position on. Blocks that nobody holds keep their content until the
allocator has no others left (`BlockAllocator`), the one released longest ago goes first.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import islice

from .blocks import BlockAllocator, BlockTable
from .caches import Retention

ROOT = b""
SIBLINGS = 32  # blocks with equal beginnings that are compared, newest first


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a block: 16 bytes over its tokens and the hash of the block before it."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Found:
    """The first `length` tokens are in these blocks, one table for each group of layers.

    If `length` is inside a block, only that much of the last block is wanted: it must be copied.
    """

    length: int
    tables: tuple[BlockTable, ...]
    last: bytes | None = None  # the hash of the last block that is wanted whole
    state: bytes | None = None  # the hash of the tokens, where states after them are wanted


@dataclass(slots=True, eq=False)
class _Group:
    retention: Retention
    allocator: BlockAllocator
    blocks: dict[bytes, int] = field(default_factory=dict)
    hashes: dict[int, bytes] = field(default_factory=dict)


class PrefixIndex:
    """The named blocks of a cache's groups of layers; one allocator for each group.

    Groups without an allocator page nothing and are left out: their tables stay empty.
    """

    def __init__(
        self, groups: Sequence[tuple[Retention, BlockAllocator | None]], block_size: int
    ) -> None:
        self._size = block_size
        self._groups = [
            None if allocator is None else _Group(retention, allocator)
            for retention, allocator in groups
        ]
        self._used = [group for group in self._groups if group is not None]
        self._whole_sequences = any(group.retention == Retention() for group in self._used)
        #: Told the hash of a whole block before its content is lost, where one group has it all.
        self.on_forget: Callable[[bytes, int], None] | None = None
        # Blocks that follow a block and begin with a token: their tokens, by hash.
        self._following: dict[tuple[bytes, int], dict[bytes, tuple[int, ...]]] = {}
        self._places: dict[bytes, tuple[bytes, int]] = {}
        for group in self._used:
            then = group.allocator.on_evict
            group.allocator.on_evict = partial(self._evicted, group, then)

    def __len__(self) -> int:
        """Blocks that have a name, those of all groups together."""
        return sum(len(group.blocks) for group in self._used)

    def name(
        self,
        tables: Sequence[BlockTable],
        index: int,
        parent: bytes,
        tokens: Sequence[int],
    ) -> bytes:
        """Name block `index` of a sequence, that holds these tokens; returns its hash.

        Fewer tokens than a block holds: the rest of the block is worth nothing. Blocks that were
        dropped, and blocks whose content another block holds already, get no name.
        """
        digest = chain(parent, tokens)
        for group, table in zip(self._groups, tables, strict=True):
            place = index - table.dropped
            if group is None or not 0 <= place < len(table.blocks):
                continue
            block = table.blocks[place]
            if digest in group.blocks or block in group.hashes:
                continue
            group.blocks[digest] = block
            group.hashes[block] = digest
            group.allocator.keep(block)
            if digest not in self._places:
                place_of = (parent, tokens[0])
                self._places[digest] = place_of
                self._following.setdefault(place_of, {})[digest] = tuple(tokens)
        return digest

    def find(self, tokens: Sequence[int], most: int) -> Found | None:
        """The longest prefix of at most `most` tokens that blocks hold; None if there is none.

        Where nothing is paged there is nothing to look for: any prefix will do.
        """
        if not self._used:
            return Found(most, tuple(BlockTable() for _ in self._groups))
        hashes = self.hashes(tokens, most)
        count = self._whole(hashes)
        parent = hashes[count - 1] if count else ROOT
        start = count * self._size
        extra, last = self._part(parent, tokens[start : min(start + self._size, most)])
        if count == 0 and last is None:
            return None
        length = start + extra
        tables = []
        for group in self._groups:
            if group is None:
                tables.append(BlockTable())
                continue
            dropped = group.retention.first_needed(length) // self._size
            blocks = [group.blocks[digest] for digest in hashes[dropped:count]]
            if last is not None:
                blocks.append(group.blocks[last])
            tables.append(BlockTable(blocks, dropped))
        return Found(length, tuple(tables), hashes[count - 1] if count else None)

    def whole_blocks(self) -> Iterator[tuple[bytes, int]]:
        """The hashes and numbers of all whole blocks of the first group."""
        for digest, block in self._used[0].blocks.items():
            if len(self._following[self._places[digest]][digest]) == self._size:
                yield digest, block

    def clear(self) -> None:
        """Forget all names: the blocks' content is lost."""
        for group in self._used:
            for block in group.hashes:
                group.allocator.forget(block)
            group.blocks.clear()
            group.hashes.clear()
        self._following.clear()
        self._places.clear()

    def hashes(self, tokens: Sequence[int], most: int) -> list[bytes]:
        """Hashes of the whole blocks; no further than there is hope.

        Where all groups have windows, a block may be known although one before it is forgotten.
        """
        found: list[bytes] = []
        parent = ROOT
        for start in range(0, most - self._size + 1, self._size):
            parent = chain(parent, tokens[start : start + self._size])
            if parent not in self._places and self._whole_sequences:
                break
            found.append(parent)
        return found

    def _whole(self, hashes: list[bytes]) -> int:
        """The largest number of whole blocks from which every group could go on."""
        best = len(hashes)
        for group in self._used:
            # The run of blocks that a group still has, up to each block.
            runs, run = [0], 0
            for digest in hashes:
                run = run + 1 if digest in group.blocks else 0
                runs.append(run)
            while best and runs[best] < best - self._first(group, best * self._size):
                best -= 1
        # A smaller number can be too large for a group that was asked before.
        return best if best in (0, len(hashes)) else self._whole(hashes[:best])

    def _first(self, group: _Group, length: int) -> int:
        return group.retention.first_needed(length) // self._size

    def _part(self, parent: bytes, wanted: Sequence[int]) -> tuple[int, bytes | None]:
        """The block after `parent` that begins most like the tokens wanted: how many are equal."""
        best: tuple[int, bytes | None] = (0, None)
        if not wanted:
            return best
        siblings = self._following.get((parent, wanted[0]), {})
        for digest, tokens in islice(reversed(siblings.items()), SIBLINGS):
            if any(digest not in group.blocks for group in self._used):
                continue
            count = 0
            for mine, other in zip(wanted, tokens, strict=False):
                if mine != other:
                    break
                count += 1
            if count > best[0]:
                best = (count, digest)
        return best

    def _evicted(self, group: _Group, then: Callable[[int], None] | None, block: int) -> None:
        digest = group.hashes[block]
        if self.on_forget is not None:
            parent, first = self._places[digest]
            if len(self._following[parent, first][digest]) == self._size:
                self.on_forget(digest, block)
        if then is not None:
            then(block)
        del group.hashes[block]
        del group.blocks[digest]
        if any(digest in other.blocks for other in self._used):
            return
        place = self._places.pop(digest)
        siblings = self._following[place]
        del siblings[digest]
        if not siblings:
            del self._following[place]
