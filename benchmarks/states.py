#!/usr/bin/env python3
"""Recurrences of rewritten models beside mlx_lm's own, on the default device, taking turns.

    python benchmarks/states.py [--tiny] [--recorded] [--sweep] [--rounds 7] [--json FILE]

Decode: one token of 64 sequences, states threaded through 20 steps of one graph. Prefill: 4096
tokens of one sequence. Times are medians of rounds in which both sides run, in changing order.
Bytes are those of the states, read once and written once; `copy` is the share of what an
elementwise copy of the same states reaches on the device. Off Metal mlx_lm has no kernels for
these and takes its fallback in plain ops.

With `--recorded` both sides of decode are `mx.compile`d: no Python between the ops, as in recorded
steps of the engine. Without it a step of a few microseconds waits for the host. The copies are not,
since they would become one. Prompts are not read in recorded steps, so that they are left out.

`--sweep` looks for the kernels' constants instead: our side alone, each of them changed in turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import mlx.core as mx
from mlx import nn
from mlx_lm.models import rwkv7
from mlx_lm.models.bailing_hybrid import recurrent_gla
from mlx_lm.models.gated_delta import gated_delta_update
from mlx_lm.models.mamba import MambaBlock
from mlx_lm.models.ssm import ssm_update
from mlxrewrite.kernels import launch, low_rank_specs, selective, state_specs
from mlxrewrite.runtime import recurrences

Step = Callable[[mx.array | None, int, int], tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Shape:
    """Heads of one mixer, as in the model named."""

    label: str
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    def tiny(self) -> Shape:
        heads = 2 if self.key_heads == self.value_heads else 1
        return Shape(self.label, heads, 2, 32, 32)


@dataclass(frozen=True)
class Row:
    """One line of the table; milliseconds of a step, or of a prompt."""

    op: str
    ours: float
    theirs: float
    gigabytes_per_second: float | None
    copy_share: float | None

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours


DELTA = Shape("gated delta, one decay a head (Qwen3-Next)", 16, 32, 128, 128)
KIMI = Shape("gated delta, a decay a channel (Kimi Linear)", 32, 32, 128, 128)
WKV = Shape("diagonal plus low rank (RWKV-7 7.2b)", 64, 64, 64, 64)
GLA = Shape("lightning attention (Ring-flash-linear-2.0)", 32, 32, 128, 128)
DUAL = Shape("state space dual (Mamba-2 2.7b)", 1, 80, 128, 64)

MAMBA = Shape("selective state space (Mamba 2.8b)", 1, 1, 16, 5120)


def delta_steps(shape: Shape, dtype: mx.Dtype, *, per_channel: bool) -> dict[str, Step]:
    """Both sides' update, on the same random rows for the same batch and length."""
    width = (shape.value_heads, shape.key_dim) if per_channel else (shape.value_heads,)
    A_log, bias = mx.zeros((shape.value_heads, *width[1:])), mx.zeros(width)
    rows: dict[tuple[int, int], list[mx.array]] = {}

    def make(count: int, length: int) -> list[mx.array]:
        if (count, length) not in rows:
            keys = count, length, shape.key_heads, shape.key_dim
            q, k = (mx.random.normal(keys) / shape.key_dim**0.5 for _ in range(2))
            v = mx.random.normal((count, length, shape.value_heads, shape.value_dim))
            a = mx.random.normal((count, length, *width)) - 3
            b = mx.random.normal((count, length, shape.value_heads))
            rows[count, length] = [x.astype(dtype) for x in (q, k, v, a, b)]
            mx.eval(rows[count, length])
        return rows[count, length]

    def ours(state: mx.array | None, count: int, length: int) -> tuple[mx.array, mx.array]:
        return recurrences.delta_rule(*make(count, length), A_log, bias, state)

    def theirs(state: mx.array | None, count: int, length: int) -> tuple[mx.array, mx.array]:
        return gated_delta_update(*make(count, length), A_log, bias, state)

    return {"ours": ours, "theirs": theirs}


def dual_steps(shape: Shape, dtype: mx.Dtype) -> dict[str, Step]:
    heads = (shape.value_heads,)
    A_log, D, bias = mx.zeros(heads), mx.ones(heads), mx.zeros(heads) - 3
    rows: dict[tuple[int, int], list[mx.array]] = {}

    def make(count: int, length: int) -> list[mx.array]:
        if (count, length) not in rows:
            x = mx.random.normal((count, length, shape.value_heads, shape.value_dim))
            groups = count, length, shape.key_heads, shape.key_dim
            B, C = (mx.random.normal(groups) / shape.key_dim**0.5 for _ in range(2))
            dt = mx.random.normal((count, length, shape.value_heads))
            x, B, C, dt = (part.astype(dtype) for part in (x, B, C, dt))
            rows[count, length] = [x, A_log, B, C, D, dt, bias]
            mx.eval(rows[count, length])
        return rows[count, length]

    def ours(state: mx.array | None, count: int, length: int) -> tuple[mx.array, mx.array]:
        return recurrences.state_space_dual(*make(count, length), state)

    def theirs(state: mx.array | None, count: int, length: int) -> tuple[mx.array, mx.array]:
        return ssm_update(*make(count, length), state)

    return {"ours": ours, "theirs": theirs}


def wkv_steps(shape: Shape, dtype: mx.Dtype) -> dict[str, Step]:
    args = rwkv7.ModelArgs(
        "rwkv7", 8, shape.value_heads * shape.key_dim, 8, 1e-5, shape.key_dim, 1, 8, 8, 8, 8
    )
    mixer = rwkv7.Rwkv7TimeMixing(args, 0)
    op = recurrences.low_rank_scan("r", "w", "k", "v", "a", "b", "state")
    replaced = op(rwkv7.Rwkv7TimeMixing._wkv7)
    rows: dict[tuple[int, int], list[mx.array]] = {}

    def make(count: int, length: int) -> list[mx.array]:
        if (count, length) not in rows:
            heads = count, length, shape.value_heads, shape.key_dim
            r, k, v, kappa = (mx.random.normal(heads) / shape.key_dim**0.5 for _ in range(4))
            kappa = kappa / mx.linalg.norm(kappa, axis=-1, keepdims=True)
            w = mx.exp(-0.606531 * mx.random.uniform(shape=heads))
            made = (r, w, k, v, -kappa, kappa * mx.random.uniform(shape=heads))
            rows[count, length] = [x.astype(dtype) for x in made]
            mx.eval(rows[count, length])
        return rows[count, length]

    def ours(state: mx.array | None, count: int, length: int) -> tuple[mx.array, mx.array]:
        return replaced(mixer, *make(count, length), state)

    def theirs(state: mx.array | None, count: int, length: int) -> tuple[mx.array, mx.array]:
        return mixer._wkv7(*make(count, length), state)

    return {"ours": ours, "theirs": theirs}


def gla_steps(shape: Shape, dtype: mx.Dtype) -> dict[str, Step]:
    """States are [N, H, Dk, Dv] in both, as the model file has them; Dk is Dv."""
    names = ("q", "k", "v", "g", "scale", "h")
    replaced = recurrences.lightning_scan(*names, compared=True)(recurrent_gla)
    decay = -(2.0 ** (-8 * mx.arange(1, shape.value_heads + 1) / shape.value_heads))
    rows: dict[tuple[int, int], list[mx.array]] = {}

    def make(count: int, length: int) -> list[mx.array]:
        if (count, length) not in rows:
            heads = count, shape.value_heads, length, shape.key_dim
            q, k = (mx.random.normal(heads) for _ in range(2))
            v = mx.random.normal((*heads[:3], shape.value_dim))
            rows[count, length] = [x.astype(dtype) for x in (q, k, v)]
            mx.eval(rows[count, length])
        return rows[count, length]

    def side(function: Callable[..., Any]) -> Step:
        def run(state: mx.array | None, count: int, length: int) -> tuple[mx.array, mx.array]:
            scale = shape.key_dim**-0.5
            y, last = function(*make(count, length), decay, scale=scale, h=state)
            return y, last

        return run

    return {"ours": side(replaced), "theirs": side(recurrent_gla)}


def selective_steps(shape: Shape, dtype: mx.Dtype) -> dict[str, Step]:
    """mlx_lm's update of one token is a method that makes dt, B and C itself: a mixer that has
    them already stands in for its projections. Both sides take dt through softplus."""
    channels, states = shape.value_heads * shape.value_dim, shape.key_dim
    A = -mx.exp(mx.random.normal((channels, states))).astype(dtype)
    D = mx.ones(channels, dtype)
    rows: dict[tuple[int, int], list[mx.array]] = {}
    mixer = SimpleNamespace(
        D=D,
        time_step_rank=channels,
        ssm_state_size=states,
        use_bcdt_rms=False,
        dt_proj=lambda dt: dt,
    )

    def make(count: int, length: int) -> list[mx.array]:
        if (count, length) not in rows:
            x, dt = (mx.random.normal((count, length, channels)) for _ in range(2))
            B, C = (mx.random.normal((count, length, states)) for _ in range(2))
            rows[count, length] = [part.astype(dtype) for part in (x, dt - 3, B, C)]
            mx.eval(rows[count, length])
        return rows[count, length]

    def flat(state: mx.array | None) -> mx.array | None:
        return None if state is None else state.reshape(-1, channels, states)

    def ours(state: mx.array | None, count: int, length: int) -> tuple[mx.array, mx.array]:
        x, dt, B, C = make(count, length)
        return recurrences.selective_scan(x, nn.softplus(dt), A, B, C, D, flat(state))

    def theirs(state: mx.array | None, count: int, length: int) -> tuple[mx.array, mx.array]:
        x, dt, B, C = make(count, length)
        made, held, outputs = mx.concatenate([dt, B, C], axis=-1), flat(state), []
        for t in range(length):
            mixer.x_proj = lambda _, t=t: made[:, t]
            y, held = MambaBlock.ssm_step(mixer, x[:, t], A, held)
            outputs.append(y)
        return mx.stack(outputs, axis=1), held

    return {"ours": ours, "theirs": theirs}


def timed(run: Callable[[], list[mx.array]]) -> float:
    start = time.perf_counter()
    mx.eval(run())
    mx.synchronize()
    return time.perf_counter() - start


def medians(sides: dict[str, Callable[[], list[mx.array]]], rounds: int) -> dict[str, float]:
    """Seconds of each side; one round before, which is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        order = list(sides) if number % 2 else list(sides)[::-1]
        for name in order:
            found[name].append(timed(sides[name]))
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def decode(
    shape: Shape, steps: dict[str, Step], count: int, chain: int, rounds: int, *, recorded: bool
) -> Row:
    size = (count, shape.value_heads, shape.value_dim, shape.key_dim)
    state = mx.random.normal(size)
    mx.eval(state)

    def side(step: Step) -> Callable[[], list[mx.array]]:
        def run() -> list[mx.array]:
            held, outputs = state, []
            for _ in range(chain):
                y, held = step(held, count, 1)
                outputs.append(y)
            return [held, *outputs]

        return run

    def copies() -> list[mx.array]:
        held = state
        for number in range(chain):
            held = held * float(1 + number)
        return [held]

    sides = {name: side(step) for name, step in steps.items()}
    if recorded:
        mx.eval([step(state, count, 1) for step in steps.values()])  # makes the rows
        sides = {name: mx.compile(run) for name, run in sides.items()}
    got = medians({**sides, "copy": copies}, rounds)
    moved = 2 * state.nbytes * chain
    return Row(
        f"decode {count}: {shape.label}",
        1e3 * got["ours"] / chain,
        1e3 * got.get("theirs", math.nan) / chain,
        moved / got["ours"] / 1e9,
        got["copy"] / got["ours"],
    )


def prefill(shape: Shape, steps: dict[str, Step], length: int, rounds: int) -> Row:
    sides = {name: lambda step=step: list(step(None, 1, length)) for name, step in steps.items()}
    got = medians(sides, rounds)
    label = f"prefill {length}: {shape.label}"
    return Row(label, 1e3 * got["ours"], 1e3 * got.get("theirs", math.nan), None, None)


@dataclass(frozen=True)
class Knobs:
    """Constants of a module, with the values that are tried."""

    module: Any
    values: dict[str, tuple[int, ...]]

    def combinations(self) -> list[dict[str, int]]:
        return [
            dict(zip(self.values, chosen, strict=True))
            for chosen in itertools.product(*self.values.values())
        ]


STEP_KNOBS = Knobs(state_specs, {"ROWS": (2, 4, 8), "MOST_SIMDGROUPS": (2, 4)})
WKV_KNOBS = Knobs(low_rank_specs, {"NARROW_ROWS": (4, 8, 16)})
SELECTIVE_KNOBS = Knobs(selective, {"SEQUENCES": (1, 2, 4, 8), "SIMDGROUPS": (2, 4, 8)})
WALK_KNOBS = (
    Knobs(selective, {"PART": (4, 8, 16), "ENOUGH_SIMDGROUPS": (2048, 4096, 8192, 16384)}),
    Knobs(selective, {"AHEAD": (2, 4, 8), "SIMDGROUPS": (2, 4, 8)}),
)


def swept(*, tiny: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of each kernel with each choice of its constants, and of a copy."""
    count, length, chain = (3, 70, 2) if tiny else (64, 4096, 20)
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    delta, wkv, mamba = (s.tiny() if tiny else s for s in (DELTA, WKV, MAMBA))
    made: tuple[tuple[Shape, dict[str, Step], Knobs], ...] = (
        (delta, delta_steps(delta, dtype, per_channel=False), STEP_KNOBS),
        (wkv, wkv_steps(wkv, dtype), WKV_KNOBS),
        (mamba, selective_steps(mamba, dtype), SELECTIVE_KNOBS),
    )
    for shape, steps, knobs in made:
        for chosen in knobs.combinations():
            with mock.patch.multiple(knobs.module, **chosen):
                row = decode(shape, {"ours": steps["ours"]}, count, chain, rounds, recorded=True)
            yield {"case": row.op, **chosen, "ms": row.ours, "copy": row.copy_share}
    steps = {"ours": selective_steps(mamba, dtype)["ours"]}
    for knobs in WALK_KNOBS:
        for chosen in knobs.combinations():
            with mock.patch.multiple(knobs.module, **chosen):
                row = prefill(mamba, steps, length, rounds)
            yield {"case": row.op, **chosen, "ms": row.ours}


def table(rows: list[Row]) -> str:
    lines = [f"{'':66}{'ours ms':>10}{'mlx_lm ms':>11}{'times':>8}{'GB/s':>8}{'copy':>7}"]
    for row in rows:
        speed = "" if row.gigabytes_per_second is None else f"{row.gigabytes_per_second:.0f}"
        share = "" if row.copy_share is None else f"{row.copy_share:.0%}"
        lines.append(
            f"{row.op:66}{row.ours:10.3f}{row.theirs:11.3f}{row.ratio:8.1f}{speed:>8}{share:>7}"
        )
    return "\n".join(lines)


def measure(*, tiny: bool, recorded: bool, rounds: int) -> list[Row]:
    count, length, chain = (3, 70, 2) if tiny else (64, 4096, 20)
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    rows = []
    made: tuple[tuple[Shape, Callable[[Shape], dict[str, Step]]], ...] = (
        (DELTA, lambda shape: delta_steps(shape, dtype, per_channel=False)),
        (KIMI, lambda shape: delta_steps(shape, dtype, per_channel=True)),
        (DUAL, lambda shape: dual_steps(shape, dtype)),
        (WKV, lambda shape: wkv_steps(shape, dtype)),
        (GLA, lambda shape: gla_steps(shape, dtype)),
        (MAMBA, lambda shape: selective_steps(shape, dtype)),
    )
    for whole, make in made:
        shape = whole.tiny() if tiny else whole
        steps = make(shape)
        rows.append(decode(shape, steps, count, chain, rounds, recorded=recorded))
        if not recorded:
            rows.append(prefill(shape, steps, length, min(rounds, 3)))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--recorded", action="store_true", help="without Python between the ops")
    parser.add_argument("--sweep", action="store_true", help="try other constants of the kernels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.sweep:
        found = []
        for tried in swept(tiny=options.tiny, rounds=options.rounds):
            found.append(tried)
            print(json.dumps(tried), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    rows = measure(tiny=options.tiny, recorded=options.recorded, rounds=options.rounds)
    print(f"{mx.default_device()}, kernels: {launch.active() or 'none (plain ops)'}")
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
