"""Which layout, route, kernel and splits serve a call. Everything that is a choice is here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from . import launch
from .specs import DTYPES, AttentionSpec, DecodeSpec, KernelSpec, ReduceSpec

if TYPE_CHECKING:
    from .pools import Layout

Route = Literal["kernel", "gathered"]

# Query heads of one simdgroup: their queries and sums stay in registers.
HEADS = 4


def layout() -> Layout:
    """How pools lie in memory: in pages for the kernels, by head for MLX's CPU back end."""
    return "heads" if launch.active() is None else "pages"


def decode_spec(layer: AttentionSpec, partial: bool) -> DecodeSpec:
    """The kernel for single rows."""
    group = layer.query_heads // layer.kv_heads
    vector = 16 // DTYPES[layer.pool_dtype]
    widest = max(layer.key_dim, layer.value_dim)
    heads = min(group, HEADS if widest <= 256 else HEADS // 2)
    chunks = -(-group // heads)
    # Keys of a turn: what one lane holds of them is then 32 words, of keys and of values.
    tile = 16 if layer.key_dim // vector <= 16 and layer.value_dim // vector <= 16 else 8
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
        sinks=layer.sinks,
        shared_values=layer.shared_values,
        partial=partial,
    )


def reduce_spec(layer: AttentionSpec) -> ReduceSpec:
    """The kernel that merges the parts of split rows."""
    return ReduceSpec(
        query_dtype=layer.dtype,
        value_dim=layer.value_dim,
        query_heads=layer.query_heads,
        simdgroups=4,
        sinks=layer.sinks,
    )


def kernels(layer: AttentionSpec) -> tuple[KernelSpec, ...]:
    """Every kernel that may serve a layer."""
    return (decode_spec(layer, False), decode_spec(layer, True), reduce_spec(layer))
