"""The engine: random workloads against the original models, and one test for each promise."""

import time
from collections.abc import Callable

import mlx.core as mx
import pytest
from engine_workloads import Outcome, Pairs, run
from mlx_lm.generate import StopSequences, generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlxrewrite.runtime.blocks import BlockAllocator
from mlxrewrite.runtime.cache import PagedCache
from mlxrewrite.runtime.engine import Engine, Request
from mlxrewrite.runtime.errors import RuntimeRefusal
from mlxrewrite.runtime.prefix import PrefixIndex
from mlxrewrite.runtime.scheduler import Scheduler
from mlxrewrite.runtime.store import PagedStore
from runtime_models.pairs import make_pair

PROMPTS = [[5, 9, 2, 7, 7, 1], [3], list(range(40, 75)), [5, 9, 2, 7, 7, 1, 4, 4]]


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return Pairs()


# ------------------------------------------------------------------ random workloads


@pytest.mark.parametrize(
    ("first", "count"), [(0, 100), pytest.param(10_000, 300, marks=pytest.mark.slow)]
)
def test_random_workloads(first: int, count: int, pairs: Pairs) -> None:
    total = Outcome()
    for seed in range(first, first + count):
        total += run(seed, pairs)
    # All of it happened.
    assert total.preemptions > 5
    assert total.reused > 200
    assert total.copied > 10
    assert total.aborted > 10
    assert total.accepted > 20
    assert total.ties <= total.tokens / 1000


def _no_copy(patch: pytest.MonkeyPatch) -> None:
    """The last block of a shared beginning is written to by both."""
    plain = PagedCache.adopt

    def adopt(self, tables, length, snapshot=None):
        kept, self.block_size = self.block_size, 1
        try:
            return plain(self, tables, length, snapshot)
        finally:
            self.block_size = kept

    patch.setattr(PagedCache, "adopt", adopt)


def _names_without_parents(patch: pytest.MonkeyPatch) -> None:
    from mlxrewrite.runtime import prefix

    plain = prefix.chain
    patch.setattr(prefix, "chain", lambda parent, tokens: plain(b"", tokens))


def _preempted_goes_on(patch: pytest.MonkeyPatch) -> None:
    """The tokens computed before a preemption count as computed after it."""
    plain = Scheduler._admit

    def admit(self, job):
        before, done = len(job.tokens), plain(self, job)
        if done and self.preemptions and before > 3:
            job.computed = max(job.computed, 2)
        return done

    patch.setattr(Scheduler, "_admit", admit)


def _blocks_stay(patch: pytest.MonkeyPatch) -> None:
    plain = BlockAllocator.release
    patch.setattr(BlockAllocator, "release", lambda self, blocks: plain(self, list(blocks)[1:]))


def _evicted_keeps_its_name(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefixIndex, "_evicted", lambda self, group, then, block: None)


def _named_too_early(patch: pytest.MonkeyPatch) -> None:
    """Blocks get the names of tokens that are not in them: the last one's row is never computed."""
    plain = PagedStore.name

    def name(self, sequence, tokens, count, *, ending=False):
        plain(self, sequence, tokens, len(tokens) if ending else count, ending=ending)

    patch.setattr(PagedStore, "name", name)


def _guesses_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "_cut_back", lambda self, job, length: None)


@pytest.mark.parametrize(
    "bug",
    [
        _no_copy,
        _names_without_parents,
        _preempted_goes_on,
        _blocks_stay,
        _evicted_keeps_its_name,
        _named_too_early,
        _guesses_believed,
    ],
)
def test_seeded_bugs_are_seen(
    bug: Callable[[pytest.MonkeyPatch], None], pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    with pytest.raises((AssertionError, ValueError, KeyError, RuntimeError, RuntimeRefusal)):
        for seed in range(200):
            run(seed, pairs)


# ---------------------------------------------------------------------- one by one


def alone(model, prompt, count, **options):
    return [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=count, **options)]


def test_logits_processors_and_samplers_of_each_request() -> None:
    original, rewritten = make_pair("plain", 3)
    engine = Engine(rewritten, block_size=4)
    choices = [
        {},
        {"logits_processors": make_logits_processors(repetition_penalty=1.7)},
        {"logits_processors": make_logits_processors({3: 4.0}, presence_penalty=2.0)},
        {"sampler": lambda x: mx.argmin(x, axis=-1)},
    ]
    names = [
        engine.add(
            Request(
                prompt,
                max_tokens=15,
                processors=tuple(c.get("logits_processors", ())),
                **({"sampler": c["sampler"]} if "sampler" in c else {}),
            )
        )
        for prompt, c in zip(PROMPTS, choices, strict=True)
    ]
    found = engine.run()
    for name, prompt, choice in zip(names, PROMPTS, choices, strict=True):
        assert found[name] == alone(original, prompt, 15, **choice)
    assert found[names[0]] != found[names[3]]


def test_seeds_are_those_of_mlx_lm_alone() -> None:
    """Whoever else samples in the same steps, also after a preemption."""
    original, rewritten = make_pair("plain", 3)
    sampler = make_sampler(temp=1.0, top_k=20)
    engine = Engine(rewritten, block_size=2, num_blocks=28, max_rows=8, max_running=4)
    plain = engine.add(Request([1, 2, 3], max_tokens=20, sampler=sampler))
    names = [
        engine.add(Request(prompt, max_tokens=16, sampler=sampler, seed=seed))
        for seed, prompt in enumerate(PROMPTS)
    ]
    mx.random.seed(77)
    found = engine.run()
    assert engine.preemptions
    for seed, (name, prompt) in enumerate(zip(names, PROMPTS, strict=True)):
        mx.random.seed(seed)
        assert found[name] == alone(original, prompt, 16, sampler=sampler)
    assert len(found[plain]) == 20


def test_logprobs_are_the_originals() -> None:
    original, rewritten = make_pair("shared_windows", 3)
    engine = Engine(rewritten, block_size=4)
    wanted = engine.add(Request(PROMPTS[2], max_tokens=6, logprobs=True))
    other = engine.add(Request(PROMPTS[0], max_tokens=9))
    rows = []
    while engine.busy:
        for event in engine.step().tokens:
            if event.request == other:
                assert event.logprobs is None
            else:
                assert event.logprobs is not None and event.chosen is not None
                assert abs(event.logprobs[event.token].item() - event.chosen) < 1e-6
                rows.append((event.token, event.logprobs))
    theirs = list(generate_step(mx.array(PROMPTS[2]), original, max_tokens=6))
    assert wanted == 0
    for (token, mine), (their_token, logprobs) in zip(rows, theirs, strict=True):
        assert token == int(their_token)
        assert mx.abs(mine - logprobs).max().item() < 1e-4


def test_stop_sequences_end_a_request() -> None:
    original, rewritten = make_pair("plain", 3)
    plain = alone(original, PROMPTS[0], 20)
    engine = Engine(rewritten)
    name = engine.add(Request(PROMPTS[0], 20, stop=StopSequences([plain[5:8]])))
    other = engine.add(Request(PROMPTS[0], 20))
    events = []
    while engine.busy:
        events += engine.step().tokens
    mine = [event for event in events if event.request == name]
    assert [event.token for event in mine] == plain[:8]
    assert [event.finish_reason for event in mine] == [None] * 7 + ["stop"]
    assert [event.token for event in events if event.request == other] == plain


def test_a_shared_beginning_is_read_once() -> None:
    _, rewritten = make_pair("plain", 3)
    engine = Engine(rewritten, block_size=4, num_blocks=60)
    first = engine.add(Request(PROMPTS[2], 4))
    tokens = engine.run()[first]
    read = engine.stats.prompt_rows
    second = engine.add(Request(PROMPTS[2], 4))
    assert engine.run()[second] == tokens
    assert engine.stats.prompt_rows - read == 1  # a whole prompt is never skipped
    assert engine.store is not None
    assert engine.store.stats.reused == len(PROMPTS[2]) - 1
    # A conversation goes on: the answer is known too, but for its last token.
    longer = PROMPTS[2] + tokens + [8, 8]
    engine.add(Request(longer, 4))
    engine.run()
    assert engine.store.stats.reused == 2 * len(PROMPTS[2]) - 1 + len(tokens) - 1


def test_aborted_requests_leave_nothing() -> None:
    original, rewritten = make_pair("plain", 3)
    engine = Engine(rewritten, block_size=4, num_blocks=60)
    names = [engine.add(Request(prompt, 30)) for prompt in PROMPTS]
    for _ in range(5):
        engine.step()
    for name in names[1:]:
        engine.abort(name)
    engine.abort(names[1])
    found = [event for _ in range(60) for event in engine.step().tokens]
    assert {event.request for event in found} == {names[0]}
    assert not engine.busy
    assert engine.store is not None
    assert set(engine.store.cache.free_blocks.values()) == {60}
    assert [e.token for e in found] == alone(original, PROMPTS[0], 30)[-len(found) :]


def test_what_can_never_fit_is_refused_with_numbers() -> None:
    _, rewritten = make_pair("plain", 3)
    engine = Engine(rewritten, block_size=4, num_blocks=5)
    with pytest.raises(RuntimeRefusal, match=r"35 tokens .* 20 positions"):
        engine.add(Request(PROMPTS[2], 4))
    with pytest.raises(RuntimeRefusal, match="empty prompt"):
        engine.add(Request([]))
    with pytest.raises(RuntimeRefusal, match=r"max_tokens.*got 0"):
        engine.add(Request([1], 0))
    with pytest.raises(RuntimeRefusal, match=r"need .* MiB"):
        Engine(rewritten, kv_memory=10)
    # An answer that would grow out of the caches ends with them.
    name = engine.add(Request(PROMPTS[0], 500))
    assert len(engine.run()[name]) == 20 - len(PROMPTS[0])


@pytest.mark.parametrize("prompt", [[97], [3, 10**12], [-1], ["x"], [1.5], [[1]]])
def test_what_is_no_token_of_the_model_is_refused(prompt: list[object]) -> None:
    """MLX reads beyond the table of embeddings, and the process may end."""
    original, rewritten = make_pair("plain", 3)
    engine = Engine(rewritten, block_size=4)
    with pytest.raises(RuntimeRefusal, match=r"tokens 0 to 96|numbers of tokens"):
        engine.add(Request(prompt, 4))  # type: ignore[arg-type]
    assert not engine.busy
    cache = make_prompt_cache(original)
    mx.eval(original(mx.array([[1, 2]]), cache=cache))
    with pytest.raises(RuntimeRefusal, match="tokens 0 to 96"):
        engine.add(Request([3], 4, caches=cache, before=[1, 97]))
    name = engine.add(Request(mx.array([96, 5]), 4))  # type: ignore[arg-type]
    assert engine.run()[name] == alone(original, [96, 5], 4)


@pytest.mark.parametrize("drop", [0, 1, 2])
def test_a_request_may_leave_while_its_prompt_is_read(drop: int) -> None:
    """Also one whose blocks others took for their own beginning."""
    original, rewritten = make_pair("plain", 3)
    prompts = [PROMPTS[2], PROMPTS[2], PROMPTS[0]]
    engine = Engine(rewritten, block_size=4, num_blocks=40, max_rows=4, max_running=4)
    names = [engine.add(Request(prompt, 8)) for prompt in prompts]
    for _ in range(3 + drop):
        assert engine.step().tokens == []
    assert len(engine.computed(names[0])) < len(PROMPTS[2])
    engine.abort(names[drop])
    found = engine.run()
    for at, prompt in enumerate(prompts):
        if at != drop:
            assert found[names[at]] == alone(original, prompt, 8)
    assert engine.store is not None
    assert set(engine.store.cache.free_blocks.values()) == {40}


def test_memory_is_what_was_asked_for() -> None:
    _, rewritten = make_pair("shared_windows", 3)
    engine = Engine(rewritten, block_size=4, kv_memory=200_000, max_running=3, max_rows=16)
    engine.add(Request([1, 2, 3], 3))
    engine.run()
    assert engine.store is not None
    leaves = engine.store.cache.leaves.values()
    size = sum(leaf.pool.pool.nbytes for leaf in leaves if leaf.pool.made)
    assert 150_000 < size <= 200_000


def test_a_pool_grows_when_a_request_needs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxrewrite.runtime import engine as module

    monkeypatch.setattr(module, "ELASTIC_POSITIONS", 16)
    monkeypatch.setattr(module, "USUAL_TOKENS", 4)
    original, rewritten = make_pair("plain", 3)
    engine = Engine(rewritten, block_size=4)
    first = engine.add(Request([1, 2], 4))
    assert engine.run()[first] == alone(original, [1, 2], 4)
    second = engine.add(Request(PROMPTS[2], 30))
    assert engine.run()[second] == alone(original, PROMPTS[2], 30)


@pytest.mark.parametrize("name", ["plain", "shared_windows", "hybrid", "hybrid_model"])
def test_prompt_caches_go_in_and_out(name: str) -> None:
    """mlx_lm's caches begin a request, and those of a request go on in mlx_lm."""
    original, rewritten = make_pair(name, 3)
    prompt, more = PROMPTS[2], [8, 1, 6]
    cache = make_prompt_cache(original)
    mx.eval(original(mx.array([prompt]), cache=cache))
    expected = alone(original, prompt + more, 12)
    engine = Engine(rewritten, block_size=4)
    known = engine.add(Request(more, 12, caches=cache, before=prompt, keep=True))
    unknown = engine.add(Request(more, 12, caches=cache))
    tokens: dict[int, list[int]] = {known: [], unknown: []}
    kept = None
    while engine.busy:
        for event in engine.step().tokens:
            tokens[event.request].append(event.token)
            kept = event.caches or kept
    assert tokens == {known: expected, unknown: expected}
    assert max(getattr(entry, "offset", 0) for entry in cache) == len(prompt)
    assert kept is not None
    going_on = alone(original, [4, 4], 10, prompt_cache=kept)
    assert going_on == alone(original, prompt + more + expected + [4, 4], 10)


def test_the_next_step_is_built_while_one_runs() -> None:
    """A step's tokens come out of the call after the one that launched it."""
    _, rewritten = make_pair("plain", 3)
    engine = Engine(rewritten)
    engine.add(Request([1, 2, 3], 3))
    assert engine.step().tokens == []
    assert [len(engine.step().tokens) for _ in range(3)] == [1, 1, 1]
    assert not engine.busy


def test_waiting_for_the_device_is_not_overhead() -> None:
    _, rewritten = make_pair("plain", 3)
    engine = Engine(rewritten)
    engine.add(Request([1, 2, 3], 30))
    began = time.perf_counter()
    engine.run()
    assert 0 < engine.stats.waited < engine.stats.seconds < time.perf_counter() - began


def test_blocks_of_a_sequence_follow_each_other_where_sequences_are_read_in_place() -> None:
    """MLX's CPU back end reads such a sequence as it lies, and copies others at every step."""
    allocator = BlockAllocator(64, spread=True)
    tables: list[list[int]] = [[] for _ in range(6)]
    for table in tables:
        table.extend(allocator.allocate(3))
    for _ in range(3):
        for table in tables:
            table.extend(allocator.allocate(1, table[-1]))
    for table in tables:
        assert table == list(range(table[0], table[0] + 6))
    allocator.release(tables[2])
    rest = allocator.allocate(allocator.num_free)
    assert sorted(rest + [b for i, t in enumerate(tables) if i != 2 for b in t]) == list(range(64))
    assert allocator.num_free == 0
    _, rewritten = make_pair("plain", 3)
    engine = Engine(rewritten, block_size=4)
    names = [engine.add(Request(prompt, max_tokens=20)) for prompt in PROMPTS]
    for _ in range(12):
        engine.step()
    assert engine.store is not None
    for name in names:
        blocks = engine.store.cache.tables(engine._jobs[name].sequence)[0].blocks
        assert blocks == list(range(blocks[0], blocks[0] + len(blocks)))
