"""Which layout, route, kernel and splits serve a call. Everything that is a choice is here.

Numbers were chosen on an H100 (CUDA); on Metal they are guesses until someone measures there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from . import launch
from .specs import (
    DTYPES,
    SIZES,
    AttentionSpec,
    CopySpec,
    DecodeSpec,
    DequantizeSpec,
    GatherSpec,
    KernelSpec,
    QuantizeSpec,
    ReduceSpec,
    StagedSpec,
    TiledSpec,
    WriteSpec,
    supports,
)

if TYPE_CHECKING:
    from .pools import Layout
    from .ragged import Ragged

Route = Literal["kernel", "gathered"]
P = ParamSpec("P")
T = TypeVar("T")

# 32-bit registers that a thread may fill before the compiler spills: NVIDIA has 255, Apple's GPUs
# about 128. The runner runs what Metal would.
REGISTERS = {"cuda": 235, "metal": 120, "runner": 120}
# Wider groups, wider heads and longer queries than these go to matrix units.
DECODE_GROUP = 8
# Packed rows (rows times query heads of a key head) up to which tiles of so few rows are enough,
# and groups from which on single rows go there: tensor cores wait for memory even so.
FEW_ROWS = {"cuda": 64, "metal": 0, "runner": 0}
FEW_GROUP = {"cuda": 2, "metal": 1 << 30, "runner": 1 << 30}
DECODE_WIDTH = 256
DECODE_ROWS = 4
# The same for pools of codes, which the kernel for many rows does not read: beyond, positions are
# dequantised for MLX's own attention, which costs their bytes several times over.
CODES_GROUP = 16
CODES_ROWS = 8
# Entries that a lane of the decode kernel takes from a row of codes at a time.
CODES_VECTOR = 8
# Rows from which on gathering a sequence's pages for MLX's own attention is worth it.
GATHER_ROWS = 32
# Rows times heads from which on that is so on CUDA too, where tiles lie in threadgroup memory.
GATHER_WORK = 100_000
# Threadgroups that fill a device, and the fewest keys worth a threadgroup of its own.
THREADGROUPS = {"cuda": 264, "metal": 512, "runner": 1}
LEAST_SPLIT = {"decode": 256, "tiled": 256}


def layout() -> Layout:
    """How pools lie in memory: in pages for the kernels, by head for MLX's CPU back end."""
    return "heads" if launch.active() is None else "pages"


def _where() -> launch.Backend:
    return launch.active() or "metal"


def writes_in_place() -> bool:
    """Whether writes go behind the back of MLX's graph, ordered by tokens; MLXREWRITE_WRITES=copy
    makes them MLX's own assignment, which copies a pool that anything else holds."""
    return launch.active() is not None and os.environ.get("MLXREWRITE_WRITES") != "copy"


# ------------------------------------------------------------------ routes


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which sequences of a step go where."""

    decode: tuple[int, ...]
    tiled: tuple[int, ...]
    gathered: tuple[int, ...]
    few: tuple[int, ...] = ()


def assign(
    ragged: Ragged, layer: AttentionSpec, *, band: int | None, route: Route | None
) -> Assignment:
    """Send each sequence to the kernel for single rows, the one for many, or MLX's attention.

    band: the widest window or chunk of the layer. Raises ValueError if `route` asks for a kernel
    and there is none.
    """
    everyone = ragged.everyone
    lacking = supports(layer)
    if lacking is not None and route == "kernel":
        raise ValueError(f"attention: {lacking}; the gathered route serves it")
    if lacking is not None or route == "gathered":
        return Assignment((), (), everyone)
    single = _decodes(layer)
    if layer.bits:
        if route == "kernel" and not single:
            raise ValueError(
                "attention: no kernel reads codes for heads or groups as wide as these; the "
                "gathered route serves them"
            )
        short = [single and (route == "kernel" or n < CODES_ROWS) for n in ragged.query_lens]
        return Assignment(
            tuple(i for i in everyone if short[i]), (), tuple(i for i in everyone if not short[i])
        )
    decode, few, tiled, gathered = [], [], [], []
    group = layer.query_heads // layer.kv_heads
    for i in everyone:
        length, context = ragged.query_lens[i], ragged.context_lens[i]
        if single and length < DECODE_ROWS:
            decode.append(i)
        elif route is None and length >= GATHER_ROWS and _gathers(length, band, context, layer):
            gathered.append(i)
        elif length * group <= FEW_ROWS[_where()]:
            few.append(i)
        else:
            tiled.append(i)
    return Assignment(tuple(decode), tuple(tiled), tuple(gathered), tuple(few))


def _decodes(layer: AttentionSpec) -> bool:
    """Whether the kernel for single rows has room for what a key head's queries need."""
    group, wide = layer.query_heads // layer.kv_heads, max(layer.key_dim, layer.value_dim)
    if group > (CODES_GROUP if layer.bits else DECODE_GROUP) or wide > DECODE_WIDTH:
        return False
    if layer.bits or group < FEW_GROUP[_where()] or wide > 128:
        return True
    return staged_spec(layer, banded=False, partial=False, few=True) is None


def _gathers(rows: int, band: int | None, context: int, layer: AttentionSpec) -> bool:
    """Whether MLX's attention over gathered pages is faster than the kernels. It has no soft caps
    and works out what bands mask; on CUDA it is cuDNN's for heads of up to 128, which is faster
    where there is much to do, else slow."""
    if layer.softcap or (band is not None and 2 * band < context):
        return False
    if _where() != "cuda" or staged_spec(layer, banded=False, partial=False, few=False) is None:
        return True
    return 64 < layer.key_dim <= 128 and rows * layer.query_heads >= GATHER_WORK


# ------------------------------------------------------------------ kernels


def _remembered(make: Callable[P, T]) -> Callable[P, T]:
    """Make each spec once for a back end: every layer asks for its own at every step."""
    made: dict[object, T] = {}

    @wraps(make)
    def find(*args: P.args, **words: P.kwargs) -> T:
        key = (_where(), REGISTERS[_where()], args, *words.values())
        if key not in made:
            made[key] = make(*args, **words)
        return made[key]

    return find


@_remembered
def decode_spec(layer: AttentionSpec, partial: bool) -> DecodeSpec:
    """The kernel for single rows."""
    group = layer.query_heads // layer.kv_heads
    vector = CODES_VECTOR if layer.bits else 16 // DTYPES[layer.pool_dtype]
    heads, tile = _decode_shape(layer, group, vector)
    chunks = -(-group // heads)
    return DecodeSpec(
        query_dtype=layer.dtype,
        pool_dtype=layer.pool_dtype,
        key_dim=layer.key_dim,
        value_dim=layer.value_dim,
        kv_heads=layer.kv_heads,
        group=group,
        block_size=layer.block_size,
        heads=heads,
        key_groups=max(1, 4 // chunks),
        tile=tile,
        vector=vector,
        softcap=layer.softcap,
        sinks=layer.sinks and not partial,
        shared_values=layer.shared_values,
        partial=partial,
        bits=layer.bits,
        code_group=layer.code_group,
    )


def _decode_shape(layer: AttentionSpec, group: int, vector: int) -> tuple[int, int]:
    """Query heads of a simdgroup and keys of a turn: as many as registers hold, heads first, since
    each group of heads reads the keys again."""
    loads = max(layer.key_dim, layer.value_dim) / vector
    lanes = 8 if loads <= 8 else 16 if loads <= 16 else 32  # that share a key
    wide = max(1, math.ceil(loads / 32))
    for heads in (8, 4, 2, 1):
        for steps in (8, 4):  # loads in flight of a lane, of keys and as many of values
            tile = steps * 32 // lanes
            taken = 2 * heads * wide * vector + heads * steps + 2 * steps * wide * 4 + 40
            if heads < 2 * group and taken <= REGISTERS[_where()]:
                return min(heads, group), tile
    return 1, 4 * 32 // lanes


@_remembered
def tiled_spec(layer: AttentionSpec, *, banded: bool, partial: bool) -> TiledSpec:
    """The kernel for many rows without tiles in threadgroup memory."""
    # A simdgroup keeps sums of 16 rows, and their queries where there is room.
    room = 128 if _where() == "cuda" else 64
    parts = 1 if layer.value_dim <= room else 2 if layer.value_dim <= 2 * room else 4
    while layer.value_dim % (8 * parts):
        parts //= 2
    return TiledSpec(
        query_dtype=layer.dtype,
        pool_dtype=layer.pool_dtype,
        matrix_dtype=layer.pool_dtype if layer.dtype == layer.pool_dtype else "float32",
        key_dim=layer.key_dim,
        value_dim=layer.value_dim,
        kv_heads=layer.kv_heads,
        group=layer.query_heads // layer.kv_heads,
        block_size=layer.block_size,
        row_tiles=4 if parts == 1 else 2,
        parts=parts,
        tile=32,
        keep_queries=layer.key_dim <= room,
        banded=banded,
        softcap=layer.softcap,
        sinks=layer.sinks and not partial,
        shared_values=layer.shared_values,
        partial=partial,
    )


# Bytes of threadgroup memory that a threadgroup may have.
THREADGROUP_MEMORY = {"cuda": 227 << 10, "metal": 32 << 10, "runner": 32 << 10}


@_remembered
def staged_spec(
    layer: AttentionSpec, *, banded: bool, partial: bool, few: bool
) -> StagedSpec | None:
    """The kernel for many rows, or few (`FEW_ROWS`), with tiles in threadgroup memory; None where
    they do not fit, or matrix units do not take the type as it is."""
    cuda = _where() == "cuda"
    if layer.dtype != layer.pool_dtype or (cuda and layer.dtype == "float32"):
        return None
    for row_tiles, parts, tile, stages in _staged_shapes(layer, few):
        made = StagedSpec(
            dtype=layer.dtype,
            key_dim=layer.key_dim,
            value_dim=layer.value_dim,
            kv_heads=layer.kv_heads,
            group=layer.query_heads // layer.kv_heads,
            block_size=layer.block_size,
            row_tiles=row_tiles,
            parts=parts,
            tile=tile,
            stages=stages,
            # Sums of 128 rows leave no room for another simdgroup, which would work meanwhile.
            ahead=cuda and layer.value_dim > 192 and parts == 1 and not layer.shared_values,
            banded=banded,
            softcap=layer.softcap,
            sinks=layer.sinks and not partial,
            shared_values=layer.shared_values,
            partial=partial,
        )
        # Without panels rows are 16 bytes further apart than they are long.
        plain = made.threadgroup_bytes(lambda width, size: width * size + 16, 32)
        if (made.threadgroup_memory if cuda else plain) <= THREADGROUP_MEMORY[_where()]:
            return made
    return None


def _staged_shapes(layer: AttentionSpec, few: bool) -> tuple[tuple[int, int, int, int], ...]:
    """Row tiles, parts, keys of a turn and stages, the best first."""
    values, wide = layer.value_dim, max(layer.key_dim, layer.value_dim)
    if _where() != "cuda":
        # Sums of 16 rows are as many registers of a lane as values are wide, twice over.
        if values <= 64:
            return ((4, 1, 32, 1), (2, 1, 32, 1))
        return ((2, 2, 32, 1),) if values <= 128 and values % 32 == 0 else ()
    if few and wide <= 128:
        return ((4, 1, 64, 2),)
    if wide <= 64:
        return ((8, 1, 64, 2),)
    if wide <= 192 and values <= 128:
        return ((8, 1, 128, 2),)
    if values <= 256:
        return ((8, 1, 64, 2),) if wide <= 256 else ((4, 1, 64, 2), (4, 1, 32, 2))
    return ((4, 2, 64, 2), (4, 2, 32, 2)) if values % 128 == 0 else ()


def many_spec(
    layer: AttentionSpec, *, banded: bool, partial: bool, few: bool
) -> StagedSpec | TiledSpec:
    """The kernel for many rows, or few."""
    staged = staged_spec(layer, banded=banded, partial=partial, few=few)
    return staged or tiled_spec(layer, banded=banded, partial=partial)


@_remembered
def reduce_spec(layer: AttentionSpec) -> ReduceSpec:
    """The kernel that merges the parts of split rows."""
    return ReduceSpec(
        query_dtype=layer.dtype,
        value_dim=layer.value_dim,
        query_heads=layer.query_heads,
        simdgroups=4,
        sinks=layer.sinks,
    )


def split(
    kind: Literal["decode", "tiled"],
    tile: int,
    keys: int,
    groups_per_key: int,
    *,
    even: bool = True,
    alone: bool = False,
) -> int:
    """Keys of one threadgroup, a power of two: enough threadgroups to fill the device, if there are
    so many keys. `keys` of all rows (or tiles of rows) together, each read by `groups_per_key`;
    even: whether rows have about equally many, else smaller parts even out the work; alone: whether
    a threadgroup takes so much of a processor that no other fits (`alone`)."""
    wanted = keys * groups_per_key // (THREADGROUPS[_where()] // (2 if alone else 1))
    wanted = wanted if even else wanted // 4
    least = max(tile, LEAST_SPLIT[kind])
    return max(least, 1 << max(0, wanted - 1).bit_length())


def many_split(
    spec: StagedSpec | TiledSpec, seen: npt.NDArray[np.int64], pieces: npt.NDArray[np.int64]
) -> int:
    """Keys of one threadgroup: seen [n] of each sequence, pieces [n] of its packed rows."""
    if alone(spec) and spec.shared_values:
        return spec.tile * latent_split(-(-seen // spec.tile), pieces * spec.kv_heads, spec.tile)
    return split("tiled", spec.tile, int(seen @ pieces), spec.kv_heads, alone=alone(spec))


# What a threadgroup of the kernel for latents takes before and after its tiles, and merging parts,
# in the time of a tile of 64 keys; fitted to an H100 (docs/mla.md).
_TURN, _MERGE, _MERGED = 10.0, 1.6, 0.04
_PARTS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])


def latent_split(
    tiles: npt.NDArray[np.int64], pieces: npt.NDArray[np.int64], tile: int = 64
) -> int:
    """Tiles of one threadgroup, where each has a processor to itself: what ends first.

    tiles [n] of each sequence, pieces [n] of its packed rows that walk along them. The processors
    take threadgroups in turns; more and shorter ones fill the last turn, and cost a start each and
    a merge of what they leave.
    """
    least = LEAST_SPLIT["tiled"] // tile
    each = np.maximum(-(-int(tiles.max()) // _PARTS), least)
    counts = (-(-tiles[:, None] // each) * pieces[:, None]).sum(axis=0)
    work = counts * _TURN + int(tiles @ pieces)
    turns = -(-counts // (THREADGROUPS["cuda"] // 2))
    ends = np.maximum(each + _TURN, turns * work / counts)
    ends += np.where(counts > int(pieces.sum()), _MERGE + _MERGED * counts, 0)
    return int(each[np.argmin(ends)])


def alone(spec: StagedSpec | TiledSpec) -> bool:
    """Whether one threadgroup takes the registers of a processor."""
    return _where() == "cuda" and isinstance(spec, StagedSpec) and spec.simdgroups >= 8


@_remembered
def write_spec(
    rows_dtype: str, pool_dtype: str, kv_heads: int, key_dim: int, value_dim: int | None
) -> WriteSpec:
    return WriteSpec(
        rows_dtype=rows_dtype,
        pool_dtype=pool_dtype,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim or 0,
        threads=128,
        values=value_dim is not None,
    )


@_remembered
def gather_spec(pool_dtype: str, kv_heads: int, key_dim: int, value_dim: int | None) -> GatherSpec:
    return GatherSpec(
        pool_dtype=pool_dtype,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim or 0,
        word=_word(pool_dtype, key_dim, value_dim or 0),
        threads=128,
        values=value_dim is not None,
    )


@_remembered
def copy_spec(pool_dtype: str, key_size: int, value_size: int | None) -> CopySpec:
    return CopySpec(
        pool_dtype=pool_dtype,
        key_size=key_size,
        value_size=value_size or 0,
        word=_word(pool_dtype, key_size, value_size or 0),
        threads=256,
        values=value_size is not None,
    )


def _word(dtype: str, *sizes: int) -> int:
    """Bytes of one access that divide all rows."""
    return next(w for w in (16, 8, 4, 2) if all(n * SIZES[dtype] % w == 0 for n in sizes))


@_remembered
def quantize_spec(
    rows_dtype: str,
    pool_dtype: str,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    block_size: int,
    bits: int,
    code_group: int,
) -> QuantizeSpec:
    sizes = pool_dtype, kv_heads, key_dim, value_dim, block_size, bits, code_group
    return QuantizeSpec(**asdict(dequantize_spec(*sizes)), rows_dtype=rows_dtype)


@_remembered
def dequantize_spec(
    pool_dtype: str,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    block_size: int,
    bits: int,
    code_group: int,
) -> DequantizeSpec:
    return DequantizeSpec(
        pool_dtype=pool_dtype,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        block_size=block_size,
        bits=bits,
        code_group=code_group,
        threads=128,
    )


def kernels(
    layer: AttentionSpec, banded: bool | None = None, arrays: bool = False
) -> tuple[KernelSpec, ...]:
    """Every kernel that may serve a layer whose rows and pool have the types of `layer`; banded:
    whether rows see a window or a chunk, None for both kinds; arrays: many rows over arrays, which
    nothing is written to."""
    value_dim = None if layer.shared_values else layer.value_dim
    sizes = layer.pool_dtype, layer.kv_heads, layer.key_dim, value_dim
    block = layer.block_size * layer.kv_heads
    if layer.bits:
        return _codes_kernels(layer)
    bands = (False, True) if banded is None else (banded,)
    many = dict.fromkeys(
        many_spec(layer, banded=b, partial=p, few=f)
        for b in bands
        for p in (False, True)
        for f in ((False, True) if FEW_ROWS[_where()] else (False,))
    )
    if arrays:
        return (*many, reduce_spec(layer))
    return (
        write_spec(layer.dtype, *sizes),
        *(decode_spec(layer, p) for p in (False, True) if _decodes(layer)),
        *many,
        reduce_spec(layer),
        gather_spec(*sizes),
        copy_spec(layer.pool_dtype, block * layer.key_dim, value_dim and block * value_dim),
    )


def _codes_kernels(layer: AttentionSpec) -> tuple[KernelSpec, ...]:
    sizes = layer.pool_dtype, layer.kv_heads, layer.key_dim, layer.value_dim
    how = layer.block_size, layer.bits, layer.code_group
    rows = layer.block_size * layer.kv_heads
    pairs = rows * 2 * DTYPES[layer.pool_dtype] // 4
    words = [
        rows * dim * layer.bits // 32 + pairs * (dim // layer.code_group)
        for dim in (layer.key_dim, layer.value_dim)
    ]
    single = _decodes(layer)
    return (
        quantize_spec(layer.dtype, *sizes, *how),
        *(decode_spec(layer, partial) for partial in (False, True) if single),
        *((reduce_spec(layer),) if single else ()),
        dequantize_spec(*sizes, *how),
        copy_spec("uint32", words[0], words[1]),
    )


# ------------------------------------------------------------------ latents


def serves_arrays(layer: AttentionSpec) -> bool:
    """Whether the kernels for pages are to serve keys and values that are arrays: where MLX's own
    attention has no fused kernel, see `_gathers`."""
    if _where() == "cuda" and supports(layer) is None:
        return max(layer.key_dim, layer.value_dim) > 128 and not _gathers(1, None, 1, layer)
    return False


# Rows of one sequence in one step from which latent attention may make keys and values of its own:
# fewer are not worth a run of their own beside the rows of other sequences.
MATERIALISE_ROWS = 16
# What they may take: beyond, the absorbed form reads the latents as they are.
MATERIALISE_BYTES = 1 << 31
# What a multiplication of theirs takes longer than one of the absorbed form, copies included.
MATERIALISE_COST = {"cuda": 2.4, "metal": 1.0, "runner": 1.0}


def materialise_latents(
    rows: int, context: int, *, rank: int, heads: int, content_dim: int
) -> bool:
    """Whether a sequence's keys and values are made from its latents, or its queries absorbed.

    Counts multiplications of one head, values taken to be as wide as content (N): absorbed, each
    row is projected twice (rank * N) and meets each latent twice (rank); materialised, each latent
    is projected twice and each row meets keys and values of N.
    """
    if rows < MATERIALISE_ROWS or context * heads * content_dim * 2 * 2 > MATERIALISE_BYTES:
        return False
    absorbed = rows * 2 * rank * (content_dim + context)
    materialised = 2 * context * content_dim * (rank + rows)
    return materialised * MATERIALISE_COST[_where()] < absorbed
