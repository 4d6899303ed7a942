"""The next token of each row: samplers, logits processors and seeds of single requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models.cache import TokenBuffer
from mlx_lm.sample_utils import greedy_sampler

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True, slots=True, eq=False)
class Seeded:
    """A sampler with draws of its own, for callers who have no other place for a seed."""

    sampler: Sampler
    seed: int

    def __call__(self, logprobs: mx.array) -> mx.array:
        raise TypeError("a seeded sampler is taken apart by the batch generator")


@dataclass(slots=True, eq=False)
class Chooser:
    """How one request's tokens are chosen, and what that depends on.

    `sampler` maps log-probabilities [n, V] to tokens [n]; requests with the same one are sampled in
    one call. `processors` change the logits [1, V] given all tokens so far. With `seed` the draws
    are those that mlx_lm makes after `mx.random.seed(seed)`, whoever else runs.
    """

    sampler: Sampler = greedy_sampler
    processors: tuple[LogitsProcessor, ...] = ()
    seed: int | None = None
    skipped: int = 0  # tokens at the front that are not known, and not shown to processors
    _history: TokenBuffer | None = None
    _seen: int = 0
    _random: mx.array | None = field(default=None)

    @property
    def alone(self) -> bool:
        """Whether its rows must be sampled one after the other, by themselves."""
        return bool(self.processors) or self.seed is not None

    def process(self, logits: mx.array, known: Sequence[int], latest: mx.array | None) -> mx.array:
        """Logits [1, V] after the processors; `latest` [1] is a token that is not known yet."""
        if not self.processors:
            return logits
        if self._history is None:
            self._history = TokenBuffer(list(known[self.skipped :]))
            self._seen = len(known)
            history = self._history.tokens
            if latest is not None:
                history = self._history.update_and_fetch(latest.astype(mx.int32))
                self._seen += 1
        else:
            fresh = mx.array(list(known[self._seen :]), mx.int32)
            if latest is not None:
                fresh = mx.concatenate([fresh, latest.astype(mx.int32)])
            history = self._history.update_and_fetch(fresh) if fresh.size else self._history.tokens
            self._seen += fresh.size
        with _random_kept():
            for processor in self.processors:
                logits = processor(history, logits)
        return logits

    def draw(self, logprobs: mx.array) -> mx.array:
        """Tokens [n] of log-probabilities [n, V]."""
        if self.seed is None:
            with _random_kept():
                return self.sampler(logprobs)
        # MLX has one random state, and no way to set it but a seed of 64 bits, which is the state.
        before = _as_seed(_random_state())
        mx.random.seed(self.seed if self._random is None else _as_seed(self._random))
        try:
            tokens = self.sampler(logprobs)
            self._random = _random_state()
        finally:
            mx.random.seed(before)
        return tokens


@contextmanager
def _random_kept() -> Iterator[None]:
    """Where the body raises, the random state is that of before.

    mlx_lm's samplers are compiled over it: one that raises while it is traced leaves a tracer
    there, and nobody could draw anything afterwards.
    """
    before = _random_state()
    try:
        yield
    except BaseException:
        mx.random.seed(_as_seed(before))
        raise


def _random_state() -> mx.array:
    state: Any = mx.random.state
    return cast(mx.array, state[0])


def _as_seed(state: mx.array) -> int:
    high, low = cast(list[int], state.tolist())
    return high << 32 | low


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row of logits: whose it is, the tokens before it, and one more that is not known yet."""

    chooser: Chooser
    known: Sequence[int]
    latest: mx.array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Tokens [S] and log-probabilities [S, V]; `failed`: rows whose sampler or processors raised.

    Those have some token, which means nothing.
    """

    tokens: mx.array
    logprobs: mx.array
    failed: dict[int, Exception]


def choose(logits: mx.array, rows: Sequence[Row]) -> Choice:
    """The next token of each row of logits [S, V]."""
    failed: dict[int, Exception] = {}
    if any(row.chooser.processors for row in rows):
        parts = []
        for i, row in enumerate(rows):
            part = logits[i : i + 1]
            try:
                changed = row.chooser.process(part, row.known, row.latest)
                if changed.shape != part.shape:
                    raise ValueError(
                        f"a logits processor made {list(changed.shape)} of {list(part.shape)}"
                    )
                part = changed
            except Exception as problem:
                failed[i] = problem
            parts.append(part)
        logits = mx.concatenate(parts)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    groups: dict[object, list[int]] = {}
    for i, row in enumerate(rows):
        chooser = row.chooser
        key = ("alone", i) if chooser.seed is not None else id(chooser.sampler)
        groups.setdefault(key, []).append(i)
    if len(groups) == 1 and not failed:
        return Choice(_drawn(rows, list(range(len(rows))), logprobs, failed), logprobs, failed)
    tokens, order = [], []
    for places in groups.values():
        part = logprobs[mx.array(places)] if len(places) > 1 else logprobs[places[0]][None]
        tokens.append(_drawn(rows, places, part, failed))
        order += places
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return Choice(mx.concatenate(tokens)[mx.array(inverse)], logprobs, failed)


def _drawn(
    rows: Sequence[Row], places: list[int], logprobs: mx.array, failed: dict[int, Exception]
) -> mx.array:
    """Tokens [n] of rows with one sampler. If it raises, it is asked for each row alone."""
    try:
        return _tokens(rows[places[0]].chooser, logprobs)
    except Exception as problem:
        if len(places) == 1:
            failed[places[0]] = problem
            return mx.zeros((1,), mx.int32)
    parts = [logprobs[i : i + 1] for i in range(len(places))]
    return mx.concatenate(
        [_drawn(rows, [place], part, failed) for place, part in zip(places, parts, strict=True)]
    )


def _tokens(chooser: Chooser, logprobs: mx.array) -> mx.array:
    tokens = chooser.draw(logprobs)
    if not isinstance(tokens, mx.array) or tokens.shape != logprobs.shape[:1]:
        got = list(tokens.shape) if isinstance(tokens, mx.array) else type(tokens).__name__
        raise TypeError(f"a sampler gave {got} for log-probabilities {list(logprobs.shape)}")
    return tokens
