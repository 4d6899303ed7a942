"""What the scheduler needs of a paged cache: room, admission, prompts that are known already."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .blocks import BlockAllocator, BlockTable
from .cache import PagedCache
from .caches import Retention
from .disk import DiskTier
from .errors import OutOfBlocks
from .extract import block_arrays, fill_blocks, restore
from .memory import Footprint, device_memory, footprint
from .prefix import ROOT, Found, PrefixIndex, chain
from .scheduler import Job
from .states import Snapshot

SNAPSHOT_SHARE = 0.1  # of the memory that is there for blocks


@dataclass(slots=True)
class StoreStats:
    """Tokens that were asked for at admission, and those of them that blocks held already."""

    queried: int = 0
    reused: int = 0
    copied_blocks: int = 0
    from_disk: int = 0


class PagedStore:
    """The sequences of one `PagedCache`. With `reuse`, equal beginnings are computed once."""

    def __init__(
        self,
        cache: PagedCache,
        *,
        reuse: bool = True,
        known: Footprint | None = None,
        snapshot_bytes: int | None = None,
        disk: DiskTier | None = None,
    ) -> None:
        self.cache = cache
        self._disk = disk
        self._footprint = known or footprint(
            cache.model, cache.block_size, quantization=cache.quantization
        )
        self.stats = StoreStats()
        self._reuse = reuse
        self._index: PrefixIndex | None = None
        self._hashes: dict[int, list[bytes]] = {}  # of each sequence's blocks that have a name
        self._nameless: set[int] = set()
        self._reading: dict[int, int] = {}  # sequences that are shorter than they were admitted for
        self._snapshots: OrderedDict[bytes, Snapshot] = OrderedDict()  # the latest used last
        # Snapshots inside a block: its first tokens, by the hash of the blocks before.
        self._inside: dict[bytes, dict[bytes, tuple[int, ...]]] = {}
        self._snapshot_bytes = snapshot_bytes

    # ------------------------------------------------------------ the scheduler's view

    def admit(self, job: Job, spare: int) -> tuple[int, int] | None:
        """A new sequence for a job, and how many of its tokens it has already; None: no room now.

        The longest of what blocks hold already and what the job brings in prompt caches.
        """
        tokens = job.tokens
        index = None if job.nameless else self._names()
        most = min([len(tokens) - 1, *job.stops[:1]])
        found = None if index is None else self._known(index, tokens, most)
        brought = job.brought
        if brought is not None and found is not None and found.length >= brought.length:
            brought = None
        if brought is not None or (found is not None and not self._fits(len(tokens), spare, found)):
            found = None
        if found is None and not self._fits(len(tokens), spare, None):
            return None
        try:
            if brought is not None:
                sequence = restore(self.cache, self._footprint, brought.caches, brought.length)
            else:
                sequence = self._begin(found)
        except OutOfBlocks:
            return None
        if index is not None and self._disk is not None and brought is None:
            self._read_on(sequence, tokens, most, self._disk)
        length = self.cache.length(sequence)
        self._hashes[sequence] = []
        self._reading[sequence] = len(tokens)
        if job.nameless:
            self._nameless.add(sequence)
        if index is not None:
            self.stats.queried += len(tokens)
            self.stats.reused += length if brought is None else 0
        return sequence, length

    def known_length(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens blocks hold now, the last token left out."""
        index = self._names()
        found = None if index is None else self._known(index, tokens, len(tokens) - 1)
        return 0 if found is None else found.length

    def reserve(self, sequence: int, count: int) -> int:
        """Places for up to `count` more positions; returns for how many.

        Where mixers keep states, a prompt is read up to the last block that is whole, and only then
        to its end: there its states are copied for others that begin alike.
        """
        if self.cache.states and self._names() is not None and sequence in self._reading:
            start, size = self.cache.length(sequence), self.cache.block_size
            stop = start + count
            whole = (stop - (stop == self._reading[sequence])) // size * size
            count = whole - start if whole > start else count
        return self.cache.reserve(sequence, count)

    def free(self, sequence: int) -> None:
        """Give the sequence's blocks back; those with a name stay known while there are others."""
        del self._hashes[sequence]
        self._reading.pop(sequence, None)
        self._nameless.discard(sequence)
        self.cache.free(sequence)

    # ---------------------------------------------------------------------- names

    def name(
        self, sequence: int, tokens: Sequence[int], count: int, *, ending: bool = False
    ) -> None:
        """Name the blocks that hold the first `count` tokens of a sequence.

        Only those that are full, since others are still being written; with `ending`, the last one
        too. No more tokens than the sequence has positions.
        """
        size, hashes = self.cache.block_size, self._hashes[sequence]
        if not ending and (len(hashes) + 1) * size > count:
            return
        index = self._names()
        if index is None or sequence in self._nameless:
            return
        tables = self.cache.tables(sequence)
        while (len(hashes) + 1) * size <= count:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else ROOT
            hashes.append(index.name(tables, len(hashes), parent, tokens[start : start + size]))
        parent = hashes[-1] if hashes else ROOT
        rest = tuple(tokens[len(hashes) * size : count])
        if hashes and not rest:
            self._keep(sequence, count, parent, ending)
        if ending and rest:
            self._keep(sequence, count, index.name(tables, len(hashes), parent, rest), ending)
            if chain(parent, rest) in self._snapshots:
                self._inside.setdefault(parent, {})[chain(parent, rest)] = rest

    def forget_names(self) -> None:
        """No block is known any more: what they hold is lost."""
        self._snapshots.clear()
        self._inside.clear()
        if self._index is not None:
            self._index.clear()

    @property
    def named_blocks(self) -> int:
        return 0 if self._index is None else len(self._index)

    def _names(self) -> PrefixIndex | None:
        """The index, from the moment that blocks, and snapshots, are known to hold everything."""
        whole = self.cache.pages_everything or self.cache.snapshots_suffice
        if self._index is None and self._reuse and whole:
            self._index = PrefixIndex(self.cache.groups, self.cache.block_size)
            if self._disk is not None:
                self._index.on_forget = self._save
        return self._index

    # ----------------------------------------------------------------------- disk

    def save_all(self) -> None:
        """Write all whole blocks that have a name to disk, and wait for it."""
        if self._disk is None or self._index is None:
            return
        for digest, block in list(self._index.whole_blocks()):
            if digest not in self._disk:
                self._disk.put(digest, block_arrays(self.cache, block))
                self._disk.flush()

    def _save(self, digest: bytes, block: int) -> None:
        if self._disk is not None and digest not in self._disk:
            self._disk.put(digest, block_arrays(self.cache, block))

    def _read_on(self, sequence: int, tokens: Sequence[int], most: int, disk: DiskTier) -> None:
        """Append blocks from disk to a new sequence, as far as they go on with its tokens."""
        size, length = self.cache.block_size, self.cache.length(sequence)
        if length % size:
            return  # what follows a copied part of a block is something new
        parent, blocks = ROOT, []
        for start in range(0, most - size + 1, size):
            parent = chain(parent, tokens[start : start + size])
            if start < length:
                continue
            found = disk.get(parent) if parent in disk else None
            if found is None:
                break
            blocks.append(found)
        if not blocks:
            return
        try:
            fill_blocks(self.cache, sequence, blocks)
        except OutOfBlocks:
            return  # the tokens are computed instead
        self.stats.from_disk += len(blocks) * size

    def _known(self, index: PrefixIndex, tokens: Sequence[int], most: int) -> Found | None:
        """The longest beginning of the tokens that is known; with states, one with a snapshot."""
        if not self.cache.states:
            found = index.find(tokens, most)
            if found is None or self._disk is None or not found.length % self.cache.block_size:
                return found
            # A whole block on disk is worth more than a part of one in memory.
            size = self.cache.block_size
            whole = found.length // size * size
            after = index.hashes(tokens, whole)
            following = chain(after[-1] if after else ROOT, tokens[whole : whole + size])
            if whole + size <= most and following in self._disk:
                return index.find(tokens, whole)
            return found
        size = self.cache.block_size
        hashes = index.hashes(tokens, most)
        for count in range(len(hashes), -1, -1):
            parent = hashes[count - 1] if count else ROOT
            here = {digest: len(rest) for digest, rest in self._begins(parent, tokens, count, most)}
            if count and parent in self._snapshots:
                here[parent] = 0
            for digest, extra in sorted(here.items(), key=lambda item: -item[1]):
                found = index.find(tokens, count * size + extra)
                if found is not None and found.length == count * size + extra:
                    return replace(found, state=digest)
        return None

    def _begins(
        self, parent: bytes, tokens: Sequence[int], count: int, most: int
    ) -> Iterator[tuple[bytes, tuple[int, ...]]]:
        """Snapshots behind the first tokens of the block after `count` blocks of these tokens."""
        start = count * self.cache.block_size
        for digest, rest in self._inside.get(parent, {}).items():
            if start + len(rest) <= most and tuple(tokens[start : start + len(rest)]) == rest:
                yield digest, rest

    def _keep(self, sequence: int, count: int, digest: bytes, ending: bool) -> None:
        """Copy the states after the first `count` tokens, for others that begin with them.

        Of a prompt, and of a sequence at its end: what follows a prompt is long, and others go on
        from its end at most.
        """
        if not self.cache.states or (count > self._reading.get(sequence, 0) and not ending):
            return
        if digest in self._snapshots:
            self._snapshots.move_to_end(digest)
            return
        if self.cache.length(sequence) != count:
            return
        if self._snapshot_bytes is None:
            self._snapshot_bytes = int(SNAPSHOT_SHARE * device_memory())
        snapshot = self.cache.snapshot(sequence)
        left = self._snapshot_bytes - snapshot.nbytes
        held = sum(other.nbytes for other in self._snapshots.values())
        while self._snapshots and held > left:
            gone, other = self._snapshots.popitem(last=False)
            held -= other.nbytes
            self._forget_inside(gone)
        if left >= 0:
            self._snapshots[digest] = snapshot

    def _forget_inside(self, digest: bytes) -> None:
        for parent, known in self._inside.items():
            if known.pop(digest, None) is not None:
                if not known:
                    del self._inside[parent]
                return

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
        snapshot = None
        if found.state is not None:
            snapshot = self._snapshots[found.state]
            self._snapshots.move_to_end(found.state)
        sequence = self.cache.adopt(found.tables, found.length, snapshot)
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
        return min(total, -(-(kept + self.cache.rollback) // self.cache.block_size) + 1)


def _shared(table: BlockTable, length: int, size: int) -> int:
    """Blocks of a found table that need no new one: all but a last one that is copied."""
    return len(table.blocks) - (length % size != 0)


def _revived(table: BlockTable, allocator: BlockAllocator) -> int:
    """Blocks of a found table that nobody holds: taking them leaves fewer free ones."""
    return sum(allocator.references(block) == 0 for block in table.blocks)
