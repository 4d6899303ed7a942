"""`mlxrewrite serve --vlm`: requests with and without images in one batch, over loopback."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("mlx_vlm")
pytest.importorskip("openai")
import openai
from mlxrewrite.cli import main
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


def alone(checkpoint, asked, **options):
    """The words that answer each request in a batch of its own."""
    model, processor = load(checkpoint)
    found = []
    for text, *images in asked:
        prompt = prepare(model, processor, Asked(text, tuple(map(str, images))))
        events = decode(model, [prompt], max_tokens=6, eos_token_ids=(1,), **options)
        tokens = [token for _, token, _ in events if token != 1]
        found.append(processor.tokenizer.decode(tokens).split())
    return found


def test_each_request_gets_what_it_gets_alone(checkpoint, server):
    a, b = checkpoint / "a.png", checkpoint / "b.png"
    asked = [("w5 w6", a), ("w7 w8 w9",), ("w6", a, b), ("w5 w6", b)]
    wanted = alone(checkpoint, asked)
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


def test_images_over_pages_of_codes(tmp_path, capsys):
    """`generate --image --kv-bits` and `serve --vlm --kv-bits` say the same."""
    folder = make_checkpoint(tmp_path, wide=True)
    a = folder / "a.png"
    options = ["--kv-bits", "4", "--kv-group-size", "32"]
    (wanted,) = alone(folder, [("w5 w6", a)], kv_bits=4, kv_group_size=32)
    call = ["generate", "--model", str(folder), "--image", str(a), "--prompt", "w5 w6"]
    assert main([*call, "--max-tokens", "6", *options]) == 0
    assert capsys.readouterr().out.split() == wanted
    memory = ["--vlm", "--kv-memory", "4MB"]
    with Server(folder, tmp_path / "log", *memory, *options) as running:
        assert ask(running, "w5 w6", a)[0].split() == wanted
        assert running.metrics()["mlxrewrite_kv_bits"] == 4
    assert main([*call, "--kv-bits", "8"]) == 2
    assert "heads of 32 are not groups of 64" in capsys.readouterr().err
    assert main(["serve", "--model", str(folder), *memory, "--kv-bits", "8"]) == 2
    assert "heads of 32 are not groups of 64" in capsys.readouterr().err
