"""Selective state spaces: plain form and kernels against float64, token by token."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from mlxrewrite.kernels import launch, selective
from mlxrewrite.kernels.dialects.cpu import KernelError, static
from mlxrewrite.kernels.dialects.cpu.source import Input
from mlxrewrite.kernels.render import render
from mlxrewrite.kernels.state_specs import SelectiveScanSpec, SelectiveStepSpec
from mlxrewrite.runtime.recurrences import selective_scan
from selective_cases import DTYPES, TOLERANCE, Case, error, exact


def on_the_runner(arrays, pieces=None):
    with launch.backend("runner"):
        found = selective.selective_scan(*arrays, pieces=pieces)
        mx.eval(*found)
    return found


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 130])
def test_the_plain_form_follows_the_rule(length, begun, hard):
    arrays = Case(length=length, begun=begun, hard=hard, states=6).arrays()
    y, state = selective_scan(*arrays)
    want, last = exact(arrays)
    assert error(y, want) < 2e-6 and error(state, last) < 2e-6


CASES = [
    Case(),
    Case(count=1, begun=False),
    Case(count=7, channels=33),  # neither lanes nor sequences fill up
    Case(count=5, states=4, dtype="bfloat16", weights="bfloat16"),
    Case(count=4, states=128, channels=9, dtype="float16"),
    Case(length=21, hard=True),
    Case(length=2, begun=False, channels=33),
    Case(length=9, states=8, dtype="bfloat16", weights="bfloat16"),
    Case(length=5, states=64, channels=9, dtype="float16", weights="float16"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_follow_the_rule(case):
    arrays = case.arrays()
    assert selective.supports(case.channels, case.states, arrays[0].dtype, arrays[2].dtype) is None
    y, state = on_the_runner(arrays)
    want, last = exact(arrays)
    wide = case.weights == "float32"
    assert y.dtype == (mx.float32 if wide else DTYPES[case.dtype]) and state.dtype == mx.float32
    assert error(y, want) < (2e-6 if wide else TOLERANCE[case.dtype])
    assert error(state, last) < 2e-6


@pytest.mark.parametrize("pieces", [2, 3, 5])
def test_pieces_of_a_prompt_are_joined(pieces):
    """Also where the last one is short, or all but the first would be empty."""
    for case in (Case(length=23), Case(length=6, hard=True, begun=False, channels=33)):
        arrays = case.arrays()
        y, state = on_the_runner(arrays, pieces)
        want, last = exact(arrays)
        assert error(y, want) < 2e-6 and error(state, last) < 2e-6


def test_how_many_pieces():
    assert selective._pieces(320, 4096) == 12  # channels of a large model
    assert selective._pieces(64, 4096) == 64 and selective._pieces(64, 640) == 10
    assert selective._pieces(4000, 4096) == 1 and selective._pieces(64, 100) == 1


def test_a_prompt_may_come_in_parts():
    *rows, state = Case(length=20).arrays()
    x, delta, A, B, C, D = rows
    whole, last = selective_scan(*rows, state)
    found = []
    for start, stop in ((0, 1), (1, 12), (12, 20)):
        cut = slice(start, stop)
        y, state = selective_scan(x[:, cut], delta[:, cut], A, B[:, cut], C[:, cut], D, state)
        found.append(y)
    assert mx.allclose(mx.concatenate(found, axis=1), whole, atol=1e-5)
    assert mx.allclose(state, last, atol=1e-5)


def test_what_the_kernels_lack_takes_the_plain_form():
    for case in (Case(states=6), Case(channels=5, length=3)):
        arrays = case.arrays()
        assert selective.supports(case.channels, case.states, mx.float32, mx.float32)
        assert error(on_the_runner(arrays)[0], exact(arrays)[0]) < 2e-6


def test_shapes_that_do_not_go_together_are_refused():
    """Also those that would broadcast: a kernel reads what each channel has."""
    arrays = Case(length=3).arrays()
    for place, wrong in (
        (1, arrays[1][:, :2]),
        (2, arrays[2][:1]),
        (3, arrays[3][:, :2]),
        (4, arrays[4][..., :4]),
        (5, arrays[5][:1]),
        (6, arrays[6][:1]),
    ):
        given = [wrong if i == place else part for i, part in enumerate(arrays)]
        with pytest.raises(TypeError, match="do not go together"):
            selective_scan(*given)


BUGS = {
    "step": {
        "decay forgotten": (" * fast::exp2(delta * rate[j])", ""),
        "next state": ("first + j]);\n    held", "first + (j ^ 1)]);\n    held"),
        "no skip": ("sum + skip * input", "sum"),
        "half of the lanes": ("mask < LANES;", "mask < LANES / 2;"),
        "sequence before": ("const int target = row *", "const int target = max(row - 1, 0) *"),
        "beyond the end": ("size_t(min(sequence + i, count - 1))", "size_t(sequence + i)"),
        "lane without a channel": ("min(unit / LANES, CHANNELS - 1)", "unit / LANES"),
    },
    "scan": {
        "decay of another token": ("fast::exp2(delta[i]", "fast::exp2(delta[0]"),
        "state dropped": ("held[j] = state[size_t(sequence) * (CHANNELS * STATES) + place + j]",
                          "held[j] = 0.0f"),
        "half of the lanes": ("mask < LANES;", "mask < LANES / 2;"),
        "written by all": ("if (unit < UNITS && first == 0)", "if (true)"),
        "beyond the end": ("min(token + i, stop - 1)", "(token + i)"),
        "one token less": ("if (token + i < stop)", "if (token + i < stop - 1)"),
    },
    "joined": {
        "ends not decayed": ("fast::exp2(total * rate[j])", "1.0f"),
        "end of another piece": ("* pieces + before)", "* pieces)"),
        "one end too many": ("before < piece;", "before <= piece;"),
    },
    "ends": {
        "decays not summed": ("total += delta[i]", "total = delta[i]"),
        "the first piece's place": ("const int start = piece * tokens", "const int start = 0"),
        "ends of all in one place": ("* pieces + piece) * CHANNELS", "* pieces) * CHANNELS"),
    },
}  # fmt: skip


@pytest.mark.parametrize(("which", "bug"), [(w, b) for w, bugs in BUGS.items() for b in bugs])
def test_seeded_bugs_are_seen(which, bug, monkeypatch):
    old, new = BUGS[which][bug]

    def wrong(spec):
        kernel = render(spec)
        name = "step" if isinstance(spec, SelectiveStepSpec) else "scan"
        if isinstance(spec, SelectiveScanSpec) and (spec.ends or spec.joined):
            name = "ends" if spec.ends else "joined"
        if name != which:
            return kernel
        assert old in kernel.source
        return replace(kernel, source=kernel.source.replace(old, new), _made={})

    monkeypatch.setattr(selective, "render", wrong)
    arrays = Case(count=6 if which == "step" else 2, length=1 if which == "step" else 18,
                  channels=33).arrays()  # fmt: skip
    want, last = exact(arrays)
    try:
        y, state = on_the_runner(arrays, 3 if which in ("joined", "ends") else None)
    except KernelError:
        return
    wrong_by = max(error(y, want), error(state, last))
    assert not wrong_by < 1e-4


def test_what_the_kernels_ask_of_metal():
    """The readers of Metal text find nothing, with few and with many elements of each input."""
    for count in (1, 64):
        rows = mx.zeros((count, 1, 8), mx.bfloat16)
        states = mx.zeros((count, 1, 4), mx.bfloat16)
        rates, skips = mx.zeros((8, 4), mx.bfloat16), mx.zeros(8, mx.bfloat16)
        held, sizes = mx.zeros((count, 8, 4)), mx.zeros(8, mx.int32)
        known = {"inputs": rows, "deltas": rows, "entering": states, "leaving": states,
                 "rates": rates, "skips": skips, "state": held, "sizes": sizes,
                 "ends": held[:, None], "sums": mx.zeros((count, 1, 8))}  # fmt: skip
        kinds = ("bfloat16",) * 3
        specs = [SelectiveStepSpec(*kinds, 8, 4, 1, 4)]
        for ends, joined in ((False, False), (True, False), (False, True)):
            specs.append(SelectiveScanSpec(*kinds, 8, 4, 4, 4, 4, ends, joined))
        for spec in specs:
            kernel = render(spec)
            first = mx.float32 if getattr(spec, "ends", False) else mx.bfloat16
            assert not static.check(
                name=kernel.name,
                inputs=[Input.of(name, known[name]) for name in kernel.input_names],
                output_names=kernel.output_names,
                output_dtypes=[first, mx.float32],
                source=kernel.source,
                header=kernel.header,
            )
