"""Prompts of mlx_vlm's models as requests of the engine.

The engine knows prompts by their tokens, and so do the names of blocks that hold equal beginnings.
A placeholder of an image says nothing about the image, so here every row of a prompt that is not
plain text has a token of its own: a negative number that stands for the content of its run of rows.
Equal numbers mean equal ids, embeddings, features and positions; the model still gets the ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import mlx.core as mx
import numpy as np

from .cache import cache_specs
from .caches import ArraysCache, CacheList
from .engine import UNKNOWN, Request
from .errors import RuntimeRefusal
from .vision import Prepared, VisionModel, triples

_RUN = 1 << 24  # rows that a run can have
_FIRST = UNKNOWN - 1


class PromptKeys:
    """The numbers of runs of rows, for one engine: equal for equal content, never used again."""

    def __init__(self) -> None:
        self._runs: dict[bytes, int] = {}

    def of(self, model: VisionModel, prepared: Prepared) -> list[int]:
        """A prompt's tokens as the engine knows them: its ids where rows are plain text."""
        if not prepared.images:
            return list(prepared.ids)
        keys = list(prepared.ids)
        content = b"" if model.by_rows(prepared) else _content(prepared)
        for start, stop in _runs(~_plain(model, prepared)):
            digest = blake2b(digest_size=16)
            digest.update(np.array(prepared.ids[start:stop], np.int64).tobytes())
            digest.update(_bytes(prepared.embeds[0, start:stop]))
            if prepared.positions is not None:
                digest.update(triples(prepared)[:, start:stop].astype(np.int64).tobytes())
            digest.update(content)
            if stop == len(keys):
                digest.update(str(prepared.delta).encode())
            number = self._runs.setdefault(digest.digest(), len(self._runs))
            keys[start:stop] = [_FIRST - number * _RUN - row for row in range(stop - start)]
        return keys


def request(model: VisionModel, prepared: Prepared, keys: PromptKeys, **options: Any) -> Request:
    """A prepared prompt as a request of an engine over the same model.

    Prompts that have no form by rows are read here, by the original model, but for the last token.
    `options` are those of `Request`. Raises RuntimeRefusal for a model that runs once per sequence.
    """
    if not model.rewritten:
        raise RuntimeRefusal(
            f"the engine: this model runs once per sequence, since {model.why}; use "
            "vision_generate.decode"
        )
    if options.get("keep"):
        raise RuntimeRefusal("keep: prompt caches of mlx_vlm's models are not given out")
    tokens = keys.of(model, prepared)
    if model.by_rows(prepared) or len(prepared) < 2:
        return Request(tokens, prepared=prepared, **options)
    caches = brought(model, prepared)
    return Request(tokens[-1:], before=tokens[:-1], caches=caches, prepared=prepared, **options)


def brought(model: VisionModel, prepared: Prepared) -> list[Any]:
    """mlx_lm's caches of all tokens but the last."""
    specs = cache_specs(model)
    if any(spec is None or isinstance(spec, ArraysCache | CacheList) for spec in specs):
        raise RuntimeRefusal(
            "the engine: a prompt with images that this model cannot read row by row, and its "
            "states cannot go back by a token; use vision_generate.decode"
        )
    originals = model.read_original(prepared)[1]
    held = len(prepared) - 1
    made = []
    for spec, entry in zip(specs, originals, strict=True):
        assert spec is not None
        cache = spec.original()
        cache.keys, cache.values = entry.keys, entry.values
        if cache.keys.shape[2] > entry.offset:  # room for more
            cache.keys = cache.keys[..., : entry.offset, :]
            cache.values = cache.values[..., : entry.offset, :]
        cache.keys, cache.values = cache.keys[..., :-1, :], cache.values[..., :-1, :]
        cache.offset = held
        if hasattr(cache, "_idx"):
            cache._idx = cache.keys.shape[2]
        made.append(cache)
    return made


def _plain(model: VisionModel, prepared: Prepared) -> np.ndarray:
    """Rows [L] whose keys follow from their ids and what comes before: text, in the next place."""
    text = model.embed(prepared.ids)
    same = np.array(mx.all(text == prepared.embeds[0].astype(text.dtype), axis=-1))
    if prepared.positions is None:
        return same
    table = triples(prepared)
    following = np.concatenate([[0], np.maximum.accumulate(table.max(axis=0))[:-1] + 1])
    plain: np.ndarray = same & (table == following).all(axis=0)
    if table.max() + 1 != len(prepared) + prepared.delta:
        plain[-1] = False  # then what follows depends on the delta too
    return plain


def _content(prepared: Prepared) -> bytes:
    """What else the language model may look at: features of the whole prompt."""
    digest = blake2b(digest_size=16)
    for name, value in sorted(prepared.features.items()):
        if name in ("position_ids", "attention_mask", "pixel_values"):
            continue  # the first are told by row, and pixels by what became of them
        digest.update(name.encode())
        parts = value if isinstance(value, list | tuple) else [value]
        for part in parts:
            digest.update(_bytes(part) if isinstance(part, mx.array) else repr(part).encode())
    return digest.digest()


def _bytes(array: mx.array) -> bytes:
    wide = array.astype(mx.float32) if array.dtype == mx.bfloat16 else array
    return str(wide.shape).encode() + np.array(wide).tobytes()


def _runs(chosen: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and stop of each run of rows that are chosen."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(np.int8), [0]])))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
