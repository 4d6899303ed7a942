"""mlx_vlm's deepseek_v41: tables of n-grams next to the checkpoint, and images as records."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("mlx_vlm")
import mlx.core as mx
import numpy as np
from mlx_vlm.models.deepseek_v41.processing_deepseek_v41 import ImageInput
from mlxrewrite.runtime.vision import VisionModel
from mlxrewrite.runtime.vision_generate import decode
from mlxrewrite.runtime.vision_verify import build, verify
from vlm_prompts import FOLDER, read


@pytest.fixture
def config(tmp_path):
    """The tiny config with a folder that holds the map from tokens to what n-grams are made of."""
    found, _ = read(FOLDER / "deepseek_v41.json")
    size = found["engram_compressed_vocab_size"]
    tokens = [token % size for token in range(found["vocab_size"])]
    (tmp_path / "engram_token_map.json").write_text(json.dumps(tokens))
    return {**found, "model_path": str(tmp_path)}


def image(start: int, height: int, width: int, seed: int) -> ImageInput:
    """A picture of height x width patches: a mark, rows of its squares, a mark after each, one."""
    ratio, side = 2, 4
    row = [1] * -(-width // ratio) + [2]
    types = [0, *row * -(-height // ratio), 3]
    shape = (height * width, 3, side, side)
    pixels = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return ImageInput(start, mx.array(pixels), height, width, types)


def prompts(config):
    token = config["image_token_id"]
    first, second, third = image(2, 4, 6, 0), image(0, 4, 4, 1), image(9, 3, 5, 2)
    spans = [[token] * len(found.types) for found in (first, second, third)]
    assert third.start == len(spans[1]) + 1
    return [
        ([3, 4, *spans[0], 9, 10, 11], {"pixel_values": [[first]]}),
        ([*spans[1], 8, *spans[2], 7], {"pixel_values": [[second, third]]}),
    ]


@pytest.mark.slow
def test_ngrams_and_images_agree_in_mixed_batches(config):
    report = verify(config, images=prompts(config))
    assert report.passed, report
    assert (report.route, report.read) == ("model", "whole")


def test_ngrams_leave_a_mark_and_stay_with_their_sequence(config):
    """Without the map the tables are not read; with it each sequence has n-grams of its own."""
    texts = [[3, 5, 7, 9, 11, 13, 15, 17, 19], [5, 3]]

    def answers(given, texts):
        model = VisionModel(build(given, 0))
        asked = [model.prepare(ids) for ids in texts]
        found = {}
        for index, token, _ in decode(model, asked, max_tokens=6, block_size=4):
            found.setdefault(index, []).append(token)
        assert model.language.engram_hash is None
        return [found[index] for index in range(len(texts))]

    together = answers(config, texts)
    assert together == [answers(config, [text])[0] for text in texts]
    assert together != answers({**config, "model_path": None}, texts)
