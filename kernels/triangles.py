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


def decayed_squares(rows: mx.array, keys: mx.array, decay: mx.array) -> list[mx.array]:
    """`sum_d rows[i, d] keys[j, d] exp(decay[i, d] - decay[j, d])` where i is behind j.

    rows, keys [..., C, D]; decay [..., C, D], sums of logarithms, never rising along C, a power of
    two. Returns the squares [..., C / (2 s), s, s] below the diagonal for s = 1, 2, 4, ..., C / 2.
    """
    found, size = [], 1
    while size < rows.shape[-2]:
        _, late = _halves(rows, size)
        early, _ = _halves(keys, size)
        before, after = _halves(decay, size)
        middle = before[..., -1:, :]
        late = late * mx.exp(after - middle)
        early = early * mx.exp(middle - before)
        found.append(late @ early.swapaxes(-1, -2))
        size *= 2
    return found


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
