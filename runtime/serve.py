"""mlx_lm's server on rewritten models and the paged engine.

The server is mlx_lm's own: its options, its handler, its loop. A few of the names that its
functions use mean something else here (`rebound`): models are loaded rewritten, the batch generator
is the paged one, and the prompt cache is what the engine's blocks know.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from huggingface_hub import CacheNotFound, scan_cache_dir
from mlx_lm import server as upstream
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START

from .batch_generator import Failed, PagedBatchGenerator
from .engine import Drafter, Engine
from .errors import RuntimeRefusal
from .load import load, load_model, model_folder, read_config
from .memory import device_memory, footprint
from .quantized import quantization
from .rebind import rebound
from .sampling import Seeded
from .speculative import ModelDrafter, NgramDrafter

CONCURRENCY = 256  # requests in a step, where the command line says nothing else
HOST_MEMORY = 2 << 30  # bytes of caches on the CPU, if nothing is said and so much is free
POLL_SECONDS = 0.01  # of steps between two looks for new requests


def main(words: Sequence[str]) -> int:
    """`mlxrewrite serve`: options are mlx_lm.server's and a few of the engine's."""
    start = rebound(
        upstream.main,
        argparse=_Options(words),
        ModelProvider=Provider,
        run=rebound(
            upstream.run,
            ResponseGenerator=Generator,
            LRUPromptCache=KnownPrefixes,
            _run_http_server=functools.partial(
                upstream._run_http_server, server_class=Listener, handler_class=Handler
            ),
        ),
    )
    try:
        start()
    except RuntimeRefusal as problem:
        print(f"mlxrewrite serve: {problem}", file=sys.stderr)
        return 2
    return 0


class Listener(ThreadingHTTPServer):
    """As many clients may knock at once as may be served; the library's own queue holds 5, and the
    kernel resets the connections of others."""

    request_queue_size = 1024


class _Options:
    """Stands for `argparse` in mlx_lm's main: its parser gets the engine's options too."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)

    def ArgumentParser(self, **options: Any) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog="mlxrewrite serve", **options)
        group = parser.add_argument_group("mlxrewrite")
        add = group.add_argument
        add("--kv-memory", type=upstream._parse_size, metavar="SIZE", help="for the paged caches")
        add("--block-size", type=int, default=16, help="positions of a block (default: 16)")
        add("--no-prefix-cache", action="store_true", help="compute equal beginnings anew")
        add("--disk-cache", type=Path, metavar="DIR", help="where blocks that leave memory go")
        add("--disk-limit", type=upstream._parse_size, default=8 << 30, metavar="SIZE")
        add("--ngram", type=int, default=0, metavar="N", help="guess N tokens from the text so far")
        add("--vlm", action="store_true", help="load models with mlx_vlm; requests with images")
        add("--generated", type=Path, help="folder of the rewritten files")
        parser.set_defaults(decode_concurrency=CONCURRENCY)
        start = DEFAULT_QUANTIZED_KV_START
        parse = functools.partial(argparse.ArgumentParser.parse_args, parser, self._words)

        def checked() -> argparse.Namespace:
            got = parse()
            if got.pipeline:
                parser.error("--pipeline is not supported on rewritten models")
            if got.vlm and (got.disk_cache or got.draft_model):
                parser.error("--vlm: not with --disk-cache or --draft-model")
            if got.kv_bits is not None and got.quantized_kv_start not in (0, start):
                parser.error("--quantized-kv-start: pages are quantised from their first position")
            quantization(got.kv_bits, got.kv_group_size)  # raises RuntimeRefusal
            return got

        parser.parse_args = checked  # type: ignore[assignment, method-assign]
        return parser


class Provider(upstream.ModelProvider):  # type: ignore[misc]
    """Loads rewritten models; all of them can be batched."""

    _prompts: Any = None

    def __init__(self, cli_args: Any) -> None:
        if cli_args.model is not None:
            _require_caches(cli_args.model, cli_args)
        super().__init__(cli_args)

    def _load(
        self, model_path: str, adapter_path: str | None = None, draft: str | None = None
    ) -> None:
        if self.is_distributed and self.cli_args.kv_memory is None:
            # Each process decides who runs, and all must decide the same.
            raise RuntimeRefusal("several processes need --kv-memory, the same for all")
        rebound(
            upstream.ModelProvider._load,
            load=self._rewritten,
            sharded_load=self._sharded,
            make_prompt_cache=lambda model: [],
            load_processor=self._processor,
        )(self, model_path, adapter_path, draft)
        self.is_batchable = True

    @property
    def prompts(self) -> Any:
        """Reads prompts with images, for a model of mlx_vlm; else None."""
        return self._prompts if self.cli_args.vlm else None

    def _rewritten(
        self, path: str, *, return_config: bool = False, **options: Any
    ) -> tuple[Any, ...]:
        if self.cli_args.vlm:
            from .vision_serve import load_served

            adapter = options.get("adapter_path")
            *found, self._prompts = load_served(path, self.cli_args, adapter)
        else:
            found = [*load(path, generated=self.cli_args.generated, **options)]
        return (*found, read_config(model_folder(path))) if return_config else tuple(found)

    def _processor(self, model: Any, config: Any) -> Any:
        """mlx_lm's own reader of images; requests with images are read here, or refused."""
        return None if self.cli_args.vlm else upstream.load_processor(model, config)

    def _sharded(
        self,
        path: str,
        *,
        pipeline_group: Any,
        tensor_group: Any,
        return_config: bool,
        **options: Any,
    ) -> tuple[Any, ...]:
        """The part of a model that this process computes, cut by the model's own `shard`."""
        del pipeline_group, return_config  # pipelines are refused on the command line
        model, tokenizer = load(path, generated=self.cli_args.generated, lazy=True, **options)
        if not hasattr(model, "shard"):
            raise RuntimeRefusal(
                f"{path}: its model file has no `shard`, so it runs in one process"
            )
        model.shard(tensor_group)
        mx.eval(model.parameters())
        mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))  # until all have loaded
        return model, tokenizer, read_config(model_folder(path))


class Generator(upstream.ResponseGenerator):  # type: ignore[misc]
    """mlx_lm's loop around the paged batch generator."""

    _batch: PagedBatchGenerator | None = None

    def __init__(self, provider: Provider, prompt_cache: KnownPrefixes) -> None:
        try:
            from .metrics import Metrics

            self.metrics: Metrics | None = Metrics(self._engine)
        except ImportError:
            self.metrics = None  # prometheus-client is not installed
        prompt_cache.engine = self._engine
        super().__init__(provider, prompt_cache)
        self._time_budget = upstream.TimeBudget(POLL_SECONDS)

    def _engine(self) -> Engine | None:
        return None if self._batch is None else self._batch.engine

    def _generate(self) -> None:
        rebound(
            upstream.ResponseGenerator._generate,
            BatchGenerator=self._make_batch_generator,
            _make_sampler=_make_sampler,
            # A request with images is refused like others that cannot be read, and does not make
            # the others stop.
            _image_parts=lambda messages: iter(()),
        )(self)

    def _make_batch_generator(self, model: Any, **options: Any) -> PagedBatchGenerator:
        given = self.cli_args
        self._batch = None
        gc.collect()  # the caches of the one before: their parts hold each other
        mx.clear_cache()
        drafter: Drafter | None = None
        if self.model_provider.draft_model is not None:
            drafter = ModelDrafter(self.model_provider.draft_model, given.num_draft_tokens)
        elif given.ngram:
            drafter = NgramDrafter(given.ngram)
        prompts = self.model_provider.prompts
        self._batch = PagedBatchGenerator(
            model,
            keep_caches=False,
            report_errors=True,
            # A server has a fixed pool: what fits in it is known before a request is taken.
            kv_memory=given.kv_memory or _default_memory(),
            block_size=given.block_size,
            reuse=not given.no_prefix_cache,
            observer=self.metrics,
            drafter=drafter,
            kv_bits=given.kv_bits,
            kv_group_size=given.kv_group_size,
            complete=prompts.complete if prompts is not None else lambda request: request,
            disk=None if given.disk_cache is None else (given.disk_cache, given.disk_limit),
            **options,
        )
        return self._batch

    def _is_batchable(self, args: Any) -> bool:
        return bool(self.model_provider.is_batchable)

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        prompts = self.model_provider.prompts
        seen = False
        if prompts is not None and request.request_type == "chat":
            from .vision_serve import image_parts, without_images

            seen = any(image_parts(request.messages))
            if seen:
                texts = replace(request, messages=without_images(request.messages))
                state = super()._tokenize(tokenizer, texts, args)[3]
                keys = prompts.read(request.messages)
                found: Any = (keys, [list(keys)], ["assistant"], state, None)
            else:
                found = super()._tokenize(tokenizer, request, args)
        else:
            found = super()._tokenize(tokenizer, request, args)
        model = self.model_provider.model
        size = getattr(getattr(model, "args", None), "vocab_size", None) or 1 << 31
        for token in args.logits.logit_bias or ():
            if not 0 <= token < size:
                raise ValueError(f"logit_bias: the model has no token {token}")
        prompt, engine = found[0], self._engine()
        if not prompt:
            raise ValueError("an empty prompt: expected at least one token")
        if engine is not None:
            engine.require_room(len(prompt))
            if not seen:  # rows of images have names of their own
                engine.require_tokens(prompt)
        return found

    def generate(self, request: Any, generation_args: Any, progress_callback: Any = None) -> Any:
        """Called by a handler's thread: refuse here what would otherwise stop everybody."""
        wanted, given = generation_args.model, self.cli_args
        if not all(isinstance(word, str) and word for word in generation_args.stop_words):
            raise ValueError("stop: expected a text or a list of texts, none of them empty")
        seed = generation_args.seed
        if seed is not None and not 0 <= seed < 1 << 64:
            raise ValueError(f"seed: expected a number of 64 bits, got {seed}")
        if wanted.draft not in (None, "default_model"):
            raise ValueError("draft models are not supported by this server")
        if wanted.model != "default_model":
            if given.model is not None and _same(wanted.model, given.model):
                wanted.model = "default_model"
            else:
                read_config(model_folder(wanted.model))
                _require_caches(wanted.model, given)
        elif given.model is None:
            raise ValueError("the server was started without a model: name one")
        context, responses = super().generate(request, generation_args, progress_callback)
        return context, self._told(responses)

    @staticmethod
    def _told(responses: Any) -> Any:
        """The responses of a request, and its own error where it has one."""
        for response in responses:
            if isinstance(response.finish_reason, Failed):
                raise response.finish_reason.error
            yield response


class KnownPrefixes:
    """Stands for mlx_lm's prompt cache: how much of a prompt the engine's blocks know."""

    nbytes = 0

    def __init__(self, size: int) -> None:
        del size  # blocks are what is counted
        self.engine: Any = lambda: None

    def __len__(self) -> int:
        return 0

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[None, list[int]]:
        """No cache, and the tokens that no block knows; one at least."""
        engine = self.engine()
        return None, tokens[0 if engine is None else engine.known_length(tokens) :]

    def insert_cache(self, *args: Any, **options: Any) -> None:
        """Nothing to do: the blocks are there already."""

    def trim_to(self, **options: Any) -> None:
        """Nothing to do: blocks that nobody holds are free."""

    def stats_by_type(self) -> dict[str, Any]:
        return {}


class Handler(upstream.APIHandler):  # type: ignore[misc]
    """mlx_lm's handler and /metrics."""

    def do_GET(self) -> None:
        if self.path.split("?")[0] != "/metrics":
            super().do_GET()
            return
        metrics = self.response_generator.metrics
        if metrics is None:
            self.send_error(501, "metrics need the package prometheus-client")
            return
        text = metrics.text()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_POST(self) -> None:
        try:
            super().do_POST()
        except (
            UnicodeDecodeError,
            RecursionError,
        ) as problem:  # only its reader of JSON raises them
            self._set_completion_headers(400)
            self.end_headers()
            told = {"error": f"Invalid JSON in request body: {problem}"}
            self.wfile.write(json.dumps(told).encode())

    def handle_models_request(self) -> None:
        listed = rebound(upstream.APIHandler.handle_models_request, scan_cache_dir=_downloaded)
        listed(self)

    def handle_completion(self, request: Any, stop_words: Any) -> None:
        try:
            super().handle_completion(request, stop_words)
        except (BrokenPipeError, ConnectionResetError):
            logging.info("The client went away.")
            self.close_connection = True
        except Exception as problem:
            # This request's own: others go on, and its client is told.
            logging.exception("A request failed.")
            told = json.dumps({"error": {"message": str(problem), "type": type(problem).__name__}})
            if self.stream:  # its headers are sent
                self.wfile.write(f"data: {told}\n\n".encode())
            else:
                self._headers_buffer: list[bytes] = []  # those of an answer, not sent yet
                self._set_completion_headers(500)
                self.end_headers()
                self.wfile.write(told.encode())
            self.close_connection = True


def _require_caches(path: str, given: argparse.Namespace) -> None:
    """Raise RuntimeRefusal for a model whose caches are not quantised, if they are to be.

    Looks at the model without reading its weights, since the engine's thread could tell nobody.
    """
    asked = quantization(given.kv_bits, given.kv_group_size)
    if asked is not None and given.vlm:
        from .vision_serve import require_caches

        require_caches(path, given)
    elif asked is not None:
        model, _ = load_model(
            model_folder(path),
            generated=given.generated,
            lazy=True,
            trust_remote_code=given.trust_remote_code,
        )
        footprint(model, given.block_size, quantization=asked)


def _downloaded() -> Any:
    """What was downloaded; nothing where nothing ever was."""
    try:
        return scan_cache_dir()
    except CacheNotFound:
        return SimpleNamespace(repos=())


def _make_sampler(args: Any, tokenizer: Any) -> Any:
    sampler = upstream._make_sampler(args, tokenizer)
    return sampler if args.seed is None else Seeded(sampler, args.seed)


def _default_memory() -> int:
    found = device_memory()
    return min(found, HOST_MEMORY) if mx.default_device() == mx.cpu else found


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    left, right = Path(one).expanduser(), Path(other).expanduser()
    return left.is_dir() and right.is_dir() and left.resolve() == right.resolve()
