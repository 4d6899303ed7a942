"""Kernel specialisations: every axis of a kernel is a field of its spec, and every field is a hole
of its template. `AttentionSpec` is what a layer asks for; the others are kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import ClassVar

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Pools of codes and copies of whole blocks are words.
SIZES = {**DTYPES, "uint32": 4}
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "uint32": "u32"}
BLOCK_SIZES = (8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What an attention layer asks of the kernels.

    dtype is the queries' and the output's; pool_dtype the cache's. shared_values: values are the
    first value_dim entries of the keys (a latent cache). bits, code_group: of a pool of codes, 0
    for others; pool_dtype is then that of the scales.
    """

    key_dim: int
    value_dim: int
    query_heads: int
    kv_heads: int
    block_size: int
    dtype: str
    pool_dtype: str
    softcap: bool = False
    sinks: bool = False
    shared_values: bool = False
    bits: int = 0
    code_group: int = 0


def supports(spec: AttentionSpec) -> str | None:
    """Why the kernels cannot serve a layer, None if they can; the gathered route always can."""
    for what, width in (("key", spec.key_dim), ("value", spec.value_dim)):
        if not 32 <= width <= 576 or width % 16:
            return f"{what} head dim {width}: kernels exist for multiples of 16 from 32 to 576"
    if spec.dtype not in DTYPES or spec.pool_dtype not in DTYPES:
        return f"dtype {spec.dtype} over {spec.pool_dtype}: kernels exist for {', '.join(DTYPES)}"
    if spec.block_size not in BLOCK_SIZES:
        return f"block size {spec.block_size}: kernels exist for 8, 16, 32 and 64"
    if spec.query_heads % spec.kv_heads:
        return f"{spec.query_heads} query heads do not divide among {spec.kv_heads} key heads"
    if spec.shared_values and spec.value_dim > spec.key_dim:
        return f"values of {spec.value_dim} entries cannot be a part of keys of {spec.key_dim}"
    if spec.bits and spec.shared_values:
        return "values that are a part of quantised keys: there is no kernel"
    return None


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One kernel: a template and a value for each of its holes."""

    template: ClassVar[str]
    headers: ClassVar[tuple[str, ...]] = ()

    @property
    def helpers(self) -> tuple[str, ...]:
        """The files that stand before the kernel."""
        return self.headers

    @property
    def mutable(self) -> tuple[str, ...]:
        """Inputs that the kernel writes to."""
        return ()

    @property
    def threadgroup_memory(self) -> int:
        """Bytes of threadgroup memory that CUDA must be asked for; 0: less than 48 KB, of which it
        knows by itself."""
        return 0

    @property
    def inputs(self) -> tuple[str, ...]:
        raise NotImplementedError

    @property
    def outputs(self) -> tuple[str, ...]:
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Spells the whole specialisation: two kernels of one name are one kernel."""
        words = [self.template]
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, bool):
                words += [part.name] if value else []
            elif isinstance(value, str):
                words.append(SHORT[value])
            elif value or part.default != 0:  # a number with the default 0 is left out
                words.append(f"{initials(part.name)}{value}")
        return "_".join(words)


def initials(name: str) -> str:
    """How the name of a kernel shortens a field: kv_heads is kh."""
    return "".join(part[0] for part in name.split("_"))


@dataclass(frozen=True, slots=True)
class DecodeSpec(KernelSpec):
    """One query row, one key head and a part of its keys per threadgroup.

    heads: query heads of one simdgroup; a group of more is spread over several simdgroups.
    key_groups: simdgroups that take turns at the keys. tile: keys of one turn of a simdgroup.
    vector: elements of one load. partial: leaves parts for `ReduceSpec` to merge. bits, code_group:
    of a pool of codes (`quantization.Packing`), 0 for others.
    """

    template: ClassVar[str] = "decode"
    headers: ClassVar[tuple[str, ...]] = ("common.metal",)

    query_dtype: str
    pool_dtype: str
    key_dim: int
    value_dim: int
    kv_heads: int
    group: int
    block_size: int
    heads: int
    key_groups: int
    tile: int
    vector: int
    softcap: bool
    sinks: bool
    shared_values: bool
    partial: bool
    bits: int = field(default=0, kw_only=True)
    code_group: int = field(default=0, kw_only=True)

    @property
    def helpers(self) -> tuple[str, ...]:
        return (*self.headers, "codes.metal") if self.bits else self.headers

    @property
    def simdgroups(self) -> int:
        return self.key_groups * -(-self.group // self.heads)

    @property
    def inputs(self) -> tuple[str, ...]:
        names = ["queries", "key_pool", "block_tables", "items", "settings", "token_in"]
        if not self.shared_values:
            names.insert(2, "value_pool")
        return (*names, "sinks") if self.sinks and not self.partial else tuple(names)

    @property
    def outputs(self) -> tuple[str, ...]:
        results = ("partial_values", "partial_stats") if self.partial else ("output",)
        return (*results, "token_out")


@dataclass(frozen=True, slots=True)
class ReduceSpec(KernelSpec):
    """One row and query head per threadgroup: merges what a partial decode kernel left."""

    template: ClassVar[str] = "reduce"

    query_dtype: str
    value_dim: int
    query_heads: int
    simdgroups: int
    sinks: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        names = ("partial_values", "partial_stats", "row_items")
        return (*names, "sinks") if self.sinks else names

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("output",)


@dataclass(frozen=True, slots=True)
class TiledSpec(KernelSpec):
    """Many query rows that share keys, with matrix units; rows and query heads are packed together.

    row_tiles: tiles of 16 packed rows of a threadgroup. parts: simdgroups that share a row tile.
    tile: keys of one turn. matrix_dtype: what dialects with typed matrix units multiply.
    keep_queries: in registers, else they are read again for each tile of keys. banded: rows have
    first keys of their own (a window or a chunk).
    """

    template: ClassVar[str] = "tiled"
    headers: ClassVar[tuple[str, ...]] = ("matrix.metal",)

    query_dtype: str
    pool_dtype: str
    matrix_dtype: str
    key_dim: int
    value_dim: int
    kv_heads: int
    group: int
    block_size: int
    row_tiles: int
    parts: int
    tile: int
    keep_queries: bool
    banded: bool
    softcap: bool
    sinks: bool
    shared_values: bool
    partial: bool

    @property
    def simdgroups(self) -> int:
        return self.row_tiles * self.parts

    @property
    def inputs(self) -> tuple[str, ...]:
        names = ["queries", "key_pool", "block_tables", "row_spans", "items", "settings"]
        if not self.shared_values:
            names.insert(2, "value_pool")
        if self.sinks and not self.partial:
            names.append("sinks")
        return (*names, "token_in")

    @property
    def outputs(self) -> tuple[str, ...]:
        results = ("partial_values", "partial_stats") if self.partial else ("output",)
        return (*results, "token_out")


@dataclass(frozen=True, slots=True)
class StagedSpec(KernelSpec):
    """As `TiledSpec`, with tiles of queries, keys and values in threadgroup memory.

    Rows and pool have one type. row_tiles, parts: as there; all simdgroups share the tiles, and
    those of one row tile share out the keys of a turn too. tile: keys of one turn. stages: tiles of
    keys that are held, so that the next is on its way. ahead: the next tile's scores are worked out
    beside this one's products (two stages, one part, values of their own).
    """

    template: ClassVar[str] = "staged"
    headers: ClassVar[tuple[str, ...]] = ("matrix.metal", "staging.metal")

    dtype: str
    key_dim: int
    value_dim: int
    kv_heads: int
    group: int
    block_size: int
    row_tiles: int
    parts: int
    tile: int
    stages: int
    ahead: bool
    banded: bool
    softcap: bool
    sinks: bool
    shared_values: bool
    partial: bool

    @property
    def simdgroups(self) -> int:
        return self.row_tiles * self.parts

    def threadgroup_bytes(self, row_bytes: Callable[[int, int], int], piece: int) -> int:
        """What the tiles take: row_bytes of a row's width and an element's size, `piece` bytes of
        exchanged weights for a lane and 16 keys."""
        size, rows, keys = DTYPES[self.dtype], 16 * self.row_tiles, self.tile * self.stages
        taken = [rows * row_bytes(self.key_dim, size), keys * row_bytes(self.key_dim, size)]
        if not self.shared_values:
            taken.append(keys * row_bytes(self.value_dim, size))
        if self.parts > 1:
            taken += [self.row_tiles * self.tile // 16 * 32 * piece, 4 * self.parts * rows]
            taken.append(self.simdgroups)
        return sum(taken)

    @property
    def threadgroup_memory(self) -> int:
        # Rows of whole panels of 64 columns, each array at a multiple of 1024 bytes.
        return self.threadgroup_bytes(lambda width, _: -(-width // 64) * 128, 16) + 2048

    @property
    def inputs(self) -> tuple[str, ...]:
        names = ["queries", "key_pool", "block_tables", "row_spans", "items", "settings"]
        if not self.shared_values:
            names.insert(2, "value_pool")
        if self.sinks and not self.partial:
            names.append("sinks")
        return (*names, "token_in")

    @property
    def outputs(self) -> tuple[str, ...]:
        results = ("partial_values", "partial_stats") if self.partial else ("output",)
        return (*results, "token_out")


@dataclass(frozen=True, slots=True)
class WriteSpec(KernelSpec):
    """The rows of a step into their slots, in place. values: False for pools of keys only."""

    template: ClassVar[str] = "write"

    rows_dtype: str
    pool_dtype: str
    kv_heads: int
    key_dim: int
    value_dim: int
    threads: int
    values: bool

    @property
    def mutable(self) -> tuple[str, ...]:
        return ("key_pool", "value_pool") if self.values else ("key_pool",)

    @property
    def inputs(self) -> tuple[str, ...]:
        if self.values:
            return ("keys", "values", "slots", "key_pool", "value_pool", "token_in")
        return ("keys", "slots", "key_pool", "token_in")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("token_out",)


@dataclass(frozen=True, slots=True)
class GatherSpec(KernelSpec):
    """Positions of one sequence out of the pages, as the arrays that MLX's own attention takes.

    word: bytes of one access.
    """

    template: ClassVar[str] = "gather"

    pool_dtype: str
    kv_heads: int
    key_dim: int
    value_dim: int
    word: int
    threads: int
    values: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        pools = ("key_pool", "value_pool") if self.values else ("key_pool",)
        return (*pools, "slots", "lengths", "token_in")

    @property
    def outputs(self) -> tuple[str, ...]:
        made = ("gathered_keys", "gathered_values") if self.values else ("gathered_keys",)
        return (*made, "token_out")


@dataclass(frozen=True, slots=True)
class CopySpec(KernelSpec):
    """Whole blocks inside a pool, in place; key_size and value_size are elements of a block.

    word: bytes of one access.
    """

    template: ClassVar[str] = "copy"

    pool_dtype: str
    key_size: int
    value_size: int
    word: int
    threads: int
    values: bool

    @property
    def mutable(self) -> tuple[str, ...]:
        return ("key_pool", "value_pool") if self.values else ("key_pool",)

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.mutable, "pairs", "token_in")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("token_out",)


@dataclass(frozen=True, slots=True)
class CodesSpec(KernelSpec):
    """What moves rows into and out of pools of codes; see `quantization.Packing`.

    pool_dtype: of the scales.
    """

    headers: ClassVar[tuple[str, ...]] = ("common.metal", "codes.metal")

    pool_dtype: str
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    bits: int
    code_group: int
    threads: int


@dataclass(frozen=True, slots=True)
class QuantizeSpec(CodesSpec):
    """The rows of a step into their slots, in place."""

    template: ClassVar[str] = "quantize"

    rows_dtype: str

    @property
    def mutable(self) -> tuple[str, ...]:
        return ("key_pool", "value_pool")

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("keys", "values", "slots", "key_pool", "value_pool", "token_in")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("token_out",)


@dataclass(frozen=True, slots=True)
class DequantizeSpec(CodesSpec):
    """Positions of one sequence, as arrays of the scales' type for MLX's own attention."""

    template: ClassVar[str] = "dequantize"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("key_pool", "value_pool", "slots", "lengths", "token_in")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("gathered_keys", "gathered_values", "token_out")
