"""Every rule of token axes against mlx: change one row of the inputs, see which rows change.

A case gives a call and where the rows are in its inputs and in its output. Where the rule proves
the call, only the changed row may change (and it must); where it refuses, some other row does.
Shapes are random.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlxrewrite.axes.domain import ROWS, Array, Known, Library, Refused, Tuple, feature
from mlxrewrite.axes.interpret import Interpreter
from mlxrewrite.axes.layers import FUNCTIONS
from mlxrewrite.axes.rules import ELEMENTWISE, RULES
from mlxrewrite.axes.world import World


@dataclass(frozen=True)
class Case:
    """`rule(x, *args, **more)` with `x` [..., rows at `place`, ...]."""

    rule: str
    rank: int
    place: int
    args: tuple[Any, ...] = ()
    more: tuple[tuple[str, Any], ...] = ()
    second: bool = False  # another array of the same shape as second operand

    def __str__(self) -> str:
        more = ",".join(f"{k}={v}" for k, v in self.more)
        return f"{self.rule}-{self.rank}-{self.place}-{self.args}-{more}"


def over_axes(*names: str, ranks=(2, 3), **more: Any) -> list[Case]:
    """Each operation along each axis of arrays with the rows on each axis."""
    return [
        Case(name, rank, place, (), (("axis", axis), *more.items()))
        for name in names
        for rank in ranks
        for place in range(rank)
        for axis in range(-rank, rank)
    ]


def without_axis(*names: str) -> list[Case]:
    return [Case(name, 2, place) for name in names for place in range(2)]


REDUCTIONS = "sum mean max min prod var logsumexp argmax argmin".split()
SCANS = "cumsum cumprod cummax cummin softmax".split()
CASES = [
    *over_axes(*REDUCTIONS, *SCANS, "sort", "argsort"),
    *over_axes("topk", k=2),
    *over_axes("partition", "argpartition", kth=1),
    *over_axes("roll", shift=1),
    *over_axes("repeat", repeats=2),
    *without_axis(*REDUCTIONS, *SCANS, "sort"),
    *[Case("roll", 2, place, (1,)) for place in range(2)],
    *[Case(name, 2, place, second=True) for name in ("add", "where") for place in range(2)],
    *[Case("transpose", 3, p, ((0, 2, 1),)) for p in range(3)],
    *[Case("swapaxes", 3, p, (0, 2)) for p in range(3)],
    *[Case("moveaxis", 3, p, (0, 2)) for p in range(3)],
    *[Case("expand_dims", 2, p, (1,)) for p in range(2)],
    *[Case("flatten", 3, p, (1, 2)) for p in range(3)],
    *[Case("split", 3, p, (2,), (("axis", a),)) for p in range(3) for a in range(3)],
    *[Case("tile", 2, p, (reps,)) for p in range(2) for reps in ((1, 2), (2, 1))],
    Case("tril", 3, 0),
    *[Case("matmul", 3, p, second=True) for p in range(3)],
    *[Case("linalg.norm", 2, p, (), (("axis", a),)) for p in range(2) for a in range(2)],
    *[Case("fast.rms_norm", 2, p, (None, 1e-5)) for p in range(2)],
    *[Case("fast.layer_norm", 2, p, (None, None, 1e-5)) for p in range(2)],
    *[Case("hadamard_transform", 2, p) for p in range(2)],
]  # fmt: skip


def interpreter() -> Interpreter:
    made = Interpreter(World(lambda _: None), {})
    made.setup("test").__enter__()
    made.forward = True
    return made


def abstract(value: Any) -> Any:
    return Tuple(tuple(map(Known, value))) if isinstance(value, tuple) else Known(value)


def verdict(case: Case, shape: tuple[int, ...]) -> Array | None:
    """The rule's answer: the result's axes, or None for a refusal."""
    axes = tuple((ROWS,) if i == case.place else feature(n) for i, n in enumerate(shape))
    x = Array(axes)
    args: list[Any] = [x, *map(abstract, case.args)]
    if case.second:
        args.insert(1, x if case.rule != "matmul" else Array(_other(axes)))
    if case.rule == "where":
        args.append(x)
    try:
        out = interpreter().call_core(case.rule, args, {k: abstract(v) for k, v in case.more})
    except Refused:
        return None
    first = out.items[0] if isinstance(out, Tuple) else out
    assert isinstance(first, Array)
    return first


def _other(axes: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*axes[:-2], axes[-1], axes[-2])


def function(name: str) -> Callable[..., Any]:
    found: Any = mx
    for part in name.split("."):
        found = getattr(found, part)
    return found


def run(case: Case, x: mx.array, other: mx.array) -> np.ndarray:
    args: list[Any] = [x, *case.args]
    if case.second:
        args.insert(1, other if case.rule != "matmul" else other.swapaxes(-1, -2))
    if case.rule == "where":
        args = [x > 0, other, x]
    more = dict(case.more)
    out = function(case.rule)(*args, **more)
    return np.array(out[0] if isinstance(out, list | tuple) else out)


def moved(case: Case, shape: tuple[int, ...], seed: int, row: int) -> tuple[np.ndarray, np.ndarray]:
    """The output before and after one row of all inputs changed."""
    mx.random.seed(seed)
    x, other = mx.random.normal(shape), mx.random.normal(shape)
    mask = np.zeros(shape, bool)
    mask[(slice(None),) * case.place + (row,)] = True
    fresh = mx.random.normal(shape) * 3, mx.random.normal(shape) * 3
    new = [mx.where(mx.array(mask), f, old) for f, old in zip(fresh, (x, other), strict=True)]
    return run(case, x, other), run(case, *new)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rule_says_what_mlx_does(case):
    chance = random.Random(str(case))
    leaks = False
    for seed in range(3):
        size = chance.choice((4, 8)) if case.rule != "matmul" else 4
        shape = tuple(chance.choice((4, size)) for _ in range(case.rank))
        if case.rule == "matmul":
            shape = (4, 4, 4)
        answer = verdict(case, shape)
        row = chance.randrange(shape[case.place])
        before, after = moved(case, shape, seed, row)
        changed = before != after
        if answer is None:
            # Only numbers out of the row's own place would be a leak.
            leaks = leaks or leaked(changed, shape[case.place], row)
            continue
        assert answer.axes is not None and len(answer.axes) == before.ndim
        places = [i for i, axis in enumerate(answer.axes) if ROWS in axis]
        assert len(places) == 1
        (place,) = places
        width = before.shape[place] // shape[case.place]
        rest = np.moveaxis(changed, place, 0)
        inner = [f for f in answer.axes[place] if f != ROWS]
        if inner and answer.axes[place][0] == ROWS:
            rest = rest.reshape(shape[case.place], width, *rest.shape[1:])
        elif inner:
            rest = np.moveaxis(rest.reshape(width, shape[case.place], *rest.shape[1:]), 1, 0)
        others = np.delete(rest, row, axis=0)
        assert not others.any(), "another row changed"
    if verdict(case, (4,) * case.rank) is None:
        assert leaks, "refused, and yet no other row changed in any try"


def leaked(changed: np.ndarray, rows: int, row: int) -> bool:
    """Along no axis do the changes keep to the row."""
    for axis, size in enumerate(changed.shape):
        if size == rows and not np.delete(changed, row, axis=axis).any():
            return False
    return bool(changed.any())


UNARY = "abs ceil cos erf exp expm1 floor log1p negative round sigmoid sign sin square tanh".split()


@pytest.mark.parametrize("name", UNARY)
def test_elementwise_operations_are_elementwise(name):
    x = mx.random.normal((5, 3), key=mx.random.key(0))
    whole = np.array(function(name)(x))
    parts = np.stack([np.array(function(name)(x[i])) for i in range(5)])
    assert np.allclose(whole, parts, equal_nan=True)
    assert RULES[name].apply is RULES["add"].apply


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_activations_treat_rows_alone(name):
    from mlx import nn

    if name in ("prelu", "glu", "step"):
        pytest.skip("takes more than one array, or only a threshold")
    x = mx.random.normal((5, 4), key=mx.random.key(0))
    whole = np.array(getattr(nn, name)(x))
    parts = np.stack([np.array(getattr(nn, name)(x[i : i + 1]))[0] for i in range(5)])
    assert np.allclose(whole, parts, atol=1e-5)


def test_every_elementwise_name_is_one_of_mlx():
    assert [name for name in ELEMENTWISE if not hasattr(mx, name)] == []


def test_every_rule_has_a_reason():
    assert all(len(rule.reason) > 10 for rule in RULES.values())


@pytest.mark.parametrize("tokens", [7, 40])
def test_expert_sorting_gives_each_row_what_it_gets_alone(tokens):
    """Below and above the size at which switch layers sort, and one row at a time."""
    from mlx_lm.models.switch_layers import SwitchGLU

    mx.random.seed(tokens)
    layer = SwitchGLU(8, 16, 4)
    x = mx.random.normal((tokens, 1, 8))
    chosen = mx.random.randint(0, 4, (tokens, 1, 2))
    whole = np.array(layer(x, chosen))
    alone = np.concatenate(
        [np.array(layer(x[i : i + 1], chosen[i : i + 1])) for i in range(tokens)]
    )
    assert np.allclose(whole, alone, atol=1e-5)


def test_what_has_no_rule_is_refused():
    x = Array(((ROWS,), feature()))
    with pytest.raises(Refused) as caught:
        interpreter().call_library(Library("mlx.core.linalg.svd"), (x,), {})
    assert caught.value.slug == "unknown-operation"
    with pytest.raises(Refused):
        interpreter().call_library(Library("numpy.sum"), (x,), {})
