"""Recurrences that stand for a file's own function: its arguments, and the comparison with it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import rwkv7
from mlx_lm.models.bailing_hybrid import recurrent_gla
from mlxrewrite.runtime.errors import RuntimeRefusal
from mlxrewrite.runtime.recurrences import lightning_scan, low_rank_scan

ROLES = ("q", "k", "v", "g", "scale", "h")


def rows(length: int) -> dict:
    mx.random.seed(1)
    q, k, v = (mx.random.normal((2, 3, length, 32)) for _ in range(3))
    return {"q": q, "k": k, "v": v, "g": -mx.random.uniform(0.01, 0.6, (3,)), "scale": 0.2}


@pytest.mark.parametrize("length", [1, 5, 200])
def test_chunks_of_a_file_give_way_to_ours(length):
    given = rows(length)
    ours = lightning_scan(*ROLES, compared=True)(recurrent_gla)
    state = mx.random.normal((2, 3, 32, 32))
    for h in (None, state):
        y, last = ours(**given, h=h, mask=None)
        want, after = recurrent_gla(**given, h=h)
        assert mx.allclose(y, want, rtol=1e-4, atol=1e-4)
        assert mx.allclose(last, after, rtol=1e-4, atol=1e-4)


def late(q, k, v, g, *, scale, h=None):
    """Right for one chunk; the second begins one decay too early."""
    y, h = recurrent_gla(q[:, :, :128], k[:, :, :128], v[:, :, :128], g, scale=scale, h=h)
    if q.shape[2] <= 128:
        return y, h
    h = h * mx.exp(g)[:, None, None]
    rest, h = recurrent_gla(q[:, :, 128:], k[:, :, 128:], v[:, :, 128:], g, scale=scale, h=h)
    return mx.concatenate([y, rest], axis=2), h


def stateless(q, k, v, g, *, scale, h=None):
    return recurrent_gla(q, k, v, g, scale=scale)


@pytest.mark.parametrize("wrong", [late, stateless])
def test_another_function_is_refused(wrong):
    with pytest.raises(RuntimeRefusal, match="not what it was taken for"):
        lightning_scan(*ROLES, compared=True)(wrong)(**rows(1))


def test_a_function_is_compared_once_for_each_of_its_options():
    calls = []

    def counted(q, k, v, g, scale, h=None, mask=None, chunk=128):
        calls.append(chunk)
        return recurrent_gla(q, k, v, g, scale=scale, h=h, mask=mask, chunk=chunk)

    ours = lightning_scan(*ROLES, compared=True)(counted)
    ours(**rows(3))
    first = len(calls)
    ours(**rows(9))
    assert first > 0 and len(calls) == first
    ours(**rows(9), chunk=16)
    assert set(calls) == {128, 16} and len(calls) == 2 * first


def test_padding_is_refused():
    ours = lightning_scan(*ROLES, compared=True)(recurrent_gla)
    with pytest.raises(TypeError, match="`mask`, a array"):
        ours(**rows(3), mask=mx.ones((2, 3), mx.bool_))


@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("begun", [False, True])
def test_rwkv_s_own_method(length, begun):
    args = rwkv7.ModelArgs("rwkv7", 16, 64, 64, 1e-5, 32, 1, 8, 8, 8, 8)
    mixer = rwkv7.Rwkv7TimeMixing(args, 0)
    mx.random.seed(3)
    r, w, k, v, a, b = (mx.random.normal((2, length, 2, 32)) / 6 for _ in range(6))
    state = mx.random.normal((2, 2, 32, 32)) if begun else None
    call = low_rank_scan("r", "w", "k", "v", "a", "b", "state")(rwkv7.Rwkv7TimeMixing._wkv7)
    for got, want in zip(
        call(mixer, r, mx.sigmoid(w), k, v, a, b, state=state),
        mixer._wkv7(r, mx.sigmoid(w), k, v, a, b, state),
        strict=True,
    ):
        assert got.shape == want.shape
        assert np.abs(np.array(got) - np.array(want)).max() < 1e-5


def test_rows_of_another_rank_are_refused():
    call = low_rank_scan("r", "w", "k", "v", "a", "b", "h")(lambda r, w, k, v, a, b, h: None)
    x = mx.zeros((2, 3, 32))
    with pytest.raises(TypeError, match="heads, width"):
        call(x, x, x, x, x, x, None)
