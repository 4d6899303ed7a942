"""Calls of mlx for the rules of token axes: each is spelled once and run twice.

Once on numbers, by mlx; once on abstract values, by the rule. Axes are spelled in letters, with a
random size each: `r` are rows, `l` is the length, any other letter is a feature, digits are
themselves, and several together are one merged axis (`rl`, `ab`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlxrewrite.axes.domain import (
    CONSTANT,
    LENGTH,
    ROWS,
    Array,
    Constant,
    Count,
    Factor,
    Instance,
    Iterable_,
    Known,
    Refused,
    Slice,
    Tuple,
    Value,
    feature,
)
from mlxrewrite.axes.interpret import Interpreter
from mlxrewrite.axes.layers import FUNCTIONS, LAYERS
from mlxrewrite.axes.rules import ELEMENTWISE, RULES, elementwise
from mlxrewrite.axes.world import World

# --------------------------------------------------------------------------- the spelling


@dataclass(frozen=True)
class T:
    """An array of random numbers: of what `kind`, and, as indices, below which size."""

    axes: str
    kind: str = "float"
    below: str = "4"
    tag: tuple[Hashable, ...] = ()


@dataclass(frozen=True)
class D:
    """A size: how many rows, of features, ..."""

    spelled: str


@dataclass(frozen=True)
class P:
    """A parameter: made by a function of the sizes; `axes` as far as the analysis knows them."""

    make: Callable[[Sizes], Any]
    axes: str | None = None


@dataclass(frozen=True)
class Case:
    """`rule(*args, **more)`; `careful` says why it is refused although no row leaks; the entries
    of a `still` result do not change with the input (almost) ever."""

    rule: str
    args: tuple[Any, ...]
    more: dict[str, Any] = field(default_factory=dict)
    careful: str = ""
    still: bool = False

    def __str__(self) -> str:
        parts = [_spell(a) for a in self.args]
        parts += [f"{k}={_spell(v)}" for k, v in self.more.items()]
        return f"{self.rule}({','.join(parts)})"


def _spell(value: Any) -> str:
    match value:
        case T(axes=axes):
            return axes.replace(" ", "_")
        case D(spelled=spelled):
            return spelled
        case P():
            return "P"
        case tuple() | list():
            return "[" + ",".join(map(_spell, value)) + "]"
        case slice():
            return ":".join(
                "" if v is None else _spell(v) for v in (value.start, value.stop, value.step)
            )
    return str(value).rpartition(".")[2] or "..."


def case(rule: str, *args: Any, careful: str = "", still: bool = False, **more: Any) -> Case:
    return Case(rule, args, more, careful, still)


class Sizes(dict[str, int]):
    """The size of each letter. `symbolic`: the rule sees keys of the config instead of numbers."""

    symbolic = False

    def number(self, spelled: str) -> int:
        if spelled.isdigit():
            return int(spelled)
        return int(np.prod([self[letter] for letter in spelled], dtype=int))

    def key(self, letters: str) -> Hashable:
        if not self.symbolic or letters.isdigit():
            return self.number(letters)
        return letters if len(letters) == 1 else ("*", *letters)

    def axis(self, spelled: str) -> tuple[Factor, ...]:
        tokens = "" if spelled.isdigit() else "".join(c for c in spelled if c in "rl")
        rest = spelled[len(tokens) :]
        assert spelled.startswith(tokens)
        return (*(_TOKENS[c] for c in tokens), *(feature(self.key(rest)) if rest else ()))

    def size(self, spelled: str) -> Value:
        if spelled.isdigit():
            return Known(int(spelled))
        tokens = tuple(_TOKENS[c] for c in spelled if c in "rl")
        rest = "".join(c for c in spelled if c not in "rl")
        key = self.key(rest) if rest else 1
        if tokens:
            return Count(tokens, key)
        return Constant(key) if self.symbolic else Known(key)

    def known(self, key: Hashable) -> int | None:
        """The number behind a size that a rule claims."""
        match key:
            case int():
                return key
            case str() if key in self:
                return self[key]
            case tuple() if key[:1] == ("*",):
                parts = [self.known(part) for part in key[1:]]
                return None if None in parts else int(np.prod(parts, dtype=int))
        return None


_TOKENS = {"r": ROWS, "l": LENGTH}


def sizes(chance: random.Random, *, equal: bool = False) -> Sizes:
    """Random sizes; `equal` ones leave a wrong claim nothing to be caught by but the numbers."""
    made = Sizes()
    made.symbolic = chance.random() < 0.5
    same = chance.choice((3, 4))
    for letter in "rlabcdehk":
        made[letter] = same if equal else chance.choice((3, 4, 5))
    return made


# --------------------------------------------------------------------------- both readings


def numbers(value: Any, given: Sizes, arrays: dict[int, mx.array]) -> Any:
    """The arguments for mlx; arrays are those already made."""
    match value:
        case T():
            return arrays[id(value)]
        case D(spelled=spelled):
            return given.number(spelled)
        case P(make=make):
            return make(given)
        case tuple() | list():
            return type(value)(numbers(v, given, arrays) for v in value)
        case slice():
            parts = (value.start, value.stop, value.step)
            return slice(*(numbers(v, given, arrays) for v in parts))
    return value


def made(value: T, given: Sizes) -> mx.array:
    shape = tuple(map(given.number, value.axes.split()))
    match value.kind:
        case "int":
            return mx.random.randint(0, given.number(value.below), shape)
        case "uint8":
            return mx.random.randint(0, 256, shape).astype(mx.uint8)
        case "packed":
            return mx.random.randint(0, 2**31 - 1, shape).astype(mx.uint32)
        case "bool":
            return mx.random.uniform(shape=shape) > 0.5
        case "unit":
            return mx.random.uniform(0.05, 0.95, shape)
        case "above":
            return mx.random.uniform(1.1, 3.0, shape)
        case "order":
            return mx.array(np.stack([np.random.permutation(shape[-1])]).reshape(shape))
    return mx.random.normal(shape) * 2


def abstract(value: Any, given: Sizes) -> Value:
    """The arguments for the rule."""
    match value:
        case T(axes=axes, tag=tag):
            return Array(tuple(map(given.axis, axes.split())), tag=tag)
        case D(spelled=spelled):
            return given.size(spelled)
        case P(axes=axes):
            return Array(tuple(map(given.axis, axes.split())) if axes is not None else None)
        case tuple() | list():
            return Tuple(tuple(abstract(v, given) for v in value))
        case slice():
            return Slice(*(abstract(v, given) for v in (value.start, value.stop, value.step)))
        case mx.Dtype():
            return CONSTANT
    return Known(value)


def tensors(value: Any) -> list[T]:
    if isinstance(value, T):
        return [value]
    if isinstance(value, slice):
        return tensors((value.start, value.stop, value.step))
    if isinstance(value, tuple | list):
        return [t for part in value for t in tensors(part)]
    return []


def interpreter() -> Interpreter:
    made_ = Interpreter(World(lambda _: None), {})
    made_.setup("test").__enter__()
    made_.forward = True
    return made_


def claim(one: Case, given: Sizes) -> list[Array]:
    """What the rule says of each array of the result; raises `Refused`."""
    machine = interpreter()
    args = [abstract(a, given) for a in one.args]
    more = {k: abstract(v, given) for k, v in one.more.items()}
    match one.rule.split("."):
        case ["index"]:
            out = machine.subscript(*args)
        case ["store"]:
            from mlxrewrite.axes.indexing import store

            out = store(machine, *args)  # type: ignore[arg-type]
        case ["at"]:
            place = machine.subscript(machine.attribute(args[0], "at"), args[1])
            out = machine.call(machine.attribute(place, "add"), args[2:], more)
        case ["nn", name] if name in LAYERS:
            out = machine.call_layer(Instance(None, {}, name), args, more)
        case ["nn", name]:
            out = machine.call_nn(name, args, more)
        case ["python", operator]:
            out = machine.binary(operator, *args)
        case _:
            out = machine.call_core(one.rule, args, more)
    found = list(out.items) if isinstance(out, Tuple) else [out]
    found = [v.element if isinstance(v, Iterable_) else v for v in found]
    for value in found:
        if isinstance(value, Array) and value.tag:
            elementwise(machine, value)  # it may be no data: refused, where used as such
    return [v for v in found if isinstance(v, Array)]


OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "@": lambda a, b: a @ b,
    "<": lambda a, b: a < b,
}


def run(one: Case, args: Sequence[Any], more: dict[str, Any]) -> list[np.ndarray]:
    """What mlx computes."""
    match one.rule.split("."):
        case ["index"]:
            out = args[0][args[1]]
        case ["store"]:
            out = mx.array(args[0])
            out[args[1]] = args[2]
        case ["at"]:
            out = args[0].at[args[1]].add(args[2])
        case ["nn", name] if name in LAYERS:
            mx.random.seed(0)
            layer = LAYER_ARGS[name]()
            layer.eval()
            out = layer(*args, **more)
        case ["nn", name]:
            out = getattr(nn, name)(*args, **more)
        case ["python", operator]:
            out = OPERATORS[operator](*args)
        case parts:
            function: Any = mx
            for part in parts:
                function = getattr(function, part)
            out = function(*args, **more)
    several = list(out) if isinstance(out, tuple | list) else [out]
    return [
        np.array(v.astype(mx.float32) if v.dtype == mx.bfloat16 else v)
        for v in several
        if v is not None
    ]


LAYER_ARGS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(8, 6),
    "QuantizedLinear": lambda: nn.QuantizedLinear(64, 8),
    "Embedding": lambda: nn.Embedding(9, 6),
    "QuantizedEmbedding": lambda: nn.QuantizedEmbedding(9, 64),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "LayerNorm": lambda: nn.LayerNorm(8),
    "Dropout": lambda: nn.Dropout(0.5),
    "Identity": nn.Identity,
    "Softmax": nn.Softmax,
    "GLU": nn.GLU,
    "RoPE": lambda: nn.RoPE(4),
    "Conv1d": lambda: nn.Conv1d(8, 6, 2),
    "Conv2d": lambda: nn.Conv2d(8, 6, 2),
    "BatchNorm": lambda: _training(nn.BatchNorm(8)),
    "InstanceNorm": lambda: nn.InstanceNorm(8),
    "GroupNorm": lambda: nn.GroupNorm(2, 8, pytorch_compatible=True),
    "MultiHeadAttention": lambda: nn.MultiHeadAttention(8, 2),
    "Transformer": lambda: nn.Transformer(8, 2, 1, 1, 16, dropout=0.0),
    **{
        name: getattr(nn, name)
        for name in "GELU SiLU ReLU ReLU2 ReLU6 Sigmoid Tanh Softplus Mish CELU ELU SELU LeakyReLU "
        "LogSigmoid Hardswish HardTanh Softsign Step PReLU Softshrink HardShrink".split()
    },
}


def _training(layer: nn.Module) -> nn.Module:
    layer.eval = lambda: layer  # type: ignore[method-assign]
    return layer


# --------------------------------------------------------------------------- comparing


def token_axis(answer: Array, shape: tuple[int, ...], kind: Factor, given: Sizes) -> Any:
    """How to bring the rows (or the length) of a result to the front, by the rule's claim."""
    assert answer.axes is not None
    head = answer.axes
    count = {ROWS: given["r"], LENGTH: given["l"]}
    if not answer.open:
        assert len(head) == len(shape), f"the rule says {answer}, mlx {shape}"
    found = None
    for place, axis in enumerate(head):
        known = [count.get(f) or given.known(f.size) for f in axis]
        whole = int(np.prod([k for k in known if k is not None], dtype=int))
        unknown = sum(k is None for k in known)
        assert shape[place] % whole == 0, f"the rule says {answer}, mlx {shape}"
        if not unknown:
            assert shape[place] == whole, f"the rule says {answer}, mlx {shape}"
        if kind in axis:
            assert found is None
            at = axis.index(kind)
            outer = known[:at]
            if None not in outer:
                before = int(np.prod(outer, dtype=int))
            else:
                assert unknown == 1, "sizes of several features"
                before = int(np.prod([k for k in outer if k], dtype=int)) * shape[place] // whole
            found = (place, before)
    return found


def front(changed: np.ndarray, place: int, before: int, count: int) -> np.ndarray:
    """[count] first: an axis holds [before][count][behind]."""
    first = np.moveaxis(changed, place, 0)
    split = first.reshape(before, count, -1, *first.shape[1:])
    return np.moveaxis(split, 1, 0)


def changes(one: Case, given: Sizes, seed: int, letter: str, index: int) -> list[np.ndarray] | None:
    """Which entries of each result change when all arrays change at one row; None without rows."""
    mx.random.seed(seed)
    np.random.seed(seed)
    every = tensors([*one.args, *one.more.values()])
    holding = [t for t in every if any(letter in axis for axis in t.axes.split())]
    if not holding:
        return None
    old = {id(t): made(t, given) for t in every}
    new = dict(old)
    for t in holding:
        axes = t.axes.split()
        place = next(i for i, axis in enumerate(axes) if letter in axis)
        before = given.number(axes[place][: axes[place].index(letter)] or "1")
        mask = np.zeros(old[id(t)].shape, bool)
        front(mask, place, before, given[letter])  # checks the sizes
        lined = np.arange(mask.shape[place]) // (mask.shape[place] // before // given[letter])
        mask[(slice(None),) * place + (lined % given[letter] == index,)] = True
        new[id(t)] = mx.where(mx.array(mask), made(t, given), old[id(t)])
    results = [
        run(
            one,
            [numbers(a, given, arrays) for a in one.args],
            {k: numbers(v, given, arrays) for k, v in one.more.items()},
        )
        for arrays in (old, new)
    ]
    return [
        ~np.isclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(*results, strict=True)
    ]


def leaked(changed: Sequence[np.ndarray], count: int, index: int) -> bool:
    """In some result there is no axis along which the changes keep to the row."""
    return any(not _kept(one, count, index) for one in changed)


def _kept(changed: np.ndarray, count: int, index: int) -> bool:
    if not changed.any():
        return True
    for place, size in enumerate(changed.shape):
        for before in range(1, size // count + 1):
            if size % (before * count) == 0:
                rest = front(changed, place, before, count)
                if not np.delete(rest, index, axis=0).any():
                    return True
    return False


_FEWEST, _MOST = 3, 20  # choices: more than the fewest only while nothing has changed


def check(one: Case, claimed: Callable[[Case, Sizes], list[Array]], *, equal: bool = False) -> None:
    """A claim against mlx, for a few random choices of sizes and numbers."""
    chance = random.Random(str(one))
    slug, leaks, moved = "", False, False
    for seed in range(_MOST):
        if seed >= _FEWEST and (moved or leaks or (slug and slug != "row-mixing")):
            break
        given = sizes(chance, equal=equal)
        try:
            answers = claimed(one, given)
        except Refused as refused:
            slug = refused.slug
            answers = None
        for letter, kind in _TOKENS.items():
            index = chance.randrange(given[letter])
            changed = changes(one, given, seed, letter, index)
            if changed is None:
                continue
            if answers is None:
                leaks = leaks or leaked(changed, given[letter], index)
                continue
            several = answers * len(changed) if len(answers) == 1 else answers
            moved = moved or not has_tokens(one)
            for answer, part in zip(several, changed, strict=True):
                moved = moved or bool(part.any())
                if answer.axes is None:
                    assert not part.any(), "what the rule calls a parameter holds tokens"
                    continue
                found = token_axis(answer, part.shape, kind, given)
                if found is None:
                    assert not part.any(), f"{answer} depends on {kind.kind}"
                    continue
                rest = front(part, *found, given[letter])
                assert not np.delete(rest, index, axis=0).any(), f"another of {kind.kind} changed"
    if slug == "row-mixing" and not one.careful:
        assert leaks, "refused, and yet nothing leaked in any try"
    if not slug and has_tokens(one) and not one.still:
        assert moved, "nothing changed in any try"


def has_tokens(one: Case) -> bool:
    every = tensors([*one.args, *one.more.values()])
    return any(letter in t.axes for t in every for letter in _TOKENS)


# --------------------------------------------------------------------------- the cases


def over_axes(
    *names: str, ranks: Sequence[str] = ("r a", "a r", "r l a"), **more: Any
) -> list[Case]:
    """Each operation along each axis, and along none."""
    return [
        case(name, T(axes), axis=axis, **more)
        for name in names
        for axes in ranks
        for axis in range(-len(axes.split()), len(axes.split()))
    ]


_UNIT = "arccos arcsin arctanh erfinv log log10 log2 log1p sqrt rsqrt reciprocal".split()
_WHOLE = "bitwise_and bitwise_or bitwise_xor left_shift right_shift".split()
_ALIKE = "equal not_equal greater greater_equal less less_equal isclose".split()
_STILL = "isfinite isinf isnan isneginf isposinf imag".split()
_BINARY = (
    "add arctan2 divide divmod floor_divide logaddexp maximum minimum multiply power remainder "
    "subtract"
).split()


def pointwise(name: str) -> list[Case]:
    if name in ("where", "clip"):
        first = T("r l a", "bool") if name == "where" else T("r l a")
        return [case(name, first, T("r 1 a"), T("l a"))]
    if name in _WHOLE or name in _ALIKE:
        return [case(name, T("r l a", "int"), T("r 1 a", "int"))]
    if name in ("logical_and", "logical_or"):
        return [case(name, T("r l a", "bool"), T("l a", "bool"))]
    if name in _BINARY:
        kind = "above" if name == "power" else "float"
        return [case(name, T("r l a", kind), T("l 1", kind)), case(name, T("r a"), T("a"))]
    kind = "unit" if name in _UNIT else "float"
    kind = {"arccosh": "above", "bitwise_invert": "int", "from_fp8": "uint8"}.get(name, kind)
    kind = "bool" if name == "logical_not" else kind
    return [case(name, T("r l a", kind), still=name in _STILL)]


REDUCTIONS = "sum mean max min prod var std logsumexp median".split()
SCANS = "cumsum cumprod cummax cummin logcumsumexp softmax".split()
_TWICE = "a token of the result would have several rows"


def _weights(*shape: int | str) -> Callable[[Sizes], mx.array]:
    def make(given: Sizes) -> mx.array:
        full = [s if isinstance(s, int) else given.number(s) for s in shape]
        return mx.random.normal(full, key=mx.random.key(7))

    return make


def _packed(part: int, experts: int = 0) -> P:
    """One of weights, scales and biases of a matrix [8, 64] (of each expert), quantised."""
    shape = (experts, 8, 64) if experts else (8, 64)
    return P(lambda given: mx.quantize(_weights(*shape)(given), group_size=64, bits=4)[part])


_FULL = slice(None)
_CHOSEN = T("r l k", "int", "a")

CASES: list[Case] = [
    *[one for name in ELEMENTWISE for one in pointwise(name)],
    case("add", T("r a"), T("l r a")),
    case("add", T("r 1 a"), T("1 r a")),
    *over_axes(*REDUCTIONS, *SCANS, "argmax", "argmin"),
    *over_axes("sort", "argsort"),
    *[case(n, T("r a", "bool"), axis=i) for n in ("any", "all") for i in (0, 1)],
    *[case(n, T("r l a"), axis=i, keepdims=True) for n in REDUCTIONS for i in (-1, 1, (0, 2))],
    *[case(n, T(x)) for n in (*REDUCTIONS, *SCANS, "argmax", "argmin") for x in ("r a", "r l a")],
    *[case(n, T("r a")) for n in ("sort", "argsort")],
    case("argsort", T("r")),
    *over_axes("topk", k=2),
    *over_axes("partition", "argpartition", kth=1),
    *over_axes("linalg.norm"),
    case("linalg.norm", T("r a")),
    # ------------------------------------------------------------------- shapes
    case("reshape", T("r l ab"), (D("r"), D("l"), D("a"), D("b"))),
    case("reshape", T("r l ab"), (D("r"), D("l"), D("a"), -1)),
    case("reshape", T("r l a"), (D("rl"), D("a"))),
    case("reshape", T("r l a"), (-1, D("a"))),
    case("reshape", T("rl a"), (D("r"), D("l"), -1)),
    case("reshape", T("r l a b"), (D("r"), D("l"), D("ab"))),
    case("reshape", T("r l ab"), (-1, D("b"))),
    case("reshape", T("r l abc"), (-1, D("bc"))),
    case("reshape", T("r a l b"), (D("r"), D("a"), -1), careful="the length ends in features"),
    case("reshape", T("r a l b"), (D("r"), D("l"), -1)),
    case("reshape", T("l r a"), (D("r"), D("l"), D("a"))),
    case("reshape", T("r l a"), (D("l"), D("r"), D("a"))),
    case("reshape", T("r a"), (D("a"), D("r"))),
    case("reshape", T("r a"), (D("a"), -1)),
    case("reshape", T("r l ab"), (D("a"), -1, D("b"))),
    case("reshape", T("r l a"), (D("r"), -1)),
    case("reshape", T("r l 4"), (D("r"), D("l"), 2, -1)),
    case("reshape", T("r l 4"), (-1, 2)),
    case("reshape", T("a b"), (D("ab"),)),
    *[case("flatten", T("r l a b"), *at) for at in ((0, 1), (2, 3), (-2, -1), (1, 2), (), (0, 2))],
    case("flatten", T("a r b")),
    case("unflatten", T("r l ab"), -1, (D("a"), D("b"))),
    case("unflatten", T("r l ab"), 2, (D("a"), -1)),
    case("unflatten", T("rl a"), 0, (D("r"), D("l"))),
    case("unflatten", T("rl a"), 0, (D("l"), D("r"))),
    case("unflatten", T("ra b"), 0, (-1, D("a"))),
    case("unflatten", T("ra b"), 0, (D("a"), -1)),
    case("squeeze", T("r l 1 a"), 2),
    case("squeeze", T("r 1 a 1"), (1, -1)),
    case("squeeze", T("r l 1")),
    case("expand_dims", T("r l a"), 0),
    *[case("expand_dims", T("r l a"), at) for at in (2, -1, (0, -1), (1, 3))],
    *[case("transpose", T("r l a b"), order) for order in ((0, 2, 1, 3), (3, 1, 0, 2))],
    case("transpose", T("r l a")),
    case("permute_dims", T("r l a"), (2, 0, 1)),
    *[case("swapaxes", T("r l a"), *at) for at in ((0, 2), (-1, -2), (1, 1))],
    *[case("moveaxis", T("r l a b"), *at) for at in ((0, 2), (3, 0), (-1, 1), (1, -1))],
    case("broadcast_to", T("r 1 a"), (D("r"), D("l"), D("a"))),
    case("broadcast_to", T("r l a"), (2, D("r"), D("l"), D("a"))),
    case("broadcast_to", T("a"), (D("r"), D("a"))),
    *[case(name, (D("r"), D("l"), D("a"))) for name in ("zeros", "ones")],
    case("full", (D("r"), D("l"), D("a")), T("a")),
    case("full", (D("r"), D("l"), D("a")), T("r 1 a")),
    *[case(n, T("r l a"), still=True) for n in ("zeros_like", "ones_like")],
    case("full_like", T("r l a"), 3.0, still=True),
    case("arange", D("l")),
    case("arange", 5),
    case("linspace", 0, 1, 5),
    case("linspace", 0, 1, D("l")),
    *[case(name, D(n)) for name in ("eye", "tri", "identity") for n in ("a", "l")],
    *[case(f"random.{n}", shape=(D(x), 4)) for n in ("uniform", "normal") for x in ("a", "r")],
    case("array", T("r a")),
    case("astype", T("r l a"), mx.float16),
    case("stop_gradient", T("r l a")),
    case("contiguous", T("r l a")),
    case("depends", T("r l a"), T("r l a")),
    *[case("view", T(x), mx.int32) for x in ("r a", "r l a")],
    case("view", T("r a"), mx.uint8),
    case("view", T("a r"), mx.uint8, careful="a row becomes four entries of the last axis"),
    # ------------------------------------------------------------------- joining, cutting
    *[case("concatenate", [T("r l a"), T("r l b")], axis=at) for at in (-1, 2)],
    case("concatenate", [T("r a"), T("r a")], careful=_TWICE),
    *[case("concat", [T("r l a"), T("r l b")], axis=at) for at in (-1, 2)],
    case("concatenate", [T("r 2 l a"), T("r 3 l a")], 1),
    case("concatenate", [T("r l a"), T("r l 1")], 2),
    *[case("stack", [T("r l a"), T("r l a")], axis=at) for at in (0, 1, 2, 3, -1, -2)],
    case("stack", [T("r a"), T("r a"), T("r a")]),
    *[case("split", T("r l 4"), 2, axis=at) for at in (-1, 2)],
    case("split", T("r a 6"), [2, 3], -1),
    case("split", T("4 r"), 2),
    case("split", T("r l 4"), [1], 0),
    case("split", T("r l 4"), [1], 1),
    *over_axes("repeat", repeats=2, careful=_TWICE),
    case("repeat", T("r a"), 2, careful=_TWICE),
    *[case("tile", T("r a"), reps, careful=_TWICE) for reps in ((1, 2), (2, 1), (2, 1, 1), 3)],
    case("tile", T("r 1 a"), (1, D("l"), 1)),
    case("pad", T("r l a"), [(0, 0), (0, 0), (1, 2)]),
    case("pad", T("r l a"), [(0, 0), (1, 0), (0, 0)]),
    case("pad", T("r l a"), 1),
    *over_axes("roll", shift=1),
    *[case("roll", T(x), 1) for x in ("r a", "r l a")],
    *[case(name, T(x)) for name in ("tril", "triu") for x in ("r a b", "r a a")],
    *[case(n, T("r l a"), careful="places in a chunk are told apart") for n in ("tril", "triu")],
    case("tril", T("r a b"), 1),
    # ------------------------------------------------------------------- choosing
    case("take", T("r l a"), T("2", "int", "a"), -1),
    case("take", T("r l a"), T("2 3", "int", "a"), axis=2),
    case("take", T("a b"), T("r l", "int", "a"), 0),
    case("take", T("a"), T("r l", "int", "a")),
    case("take", T("r a"), T("2", "int", "r"), 0),
    case("take", T("r a"), T("2", "int", "r")),
    case("take", T("r a"), T("r", "int", "a"), 1),
    *[case("take_along_axis", T("r l a"), _CHOSEN, at) for at in (-1, 2)],
    case("take_along_axis", T("r l a"), T("r 1 k", "int", "a"), -1),
    case("take_along_axis", T("1 1 a"), _CHOSEN, -1),
    case("take_along_axis", T("r l a"), T("r l a", "int", "r"), 0),
    case("take_along_axis", T("r l a"), T("r l a", "int", "l"), 1),
    case("put_along_axis", T("r l a"), T("r l 2", "int", "a"), T("r l 2"), -1),
    case("put_along_axis", T("r l a"), T("r l 1", "int", "a"),
         P(lambda _: mx.array(0.0), ""), axis=2),
    case("put_along_axis", T("r a"), T("r a", "int", "r"), T("r a"), 0),
    *[case("index", T("r l a"), key) for key in (
        (..., slice(0, 2)), (..., slice(None, None, -1)), (..., 0), (..., -1), (_FULL, _FULL, 1),
        (_FULL, _FULL, slice(1, None)), None, (_FULL, None), (..., None), (None, ..., slice(2)),
        (_FULL, 0), (_FULL, -1), 0, (slice(0, 2)), (_FULL, slice(1, None)),
        (_FULL, slice(-1, None)),
        (_FULL, slice(None, None, -1)), (slice(None, None, -1)), ..., (..., slice(None, -1)),
        (slice(None, D("r"))), (_FULL, slice(None, D("l"))), (..., slice(None, D("a"))),
        (..., T("2", "int", "a")), (T("2", "int", "r")), (_FULL, T("2", "int", "l")),
        (..., T("2", "int", "a"), None),
    )],
    case("index", T("a b"), T("r l", "int", "a")),
    case("index", T("a b"), (T("r l", "int", "a"), 0)),
    case("index", T("a b"), (_FULL, T("r l", "int", "b"))),
    case("index", T("r a"), (T("r", "int", "r"), T("r", "int", "a"))),
    case("index", T("r a"), T("r a", "int", "r")),
    case("store", T("r l a"), (..., slice(0, 2)), T("r l 2")),
    case("store", T("r l a"), (..., 0), T("r l")),
    case("store", T("r l a"), (..., slice(0, 2)), 1.0),
    case("store", T("r a"), 0, T("a")),
    case("store", T("r l a"), (_FULL, 0), T("r a")),
    case("store", T("a b"), T("r", "int", "a"), T("r b")),
    case("at", T("r l a"), (..., slice(0, 2)), T("r l 2")),
    case("at", T("r a"), 0, T("a")),
    case("at", T("a b"), T("r", "int", "a"), T("r b")),
    # ------------------------------------------------------------------- products
    *[case("matmul", T(x), T(y)) for x, y in (
        ("r l a", "a b"), ("r h l a", "r h a b"), ("r a", "a"), ("r 1 a", "r a b"), ("a", "r a b"),
        ("r h l a", "r h a l"), ("a r", "r b"), ("r a b", "r b a"), ("r l a", "r a l"),
        ("b r a", "b a c"), ("h a b", "r h b a"), ("a b", "b r"),
    )],
    case("addmm", T("r l b"), T("r l a"), T("a b")),
    case("addmm", T("b"), T("r a"), T("a b")),
    case("addmm", T("r b"), T("r r"), T("r b")),
    case("quantized_matmul", T("r l 64"), _packed(0), _packed(1), _packed(2), True),
    case("quantized_matmul", P(_weights(3, 64), "3 64"), _packed(0), _packed(1), _packed(2), True),
    case("gather_mm", T("r l 1 a"), P(_weights(4, "a", 5)), rhs_indices=T("r l", "int")),
    case("gather_mm", T("r l 1 1 a"), P(_weights(4, "a", 5)), rhs_indices=T("r l k", "int")),
    case("gather_mm", T("r 1 a"), P(_weights(4, "a", 5)), rhs_indices=T("l 1", "int")),
    case("gather_mm", T("l r a"), P(_weights(4, "a", 5)), rhs_indices=T("r 1", "int")),
    case("gather_qmm", T("r l 1 64"), *(_packed(i, 4) for i in range(3)),
         rhs_indices=T("r l", "int"), transpose=True),
    *[case("einsum", text, T(x), T(y)) for text, x, y in (
        ("rla,ab->rlb", "r l a", "a b"), ("rlha,rlhb->rlab", "r l h a", "r l h b"),
        ("rla,rka->lk", "r l a", "r k a"), ("rla,rma->rlm", "r l a", "r l a"),
        ("ra,rb->rab", "r a", "r b"), ("ra, ba -> br", "r a", "b a"), ("ra,sa->rs", "r a", "r a"),
        ("rha,rhb->hab", "r h a", "r h b"),
    )],
    case("einsum", "rla->rl", T("r l a")),
    case("einsum", "rla->ral", T("r l a")),
    *[case(n, T("r a"), T("r a")) for n in ("outer", "inner")],
    case("tensordot", T("r a"), T("a b"), 1, careful="some products keep the rows apart"),
    case("tensordot", T("r a"), T("r a"), 2),
    case("kron", T("r a"), T("r a")),
    *[case("conv1d", T(x), P(_weights(5, 2, "a"))) for x in ("r 4 a", "r l a", "4 r a")],
    case("conv2d", T("r 4 3 a"), P(_weights(5, 2, 2, "a"))),
    case("conv2d", T("r l 3 a"), P(_weights(5, 2, 2, "a"))),
    *[case("conv_general", T(x), P(_weights(5, 2, "a"))) for x in ("r 4 a", "r l a")],
    case("quantize", T("r l 64")),
    case("quantize", T("a 64"), group_size=64),
    case("dequantize", T("r l 8", "packed"), T("r l 1"), T("r l 1")),
    case("dequantize", T("a 8", "packed"), T("a 1"), T("a 1")),
    *[case("hadamard_transform", T(x)) for x in ("r l 8", "r l 4")],
    # ------------------------------------------------------------------- fused
    *[case(f"fast.{n}", T(x), P(_weights("a"), "a"), *rest, 1e-5)
      for n, rest in (("rms_norm", ()), ("layer_norm", (None,))) for x in ("r l a", "r a")],
    *[case(f"fast.{n}", T("a r"), None, *rest, 1e-5)
      for n, rest in (("rms_norm", ()), ("layer_norm", (None,)))],
    *[case("fast.rope", T(x), 4, traditional=False, base=100.0, scale=1.0, offset=offset)
      for x, offset in (
          ("r h l 4", T("r", "int", "9", ("start",))), ("r l 4", T("r", "int", "9", ("start",))),
          ("r l 4", 3),
    )],
    case("fast.rope", T("r l h 4"), 4, traditional=False, base=100.0, scale=1.0,
         offset=T("r", "int", "9", ("start",))),
    *[case("fast.scaled_dot_product_attention", T("r h l 4"), T(k), T(k), scale=1.0)
      for k in ("r h l 4", "r h e 4")],
    # ------------------------------------------------------------------- machines
    case("distributed.all_sum", T("r l a")),
    case("distributed.all_gather", T("r l a")),
    case("eval", T("r a"), still=True),
    case("async_eval", T("r a"), still=True),
    case("synchronize"),
    case("clear_cache"),
    # ------------------------------------------------------------------- mlx.nn
    *[case(f"nn.{n}", T("r l a")) for n in FUNCTIONS if n not in ("prelu", "glu", "step")],
    case("nn.prelu", T("r l a"), P(_weights("a"), "a")),
    case("nn.step", T("r l a"), 0.0),
    case("nn.glu", T("r l 4")),
    case("nn.glu", T("r 4 l"), axis=1),
    case("nn.glu", T("a 4"), axis=0),
    *[case(f"nn.{n}", T("r l a"), axis=at) for n in ("softmax", "log_softmax") for at in (0, 1)],
    *[case(f"nn.{n}", T("r l 8")) for n in LAYERS if n not in (
        "Embedding", "QuantizedEmbedding", "QuantizedLinear", "RoPE", "Conv1d",
        "Conv2d", "InstanceNorm", "BatchNorm", "GroupNorm", "MultiHeadAttention", "Transformer")],
    *[case(f"nn.{n}", T("r l", "int", "9")) for n in ("Embedding", "QuantizedEmbedding")],
    case("nn.QuantizedLinear", T("r l 64")),
    case("nn.RoPE", T("r h l 4"), offset=T("r", "int", "9", ("start",))),
    case("nn.RoPE", T("r h l 4")),
    *[case("nn.Conv1d", T(x)) for x in ("r 4 8", "r l 8")],
    *[case("nn.Conv2d", T(x)) for x in ("r 4 3 8", "r 3 l 8")],
    case("nn.BatchNorm", T("r l 8")),
    *[case(f"nn.{n}", T("r l 8")) for n in ("InstanceNorm", "GroupNorm")],
    case("nn.MultiHeadAttention", T("r l 8"), T("r l 8"), T("r l 8")),
    case("nn.Transformer", T("r l 8"), T("r l 8"), None, None, None),
    # ------------------------------------------------------------------- Python's operators
    *[case(f"python.{op}", T("r l a"), T("r 1 a")) for op in "+-*/<"],
    case("python.@", T("r l a"), T("a b")),
    case("python.@", T("r l a"), T("r a l")),
    case("python.*", T("r l a"), 2.0),
    case("python.-", 1.0, T("r l a")),
]  # fmt: skip

# Rules that no single process can run.
ELSEWHERE = {
    "distributed.send": "a group of one cannot send; the pipelines of tests/test_distributed.py do",
    "distributed.recv": "a group of one cannot receive",
    "distributed.recv_like": "a group of one cannot receive",
}
RULED = {
    *RULES,
    *(f"nn.{name}" for name in (*FUNCTIONS, *LAYERS)),
    *("index", "store", "at"),
}
