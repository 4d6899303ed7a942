"""mlx_lm's prompt caches and paged ones: what users do with the ones works with the others.

Saved and loaded, cut back, copied, taken out of a batch, brought to another one, quantised: the
original model and the engine go on from the same caches with the same tokens.
"""

from __future__ import annotations

import copy
from pathlib import Path

import mlx.core as mx
import pytest
from generators import PROMPTS, alone, drain
from mlx_lm.models import cache as upstream
from mlxrewrite.runtime.batch_generator import PagedBatchGenerator
from mlxrewrite.runtime.errors import RuntimeRefusal
from runtime_models.pairs import make_pair

NAMES = ["plain", "shared_windows", "hybrid", "hybrid_model"]
MORE = [8, 1, 6]


def ended(rewritten, prompts, count=7, **options):
    """The last response of each prompt: its caches hold all of its text."""
    made = PagedBatchGenerator(rewritten, max_tokens=count, block_size=4, **options)
    uids = made.insert(prompts)
    found = drain(made)
    made.close()
    return [found[uid][-1] for uid in uids]


def goes_on(rewritten, caches, prompts, before=None, count=6, **options):
    """The tokens that follow in an engine of its own, all in one batch."""
    made = PagedBatchGenerator(rewritten, max_tokens=count, block_size=4, **options)
    uids = made.insert(prompts, caches=caches, all_tokens=before)
    found = drain(made)
    made.close()
    return [[response.token for response in found[uid]] for uid in uids]


def saved(caches, file: Path, **about: str):
    upstream.save_prompt_cache(str(file), caches, about)
    found, said = upstream.load_prompt_cache(str(file), return_metadata=True)
    assert said == about
    assert [type(entry) for entry in found] == [type(entry) for entry in caches]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_caches_of_a_batch_are_saved_loaded_and_go_on(name: str, tmp_path: Path) -> None:
    """In mlx_lm's model, and in another engine, in one batch."""
    original, rewritten = make_pair(name, 3)
    last = ended(rewritten, PROMPTS)
    loaded = [saved(r.prompt_cache, tmp_path / f"{r.uid}.safetensors", text="x") for r in last]
    wanted = [alone(original, [*r.all_tokens, *MORE], 6) for r in last]
    mine = goes_on(rewritten, copy.deepcopy(loaded), [MORE] * 4, [r.all_tokens for r in last])
    assert mine == wanted
    assert [alone(original, MORE, 6, prompt_cache=entry) for entry in loaded] == wanted


@pytest.mark.parametrize("name", NAMES)
def test_saved_caches_of_mlx_lm_begin_requests(name: str, tmp_path: Path) -> None:
    original, rewritten = make_pair(name, 3)
    made = []
    for number, prompt in enumerate(PROMPTS):
        held = upstream.make_prompt_cache(original)
        said = alone(original, prompt, 3, prompt_cache=held)  # the last one's row is not in them
        text = [*prompt, *said]
        length = max(getattr(entry, "offset", 0) for entry in held) or len(text) - 1
        made.append((saved(held, tmp_path / f"{number}.safetensors"), text[:length]))
    caches, texts = zip(*made, strict=True)
    wanted = [alone(original, [*text, *MORE], 6) for text in texts]
    assert goes_on(rewritten, list(caches), [MORE] * 4, list(texts)) == wanted


def test_caches_that_are_cut_back_go_on_from_there() -> None:
    """`trim_prompt_cache` on what the engine gave, and then in the engine again."""
    original, rewritten = make_pair("plain", 3)
    for response in ended(rewritten, PROMPTS):
        caches, text = response.prompt_cache, response.all_tokens
        assert upstream.can_trim_prompt_cache(caches)
        assert upstream.trim_prompt_cache(caches, 5) == 5
        short = text[:-5]
        wanted = alone(original, [*short, *MORE], 6)
        assert goes_on(rewritten, [copy.deepcopy(caches)], [MORE], [short]) == [wanted]
        assert alone(original, MORE, 6, prompt_cache=caches) == wanted
        # Everything: what is left is a fresh cache.
        assert upstream.trim_prompt_cache(caches, 10_000) > len(short) + len(MORE)
        assert goes_on(rewritten, [caches], [short]) == [alone(original, short, 6)]


def test_windows_and_states_are_cut_back_where_mlx_lm_s_are() -> None:
    """A window can be cut back while it is not full, a state never; the engine's follow that."""
    original, rewritten = make_pair("shared_windows", 3)
    for prompt in ([5, 9, 2], PROMPTS[2]):
        (response,) = ended(rewritten, [prompt], 2)
        held = upstream.make_prompt_cache(original)
        mx.eval(original(mx.array([response.all_tokens]), cache=held))
        possible = upstream.can_trim_prompt_cache(held)
        assert upstream.can_trim_prompt_cache(response.prompt_cache) == possible
        if possible:
            assert upstream.trim_prompt_cache(response.prompt_cache, 2) == 2
            text = response.all_tokens[:-2]
            wanted = alone(original, [*text, *MORE], 6)
            assert goes_on(rewritten, [response.prompt_cache], [MORE], [text]) == [wanted]
    (response,) = ended(make_pair("hybrid", 3)[1], [PROMPTS[2]])
    assert upstream.trim_prompt_cache(response.prompt_cache, 2) == 0


def test_a_copy_keeps_its_own_content() -> None:
    """Neither the engine nor the original model write to caches that somebody else holds."""
    original, rewritten = make_pair("plain", 3)
    (response,) = ended(rewritten, [PROMPTS[2]])
    kept = copy.deepcopy(response.prompt_cache)
    first = goes_on(rewritten, [response.prompt_cache], [MORE])
    second = goes_on(rewritten, [response.prompt_cache], [[2, 2]])
    for one, other in zip(response.prompt_cache, kept, strict=True):
        assert one.offset == other.offset == len(response.all_tokens)
        assert all(mx.array_equal(a, b) for a, b in zip(one.state, other.state, strict=True))
    assert goes_on(rewritten, [kept], [MORE]) == first
    assert goes_on(rewritten, [kept], [[2, 2]]) == second
    assert alone(original, MORE, 6, prompt_cache=kept) == first[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_gives_out_the_caches_of_each_and_takes_them_together(name: str) -> None:
    """Requests of unlike lengths in mid-answer, some removed, all merged into a new batch."""
    original, rewritten = make_pair(name, 3)
    made = PagedBatchGenerator(rewritten, max_tokens=30, block_size=4, prefill_step_size=16)
    uids = made.insert(PROMPTS)
    said: dict[int, list[int]] = {uid: [] for uid in uids}
    while min(map(len, said.values())) < 3:
        for response in made.next()[1]:
            said[response.uid].append(response.token)
    found = made.extract_cache(uids[:2])
    found |= made.remove(uids[2:], return_prompt_caches=True)
    for uid, prompt in zip(uids, PROMPTS, strict=True):
        text, held = [*prompt, *said[uid]], found[uid][1]
        assert len(text) - 1 <= len(held) and held == text[: len(held)]
    caches = [found[uid][0] for uid in uids]
    before = [found[uid][1] for uid in uids]
    wanted = [alone(original, [*text, *MORE], 6) for text in before]
    # One of them fresh: mlx_lm merges empty caches with full ones, too.
    caches.append(upstream.make_prompt_cache(original))
    before.append([])
    wanted.append(alone(original, MORE, 6))
    assert goes_on(rewritten, caches, [MORE] * 5, before) == wanted
    # Those that were only looked at go on as if nothing had happened.
    rest = drain(made)
    for uid, prompt in zip(uids[:2], PROMPTS[:2], strict=True):
        answer = said[uid] + [response.token for response in rest[uid]]
        assert answer == alone(original, prompt, 30)
    made.close()


def test_caches_of_codes_are_saved_loaded_and_cut_back(tmp_path: Path) -> None:
    """Plain caches become codes with `to_quantized`; engines without codes refuse them."""
    original, rewritten = make_pair("plain", 3, width=128)
    codes = {"kv_bits": 8, "kv_group_size": 32}
    (response,) = ended(rewritten, [PROMPTS[2]], **codes)
    caches, text = response.prompt_cache, response.all_tokens
    assert {type(entry) for entry in caches} == {upstream.QuantizedKVCache}
    loaded = saved(caches, tmp_path / "codes.safetensors", bits="8")
    assert {(entry.bits, entry.group_size) for entry in loaded} == {(8, 32)}
    with pytest.raises(RuntimeRefusal, match="8 bits in groups of 32, and the engine has none"):
        goes_on(rewritten, [loaded], [MORE])
    for count in (0, 4):
        upstream.trim_prompt_cache(loaded, count)
        short = text[: len(text) - count]
        held = [upstream.QuantizedKVCache(32, 8) for _ in loaded]
        wanted = alone(original, [*short, *MORE], 6, prompt_cache=held)
        assert goes_on(rewritten, [copy.deepcopy(loaded)], [MORE], [short], **codes) == [wanted]
    # Plain caches that a user quantises are what the engine makes of them by itself.
    plain = upstream.make_prompt_cache(original)
    mx.eval(original(mx.array([text]), cache=plain))
    quantised = [entry.to_quantized(group_size=32, bits=8) for entry in plain]
    one, other = (
        goes_on(rewritten, [held], [MORE], [text], **codes) for held in (plain, quantised)
    )
    assert one == other


def test_lists_of_caches_are_saved_and_go_on(tmp_path: Path) -> None:
    """A layer with two caches (`CacheList`): mlx_lm's falcon_h1 keeps keys beside a state."""
    import json

    from mlx_lm.models import falcon_h1
    from mlxrewrite.runtime.load import rewritten_module
    from mlxrewrite.runtime.weights import randomise

    config = json.loads((Path(__file__).parent / "configs/falcon_h1.json").read_text())
    original = falcon_h1.Model(falcon_h1.ModelArgs.from_dict(config))
    module = rewritten_module(config)
    rewritten = module.Model(module.ModelArgs.from_dict(config))
    randomise(original, 4)
    rewritten.update(original.parameters())
    last = ended(rewritten, PROMPTS)
    assert {type(entry) for entry in last[0].prompt_cache} == {upstream.CacheList}
    loaded = [saved(r.prompt_cache, tmp_path / f"{r.uid}.safetensors") for r in last]
    wanted = [alone(original, [*r.all_tokens, *MORE], 6) for r in last]
    mine = goes_on(rewritten, copy.deepcopy(loaded), [MORE] * 4, [r.all_tokens for r in last])
    assert mine == wanted
    assert [alone(original, MORE, 6, prompt_cache=entry) for entry in loaded] == wanted
    assert upstream.trim_prompt_cache(loaded[0], 2) == 0  # a state does not go back


def test_several_texts_in_one_cache_are_refused() -> None:
    """mlx_lm's batch caches are no prompt caches of one request."""
    original, rewritten = make_pair("plain", 3)
    held = upstream.make_prompt_cache(original)
    mx.eval(original(mx.array([[1, 2, 3], [4, 5, 6]]), cache=held))
    with pytest.raises(RuntimeRefusal, match="expected one text, got 2"):
        goes_on(rewritten, [held], [MORE])
    held = upstream.make_prompt_cache(original)
    mx.eval(original(mx.array([[1, 2, 3]]), cache=held))
    batch = [entry.merge([entry, entry]) for entry in held]
    with pytest.raises(RuntimeRefusal, match="BatchKVCache: expected a KVCache"):
        goes_on(rewritten, [batch], [MORE])
