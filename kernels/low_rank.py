"""States whose transition is diagonal plus a product of two vectors, over sequences of one length.

For each head, with state S [Dv, Dk], keys k, queries r, decays w [Dk], values v [Dv], and a pair of
vectors a, b [Dk] (read along a, written along b):

    S <- S diag(w) + (S a) b^T + v k^T;  y = S r

RWKV-7, arXiv 2503.14456, equation 16, with a = -kappa and b = kappa * rate. Decays are factors of
any size and sign, not logarithms: a decay of 0 is one. Prompts are worked out in chunks. With
W(j, i] the product of the decays j < t <= i inside a chunk that begins with S:

    (I - A) U = (a W(0, i - 1]) S^T + B V,  A[i, j] = a[i] W(j, i - 1] b[j],  B with k,  i > j
    y[i] = (r[i] W(0, i]) S^T + sum over j <= i of r[i] W(j, i] (b[j] u[j] + k[j] v[j])
    S <- S W(0, C] + sum over j of (u[j] b[j]^T + v[j] k[j]^T) W(j, C]
"""

from __future__ import annotations

import mlx.core as mx

from . import launch
from .delta import _cut
from .low_rank_specs import low_rank_step_spec
from .render import render
from .state_specs import supports
from .triangles import _halves, assembled, inverse

CHUNK = 64


def low_rank_rule(
    r: mx.array,
    w: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    state: mx.array | None = None,
    *,
    chunk: int = CHUNK,
    kernels: bool = True,
) -> tuple[mx.array, mx.array]:
    """Outputs and the state after the last token.

    r, w, k, a, b [N, L, H, Dk]; v [N, L, H, Dv]; state [N, H, Dv, Dk], None for zeros. Returns y
    [N, L, H, Dv] in the type of r and the state in float32. Without `kernels` none is used.
    """
    if state is None:
        state = mx.zeros((v.shape[0], v.shape[2], v.shape[3], k.shape[3]), mx.float32)
    state = state.astype(mx.float32)
    if r.shape[1] == 1:
        return _step(r, w, k, v, a, b, state, kernels)
    return _chunked(r, w, k, v, a, b, state, chunk)


def low_rank_loop(
    r: mx.array,
    w: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """Token by token: what the rule says, for comparison."""
    outputs = []
    for t in range(r.shape[1]):
        now = slice(t, t + 1)
        token = r[:, now], w[:, now], k[:, now], v[:, now], a[:, now], b[:, now]
        y, state = _plain(*token, state)
        outputs.append(y)
    return mx.concatenate(outputs, axis=1), state


# ------------------------------------------------------------------------------------------ a token


def _step(
    r: mx.array,
    w: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    state: mx.array,
    kernels: bool,
) -> tuple[mx.array, mx.array]:
    if not kernels or launch.active() is None or supports(r, k, v, state) is not None:
        return _plain(r, w, k, v, a, b, state)
    rows = {"queries": r, "decay": w, "keys": k, "values": v, "reading": a, "writing": b}
    if len({x.dtype for x in rows.values()}) > 1:
        rows = {name: x.astype(mx.float32) for name, x in rows.items()}
    spec = low_rank_step_spec(rows["queries"], rows["values"])
    y, new = render(spec)(
        {**rows, "state": state},
        [(v.shape, rows["queries"].dtype), (state.shape, state.dtype)],
        groups=state.size // (state.shape[3] * spec.rows * spec.simdgroups),
        threads=32 * spec.simdgroups,
    )
    return y.astype(r.dtype), new


@mx.compile
def _plain(
    r: mx.array,
    w: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    query, decay, key, reading, writing = (
        x[:, 0, :, None].astype(mx.float32) for x in (r, w, k, a, b)
    )
    held = (state * reading).sum(-1, keepdims=True)
    given = v[:, 0, :, :, None].astype(mx.float32)
    new = state * decay + held * writing + given * key
    return (new * query).sum(-1)[:, None].astype(r.dtype), new


# ------------------------------------------------------------------------------------------- chunks


def _chunked(
    r: mx.array,
    w: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    state: mx.array,
    chunk: int,
) -> tuple[mx.array, mx.array]:
    length, out_dtype = r.shape[1], r.dtype
    size = min(chunk, 1 << (length - 1).bit_length())
    if missing := -length % size:  # Padding writes nothing (k, b 0) and keeps the state (w 1).
        w = mx.pad(w, [(0, 0), (0, missing), (0, 0), (0, 0)], constant_values=1)
    r, w, k, v, a, b = (_cut(x, size) for x in (r, w, k, v, a, b))
    system, by_key, read_back, read_keys = _squares(r, w, k, a, b)
    solved = inverse(system, w[..., 0])
    none = mx.zeros_like(w[..., 0])
    values = solved @ (assembled(none, by_key) @ v)
    weights = solved @ (a * mx.cumprod(w, axis=-2, inclusive=False))
    back = assembled((r * b).sum(-1), read_back)
    outputs_inside = assembled((r * k).sum(-1), read_keys) @ v
    grown = mx.cumprod(w, axis=-2)
    queries, last = r * grown, grown[..., -1:, :]
    fade = mx.cumprod(w, axis=-2, reverse=True, inclusive=False)
    written, added = b * fade, v.swapaxes(-1, -2) @ (k * fade)
    outputs = []
    for n in range(v.shape[2]):
        turned = state.swapaxes(-1, -2)
        held = values[:, :, n] + weights[:, :, n] @ turned
        outputs.append(queries[:, :, n] @ turned + back[:, :, n] @ held)
        state = state * last[:, :, n] + held.swapaxes(-1, -2) @ written[:, :, n] + added[:, :, n]
    y = mx.stack(outputs, axis=2) + outputs_inside
    y = y.reshape(*y.shape[:2], -1, y.shape[-1])[:, :, :length]
    return y.swapaxes(1, 2).astype(out_dtype), state


def _squares(
    r: mx.array, w: mx.array, k: mx.array, a: mx.array, b: mx.array
) -> tuple[list[mx.array], list[mx.array], list[mx.array], list[mx.array]]:
    """Squares below the diagonal, as in `triangles`: of -A, B, and of r with b and with k.

    From a key to the middle of its piece, and from there to a row: a decay is never divided by.
    """
    found: tuple[list[mx.array], ...] = ([], [], [], [])
    size = 1
    while size < r.shape[-2]:
        before, after = _halves(w, size)
        # Row i of `a` sees the state before its own decay, that of `r` the one behind it.
        late_a = _halves(a, size)[1] * mx.cumprod(after, axis=-2, inclusive=False)
        late_r = _halves(r, size)[1] * mx.cumprod(after, axis=-2)
        to_middle = mx.cumprod(before, axis=-2, reverse=True, inclusive=False)
        early = mx.concatenate([_halves(x, size)[0] * to_middle for x in (b, k)], axis=-2)
        all_of_them = mx.concatenate([-late_a, late_r], axis=-2) @ early.swapaxes(-1, -2)
        found[0].append(all_of_them[..., :size, :size])
        found[1].append(-all_of_them[..., :size, size:])
        found[2].append(all_of_them[..., size:, :size])
        found[3].append(all_of_them[..., size:, size:])
        size *= 2
    return found[0], found[1], found[2], found[3]
