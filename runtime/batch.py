"""One step's batch: rows of several sequences, their positions, and where their keys lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np
from mlxrewrite.kernels.ops import Ragged

from .rows import Rows


class Originals(Protocol):
    """The original caches of each sequence, for mixers that run once per sequence."""

    def of(self, sequence: int) -> list[Any]:
        """The sequence's caches, in the structure of the model's cache list."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Everything the sites of one step share; built once, before the model runs.

    ids [T, 1] int32; positions [T] int32, the same array object for every layer; `rows` says which
    rows are whose; `wanted` are the S rows whose logits are wanted, `logit_rows` [S] int32 the same
    as an array, None for all rows; `ragged` holds the block metadata of each group of layers (None
    for a group that pages nothing); `originals` the per-sequence caches; `serial` counts steps;
    `memo` is what sites work out once for all layers.
    """

    ids: mx.array
    positions: mx.array
    rows: tuple[Rows, ...]
    wanted: tuple[int, ...]
    logit_rows: mx.array | None
    ragged: tuple[Ragged | None, ...]
    originals: Originals
    serial: int
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return self.rows[-1].stop

    @property
    def num_logits(self) -> int:
        return len(self.wanted)


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """One token that an earlier step samples: entry `place` of its tokens [S], not known yet."""

    tokens: mx.array
    place: int

    def __len__(self) -> int:
        return 1


def row_ids(tokens: Sequence[Sequence[int] | mx.array | Sampled]) -> mx.array:
    """All tokens below each other, [T, 1] int32. Arrays may be unevaluated and stay so."""
    arrays: list[mx.array] = []
    for _, run in groupby(tokens, _source):
        first, *rest = run
        if isinstance(first, Sampled):
            # One gather, not a slice for each row.
            places = [first.place] + [part.place for part in rest if isinstance(part, Sampled)]
            source = first.tokens
            if places != list(range(source.size)):
                source = source[mx.array(places, mx.int32)]
            arrays.append(source.astype(mx.int32))
        elif isinstance(first, mx.array):
            arrays.append(first.reshape(-1).astype(mx.int32))
        else:
            known = [token for part in (first, *rest) for token in cast(Sequence[int], part)]
            arrays.append(mx.array(known, mx.int32))
    return (arrays[0] if len(arrays) == 1 else mx.concatenate(arrays))[:, None]


def _source(part: Sequence[int] | mx.array | Sampled) -> int:
    """Neighbours with the same number are joined; -1 for tokens that are known."""
    if isinstance(part, Sampled):
        return id(part.tokens)
    return id(part) if isinstance(part, mx.array) else -1


def row_positions(rows: Sequence[Rows]) -> mx.array:
    """[T] int32."""
    if rows[-1].stop == len(rows):
        return mx.array(np.array([part.position for part in rows], np.int32))
    spans = [np.arange(r.position, r.position + r.length, dtype=np.int32) for r in rows]
    return mx.array(np.concatenate(spans))


def row_ends(rows: Sequence[Rows]) -> mx.array:
    """[T] int32: how long each row's sequence is after the step."""
    if rows[-1].stop == len(rows):
        return mx.array(np.array([part.end for part in rows], np.int32))
    spans = [np.full(r.length, r.end, dtype=np.int32) for r in rows]
    return mx.array(np.concatenate(spans))


def logits_of(output: Any) -> mx.array:
    """The logits in what a forward returned: olmo with tied embeddings adds its caches."""
    logits: mx.array = output[0] if isinstance(output, tuple) else output
    return logits
