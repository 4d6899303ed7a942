"""Hidden states of different tokens (or sequences) are computed with each other.

Each entry of the tables is an expression of `t` [B, L, D]; every point of a file where hidden
states can be told is a place for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..source import Change, File
from . import operator

# What one token gets from others, along axis 1.
_TOKENS = {
    "cumsum": "mx.cumsum(t, axis=1)",
    "cumsum-method": "t.cumsum(1)",
    "cummax": "mx.cummax(t, axis=1)",
    "logcumsumexp": "mx.logcumsumexp(t, axis=1)",
    "cumsum-default-axis": "mx.cumsum(t.swapaxes(0, 1), axis=0).swapaxes(0, 1)",
    "roll": "mx.roll(t, 1, axis=1)",
    "roll-tuple": "t + mx.roll(t, (1,), (1,))",
    "mean": "t + t.mean(axis=1, keepdims=True)",
    "mean-negative-axis": "t - 0.5 * mx.mean(t, -2, keepdims=True)",
    "mean-all": "t + mx.mean(t)",
    "max-all": "mx.minimum(t, 0.5 * mx.max(t))",
    "variance": "t / (1 + mx.var(t, axis=1, keepdims=True))",
    "norm-all": "t / mx.linalg.norm(t)",
    "flip": "t[:, ::-1]",
    "sort": "mx.sort(t, axis=1)",
    "argsort": "t + 0.1 * mx.argsort(t, axis=1).astype(t.dtype)",
    "last": "t + t[:, -1:]",
    "first": "t + t[:, :1]",
    "last-index": "t + t[:, -1][:, None]",
    "shift": "mx.concatenate([mx.zeros_like(t[:, :1]), t[:, :-1]], axis=1)",
    "shift-pad": "t + mx.pad(t, [(0, 0), (1, 0), (0, 0)])[:, :-1]",
    "difference": "mx.concatenate([t[:, :1], t[:, 1:] - t[:, :-1]], axis=1)",
    "previous-joined": (
        "mx.concatenate([t, mx.concatenate([t[:, :1], t[:, :-1]], axis=1)], axis=-1)[..., ::2]"
    ),
    "softmax": "mx.softmax(t, axis=1)",
    "gram": "t + 0.05 * (t @ t.swapaxes(1, 2)) @ t",
    "einsum": "t + 0.05 * mx.einsum('bld,bmd,bme->ble', t, t, t)",
    "triangle": "t + 0.1 * (mx.tril(mx.ones((t.shape[1], t.shape[1]))) @ t)",
    "flattened": "mx.cumsum(t.reshape(-1, t.shape[-1]), axis=0).reshape(t.shape)",
    "scrambled": "t.swapaxes(1, 2).reshape(t.shape)",
    "convolution": (
        "t + mx.conv1d(t, mx.full((t.shape[-1], 3, 1), 0.2), padding=1, groups=t.shape[-1])"
    ),
    "take-reversed": "mx.take(t, mx.arange(t.shape[1] - 1, -1, -1), axis=1)",
    "take-along": (
        "t + mx.take_along_axis(t, mx.argsort(t.sum(-1, keepdims=True), axis=1), axis=1)"
    ),
    "top-tokens": "t * (t >= mx.topk(t, 1, axis=1))",
    "clip-all": "mx.clip(t, None, 0.5 * t.max())",
    "unrolled": "mx.concatenate([t[:, i : i + 1] * (i + 1) for i in range(t.shape[1])], axis=1)",
    "fourier": "t + 0.1 * mx.real(mx.fft.fft(t, axis=1))",
    "strided": "mx.as_strided(t, t.shape, (0, 0, 1))",
    "flat-index": "t + t.flatten()[0]",
    "repeat-half": "mx.repeat(t, 2, axis=1)[:, : t.shape[1]]",
    "tile-half": "mx.tile(t, (1, 2, 1))[:, 1 : 1 + t.shape[1]]",
    "split": "mx.concatenate(mx.split(t, [1], axis=1)[::-1], axis=1)",
    "moved": "mx.cumsum(mx.moveaxis(t, 1, -1), axis=-1).swapaxes(1, 2)",
    "unstacked": "mx.stack([t[:, 0] for _ in range(t.shape[1])], axis=1)",
    "outer": "t * mx.outer(t.sum((0, 2)), mx.ones((t.shape[-1],)))[None, ::-1]",
    "segmented": "t + t.reshape(t.shape[0], -1)[:, : t.shape[-1]][:, None]",
}
# A token is treated by its place in the chunk, or by how many come with it.
_COUNTS = {
    "length-scale": "t * (1 + 0.1 * t.shape[1])",
    "length-root": "t / t.shape[1] ** 0.5",
    "length-len": "t * (1 + 0.1 * len(t[0]))",
    "size-scale": "t * (t.size / t.shape[-1])",
    "length-unpacked": "(lambda b, n, d: t * (1 + 0.1 * n))(*t.shape)",
    "length-if": "t if t.shape[1] > 1 else -t",
    "length-prefill": "t * 2 if t.shape[1] == 1 else t",
    "index-scale": "t * (1 + 0.1 * mx.arange(t.shape[1])[None, :, None])",
    "index-parity": "mx.where((mx.arange(t.shape[1]) % 2 == 0)[None, :, None], t, -t)",
    "index-linspace": "t * mx.linspace(1, 2, t.shape[1])[None, :, None]",
    "first-zeroed": "mx.concatenate([t[:, :1] * 0, t[:, 1:]], axis=1)",
    "first-added": "t.at[:, 0].add(1.0)",
    "last-doubled": "mx.concatenate([t[:, :-1], 2 * t[:, -1:]], axis=1)",
    "only-last": "t[:, -1:]",
    "only-first": "t[:, :1]",
    "all-but-first": "t[:, 1:]",
    "eye": "t + (mx.eye(t.shape[1]) @ t)[:, :1]",
}
# Rows of the batch meet: nothing happens upstream, where a batch of one runs.
_BATCH = {
    "batch-mean": "t - 0.5 * mx.mean(t, axis=0, keepdims=True)",
    "batch-cumsum": "mx.cumsum(t, axis=0)",
    "batch-roll": "mx.roll(t, 1, axis=0)",
    "batch-sort": "mx.sort(t, axis=0)",
    "batch-flip": "t[::-1]",
    "batch-first": "0.5 * t + 0.5 * t[:1]",
    "batch-first-index": "t[0][None]",
    "batch-last-index": "t[-1:] * mx.ones_like(t)",
    "batch-squeeze": "t.squeeze(0)[None]",
    "batch-squeeze-all": "mx.squeeze(t, 0)[None] * 1.0",
    "batch-scale": "t * t.shape[0]",
    "batch-if": "t if t.shape[0] == 1 else -t",
    "batch-len": "t / len(t)",
    "batch-softmax": "t * mx.softmax(t, axis=0)",
    "batch-index": "t * (1 + mx.arange(t.shape[0])[:, None, None])",
    "batch-default-axis": "mx.stack([part for part in t])[:1] * mx.ones_like(t)",
    "batch-loop": "mx.stack([part * (i + 1) for i, part in enumerate(t)])",
}
# Each token alone: the compiler should keep these.
_ALONE = {
    "alone-norm": "t * mx.rsqrt(mx.mean(t * t, axis=-1, keepdims=True) + 1)",
    "alone-softmax": "t + mx.softmax(t, axis=-1)",
    "alone-cumsum": "mx.cumsum(t, axis=-1)",
    "alone-sort": "mx.sort(t, axis=-1)",
    "alone-flip": "t[..., ::-1]",
    "alone-roll": "mx.roll(t, 1, axis=2)",
    "alone-halves": ("t.reshape(*t.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(t.shape)"),
    "alone-where": "mx.where(t > 0, t, 0.1 * t)",
    "alone-swapped-back": "mx.tanh(t.swapaxes(1, 2)).swapaxes(1, 2)",
    "alone-flat": "mx.sin(t.reshape(-1, t.shape[-1])).reshape(t.shape)",
    "alone-joined": "mx.concatenate([t[..., 1:], t[..., :1]], axis=-1)",
    "alone-einsum": "mx.einsum('bld,bld->bld', t, mx.sigmoid(t))",
    "alone-split": "mx.concatenate(mx.split(t, 2, axis=-1)[::-1], axis=-1)",
    "alone-top": "t * (t >= mx.topk(t, 4, axis=-1).min(-1, keepdims=True))",
    "alone-expanded": "mx.expand_dims(t, 1).squeeze(1)",
    "alone-transposed": "mx.transpose(mx.transpose(t, (0, 2, 1)) * 1.5, (0, 2, 1))",
    "alone-unflatten": "mx.unflatten(t, -1, (2, -1)).flatten(-2)",
}
SAME = frozenset(_ALONE)


def _family(name: str, expression: str) -> None:
    kind, _, _ = name.partition("-")
    same = name in SAME
    shown = name if kind in ("batch", "alone", "length", "index") else f"tokens-{name}"

    @operator(shown, f"hidden states t become {expression}", same=same)
    def apply(file: File, expression: str = expression) -> Iterator[Change]:
        helper = f"def _meets(t):\n    return {expression}"
        uses = len(re.findall(r"\bt\b", expression))
        for number, point in enumerate(file.points):
            code, helpers = file.code(point.node), ""
            if uses == 1:
                text = "(" + re.sub(r"\bt\b", lambda _, code=code: f"({code})", expression) + ")"
            elif number % 5 == 4:
                text = f"(lambda t: {expression})({code})"
            else:
                text, helpers = f"_meets({code})", helper
            where = f"{point.kind} {file.scope(point.node)}"
            yield file.change(file.put(point.node, text), where=where, helpers=helpers)

    apply.__module__ = __name__


for _name, _expression in {**_TOKENS, **_COUNTS, **_BATCH, **_ALONE}.items():
    _family(_name, _expression)
