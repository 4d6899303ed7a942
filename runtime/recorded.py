"""Decode steps without Python: a forward recorded once, and run again on the arrays of other steps.

Building the graph of a step takes the host longer than a GPU takes to compute it, and where every
sequence has one row the graph is the same at every step: only the contents of a few arrays change.
So the second step of a shape is traced (`mx.compile`), and later ones run what was traced.

What a forward may depend on is closed off, not searched for: it is traced with a batch that has
tracers for ids, positions, slots, block tables, work lists and states, and *nothing else* of its
step (`stand_ins`). What it asks of a step's lengths is asked again at each step: arrays among the
answers are inputs, and all else is part of what tells shapes apart. A mixer that wants anything
more (how long sequences are, their own caches) ends the trace, and the model runs as before. So
does a model whose modules changed while they were traced, or that drew random numbers: a recorded
step would not do that again.

Only where writes are in place and ordered by tokens: recorded steps then neither read nor return
the memory of a pool, only its token. Weights are inputs, so that new ones (adapters, another type)
count at once. Batches are filled up to a few sizes with copies of their last row, which write what
that row writes; how many shapes are kept is bounded. States of sequences are inputs and outputs:
all sequences of a step must hold the same of them, and batches are not filled up, since a copy
would have a state of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlxrewrite.kernels import launch, policy
from mlxrewrite.kernels.ops import Ragged

from . import batch as batches
from .batch import Batch
from .rope import sequence_ends
from .stand_ins import Made, NotRecordableError, RecordedBatch, RecordedRagged, RecordedTable
from .views import Leaf, StateLeaf, View

MOST = 64  # shapes that are kept
Path = tuple[int, ...]
Asked = Mapping[object, Callable[[Ragged], Any]]


def filled(rows: int) -> int:
    """The size of batch that so many single rows are filled up to: at most an eighth more."""
    step = max(1, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step


@dataclass(slots=True, eq=False)
class _Shape:
    """One shape of step; `run` once it was traced, None if it cannot be. `writes` are the states
    that it returns, by entry and number."""

    run: Callable[..., Any] | None = None
    failed: bool = False
    writes: tuple[tuple[int, int], ...] | None = None


class Recorder:
    """The recorded steps of one paged cache.

    views: makes what the model gets as its caches from a batch. `lacking` says, once that is known,
    why no step can be recorded.
    """

    def __init__(
        self,
        model: Any,
        leaves: Mapping[Path, Leaf],
        states: Mapping[Path, StateLeaf],
        views: Callable[[Batch], list[View]],
        most: int = MOST,
    ) -> None:
        self.lacking: str | None = None
        self.replayed = 0
        self._model = model
        self._leaves = leaves
        self._states = states
        self._views = views
        self._most = most
        self._asked: tuple[Asked, ...] | None = None
        self._shapes: OrderedDict[object, _Shape] = OrderedDict()
        self._problem: BaseException | None = None

    @property
    def recorded(self) -> int:
        """How many shapes are recorded."""
        return sum(shape.run is not None for shape in self._shapes.values())

    def learn(self, batch: Batch) -> None:
        """Look at what a step of single rows asked of its blocks, after it was built.

        What is asked may depend on what was answered, so that every such step is looked at.
        """
        if self.lacking is not None or not policy.writes_in_place():
            return
        if not isinstance(self._model, nn.Module):
            self.lacking = "the model is no module, so that its weights are not known"
            return
        if any(leaf.per_sequence for leaf in self._states.values()):
            self.lacking = "a mixer runs once per sequence"
            return
        asked: list[Asked] = []
        for ragged in batch.ragged:
            if ragged is None or ragged.asked is None:
                self.lacking = "a mixer reads more of a step than its rows"
                return
            asked.append(ragged.asked)
        if self._asked is not None and len(self._asked) == len(asked):
            asked = [{**old, **new} for old, new in zip(self._asked, asked, strict=True)]
        self._asked = tuple(asked)

    @property
    def ready(self) -> bool:
        return self._asked is not None and self.lacking is None and policy.writes_in_place()

    def size(self, rows: int) -> int:
        """How many rows a step of so many single rows is filled up to."""
        return rows if self._states else filled(rows)

    def step(self, batch: Batch, ends: mx.array) -> mx.array | None:
        """Logits [T, 1, V] of a step whose sequences all have one row; None: run it as it is.

        The batch is one that was filled up. Raises whatever the model raises.
        """
        assert self._asked is not None
        ragged = [part for part in batch.ragged if part is not None]
        if len(ragged) != len(self._asked):
            self.lacking = "a mixer runs once per sequence"
            return None
        made = [
            tuple((key, part.ask(key, make)) for key, make in asked.items())
            for part, asked in zip(ragged, self._asked, strict=True)
        ]
        parts = [_taken_apart([value for _, value in answers]) for answers in made]
        arrays = [[part.slot_mapping, part.block_tables] for part in ragged]
        sequences = tuple(part.sequence for part in batch.rows)
        entries = list(self._states.values())
        held = _held(entries, sequences)
        if held is None:
            return None
        key = (
            str(mx.default_stream(mx.default_device())),
            launch.active(),
            batch.num_rows,
            getattr(self._model, "training", False),
            tuple(tables.shape for _, tables in arrays),
            tuple(still for still, _ in parts),
            tuple((place, a.shape[1:], a.dtype) for place, a in held.items()),
        )
        shape = self._shapes.get(key)
        if shape is None:  # a shape that never comes again is not worth a trace
            self._shapes[key] = _Shape()
            if len(self._shapes) > self._most:
                self._shapes.popitem(last=False)
            return None
        self._shapes.move_to_end(key)
        if shape.failed:
            return None
        leaves = [leaf for leaf in self._leaves.values() if leaf.pool.made]
        pools = [leaf.pool.pool for leaf in leaves]
        if shape.run is None:
            shape.run = self._recording(shape, batch, made, leaves, list(held))
        logits, tokens, states = shape.run(
            [batch.ids, batch.positions, ends],
            [[*two, *moving] for two, (_, moving) in zip(arrays, parts, strict=True)],
            [[pool.keys, *([] if pool.values is None else [pool.values])] for pool in pools],
            [pool.token for pool in pools],
            list(held.values()),
        )
        problem, self._problem = self._problem, None
        if problem is not None:
            shape.run, shape.failed = None, True
            if not isinstance(problem, Exception):
                raise problem
            self.lacking = f"its forward cannot be recorded: {problem}"
            return None
        for leaf, pool, token in zip(leaves, pools, tokens, strict=True):
            leaf.pool.pool = pool.after(token)
            leaf.pool.serial = batch.serial
        assert shape.writes is not None
        for (entry, index), state in zip(shape.writes, states, strict=True):
            entries[entry].table.write(index, sequences, state)
        self.replayed += 1
        found: mx.array = logits
        return found

    def _recording(
        self,
        shape: _Shape,
        batch: Batch,
        made: Sequence[Made],
        leaves: Sequence[Leaf],
        places: Sequence[tuple[int, int]],
    ) -> Callable[..., Any]:
        """What runs steps of this shape; traced when it is first called, and whenever the weights
        have other shapes or types."""
        rows, serial, model = batch.num_rows, batch.serial, self._model
        sizes = [part.block_size for part in batch.ragged if part is not None]

        def forward(step: Any, blocks: Any, stores: Any, tokens: Any, states: Any) -> Any:
            ids, positions, ends = step
            ragged = [
                RecordedRagged(rows, size, arrays[0], arrays[1], _answers(answers, arrays[2:]))
                for size, arrays, answers in zip(sizes, blocks, made, strict=True)
            ]
            tracer: Any = RecordedBatch(ids, positions, ragged, serial)
            held = [(leaf.pool, leaf.pool.pool, leaf.pool.serial) for leaf in leaves]
            tables = [(leaf, leaf.table) for leaf in self._states.values()]
            before, random = _attributes(model), _random_state()
            try:
                for (entry, pool, _), store, token in zip(held, stores, tokens, strict=True):
                    values = store[1] if len(store) > 1 else None
                    entry.pool = replace(pool, keys=store[0], values=values, token=token)
                    entry.serial = -1
                traced = _traced(tables, rows, dict(zip(places, states, strict=True)))
                with sequence_ends(positions, ends):
                    logits = batches.logits_of(model(ids, cache=self._views(tracer)))
                changed = _put_back(before)
                if changed is not None:
                    raise NotRecordableError(f"{changed} changes itself")
                if not np.array_equal(random, _random_state()):
                    raise NotRecordableError("it draws random numbers")
                writes = tuple((i, n) for i, table in enumerate(traced) for n in table.written)
                if shape.writes not in (None, writes):
                    raise NotRecordableError("it does not always write the same states")
                shape.writes = writes
                new = [traced[i].written[n] for i, n in writes]
                return logits, [entry.pool.token for entry, _, _ in held], new
            except BaseException as problem:
                # Not raised here: MLX would leave tracers where the weights were.
                self._problem = problem
                _put_back(before)
                return ids, list(tokens), []
            finally:
                for entry, pool, number in held:
                    entry.pool, entry.serial = pool, number
                for leaf, table in tables:
                    leaf.table = table

        return mx.compile(forward, inputs=[model])


def _held(
    entries: Sequence[StateLeaf], sequences: tuple[int, ...]
) -> dict[tuple[int, int], mx.array] | None:
    """The states of a step's sequences, by entry and number; None if they do not hold the same."""
    found = {}
    for entry, leaf in enumerate(entries):
        for index in range(leaf.table.size):
            if not leaf.table.alike(index, sequences):
                return None
            states = leaf.table.read(index, sequences)
            if states is not None:
                found[entry, index] = states
    return found


def _traced(
    tables: Sequence[tuple[StateLeaf, Any]], rows: int, states: Mapping[tuple[int, int], mx.array]
) -> list[RecordedTable]:
    """Put stand-ins with these states in the place of tables."""
    traced = []
    for entry, (leaf, table) in enumerate(tables):
        mine = {index: array for (number, index), array in states.items() if number == entry}
        stand_in: Any = RecordedTable(table.size, rows, mine)
        leaf.table = stand_in
        traced.append(stand_in)
    return traced


def _taken_apart(values: Sequence[Any]) -> tuple[tuple[Any, ...], list[mx.array]]:
    """What is the same whenever a shape comes again, and the arrays, which are not."""
    still: list[Any] = []
    arrays: list[mx.array] = []
    for value in values:
        for part in _fields(value):
            if isinstance(part, mx.array):
                still.append((part.shape, part.dtype))
                arrays.append(part)
            else:
                still.append(part)
    return tuple(still), arrays


def _answers(made: Made, arrays: Sequence[mx.array]) -> Made:
    """What came of a step's questions, with other arrays."""
    left = iter(arrays)

    def exchanged(value: Any) -> Any:
        parts = [next(left) if isinstance(p, mx.array) else p for p in _fields(value)]
        return _rebuilt(value, parts)

    return tuple((key, exchanged(value)) for key, value in made)


def _rebuilt(value: Any, parts: list[Any]) -> Any:
    if not is_dataclass(value):
        return parts[0]
    made: Callable[..., Any] = type(value)
    return made(*parts)


def _fields(value: Any) -> list[Any]:
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    return [value]


def _random_state() -> np.ndarray:
    state: Any = mx.random.state
    return np.array(state[0])


_Attributes = list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]


def _attributes(model: Any) -> _Attributes:
    """What the modules of a model hold now."""
    return [(module, dict(module), dict(vars(module))) for module in model.modules()]


def _put_back(before: _Attributes) -> str | None:
    """Undo what happened to modules; the name of one that held something else, if there is one."""
    changed = None
    for module, entries, own in before:
        for now, then in ((module, entries), (vars(module), own)):
            if len(now) == len(then) and all(now.get(name) is then[name] for name in then):
                continue
            changed = type(module).__name__
            for name in set(now) - set(then):
                dict.__delitem__(now, name)
            for name, value in then.items():
                dict.__setitem__(now, name, value)
    return changed
