"""The gated delta rule over a batch of sequences of equal length.

For each head, with state S [Dv, Dk], keys k and queries q [Dk], values v [Dv], a decay in (0, 1]
(one number, or one for each key channel) and a writing strength beta:

    S <- S * decay;  u = beta * (v - S k);  S <- S + u k^T;  y = S q

Gated DeltaNet, arXiv 2412.06464; with a decay per channel Kimi delta attention, arXiv 2510.26692.
Prompts are worked out in chunks (the WY form, arXiv 2406.06484), not token by token. With g the sum
of the logarithms of the decays inside a chunk that begins with S:

    (I + A) U = beta (V - (K e^g) S^T),  A[i, j] = beta[i] k[i] (e^(g[i] - g[j]) k[j]),  i > j
    y[i] = (q[i] e^g[i]) S^T + sum over j <= i of q[i] (e^(g[i] - g[j]) k[j]) u[j]
    S <- S e^g[C] + sum over j of u[j] (e^(g[C] - g[j]) k[j])^T
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from .state_step import state_step
from .triangles import assembled, decayed_squares, fades, inverse, squares_of

CHUNK = 64


def delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    *,
    chunk: int = CHUNK,
    kernels: bool = True,
) -> tuple[mx.array, mx.array]:
    """Outputs and the state after the last token.

    q, k [N, L, Hk, Dk]; v [N, L, Hv, Dv], Hv a multiple of Hk; log_decay [N, L, Hv] or
    [N, L, Hv, Dk], at most 0; beta [N, L, Hv]; state [N, Hv, Dv, Dk], None for zeros. Returns
    y [N, L, Hv, Dv] in the type of q and the state in its own. Kernels cannot be differentiated:
    without `kernels` none is used.
    """
    if state is None:
        state = mx.zeros((v.shape[0], v.shape[2], v.shape[3], k.shape[3]), mx.float32)
    if q.shape[1] == 1:
        return state_step(q, k, v, log_decay, beta, state, kernels=kernels)
    return _chunked(q, k, v, log_decay, beta, state, chunk)


def delta_gates(
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    *,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, mx.array]:
    """The logarithms of the decays, float32, and the writing strengths, as mlx_lm defines them."""
    beta = mx.sigmoid(b)
    rate = mx.exp(A_log.astype(mx.float32))
    if lower_bound is None:
        log_decay = -rate * nn.softplus(a + dt_bias)
    else:
        log_decay = lower_bound * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias))
    return log_decay, 2.0 * beta if allow_neg_eigval else beta


def delta_loop(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """Token by token: what the rule says, for comparison."""
    outputs = []
    for t in range(q.shape[1]):
        now = slice(t, t + 1)
        token = q[:, now], k[:, now], v[:, now], log_decay[:, now], beta[:, now]
        y, state = state_step(*token, state, kernels=False)
        outputs.append(y)
    return mx.concatenate(outputs, axis=1), state


# ----------------------------------------------------------------------------------------- chunks


def _chunked(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array,
    chunk: int,
) -> tuple[mx.array, mx.array]:
    length, out_dtype, state_dtype = q.shape[1], q.dtype, state.dtype
    size = min(chunk, 1 << (length - 1).bit_length())
    heads, key_heads = v.shape[2], k.shape[2]
    # Padding writes nothing (beta 0, k 0) and keeps the state (decay 1).
    q, k, v, g, b = (_cut(x, size) for x in (q, k, v, log_decay, beta))
    if log_decay.ndim == 4:
        q, k = (mx.repeat(x, heads // key_heads, axis=1) for x in (q, k))
        scores = assembled((q * k).sum(-1), decayed_squares(q, k, g))
        squares = zip(decayed_squares(k, k, g), _rows(b[..., None]), strict=True)
        system = [square * strength for square, strength in squares]
        grown = mx.exp(mx.cumsum(g, axis=-2))
        queries, keys, last = q * grown, k * grown, grown[..., -1:, :]
        writing = k * mx.exp(mx.cumsum(g, axis=-2, reverse=True, inclusive=False))
    else:
        g, strength = (x.reshape(x.shape[0], key_heads, -1, *x.shape[2:]) for x in (g, b))
        fade, grown = fades(g), mx.exp(mx.cumsum(g, axis=-1))[..., None]
        q, k = q[:, :, None], k[:, :, None]
        scores = _flat((q @ k.swapaxes(-1, -2)) * fade)
        system = squares_of(_flat((k @ k.swapaxes(-1, -2)) * fade * strength[..., None]))
        shrunk = fade[..., -1, :, None]
        queries, keys, writing = (_flat(x) for x in (q * grown, k * grown, k * shrunk))
        last = _flat(grown[..., -1:, :])
    solved = inverse(system, b)
    values = solved @ (v * b[..., None])
    weights = solved @ (keys * b[..., None])
    state = state.astype(mx.float32)
    outputs = []
    for n in range(v.shape[2]):
        written = values[:, :, n] - weights[:, :, n] @ state.swapaxes(-1, -2)
        outputs.append(queries[:, :, n] @ state.swapaxes(-1, -2) + scores[:, :, n] @ written)
        state = state * last[:, :, n] + written.swapaxes(-1, -2) @ writing[:, :, n]
    y = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
    return y[:, :, :length].swapaxes(1, 2).astype(out_dtype), state.astype(state_dtype)


def _cut(x: mx.array, size: int) -> mx.array:
    """[N, L, H, ...] -> [N, H, chunks, C, ...] in float32, padded with zeros."""
    missing = -x.shape[1] % size
    x = x.astype(mx.float32)
    if missing:
        x = mx.pad(x, [(0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)])
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return mx.moveaxis(x, 3, 1)


def _rows(strength: mx.array) -> list[mx.array]:
    """What scales the rows of each of the squares: [..., C, 1] cut as they are."""
    found, size = [], 1
    while size < strength.shape[-2]:
        cut = strength.reshape(*strength.shape[:-2], -1, 2, size, 1)
        found.append(cut[..., 1, :, :])
        size *= 2
    return found


def _flat(x: mx.array) -> mx.array:
    """[N, Hk, Hv / Hk, ...] -> [N, Hv, ...]."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])
