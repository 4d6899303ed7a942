"""Kernel specialisations: every axis of a kernel is a field of its spec."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("float32", "float16", "bfloat16")
BLOCK_SIZES = (8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What an attention layer asks of the kernels."""

    key_dim: int
    value_dim: int
    query_heads: int
    kv_heads: int
    block_size: int
    dtype: str
    pool_dtype: str
    window: bool = False
    chunk: bool = False
    softcap: bool = False
    sinks: bool = False
    shared_values: bool = False


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
    return None
