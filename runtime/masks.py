"""Attention masks as values: which earlier positions a row sees."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .caches import Retention
from .errors import RuntimeRefusal, UpstreamDifference
from .opaque import Opaque


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskSpec(Opaque):
    """What upstream's mask array says, without the array.

    A row at position p sees the positions j with j <= p and
        window  j > p - window
        chunk   j // chunk == p // chunk
        prefix  or p < prefix and j < prefix (both directions inside the first `prefix` positions)

    kind "attention" is upstream's `create_attention_mask`, "sequence" its `create_ssm_mask` (all
    rows are real tokens, since nothing is padded). `path` leads from an entry of the cache list to
    the part the mask was made from: () for the entry itself, (1,) for the second part of a
    `CacheList`, and `kept` is the window of that part, None where it keeps all. `return_array` is
    what the caller asked for; mixers that run once per sequence get an array or a word accordingly.
    """

    window: int | None = None
    chunk: int | None = None
    prefix: int | None = None
    return_array: bool = False
    kind: Literal["attention", "sequence"] = "attention"
    path: tuple[int, ...] = ()
    kept: int | None = None
    floating: bool = False  # made without a cache: it does not know where its rows stand

    _rule: ClassVar[str] = (
        "a mask of a paged batch is not an array: only `paged_attention` and mixers that run once "
        "per sequence take it"
    )


def seen_through(mask: Any, retention: Retention, name: str) -> tuple[int | None, int | None]:
    """Window and chunk that rows see through a mask, of what a cache keeps.

    Raises TypeError, in the words of the site `name`, for what is no mask of attention, and
    RuntimeRefusal for one that asks for more than the cache keeps.
    """
    if not isinstance(mask, MaskSpec) or mask.kind != "attention":
        raise TypeError(
            f"{name}: expected a mask made by `paged_mask`, got {mask!r}; without one, rows would "
            "see later positions"
        )
    if mask.prefix is not None:
        raise TypeError(f"{name}: no op attends in both directions inside a prefix yet")
    window, chunk = mask.window, mask.chunk
    require_kept(mask, retention, name)
    if retention.chunk is not None and (chunk is None or retention.chunk % chunk):
        raise RuntimeRefusal(
            f"{name}: the cache keeps chunks of {retention.chunk} positions, the mask says "
            f"{chunk or 'nothing of chunks'}: what a row sees would depend on when the cache is "
            "trimmed; make the mask from the same chunks"
        )
    # The mask says what the layer asks for, the cache what is kept.
    if window is not None and retention.window is not None:
        window = min(window, retention.window)
    return window, chunk


def require_kept(mask: MaskSpec, retention: Retention, name: str) -> None:
    """A mask asks for what a cache keeps, and one made without a cache for no more than "nothing
    later".

    Raises TypeError and RuntimeRefusal, in the words of the site `name`.
    """
    bounded = (mask.window, retention.window, retention.chunk) != (None, None, None)
    if mask.floating and (bounded or mask.return_array):
        raise TypeError(
            f"{name}: a mask made without a cache counts positions from the start of each chunk; "
            "make it with the cache of the layer that it is for"
        )
    _require_same_window(mask, retention.window, name)


def _require_same_window(mask: MaskSpec, kept: int | None, name: str) -> None:
    """The mask's window is one that the layer's cache keeps: the original's answer would otherwise
    hang on how a prompt is cut, since rows of one chunk see each other through the mask alone.

    Raises RuntimeRefusal. A window of one key more than is kept, the slip between W keys and W
    keys before one's own, is warned of instead: rows see what is kept, as single tokens do.
    """
    if mask.kept is not None and mask.kept != kept:
        raise RuntimeRefusal(
            f"{name}: the mask was made from a cache that keeps {mask.kept} positions, for one "
            f"that keeps {kept or 'all'}: what a row sees would depend on the chunk it comes in; "
            "make the mask with a cache of the layers that it is for"
        )
    if kept is None or (mask.window is not None and mask.window <= kept):
        return
    if mask.window == kept + 1:
        warnings.warn(
            f"{name}: the mask's window of {mask.window} positions is one more than the cache "
            f"keeps: rows see {kept}, as tokens fed singly do in the original",
            UpstreamDifference,
            stacklevel=5,
        )
        return
    wide = "has no window" if mask.window is None else f"has a window of {mask.window} positions"
    raise RuntimeRefusal(
        f"{name}: the mask {wide} and the cache keeps {kept}: what a row sees would depend on the "
        "chunk it comes in; give both the same window"
    )
