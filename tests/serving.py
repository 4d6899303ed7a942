"""A tiny random model with a tokenizer, and a server of it in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlxrewrite.runtime.weights import randomise

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(folder: Path) -> Path:
    """A llama of two layers with a byte tokenizer and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Printable ASCII, so that whatever a random model says is text. A space is written as "\u0120".
    alphabet = [chr(code) for code in range(33, 127)] + ["\u0120"]
    specials = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {text: i for i, text in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=TEMPLATE
    )
    folder.mkdir(parents=True)
    wrapped.save_pretrained(str(folder))
    config = {**CONFIG, "vocab_size": len(vocabulary), "eos_token_id": 0}
    model = llama.Model(llama.ModelArgs.from_dict(config))
    randomise(model, 7)
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`mlxrewrite serve` on loopback; ends with the `with` block. `before`: runs before it."""

    def __init__(
        self, folder: Path, log: Path, *options: str, port: int | None = None, before: str = ""
    ) -> None:
        self.port = port or free_port()
        self.log = log
        words = ["--model", str(folder), "--port", str(self.port), "--log-level", "WARNING"]
        code = "import sys; from mlxrewrite.cli import entry; sys.argv[0] = 'mlxrewrite'\n"
        code += before + "\nentry()"
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, "serve", *words, *options],
                stdout=out,
                stderr=out,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )

    def __enter__(self) -> Server:
        for _ in range(1200):
            try:
                if self.get("/health")["status"] == "ok":
                    return self
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise AssertionError("the server does not start: " + self.log.read_text())

    def __exit__(self, *problem: object) -> None:
        self.kill()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            data = response.read()
            if "json" in response.headers["Content-Type"]:
                return json.loads(data)
            return data.decode()

    def metrics(self) -> dict[str, float]:
        lines = [line for line in self.get("/metrics").splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
