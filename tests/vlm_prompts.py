"""Prompts with random pixels for the tiny configs of mlx_vlm: see vlm_configs/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

FOLDER = Path(__file__).parent / "vlm_configs"


def read(path: Path) -> tuple[dict[str, Any], list[tuple[list[int], dict[str, Any]]]]:
    """The config of a file, and the prompts with images that it asks for."""
    config = json.loads(path.read_text())
    wanted = config.pop("test_images", [])
    return config, [prompt(config, item, number) for number, item in enumerate(wanted)]


def prompt(
    config: dict[str, Any], item: dict[str, Any], seed: int
) -> tuple[list[int], dict[str, Any]]:
    """Ids, and arrays with normal values for every shape in `random`, `given` as they are.

    `spans` are images as records of where they stand, each with its patches.
    """
    ids: list[int] = []
    for token in item["ids"]:
        name, count = token if isinstance(token, list) else (token, 1)
        ids += [config[name] if isinstance(name, str) else name] * count
    chance = np.random.default_rng(seed)
    inputs: dict[str, Any] = {
        name: mx.array(chance.normal(size=shape).astype(np.float32))
        for name, shape in item.get("random", {}).items()
    }
    inputs |= {name: mx.array(value) for name, value in item.get("given", {}).items()}
    inputs |= {name: mx.ones(shape, mx.int32) for name, shape in item.get("ones", {}).items()}
    if "spans" in item:  # one list of images for each row of the batch
        inputs["pixel_values"] = [[_span(chance, **span) for span in item["spans"]]]
    if item.get("mask"):
        inputs["mask"] = mx.ones((1, len(ids)), mx.int32)
    return ids, inputs


def _span(
    chance: np.random.Generator, start: int, grid: tuple[int, int], patch: int, types: list[int]
) -> SimpleNamespace:
    height, width = grid
    pixels = chance.normal(size=(height * width, 3, patch, patch)).astype(np.float32)
    return SimpleNamespace(
        start=start, patches=mx.array(pixels), n_vit_h=height, n_vit_w=width, types=types
    )
