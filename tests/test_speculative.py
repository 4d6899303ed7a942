"""Guessing changes how many steps are needed, never the tokens."""

import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlxrewrite.runtime.engine import Engine, Request
from mlxrewrite.runtime.errors import RuntimeRefusal
from mlxrewrite.runtime.speculative import ModelDrafter, NgramDrafter
from runtime_models.pairs import make_pair

PROMPTS = [[5, 9, 2, 7, 7, 1], [3], [*range(40, 60), *range(40, 50)], [8, 8, 8, 8, 8, 8]]


def run(model, drafter=None, count=24, **options):
    engine = Engine(model, block_size=4, drafter=drafter, **options)
    names = [engine.add(Request(prompt, count)) for prompt in PROMPTS]
    found = engine.run()
    return [found[name] for name in names], engine


@pytest.mark.parametrize("name", ["plain", "shared_windows"])
@pytest.mark.parametrize("most", [1, 3, 6])
def test_ngrams_change_nothing(name: str, most: int) -> None:
    _, rewritten = make_pair(name, 3)
    expected, plain = run(rewritten)
    tokens, engine = run(rewritten, NgramDrafter(most, 3, 1))
    assert tokens == expected
    assert engine.stats.drafted > 0
    assert engine.stats.steps <= plain.stats.steps


@pytest.mark.parametrize("same", [True, False])
def test_a_draft_model_changes_nothing(same: bool) -> None:
    _, rewritten = make_pair("plain", 3)
    draft = rewritten if same else make_pair("plain", 4)[1]
    expected, plain = run(rewritten)
    tokens, engine = run(rewritten, ModelDrafter(draft, 3, block_size=4))
    assert tokens == expected
    if same:  # every guess is right: four tokens in each step
        assert engine.stats.accepted == engine.stats.drafted > 60
        assert engine.stats.steps < plain.stats.steps / 2
    else:
        assert engine.stats.accepted < engine.stats.drafted


def test_a_draft_model_without_room_guesses_less() -> None:
    _, rewritten = make_pair("plain", 3)
    expected, _ = run(rewritten)
    tokens, engine = run(rewritten, ModelDrafter(rewritten, 3, block_size=4, num_blocks=9))
    assert tokens == expected
    assert engine.stats.drafted > 0


def test_preempted_requests_are_guessed_for_again() -> None:
    _, rewritten = make_pair("plain", 3)
    expected, _ = run(rewritten)
    for drafter in (NgramDrafter(3, 3, 1), ModelDrafter(rewritten, 3, block_size=4)):
        tokens, engine = run(rewritten, drafter, num_blocks=16, max_rows=12, max_running=4)
        assert tokens == expected
        assert engine.preemptions > 0


def test_requests_that_cannot_be_guessed_for_run_beside_the_others() -> None:
    _, rewritten = make_pair("plain", 3)
    processors = tuple(make_logits_processors(repetition_penalty=1.4))
    requests = [
        Request(PROMPTS[0], 12, processors=processors),
        Request(PROMPTS[1], 12, sampler=make_sampler(temp=0.8), seed=3),
        Request(PROMPTS[2], 12),
    ]
    found = []
    for drafter in (None, ModelDrafter(rewritten, 3, block_size=4)):
        engine = Engine(rewritten, block_size=4, drafter=drafter)
        names = [engine.add(request) for request in requests]
        tokens = engine.run()
        found.append([tokens[name] for name in names])
    assert found[0] == found[1]


def test_end_tokens_inside_guesses_end_the_text() -> None:
    from mlx_lm.generate import StopSequences

    _, rewritten = make_pair("plain", 3)
    expected, _ = run(rewritten)
    engine = Engine(rewritten, block_size=4, drafter=ModelDrafter(rewritten, 5, block_size=4))
    stop = StopSequences([expected[2][6:8]])
    name = engine.add(Request(PROMPTS[2], 24, stop=stop))
    tokens = engine.run()[name]
    assert tokens == expected[2][: len(tokens)]
    assert tokens[-2:] == expected[2][6:8] and len(tokens) <= 8
    assert engine.store is not None
    assert set(engine.store.cache.free_blocks.values()) == {
        engine.store.cache.num_blocks(r) for r in engine.store.cache.free_blocks
    }


def test_models_with_state_are_refused() -> None:
    _, rewritten = make_pair("hybrid", 3)
    with pytest.raises(RuntimeRefusal, match="cut back"):
        Engine(rewritten, drafter=NgramDrafter())
    with pytest.raises(RuntimeRefusal, match="cut back"):
        ModelDrafter(rewritten)


def test_ngrams_look_for_the_longest_end() -> None:
    drafter = NgramDrafter(3, 3, 1)
    assert drafter.propose({0: [1, 2, 3, 9, 7, 3, 8, 1, 2, 3]}) == {0: [9, 7, 3]}
    assert drafter.propose({0: [1, 2, 3, 9, 7, 3, 8, 1, 2, 3, 9]}) == {0: [7, 3, 8]}
    assert drafter.propose({1: [1, 2, 3]}) == {}
    drafter.forget(0)
    assert drafter.propose({0: [3, 9]}) == {}
