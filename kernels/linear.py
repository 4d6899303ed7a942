"""Linear recurrences on matrix states over a batch of sequences of equal length.

For each head, with state S [Dv, Dk], keys k, queries q [Dk], values v [Dv], a decay in (0, 1]:

    S <- S * decay;  S <- S + v k^T;  y = S q

Lightning attention (arXiv 2401.04658) as it stands; Mamba-2 (arXiv 2405.21060) with q = C, k = B,
v = dt * x and decay = exp(dt * A). Prompts are worked out in chunks, as decayed causal attention
inside a chunk and one product with the state at its beginning.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from .delta import _cut, _flat
from .state_step import state_step
from .triangles import fades

CHUNK = 128


def linear_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    state: mx.array | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[mx.array, mx.array]:
    """Outputs and the state after the last token.

    q, k [N, L, Hk, Dk]; v [N, L, Hv, Dv], Hv a multiple of Hk; log_decay [N, L, Hv], at most 0;
    state [N, Hv, Dv, Dk], None for zeros. Returns y [N, L, Hv, Dv] in the type of q and the state.
    """
    if state is None:
        state = mx.zeros((v.shape[0], v.shape[2], v.shape[3], k.shape[3]), mx.float32)
    if q.shape[1] == 1:
        return state_step(q, k, v, log_decay, None, state)
    length, out_dtype, state_dtype, key_heads = q.shape[1], q.dtype, state.dtype, k.shape[2]
    size = min(chunk, 1 << (length - 1).bit_length())
    q, k, v, g = (_cut(x, size) for x in (q, k, v, log_decay))
    g = g.reshape(g.shape[0], key_heads, -1, *g.shape[2:])
    fade, grown = fades(g), mx.exp(mx.cumsum(g, axis=-1))[..., None]
    q, k = q[:, :, None], k[:, :, None]
    inside = _flat((q @ k.swapaxes(-1, -2)) * fade) @ v
    queries, keys = _flat(q * grown), _flat(k * fade[..., -1, :, None])
    added = v.swapaxes(-1, -2) @ keys
    last = _flat(grown[..., -1:, :])
    state, before = state.astype(mx.float32), []
    for n in range(v.shape[2]):
        before.append(state)
        state = state * last[:, :, n] + added[:, :, n]
    y = inside + queries @ mx.stack(before, axis=2).swapaxes(-1, -2)
    y = y.reshape(*y.shape[:2], -1, y.shape[-1])[:, :, :length]
    return y.swapaxes(1, 2).astype(out_dtype), state.astype(state_dtype)


def state_space_dual(
    x: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    state: mx.array | None,
    limits: tuple[float, float],
) -> tuple[mx.array, mx.array]:
    """Mamba-2's update as mlx_lm defines it.

    x [N, L, H, P]; A_log, D, dt_bias [H]; B, C [N, L, G, S]; dt [N, L, H]; state [N, H, P, S].
    """
    y, state = dual_rule(x, A_log, B, C, dual_steps(dt, dt_bias, limits), state)
    return dual_skipped(y, x, D), state


def dual_steps(dt: mx.array, dt_bias: mx.array, limits: tuple[float, float]) -> mx.array:
    """How far each head of a token goes, float32: a step of 0 changes nothing."""
    return mx.clip(nn.softplus(dt.astype(mx.float32) + dt_bias), *limits)


def dual_rule(
    x: mx.array, A_log: mx.array, B: mx.array, C: mx.array, step: mx.array, state: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Mamba-2's recurrence with the steps that its tokens take, [N, L, H]."""
    decay = -mx.exp(A_log.astype(mx.float32)) * step
    return linear_rule(C, B, x * step[..., None], decay, state)


def dual_skipped(y: mx.array, x: mx.array, D: mx.array) -> mx.array:
    """The recurrence's outputs and what goes past it, in the type of x."""
    return (y + x * D[:, None]).astype(x.dtype)
