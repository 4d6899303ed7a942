"""Which mixers run on rows: those that mix the tokens of a sequence in ops and nowhere else.

Edits of the short convolution, where `x` is [sequences, length, features]. What they do of one
sequence is its own business; on rows every token would have to do it alone.
"""

from __future__ import annotations

import pytest
from compiling import judge
from mlxrewrite.ir import Match
from test_batchwise import MORE_ATTACKS, TEXT, edited

JOINED = "        padded = mx.concatenate([state, inner], axis=1)\n"
KEPT = "cache[0] = padded[:, -keep:]\n"
CONVOLVED = "self.conv(padded)"

ACROSS = r"""
x = mx.cumsum(x, axis=1)
x = mx.cumsum(x, axis=-2)
x = x - x.mean(axis=1, keepdims=True)
x = x - x.mean(axis=(1, 2), keepdims=True)
x = x[:, ::-1]
x = x[:, -1:] + x
x = x[:, 0][:, None] + x
x = mx.concatenate([x[:, :1], x[:, :-1]], axis=1)
x = mx.concatenate([mx.zeros((x.shape[0], 1, x.shape[2])), x], axis=1)[:, :-1]
x = mx.roll(x, 1, axis=1)
x = mx.sort(x, axis=1)
x = mx.softmax(x, axis=1)
x = x * x.shape[1]
x = x / x.size
x = x if x.shape[1] == 1 else 2 * x
x = x if x.shape[1] > 4 else 2 * x
x = x + mx.arange(x.shape[1])[None, :, None]
for t in range(x.shape[1]):\n    x = x + x[:, t : t + 1]
for _ in range(x.shape[1]):\n    x = 2 * x
q = x[:, None]\nx = mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0)[:, 0]
x = mx.einsum('bld,bmd->blm', x, x) @ x
x = mx.fast.rope(x[:, None], 4, traditional=False, base=1e4, scale=1.0, offset=0)[:, 0]
x = x.reshape(x.shape[0], -1)[:, None]
x = x.swapaxes(1, 2).reshape(x.shape)
x = mx.fast.rms_norm(x.swapaxes(1, 2), None, 1e-5).swapaxes(1, 2)
x = x + self.conv(mx.pad(x, [(0, 0), (self.kernel_size - 1, 0), (0, 0)]))
x = x if cache[0] is None else x + cache[0].sum()
x = x if cache[0] is None else x + cache[0][:, -1:]
x = x if cache[1] is None else x + cache[1]
cache[1] = x[:, -1:]
cache[1] = cache[0]
cache[1] = mx.zeros((x.shape[0], 1))
x = x + mx.zeros_like(cache[0])
x = x + cache.offset
x = x + (0 if cache is None else len(cache.cache))
past, _ = cache\nx = x if past is None else x + past.mean()
""".strip().split("\n")

ALONE = r"""
pass
x = 2 * x
x = mx.softmax(x, axis=-1)
x = x - x.mean(axis=-1, keepdims=True)
x = x if mask is None else mx.where(mask[..., None], x, 0)
B, L, D = x.shape\nx = x.reshape(B, L, 4, -1).swapaxes(2, 3).reshape(B, L, D)
x = x.reshape(-1, x.shape[-1]).reshape(x.shape)
x = x.transpose(0, 2, 1).transpose(0, 2, 1)
x = x * self.in_proj.weight[0, 0]
p = mx.split(x, 2, axis=-1)\nx = mx.concatenate([p[1], p[0]], axis=-1)
x = x if cache is None or cache.lengths is None else mx.cumsum(x, axis=1)
""".strip().split("\n")


def route(text: str) -> str | None:
    """How the short convolution runs: the name of its decorator."""
    found = judge(text, "ShortConv")
    if not isinstance(found, Match):
        return None
    names = {site.rule for site in found.sites} & {"on_rows", "per_length", "per_sequence"}
    return names.pop() if len(names) == 1 else None


def changed(old: str, new: str) -> str:
    assert TEXT.count(old) == 1
    return TEXT.replace(old, new)


@pytest.mark.parametrize("body", ALONE)
def test_what_a_token_does_alone_runs_on_rows(body):
    assert route(edited(body.replace("\\n", "\n"))) == "on_rows"


@pytest.mark.parametrize("body", ACROSS)
def test_what_tokens_do_together_runs_once_per_length(body):
    assert route(edited(body.replace("\\n", "\n"))) in ("per_length", "per_sequence")


@pytest.mark.parametrize("body", MORE_ATTACKS)
def test_what_may_join_sequences_is_not_on_rows(body):
    assert route(edited(body.replace("\\n", "\n"))) in ("per_sequence", None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # Something else is kept than the end of what was joined.
        (KEPT, "cache[0] = padded[:, -keep - 1 :]\n"),
        (KEPT, "cache[1] = padded[:, -keep:]\n"),
        (KEPT, "cache[L % 2] = padded[:, -keep:]\n"),
        (KEPT, "cache[0] = padded[:, :keep]\n"),
        (KEPT, "cache[0] = padded[:, -keep:-1]\n"),
        (KEPT, "cache[0] = padded[:, -keep:, :4]\n"),
        (KEPT, "cache[0] = padded[:, -keep::-1]\n"),
        (KEPT, "cache[0] = 2 * padded[:, -keep:]\n"),
        (KEPT, "cache[0] = inner[:, -keep:]\n"),
        (KEPT, "cache[0] = padded[:, -keep:] if L > 4 else padded[:, -keep:]\n"),
        # The state is joined with other rows, or in another order.
        (JOINED, JOINED.replace("state, inner", "inner, state")),
        (JOINED, JOINED.replace("axis=1", "axis=-1")),
        (JOINED, JOINED.replace("state, inner", "2 * state, inner")),
        (JOINED, JOINED.replace("state, inner", "state, inner[:, ::-1]")),
        (JOINED, JOINED.replace("state, inner", "state, mx.cumsum(inner, axis=1)")),
        # What was joined is used otherwise.
        (CONVOLVED, "self.conv(padded) + padded[:, keep:].sum(axis=1, keepdims=True)"),
        (CONVOLVED, "self.conv(2 * padded[:, 1:])"),
        (CONVOLVED, "self.conv(padded)[:, ::-1]"),
        (CONVOLVED, "self.conv(padded).cumsum(axis=1)"),
    ],
)
def test_another_convolution_runs_once_per_length(old, new):
    assert route(changed(old, new)) in ("per_length", "per_sequence")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (KEPT, "cache[0] = padded[:, -(self.kernel_size - 1) :]\n"),
        (KEPT, "cache[0] = mx.contiguous(padded[:, -keep:, :])\n"),
        (KEPT, "tail = padded[:, -keep:]\n                cache[0] = tail\n"),
        (JOINED, JOINED.replace("[state, inner]", "(state, inner)")),
        (CONVOLVED, "self.out_proj(self.conv(padded))"),
    ],
)
def test_the_same_in_other_words_runs_on_rows(old, new):
    assert route(changed(old, new)) == "on_rows"
