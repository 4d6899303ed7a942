"""Whether a mixer treats each sequence of an unpadded batch [N, L, ...] on its own.

Mixers of mlx_lm are written for batches, and what they do along the first axis is nothing, as a
rule. What would join sequences, or make Python depend on their values, is looked for here; a mixer
that has any of it runs once per sequence instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .ir import Value
from .match import Mixer, callee_name, every_value
from .states import Reach

_REDUCTIONS = frozenset(
    {
        *("sum", "mean", "max", "min", "prod", "var", "std", "any", "all", "logsumexp", "softmax"),
        *("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"),
        *("sort", "argsort", "argmax", "argmin", "argpartition", "partition", "topk"),
    }
)
_TO_PYTHON = frozenset({"item", "tolist"})
_MOVES = {"mlx.core.flatten": 1, "mlx.core.roll": 2}  # where their axis stands


def joins_sequences(mixer: Mixer) -> Value | None:
    """A value, in what the class's forward may run, that depends on several sequences at once."""
    file = mixer.program.modules[mixer.cls.module]
    own = {id(method) for method in file.functions.values()}
    own |= {id(method) for cls in file.classes.values() for method in cls.methods.values()}
    for method in Reach(mixer).methods:
        values = list(every_value(method))
        joining = next((v for v in values if v.op == "call" and _joins(mixer, v)), None)
        if joining is None and id(method) in own:
            joining = _counting(values)
        if joining is not None:
            return joining
    return None


def _counting(values: Sequence[Value]) -> Value | None:
    """What computes with the number of sequences. Kernel launches are sized by it; shared
    functions of mlx_lm, which are not asked, do no more with it."""
    sizes = {id(size) for value in values for size in _launch_sizes(value)}
    return next(
        (
            value
            for value in values
            if value.op in ("binary", "compare", "bool")
            and id(value) not in sizes
            and _counts_sequences(value)
        ),
        None,
    )


def _launch_sizes(value: Value) -> Iterator[Value]:
    """What the grid of a kernel's launch is made of."""
    if value.op == "call":
        for keyword, given in zip(value.data, value.args[1:], strict=True):
            if keyword == "grid":
                yield from given.walk()


def _counts_sequences(value: Value) -> bool:
    """Arithmetic with the length of the first axis, or a test of it: there are several sequences
    here where the original sees one. In a shape it does no harm."""
    return any(
        part.op in ("item", "index")
        and part.args[0].op == "attr"
        and part.args[0].data == "shape"
        and (part.data == 0 or (part.op == "index" and part.args[1].data == 0))
        for part in value.args
    )


def _joins(mixer: Mixer, call: Value) -> bool:
    callee = call.args[0]
    name = callee_name(mixer.program, call)
    if name in _MOVES:
        return _over_first_axis(call, _MOVES[name])
    if name is not None:
        module, _, function = name.rpartition(".")
        return module == "mlx.core" and function in _REDUCTIONS and _over_first_axis(call, 1)
    if callee.op != "attr":
        return False
    if callee.data in _TO_PYTHON:
        return True
    return callee.data in _REDUCTIONS and _over_first_axis(call, 0)


def _over_first_axis(call: Value, position: int) -> bool:
    """The axis is 0, or there is none: then all axes are reduced."""
    axis = None
    place = 0
    for keyword, value in zip(call.data, call.args[1:], strict=True):
        if keyword in ("axis", "start_axis") or (keyword is None and place == position):
            axis = value
        place += keyword is None
    if axis is None:
        return True
    parts = axis.args if axis.op in ("tuple", "list") else (axis,)
    return any(part.op == "const" and part.data == 0 for part in parts)
