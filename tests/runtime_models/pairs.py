"""The fixture models in pairs: original and rewritten, with the same random weights."""

from importlib import import_module
from typing import Any

import mlx.core as mx
from mlxrewrite.runtime.weights import randomise

PAIRS = {
    "plain": ("plain", "plain_rewritten"),
    "shared_windows": ("shared_windows", "shared_windows_rewritten"),
    "hybrid": ("hybrid", "hybrid_rewritten"),
    "hybrid_model": ("hybrid", "hybrid_model"),
}


def make_pair(name: str, seed: int = 0, **args: Any) -> tuple[Any, Any]:
    made = []
    for module_name in PAIRS[name]:
        module = import_module(f"runtime_models.{module_name}")
        made.append(module.Model(module.ModelArgs(**args)))
    randomise(made[0], seed)
    made[1].update(made[0].parameters())
    mx.eval(made[1].parameters())
    return made[0], made[1]
