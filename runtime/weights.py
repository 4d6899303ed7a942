"""Random weights under which every branch of a model leaves a mark on its logits.

The initial values of a freshly built model hide mistakes: gains are one, biases, sinks and
routers are zero, and a decay can forget everything but the current token. `randomise` replaces
them by rules about shapes and initial values. The only names it looks at are those of decay
parameters and the kind of module (embedding, norm), which no shape can tell.

| parameter                            | value                                                   |
|--------------------------------------|---------------------------------------------------------|
| packed weights with scales           | the quantised form of the matrix they stand for         |
| other unsigned integers              | uniform bytes                                           |
| other integers, booleans             | unchanged                                               |
| `A_log`                              | log of uniform(0.05, 1)                                 |
| `dt_bias`, `dt_proj.bias`            | -1 + 0.5 n                                              |
| `recurrent_param` (RG-LRU)           | -3 + 0.5 n                                              |
| one element                          | initial * (1 + 0.2 n), or 0.5 + 0.1 n where it was zero |
| one axis longer than one             | initial + 0.2 n                                         |
| several axes, an embedding's         | 0.5 n                                                   |
| several axes, all the same non-zero  | initial + 0.2 n (a gain per head)                       |
| several axes, all zero, a norm's     | n (a gain per head)                                     |
| depthwise convolution [C, K, 1]      | n / sqrt(K)                                             |
| any other matrix [..., out, in]      | n / sqrt(in)                                            |

n is standard normal. `A_log` and `dt_bias` together give a decay exp(-exp(A_log) *
softplus(x + dt_bias)) of about 0.5 to 1 per token for x of unit variance, so a state neither
explodes nor forgets within a test prompt; RG-LRU's exp(-8 * gate * softplus(p)) gets about 0.8
for a gate of one half. An embedding as large as what a layer adds to it keeps both the token and
the mixing visible; tied logits then have a standard deviation of about 0.5 sqrt(width). The
matrix rule covers routers (logits near unit variance) and stacked experts or heads. Zeroed
vectors such as biases and sinks become 0.2 n.
"""

from __future__ import annotations

import math
import os
import zlib

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from .errors import BadModel


def randomise(model: nn.Module, seed: int) -> None:
    """Replace every parameter of `model` in place, unquantised floating ones as float32.

    Args:
        model: a built model; its present values decide between gains and matrices, so build it
            after `mx.random.seed(seed)` where an initial value is itself random.
        seed: 0 <= seed < 2**32. A parameter's values depend on the seed, its dotted path, its
            shape and its initial values only, never on the order or number of parameters.

    Raises:
        ValueError: the model has no parameters, or the seed is out of range.
        BadModel: the parameters do not fit into this machine's memory. They are lazy in a model
            that was just built, and to compute larger ones can end the process.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"expected a seed in [0, 2**32), got {seed}: pass a 32-bit number")
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    if not parameters:
        raise ValueError(
            f"expected a model with parameters, got {type(model).__name__} without any: "
            "build the model before calling randomise"
        )
    needed, there = 4 * sum(array.size for _, array in parameters), _memory()
    if needed > there:
        raise BadModel(
            f"the weights of this {type(model).__module__} take {needed >> 30} GiB and this "
            f"machine has {there >> 30}: does the config leave out a size with a large default?"
        )
    owners: dict[str, nn.Module] = dict(model.named_modules())
    fresh = []
    for path, initial in parameters:
        place, _, leaf = path.rpartition(".")
        owner = owners.get(place, model)
        if "scales" in owner and leaf in ("weight", "scales", "biases"):
            key = _key(seed, f"{place}.weight")
            fresh.append((path, _packed(owner, key)[leaf].astype(initial.dtype)))
        else:
            fresh.append((path, _draw(path, owner, initial, _key(seed, path))))
    model.update(tree_unflatten(fresh))
    mx.eval(model.parameters())


def _memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _key(seed: int, path: str) -> mx.array:
    return mx.random.key(seed ^ zlib.crc32(path.encode()))


def _is(owner: nn.Module, kind: str) -> bool:
    return kind in type(owner).__name__.lower()


def _draw(path: str, owner: nn.Module, initial: mx.array, key: mx.array) -> mx.array:
    shape = initial.shape
    if not mx.issubdtype(initial.dtype, mx.floating):
        return _bytes(initial, key)
    normal = mx.random.normal(shape, key=key)
    leaf = path.rpartition(".")[2]
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
    if _is(owner, "embedding"):
        return 0.5 * normal
    first = start.flatten()[0]
    if mx.all(start == first).item():
        if first.item() != 0:
            return start + 0.2 * normal
        if _is(owner, "norm"):
            return normal
    fan_in = shape[-2] if shape[-1] == 1 else shape[-1]
    return normal / math.sqrt(fan_in)


def _packed(owner: nn.Module, key: mx.array) -> dict[str, mx.array]:
    """Quantise a random matrix with the bits, group size and mode of a quantised module."""
    *rows, words = owner["weight"].shape
    width = words * 32 // owner.bits
    dense = mx.random.normal((*rows, width), key=key)
    dense = dense * (0.5 if _is(owner, "embedding") else 1 / math.sqrt(width))
    parts = mx.quantize(
        dense, owner.group_size, owner.bits, mode=getattr(owner, "mode", None) or "affine"
    )
    return dict(zip(("weight", "scales", "biases"), parts, strict=False))


def _bytes(initial: mx.array, key: mx.array) -> mx.array:
    """Random bytes for packed (unsigned) weights; index tables and flags stay as they are."""
    if not mx.issubdtype(initial.dtype, mx.unsignedinteger):
        return initial
    *rows, columns = initial.shape
    drawn = mx.random.randint(0, 256, (*rows, columns * initial.dtype.size), key=key)
    return drawn.astype(mx.uint8).view(initial.dtype)
