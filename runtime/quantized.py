"""Caches of codes: what a user asks for, and which models cannot have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlxrewrite.kernels.ops import Quantization

from .caches import Spec
from .errors import RuntimeRefusal
from .views import Leaf

GROUP_SIZE = 64  # mlx_lm's


def quantization(bits: int | None, group_size: int = GROUP_SIZE) -> Quantization | None:
    """`kv_bits` and `kv_group_size` as one value; None for caches in the type of the keys.

    Raises RuntimeRefusal for numbers that there is nothing for.
    """
    if bits is None:
        return None
    try:
        return Quantization(bits, group_size)
    except ValueError as problem:
        raise RuntimeRefusal(f"kv_{problem}") from None


def require_paged(
    asked: Quantization | None,
    specs: Sequence[Spec | None],
    leaves: Mapping[tuple[int, ...], Leaf],
) -> None:
    """Raise RuntimeRefusal where a step showed that keys are kept outside of pools, or none are.

    States of recurrent mixers are no keys: they stay as they are beside quantised pools.
    """
    if asked is None:
        return
    for entry, spec in enumerate(specs):
        if spec is None:
            raise RuntimeRefusal(
                f"kv_bits: cache entry {entry} is of the model file's own class, whose content "
                "is not known; leave kv_bits out"
            )
    for path, leaf in sorted(leaves.items()):
        if leaf.per_sequence:
            raise RuntimeRefusal(
                f"kv_bits: cache entry {'.'.join(map(str, path))} is kept once per sequence by its "
                "layer, in no pool that could be quantised; leave kv_bits out"
            )
    if not any(leaf.pool.made for leaf in leaves.values()):
        raise RuntimeRefusal("kv_bits: this model keeps no keys and values; leave kv_bits out")
