"""Random weights under which every branch of a model leaves a mark on its logits.

The initial values of a freshly built model hide mistakes: gains are one, biases, sinks and
routers are zero, and a decay can forget everything but the current token. `randomise` replaces
them by rules about shapes and initial values. The only names it looks at are those of decay
parameters and of norm modules, whose value ranges no shape can tell.

| parameter                            | value                                                   |
|--------------------------------------|---------------------------------------------------------|
| `A_log`                              | log of uniform(0.05, 1)                                 |
| `dt_bias`, `dt_proj.bias`            | -1 + 0.5 n                                              |
| `recurrent_param` (RG-LRU)           | -3 + 0.5 n                                              |
| unsigned integers (packed weights)   | uniform bits                                            |
| other integers, booleans             | unchanged                                               |
| one element                          | initial * (1 + 0.2 n), or 0.5 + 0.1 n where it was zero |
| one axis longer than one             | initial + 0.2 n                                         |
| several axes, all the same non-zero  | initial + 0.2 n (a gain per head)                       |
| several axes, all zero, a norm's     | n (a gain per head)                                     |
| depthwise convolution [C, K, 1]      | n / sqrt(K)                                             |
| any other matrix [..., out, in]      | n / sqrt(in)                                            |

n is standard normal. `A_log` and `dt_bias` together give a decay exp(-exp(A_log) *
softplus(x + dt_bias)) of about 0.6 to 1 per token for x of unit variance, so a state neither
explodes nor forgets within a test prompt; RG-LRU's exp(-8 * gate * softplus(p)) gets about 0.8
for a gate of one half. The matrix rule covers embeddings (a row has unit length, so tied logits
have a standard deviation near one after a norm), routers (logits near unit variance) and stacked
experts or heads. Zeroed vectors such as biases and sinks become 0.2 n.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


def randomise(model: nn.Module, seed: int) -> None:
    """Replace every parameter of `model` in place, floating ones as float32.

    Args:
        model: a built model; its present values decide between gains and matrices, so build it
            after `mx.random.seed(seed)` where an initial value is itself random.
        seed: 0 <= seed < 2**32. A parameter's values depend on the seed, its dotted path, its
            shape and its initial values only, never on the order or number of parameters.

    Raises:
        ValueError: the model has no parameters, or the seed is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"expected a seed in [0, 2**32), got {seed}: pass a 32-bit number")
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    if not parameters:
        raise ValueError(
            f"expected a model with parameters, got {type(model).__name__} without any: "
            "build the model before calling randomise"
        )
    norms = {path for path, module in model.named_modules() if "norm" in _class_name(module)}
    fresh = [(path, _draw(path, value, norms, seed)) for path, value in parameters]
    model.update(tree_unflatten(fresh))
    mx.eval(model.parameters())


def _class_name(module: Any) -> str:
    return type(module).__name__.lower()


def _draw(path: str, initial: mx.array, norms: set[str], seed: int) -> mx.array:
    key = mx.random.key(seed ^ zlib.crc32(path.encode()))
    shape, dtype = initial.shape, initial.dtype
    if not mx.issubdtype(dtype, mx.floating):
        if mx.issubdtype(dtype, mx.unsignedinteger):
            return mx.random.bits(shape, width=4, key=key).astype(dtype)
        return initial
    owner, _, leaf = path.rpartition(".")
    normal = mx.random.normal(shape, key=key)
    if leaf == "A_log":
        return mx.log(mx.random.uniform(0.05, 1.0, shape, key=key))
    if leaf == "dt_bias" or path.endswith("dt_proj.bias"):
        return -1.0 + 0.5 * normal
    if leaf == "recurrent_param":
        return -3.0 + 0.5 * normal
    start = initial.astype(mx.float32)
    if initial.size == 1:
        return mx.where(start == 0, 0.5 + 0.1 * normal, start * (1.0 + 0.2 * normal))
    if initial.size == max(shape):
        return start + 0.2 * normal
    if bool(mx.all(start == start.flatten()[0])):
        if start.flatten()[0].item() != 0:
            return start + 0.2 * normal
        if owner in norms:
            return normal
    fan_in = shape[-2] if shape[-1] == 1 else shape[-1]
    return normal / math.sqrt(fan_in)
