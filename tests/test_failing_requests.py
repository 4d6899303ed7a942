"""A request whose own sampler, processor, stop rule or client fails: it ends, and nothing else."""

from __future__ import annotations

import json
import logging
import time
import urllib.request
from typing import Any

import mlx.core as mx
import pytest
from engine_workloads import check_invariants
from mlx_lm.generate import StopSequences, generate_step
from mlx_lm.sample_utils import make_sampler
from mlxrewrite.runtime.batch_generator import Failed, PagedBatchGenerator, batch_generate
from mlxrewrite.runtime.decoding import Decoding
from mlxrewrite.runtime.engine import Engine, Request
from runtime_models.pairs import make_pair
from serving import Server, make_model

PROMPTS = [[5, 9, 2, 7, 7, 1], [3], list(range(40, 75)), [5, 9, 2, 7, 7, 1, 4, 4]]


class Breaks:
    """Raises when it is called for the `at`th time; whole batches count once."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, *arrays: mx.array) -> mx.array:
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError("on purpose")
        return arrays[-1] if len(arrays) > 1 else mx.argmax(arrays[0], axis=-1)


class Wrong(Breaks):
    def __call__(self, *arrays: mx.array) -> mx.array:
        return mx.zeros((7,)) if self.left == 0 else super().__call__(*arrays)


class BadStops(StopSequences):
    def matcher(self) -> Any:
        class Matcher:
            def advance(self, token: int) -> bool:
                raise LookupError("on purpose")

        return Matcher()


def alone(model: Any, prompt: list[int], count: int) -> list[int]:
    return [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=count)]


FAULTS: dict[str, dict[str, Any]] = {
    "a sampler": {"sampler": Breaks(3)},
    "a seeded sampler": {"sampler": Breaks(3), "seed": 7},
    "a sampler of the wrong shape": {"sampler": Wrong(0)},
    "a processor": {"processors": (Breaks(3),)},
    "a processor of the wrong shape": {"processors": (Wrong(0),)},
    "a processor at the first token": {"processors": (Breaks(0),)},
    "stop rules": {"stop": BadStops([(1,)])},
}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_only_the_request_itself_fails(fault: str, overlap: bool) -> None:
    original, rewritten = make_pair("plain", 3)
    engine = Engine(rewritten, block_size=4, num_blocks=60)
    engine._overlap = overlap
    words = {
        name: (type(part)(part.left) if isinstance(part, Breaks) else part)
        for name, part in FAULTS[fault].items()
    }
    if "processors" in words:
        words["processors"] = tuple(type(p)(p.left) for p in words["processors"])
    names = [engine.add(Request(prompt, max_tokens=9)) for prompt in PROMPTS]
    bad = engine.add(Request([8, 8, 1], max_tokens=30, **words))
    late = None
    found: dict[int, list[int]] = {name: [] for name in [*names, bad]}
    failures = []
    while engine.busy:
        step = engine.step()
        failures += step.failures
        for event in step.tokens:
            found[event.request].append(event.token)
        check_invariants(engine)
        if failures and late is None:
            late = engine.add(Request(PROMPTS[0], max_tokens=4))
            found[late] = []
    ((name, error),) = failures
    assert name == bad
    assert isinstance(error, (ZeroDivisionError, LookupError, ValueError, TypeError))
    assert len(found[bad]) <= 3
    assert late is not None
    for one, prompt, count in zip(
        [*names, late], [*PROMPTS, PROMPTS[0]], (9,) * 4 + (4,), strict=True
    ):
        assert found[one] == alone(original, prompt, count)
    assert engine.stats.failed == 1
    for retention, free in engine.store.cache.free_blocks.items():
        assert free == engine.store.cache.num_blocks(retention), "blocks are lost"


def test_a_row_that_is_computed_in_vain_fails_nobody() -> None:
    """The text ended with the token before, which was not known yet."""
    original, rewritten = make_pair("plain", 3)
    wanted = alone(original, PROMPTS[0], 3)
    engine = Engine(rewritten, block_size=4, num_blocks=60)
    stop = StopSequences([(wanted[-1],)])
    assert wanted[-1] not in wanted[:-1]
    name = engine.add(Request(PROMPTS[0], max_tokens=9, sampler=Breaks(3), stop=stop))
    assert engine.run()[name] == wanted
    assert engine.stats.failed == 0


def test_one_sampler_of_several_requests_is_asked_for_each_alone() -> None:
    """What only works on one row at a time fails for nobody."""
    original, rewritten = make_pair("plain", 3)

    def single(logprobs: mx.array) -> mx.array:
        (row,) = logprobs
        return mx.argmax(row)[None]

    engine = Engine(rewritten, block_size=4, num_blocks=60)
    names = [engine.add(Request(p, max_tokens=6, sampler=single)) for p in PROMPTS]
    found = engine.run()
    assert [found[n] for n in names] == [alone(original, p, 6) for p in PROMPTS]


def test_a_compiled_sampler_that_raises_leaves_the_random_state() -> None:
    """mlx_lm compiles its samplers over the one random state that MLX has."""
    _, rewritten = make_pair("plain", 3)
    engine = Engine(rewritten, block_size=4, num_blocks=60)
    fine = [engine.add(Request(p, 6, sampler=make_sampler(1.0, top_k=5))) for p in PROMPTS]
    bad = engine.add(Request([8, 8, 1], 6, sampler=make_sampler(1.0, top_k=5000)))
    tokens: dict[int, int] = dict.fromkeys([*fine, bad], 0)
    failures = []
    while engine.busy:
        step = engine.step()
        failures += step.failures
        for event in step.tokens:
            tokens[event.request] += 1
    assert [failure.request for failure in failures] == [bad]
    assert "top_k" in str(failures[0].error)
    assert tokens == {**dict.fromkeys(fine, 6), bad: 0}
    mx.eval(mx.random.uniform())


def test_run_ends_the_others_and_raises() -> None:
    _, rewritten = make_pair("plain", 3)
    engine = Engine(rewritten, block_size=4, num_blocks=60)
    engine.add(Request(PROMPTS[0], max_tokens=9))
    engine.add(Request(PROMPTS[1], max_tokens=9, sampler=Breaks(2)))
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        engine.run()
    assert engine.stats.finished == 1
    assert not engine.busy


def test_decoding_raises_with_the_prompt() -> None:
    _, rewritten = make_pair("plain", 3)
    with pytest.raises(ZeroDivisionError) as caught:
        list(Decoding(rewritten, PROMPTS, max_tokens=9, sampler=Breaks(2)))
    assert caught.value.__notes__ == ["prompt 0"]


@pytest.mark.parametrize("report", [False, True])
def test_batch_generator(report: bool) -> None:
    original, rewritten = make_pair("plain", 3)
    generator = PagedBatchGenerator(rewritten, max_tokens=9, block_size=4, report_errors=report)
    uids = generator.insert(PROMPTS, samplers=[None, Breaks(3), None, None])
    found: dict[int, list[int]] = {uid: [] for uid in uids}
    errors = []
    while True:
        try:
            responses = generator.next_generated()
        except ZeroDivisionError as error:
            errors.append((error, error.__notes__))
            continue
        if not responses:
            break
        for response in responses:
            if isinstance(response.finish_reason, Failed):
                assert response.finish_reason == "error"
                errors.append((response.finish_reason.error, [f"request {response.uid}"]))
            else:
                found[response.uid].append(response.token)
    ((error, notes),) = errors
    assert isinstance(error, ZeroDivisionError)
    assert notes == [f"request {uids[1]}"]
    assert len(found.pop(uids[1])) == 3
    assert list(found.values()) == [alone(original, PROMPTS[i], 9) for i in (0, 2, 3)]
    generator.close()


def test_batch_generate_is_never_short_without_a_word() -> None:
    _, rewritten = make_pair("plain", 3)
    with pytest.raises(ZeroDivisionError):
        batch_generate(rewritten, _Words(), PROMPTS, max_tokens=9, block_size=4, sampler=Breaks(4))


class _Words:
    eos_token_ids = (96,)

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def test_an_observer_that_fails_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    original, rewritten = make_pair("plain", 3)

    class Observer:
        def first_token(self, seconds: float) -> None:
            raise RuntimeError("no metrics today")

        later_tokens = finished = first_token

    engine = Engine(rewritten, block_size=4, num_blocks=60, observer=Observer())
    name = engine.add(Request(PROMPTS[0], max_tokens=5))
    with caplog.at_level(logging.ERROR):
        assert engine.run()[name] == alone(original, PROMPTS[0], 5)
    assert caplog.text.count("Traceback") == 1


BREAK = """
import os
os.environ["HF_HUB_CACHE"] = "/nowhere"
import mlxrewrite.runtime.serve as serve
made = serve._make_sampler
def breaks(args, tokenizer):
    plain, left = made(args, tokenizer), [4]
    def sampler(logprobs):
        left[0] -= 1
        if left[0] < 0:
            raise ZeroDivisionError("on purpose")
        return plain(logprobs)
    return sampler if args.sampling.temperature == 0.125 else plain
serve._make_sampler = breaks
"""


def test_a_served_request_fails_alone(tmp_path) -> None:
    pytest.importorskip("prometheus_client")
    folder = make_model(tmp_path / "tiny")

    def ask(server: Server, **words: Any) -> tuple[int, str]:
        body = {"model": "default_model", "prompt": "The quick", "max_tokens": 12, **words}
        request = urllib.request.Request(
            server.url + "/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    options = ("--kv-memory", "2MB")
    with Server(folder, tmp_path / "log", *options, before=BREAK) as server:
        status, wanted = ask(server)
        assert status == 200
        status, told = ask(server, temperature=0.125)
        assert status == 500
        assert json.loads(told)["error"] == {"message": "on purpose", "type": "ZeroDivisionError"}
        status, told = ask(server, temperature=0.125, stream=True)
        assert status == 200
        assert '"on purpose"' in told
        assert "[DONE]" not in told
        text = json.loads(wanted)["choices"][0]["text"]
        assert json.loads(ask(server)[1])["choices"][0]["text"] == text
        (model,) = server.get("/v1/models")["data"]  # without a folder of downloads
        assert model["id"] == str(folder.resolve())
        metrics = server.metrics()
        for _ in range(50):
            if not metrics["mlxrewrite_requests_running"]:
                break
            time.sleep(0.1)
            metrics = server.metrics()
        held = [v for k, v in metrics.items() if "_blocks{" in k and 'state="held"' in k]
        assert held == [0.0]
        assert metrics['mlxrewrite_requests_finished_total{reason="error"}'] == 2
