# ruff: noqa: E501 - one attack a line
"""A mixer that runs once for several sequences must keep them apart; one that may not runs alone.

Hostile edits of the short convolution, where `x` is [sequences, length, features]. Each of them
does the same as the original where there is one sequence, or depends on how many there are.
"""

from __future__ import annotations

import json

import pytest
from compiling import EXAMPLES, judge
from mlxrewrite.cli import main
from mlxrewrite.ir import Match

TEXT = (EXAMPLES / "short_conv.py").read_text()
ANCHOR = "        before, after, inner = mx.split(self.in_proj(x), 3, axis=-1)\n"
HEAD = "class ShortConv(nn.Module):\n"
INIT = "        self.kernel_size = args.conv_kernel\n"

ATTACKS = {
    "first sequence": "x = x + x[0] - x[0]",
    "negative axis": "x = x - x.mean(axis=-3, keepdims=True)",
    "axis in a variable": "a = 1 - 1\nx = mx.cumsum(x, axis=a)",
    "axis of the mixer": "x = mx.cumsum(x, axis=self.kernel_size - 3)",
    "split without an axis": "x = x + mx.split(x, x.shape[1])[0]",
    "rows in a loop": "s = 0\nfor row in x:\n    s = s + row\nx = x + s",
    "rows zipped": "s = 0\nfor row, _ in zip(x, range(9)):\n    s = s + row\nx = x + s",
    "rows in a list": "x = x + sum([row for row in x])",
    "order of rows": "x = x[mx.array([0] * 1)] + x",
    "one axis more in front": "x = mx.cumsum(x.reshape(1, -1, x.shape[-1]), axis=1).reshape(x.shape)",
    "flattened in front": "x = mx.cumsum(x.flatten(0, 1)[None], axis=1).reshape(x.shape)",
    "array method": "x = x + x.flatten()[:1]",
    "transform": "x = mx.fft.fft(x, axis=0).astype(x.dtype)",
    "padded in front": "x = mx.pad(x, [(1, 0), (0, 0), (0, 0)])[:-1]",
    "einsum": "x = mx.einsum('bld,cld->bld', x, x)",
    "tensordot": "x = mx.tensordot(x, x, axes=[[0], [0]])[0]",
    "count in an argument": "x = x * mx.full((1,), x.shape[0])",
    "count by size": "x = x / x.size",
    "count by length": "x = x / len(x)",
    "count by shape": "x = x * (2 if x.shape == (1, 1, 64) else 1)",
    "count from the end": "x = x / x.shape[-3]",
    "count compared with a number": "x = x if x.shape[0] == 1 else 2 * x",
    "count compared with a length": "x = x if x.shape[0] != x.shape[1] else 2 * x",
    "count ordered": "x = x if x.shape[0] <= x.shape[1] else 2 * x",
    "identity": "x = x if id(x) % 2 else 2 * x",
    "count in a range": "for _ in range(x.shape[0]):\n    x = 2 * x",
    "places of sequences": "x = x + mx.arange(x.shape[0])[:, None, None]",
    "summed by a product": "x = x + mx.ones((1, x.shape[0])) @ x[:, 0]",
    "gram of thin rows": "t = x[:, 0]\nx = x + mx.softmax(t @ t.swapaxes(-1, -2), axis=-1) @ t",
    "thin mean": "x = x - x[:, 0].mean(axis=-2)",
    "compiled helper": "x = COMPILED(x)",
    "helper of the file": "x = stir(x)",
    "helper with a kernel's argument": "x = x + lend(inputs=[x])",
    "layer with a kernel's argument": "x = x + self.f(inputs=x)",
    "vmapped": "x = mx.vmap(lambda t: t, in_axes=1, out_axes=0)(x)",
    "nested": "def f(t):\n    return mx.fft.fft(t, axis=0)\n\nx = f(x).astype(x.dtype)",
    "layer": "x = self.bn(x)",
    "handed function": "x = self.apply(mx.cumsum, x)",
    "written entry": "x[0] = 0",
    "added at": "x = x.at[0].add(1)",
    "filled with rows": "x = x + mx.full_like(mx.zeros((4,)), x[:, 0, 0])[0]",
    "triangle by count": "x = x + mx.tril(mx.ones((4, 4)), x.shape[0])[0, 0]",
    "attention of sequences": "q = x.swapaxes(0, 1)[None]\nx = mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0)[0].swapaxes(0, 1)",
    "lined up by accident": "x = x / x.sum(-1)",
    "slice as an object": "x = x - x[slice(0, 1)]",
    "sequences in order": "x = x[mx.argsort(x[:, 0, 0])]",
    "turned result": "return x.swapaxes(0, 1)",
    "turned state": "cache[0] = x.swapaxes(0, 1)",
    "state picked": "x = x + (cache[0][0] if cache[0] is not None else 0)",
    "kept on the mixer": "self.seen = x\nx = x + self.seen[:, -1:]",
    "kept in a list": "SEEN.append(x)\nx = x + SEEN[0][:, -1:]",
    "kernel nobody read": "x = KERNEL(inputs=[x], grid=(1, x.shape[0], 1), threadgroup=(1, 1, 1), output_shapes=[x.shape], output_dtypes=[x.dtype])[0]",
    "set by another": "x = self.act(x)",
    "decorated": "x = twice(x)",
    "function kept": "x = self.f(x, axis=0)",
}
# More of them, by what they do; `\n` begins a new line.
MORE_ATTACKS = r"""
import functools\nx = functools.partial(mx.mean, axis=0, keepdims=True)(x) + x
x = getattr(mx, "mean")(x, axis=0, keepdims=True) + x
a, *b = x\nx = x + a
for i, row in enumerate(x):\n    x = x + row
x = x[None].mean(1) + x
x = x + x.T.mean(-1).T
x = x.transpose().transpose(2, 1, 0)[::-1]
x = mx.einsum('bld->ld', x)[None] + x
x = mx.repeat(x, 2, axis=0)[: x.shape[0]]
x = mx.broadcast_arrays(x, x[:1])[1] + x
x = x + (x @ x.transpose(1, 2, 0)).mean()
x = x + sum(r.mean() for r in x)
x = x + list(map(lambda t: t, x))[0]
x = x + {0: x}[0][0]
x = (lambda t: t[::-1])(x)
x = mx.concatenate([x[1:], x[:1]], axis=0)
x = mx.concatenate([x[1:], x[:1]])
x = mx.stack([x, x]).reshape(x.shape[0], 2, *x.shape[1:])[:, 0]
x = mx.tile(x, (2, 1, 1))[: x.shape[0]]
x = x.reshape(-1, x.shape[1] * 2, x.shape[2])[:, : x.shape[1]]
x = x.reshape(x.shape[1], x.shape[0], x.shape[2]).swapaxes(0, 1)
x = x.swapaxes(0, 1).reshape(x.shape)
x = mx.fast.layer_norm(x.swapaxes(0, 2), None, None, 1e-5).swapaxes(0, 2)
x = mx.softmax(x, axis=(0,))
x = mx.softmax(x.astype(mx.float32), axis=-3).astype(x.dtype)
x = x + mx.where(x[:, :1, :1] > 0, x, 0).max(axis=0)
x = x * (1 if x.ndim == 3 and x.shape[0] > 1 else 2)
x = x[: max(1, x.shape[0] - 1)] + x
x = mx.pad(x, ((0, 1), (0, 0), (0, 0)))[1:]
x = mx.take(x, mx.array([0]), axis=0) + x
x = mx.take_along_axis(x, mx.zeros((1, 1, 1), mx.int32), axis=0) + x
n = x.shape\nx = x + mx.ones(n[::-1]).sum()
x = x + mx.arange(x.size).reshape(x.shape)
x = x / x.shape[0] * x.shape[0]
x = x if len(x.shape) == 3 and x.shape[0] % 2 else 2 * x
x = mx.fast.rms_norm(x, x[0, 0], 1e-5)
x = mx.roll(x, 1)
x = mx.sort(x, axis=None).reshape(x.shape)
x = mx.cumsum(x).reshape(x.shape)
x = x.at[mx.array([0])].add(x[:1])
x = mx.conv_general(x.swapaxes(0, 1), mx.ones((x.shape[2], 1, x.shape[2]))).swapaxes(0, 1)
x = x - mx.linalg.norm(x)
x = x - mx.mean(x)
x = x - mx.logsumexp(x)
x = mx.divmod(x, x.mean(0))[1]
q, r = mx.split(x, [1])\nx = x + q
x = mx.vmap(lambda a: a - a.mean(0))(x.swapaxes(0, 1)).swapaxes(0, 1)
x = mx.checkpoint(lambda t: t[:1] + t)(x)
x = mx.compile(lambda t: t.mean(0, keepdims=True) + t)(x)
x = x + mx.outer(x[:, 0, 0], x[0, 0]).mean()
y = x\ny[:] = x[::-1]\nx = y
s = x[:, 0]\nx = x + mx.broadcast_to(s, x.shape)
s = x[:, 0]\nx = x + mx.expand_dims(s, 0)
x = mx.addmm(x, mx.ones((x.shape[0], x.shape[0])), x)
t = x.shape[0]\nfor _ in range(3):\n    t = t + 1\nx = x / t
try:\n    x = x[1:2] + x\nexcept ValueError:\n    pass
x = mx.fast.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], scale=1.0, mask=mx.zeros(x.shape)[:, :, :1] + x[:, :, 0])[:, 0]
x = mx.fast.rope(x, 4, traditional=False, base=1e4, scale=1.0, offset=0, freqs=x[:, 0, 0])
x = mx.quantized_matmul(x, self.in_proj.weight, x[:, 0], transpose=True)
x = mx.clip(x, x.min(), x.max())
x = x + mx.argmax(x)
if mx.any(x > 9):\n    x = 2 * x
x = x * float(x.mean())
x = nn.Softmax()(x.T).T
x = mx.nan_to_num(x, nan=x.mean())
x = mx.inner(x, x)[..., 0, :]
x = mx.kron(x, mx.ones((1, 1, 1)))
x = mx.trace(x, 0, 0, 1) + x
x = mx.diagonal(x, 0, 0, 1).mean() + x
x = x + mx.meshgrid(x[:, 0, 0])[0][0]
x = mx.unflatten(x, 0, (1, -1)).mean(1) + x
x = x.squeeze()[:, None] if x.shape[1] == 1 else x
x = x.squeeze(0)[None] if x.shape[0] == 1 else x
x = mx.topk(x, 1, axis=0) + x
x = mx.put_along_axis(x, mx.zeros((1, 1, 1), mx.int32), x[:1], axis=0)
x = mx.hadamard_transform(x.T).T
x = mx.view(x.T, mx.int32).T.astype(x.dtype)
x = mx.einsum('bld,bmd->lmb', x, x).mean(-1)[None] + x
x = mx.einsum('ij...->...', x) + x
x = mx.einsum('bld,bld', x, x) + x
x = mx.tensordot(x, x, 1).mean() + x
x = mx.random.normal(x.shape) + x
cache[0] = x[:, -1:]; x = x + cache[0][0]
cache[0] = mx.zeros((1, 1, 4))
cache["k"] = x
cache.state = x
x = x + cache.state[0]
x = x + len(cache.cache)
""".strip().split("\n")
# The same for what runs at once.
MORE_HARMLESS = r"""
x = mx.einsum('bld,bmd->blm', x, x) @ x
x = mx.sort(x, axis=1)
x = x[:, ::-1]
x = x - x.mean(axis=(1, 2), keepdims=True)
x = mx.stack([x, x], axis=1).mean(1)
x = x + mx.cumsum(x, axis=1)
for t in range(x.shape[1]):\n    x = x + x[:, t : t + 1]
x = mx.fast.rope(x[:, None], 4, traditional=False, base=1e4, scale=1.0, offset=0)[:, 0]
q = x[:, None]\nx = mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0)[:, 0]
x = x if x.shape[1] > 4 else 2 * x
x = x.transpose(1, 0, 2).transpose(1, 0, 2)
x = mx.full_like(x, 2) + x
x = mx.concatenate([mx.zeros((x.shape[0], 1, x.shape[2])), x], axis=1)[:, :-1]
x = x + mx.zeros(x.shape[::-1]).transpose()
""".strip().split("\n")
HELPERS = "SEEN = []\nKERNEL = mx.fast.metal_kernel(name='k', input_names=['x'], output_names=['y'], source='y[0] = x[0];')\n\n\ndef COMPILED_TWICE(f):\n    return lambda t: f(t) - t.mean(axis=0)\n\n\n@COMPILED_TWICE\ndef twice(t):\n    return t\n\n\ndef stir(t):\n    return t + t[:1]\n\n\ndef lend(inputs):\n    return inputs[0][:1]\n\n\nCOMPILED = mx.compile(stir)\n\n\n"
METHOD = "    def apply(self, f, t):\n        return f(t, axis=0)\n\n"
MADE = "        self.act = nn.silu\n        self.bn = nn.BatchNorm(args.hidden_size)\n        self.f = mx.cumsum\n"

SET = "            self.conv.act = lambda t: t - t.mean(axis=0)"

HARMLESS = {
    "counts ordered": "x = x if x.shape[0] <= (2 * x).shape[0] else 2 * x",
    "counts compared": "y = 2 * x\nx = y if y.shape[0] == x.shape[0] else x",
    "identity of a weight": "x = x if id(self.in_proj) else x",
    "own length": "x = x[:, : x.shape[1]]",
    "merged and cut": "B, L, D = x.shape\nx = x.reshape(-1, D).reshape(B, L, D)",
    "shape kept": "x = x.reshape(x.shape)",
    "rest of the shape": "x = x.reshape(*x.shape[:2], -1)",
    "other axes": "x = x - x.mean(axis=-1, keepdims=True)",
    "pieces": "p = mx.split(x, 2, axis=-1)\nx = mx.concatenate([p[0], p[1]], axis=-1)",
    "turned and back": "x = x.transpose(0, 2, 1).transpose(0, 2, 1)",
    "inner function": "def f(t):\n    return mx.exp(t)\n\nx = x * f(x)",
}


def edited(body: str) -> str:
    lines = "".join(f"        {line}\n" if line else "\n" for line in body.split("\n"))
    text = TEXT.replace(HEAD, f"{HELPERS}{HEAD}").replace(ANCHOR, f"{lines}{ANCHOR}")
    text = text.replace(INIT, f"{INIT}{MADE}")
    start = text.index("    def __call__", text.index(HEAD))
    if "self.act" in body:  # by the layer that has the mixer
        text = text.replace("self.conv = ShortConv(args)", f"self.conv = ShortConv(args)\n{SET}")
    return text[:start] + (METHOD if "self.apply" in body else "") + text[start:]


def runs_at_once(text: str) -> bool:
    """Whether the short convolution runs once for several sequences."""
    found = judge(text, "ShortConv")
    rules = {site.rule for site in found.sites} if isinstance(found, Match) else set()
    return bool(rules & {"per_length", "on_rows"})


def test_the_example_runs_at_once():
    assert runs_at_once(TEXT)
    assert runs_at_once(edited("pass"))


@pytest.mark.parametrize("name", ATTACKS)
def test_what_may_join_sequences_runs_alone(name):
    assert not runs_at_once(edited(ATTACKS[name]))


@pytest.mark.parametrize("name", HARMLESS)
def test_what_keeps_them_apart_runs_at_once(name):
    assert runs_at_once(edited(HARMLESS[name]))


@pytest.mark.parametrize("body", MORE_ATTACKS)
def test_more_of_what_may_join_sequences(body):
    assert not runs_at_once(edited(body.replace("\\n", "\n")))


@pytest.mark.parametrize("body", MORE_HARMLESS)
def test_more_of_what_keeps_them_apart(body):
    assert runs_at_once(edited(body.replace("\\n", "\n")))


def test_a_method_of_a_base_is_looked_at():
    """What a class inherits was not."""
    base = "class Base(nn.Module):\n    def stir(self, t):\n        return t + t[:1]\n\n\n"
    text = edited("x = self.stir(x)").replace(HEAD, f"{base}class ShortConv(Base):\n")
    assert not runs_at_once(text)
    assert runs_at_once(text.replace("t + t[:1]", "t + t[:, :1]"))


def test_a_class_that_changes_a_method_is_looked_at():
    """It runs the same `__call__`."""
    text = edited("x = self.help(x)")
    start = text.index("    def __call__", text.index(HEAD))
    text = f"{text[:start]}    def help(self, t):\n        return t\n\n{text[start:]}"
    assert runs_at_once(text)
    after = text.index("\nclass ", text.index(HEAD) + 10)
    for axis in (0, 1):
        mine = f"class Mine(ShortConv):\n    def help(self, t):\n        return t.mean(axis={axis})[:, None]\n\n"
        changed = text[:after] + mine + text[after:].replace("ShortConv(", "Mine(")
        assert runs_at_once(changed) == (axis == 1)


@pytest.mark.parametrize(
    ("body", "ranks"),
    [
        ("pass", "@on_rows(mask=(1, 3, 4))"),
        ("x = x[:, ::-1]", "@per_length(mask=(1, 3, 4))"),
        ("x = x if mask is None else mx.where(mask[..., None], x, 0)", "@on_rows"),
        ("x = x if mask is None else x + mask[:, None, None]", "@per_length(mask=1)"),
        ("x = x if mask is None else x + mask[:, :1, :1]", "@per_length(mask=3)"),
        ("x = x if mask is None else x + mask[:, :, 0, :]", "@on_rows(mask=4)"),
    ],
)
def test_the_decorator_names_what_is_proved(body, ranks):
    """Arrays beside x are taken where the proof holds for them, and by their rank."""
    found = judge(edited(f"{body}\nmask = None"), "ShortConv")
    assert isinstance(found, Match)
    assert ranks in [e.after.decode().strip() for e in found.edits]


def test_a_mixer_that_runs_alone_says_why():
    found = judge(edited("x = mx.cumsum(x, axis=0)"), "ShortConv")
    assert isinstance(found, Match)
    (why,) = [item for item in found.evidence if item.role.startswith("not proved")]
    assert why.role.endswith("a scan across the rows axis")
    assert why.place.text.strip() == "x = mx.cumsum(x, axis=0)"


def test_states_of_calls_of_every_sort_meet():
    """An array may be given to one call and not to the next: each alone would be right."""
    body = (
        "past = cache[1]\nif mask is None:\n    cache[1] = x[:, 0]\nelse:\n    size = mask.shape\n"
        "    x = x if past is None else x + past\n    cache[1] = x[:, -1:]"
    )
    for kept, ranks in (
        (body, b"@per_length\n"),
        (body.replace("x[:, 0]", "x[:, :1]"), b"mask=(1"),
    ):
        found = judge(edited(f"{kept}\nmask = None"), "ShortConv")
        assert isinstance(found, Match)
        (decorator,) = [e.after for e in found.edits if b"@per_length" in e.after]
        assert ranks in decorator


OUTER = """
from dataclasses import dataclass

import mlx.core as mx

from .inner import Model as Inner
from .inner import ModelArgs as InnerArgs


@dataclass
class ModelArgs(InnerArgs):
    pass


class Model(Inner):
    def __init__(self, args: ModelArgs):
        super().__init__(args)
        for layer in self.layers:
            SET
"""


@pytest.mark.parametrize(
    ("line", "route"),
    [
        ("layer.mixer.step_norm = lambda t: t - mx.mean(t, axis=0)", "refused"),
        ("setattr(layer.mixer, 'step_norm', lambda t: t - mx.mean(t, axis=0))", "refused"),
        ("layer.mixer.note = args.model_type", "kernel"),
    ],
)
def test_what_another_file_puts_on_a_mixer_is_seen(tmp_path, line, route):
    """The mixer was proved as its own file makes it."""
    models = tmp_path / "models"
    models.mkdir()
    (models / "__init__.py").touch()
    (models / "inner.py").write_text((EXAMPLES / "selective_scan.py").read_text())
    (models / "outer.py").write_text(OUTER.replace("SET", line))
    main([str(models), "-o", str(tmp_path / "made"), "-q", "--no-cache"])
    told = json.loads((tmp_path / "made" / "outer.json").read_text())
    assert told["route"] == route
    assert json.loads((tmp_path / "made" / "inner.json").read_text())["route"] == "kernel"
    assert (route == "kernel") != any("proved without" in n["message"] for n in told["notes"])
