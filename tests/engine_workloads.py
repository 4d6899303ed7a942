"""Random workloads for the engine, and what must hold after every step and at the end."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import StopSequences
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache
from mlxrewrite.runtime.batch import logits_of
from mlxrewrite.runtime.cache import PagedCache
from mlxrewrite.runtime.engine import Engine, Request
from mlxrewrite.runtime.memory import most_blocks
from mlxrewrite.runtime.quantized import quantization
from runtime_models.pairs import make_pair

VOCABULARY = 97
TIE = 1e-4  # logits closer than this may change places: they are sums in another order
MODELS = (*("plain",) * 7, "shared_windows", "shared_windows", "hybrid")


@dataclass(slots=True)
class Outcome:
    """What came of one schedule."""

    requests: int = 0
    tokens: int = 0
    ties: int = 0
    aborted: int = 0
    preemptions: int = 0
    reused: int = 0
    copied: int = 0
    evictions: int = 0
    accepted: int = 0
    steps: int = 0

    def __iadd__(self, other: Outcome) -> Outcome:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


@dataclass(slots=True)
class _Wanted:
    request: Request
    arrival: int
    abort: int | None
    stop: tuple[tuple[int, ...], ...]
    follows: int | None = None
    name: int = -1
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    boundaries: list[int] = field(default_factory=list)


class Pairs:
    """The models, made once."""

    models: tuple[str, ...] = MODELS
    options: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self._made: dict[str, tuple[Any, Any]] = {}

    def __getitem__(self, name: str) -> tuple[Any, Any]:
        if name not in self._made:
            self._made[name] = self.make(name)
        return self._made[name]

    def make(self, name: str) -> tuple[Any, Any]:
        # One layer says as much about the engine as three.
        layers = {"num_layers": 1} if name == "plain" else {}
        return make_pair(name, 1, **layers)


class QuantisedPairs(Pairs):
    """The same with heads of 32 and caches of codes. What stands for the original of a model is the
    original over mlx_lm's own quantised caches, and where mlx_lm has none (windows), the rewritten
    model over a paged cache of its own, one request and one step."""

    models = (*("plain",) * 5, "shared_windows")

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.options = {"kv_bits": bits, "kv_group_size": 32}

    def make(self, name: str) -> tuple[Any, Any]:
        wide = {"num_layers": 1} if name == "plain" else {"value_dim": 32}
        original, rewritten = make_pair(name, 1, width=128, **wide)
        how = quantization(self.options["kv_bits"], self.options["kv_group_size"])
        if name == "plain":
            original.make_cache = lambda: [QuantizedKVCache(32, how.bits) for _ in original.layers]
            return original, rewritten
        return _Alone(rewritten, how), rewritten


class _Alone:
    """A rewritten model in the place of an original: one text in one step, nothing reused."""

    def __init__(self, model: Any, how: Any) -> None:
        self._model, self._how = model, how

    def make_cache(self) -> list[Any]:
        return []

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        assert not cache, "prompt caches of windows are not quantised: nothing to compare with"
        paged = PagedCache(self._model, 64, num_blocks=8, quantization=self._how)
        return paged.step({paged.add_sequence(): tokens[0].tolist()}, "all")[None]


class RandomDrafter:
    """Guesses that are sometimes right: those of an oracle, with mistakes."""

    def __init__(self, original: Any, chance: random.Random, most: int) -> None:
        self.most = most
        self._original = original
        self._chance = chance

    def propose(self, texts: Any) -> dict[int, list[int]]:
        found = {}
        for name, text in texts.items():
            if self._chance.random() < 0.3:
                continue
            guesses: list[int] = []
            for _ in range(self._chance.randint(1, self.most)):
                if self._chance.random() < 0.3:
                    guesses.append(self._chance.randrange(VOCABULARY))
                else:
                    guesses.append(int(_logits(self._original, [*text, *guesses])[-1].argmax()))
            found[name] = guesses
        return found

    def forget(self, request: int) -> None:
        del request


def run(seed: int, pairs: Pairs) -> Outcome:
    """One random schedule; raises AssertionError where anything is wrong."""
    chance = random.Random(seed)
    name = chance.choice(pairs.models)
    original, rewritten = pairs[name]
    wanted = _requests(chance)
    size = chance.randint(1, 8)
    rows = chance.choice((1, 3, 8, 8, 16, 40))
    drafter = None
    if name != "hybrid" and chance.random() < 0.2:
        drafter = RandomDrafter(original, chance, chance.randint(1, 4))
    longest = max(len(w.request.prompt) + w.request.max_tokens + w.request.keep for w in wanted)
    longest += 10
    rollback = 0 if drafter is None else drafter.most + 1
    retentions = [g for g, _ in _groups(rewritten, size)]
    least = max(most_blocks(r, longest, size, 1, rollback) for r in retentions)
    engine = Engine(
        rewritten,
        block_size=size,
        num_blocks=least + chance.choice((0, 0, 0, 0, 2, 5, 40)),
        max_rows=rows,
        max_running=min(rows, chance.choice((1, 3, 8, 8))),
        reuse=chance.random() < 0.9,
        drafter=drafter,
        poison=chance.random() < 0.1,
        shuffle_seed=chance.choice((None, seed)),
        **pairs.options,
    )
    engine._overlap = chance.random() < 0.3  # as on devices whose kernels write in place
    by_name: dict[int, _Wanted] = {}
    aborted = 0
    step = 0
    while step <= max(w.arrival for w in wanted) or engine.busy:
        for one in wanted:
            if one.arrival == step:
                _follow(one, wanted, longest)
                one.name = engine.add(one.request)
                by_name[one.name] = one
            if one.abort == step and one.name >= 0 and one.reason is None:
                engine.abort(one.name)
                one.reason = "aborted"
                aborted += 1
        result = engine.step()
        for event in result.tokens:
            one = by_name[event.request]
            assert one.reason is None, "a token after the end"
            one.tokens.append(event.token)
            one.reason = event.finish_reason
            if event.finish_reason and one.request.keep and not isinstance(original, _Alone):
                assert event.tokens == [*one.request.prompt, *one.tokens]
                _check_caches(original, event.caches, event.tokens)
        for progress in result.progress:
            if progress.boundary:
                one = by_name[progress.request]
                one.boundaries.append(progress.computed)
                assert engine.computed(one.name) == list(one.request.prompt[: progress.computed])
        check_invariants(engine)
        step += 1
        assert step < 20_000, "the engine does not end"
    outcome = Outcome(len(wanted), aborted=aborted, steps=step)
    assert engine.store is not None
    for retention, free in engine.store.cache.free_blocks.items():
        assert free == engine.store.cache.num_blocks(retention), "blocks are lost"
    for one in wanted:
        outcome.tokens += len(one.tokens)
        outcome.ties += _check(original, one)
    outcome.preemptions = engine.preemptions
    outcome.reused = engine.store.stats.reused
    outcome.copied = engine.store.stats.copied_blocks
    outcome.accepted = engine.stats.accepted
    return outcome


def _groups(model: Any, size: int) -> Any:
    return PagedCache(model, size, num_blocks=1).groups


def _requests(chance: random.Random) -> list[_Wanted]:
    bases = [[chance.randrange(VOCABULARY) for _ in range(30)] for _ in range(2)]
    bases.append(bases[0][: chance.randint(1, 4)] * 30)  # equal blocks after unequal ones
    found = []
    crowded = chance.random() < 0.4  # short prompts, long answers: all get in, and then it is full
    for _ in range(chance.randint(1, 8) + 2 * crowded):
        base = chance.choice(bases)
        cut = chance.choice((1, 3) if crowded else (3, 10, 30, chance.randint(0, 30)))
        prompt = base[:cut]
        prompt += [chance.randrange(VOCABULARY) for _ in range(chance.choice((0, 1, 1, 4)))]
        prompt = prompt or [1]
        stop: tuple[tuple[int, ...], ...] = ()
        if chance.random() < 0.4:
            stop = (*tuple((token,) for token in range(0, VOCABULARY, 5)), (7, 3), (1, 2, 4))
        places = range(1, len(prompt))
        boundaries = sorted(chance.sample(places, min(len(places), chance.randint(0, 2))))
        arrival = chance.choice((0, 0, 0, chance.randint(0, 30)))
        request = Request(
            prompt,
            max_tokens=20 if crowded else chance.choice((1, 4, 12, 20)),
            stop=StopSequences(stop) if stop else None,
            boundaries=boundaries if chance.random() < 0.3 else (),
            keep=chance.random() < 0.15,
            logprobs=chance.random() < 0.1,
        )
        abort = arrival + chance.randint(0, 25) if chance.random() < 0.2 else None
        follows = chance.randrange(len(found)) if found and chance.random() < 0.3 else None
        if follows is not None:
            arrival = found[follows].arrival + 10 + chance.randint(0, 30)
            abort = None
        found.append(_Wanted(request, arrival, abort, stop, follows))
    return found


def _follow(one: _Wanted, wanted: list[_Wanted], longest: int) -> None:
    """A conversation goes on: the prompt is all of another request's text and some more."""
    if one.follows is None or wanted[one.follows].reason not in ("stop", "length"):
        return
    before = wanted[one.follows]
    prompt = [*before.request.prompt, *before.tokens, *one.request.prompt[:2]]
    if len(prompt) + one.request.max_tokens + 1 <= longest:
        one.request = replace(one.request, prompt=prompt, boundaries=())


def check_invariants(engine: Engine) -> None:
    """Every block is free, kept or held; who holds it is counted; nobody writes to a shared one."""
    if engine.store is None:
        return
    cache, size = engine.store.cache, engine.store.cache.block_size
    for index, (_, allocator) in enumerate(cache.groups):
        if allocator is None:
            continue
        holders: Counter[int] = Counter()
        for sequence in cache._sequences:
            table = cache.tables(sequence)[index]
            assert len(set(table.blocks)) == len(table.blocks)
            holders.update(table.blocks)
            length = cache.length(sequence)
            assert (table.dropped + len(table.blocks)) * size >= length, "positions without a block"
            for place in range(max(0, length // size - table.dropped), len(table.blocks)):
                block = table.blocks[place]
                assert allocator.references(block) == 1, "a block that is written to is shared"
        for block in range(allocator.num_blocks):
            assert allocator.references(block) == holders[block], "wrong number of references"
        free, kept = set(allocator._free), set(allocator._kept)
        assert len(free) == len(allocator._free)
        assert not free & kept and not (free | kept) & set(holders)
        assert len(free) + len(kept) + len(holders) == allocator.num_blocks, "a block is lost"
    names = engine.store._index
    for group in [] if names is None else names._used:
        assert {block: digest for digest, block in group.blocks.items()} == group.hashes
        assert not set(group.hashes) & set(group.allocator._free), "a free block has a name"
    scheduler = engine._scheduler
    assert scheduler is not None
    assert len(scheduler.running) <= scheduler._max_running
    assert {job.sequence for job in scheduler.running} == set(cache._sequences)
    assert all(job.sequence < 0 for job in scheduler.waiting)


def _check(original: Any, one: _Wanted) -> int:
    """Every token is the original's next one, up to ties; returns how many those were."""
    prompt, tokens = list(one.request.prompt), one.tokens
    if one.reason == "aborted":
        assert len(tokens) <= one.request.max_tokens
    else:
        stopped = any(tokens[-len(s) :] == list(s) for s in one.stop)
        assert one.reason == ("stop" if stopped else "length"), one.reason
        assert stopped or len(tokens) == one.request.max_tokens
        assert one.boundaries == list(one.request.boundaries)
    for end in range(1, len(tokens)):
        assert not any(end >= len(s) and tokens[end - len(s) : end] == list(s) for s in one.stop)
    if not tokens:
        return 0
    logits = _logits(original, prompt + tokens[:-1])[len(prompt) - 1 :]
    ties = 0
    for row, token in zip(logits, tokens, strict=True):
        assert row[token] >= row.max() - TIE, "another token than the original's"
        ties += int(row.argmax()) != token
    return ties


def _logits(original: Any, tokens: list[int]) -> np.ndarray:
    logits = logits_of(original(mx.array([tokens]), cache=make_prompt_cache(original)))
    return np.array(logits[0].astype(mx.float32))


def _check_caches(original: Any, caches: Any, tokens: list[int]) -> None:
    """Prompt caches continue in the original model as its own do."""
    probe = [5, 9]
    mine = np.array(logits_of(original(mx.array([probe]), cache=caches))[0].astype(mx.float32))
    theirs = _logits(original, tokens + probe)[-len(probe) :]
    assert np.abs(mine - theirs).max() < TIE, "the caches hold something else"
