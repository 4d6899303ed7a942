"""Ops over several sequences, and their cache: what the proof knows of them is what they do."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, fields
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlxrewrite.axes.attributes import _OF_MASKS
from mlxrewrite.axes.domain import (
    LENGTH,
    NONE,
    ROWS,
    Array,
    Dead,
    Known,
    Refused,
    Tuple,
    feature,
    leads,
)
from mlxrewrite.axes.interpret import Interpreter
from mlxrewrite.axes.layers import SEQUENCE_KERNELS
from mlxrewrite.axes.recurrences import CALLED, DECORATING
from mlxrewrite.axes.rules import RULES
from mlxrewrite.axes.states import _ABSENT, _METHODS, STATES
from mlxrewrite.axes.world import World
from mlxrewrite.kernels.dialects.cpu import metal_kernel
from mlxrewrite.runtime import recurrences
from mlxrewrite.runtime.masks import MaskSpec
from mlxrewrite.runtime.per_length import BatchedState, per_length
from mlxrewrite.runtime.states import StateTable
from test_row_states import view

N, L, H, D, S = 3, 5, 2, 8, 8


@dataclass(frozen=True)
class Op:
    """Shapes of the arguments by name: those of sequences, and those that all share."""

    own: dict[str, tuple[int, ...]]
    shared: dict[str, tuple[int, ...]]
    state: tuple[str, tuple[int, ...]]


OPS = {
    "delta_rule": Op(
        {"q": (N, L, H, D), "k": (N, L, H, D), "v": (N, L, H, D), "a": (N, L, H), "b": (N, L, H)},
        {"A_log": (H,), "dt_bias": (H,)},
        ("state", (N, H, D, D)),
    ),
    "state_space_dual": Op(
        {"hidden_states": (N, L, H, D), "B": (N, L, 1, S), "C": (N, L, 1, S), "dt": (N, L, H)},
        {"A_log": (H,), "D": (H,), "dt_bias": (H,)},
        ("state", (N, H, D, S)),
    ),
    "selective_scan": Op(
        {"x": (N, L, D), "delta": (N, L, D), "B": (N, L, S), "C": (N, L, S)},
        {"A": (D, S), "D": (D,)},
        ("state", (N, D, S)),
    ),
    "diagonal_scan": Op({"x": (N, L, D), "a": (N, L, D)}, {}, ("h", (N, D))),
    "lightning_scan": Op(
        {"q": (N, H, L, D), "k": (N, H, L, D), "v": (N, H, L, D)},
        {"g": (H,), "scale": ()},
        ("h", (N, H, D, D)),
    ),
    "low_rank_scan": Op(
        dict.fromkeys("rwkvab", (N, L, H, D)), {}, ("h", (N, H, D, D))
    ),
}  # fmt: skip


def names_of(name: str) -> list[str]:
    """In the order of the op's own arguments."""
    op = OPS[name]
    order = {
        "delta_rule": "q k v a b A_log dt_bias state",
        "state_space_dual": "hidden_states A_log B C D dt dt_bias state",
        "selective_scan": "x delta A B C D state",
        "lightning_scan": "q k v g scale h",
    }
    return order[name].split() if name in order else [*op.own, op.state[0]]


def run(name: str, given: dict[str, mx.array | None]) -> tuple[mx.array, mx.array]:
    if name in CALLED:
        return getattr(recurrences, name)(**given)
    names = names_of(name)

    def function(*args: object) -> None:
        raise AssertionError("the op takes its place")

    source: dict[str, Callable] = {}
    exec(f"def function({', '.join(names)}): ...", source)
    return getattr(recurrences, name)(*names)(source["function"])(**given)


def claim(name: str, given: dict[str, object]) -> list[Array]:
    """What the rule says of the op's results."""
    rule = (CALLED | DECORATING)[name].apply
    values = [given[key] for key in names_of(name)]
    found = rule(Interpreter(World(lambda _: None), {}), *values)
    assert isinstance(found, Tuple)
    return list(found.items)


def abstract(name: str, *, state: bool) -> dict[str, object]:
    op = OPS[name]
    made: dict[str, object] = {
        key: Array(((ROWS,), *map(feature, shape[1:]))) for key, shape in op.own.items()
    }
    made |= {key: Array(tuple(map(feature, shape))) for key, shape in op.shared.items()}
    key, shape = op.state
    return made | {key: Array(((ROWS,), *map(feature, shape[1:]))) if state else NONE}


def test_every_op_has_a_case():
    assert set(OPS) == {*CALLED, *DECORATING}


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_an_op_keeps_sequences_apart(name, state):
    """Whatever changes in one sequence changes nothing of another, and the results' axes are what
    the rule says."""
    op, random = OPS[name], np.random.default_rng(3)

    def some(shape: tuple[int, ...]) -> mx.array:
        return mx.array(random.uniform(0.1, 0.9, shape).astype(np.float32))

    given = {key: some(shape) for key, shape in (op.own | op.shared).items()}
    key, shape = op.state
    given[key] = some(shape) if state else None
    before = [np.array(x) for x in run(name, given)]
    told = claim(name, abstract(name, state=state))
    for result, axes in zip(before, told, strict=True):
        assert leads(axes)
        assert result.ndim == len(axes.axes or ())
        assert result.shape[0] == N
    for changed in (*op.own, *([key] if state else ())):
        other = np.array(given[changed])
        other[1] += 0.05
        after = [np.array(x) for x in run(name, given | {changed: mx.array(other)})]
        assert any(not np.array_equal(a[1], b[1]) for a, b in zip(after, before, strict=True))
        for a, b in zip(after, before, strict=True):
            assert np.array_equal(a[[0, 2]], b[[0, 2]]), changed


@pytest.mark.parametrize("name", OPS)
def test_an_op_takes_sequences_in_front_only(name):
    given, op = abstract(name, state=True), OPS[name]
    for key, value in given.items():
        assert isinstance(value, Array)
        axes = value.axes or ()
        wrong = [Array(((ROWS,), *axes))] if key in op.shared else []
        if key not in op.shared:
            wrong = [Array((axes[1], axes[0], *axes[2:])), Array((*axes, feature())),
                     Array((axes[0], (LENGTH,), *axes[2:]))]  # fmt: skip
        if (name, key) == ("delta_rule", "a"):  # one decay a head, or a channel
            del wrong[1]
        for other in wrong:
            with pytest.raises(Refused):
                claim(name, given | {key: other})


def test_padding_ends_a_path():
    given = abstract("delta_rule", state=True)
    rule = CALLED["delta_rule"].apply
    values = [given[key] for key in names_of("delta_rule")]
    mask = Array(((ROWS,), feature()))
    with pytest.raises(Dead):
        rule(Interpreter(World(lambda _: None), {}), *values, mask)


def test_the_cache_answers_as_the_runtime_does():
    held = {name for name in vars(BatchedState) if not name.startswith("_")}
    assert held == {*_ABSENT, *_METHODS}
    assert [getattr(BatchedState, name) for name in _ABSENT] == [None, None]
    assert set(_OF_MASKS) == {field.name for field in fields(MaskSpec)}


@pytest.fixture
def interpreter() -> Interpreter:
    made = Interpreter(World(lambda _: None), {})
    made.sequences = made.forward = True
    return made


def test_a_state_is_what_was_left(interpreter):
    """Nothing of its sizes is known any more: another call may have had others."""
    assert interpreter.read_state(Known(0)) == NONE
    interpreter.keep_state(Known(0), Array(((ROWS,), feature("length"), feature(4))))
    _, state = interpreter.read_state(Known(0)).options
    assert state == Array(((ROWS,), feature(), feature(4)))
    for axes in [((ROWS,), (ROWS,)), (feature(), (ROWS,)), (feature(),)]:
        with pytest.raises(Refused):
            interpreter.keep_state(Known(0), Array(axes))
    with pytest.raises(Refused):
        interpreter.attribute(STATES, "__dict__")
    with pytest.raises(Dead):
        interpreter.attribute(STATES, "offset")


@pytest.mark.parametrize("offset", ["number", "positions"])
def test_a_rope_turns_each_sequence_by_its_own_position(offset, interpreter):
    x = mx.random.normal((N, H, L, D))
    places = mx.array([4, 0, 9]) if offset == "positions" else 7
    axes = Array(((ROWS,), feature(H), feature("length"), feature(D)))
    told = Array(((ROWS,),)) if offset == "positions" else Known(7)
    rule = RULES["fast.rope"].apply
    assert rule(interpreter, axes, Known(D), offset=told) == axes

    def turned(x: mx.array, offset: mx.array | int) -> np.ndarray:
        return np.array(mx.fast.rope(x, D, traditional=False, base=1e4, scale=1.0, offset=offset))

    before = turned(x, places)
    x[1] = x[1] + 1
    if offset == "positions":
        places[1] = 5
    after = turned(x, places)
    assert np.array_equal(before[[0, 2]], after[[0, 2]])
    assert not np.array_equal(before[1], after[1])
    for wrong in (Array(((ROWS,), feature())), Array((feature(), (ROWS,)))):
        with pytest.raises(Refused):
            rule(interpreter, axes, Known(D), offset=wrong)
    with pytest.raises(Refused):
        rule(interpreter, Array((feature(), (ROWS,), feature(), feature())), Known(D))


# ------------------------------------------------------------------------------- at run time


class Mixer:
    @per_length(positions=1)
    def __call__(self, x, cache, positions=None, other=None):
        return x


class Other(Mixer):
    pass


Other.__module__ = "another.file"


@pytest.mark.parametrize(
    ("cls", "x", "more"),
    [
        (Mixer, mx.zeros((2, 1)), {}),
        (Mixer, None, {}),
        (Mixer, mx.zeros((2, 1, 4)), {"positions": mx.zeros((2, 1))}),
        (Mixer, mx.zeros((2, 1, 4)), {"other": mx.zeros((2,))}),
        (Mixer, mx.zeros((2, 1, 4)), {"other": [1]}),
        (Mixer, mx.zeros((2, 1, 4)), {"other": "word"}),
        (Other, mx.zeros((2, 1, 4)), {}),
    ],
)
def test_what_was_not_proved_is_an_error(cls, x, more):
    with pytest.raises(TypeError, match="proved to keep sequences apart, but not"):
        cls()(x, view((1, 1), StateTable(1)), **more)


def test_what_was_proved_runs():
    x = mx.zeros((2, 1, 4))
    for more in ({}, {"positions": mx.array([3, 5])}, {"other": 3}, {"other": MaskSpec()}):
        assert Mixer()(x, view((1, 1), StateTable(1)), **more).shape == x.shape


# --------------------------------------------------------------------------- kernels of files


def test_a_kernel_that_was_read_keeps_sequences_apart():
    """The text that the table knows by its hash, on the CPU runner: a step of a convolution."""
    spec = find_spec("mlx_vlm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("mlx_vlm is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    module = ast.parse((folder / "models/kimi_k3/language.py").read_text())
    (source,) = [
        text.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(text := node.value, ast.Constant)
        if isinstance(text.value, str)
        if sha256(text.value.encode()).hexdigest()[:16] in SEQUENCE_KERNELS
    ]
    _, place = SEQUENCE_KERNELS[sha256(source.encode()).hexdigest()[:16]]
    kernel = metal_kernel(
        name="step",
        input_names=["x", "state", "w"],
        output_names=["y", "new_state"],
        source=source,
    )
    taps, width, random = 4, 8, np.random.default_rng(5)
    x, state, w = (
        mx.array(random.normal(size=shape).astype(np.float32))
        for shape in ((N, 1, width), (N, taps - 1, width), (width, taps, 1))
    )

    def run(x: mx.array, state: mx.array, count: int = N) -> list[np.ndarray]:
        grid = [width, 1, 1]
        grid[place] = count
        found = kernel(
            inputs=[x, state, w],
            template=[("T", mx.float32), ("C", width), ("KS", taps)],
            grid=tuple(grid),
            threadgroup=(width, 1, 1),
            output_shapes=[x.shape, state.shape],
            output_dtypes=[mx.float32, mx.float32],
        )
        return [np.array(one) for one in found]

    before = run(x, state)
    window = np.concatenate([np.array(state), np.array(x)], axis=1)
    sums = (window * np.array(w)[:, :, 0].T).sum(axis=1, keepdims=True)
    assert np.allclose(before[0], sums / (1 + np.exp(-sums)), atol=1e-6)
    assert np.array_equal(before[1], window[:, 1:])
    for changed in (0, 1):
        given = [np.array(x), np.array(state)]
        given[changed][1] += 1
        after = run(*map(mx.array, given))
        for a, b in zip(after, before, strict=True):
            assert np.array_equal(a[[0, 2]], b[[0, 2]])
        assert not np.array_equal(after[0][1], before[0][1])
    # Why a launch must have a place for each sequence.
    assert np.isnan(run(x, state, count=1)[0][1:]).all()
