"""`mlxrewrite serve --vlm`: models of mlx_vlm, requests with and without images in one batch.

The server is that of `serve`; models and processors are mlx_vlm's. A request with images is read
into a prompt (`VisionModel.prepare`) when it comes in, and waits under the tokens that the engine
knows it by until the batch generator takes it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mlx_lm import server as upstream
from mlx_lm import utils as text_upstream
from mlx_vlm.prompt_utils import apply_chat_template
from PIL import Image

from .engine import Request
from .errors import RuntimeRefusal
from .load import model_folder, read_config
from .quantized import quantization
from .vision import Prepared, VisionModel
from .vision_engine import PromptKeys, brought
from .vision_generate import load, processed, require_codes


class Prompts:
    """Prompts with images between their arrival and the batch, by their tokens."""

    def __init__(self, model: VisionModel, processor: Any) -> None:
        self.model = model
        self._processor = processor
        self._keys = PromptKeys()
        self._waiting: dict[tuple[int, ...], Prepared] = {}

    def read(self, messages: list[dict[str, Any]]) -> list[int]:
        """A conversation's tokens, as the engine knows them.

        Raises ValueError for images that cannot be read.
        """
        urls = [upstream._image_url(part) for part in image_parts(messages)]
        images = [Image.fromarray(upstream._decode_image(url)) for url in urls]
        text = apply_chat_template(
            self._processor, self.model.model.config, messages, num_images=len(images)
        )
        try:
            prepared = processed(self.model, self._processor, text, images)
        except RuntimeRefusal as problem:
            raise ValueError(str(problem)) from problem
        keys = self._keys.of(self.model, prepared)
        self._waiting[tuple(keys)] = prepared
        return keys

    def complete(self, request: Request) -> Request:
        """The request with its prompt, if it is one with images."""
        tokens = [*request.before, *request.prompt]
        prepared = self._waiting.pop(tuple(tokens), None)
        if prepared is None:
            return request
        if self.model.by_rows(prepared) or len(tokens) < 2:
            return replace(request, prepared=prepared)
        caches = brought(self.model, prepared)
        return replace(
            request, prompt=tokens[-1:], before=tokens[:-1], caches=caches, prepared=prepared
        )


def load_served(path: str, given: Any, adapter_path: str | None = None) -> tuple[Any, Any, Prompts]:
    """A model of mlx_vlm, its tokenizer as mlx_lm's server wants it, and its prompts.

    Raises RuntimeRefusal for a model that runs once per sequence.
    """
    model, processor = _load(path, given, adapter_path)
    if not model.rewritten:
        raise RuntimeRefusal(f"{path}: it runs once per sequence, since {model.why}; not served")
    folder = model_folder(path)
    extra = {"trust_remote_code": True} if given.trust_remote_code else {}
    if given.chat_template:
        extra["chat_template"] = given.chat_template
    tokenizer = text_upstream.load_tokenizer(
        folder, extra or None, eos_token_ids=read_config(folder).get("eos_token_id")
    )
    return model, tokenizer, Prompts(model, processor)


def require_caches(path: str, given: Any) -> None:
    """Raise RuntimeRefusal for a model whose caches are not quantised, if they are to be."""
    codes = quantization(given.kv_bits, given.kv_group_size)
    if codes is not None:
        require_codes(_load(path, given)[0], given.block_size, codes)


def _load(path: str, given: Any, adapter_path: str | None = None) -> tuple[VisionModel, Any]:
    return load(
        path,
        adapter_path=adapter_path,
        generated=given.generated,
        trust_remote_code=given.trust_remote_code,
    )


def image_parts(messages: list[dict[str, Any]] | None) -> Iterator[dict[str, Any]]:
    """The images of a conversation."""
    yield from upstream._image_parts(messages or [])


def without_images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy of a conversation, its texts alone."""
    found = copy.deepcopy(messages)
    for message in found:
        content = message.get("content")
        if isinstance(content, list):
            message["content"] = [part for part in content if upstream._image_url(part) is None]
    return found
