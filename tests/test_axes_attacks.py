# ruff: noqa: E501 - one attack a line
"""Hostile edits of a plain decoder: each is named where it stands, or harmless by the numbers.

`HERE` marks the line a refusal must point to. The edits go into a block, between attention and the
feed-forward part, where `x` is [batch, length, features].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from compiling import EXAMPLES, compile_text, said_of

BASE = (EXAMPLES / "gqa.py").read_text()
CONFIG = EXAMPLES / "gqa.json"
ANCHOR = "        x = x + self.self_attn(self.input_layernorm(x), mask, cache)\n"
HEAD = "class MLP(nn.Module):"


@dataclass(frozen=True)
class Attack:
    name: str
    body: str
    slugs: str = "row-mixing"
    helpers: str = ""
    route: str = "model"
    where: str = "block"  # or "model": before the head; "attention": before queries are made


ATTACKS = [
    Attack("cumsum", "x = x + 0.1 * mx.cumsum(x, axis=1)  # HERE"),
    Attack("roll", "x = x + mx.roll(x, 1, axis=1)  # HERE"),
    Attack("roll all", "x = x + mx.roll(x, 1)  # HERE"),
    Attack("mean", "x = x - x.mean(axis=1, keepdims=True)  # HERE"),
    Attack("mean of all", "x = x / mx.mean(x)  # HERE"),
    Attack("last token", "x = x + x[:, -1:]  # HERE", "position-special"),
    Attack("last token, no axis", "x = x + x[:, -1][:, None]  # HERE", "position-special"),
    Attack("first token by name", "i = 0\nx = x + x[:, i : i + 1]  # HERE", "position-special"),
    Attack("softmax of batch", "x = x * mx.softmax(x, axis=0)  # HERE"),
    Attack("softmax of tokens", "x = x * mx.softmax(x, axis=-2)  # HERE"),
    Attack("softmax of everything", "x = x * mx.softmax(x)  # HERE"),
    Attack("batch norm", "x = (x - mx.mean(x, axis=0)) * mx.rsqrt(mx.var(x, axis=0) + 1)  # HERE"),
    Attack("batch norm layer", "x = self.bn(x)  # HERE", where="bn"),
    Attack("sorted rows", "x = mx.sort(x, axis=0)  # HERE"),
    Attack("order of rows kept", "o = mx.argsort(x[..., 0].flatten())\nx = x.flatten(0, 1)[o].reshape(x.shape)  # HERE"),
    Attack("flattened sum", "x = x + x.reshape(-1).sum()  # HERE"),
    Attack("rows in pairs", "B, L, D = x.shape\nx = mx.cumsum(x.reshape(-1, 2 * D), axis=-1).reshape(B, L, D)  # HERE"),
    Attack("gram", "x = x @ (x.swapaxes(1, 2) @ x)  # HERE"),
    Attack("gram of the batch", "y = x.flatten(0, 1)\nx = x @ (y.T @ y)  # HERE"),
    Attack("pairs", "d = x[:, :, None] - x[:, None]  # HERE\nx = x + d.sum(axis=2)"),
    Attack("all pairs of rows", "x = x + mx.max(x[:, None] * x[None], axis=1)  # HERE"),
    Attack("tables of other ranks", 'i = (x[..., 0] > 0).astype(mx.int32)\ny = TABLES[0][i] + TABLES[1][i]  # HERE\nx = x + y.mean(axis=2)', helpers='TABLES = [mx.zeros(s) for s in read_shapes()]\n'),
    Attack("a table that may have more axes", 'i = (x[..., 0] > 0).astype(mx.int32)\nx = (x[:, :, None] + TABLE[i]).mean(axis=2)  # HERE', helpers='TABLE = mx.zeros(read_shape())\n'),
    Attack("einsum", "x = mx.einsum('bld,bmd->bmd', x, x)  # HERE"),
    Attack("length in the sum", "x = x / x.shape[1]  # HERE", "token-count"),
    Attack("rows in the sum", "x = x * len(x)  # HERE", "token-count"),
    Attack("size in the sum", "x = x + 1.0 / x.size  # HERE", "token-count"),
    Attack("length in a branch", "if x.shape[1] > 1:  # HERE\n    x = 2 * x", "length-dependent"),
    Attack("length in a choice", "x = x * (2 if x.shape[1] == 1 else 1)  # HERE", "length-dependent"),
    Attack("rows in a branch", "if x.shape[0] > 3:  # HERE\n    x = 2 * x", "token-count"),
    Attack("size in a branch", "if x.size >= 4096:  # HERE\n    x = 2 * x", "token-count"),
    Attack("rows in a loop", "for _ in range(x.shape[0]):  # HERE\n    x = 0.9 * x", "token-count"),
    Attack("compiled helper", "x = stir(x)", helpers="@mx.compile\ndef stir(t):\n    return t + mx.cumsum(t, axis=1)  # HERE\n"),
    Attack("nested function", "def stir(t):\n    return t + t.max(axis=1, keepdims=True)  # HERE\n\nx = stir(x)"),
    Attack("lambda", "x = (lambda t: t - mx.min(t, axis=1, keepdims=True))(x)  # HERE"),
    Attack("partial", "from functools import partial\nx = x + partial(mx.cumsum, axis=1)(x)  # HERE"),
    Attack("aliased function", "f = mx.cumsum\nx = x + f(x, axis=-2)  # HERE"),
    Attack("axis in a variable", "a = -2\nx = x + mx.cumprod(x, axis=a)  # HERE"),
    Attack("state", "self.h = x  # HERE", "state-on-self", route="refused"),
    Attack("counter", "self.n = getattr(self, 'n', 0) + 1  # HERE\nx = x * self.n", "state-on-self", route="refused"),
    Attack("list on the model", "self.seen.append(x)  # HERE", "state-on-self", route="refused", where="seen"),
    Attack("global list", "SEEN.append(x)  # HERE", "state-on-self", helpers="SEEN = []\n", route="refused"),
    Attack("global name", "global LAST\nLAST = x  # HERE", "state-on-self", helpers="LAST = None\n", route="refused"),
    Attack("default argument", "x = keep(x)", "state-on-self", helpers="def keep(t, seen=[]):\n    seen.append(t)  # HERE\n    return t + seen[0].mean()\n", route="refused"),
    Attack("argmax over tokens", "x = x + mx.argmax(x, axis=1, keepdims=True)  # HERE"),
    Attack("flipped sequence", "x = x + x[:, ::-1]  # HERE", "position-special"),
    Attack("flipped batch", "x = x + x[::-1]  # HERE", "position-special"),
    Attack("padded", "x = mx.pad(x, [(0, 0), (1, 0), (0, 0)])[:, : x.shape[1]]  # HERE", "length-dependent"),
    Attack("arange", "x = x + mx.arange(x.shape[1])[None, :, None]  # HERE", "length-dependent position-special row-mixing"),
    Attack("arange of rows", "x = x + mx.arange(x.shape[0])[:, None, None]  # HERE", "length-dependent"),
    Attack("steps with another axis", "x = x + mx.expand_dims(mx.arange(x.shape[1]), (0, 2))  # HERE", "position-special"),
    Attack("offset in another shape", "x = x + 0.01 * cache.offset.reshape(-1, 1, 1)  # HERE", "position-special"),
    Attack("offset with another axis", "x = x + 0.01 * mx.expand_dims(cache.offset, (1, 2))  # HERE", "position-special"),
    Attack("no mask for one token", "x = x * (2 if mask is None else 1)  # HERE", "token-branch"),
    Attack("a word as mask", "x = x * (2 if isinstance(mask, str) else 1)  # HERE", "token-branch"),
    Attack("text of positions", "x = x * len(f'{cache.offset}')  # HERE", "token-branch"),
    Attack("masked by length", "keep = mx.arange(x.shape[1]) > 2  # HERE\nx = mx.where(keep[None, :, None], x, 0)", "position-special length-dependent"),
    Attack("convolution", "x = x + mx.conv1d(x, mx.ones((x.shape[2], 3, 1)), padding=1, groups=x.shape[2])  # HERE"),
    Attack("python values", "x = x * float(x.sum() > 0)  # HERE"),
    Attack("branch on values", "if mx.any(x > 100):  # HERE\n    x = 2 * x"),
    Attack("branch on one value", "if x[0, 0, 0] > 0:  # HERE\n    x = 2 * x", "position-special"),
    Attack("row picked by index", "x = x + mx.take(x, mx.array([0]), axis=0)  # HERE"),
    Attack("tokens as indices", "i = mx.argmax(x, axis=-1)\nx = x + x.flatten(0, 1)[i]  # HERE"),
    Attack("chunk start as data", "x = x + cache.offset  # HERE", "position-special"),
    Attack("positions changed in place", "p = cache.offset\np += 1  # HERE", "position-special"),
    Attack("weight written", "w = self.mlp.up_proj.weight\nw[0] = 0  # HERE", "state-on-self", route="refused"),
    Attack("weight changed", "self.mlp.up_proj.weight *= 0.5  # HERE", "state-on-self", route="refused"),
    Attack("first call marked", "if not hasattr(self, 'seen'):\n    self.seen = True  # HERE\n    x = 2 * x", "state-on-self", route="refused"),
    Attack("first call told apart", "late = hasattr(self, 'seen')\nself.seen = True  # HERE\nx = x * (2 if late else 1)", "state-on-self", route="refused"),
    Attack("weights kept, and the call marked", "if getattr(self, 'w', None) is None:\n    self.w = self.mlp.up_proj.weight + 1  # HERE\n    x = 2 * x", "state-on-self", route="refused"),
    Attack("kept in two places", "if hasattr(self, 'w'):\n    self.w = 2.0\nif not hasattr(self, 'w'):\n    self.w = 1.0  # HERE\nx = x * self.w", "state-on-self", route="refused"),
    Attack("taken away", "if hasattr(self, 'mlp'):\n    del self.mlp  # HERE", "state-on-self", route="refused"),
    Attack("a dictionary of attributes", "self.__dict__['seen'] = 1  # HERE", "state-on-self", route="refused"),
    Attack("another mode", "self.mlp.train()  # HERE", "state-on-self", route="refused"),
    Attack("random", "x = x + mx.random.normal(x.shape)  # HERE", "unknown-operation"),
    Attack("unknown operation", "x = mx.linalg.inv(x)  # HERE", "unknown-operation"),
    Attack("custom kernel", "x = kernel(inputs=[x], output_shapes=[x.shape], output_dtypes=[x.dtype], grid=(1, 1, 1), threadgroup=(1, 1, 1))[0]  # HERE", "unknown-operation", helpers="kernel = mx.fast.metal_kernel(name='k', input_names=['x'], output_names=['y'], source='')\n"),
    Attack("tiled rows", "x = mx.tile(x, (2, 1, 1))[: x.shape[0]]  # HERE"),
    Attack("rows joined", "x = mx.concatenate([x[:1], x[:-1]], axis=0)  # HERE", "position-special"),
    Attack("previous token", "x = x + mx.concatenate([x[:, :1], x[:, :-1]], axis=1)  # HERE", "position-special"),
    Attack("transposed away", "y = x.transpose(1, 0, 2)\nx = x + mx.cumsum(y, axis=0).transpose(1, 0, 2)  # HERE"),
    Attack("attention without a cache", "q = x[:, None]\nx = x + mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0)[:, 0]  # HERE", "row-mixing uncached-attention"),
    Attack("last token of the model", "h = h[:, -1:] + h  # HERE", "position-special", where="model"),
    Attack("count of unique tokens", "h = h * (inputs == inputs[0, 0]).sum()  # HERE", "position-special row-mixing", where="model"),
    Attack("first token through at", "x = x.at[:, 0].add(1)  # HERE", "position-special"),
    Attack("first token written", "x[:, 0] = 0  # HERE", "position-special"),
    Attack("experts by count", "big = x.size > 4096  # HERE\nw = self.mlp.up_proj if big else self.mlp.gate_proj\nx = x + self.mlp.down_proj(w(x))", "token-count"),
    Attack("real part", "x = x + x.real[:, -1:]  # HERE", "unknown-operation"),
    Attack("numbers counted", "ids = x[..., 0].reshape(-1).tolist()\nx = x * (2 if ids.count(0.0) > 1 else 1)  # HERE"),
    Attack("numbers as a test", "ids = x[..., 0].reshape(-1).tolist()\nx = x * (2 if ids else 1)  # HERE"),
    Attack("numbers searched", "ids = x[..., 0].reshape(-1).tolist()\nx = x * (2 if 0.0 in ids else 1)  # HERE"),
    Attack("first of numbers", "ids = x[..., 0].reshape(-1).tolist()\nx = x * ids[0]  # HERE"),
    Attack("how many numbers", "ids = x[..., 0].reshape(-1).tolist()\nx = x * len(ids)  # HERE", "token-count"),
    Attack("how many parts", "outs = []\nfor t in zip(x.flatten(0, 1)):\n    outs.append(t[0])\nx = x / len(outs)  # HERE", "token-count row-mixing unknown-operation"),
    Attack("table by length", "x = x * {True: 1, False: 2}[x.shape[1] == 1]  # HERE"),
    Attack("table asked by length", "x = x * {1: 2}.get(x.shape[1], 1)  # HERE"),
    Attack("place in a shape", "x = x * (1 + x.shape.index(1))  # HERE"),
    Attack("ones in a shape", "x = x * (1 + list(x.shape).count(1))  # HERE"),
    Attack("length in a list", "x = x * (2 if 1 in [x.shape[1]] else 1)  # HERE"),
    Attack("bytes", "x = x * (1 + x.nbytes)  # HERE", "token-count"),
    Attack("length is one", "x = x * (2 if x.shape[1] is 1 else 1)  # HERE", "token-count"),
    Attack("test is true", "x = x * (2 if (x.shape[1] == 1) is True else 1)  # HERE", "token-count"),
    Attack("length between", "x = x * (2 if 0 < x.shape[1] < 2 else 1)  # HERE", "length-dependent"),
    Attack("locals", "y = locals()['x'][:, -1:]  # HERE\nx = x + y", "unknown-operation"),
    Attack("dictionary of the object", "self.__dict__['n'] = self.__dict__.get('n', 0) + 1  # HERE\nx = x * self.__dict__['n']", "state-on-self unknown-operation", route="refused"),
    Attack("set behind the back", "object.__setattr__(self, 'n', 1)  # HERE", "unknown-operation", route="refused"),
    Attack("module updated", "self.mlp.update({'n': 2})  # HERE", "state-on-self", route="refused"),
    Attack("library object changed", "SEEN.append(1)  # HERE\nx = x * len(SEEN)", "state-on-self", helpers="from collections import deque\n\nSEEN = deque()\n", route="refused"),
    Attack("array of another library", "SEEN[0] += 1  # HERE\nx = x * float(SEEN[0])", "state-on-self", helpers="import numpy as np\n\nSEEN = np.zeros(1)\n", route="refused"),
    Attack("iterator", "x = x * next(STEPS)  # HERE", "state-on-self", helpers="import itertools\n\nSTEPS = itertools.count()\n", route="refused"),
    Attack("state of a cache", "x = x * cache.state[0].sum()  # HERE", "cache-use"),
    Attack("cache without keys yet", "x = x * (2 if cache.keys is None else 1)  # HERE", "cache-use"),
    Attack("what a cache has", "x = x * (2 if hasattr(cache, 'keys') else 1)  # HERE", "cache-use"),
    Attack("class of a cache", "x = x * (2 if isinstance(cache, KVCache) else 1)  # HERE", "cache-use", helpers="from mlx_lm.models.cache import KVCache\n"),
    Attack("type of a cache", "x = x * (2 if type(cache).__name__ == 'KVCache' else 1)  # HERE", "cache-use"),
    Attack("rope without offset", "q = self.rope(q)  # HERE", "position-special", where="rope"),
]  # fmt: skip


def edited(attack: Attack) -> str:
    """The base model with the attack in it."""

    def inside(indent: str) -> str:
        lines = attack.body.splitlines()
        return "".join(f"{indent}{line}\n" if line else "\n" for line in lines)

    text = BASE.replace(HEAD, f"{attack.helpers}\n\n{HEAD}") if attack.helpers else BASE
    norm = "        self.post_attention_layernorm ="
    if attack.where == "bn":
        text = text.replace(norm, f"        self.bn = nn.BatchNorm(args.hidden_size)\n{norm}")
    if attack.where == "seen":
        text = text.replace(norm, f"        self.seen = []\n{norm}")
    if attack.where == "model":
        anchor = "        h = self.model(inputs, cache)\n"
        return text.replace(anchor, anchor + inside("        "))
    if attack.where == "rope":
        return text.replace("q = self.rope(q, offset=cache.offset)\n", f"{attack.body}\n")
    made = text.replace(ANCHOR, ANCHOR + inside("        "))
    assert made != text
    return made


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name.replace(" ", "-"))
def test_an_attack_is_named_where_it_stands(tmp_path, attack):
    text = edited(attack)
    compile(text, "model.py", "exec")
    result = compile_text(tmp_path, text)
    assert not result.errors and result.emitted is not None
    plan = result.emitted.plan
    assert plan.route == attack.route
    told = said_of(plan)
    line = next(n for n, part in enumerate(text.splitlines(), 1) if "# HERE" in part)
    named = [d for d in told if d.slug in attack.slugs.split() or d.slug == "token-branch"]
    assert named, [(d.slug, d.message, str(d.place)) for d in told]
    assert line in [d.place.line for d in named if d.place is not None], [
        str(d.place) for d in told
    ]


HARMLESS = [
    ("scaled", "x = 1.5 * x"),
    ("padding of padded batches", "x = x * (1 if getattr(cache, 'left_padding', None) is None else 2)"),
    ("norm over features", "x = x / mx.linalg.norm(x, axis=-1, keepdims=True)"),
    ("flattened and back", "B, L, D = x.shape\nx = mx.tanh(x.reshape(-1, D)).reshape(B, L, D)"),
    ("heads and back", "B, L, D = x.shape\nx = x.reshape(B, L, 4, -1).cumsum(axis=-1).reshape(B, L, D)"),
    ("cumsum over features", "x = x + mx.cumsum(x, axis=-1)"),
    ("sorted features", "x = mx.sort(x)"),
    ("flipped features", "x = x + x[..., ::-1]"),
    ("gathered features", "x = x[..., mx.array([1, 0] * 32)]"),
    ("einsum over features", "x = mx.einsum('bld,de->ble', x, mx.eye(64))"),
    ("outer of features", "x = x + (x[..., :, None] * x[..., None, :]).mean(axis=-1)"),
    ("batch norm of heads", "B, L, D = x.shape\ny = x.reshape(B, L, 4, -1)\nx = (y - y.mean(axis=2, keepdims=True)).reshape(B, L, D)"),
    ("experts by index", "B, L, D = x.shape\nw = mx.ones((3, D)) * mx.arange(3)[:, None]\nx = x * w[mx.argmax(x[..., :3], axis=-1)]"),
    ("transposed and back", "x = x.transpose(1, 0, 2).transpose(1, 0, 2)"),
    ("constant of the shape", "x = x + mx.zeros(x.shape) + mx.ones((x.shape[0], x.shape[1], 1))"),
    ("two layers of lists", "parts = [x, 2 * x]\nparts.append(3 * x)\nx = mx.stack(parts).mean(axis=0)"),
    ("sorted and restored", "B, L, D = x.shape\ny = x.reshape(-1, D)\nkey = mx.argmax(y, axis=-1)\no = mx.argsort(key)\ny = 2 * y[o]\nx = y[mx.argsort(o)].reshape(B, L, D)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "body"), HARMLESS, ids=[n.replace(" ", "-") for n, _ in HARMLESS])
def test_a_harmless_edit_is_proved_and_agrees(tmp_path, name, body):
    from mlxrewrite.cli import main
    from mlxrewrite.runtime.verify import verify

    source = tmp_path / "source"
    source.mkdir()
    (source / "gqa.py").write_text(edited(Attack(name, body)))
    made = tmp_path / "made"
    assert main([str(source / "gqa.py"), "-o", str(made), "-q", "--no-cache"]) == 0
    assert '"route": "kernel"' in (made / "gqa.json").read_text()
    report = verify(CONFIG, generated=made, source=source / "gqa.py")
    assert report.passed, report.text()


def test_the_base_is_proved_without_assumptions(tmp_path: Path):
    result = compile_text(tmp_path, BASE)
    assert result.emitted is not None
    assert result.emitted.plan.route == "kernel"
    assert result.emitted.plan.assumptions == ()
