"""Drafters: guesses of the next tokens, which the engine computes together and keeps where right.

Greedy answers are the same with and without guesses. Where tokens are drawn, each row is drawn from
its own distribution and a guess counts if it is what was drawn, so the distribution is the same too
(after Leviathan et al., Fast Inference from Transformers via Speculative Decoding, ICML 2023, for
drafts without probabilities of their own).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
from mlxrewrite.kernels import policy

from .batch import Sampled
from .cache import PagedCache
from .errors import OutOfBlocks, RuntimeRefusal
from .memory import footprint

CHUNK = 512  # rows of a step in which a draft model reads


def require_cut_back(everything: bool) -> None:
    """Guesses that were wrong are taken back; state of a recurrent mixer cannot be."""
    if not everything:
        raise RuntimeRefusal(
            "guesses need caches that can be cut back, and this model keeps state: serve it "
            "without a drafter"
        )


@dataclass(slots=True, eq=False)
class _Seen:
    """Where each run of tokens last ended, for one request."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    length: int = 0


class NgramDrafter:
    """Guesses that a text goes on as it did after the last time that its end occurred in it.

    `longest` to `shortest` tokens of the end are looked for, up to `most` tokens guessed.
    """

    def __init__(self, most: int = 4, longest: int = 4, shortest: int = 2) -> None:
        if most < 1 or not 1 <= shortest <= longest:
            raise RuntimeRefusal(
                f"expected most >= 1 and 1 <= shortest <= longest, got {most}, {shortest} and "
                f"{longest}"
            )
        self.most = most
        self._sizes = range(longest, shortest - 1, -1)
        self._seen: dict[int, _Seen] = {}

    def propose(self, texts: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        found = {}
        for name, text in texts.items():
            guesses = self._guess(self._seen.setdefault(name, _Seen()), text)
            if guesses:
                found[name] = guesses
        return found

    def forget(self, request: int) -> None:
        self._seen.pop(request, None)

    def _guess(self, seen: _Seen, text: Sequence[int]) -> list[int]:
        # Runs that end before the last token: that one is what is looked for.
        for end in range(max(1, seen.length), len(text)):
            for size in self._sizes:
                if size <= end:
                    seen.ends[tuple(text[end - size : end])] = end
        seen.length = max(seen.length, len(text))
        for size in self._sizes:
            last = seen.ends.get(tuple(text[-size:])) if size <= len(text) else None
            if last is not None:
                return list(text[last : last + self.most])
        return []


@dataclass(slots=True, eq=False)
class _Draft:
    """One request in the draft model's cache: the tokens that are in it."""

    sequence: int
    tokens: list[int] = field(default_factory=list)


class ModelDrafter:
    """Guesses of a smaller model with the same tokens, all requests in one batch.

    Its caches have `num_blocks` blocks; a request that finds no room there is not guessed for.
    """

    def __init__(
        self, model: Any, most: int = 4, *, block_size: int = 16, num_blocks: int = 1024
    ) -> None:
        if most < 1:
            raise RuntimeRefusal(f"most: expected at least 1, got {most}")
        require_cut_back(footprint(model, block_size).everything)
        self.most = most
        self._cache = PagedCache(model, block_size, num_blocks=num_blocks, rollback=most + CHUNK)
        self._drafts: dict[int, _Draft] = {}

    def propose(self, texts: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        missing = {name: self._begin(name, list(text)) for name, text in texts.items()}
        while any(len(tokens) > CHUNK for tokens in missing.values()):
            part = {name: tokens[:CHUNK] for name, tokens in missing.items() if len(tokens) > CHUNK}
            self._step(part)
            for name in part:
                missing[name] = missing[name][CHUNK:]
            missing = {name: missing[name] for name in missing if name in self._drafts}
        names = [name for name in missing if name in self._drafts]
        tokens = self._step({name: missing[name] for name in names})
        columns = [] if tokens is None else [tokens]
        names = [name for name in names if name in self._drafts]
        while columns and len(columns) < self.most:
            latest = columns[-1]
            given = {name: Sampled(latest, i) for i, name in enumerate(names)}
            tokens = self._step(given)
            if tokens is None or len([n for n in names if n in self._drafts]) < len(names):
                break  # no room: what was guessed so far is enough
            columns.append(tokens)
        if not columns:
            return {}
        rows = cast(list[list[int]], mx.stack(columns, axis=1).tolist())
        found = {}
        for name, row in zip(names, rows, strict=True):
            draft = self._drafts.get(name)
            if draft is not None:
                draft.tokens += row[: self._cache.length(draft.sequence) - len(draft.tokens)]
            found[name] = row
        return found

    def forget(self, request: int) -> None:
        draft = self._drafts.pop(request, None)
        if draft is not None:
            self._cache.free(draft.sequence)

    def _begin(self, name: int, text: list[int]) -> list[int]:
        """The tokens that are not in the cache yet, after taking out those that were wrong."""
        draft = self._drafts.get(name)
        if draft is None:
            draft = self._drafts[name] = _Draft(self._cache.add_sequence())
        same = _common(draft.tokens, text[:-1])
        if same < len(draft.tokens):
            self._cache.truncate(draft.sequence, same)
            del draft.tokens[same:]
        return text[same:]

    def _step(self, given: Mapping[int, list[int] | Sampled]) -> mx.array | None:
        """Append tokens; the likeliest next ones [n], of requests that found room."""
        tokens: dict[int, list[int] | Sampled] = {}
        for name, new in given.items():
            draft = self._drafts[name]
            if self._cache.reserve(draft.sequence, len(new)) < len(new):
                self.forget(name)
                continue
            tokens[draft.sequence] = new
            if isinstance(new, list):
                draft.tokens += new
        if not tokens:
            return None
        try:
            found = mx.argmax(self._cache.step(tokens), axis=-1)
        except OutOfBlocks:  # the first step of all, which finds out what is paged
            for name in given:
                self.forget(name)
            return None
        if policy.writes_in_place():
            mx.async_eval(found, self._cache.arrays())  # type: ignore[no-untyped-call]
        else:
            mx.eval(found, self._cache.arrays())
        return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
