"""Selective state spaces over a batch of sequences of equal length (Mamba, arXiv 2312.00752).

Each channel has S states of its own, each with a rate A < 0; B and C are the same for all channels
of a token, dt is not:

    h <- h e^(dt A) + dt x B;  y = sum(h C) + D x

A prompt is walked along token by token, channels side by side. Where those are too few to keep a
GPU busy, a prompt is cut into pieces: how a piece ends follows from what it begins with by one
product, so that all are walked along at once, twice.
"""

from __future__ import annotations

import mlx.core as mx

from . import launch
from .metadata import MIN_METADATA, sizes
from .render import render
from .scan import doubled
from .specs import DTYPES
from .state_specs import SelectiveScanSpec, SelectiveStepSpec, dtype_name

PART = 8  # states of a lane that walks along a prompt, at most
AHEAD = 4  # tokens loaded before they are needed
SIMDGROUPS = 4
SEQUENCES = 4  # of a lane, in a step
# Walking twice pays if there are more pieces than two, each long enough to be worth a launch.
ENOUGH_SIMDGROUPS = 4096
SHORTEST_PIECE = 64
FEWEST_PIECES = 3
CHUNK = 64  # tokens that the plain form holds all states of


def selective_scan(
    x: mx.array,
    delta: mx.array,
    A: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    state: mx.array | None = None,
    *,
    pieces: int | None = None,
) -> tuple[mx.array, mx.array]:
    """Outputs and the state after the last token.

    x, delta [N, L, M]; A [M, S], negative; B, C [N, L, S]; D [M]; state [N, M, S], None for zeros;
    pieces: how many to cut the tokens into, by default what suits their number. Returns y
    [N, L, M], of the type that all of these have in common, and the state, float32.
    """
    count, length, channels = x.shape
    states = A.shape[1]
    rows_fit = delta.shape == x.shape and B.shape == C.shape == (count, length, states)
    weights_fit = A.shape == (channels, states) and D.shape == (channels,)
    if not (rows_fit and weights_fit and (state is None or state.shape == (count, *A.shape))):
        given = (x, delta, A, B, C, D, *(() if state is None else (state,)))
        shapes = ", ".join(str(list(part.shape)) for part in given)
        raise TypeError(f"selective_scan: x, delta, A, B, C, D, h of {shapes} do not go together")
    if state is None:
        state = mx.zeros((count, channels, states), mx.float32)
    state = state.astype(mx.float32)
    rows = _common(x, delta, B, C)
    weights = _common(A, D)
    out = mx.result_type(mx.zeros(0, rows), mx.zeros(0, weights))
    if launch.active() is None or supports(channels, states, rows, weights) is not None:
        return _plain(x, delta, A, B, C, D, state, out)
    inputs = {
        "inputs": x.astype(rows),
        "deltas": delta.astype(rows),
        "entering": B.astype(rows),
        "leaving": C.astype(rows),
        "rates": A.astype(weights),
        "skips": D.astype(weights),
        "state": state,
    }
    kinds = dtype_name(rows), dtype_name(weights), dtype_name(out)
    if length == 1:
        return _step(inputs, kinds, out)
    simdgroups = count * -(-channels * (states // min(PART, states)) // 32)
    return _walk(inputs, kinds, out, pieces or _pieces(simdgroups, length))


def supports(channels: int, states: int, rows: mx.Dtype, weights: mx.Dtype) -> str | None:
    """Why the kernels cannot serve a layer, None if they can; the plain form always can."""
    if states not in (4, 8, 16, 32, 64, 128):
        return f"{states} states: kernels exist for 4, 8, 16, 32, 64 and 128"
    if channels < MIN_METADATA:
        return f"{channels} channels: kernels exist from {MIN_METADATA} on"
    if not {dtype_name(rows), dtype_name(weights)} <= set(DTYPES):
        return (
            f"{dtype_name(rows)} and {dtype_name(weights)}: kernels exist for {', '.join(DTYPES)}"
        )
    return None


def _common(first: mx.array, *others: mx.array) -> mx.Dtype:
    dtype = first.dtype
    for other in others:
        dtype = mx.result_type(mx.zeros(0, dtype), mx.zeros(0, other.dtype))
    return dtype


def _pieces(simdgroups: int, length: int) -> int:
    """Into how many pieces tokens are cut; 1 where channels alone are enough to do."""
    found = min(ENOUGH_SIMDGROUPS // simdgroups, length // SHORTEST_PIECE)
    return found if found >= FEWEST_PIECES else 1


def _step(
    inputs: dict[str, mx.array], kinds: tuple[str, str, str], out: mx.Dtype
) -> tuple[mx.array, mx.array]:
    shape, state = inputs["inputs"].shape, inputs["state"]
    count, channels, states = state.shape
    each = SEQUENCES if count >= SEQUENCES else 1
    spec = SelectiveStepSpec(*kinds, channels, states, each, SIMDGROUPS)
    y, last = render(spec)(
        {**inputs, "sizes": sizes(count)},
        [(shape, out), (state.shape, mx.float32)],
        groups=-(-count // each) * _parts(channels, states, 4),
        threads=32 * SIMDGROUPS,
    )
    return y, last


def _walk(
    inputs: dict[str, mx.array], kinds: tuple[str, str, str], out: mx.Dtype, pieces: int
) -> tuple[mx.array, mx.array]:
    shape, state = inputs["inputs"].shape, inputs["state"]
    count, length, channels = shape
    states = state.shape[2]
    tokens = -(-length // pieces)
    pieces = -(-length // tokens)
    given = {**inputs, "sizes": sizes(length, pieces, tokens)}
    part = min(PART, states)
    groups = count * pieces * _parts(channels, states, part)
    fixed = (*kinds, channels, states, part, AHEAD, SIMDGROUPS)
    if pieces > 1:
        spec = SelectiveScanSpec(*fixed, ends=True, joined=False)
        ends = (count, pieces, channels, states)
        given["ends"], given["sums"] = render(spec)(
            {name: given[name] for name in spec.inputs},
            [(ends, mx.float32), (ends[:3], mx.float32)],
            groups=groups,
            threads=32 * SIMDGROUPS,
        )
    spec = SelectiveScanSpec(*fixed, ends=False, joined=pieces > 1)
    y, last = render(spec)(
        given,
        [(shape, out), (state.shape, mx.float32)],
        groups=groups,
        threads=32 * SIMDGROUPS,
    )
    return y, last


def _parts(channels: int, states: int, part: int) -> int:
    """Threadgroups that hold the channels of one sequence."""
    return -(-channels * (states // part) // (32 * SIMDGROUPS))


def _plain(
    x: mx.array,
    delta: mx.array,
    A: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    state: mx.array,
    out: mx.Dtype,
) -> tuple[mx.array, mx.array]:
    """The states of all tokens of a chunk at once, one chunk after another."""
    found = []
    for start in range(0, x.shape[1], CHUNK):
        rows = [part[:, start : start + CHUNK].astype(mx.float32) for part in (x, delta, B, C)]
        y, state = _plain_chunk(rows, A.astype(mx.float32), D.astype(mx.float32), state)
        found.append(y)
    y = found[0] if len(found) == 1 else mx.concatenate(found, axis=1)
    return y.astype(out), state


def _plain_chunk(
    rows: list[mx.array], A: mx.array, D: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    x, delta, B, C = rows
    count, length, channels = x.shape
    flat = (count, length, channels * A.shape[1])
    decay = mx.exp(delta[..., None] * A).reshape(flat)
    added = ((delta * x)[..., None] * B[:, :, None]).reshape(flat)
    held, last = doubled(added, decay, state.reshape(count, -1))
    y = (held.reshape(count, length, channels, -1) @ C[..., None]).squeeze(-1)
    return y + D * x, last.reshape(state.shape)
