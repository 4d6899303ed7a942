"""Prompts with and without images in the engine: what each gives alone, equal parts shared."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx_vlm")
import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from mlxrewrite.runtime.engine import Engine
from mlxrewrite.runtime.errors import RuntimeRefusal
from mlxrewrite.runtime.vision import VisionModel
from mlxrewrite.runtime.vision_engine import PromptKeys, request
from mlxrewrite.runtime.vision_generate import decode
from mlxrewrite.runtime.vision_verify import build
from vlm_prompts import FOLDER, read

TEXTS = [([5, 6, 7, 8, 9, 10, 11], {}), (list(range(3, 40)), {})]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl", "llava", "llava_next"])
def family(request):
    """A model, prompts with and without images, and the tokens that each gives alone."""
    config, images = read(FOLDER / f"{request.param}.json")
    model = VisionModel(build(config, 0))
    prompts = [TEXTS[0], *images, TEXTS[1]]
    return model, prompts, [alone(model, prompt) for prompt in prompts]


def alone(model, prompt, count=6):
    ids, inputs = prompt
    prepared = [model.prepare(ids, **inputs)]
    return [token for _, token, _ in decode(model, prepared, max_tokens=count, block_size=4)]


def answers(engine, model, prompts, keys=None, count=6):
    keys = keys or PromptKeys()
    names = []
    for ids, inputs in prompts:
        prepared = model.prepare(ids, **inputs)
        names.append(engine.add(request(model, prepared, keys, max_tokens=count)))
    found = engine.run()
    return [found[name] for name in names]


def test_all_at_once_in_chunks(family):
    model, prompts, wanted = family
    engine = Engine(model, block_size=4, num_blocks=64, max_rows=7, poison=True, shuffle_seed=1)
    assert answers(engine, model, prompts) == wanted


def test_those_that_give_way_begin_again(family):
    model, prompts, wanted = family
    longest = max(len(model.prepare(ids, **inputs)) for ids, inputs in prompts)
    blocks = -(-(longest + 7) // 4) + 2
    engine = Engine(model, block_size=4, num_blocks=blocks, max_rows=16, poison=True)
    assert answers(engine, model, prompts) == wanted
    engine = Engine(model, block_size=4, num_blocks=blocks, max_rows=16, reuse=False, poison=True)
    assert answers(engine, model, prompts[::-1]) == wanted[::-1]


def test_equal_images_are_computed_once_and_others_anew(family):
    model, prompts, wanted = family
    engine, keys = Engine(model, block_size=4, num_blocks=128), PromptKeys()
    ids, inputs = prompts[1]
    assert answers(engine, model, [prompts[1]], keys) == [wanted[1]]
    before = engine.store.stats.reused
    assert answers(engine, model, [prompts[1]], keys) == [wanted[1]]
    assert engine.store.stats.reused - before >= len(ids) - 4
    pixels = inputs["pixel_values"]
    other = (ids, {**inputs, "pixel_values": pixels * -2.0 + 1.0})
    before = engine.store.stats.reused
    # Whatever of the second prompt is found is what comes before the image.
    first = next(i for i, key in enumerate(keys.of(model, model.prepare(ids, **inputs))) if key < 0)
    assert answers(engine, model, [other], keys) == [alone(model, other)]
    assert engine.store.stats.reused - before <= first


def test_names_by_ids_alone_would_be_wrong(family, monkeypatch):
    """The test above can fail: with the ids as names another image's keys are taken."""
    model, prompts, _ = family
    monkeypatch.setattr(PromptKeys, "of", lambda self, model, prepared: list(prepared.ids))
    engine = Engine(model, block_size=4, num_blocks=128)
    ids, inputs = prompts[1]
    other = (ids, {**inputs, "pixel_values": inputs["pixel_values"] * -2.0 + 1.0})
    answers(engine, model, [prompts[1]])
    before = engine.store.stats.reused
    answers(engine, model, [other])
    assert engine.store.stats.reused - before >= len(ids) - 4


def test_a_second_image_leaves_the_first_one_s_rows_known():
    config, images = read(FOLDER / "qwen2_vl.json")
    model, keys = VisionModel(build(config, 0)), PromptKeys()
    ids, inputs = images[1]
    one = keys.of(model, model.prepare(ids, **inputs))
    pixels = inputs["pixel_values"]
    changed = mx.concatenate([pixels[:24], pixels[24:] + 1.0])
    two = keys.of(model, model.prepare(ids, **{**inputs, "pixel_values": changed}))
    same = [a == b for a, b in zip(one, two, strict=True)]
    assert same[:8] == [True] * 8 and not all(same)
    assert sum(key < 0 for key in one) >= 10


def test_what_runs_once_per_sequence_is_refused():
    config, images = read(FOLDER / "paligemma.json")
    model = VisionModel(build(config, 0))
    prepared = model.prepare(images[0][0], **images[0][1])
    with pytest.raises(RuntimeRefusal, match="runs once per sequence"):
        request(model, prepared, PromptKeys())


def wide():
    """A llava whose heads are whole groups of codes, and its prompts."""
    config, images = read(FOLDER / "llava.json")
    config["text_config"] |= {"hidden_size": 128, "num_attention_heads": 4}
    model = VisionModel(build(config, 0))
    assert model.rewritten
    return model, [TEXTS[0], *images, TEXTS[1]]


@pytest.mark.parametrize("bits", [8, 4])
def test_pages_of_codes_give_what_mlx_vlm_s_quantised_caches_give(bits):
    """Alone, all at once, and with other requests in the engine."""
    model, prompts = wide()
    wanted, plain = [], []
    for ids, inputs in prompts:
        prepared = model.prepare(ids, **inputs)
        for found, caches in ((wanted, True), (plain, False)):
            held = [QuantizedKVCache(32, bits) if caches else KVCache() for _ in range(3)]
            row, tokens = model.run_one(prepared, mx.array([ids], mx.int32), held, 0)[0, -1], []
            for _ in range(6):
                tokens.append(int(row.argmax()))
                step = mx.array([tokens[-1:]], mx.int32)
                row = model.run_one(prepared, step, held, len(ids) + len(tokens) - 1)[0, -1]
            found.append((tokens, row))
    codes = {"kv_bits": bits, "kv_group_size": 32}
    prepared = [model.prepare(ids, **inputs) for ids, inputs in prompts]
    said = {index: [] for index in range(len(prompts))}
    for index, token, _ in decode(model, prepared, max_tokens=6, block_size=4, **codes):
        said[index].append(token)
    assert [said[index] for index in said] == [tokens for tokens, _ in wanted]
    engine = Engine(model, block_size=4, num_blocks=64, max_rows=7, poison=True, **codes)
    assert answers(engine, model, prompts) == [tokens for tokens, _ in wanted]
    # Codes are not the values: the rows behind the answers differ, which plain pages would not.
    pairs = zip(wanted, plain, strict=True)
    assert max(mx.abs(one - other).max().item() for (_, one), (_, other) in pairs) > 1e-3


def test_what_has_no_codes_is_refused_with_its_reason():
    config, images = read(FOLDER / "paligemma.json")
    model = VisionModel(build(config, 0))
    prompt = model.prepare(images[0][0], **images[0][1])
    with pytest.raises(RuntimeRefusal, match=r"kv_bits: .* runs once per sequence"):
        next(decode(model, [prompt], max_tokens=2, kv_bits=8))
    config, images = read(FOLDER / "llava.json")
    model = VisionModel(build(config, 0))
    prompt = model.prepare(images[0][0], **images[0][1])
    with pytest.raises(RuntimeRefusal, match="heads of 8 are not groups of 64"):
        next(decode(model, [prompt], max_tokens=2, kv_bits=8))
