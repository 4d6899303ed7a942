"""Which files are changed, under which configs, and which of all possible mutants are run."""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .operators import Operator, all_operators
from .source import Change, File
from .worlds import Library

CONFIGS = Path(__file__).parent.parent / "configs"
# Their kernels have no form off Metal.
UNRUN = frozenset({"bitnet", "muse_spark"})
# The unchanged file already gives other logits for other cuts of a prompt (tests/test_configs.py
# says why), or cannot run on several tokens at once: it is no reference for chunks.
UNFAIR = frozenset({"olmo", "phi3small"})
# Every kind, and every way that files are put together: what a run is made of by default.
EVERY_KIND = (
    "Klear", "afm7", "baichuan_m1", "bailing_hybrid", "bailing_moe_linear", "cohere2", "dbrx",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "exaone4", "falcon_h1", "gear", "gemma2",
    "gemma3_text", "gemma3n", "gemma4_text", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_oss",
    "granitemoehybrid", "hunyuan", "iquestloopcoder", "jamba", "kimi_linear", "lfm2", "llama",
    "llama4_text", "longcat_flash_ngram", "mamba", "mamba2", "mimo_v2_flash", "minicpm3",
    "minimax_m3_vl", "mixtral", "nanochat", "nemotron_h", "olmo3", "olmo_hybrid", "openelm",
    "phi3", "plamo", "plamo2", "qwen3_5", "qwen3_next", "recurrent_gemma", "rwkv7", "stablelm",
    "starcoder2", "step3p5",
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of one file, run through `entry` under a config."""

    operator: Operator
    file: str
    config: str
    number: int  # of the operator's changes of this file
    change: Change

    @property
    def name(self) -> str:
        return f"{self.config}:{self.operator.name}:{self.number}"

    def texts(self, file: File) -> dict[str, str]:
        return {self.file: file.apply(self.change), **dict(self.change.beside)}


def config_of(name: str) -> dict[str, Any]:
    return dict(json.loads((CONFIGS / f"{name}.json").read_text()))


def config_names() -> list[str]:
    """One config a model file, the plain one; more where a variant takes other code."""
    plain = sorted(path.stem for path in CONFIGS.glob("*.json") if "@" not in path.stem)
    variants = ["llama@sliding", "gemma2@mha", "deepseek_v3@no_q_lora", "gemma@mqa"]
    names = [*plain, *variants]
    return [n for n in names if n.split("@")[0] not in UNRUN | UNFAIR]


def mutants(
    library: Library,
    config: str,
    operators: Sequence[str] = (),
    each: int | None = None,
    seed: int = 0,
) -> Iterator[Mutant]:
    """Mutants of the file of a config, at most `each` of an operator, chosen by the seed."""
    name = config.split("@", maxsplit=1)[0]
    file = _file(library, name)
    known = all_operators()
    for operator in map(known.__getitem__, operators or known):
        changes = list(enumerate(operator.apply(file)))
        if each is not None and len(changes) > each:
            chance = random.Random(f"{seed} {config} {operator.name}")
            changes = sorted(chance.sample(changes, each), key=lambda pair: pair[0])
        for number, change in changes:
            mutant = Mutant(operator, name, config, number, change)
            if valid(mutant, file):
                yield mutant


def sample(library: Library, config: str, count: int, seed: int) -> list[Mutant]:
    """`count` mutants of the file of a config, each by another operator.

    All operators stand in a circle, shuffled by the seed, and the files take their turns around
    it: together they come to every operator about as often.
    """
    operators = list(all_operators())
    random.Random(seed).shuffle(operators)
    names = config_names()
    start = names.index(config) * count if config in names else 0
    found: list[Mutant] = []
    for i in range(len(operators)):
        if len(found) == count:
            break
        name = operators[(start + i) % len(operators)]
        found += mutants(library, config, (name,), 1, seed)
    return found


def stratified(
    library: Library, configs: Sequence[str], each: int, seed: int
) -> dict[str, list[Mutant]]:
    """`each` mutants of the file of every config. Families take turns from one file to the next,
    and no operator comes twice."""
    chance = random.Random(seed)
    waiting: dict[str, list[str]] = {}
    for operator in all_operators().values():
        waiting.setdefault(operator.family, []).append(operator.name)
    for names in waiting.values():
        chance.shuffle(names)
    turns = itertools.cycle(waiting)
    found: dict[str, list[Mutant]] = {config: [] for config in configs}
    for config in configs:
        for family in turns:
            for name in waiting[family]:
                if here := list(mutants(library, config, (name,), 1, seed)):
                    waiting[family].remove(name)
                    found[config] += here
                    break
            if len(found[config]) == each:
                break
    return found


@functools.cache
def _file(library: Library, name: str) -> File:
    return File(name, library.text(name))


def valid(mutant: Mutant, file: File) -> bool:
    """Still Python, and not what it was."""
    try:
        texts = mutant.texts(file)
        for text in texts.values():
            compile(text, "mutant", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return texts[mutant.file] != file.text or len(texts) > 1
