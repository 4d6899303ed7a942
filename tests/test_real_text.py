"""A trained model through its rewritten file: the text is mlx_lm's own, token for token."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlxrewrite
import pytest
from mlx_lm.generate import generate_step
from mlxrewrite.cli import main
from mlxrewrite.runtime.decoding import Decoding
from test_smollm2 import PASSAGE, converted, real_model

QUESTIONS = (
    "What is the capital of France?",
    "Hi",
    "Write one short sentence about the sea in winter.",
    "Count from one to ten.",
    "Who wrote Hamlet, and what is the play about? Answer in two sentences.",
    "Translate 'good morning, my friend' into Spanish, please.",
    f"Summarise this text in one sentence. {PASSAGE}",
    f"{PASSAGE} {PASSAGE} Why does water boil?",
)
COUNT = 24


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, Any]:
    import mlx_lm

    folder = str(converted(None))
    original, tokenizer = mlx_lm.load(folder)[:2]
    return original, mlxrewrite.load(folder)[0], tokenizer


def prompts(tokenizer: Any) -> list[list[int]]:
    return [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True
            )
        )
        for text in QUESTIONS
    ]


def alone(model: Any, prompt: list[int], ends: set[int]) -> list[int]:
    tokens = []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=COUNT):
        tokens.append(int(token))
        if tokens[-1] in ends:
            break
    return tokens


@real_model
def test_eight_prompts_in_one_batch_give_mlx_lms_own_tokens(pair: tuple[Any, Any, Any]) -> None:
    original, rewritten, tokenizer = pair
    given = prompts(tokenizer)
    assert len({len(prompt) for prompt in given}) == len(given)
    ends = set(tokenizer.eos_token_ids)
    got: list[list[int]] = [[] for _ in given]
    decoding = Decoding(
        rewritten, given, max_tokens=COUNT, eos_token_ids=tuple(ends), prefill_chunk=32
    )
    for event in decoding:
        got[event.index].append(event.token)
    assert got == [alone(original, prompt, ends) for prompt in given]


@real_model
def test_tokens_differ_when_scores_are_disturbed(pair: tuple[Any, Any, Any]) -> None:
    """The comparison above can fail."""
    original, _, tokenizer = pair
    disturbed = mlxrewrite.load(converted(None))[0]
    for layer in disturbed.model.layers:
        layer.self_attn.scale *= 0.7
    prompt = prompts(tokenizer)[4]
    got = [event.token for event in Decoding(disturbed, [prompt], max_tokens=COUNT)]
    assert got != alone(original, prompt, set())


@real_model
def test_the_command_streams_the_same_text(
    pair: tuple[Any, Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    original, _, tokenizer = pair
    ends = set(tokenizer.eos_token_ids)
    words = ["generate", "--model", str(converted(None)), "--max-tokens", "12"]
    for question in QUESTIONS[:2]:
        words += ["--prompt", question]
    assert main(words) == 0
    printed = capsys.readouterr().out
    for prompt in prompts(tokenizer)[:2]:
        tokens = alone(original, prompt, ends)[:12]
        text = tokenizer.decode([token for token in tokens if token not in ends])
        assert text in printed
