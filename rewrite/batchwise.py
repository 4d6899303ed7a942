"""Whether a mixer treats each sequence of an unpadded batch [N, L, ...] on its own.

Mixers of mlx_lm are written for batches, and what they do along the first axis is nothing, as a
rule. What would join sequences, or make Python depend on their values, is looked for here; a mixer
that has any of it runs once per sequence instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .ir import Assign, Expr, Method, ModuleFacts, Value
from .match import Mixer, callee_name, every_value
from .outliving import below
from .softmax import number
from .states import Reach

_REDUCTIONS = frozenset(
    {
        *("sum", "mean", "max", "min", "prod", "var", "std", "any", "all", "logsumexp", "softmax"),
        *("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"),
        *("sort", "argsort", "argmax", "argmin", "argpartition", "partition", "topk"),
    }
)
_TO_PYTHON = frozenset({"item", "tolist"})
# Where the axes stand of what moves, joins or picks entries; without one it is the first, or all.
_MOVES = {
    **{f"mlx.core.{name}": 1 for name in ("concatenate", "stack", "expand_dims", "split")},
    **{f"mlx.core.{name}": 2 for name in ("roll", "repeat", "take", "take_along_axis", "tile")},
    **{"mlx.core.flatten": 1, "mlx.core.put_along_axis": 3, "mlx.core.linalg.norm": 2},
}
_TURNS = frozenset({"transpose", "swapaxes", "moveaxis"})
_ALONG = frozenset(
    {name.rpartition(".")[2] for name in _MOVES}
    | {*_REDUCTIONS, *_TURNS, "squeeze", "einsum", "len", "matmul", "tensordot", "vmap"}
)
_DECORATING = (
    *("mlx.core", "functools", "builtins.property"),
    *("builtins.staticmethod", "builtins.classmethod"),
)


def joins_sequences(mixer: Mixer) -> Value | None:
    """A value, in what the class's forward may run, that depends on several sequences at once."""
    file = mixer.program.modules[mixer.cls.module]
    own = set(map(id, file.methods()))
    for method in Reach(mixer).methods:
        values = list(every_value(method))
        calls = (v for v in values if v.op == "call")
        joining = next((v for v in calls if _joins(mixer, v) or _turns(mixer, v)), None)
        if joining is None and id(method) in own and _wrapped(file, method):
            joining = next(iter(values), None)
        if joining is None and id(method) in own:
            joining = _counting(values)
            if joining is None and len(method.params) > (_this(method) is not None):
                picks = (v for v in values if _picks_sequences(mixer, v))
                joining = next((v for v in picks if _holds_rows(mixer, v.args[0], method)), None)
                inner = (v for v in values if any(map(_may_join, v.args)))
                joining = joining or next(inner, None)
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


def _wrapped(file: ModuleFacts, method: Method) -> bool:
    """A decorator of the file's own, or of somebody else's, may do anything with what is given."""
    for decorator in method.function.decorators:
        stack = [decorator]
        while stack:
            expr = stack.pop()
            stack.extend(expr.args)
            if expr.op != "name":
                continue
            bound = file.names.get(expr.data)
            name = bound.data if bound is not None else f"builtins.{expr.data}"
            if not str(name).startswith(_DECORATING):
                return True
    return False


def _picks_sequences(mixer: Mixer, value: Value) -> bool:
    """`x[-1:]`, `x[::-1]`, `x[0, 1]`: entries along the first axis; `x[None]` and `x.T` move it."""
    if value.op == "attr":
        return bool(value.data == "T")
    if value.op != "index" or mixer.is_cache(value.args[0]):
        return False
    base, key = value.args
    if base.op == "attr" and base.data == "shape":
        return False
    first = key.args[0] if key.op == "tuple" and key.args else key
    if first.op == "slice":
        return any(part.op != "const" or part.data is not None for part in first.args)
    if first.op == "const":
        # One number alone may be an item of a tuple.
        return first.data is None or (key.op == "tuple" and first.data is not Ellipsis)
    return key.op == "tuple"


def _may_join(value: Value) -> bool:
    """A function inside the method that picks, counts or reduces, along the first axis or an
    axis that is not a number."""
    if value.op != "closure":
        return False
    for part in below(value.data):
        if isinstance(part, Assign) and part.value is not None and _is_shape(part.value):
            return True
        if not isinstance(part, Expr):
            continue
        if part.op == "subscript" and not (_is_shape(part.args[0]) and part.args[1].op == "slice"):
            return True
        if part.op == "attr" and part.data in ("T", "at", *_TO_PYTHON):
            return True
        if part.op == "call" and part.args[0].op in ("attr", "name"):
            if part.args[0].data in _ALONG and not _other_axes(part):
                return True
    return False


def _is_shape(expr: Expr) -> bool:
    return bool(expr.op == "attr" and expr.data == "shape")


def _other_axes(call: Expr) -> bool:
    """The numbers among the arguments, at least one, are no first axis."""
    numbers = [
        part.data
        for given in call.args[1:]
        for part in below(given)
        if isinstance(part, Expr) and part.op == "const" and isinstance(part.data, int)
    ]
    return bool(numbers) and 0 not in numbers


def _holds_rows(mixer: Mixer, value: Value, method: Method) -> bool:
    """Something of single sequences may be in it: not in shapes, nor in what the mixer itself
    holds."""
    this = _this(method)
    stack = [value]
    while stack:
        current = stack.pop()
        if current.op == "attr" and current.data in ("shape", "ndim", "dtype"):
            continue
        if current.op == "call" and callee_name(mixer.program, current) == "mlx.core.arange":
            continue
        if current.op in ("param", "closure", "unknown") and current is not this:
            return True
        stack.extend(current.args)
    return False


def _this(method: Method) -> Value | None:
    """The mixer itself, as a method knows it."""
    bound = method.owner is not None and not method.function.decorators
    return method.params[0] if bound and method.params else None


def _turns(mixer: Mixer, call: Value) -> bool:
    """The first axis goes elsewhere."""
    callee = call.args[0]
    name = callee_name(mixer.program, call)
    if name is not None:
        module, _, function = name.rpartition(".")
        axes = call.args[2:]
        if module != "mlx.core" or function not in _TURNS:
            return False
    elif callee.op == "attr" and callee.data in _TURNS:
        function, axes = callee.data, call.args[1:]
    else:
        return False
    if len(axes) == 1 and axes[0].op in ("tuple", "list"):
        axes = axes[0].args
    numbers = [number(axis) for axis in axes]
    if function == "transpose":
        return numbers[:1] != [0]
    return 0 in numbers or None in numbers


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
