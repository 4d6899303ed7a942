"""Every rule of token axes against mlx: change one row of the inputs, see which rows change.

A case (`axes_cases.py`) is a call. Where the rule proves it, the changed row of the inputs may
change that row of the result and no other (and must change it); where the rule says that rows are
mixed, some other row does change. Every rule has a case, and a rule that lied would be caught.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from axes_cases import (
    CASES,
    ELSEWHERE,
    RULED,
    Case,
    Sizes,
    changes,
    check,
    claim,
    has_tokens,
    interpreter,
)
from mlxrewrite.axes.domain import LENGTH, ROWS, Array, Library, Refused, feature
from mlxrewrite.axes.rules import ELEMENTWISE, RULES

NAMES = sorted({case.rule for case in CASES})


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_says_what_mlx_does(name):
    for case in CASES:
        if case.rule == name:
            try:
                check(case, claim)
            except AssertionError as wrong:
                raise AssertionError(f"{case}: {wrong}") from wrong


def test_every_rule_has_a_case_and_every_case_a_rule():
    cases = {name for name in NAMES if not name.startswith("python.")}
    assert cases | set(ELSEWHERE) == RULED
    assert not cases & set(ELSEWHERE)


def test_every_rule_is_seen_to_prove_or_to_refuse_something():
    """A rule that refuses all calls, or one whose calls hold no rows, would pass for nothing."""
    without_rows = "arange linspace eye tri identity zeros ones synchronize clear_cache".split()
    assert {c.rule for c in CASES if has_tokens(c)} >= set(NAMES) - {
        *without_rows, "random.uniform", "random.normal",
    }  # fmt: skip


# --------------------------------------------------------------------------- wrong rules


def lies(case: Case, given: Sizes, truth: list[Array] | None) -> Iterator[list[Array]]:
    """Other answers than the rule's: no tokens in the result, or rows along another axis."""
    if truth is not None:
        bare = [
            Array(tuple(tuple(f for f in axis if not f.is_token) for axis in one.axes or ()))
            for one in truth
        ]
        dropped = [
            Array(tuple(axis if axis else feature() for axis in one.axes or ())) for one in bare
        ]
        if any(ROWS in one.token_factors or LENGTH in one.token_factors for one in truth):
            yield dropped
        for one in truth[:1]:
            axes = one.axes or ()
            held = next((i for i, axis in enumerate(axes) if axis == (ROWS,)), None)
            for i, axis in enumerate(axes):
                if held is not None and LENGTH not in axis and i != held:
                    moved = list(axes)
                    moved[i], moved[held] = (ROWS,), feature()
                    yield [Array(tuple(moved))] * len(truth)
        return
    changed = changes(case, given, 0, "r", 0)
    if changed is not None:
        for i, size in enumerate(changed[0].shape):
            if size == given["r"]:
                axes = [feature() for _ in changed[0].shape]
                axes[i] = (ROWS,)
                yield [Array(tuple(axes))]
        yield [Array(tuple(feature() for _ in changed[0].shape))]


def caught(case: Case, number: int) -> bool | None:
    """Whether one lie about a case is seen; None if it has no such lie."""
    told = []

    def lying(one: Case, given: Sizes) -> list[Array]:
        try:
            truth = claim(one, given)
        except Refused as refused:
            if refused.slug != "row-mixing" or one.careful:
                raise
            truth = None
        every = list(lies(one, given, truth))
        if len(every) <= number:
            if truth is None:
                raise Refused("row-mixing", "no lie")
            return truth
        told.append(every[number])
        return every[number]

    try:
        check(case, lying, equal=True)
    except AssertionError:
        return True if told else None
    return False if told else None


LIED_ABOUT = sorted(
    {c.rule for c in CASES if has_tokens(c) and not c.still}
    - {name for name in ELEMENTWISE if name != "add"}
)


@pytest.mark.parametrize("name", LIED_ABOUT)
def test_a_wrong_rule_is_caught(name):
    """The rule is replaced by one that says the rows are elsewhere, or that there are none."""
    cases = [c for c in CASES if c.rule == name and has_tokens(c) and not c.still]
    found = [(c, i, caught(c, i)) for c in cases[:4] for i in range(3)]
    told = [(c, i, seen) for c, i, seen in found if seen is not None]
    assert told
    assert not [f"{c} lie {i}" for c, i, seen in told if not seen]


def test_elementwise_operations_share_one_rule():
    assert {RULES[name].apply for name in ELEMENTWISE} == {RULES["add"].apply}


def test_every_rule_is_of_an_operation_of_mlx():
    def known(name: str) -> bool:
        found = mx
        for part in name.split("."):
            found = getattr(found, part, None)
        return found is not None

    assert [name for name in RULES if not known(name)] == []


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
    with pytest.raises(Refused) as caught_:
        interpreter().call_library(Library("mlx.core.linalg.svd"), (x,), {})
    assert caught_.value.slug == "unknown-operation"
    with pytest.raises(Refused):
        interpreter().call_library(Library("numpy.sum"), (x,), {})
