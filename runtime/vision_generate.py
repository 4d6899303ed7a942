"""Text from prompts with and without images, all in one batch, through mlx_vlm's own loader."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler
from mlx_vlm import utils as upstream
from mlx_vlm.generate.diffusion import is_diffusion_model
from mlx_vlm.prompt_utils import apply_chat_template
from mlxrewrite.kernels.ops import Quantization

from .cache import PagedCache, cache_retentions
from .decoding import PREFILL_CHUNK, Sampler
from .errors import BadModel, RuntimeRefusal
from .generate import Piece
from .load import BROKEN, model_folder, said
from .memory import footprint
from .quantized import GROUP_SIZE, quantization
from .vision import Prepared, VisionModel

MOST_POSITIONS = 16384  # of a pool; prompts beyond it wait their turn
CLEAR_EVERY = 256  # steps


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt and the images it speaks of: paths or addresses, as mlx_vlm takes them."""

    text: str
    images: tuple[str, ...] = ()


def load(
    path_or_repo: str | Path,
    *,
    adapter_path: str | None = None,
    generated: str | Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[VisionModel, Any]:
    """The model and mlx_vlm's processor for it.

    Raises:
        BadModel: no such model, or one that mlx_vlm cannot load.
        RuntimeRefusal: a model that does not generate by appending tokens.
        NotGenerated: the rewritten file is not a current one.
    """
    folder = model_folder(path_or_repo)
    extra = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        config = upstream.load_config(folder)
        if config.get("model_file") is not None and not trust_remote_code:
            raise BadModel(
                f"{folder} brings its own model file {config['model_file']!r}: pass "
                "trust_remote_code=True if you trust it"
            )
        model, processor = upstream.load(str(folder), adapter_path, **extra)
    except (ImportError, *BROKEN) as problem:
        raise BadModel(f"{folder}: {said(problem)}") from problem
    return wrapped(model, generated), processor


def wrapped(model: Any, generated: str | Path | None = None) -> VisionModel:
    """A loaded model of mlx_vlm as one for batches.

    Raises:
        RuntimeRefusal: it does not generate by appending tokens, or has no language model.
    """
    if getattr(model, "language_model", None) is None:
        raise RuntimeRefusal(f"{type(model).__module__} has no language model: nothing to generate")
    if is_diffusion_model(model, {}):
        raise RuntimeRefusal(
            f"{type(model).__module__} generates by diffusion, not by appending tokens: use mlx_vlm"
        )
    made = VisionModel(model, generated)
    if made.manifest is not None and made.manifest.route == "none":
        raise RuntimeRefusal(
            f"{made.manifest.module} decodes what an encoder made of the prompt: use mlx_vlm"
        )
    return made


def prepare(model: VisionModel, processor: Any, asked: Asked, *, chat: bool = True) -> Prepared:
    """A prompt through mlx_vlm's chat template and processor, then the model's own embeddings."""
    text = asked.text
    if chat:
        config = model.model.config
        text = apply_chat_template(processor, config, text, num_images=len(asked.images))
    return processed(model, processor, text, asked.images)


def processed(model: VisionModel, processor: Any, text: str, images: Sequence[Any]) -> Prepared:
    """A text with marks for its images: paths, addresses or pictures. Raises RuntimeRefusal."""
    config = model.model.config
    try:
        inputs = upstream.prepare_inputs(
            processor,
            images=list(images) or None,
            prompts=text,
            image_token_index=getattr(config, "image_token_index", None),
            add_special_tokens=upstream.should_add_special_tokens(config.model_type, processor),
        )
    except (OSError, *BROKEN) as problem:
        raise RuntimeRefusal(f"the prompt {text[:40]!r}: {said(problem)}") from problem
    given = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    mask = inputs.get("attention_mask")
    ids = [int(token) for token in inputs["input_ids"].reshape(-1).tolist()]
    if not ids:
        raise RuntimeRefusal("an empty prompt: expected at least one token")
    return model.prepare(ids, mask=mask, **given)


@dataclass(slots=True, eq=False)
class _Running:
    index: int
    prompt: Prepared
    sequence: int
    whole: bool
    fed: int = 0
    sampled: int = 0
    next: int = -1


def decode(
    model: VisionModel,
    prompts: Sequence[Prepared],
    *,
    max_tokens: int,
    eos_token_ids: Sequence[int] = (),
    sampler: Sampler | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    block_size: int = 16,
    kv_bits: int | None = None,
    kv_group_size: int = GROUP_SIZE,
) -> Iterator[tuple[int, int, str | None]]:
    """(prompt, token, why it ends or None) as they come, all prompts in one batch.

    A step has one row for each prompt that is being continued and up to `prefill_chunk` rows of
    prompts that are being read. Prompts that have no form by rows are read alone, or whole. A
    prompt starts when there are blocks for all of it and `max_tokens` more. `kv_bits` (8 or 4)
    keeps keys and values as codes of so many bits, `kv_group_size` of them with one scale.

    Raises RuntimeRefusal where a model's caches are not quantised.
    """
    if max_tokens < 1 or prefill_chunk < 1:
        raise RuntimeRefusal("max_tokens and prefill_chunk: expected at least 1")
    needs = [-(-(len(prompt) + max_tokens) // block_size) + 1 for prompt in prompts]
    room = max(max(needs, default=1), min(sum(needs), MOST_POSITIONS // block_size))
    sizes = dict.fromkeys(cache_retentions(model), room)
    codes = quantization(kv_bits, kv_group_size)
    if codes is not None:
        require_codes(model, block_size, codes)
    cache = PagedCache(model, block_size, num_blocks=sizes or room, quantization=codes)
    choose = sampler or greedy_sampler
    waiting = list(range(len(prompts)))
    active: list[_Running] = []
    steps = 0

    def finish(one: _Running) -> None:
        active.remove(one)
        model.detach(one.sequence)
        cache.free(one.sequence)

    def told(one: _Running, token: int) -> str | None:
        one.next, one.sampled = token, one.sampled + 1
        if token in eos_token_ids:
            return "stop"
        return "length" if one.sampled == max_tokens else None

    while waiting or active:
        while waiting and sum(needs[o.index] for o in active) + needs[waiting[0]] <= room:
            index = waiting.pop(0)
            prompt = prompts[index]
            whole = not model.by_rows(prompt)
            if not (whole and model.rewritten):
                one = _Running(index, prompt, cache.add_sequence(), whole)
                model.attach(one.sequence, prompt)
                active.append(one)
                continue
            sequence, logits = model.read_alone(cache, prompt)
            one = _Running(index, prompt, sequence, whole, fed=len(prompt))
            active.append(one)
            token = _sampled(choose, logits)[0]
            reason = told(one, token)
            if reason:
                finish(one)
            yield index, token, reason
        tokens: dict[int, list[int]] = {}
        rest = prefill_chunk
        for one in active:
            left = len(one.prompt) - one.fed
            if left <= 0:
                tokens[one.sequence] = [one.next]
            elif rest > 0:
                count = left if one.whole else min(left, rest)
                tokens[one.sequence] = one.prompt.ids[one.fed : one.fed + count]
                rest -= count
        if not tokens:
            continue
        stepped = [one for one in active if one.sequence in tokens]
        logits = cache.step({one.sequence: tokens[one.sequence] for one in stepped})
        for one in stepped:
            one.fed += len(tokens[one.sequence])
        places = [i for i, one in enumerate(stepped) if one.fed >= len(one.prompt)]
        values: list[int] = []
        if places:
            values = _sampled(choose, logits[mx.array(places)])
        mx.eval(cache.arrays())
        steps += 1
        if steps % CLEAR_EVERY == 0:
            mx.clear_cache()
        for place, token in zip(places, values, strict=True):
            one = stepped[place]
            reason = told(one, token)
            if reason:
                finish(one)
            yield one.index, token, reason


def require_codes(model: VisionModel, block_size: int, codes: Quantization) -> None:
    """Raise RuntimeRefusal, with the cache entry, where something is kept that is not quantised."""
    if not model.rewritten:
        raise RuntimeRefusal(
            f"kv_bits: this model runs once per sequence, since {model.why}, over its own caches, "
            "which are not quantised; leave kv_bits out"
        )
    footprint(model, block_size, quantization=codes)


def _sampled(choose: Sampler, logits: mx.array) -> list[int]:
    chosen = choose(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    values: list[int] = chosen.tolist()  # type: ignore[assignment]
    return values


def stream_generate(
    model: VisionModel,
    processor: Any,
    prompts: Sequence[Prepared],
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    kv_bits: int | None = None,
    kv_group_size: int = GROUP_SIZE,
) -> Iterator[Piece]:
    """Pieces of text for all prompts as they come; see `decode`."""
    tokenizer = getattr(processor, "tokenizer", processor)
    criteria = getattr(tokenizer, "stopping_criteria", None)
    ends = tuple(criteria.eos_token_ids) if criteria is not None else (tokenizer.eos_token_id,)
    texts = []
    for _ in prompts:
        text = copy.copy(processor.detokenizer)
        text.reset()
        texts.append(text)
    for index, token, reason in decode(
        model,
        prompts,
        max_tokens=max_tokens,
        eos_token_ids=ends,
        sampler=sampler,
        prefill_chunk=prefill_chunk,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
    ):
        text = texts[index]
        if reason != "stop":
            text.add_token(token)
        if reason is not None:
            text.finalize()
        piece = text.last_segment
        if piece or reason is not None:
            yield Piece(index, piece, reason)  # type: ignore[arg-type]
