"""Recurrences that a rewritten model file calls in place of mlx_lm's, with the same arguments."""

from __future__ import annotations

import mlx.core as mx
from mlxrewrite.kernels import delta, linear

__all__ = ["delta_rule", "state_space_dual"]


def delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, mx.array]:
    """`mlx_lm.models.gated_delta.gated_delta_update`, without padding: chunks, or one token.

    q, k [N, L, Hk, Dk]; v [N, L, Hv, Dv]; a [N, L, Hv] or, with a decay for each channel,
    [N, L, Hv, Dk]; b [N, L, Hv]; state [N, Hv, Dv, Dk] float32.
    """
    _no_padding(mask)
    log_decay, beta = delta.delta_gates(
        a, b, A_log, dt_bias, lower_bound=lower_bound, allow_neg_eigval=allow_neg_eigval
    )
    return delta.delta_rule(q, k, v, log_decay, beta, state, kernels=use_kernel)


def state_space_dual(
    hidden_states: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    time_step_limit: tuple[float, float] = (0.001, 100.0),
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """`mlx_lm.models.ssm.ssm_update`, without padding: chunks, or one token.

    hidden_states [N, L, H, P]; B, C [N, L, G, S]; dt [N, L, H]; state [N, H, P, S] float32.
    """
    _no_padding(mask)
    _no_padding(lengths)
    return linear.state_space_dual(hidden_states, A_log, B, C, D, dt, dt_bias, state,
                                   time_step_limit)  # fmt: skip


def _no_padding(mask: mx.array | None) -> None:
    if mask is not None:
        raise TypeError(
            "a recurrence of a rewritten model was given padding: a ragged batch has none"
        )
