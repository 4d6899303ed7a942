"""What a model's own `get_input_embeddings` may leave behind: rows without ids, other weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from .errors import RuntimeRefusal

NO_ID = 0  # of a row that stands for no token; nothing looks at it


def row_ids(ids: Sequence[int], embeds: mx.array, text: mx.array) -> list[int]:
    """Ids of the rows `embeds` [R, D] that a prompt became, whose tokens as text are `text` [L, D].

    Text in front of the first image and behind the last one keeps its ids, all rows between have
    none (`NO_ID`).
    """
    rows, count = embeds.shape[0], min(embeds.shape[0], len(ids))
    known = np.array(ids) >= 0
    embeds = embeds.astype(text.dtype)
    head = np.array(mx.all(embeds[:count] == text[:count], axis=-1)) & known[:count]
    before = int(np.cumprod(head).sum())
    rest = count - before
    tail = np.array(mx.all(embeds[rows - rest :] == text[len(ids) - rest :], axis=-1))
    behind = int(np.cumprod((tail & known[len(ids) - rest :])[::-1]).sum())
    between = [NO_ID] * (rows - before - behind)
    return [*ids[:before], *between, *ids[len(ids) - behind :]]


def equally_wide(logits: Sequence[mx.array]) -> list[mx.array]:
    """Logits [n, V] of several sequences, -inf for ids that only others of them have.

    mlx_vlm's molmo_point has an id more for every patch of the images that a sequence has seen.
    """
    widest = max(part.shape[1] for part in logits)
    return [
        mx.pad(part, [(0, 0), (0, widest - part.shape[1])], constant_values=-mx.inf)
        for part in logits
    ]


def stacked(logits: Sequence[mx.array]) -> mx.array:
    """Logits of several sequences as one array."""
    return mx.concatenate(equally_wide(logits))


@contextmanager
def keeping_weights(model: nn.Module) -> Iterator[None]:
    """Refuse what changes the weights that all sequences of a batch share.

    mlx_vlm's phi4mm merges other adapters into its language model when a prompt brings images or
    audio. Such weights, and what the model says about them, are put back before the refusal.

    Raises RuntimeRefusal.
    """
    weights, told = model.parameters(), dict(vars(model))
    before: dict[str, mx.array] = dict(tree_flatten(weights))
    try:
        yield
    finally:
        after: dict[str, Any] = dict(tree_flatten(model.parameters()))
        changed = sorted(name for name, value in before.items() if after.get(name) is not value)
        if changed:
            model.update(weights)
            for name in vars(model).keys() - told.keys():
                delattr(model, name)
            vars(model).update(told)
    if changed:
        raise RuntimeRefusal(
            f"this prompt makes the model change {len(changed)} of its weights (first "
            f"{changed[0]}), which the other sequences of a batch run on: use mlx_vlm for it"
        )
