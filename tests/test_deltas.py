"""Copies of the gated delta rule, recognised by what they compute."""

from __future__ import annotations

import pytest
from compiling import module
from mlxrewrite.deltas import is_delta_rule
from mlxrewrite.program import Program

COPY = """
import mlx.core as mx
import mlx.nn as nn


def rates(A, x, bias):
    return mx.exp(-mx.exp(A.astype(mx.float32)) * nn.softplus(x + bias))


def step(q, k, v, g, beta, held, seen=None):
    before = held
    held = held * g[..., None, None]
    told = (held * k[..., None, :]).sum(axis=-1)
    change = (v - told) * beta[..., None]
    held = held + k[..., None, :] * change[..., None]
    y = (held * q[..., None, :]).sum(axis=-1)
    if seen is not None:
        held = mx.where(seen, held, before)
    return y.astype(q.dtype), held


def scan(q, k, v, g, beta, held, seen):
    if (times := v.shape[-2] // k.shape[-2]) > 1:
        q = mx.repeat(q, times, -2)
        k = mx.repeat(k, times, -2)
    found = []
    for t in range(q.shape[1]):
        y, held = step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], held)
        found.append(y)
    return mx.stack(found, axis=1), held


def rule(q, k, v, a, b, A, bias, held=None, seen=None, fast=True):
    return scan(q, k, v, rates(A, a, bias), mx.sigmoid(b), held, seen)
"""


def judged(text):
    found = module(text)
    program = Program({found.source.module: found})
    return is_delta_rule(program, found.functions["rule"])


def test_a_copy_is_recognised():
    assert judged(COPY)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("nn.softplus(x + bias)", "nn.relu(x + bias)"),
        ("-mx.exp(A", "mx.exp(A"),
        ("rates(A, a, bias)", "rates(bias, a, A)"),
        ("mx.sigmoid(b)", "mx.sigmoid(a)"),
        ("(v - told)", "(v + told)"),
        ("beta[..., None]", "beta[..., None, None]"),
        ("held + k[..., None, :] * change", "held - k[..., None, :] * change"),
        ("(held * q[..., None, :])", "(before * q[..., None, :])"),
        ("(held * k[..., None, :]).sum(axis=-1)", "(before * k[..., None, :]).sum(axis=-1)"),
        ("k[..., None, :] * change", "q[..., None, :] * change"),
        ("step(q[:, t], k[:, t]", "step(k[:, t], q[:, t]"),
        ("sum(axis=-1)", "sum(axis=-2)"),
    ],
)
def test_something_else_is_not(old, new):
    assert old in COPY
    assert not judged(COPY.replace(old, new))
