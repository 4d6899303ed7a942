"""`mlxrewrite serve` through the real OpenAI client, over loopback."""

import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step
from mlxrewrite.runtime.serve import Listener
from serving import Server, make_model

openai = pytest.importorskip("openai")
pytest.importorskip("prometheus_client")

PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    with Server(folder, log, "--kv-memory", "2MB", "--max-tokens", "24") as running:
        yield running


@pytest.fixture(scope="module")
def original(folder):
    return mlx_lm.load(str(folder))


def client(server, **options):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, **options)


def expected(original, prompt, count, seed=None, sampler=None):
    model, tokenizer = original
    if seed is not None:
        mx.random.seed(seed)
    steps = generate_step(mx.array(prompt), model, max_tokens=count, sampler=sampler)
    text = tokenizer.detokenizer
    for token, _ in steps:
        if int(token) in tokenizer.eos_token_ids:
            break
        text.add_token(int(token))
    text.finalize()
    return text.text


def encoded(original, text):
    return original[1].encode(text)


def chat(original, text):
    message = [{"role": "user", "content": text}]
    return original[1].apply_chat_template(message, add_generation_prompt=True)


def test_a_chat_streamed_and_whole(server, original) -> None:
    text = expected(original, chat(original, PROMPT), 24)
    ask = {"model": "default_model", "messages": [{"role": "user", "content": PROMPT}]}
    whole = client(server).chat.completions.create(**ask)
    assert whole.choices[0].message.content == text
    assert whole.usage.prompt_tokens == len(chat(original, PROMPT))
    parts = client(server).chat.completions.create(**ask, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text


def test_the_path_of_the_model_is_its_name(server, folder, original) -> None:
    before = server.metrics()["mlxrewrite_tokens_total"]
    whole = client(server).completions.create(model=str(folder), prompt=PROMPT, max_tokens=5)
    assert whole.choices[0].text == expected(original, encoded(original, PROMPT), 5)
    # The engine is still the same: nothing was loaded again.
    assert server.metrics()["mlxrewrite_tokens_total"] > before


def test_stop_words_and_log_probabilities(server, original) -> None:
    text = expected(original, encoded(original, PROMPT), 24)
    stop = text[4:6]
    found = client(server).completions.create(
        model="default_model", prompt=PROMPT, stop=[stop], max_tokens=24
    )
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    body = json.dumps(
        {"prompt": PROMPT, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    ).encode()
    reply = json.loads(post(server, "/v1/completions", body)[1])
    tops = [entry["top_logprobs"] for entry in reply["choices"][0]["logprobs"]["content"]]
    model, _ = original
    steps = generate_step(mx.array(encoded(original, PROMPT)), model, max_tokens=3)
    for top, (token, logprobs) in zip(tops, steps, strict=True):
        best = max(top, key=lambda entry: entry["logprob"])
        assert best["id"] == int(token)
        assert best["logprob"] == pytest.approx(logprobs[int(token)].item(), abs=1e-4)


def test_seeds_are_those_of_mlx_lm(server, original) -> None:
    from mlx_lm.sample_utils import make_sampler

    def ask(seed):
        found = client(server).completions.create(
            model="default_model", prompt=PROMPT, temperature=0.9, seed=seed, max_tokens=16
        )
        return found.choices[0].text

    with ThreadPoolExecutor(4) as pool:  # at the same time
        texts = list(pool.map(ask, [1, 2, 1, 3]))
    for seed, text in zip([1, 2, 1, 3], texts, strict=True):
        prompt = encoded(original, PROMPT)
        assert text == expected(original, prompt, 16, seed, make_sampler(0.9, top_p=1.0))


def test_64_streams_at_once(server, original) -> None:
    prompts = [f"{'abc ' * (i % 17)}{i}" for i in range(64)]

    def ask(prompt):
        parts = client(server, timeout=300).completions.create(
            model="default_model", prompt=prompt, max_tokens=8 + len(prompt) % 9, stream=True
        )
        return "".join(part.choices[0].text for part in parts)

    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(ask, prompts))
    for prompt, text in zip(prompts, texts, strict=True):
        assert text == expected(original, encoded(original, prompt), 8 + len(prompt) % 9)


def test_clients_that_go_away_free_their_blocks(server) -> None:
    before = server.metrics()

    def leave(number):
        parts = client(server).completions.create(
            model="default_model", prompt=f"{number} again", max_tokens=1500, stream=True
        )
        next(iter(parts))
        parts.response.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(8)))
    now = _idle(server)
    ended = 'mlxrewrite_requests_finished_total{reason="aborted"}'
    assert now[ended] > before.get(ended, 0)


def test_64_clients_of_which_some_go_away(server, original) -> None:
    """Those that stay get what they get alone, whoever leaves in mid-answer or before it."""

    def ask(number):
        prompt = f"{number} {'xyz ' * (number % 5)}"
        goes, count = number % 3 == 0, 700 if number % 3 == 0 else 10 + number % 7
        asker = client(server, timeout=300)
        parts = asker.completions.create(
            model="default_model", prompt=prompt, max_tokens=count, stream=True
        )
        if goes:
            if number % 2:
                next(iter(parts))
            parts.response.close()
            return None
        return prompt, count, "".join(part.choices[0].text for part in parts)

    with ThreadPoolExecutor(64) as pool:
        found = [answer for answer in pool.map(ask, range(64)) if answer is not None]
    assert len(found) == 42
    for prompt, count, text in found:
        assert text == expected(original, encoded(original, prompt), count)
    _idle(server)


def test_clients_may_knock_while_nobody_opens() -> None:
    """With the library's queue of 5, connections beyond it are dropped, and reset when it takes
    long."""
    with Listener(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed, ExitStack() as held:
        for _ in range(256):
            held.enter_context(socket.create_connection(closed.server_address, timeout=0.5))


def _idle(server):
    """Wait until nobody is served any more, and see that no block is held."""
    for _ in range(300):
        now = server.metrics()
        if now["mlxrewrite_requests_running"] == now["mlxrewrite_requests_waiting"] == 0:
            break
        time.sleep(0.1)
    assert now["mlxrewrite_requests_running"] == 0
    assert now['mlxrewrite_blocks{group="full",state="held"}'] == 0
    return now


def post(server, path, body, headers=()):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", path, body, dict(headers))
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


def test_bad_requests_are_refused_and_nothing_breaks(server, original, tmp_path) -> None:
    for body, status in (
        (b'{"prompt": "x", ', 400),
        (b"[1]", 400),
        (b"\xff\xfe{}", 400),
        (b'{"prompt":' + b"[" * 100_000, 400),
        (b'{"prompt": "x", "max_tokens": 0}', 400),
        (b'{"prompt": "x", "temperature": "warm"}', 400),
        (b"{}", 400),
        (b'{"prompt": ""}', 404),
        (b'{"prompt": 7}', 404),
        (b'{"prompt": "x", "temperature": 1, "top_k": 99999}', 500),
        (b'{"prompt": "x", "stop": [7]}', 404),
        (b'{"prompt": "x", "stop": [""]}', 404),
        (b'{"prompt": "x", "seed": -1}', 404),
        (b'{"prompt": "x", "seed": 99999999999999999999}', 404),
        (b'{"prompt": "x", "logit_bias": {"99999999999": 1}}', 404),
        (b'{"prompt": "x", "logit_bias": {"-1": 1}}', 404),
        (b'{"prompt": "x", "model": "nobody/nothing"}', 404),
        (json.dumps({"prompt": "x", "model": str(tmp_path)}).encode(), 404),
        (b'{"prompt": "x", "draft_model": "nobody/nothing"}', 404),
    ):
        code, text = post(server, "/v1/completions", body)
        assert code == status, (body, text)
        assert "error" in text
    # Whoever draws after a sampler that failed.
    body = b'{"prompt": "x", "temperature": 1, "top_k": 7, "max_tokens": 3}'
    assert post(server, "/v1/completions", body)[0] == 200
    assert post(server, "/v1/elsewhere", b"{}")[0] == 404
    code, text = post(server, "/v1/completions", json.dumps({"prompt": "y" * 9000}).encode())
    assert code == 404
    assert "9000 tokens does not fit" in text
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [image]}]
    code, text = post(server, "/v1/chat/completions", json.dumps({"messages": messages}).encode())
    assert code == 404 and "text" in text
    with pytest.raises(openai.NotFoundError):
        client(server).completions.create(model="nobody/nothing", prompt="x")
    found = client(server).completions.create(model="default_model", prompt=PROMPT, max_tokens=6)
    assert found.choices[0].text == expected(original, encoded(original, PROMPT), 6)
    assert server.get("/health")["status"] == "ok"


def test_a_shared_beginning_is_known(server) -> None:
    prompt = "A long beginning that two requests have in common. " * 8

    def cached():
        found = client(server).completions.create(
            model="default_model", prompt=prompt, max_tokens=2
        )
        details = found.usage.prompt_tokens_details
        return found.usage.prompt_tokens, details.cached_tokens if details else 0

    total, first = cached()
    assert first < 64
    assert cached() == (total, total - 1)
    assert 0 < server.metrics()["mlxrewrite_prefix_hit_rate"] < 1


def test_metrics(server) -> None:
    before = server.metrics().get("mlxrewrite_time_to_first_token_seconds_count", 0)
    client(server).completions.create(model="default_model", prompt=PROMPT, max_tokens=3)
    names = server.metrics()
    for name in (
        "requests_waiting",
        "requests_running",
        "time_to_first_token_seconds_count",
        "time_per_output_token_seconds_sum",
        "preemptions_total",
        'blocks{group="full",state="free"}',
    ):
        assert f"mlxrewrite_{name}" in names
    assert names["mlxrewrite_time_to_first_token_seconds_count"] == before + 1


def test_a_killed_server_starts_again(folder, original, tmp_path) -> None:
    with Server(folder, tmp_path / "log", "--kv-memory", "1MB") as first:
        parts = client(first).completions.create(
            model="default_model",
            prompt="x",
            max_tokens=1500,
            stream=True,
            logit_bias={"0": -100},  # it does not end by itself
        )
        next(iter(parts))
        first.kill()
        assert all(part.choices[0].finish_reason is None for part in parts)
    with Server(folder, tmp_path / "log", "--kv-memory", "1MB", port=first.port) as again:
        found = client(again).completions.create(model="default_model", prompt=PROMPT, max_tokens=6)
        assert found.choices[0].text == expected(original, encoded(original, PROMPT), 6)


def test_options_that_cannot_be_had_are_refused(folder, capsys) -> None:
    from mlxrewrite.runtime.serve import main

    for words, message in (
        (["--pipeline"], "not supported"),
        (["--unheard"], "unrecognized"),
        (["--kv-bits", "4", "--quantized-kv-start", "7"], "from their first position"),
    ):
        with pytest.raises(SystemExit):
            main(["--model", str(folder), *words])
        assert message in capsys.readouterr().err
    for words, message in (
        (["--kv-bits", "5"], "kv_bits: expected 4 or 8, got 5"),
        (["--kv-bits", "8"], "kv_bits: cache entry 0: keys: heads of 16 are not groups of 64"),
    ):
        assert main(["--model", str(folder), *words]) == 2
        assert message in capsys.readouterr().err


def test_a_draft_model_changes_nothing(folder, original, tmp_path) -> None:
    options = ["--kv-memory", "1MB", "--draft-model", str(folder), "--num-draft-tokens", "3"]
    with Server(folder, tmp_path / "log", *options) as drafting:
        found = client(drafting).completions.create(
            model="default_model", prompt=PROMPT, max_tokens=20
        )
        assert found.choices[0].text == expected(original, encoded(original, PROMPT), 20)
        assert drafting.metrics()["mlxrewrite_accepted_tokens_total"] > 5
