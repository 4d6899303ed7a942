"""`mlxrewrite serve --vlm`: requests with and without images in one batch, over loopback."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("mlx_vlm")
pytest.importorskip("openai")
import openai
from mlxrewrite.runtime.vision_generate import Asked, decode, load, prepare
from serving import Server
from vlm_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(checkpoint):
    with Server(checkpoint, checkpoint / "log", "--vlm", "--kv-memory", "4MB") as running:
        yield running


def part(path):
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def ask(server, text, *images):
    # In the order in which mlx_vlm puts them for `generate`.
    content = [{"type": "text", "text": text}, *map(part, images)] if images else text
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    found = client.chat.completions.create(
        model="default_model",
        messages=[{"role": "user", "content": content}],
        max_tokens=6,
        temperature=0,
    )
    return found.choices[0].message.content, found.usage


def test_each_request_gets_what_it_gets_alone(checkpoint, server):
    a, b = checkpoint / "a.png", checkpoint / "b.png"
    asked = [("w5 w6", a), ("w7 w8 w9",), ("w6", a, b), ("w5 w6", b)]
    model, processor = load(checkpoint)
    wanted = []
    for text, *images in asked:
        prompt = prepare(model, processor, Asked(text, tuple(map(str, images))))
        tokens = [t for _, t, _ in decode(model, [prompt], max_tokens=6, eos_token_ids=(1,))]
        wanted.append(processor.tokenizer.decode([t for t in tokens if t != 1]).split())
    with ThreadPoolExecutor(len(asked)) as pool:
        got = list(pool.map(lambda words: ask(server, *words), asked))
    assert [text.split() for text, _ in got] == wanted
    assert len({tuple(words) for words in wanted}) == len(asked)


def test_an_image_that_was_seen_is_not_read_again(checkpoint, server):
    a, b = checkpoint / "a.png", checkpoint / "b.png"
    first, _ = ask(server, "w20 w21", a)
    again, usage = ask(server, "w20 w21", a)
    assert again == first
    assert usage.prompt_tokens_details.cached_tokens >= usage.prompt_tokens - 1
    _, other = ask(server, "w20 w21", b)
    assert other.prompt_tokens_details.cached_tokens < other.prompt_tokens - 3


def test_a_broken_image_fails_alone(server):
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIStatusError):
        client.chat.completions.create(
            model="default_model",
            messages=[{"role": "user", "content": [broken, {"type": "text", "text": "w5"}]}],
            max_tokens=3,
        )
    assert ask(server, "w5")[0]
