"""Lower triangular systems in halves: every level is a few products of small matrices.

Sums over pairs i >= j of a chunk whose terms decay from j to i are needed as C x C matrices. A
square of such a matrix below the diagonal has all its i behind all its j, so a reference point
between them splits the decay into two factors that are both at most 1; no factor ever overflows,
whatever the decay. Halving the chunk gives such squares until single elements are left.
"""

from __future__ import annotations

import mlx.core as mx


def _halves(values: mx.array, size: int) -> tuple[mx.array, mx.array]:
    """[..., C, D] -> both halves of each piece of 2 * size, [..., C / (2 * size), size, D]."""
    cut = values.reshape(*values.shape[:-2], -1, 2, size, values.shape[-1])
    return cut[..., 0, :, :], cut[..., 1, :, :]


def _grown(first: mx.array, below: mx.array, second: mx.array) -> mx.array:
    """[[first, 0], [below, second]] of blocks [..., s, s]."""
    top = mx.concatenate([first, mx.zeros_like(below)], axis=-1)
    return mx.concatenate([top, mx.concatenate([below, second], axis=-1)], axis=-2)


def decayed_squares(rows: mx.array, keys: mx.array, log_decay: mx.array) -> list[mx.array]:
    """`sum_d rows[i, d] keys[j, d] exp(sum_(j < t <= i) log_decay[t, d])` for i behind j.

    rows, keys, log_decay [..., C, D], C a power of two, logarithms at most 0. Returns the squares
    [..., C / (2 s), s, s] below the diagonal for s = 1, 2, 4, ..., C / 2.
    """
    found, size = [], 1
    while size < rows.shape[-2]:
        _, late = _halves(rows, size)
        early, _ = _halves(keys, size)
        before, after = _halves(log_decay, size)
        # From the key to the middle, and from there to the row: sums of few terms, both at most 0.
        late = late * mx.exp(mx.cumsum(after, axis=-2))
        early = early * mx.exp(mx.cumsum(before, axis=-2, reverse=True, inclusive=False))
        found.append(late @ early.swapaxes(-1, -2))
        size *= 2
    return found


def fades(log_decay: mx.array) -> mx.array:
    """`exp(sum over j < t <= i of log_decay[t])` for i >= j, else 0: [..., C] -> [..., C, C].

    Each sum has only its own terms: differences of long sums would lose what strong decays leave.
    """
    size = log_decay.shape[-1]
    below = mx.tril(mx.ones((size, size), mx.bool_), -1)
    steps = mx.where(below, log_decay[..., :, None], 0)
    sums = mx.exp(mx.cumsum(steps, axis=-2))
    return mx.where(mx.tril(mx.ones((size, size), mx.bool_)), sums, 0)


def squares_of(matrix: mx.array) -> list[mx.array]:
    """The same squares of a whole matrix [..., C, C]."""
    found, size, count = [], 1, matrix.shape[-1]
    while size < count:
        pieces = count // (2 * size)
        cut = matrix.reshape(*matrix.shape[:-2], pieces, 2, size, pieces, 2, size)
        below = mx.diagonal(cut[..., 1, :, :, 0, :], axis1=-4, axis2=-2)  # [..., s, s, pieces]
        found.append(mx.moveaxis(below, -1, -3))
        size *= 2
    return found


def assembled(diagonal: mx.array, squares: list[mx.array]) -> mx.array:
    """The lower triangular matrix [..., C, C] of a diagonal [..., C] and its squares."""
    whole = diagonal[..., None, None]
    for below in squares:
        whole = _grown(whole[..., 0::2, :, :], below, whole[..., 1::2, :, :])
    return whole.squeeze(-3)


def inverse(squares: list[mx.array], like: mx.array) -> mx.array:
    """The inverse [..., C, C] of the unit lower triangular matrix with these squares.

    Forward substitution by blocks, from single elements up; `like` [..., C] is any array of the
    right shape and type. Powers of the matrix, which grow as binomials do, are never formed.
    """
    whole = mx.ones_like(like)[..., None, None]
    for below in squares:
        first, second = whole[..., 0::2, :, :], whole[..., 1::2, :, :]
        whole = _grown(first, -(second @ below @ first), second)
    return whole.squeeze(-3)
