"""One token of every sequence through a recurrence on matrix states."""

from __future__ import annotations

import mlx.core as mx

from . import launch
from .render import render
from .state_specs import state_step_spec, supports


def state_step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array | None,
    state: mx.array,
    *,
    kernels: bool = True,
) -> tuple[mx.array, mx.array]:
    """S <- S * decay; S <- S + u k^T; y = S q, where u = beta * (v - S k), or v without beta.

    Shapes as in `delta.delta_rule`, with L = 1.
    """
    if not kernels or launch.active() is None or supports(q, k, v, state) is not None:
        return _plain(q, k, v, log_decay, beta, state)
    spec = state_step_spec(q, k, v, per_channel=log_decay.ndim == 4, delta=beta is not None)
    inputs = {
        "queries": q,
        "keys": k.astype(q.dtype),
        "values": v,
        "decay": mx.exp(log_decay.astype(mx.float32)),
        "state": state,
    }
    if beta is not None:
        inputs["beta"] = beta.astype(mx.float32)
    groups = state.size // (state.shape[3] * spec.rows * spec.simdgroups)
    y, new = render(spec)(
        inputs,
        [(v.shape, q.dtype), (state.shape, state.dtype)],
        groups=groups,
        threads=32 * spec.simdgroups,
    )
    return y, new


@mx.compile
def _plain(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array | None,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    repeat = v.shape[2] // k.shape[2]
    query, key = (mx.repeat(x[:, 0], repeat, axis=1)[:, :, None].astype(mx.float32) for x in (q, k))
    decay = mx.exp(log_decay[:, 0].astype(mx.float32))
    decay = decay[:, :, None] if decay.ndim == 3 else decay[:, :, None, None]
    kept, given = state * decay, v[:, 0].astype(mx.float32)
    if beta is not None:
        given = (given - (kept * key).sum(-1)) * beta[:, 0, :, None]
    new = kept + given[..., None] * key
    return (new * query).sum(-1)[:, None].astype(q.dtype), new.astype(state.dtype)
