"""How many blocks fit: what a block of a model costs, and what the device has left for them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlxrewrite.kernels.ops import Quantization

from .cache import PagedCache, cache_retentions
from .caches import Retention, Spec
from .errors import RuntimeRefusal
from .quantized import require_paged

SHARE = 0.9  # of a GPU's memory that weights and blocks may take together; the rest is activations
HOST_SHARE = 0.5  # of the host's free memory, where the CPU computes
MARGIN_BLOCKS = 2  # a window that begins and ends inside blocks


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model keeps in blocks: bytes of one block of all layers of each group.

    A group that pages nothing costs nothing. `entries` are the cache entries that are paged, by
    index and path, `latents` and `indices` those of them that hold latents and keys to rank,
    `states` those with a slot for each sequence, of `state_bytes` together; `everything` says that
    there are no others than paged ones. `quantization` is that of all pools.
    """

    block_size: int
    block_bytes: Mapping[Retention, int]
    entries: frozenset[tuple[int, ...]]
    everything: bool
    specs: Sequence[Spec | None]
    states: frozenset[tuple[int, ...]] = frozenset()
    state_bytes: int = 0
    latents: frozenset[tuple[int, ...]] = frozenset()
    indices: frozenset[tuple[int, ...]] = frozenset()
    quantization: Quantization | None = None


def footprint(
    model: object,
    block_size: int,
    dtype: mx.Dtype | None = None,
    quantization: Quantization | None = None,
) -> Footprint:
    """Build the graph of one token's step and look at the pools that it makes; computes nothing.

    Raises RuntimeRefusal, with the entry of the cache list, for a model that keeps something that
    is not quantised.
    """
    cache = PagedCache(model, block_size, num_blocks=1, dtype=dtype, quantization=quantization)
    cache.step({cache.add_sequence(): [0]})
    require_paged(quantization, cache.specs, cache.leaves)
    costs = dict.fromkeys(cache_retentions(model), 0)
    made = [(key, leaf) for key, leaf in cache.leaves.items() if leaf.pool.made]
    for _, leaf in made:
        costs[leaf.retention] += leaf.pool.pool.nbytes // leaf.pool.pool.num_blocks
    entries = frozenset(key for key, _ in made)
    slots = {key: leaf for key, leaf in cache.states.items() if leaf.table.used}
    size = sum(array.nbytes for leaf in slots.values() for array in leaf.table.arrays())
    everything = cache.pages_everything
    indices = frozenset(key for key, leaf in made if leaf.pool.index)
    latents = frozenset(key for key, leaf in made if leaf.pool.rank is not None)
    return Footprint(
        block_size,
        costs,
        entries,
        everything,
        cache.specs,
        frozenset(slots),
        size,
        latents,
        indices,
        quantization,
    )


def device_memory() -> int:
    """Bytes that blocks may take on the default device, beside what is in use now."""
    info = mx.device_info()
    limit = info.get("max_recommended_working_set_size") or info.get("total_memory")
    if mx.default_device() != mx.cpu and limit:
        return max(0, int(float(limit) * SHARE) - mx.get_active_memory())
    free = os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 0
    return int(free * os.sysconf("SC_PAGE_SIZE") * HOST_SHARE)


def most_blocks(
    retention: Retention, positions: int, block_size: int, rows: int, rollback: int
) -> int:
    """Blocks that one sequence of so many positions has at most, `rows` of them new in a step."""
    total = -(-positions // block_size)
    kept = retention.window or retention.chunk
    if kept is None:
        return total
    return min(total, -(-(kept + rollback + rows) // block_size) + MARGIN_BLOCKS)


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine may have at a time: requests, rows of a step, positions to cut back."""

    running: int
    rows: int
    rollback: int = 0


def blocks_for(print_: Footprint, positions: int, load: Load) -> dict[Retention, int]:
    """Blocks of each group for so many positions of all sequences together."""
    size = print_.block_size
    found = {}
    for retention in print_.block_bytes:
        whole = -(-positions // size)
        kept = retention.window or retention.chunk
        if kept is not None:
            # Each request keeps its window; the step's rows come on top once.
            each = -(-(kept + load.rollback) // size) + MARGIN_BLOCKS
            whole = min(whole, load.running * each + -(-load.rows // size))
        found[retention] = max(1, whole)
    return found


def bytes_of(print_: Footprint, blocks: Mapping[Retention, int]) -> int:
    return sum(cost * blocks[retention] for retention, cost in print_.block_bytes.items())


def plan(print_: Footprint, memory: int, load: Load, most: int, least: int) -> dict[Retention, int]:
    """The most blocks that fit in `memory` bytes, for at most `most` positions.

    Raises RuntimeRefusal, with the numbers, if not even `least` positions fit.
    """
    memory -= print_.state_bytes * load.running
    needed = bytes_of(print_, blocks_for(print_, least, load))
    if needed > memory:
        raise RuntimeRefusal(
            f"{least} positions of this model's caches need {needed / 2**20:.1f} MiB and "
            f"{max(memory, 0) / 2**20:.1f} MiB are there for them: give the caches more memory, "
            "or shorten the longest request"
        )
    low, high = least, max(least, most)
    while low < high:
        middle = (low + high + 1) // 2
        if bytes_of(print_, blocks_for(print_, middle, load)) <= memory:
            low = middle
        else:
            high = middle - 1
    return blocks_for(print_, low, load)
