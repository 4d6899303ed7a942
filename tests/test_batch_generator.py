"""The engine under the interface of mlx_lm's BatchGenerator, beside mlx_lm's own."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from generators import PROMPTS, alone, drain
from mlx_lm.generate import BatchGenerator, StopSequences, batch_generate
from mlx_lm.models import mamba2
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlxrewrite.runtime import batch_generator as module
from mlxrewrite.runtime.batch_generator import PagedBatchGenerator
from mlxrewrite.runtime.engine import Request
from mlxrewrite.runtime.errors import RuntimeRefusal
from mlxrewrite.runtime.load import rewritten_module
from mlxrewrite.runtime.rebind import rebound
from mlxrewrite.runtime.sampling import Seeded
from mlxrewrite.runtime.weights import randomise
from runtime_models.pairs import make_pair


def tokens_of(found):
    return {uid: [response.token for response in part] for uid, part in found.items()}


def test_responses_are_those_of_mlx_lm() -> None:
    original, rewritten = make_pair("plain", 3)
    theirs = BatchGenerator(original, max_tokens=9, stop_tokens=[[11], [4, 4]])
    mine = PagedBatchGenerator(rewritten, max_tokens=9, stop_tokens=[[11], [4, 4]], block_size=4)
    for generator in (theirs, mine):
        assert generator.insert(PROMPTS, [9, 5, 7, 30]) == [0, 1, 2, 3]
    left, right = drain(theirs), drain(mine)
    for uid in range(4):
        for one, other in zip(left[uid], right[uid], strict=True):
            assert (one.uid, one.token, one.finish_reason) == (
                other.uid,
                other.token,
                other.finish_reason,
            )
            assert mx.abs(one.logprobs - other.logprobs).max().item() < 1e-4
            assert (one.prompt_cache is None) == (other.prompt_cache is None)
            assert one.all_tokens == other.all_tokens
    mine.close()


@pytest.mark.parametrize("name", ["plain", "shared_windows", "hybrid"])
def test_a_conversation_goes_on_with_its_caches(name: str) -> None:
    original, rewritten = make_pair(name, 3)
    mine = PagedBatchGenerator(rewritten, max_tokens=7, block_size=4)
    uids = mine.insert(PROMPTS)
    first = drain(mine)
    more = [[8, 1], [2], [6, 6, 6], [9]]
    caches = [first[uid][-1].prompt_cache for uid in uids]
    again = mine.insert(more, caches=caches)
    second = tokens_of(drain(mine))
    for uid, later, prompt, text in zip(uids, again, PROMPTS, more, strict=True):
        said = [response.token for response in first[uid]]
        assert said == alone(original, prompt, 7)
        assert second[later] == alone(original, prompt + said + text, 7)


def test_segments_end_where_their_caches_can_be_taken() -> None:
    original, rewritten = make_pair("plain", 3)
    mine = PagedBatchGenerator(rewritten, max_tokens=4, block_size=4, prefill_step_size=8)
    segments = [PROMPTS[2][:13], PROMPTS[2][13:20], PROMPTS[2][20:]]
    (uid,) = mine.insert_segments([segments])
    mine.insert([[1, 2, 3]], [20])
    ends, taken = [], []
    while True:
        prompts, tokens = mine.next()
        if not prompts and not tokens:
            break
        for response in prompts:
            if response.uid == uid and response.end_of_segment:
                ends.append((response.progress, response.end_of_prompt))
                if not response.end_of_prompt:
                    taken.append(mine.extract_cache([uid])[uid])
    assert ends == [((13, 35), False), ((20, 35), False), ((34, 35), False), ((35, 35), True)]
    for (caches, tokens), end in zip(taken, (13, 20, 34), strict=True):
        assert tokens == PROMPTS[2][:end]
        assert caches[0].offset == end
        rest = PROMPTS[2][end:]
        assert alone(original, rest, 5, prompt_cache=caches) == alone(original, PROMPTS[2], 5)


def test_removed_requests_give_their_caches() -> None:
    original, rewritten = make_pair("plain", 3)
    mine = PagedBatchGenerator(rewritten, max_tokens=20, block_size=4, completion_batch_size=2)
    mine.prefill_batch_size = 1
    uids = mine.insert(PROMPTS)
    seen = []
    while len(seen) < 6:
        seen += [r.token for r in mine.next()[1] if r.uid == uids[0]]
    assert mine.prompt_cache_nbytes > 0
    found = mine.remove([uids[0]], return_prompt_caches=True)
    caches, tokens = found[uids[0]]
    assert tokens[: len(PROMPTS[0])] == PROMPTS[0]
    assert alone(original, [3, 3], 5, prompt_cache=caches) == alone(original, [*tokens, 3, 3], 5)
    assert uids[0] not in drain(mine)
    assert mine.prompt_cache_nbytes == 0


def test_samplers_processors_and_stops_of_each_request() -> None:
    original, rewritten = make_pair("plain", 3)
    warm = make_sampler(temp=0.9, top_p=0.9)
    processors = make_logits_processors(repetition_penalty=1.5)
    plain = alone(original, PROMPTS[3], 12)
    mine = PagedBatchGenerator(rewritten, max_tokens=12, block_size=4)
    uids = mine.insert(
        PROMPTS,
        samplers=[None, Seeded(warm, 5), lambda x: mx.argmin(x, axis=-1), None],
        logits_processors=[processors, None, [], None],
        stop_sequences=[
            StopSequences(),
            StopSequences(),
            StopSequences(),
            StopSequences([plain[3:5]]),
        ],
    )
    found = tokens_of(drain(mine))
    assert found[uids[0]] == alone(original, PROMPTS[0], 12, logits_processors=processors)
    mx.random.seed(5)
    assert found[uids[1]] == alone(original, PROMPTS[1], 12, sampler=warm)
    coldest = alone(original, PROMPTS[2], 12, sampler=lambda x: mx.argmin(x, axis=-1))
    assert found[uids[2]] == coldest
    end = next(n for n in range(2, 13) if plain[n - 2 : n] == plain[3:5])
    assert found[uids[3]] == plain[:end]


def test_bad_requests_change_nothing() -> None:
    _, rewritten = make_pair("plain", 3)
    mine = PagedBatchGenerator(rewritten, num_blocks=4, block_size=4)
    for bad in (
        {"prompts": [[1], []]},
        {"prompts": [[1], [2]], "max_tokens": [3]},
        {"prompts": [[1], [2]], "max_tokens": [3, 0]},
        {"prompts": [[1]], "samplers": [None, None]},
    ):
        with pytest.raises(ValueError, match="expected"):
            mine.insert(**bad)
    with pytest.raises(RuntimeRefusal, match="does not fit"):
        mine.insert([[1], list(range(40))])
    with pytest.raises(RuntimeRefusal, match="max_kv_size: expected at least 1, got 0"):
        PagedBatchGenerator(rewritten, max_kv_size=0)
    assert mine.next() == ([], [])
    assert mine.next_generated() == []
    assert mine.insert([[1]]) == [0]


def test_counters() -> None:
    _, rewritten = make_pair("plain", 3)
    mine = PagedBatchGenerator(rewritten, max_tokens=5, block_size=4)
    mine.insert(PROMPTS)
    with mine.stats() as stats:
        drain(mine)
    assert stats.generation_tokens == 20
    assert len(PROMPTS[2]) < stats.prompt_tokens <= sum(map(len, PROMPTS))
    assert stats.prompt_time > 0 and stats.decode_time > 0
    assert stats.prompt_time + stats.decode_time <= stats.wall_time


class Words:
    """As much of a tokenizer as batch_generate asks for."""

    eos_token_ids = (11,)

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def test_batch_generate_of_mlx_lm_runs_on_the_engine() -> None:
    original, rewritten = make_pair("plain", 3)
    options = {"max_tokens": [4, 9, 2, 12], "return_token_ids": True, "return_logprobs": True}
    theirs = batch_generate(original, Words(), PROMPTS, **options)
    mine = module.batch_generate(rewritten, Words(), PROMPTS, block_size=4, **options)
    assert mine.texts == theirs.texts
    assert mine.token_ids == theirs.token_ids
    for one, other in zip(mine.logprobs, theirs.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    kept = module.batch_generate(rewritten, Words(), PROMPTS, return_prompt_caches=True)
    again = module.batch_generate(rewritten, Words(), [[1, 2]] * 4, prompt_caches=kept.caches)
    upstream = batch_generate(original, Words(), PROMPTS, return_prompt_caches=True)
    expected = batch_generate(original, Words(), [[1, 2]] * 4, prompt_caches=upstream.caches)
    assert again.texts == expected.texts


def test_without_kept_caches_the_blocks_know() -> None:
    _, rewritten = make_pair("plain", 3)
    mine = PagedBatchGenerator(rewritten, max_tokens=5, block_size=4, keep_caches=False)
    mine.insert(PROMPTS[2:3])
    first = drain(mine)[0]
    assert first[-1].prompt_cache == []
    row = first[0].logprobs
    assert row[first[0].token].item() == pytest.approx(-(-row)[first[0].token].item())
    (again,) = mine.insert([PROMPTS[2][30:]], all_tokens=[PROMPTS[2][:30]])
    assert [r.token for r in drain(mine)[again]] == [r.token for r in first]
    assert mine.engine.store is not None
    assert mine.engine.store.stats.reused == len(PROMPTS[2]) - 1


def test_rebinding_refuses_another_version() -> None:
    with pytest.raises(TypeError, match="does not use Unheard"):
        rebound(batch_generate, Unheard=1)


def test_caches_of_one_model_are_not_those_of_another() -> None:
    original, _ = make_pair("plain", 3)
    _, windows = make_pair("shared_windows", 3)
    cache = make_prompt_cache(original)
    mx.eval(original(mx.array([[1, 2, 3]]), cache=cache))
    mine = PagedBatchGenerator(windows, max_tokens=3)
    with pytest.raises(RuntimeRefusal, match="expected"):
        mine.insert([[4]], caches=[cache])


def test_states_alone_go_on_with_their_caches() -> None:
    """Such caches do not say how long they are; `all_tokens` may, or nobody."""
    config = json.loads((Path(__file__).parent / "configs/mamba2.json").read_text())
    original = mamba2.Model(mamba2.ModelArgs.from_dict(config))
    module = rewritten_module(config)
    rewritten = module.Model(module.ModelArgs.from_dict(config))
    randomise(original, 4)
    rewritten.update(original.parameters())
    mine = PagedBatchGenerator(rewritten, max_tokens=5, block_size=4, completion_batch_size=2)
    uids = mine.insert(PROMPTS)
    ends = {uid: part[-1] for uid, part in drain(mine).items()}
    caches = [ends[uid].prompt_cache for uid in uids]
    before = [ends[uid].all_tokens for uid in uids]
    for said in (None, before):
        again = drain_in_order(mine, mine.insert([[3, 1]] * 4, caches=caches, all_tokens=said))
        for got, tokens in zip(again, before, strict=True):
            assert got == alone(original, [*tokens, 3, 1], 5)
    mine.close()


def drain_in_order(generator, uids):
    found = tokens_of(drain(generator))
    return [found[uid] for uid in uids]


def test_windows_by_an_exchanged_make_cache() -> None:
    """mlx_lm's users give a model other caches by its `make_cache`."""
    original, rewritten = make_pair("plain", 3)
    for model in (original, rewritten):
        model.make_cache = lambda: [RotatingKVCache(max_size=6) for _ in range(3)]
    mine = PagedBatchGenerator(rewritten, max_tokens=9, block_size=4)
    uids = mine.insert(PROMPTS)
    found = drain(mine)
    for uid, prompt in zip(uids, PROMPTS, strict=True):
        assert tokens_of(found)[uid] == alone(original, prompt, 9)
        assert {type(entry) for entry in found[uid][-1].prompt_cache} == {RotatingKVCache}
    mine.close()
    rewritten.make_cache = lambda: [RotatingKVCache(max_size=6, keep=4) for _ in range(3)]
    with pytest.raises(RuntimeRefusal, match="keep=4"):
        PagedBatchGenerator(rewritten).insert(PROMPTS)


def test_max_kv_size_makes_windows_as_upstream() -> None:
    """Of models that make no caches of their own; the model itself stays as it is."""
    original, rewritten = make_pair("plain", 3)
    found = []
    for made in (
        BatchGenerator(original, max_tokens=14, max_kv_size=6),
        PagedBatchGenerator(rewritten, max_tokens=14, max_kv_size=6, block_size=4),
        PagedBatchGenerator(rewritten, max_tokens=14, block_size=4),
    ):
        made.insert(PROMPTS)
        found.append(drain(made))
        made.close()
    theirs, mine, whole = map(tokens_of, found)
    assert mine == theirs != whole
    for uid in mine:
        caches = (responses[uid][-1].prompt_cache for responses in found[:2])
        for one, other in zip(*caches, strict=True):
            assert isinstance(other, RotatingKVCache) and other.max_size == 6
            assert one.offset == other.offset
    # Blocks that left the window are given back.
    engine = PagedBatchGenerator(rewritten, max_kv_size=6, block_size=4, num_blocks=8).engine
    name = engine.add(Request(PROMPTS[0], 100))
    assert len(engine.run()[name]) == 100
    # A model that makes caches keeps them, as upstream.
    _, windows = make_pair("shared_windows", 3)
    plain = PagedBatchGenerator(windows, max_tokens=14)
    same = PagedBatchGenerator(windows, max_tokens=14, max_kv_size=3)
    for made in (plain, same):
        made.insert(PROMPTS)
    assert tokens_of(drain(same)) == tokens_of(drain(plain))
