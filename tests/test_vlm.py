"""Language models of mlx_vlm: mixed batches with and without images against mlx_vlm itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("mlx_vlm")
import mlx.core as mx
from metal_stand_ins import METAL_ONLY, standing_in
from mlx.utils import tree_flatten
from mlxrewrite.runtime.cache import PagedCache
from mlxrewrite.runtime.errors import BadModel, RuntimeRefusal
from mlxrewrite.runtime.vision import VisionModel
from mlxrewrite.runtime.vision_generate import decode, wrapped
from mlxrewrite.runtime.vision_rows import NO_ID, row_ids, stacked
from mlxrewrite.runtime.vision_verify import build, verify
from vlm_checkpoint import make_checkpoint
from vlm_prompts import FOLDER, read

CONFIGS = sorted(FOLDER.glob("*.json"))
# The families that most checkpoints are of; the others run with the slow tests.
USUAL = {
    "gemma3",
    "idefics3",
    "internvl_chat",
    "llava",
    "mllama",
    "paligemma",
    "pixtral",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
}


def _marked(path: Path) -> object:
    marks = () if path.stem in USUAL else (pytest.mark.slow,)
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", [_marked(path) for path in CONFIGS])
def test_mixed_batches_agree_with_mlx_vlm(path):
    config, images = read(path)
    with standing_in(path.stem):
        report = verify(config, images=images)
    assert report.passed, report
    assert report.text.spread > 0
    assert (report.images is not None) == bool(images)


@pytest.mark.parametrize("name", METAL_ONLY)
def test_metal_only_originals_run_nowhere_else(name):
    """With a back end that has their kernels the stand-ins of the test above could go."""
    if mx.metal.is_available():
        pytest.skip("there is Metal")
    config, _ = read(FOLDER / f"{name}.json")
    with pytest.raises(RuntimeError, match="No Metal back-end"):
        verify(config)


def test_weights_that_no_machine_holds_are_one_error():
    """A table of mlx_vlm's deepseek_v41 has 384 million rows unless the config says
    otherwise, and mlx_lm's config of that name does not: to compute them ends the process."""
    config = json.loads((FOLDER.parent / "configs" / "deepseek_v41.json").read_text())
    with pytest.raises(BadModel, match=r"deepseek_v41\.deepseek_v41 take 367 GiB"):
        build(config, 0)


TEXT = [
    line
    for line in (FOLDER.parent / "vlm_text.txt").read_text().splitlines()
    if not line.startswith("#")
]


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT)
def test_text_models_of_mlx_vlm_agree(name):
    report = verify(FOLDER.parent / "configs" / f"{name}.json")
    assert report.passed, report


def test_a_model_that_embeds_prompts_differently_runs_whole():
    """mlx_vlm's granite scales embeddings that it is given, and not those of ids."""
    report = verify(FOLDER.parent / "configs" / "granite.json")
    assert report.route == "model" and "embedded in another way" in report.why
    assert report.passed, report


def test_a_rope_that_looks_at_the_longest_sequence_runs_whole():
    report = verify(FOLDER.parent / "configs" / "phi3.json")
    assert report.route == "model" and "length of one sequence" in report.why
    assert report.passed, report


@pytest.fixture
def qwen():
    config, images = read(FOLDER / "qwen2_vl.json")
    return config, images


def test_kernel_and_whole_model_routes_are_both_taken():
    routes = {}
    for name in ("qwen2_vl", "qwen3_vl", "paligemma"):
        config, images = read(FOLDER / f"{name}.json")
        report = verify(config, images=images)
        routes[name] = (report.route, report.read)
    assert routes == {
        "qwen2_vl": ("kernel", "by rows"),
        "qwen3_vl": ("kernel", "alone"),
        "paligemma": ("model", "whole"),
    }


@pytest.mark.parametrize("broken", ["axes", "delta", "images"])
def test_wrong_positions_and_embeddings_are_noticed(qwen, monkeypatch, broken):
    config, images = qwen
    if broken == "images":
        monkeypatch.setattr(VisionModel, "_row_embeds", lambda self, ids, rows: None)
    else:
        prepare = VisionModel.prepare

        def wrong(self, ids, **inputs):
            found = prepare(self, ids, **inputs)
            if broken == "axes" and found.images:
                found.positions = found.positions[:1].repeat(3, axis=0)
            elif found.images:
                found.delta += 1
            return found

        monkeypatch.setattr(VisionModel, "prepare", wrong)
    report = verify(config, images=images)
    assert report.text.within(report.tolerance)
    assert not report.images.within(report.tolerance)


def test_rows_of_different_lengths_do_not_see_each_other(qwen):
    """Batches of mlx_vlm are padded on the left, and versions to 0.6.15 let the padding be seen."""
    config, images = qwen
    model = VisionModel(build(config, 0))
    long, short = list(range(3, 40)), [5, 6, 7]

    def answers(prompts):
        found = {}
        prepared = [model.prepare(ids, **inputs) for ids, inputs in prompts]
        for index, token, _ in decode(model, prepared, max_tokens=6, prefill_chunk=7, block_size=4):
            found.setdefault(index, []).append(token)
        return [found[i] for i in range(len(prompts))]

    prompts = [(long, {}), images[0], (short, {}), images[1]]
    assert answers(prompts) == [answers([prompt])[0] for prompt in prompts]
    assert answers(prompts[::-1]) == answers(prompts)[::-1]


def test_nothing_of_a_sequence_stays_on_the_model(qwen):
    config, images = qwen
    for route in ("kernel", "model"):
        model = VisionModel(build(config, 0), whole=route == "model")
        assert model.route == route
        list(decode(model, [model.prepare(*images[0][:1], **images[0][1])], max_tokens=3))
        assert model.language._rope_deltas is None
        assert model.language._position_ids is None


def test_the_vision_tower_and_the_weights_stay_what_they_are(qwen):
    config, _ = qwen
    original = build(config, 0)
    before = dict(tree_flatten(original.parameters()))
    classes = {name: type(module) for name, module in original.named_modules()}
    model = VisionModel(original)
    after = dict(tree_flatten(model.model.parameters()))
    assert before.keys() == after.keys()
    assert all(after[name] is value for name, value in before.items())
    changed = {n for n, m in model.model.named_modules() if type(m) is not classes[n]}
    assert changed and all(name.startswith("language_model") for name in changed)
    with model.original():
        assert {n: type(m) for n, m in model.model.named_modules()} == classes


def test_a_prompt_with_images_cannot_be_cut_where_the_model_runs_whole():
    config, images = read(FOLDER / "paligemma.json")
    model = VisionModel(build(config, 0))
    ids, inputs = images[0]
    cache = PagedCache(model, 4, num_blocks=64)
    name = cache.add_sequence()
    model.attach(name, model.prepare(ids, **inputs))
    with pytest.raises(RuntimeRefusal, match="read in one step"):
        cache.step({name: ids[:5]})


def test_images_that_become_more_rows_than_their_tokens_have_rows_without_ids():
    """mlx_vlm's llava_next puts 16 rows in for one token; text around them keeps its ids."""
    config, images = read(FOLDER / "llava_next.json")
    model = VisionModel(build(config, 0))
    (first, second), rows = images, 16
    prompts = [model.prepare(ids, **inputs) for ids, inputs in (first, second)]
    assert prompts[0].ids == [3, 4, *[NO_ID] * rows, 9, 10, 11]
    assert prompts[1].ids == [*[NO_ID] * rows, 8, 7]
    assert all(prompt.embeds.shape[1] == len(prompt) for prompt in prompts)
    assert all(model.by_rows(prompt) for prompt in prompts)


def test_rows_of_text_are_found_from_both_ends():
    text = mx.arange(40, dtype=mx.float32).reshape(10, 4)

    def rows(ids, *parts):
        told = mx.concatenate([text[mx.array(p)] if type(p) is list else p for p in parts])
        return row_ids(ids, told, text[mx.array([max(token, 0) for token in ids])])

    image = -mx.ones((3, 4))
    assert rows([1, 9, 2, 3], [1], image, [2, 3]) == [1, 0, 0, 0, 2, 3]
    assert rows([9, 2], image, [2]) == [0, 0, 0, 2]
    assert rows([2, -200], [2], image) == [2, 0, 0, 0]
    # Of equal tokens on both sides of the image each is found once.
    assert rows([5, 9, 5, 5], [5], image, [5, 5]) == [5, 0, 0, 0, 5, 5]
    assert rows([5, 5, 5], [5], [5]) == [5, 5]
    assert rows([1, 9, 9, 9, 9, 2], [1], image, [2]) == [1, 0, 0, 0, 2]


def test_sequences_with_fewer_ids_never_get_those_of_others():
    narrow, wide = mx.array([[1.0, 2.0]]), mx.array([[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]])
    found = stacked([narrow, wide])
    assert found[0].tolist() == [1.0, 2.0, -float("inf")]
    assert found[1:].tolist() == wide.tolist()
    assert stacked([narrow, narrow]).tolist() == [[1.0, 2.0], [1.0, 2.0]]


def test_rows_without_ids_are_refused_where_the_language_model_looks_at_ids(monkeypatch):
    config, images = read(FOLDER / "llava_next.json")
    model = VisionModel(build(config, 0))
    call = type(model.language).__call__

    def looking(self, inputs, *args, **kwargs):
        output = call(self, inputs, *args, **kwargs)
        output.logits = output.logits + inputs[..., None] * 0.1
        return output

    with model.original():
        monkeypatch.setattr(type(model.language), "__call__", looking)
    with pytest.raises(RuntimeRefusal, match=r"of 6 tokens became 21 rows.* looks at ids"):
        model.prepare(images[0][0], **images[0][1])


def test_a_prompt_that_changes_shared_weights_is_refused_and_leaves_them_alone():
    """mlx_vlm's phi4mm swaps the adapters merged into its language model for a prompt with audio;
    sequences with text or images run on the ones that it was loaded with."""
    config, images = read(FOLDER / "phi4mm.json")
    original = build(config, 0)
    key = "language_model.model.layers.0.self_attn.o_proj.weight"
    weight = original.language_model.model.layers[0].self_attn.o_proj.weight
    down, up = mx.ones((2, weight.shape[1])), mx.ones((weight.shape[0], 2))
    original._base_weights = {key: weight - up @ down}
    original._vision_lora_a, original._vision_lora_b = {key: down}, {key: up}
    original._speech_lora_a, original._speech_lora_b = {key: down}, {key: -up}
    original._vision_lora_scale = original._speech_lora_scale = 1.0
    model = VisionModel(original)

    def answers():
        prompts = [
            model.prepare(ids, **inputs) for ids, inputs in ((list(range(3, 9)), {}), *images)
        ]
        return list(decode(model, prompts, max_tokens=4, block_size=4))

    before, weights = answers(), dict(tree_flatten(original.parameters()))
    told = dict(vars(original))
    audio = {"input_audio_embeds": mx.ones((1, 16, 16)), "audio_embed_sizes": mx.array([4])}
    with pytest.raises(RuntimeRefusal, match=r"change 1 of its weights .*o_proj\.weight"):
        model.prepare([3, *[121] * 4, 5], **audio)
    after = dict(tree_flatten(original.parameters()))
    assert all(after[name] is value for name, value in weights.items())
    assert vars(original) == told
    assert answers() == before


@pytest.mark.parametrize("kind", ["nothing", "diffusion"])
def test_what_does_not_append_tokens_is_refused(qwen, monkeypatch, kind):
    model = build(qwen[0], 0)
    if kind == "nothing":
        model.language_model = None
    else:
        name = "mlxrewrite.runtime.vision_generate.is_diffusion_model"
        monkeypatch.setattr(name, lambda model, kwargs: True)
    with pytest.raises(RuntimeRefusal, match=r"no language model|by diffusion"):
        wrapped(model)


# --------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_generate_takes_prompts_with_and_without_images_in_one_batch(checkpoint, capsys):
    from mlxrewrite.cli import main

    a, b = str(checkpoint / "a.png"), str(checkpoint / "b.png")
    base = ["generate", "--model", str(checkpoint), "--max-tokens", "5"]
    alone = []
    for words in (
        ["--image", a, "--prompt", "w5 w6"],
        ["--vlm", "--prompt", "w7 w8 w9"],
        ["--image", a, "--image", b, "--prompt", "w6"],
    ):
        assert main([*base, *words]) == 0
        alone.append(capsys.readouterr().out.strip())
    assert len(set(alone)) == 3
    words = ["--image", a, "--prompt", "w5 w6", "--prompt", "w7 w8 w9"]
    words += ["--image", a, "--image", b, "--prompt", "w6"]
    assert main([*base, *words]) == 0
    shown = capsys.readouterr().out
    for text in alone:
        assert text in shown


def test_an_image_without_a_prompt_behind_it_is_an_error(checkpoint, capsys):
    from mlxrewrite.cli import main

    words = ["generate", "--model", str(checkpoint), "--prompt", "w5", "--image", "a.png"]
    assert main(words) == 2
    assert "none follows" in capsys.readouterr().err


def test_a_missing_image_is_one_error(checkpoint, capsys):
    from mlxrewrite.cli import main

    words = ["generate", "--model", str(checkpoint), "--image", "absent.png", "--prompt", "w5"]
    assert main(words) == 2
    assert "absent.png" in capsys.readouterr().err
