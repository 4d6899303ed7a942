"""Text from prompts, with a rewritten model."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mlx_lm.generate import wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .decoding import PREFILL_CHUNK, Decoding, FinishReason, LogitsProcessor, Sampler
from .errors import RuntimeRefusal
from .quantized import GROUP_SIZE

Prompt = str | Sequence[int]


class Piece(NamedTuple):
    """A piece of the text that answers prompt number `prompt`; the last one says why it ended."""

    prompt: int
    text: str
    finish_reason: FinishReason | None


def encode_prompt(tokenizer: Any, text: str, chat: bool = False) -> list[int]:
    """The tokens of a prompt; with `chat`, as a user's message in the tokenizer's chat template."""
    tokenizer = _wrapped(tokenizer)
    if chat:
        if not tokenizer.has_chat_template:
            raise RuntimeRefusal("the tokenizer has no chat template: pass the prompt as it is")
        message = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(message, add_generation_prompt=True))
    # A prompt that brings the start token must not get a second one.
    special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    return list(tokenizer.encode(text, add_special_tokens=special))


def stream_generate(
    model: Any,
    tokenizer: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    stop: Sequence[str] = (),
    prefill_chunk: int = PREFILL_CHUNK,
    block_size: int = 16,
    num_blocks: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = GROUP_SIZE,
) -> Iterator[Piece]:
    """Pieces of text for all prompts as they come.

    `prompts` is one prompt or several, each a text or its tokens. `sampler` and `logits_processors`
    are those of mlx_lm's `sample_utils`; greedy without. A prompt ends with one of the tokenizer's
    end tokens, with one of the texts in `stop` (which is not given), or after `max_tokens` tokens.
    `kv_bits` (8 or 4) keeps keys and values as codes of so many bits, `kv_group_size` of them with
    one scale.

    Raises:
        RuntimeRefusal: an empty prompt, one that does not fit in the cache, or a model whose caches
            `kv_bits` cannot quantise.
    """
    tokenizer = _wrapped(tokenizer)
    tokens = [_tokens(tokenizer, prompt) for prompt in _several(prompts)]
    decoding = Decoding(
        model,
        tokens,
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=logits_processors,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        prefill_chunk=prefill_chunk,
        block_size=block_size,
        num_blocks=num_blocks,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
    )
    texts = [tokenizer.detokenizer for _ in tokens]
    stops = [_Stop(stop) for _ in tokens]
    with wired_limit(model):
        for event in decoding:
            text, index = texts[event.index], event.index
            if event.finish_reason != "stop":
                text.add_token(event.token)
            if event.finish_reason is not None:
                text.finalize()
            piece, found = stops[index].feed(text.last_segment, event.finish_reason is not None)
            if found and event.finish_reason is None:
                decoding.cancel(index)
            reason: FinishReason | None = "stop" if found else event.finish_reason
            if piece or reason is not None:
                yield Piece(index, piece, reason)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    verbose: bool = False,
    **options: Any,
) -> str | list[str]:
    """The text that answers each prompt; one text for one prompt. Options: `stream_generate`."""
    several = _several(prompts)
    texts = [""] * len(several)
    start = time.perf_counter()
    for piece in stream_generate(model, tokenizer, several, **options):
        texts[piece.prompt] += piece.text
        if verbose and len(several) == 1:
            print(piece.text, end="", flush=True)
    if verbose:
        if len(several) == 1:
            print()
        for index, text in enumerate(texts if len(several) > 1 else ()):
            print(f"[{index}] {text}")
        seconds = time.perf_counter() - start
        print(f"{len(several)} prompts in {seconds:.2f} s", file=sys.stderr)
    return texts if several is prompts else texts[0]


def _several(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """All prompts as a sequence; the argument itself if it is one already."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def _tokens(tokenizer: Any, prompt: Prompt) -> Sequence[int]:
    return encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt


def _wrapped(tokenizer: Any) -> Any:
    return tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)


class _Stop:
    """Looks for stop texts in a text that comes in pieces; holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(text for text in stops if text)
        self._held = ""

    def feed(self, piece: str, last: bool) -> tuple[str, bool]:
        """The text that may be given now, and whether a stop text was found."""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
