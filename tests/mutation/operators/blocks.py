"""Changes of layers and of the model around them: residuals, norms, returns, state on the model."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise

from ..source import Change, File, called
from . import operator


def _sums(file: File) -> Iterator[ast.BinOp]:
    for function in file.layers:
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
                yield node


@operator("residual-dropped", "a residual is left out")
def _residual(file: File) -> Iterator[Change]:
    for node in _sums(file):
        yield file.change(file.put(node, f"({file.code(node.right)})"), where=node)


@operator("branch-dropped", "a branch is left out")
def _branch(file: File) -> Iterator[Change]:
    for node in _sums(file):
        yield file.change(file.put(node, f"({file.code(node.left)})"), where=node)


@operator("residual-doubled", "a residual counts twice")
def _doubled(file: File) -> Iterator[Change]:
    for node in _sums(file):
        text = f"2 * ({file.code(node.left)}) + ({file.code(node.right)})"
        yield file.change(file.put(node, f"({text})"), where=node)


@operator("residual-multiplied", "a residual is a factor")
def _multiplied(file: File) -> Iterator[Change]:
    for node in _sums(file):
        text = f"({file.code(node.left)}) * mx.tanh({file.code(node.right)})"
        yield file.change(file.put(node, f"({text})"), where=node)


@operator("norm-dropped", "a norm is left out")
def _norm(file: File) -> Iterator[Change]:
    for call in file.nodes(ast.Call):
        name = called(call) or ""
        if "norm" in name and isinstance(call.func, ast.Attribute) and len(call.args) == 1:
            yield file.change(file.put(call, f"({file.code(call.args[0])})"), where=call)


@operator("norm-over-tokens", "a norm goes over the tokens")
def _norm_tokens(file: File) -> Iterator[Change]:
    for call in file.nodes(ast.Call):
        name = called(call) or ""
        if "norm" in name and isinstance(call.func, ast.Attribute) and len(call.args) == 1:
            inner = file.code(call.args[0])
            text = f"{file.code(call.func)}(mx.softmax({inner}, axis=-2))"
            yield file.change(file.put(call, text), where=call)


@operator("norms-swapped", "two norms change places")
def _norms_swapped(file: File) -> Iterator[Change]:
    for function in file.layers:
        calls = [
            n
            for n in ast.walk(function)
            if isinstance(n, ast.Call) and "norm" in (called(n) or "") and len(n.args) == 1
        ]
        for one, two in pairwise(calls):
            yield file.change(*file.swap(one.func, two.func), where=one)


def _starts(name: str, says: str, text: str, *, same: bool = False) -> None:
    """Lines at the start of forwards of layers, of {x} the hidden states, {c} the cache."""

    @operator(name, says, same=same)
    def apply(file: File) -> Iterator[Change]:
        for function in file.layers:
            hidden, cache = file.hidden_name(function), file.cache_name(function)
            if hidden is None or ("{c}" in text and cache is None):
                continue
            filled = text.replace("{x}", hidden).replace("{c}", cache or "")
            yield file.change(file.before(function.body[0], filled), where=function)


_starts("early-return", "a layer does nothing", "return {x}")
_starts(
    "early-return-length",
    "a layer does nothing for single tokens",
    "if {x}.shape[1] == 1:\n    return {x}",
)
_starts(
    "early-return-no-cache",
    "a layer does nothing without a cache",
    "if {c} is None:\n    return {x}",
    same=True,
)
_starts(
    "early-return-cache", "a layer does nothing with a cache", "if {c} is not None:\n    return {x}"
)
_starts(
    "early-return-offset",
    "a layer does nothing in the first chunk",
    "if {c}.offset == 0:\n    return {x}",
)
_starts(
    "early-return-batch",
    "a layer does nothing for several sequences",
    "if {x}.shape[0] > 1:\n    return {x}",
)
_starts(
    "early-return-value",
    "a layer does nothing where values are large",
    "if mx.max({x}).item() > 1.0:\n    return {x}",
)
_starts(
    "early-raise",
    "a layer fails for several sequences",
    "if {x}.shape[0] > 1:\n    raise ValueError('one sequence only')",
)
_starts("assert-batch", "a layer wants one sequence", "assert {x}.shape[0] == 1")
_starts(
    "assert-length", "a layer wants hidden states of three axes", "assert {x}.ndim == 3", same=True
)
_starts(
    "state-on-self",
    "a layer keeps its last input",
    "{x} = {x} + getattr(self, '_last', 0)\nself._last = 0.1 * {x}[:, -1:]",
)
_starts(
    "state-on-self-plain",
    "a layer keeps its last input, as an attribute",
    "if not hasattr(self, '_last'):\n    self._last = mx.zeros_like({x}[:, -1:])\n"
    "{x} = {x} + self._last\nself._last = 0.1 * {x}[:, -1:]",
)
_starts(
    "counter-on-self",
    "a layer counts its calls",
    "self._calls = getattr(self, '_calls', 0) + 1\n{x} = {x} * self._calls",
)
_starts(
    "counter-on-self-used-once",
    "a layer changes its first call",
    "if not hasattr(self, '_seen'):\n    self._seen = True\n    {x} = {x} * 1.5",
)
_starts(
    "shape-kept-on-self",
    "a layer keeps the first length it sees",
    "if not hasattr(self, '_long'):\n    self._long = {x}.shape[1]\n{x} = {x} * self._long",
)
_starts(
    "state-in-cache",
    "a layer keeps its last input on the cache",
    "{x} = {x} + getattr({c}, 'last', 0)\n{c}.last = 0.1 * {x}[:, -1:]",
)
_starts("in-place-hidden", "hidden states are changed in place", "{x} *= 1.5")
_starts(
    "in-place-index",
    "the first token is changed in place",
    "{x} = {x} * 1\n{x}[:, 0] = 0.5 * {x}[:, 0]",
)
_starts("in-place-last", "the last token is changed in place", "{x} = {x} * 1\n{x}[:, -1] += 0.5")
_starts(
    "in-place-feature",
    "the first feature is changed in place",
    "{x} = {x} * 1\n{x}[..., 0] = 0.5 * {x}[..., 0]",
    same=True,
)
_starts(
    "unpacked-shape",
    "hidden states are scaled by their length",
    "_b, _l, _d = {x}.shape\n{x} = {x} * (1 + 0.1 * _l)",
)
_starts(
    "unpacked-shape-unused", "the shape is read and not used", "_b, _l, _d = {x}.shape", same=True
)
_starts(
    "walrus-length",
    "hidden states are scaled by their length, by a walrus",
    "if (_l := {x}.shape[1]) > 1:\n    {x} = {x} / _l ** 0.5",
)
_starts(
    "offset-walrus",
    "hidden states are scaled by the offset, by a walrus",
    "if (_at := {c}.offset) > 2:\n    {x} = {x} * 1.1",
)
_starts(
    "positions-hidden",
    "hidden states are scaled by their positions",
    "{x} = {x} * (1 + 0.05 * mx.arange({c}.offset, {c}.offset + {x}.shape[1])[None, :, None])",
)
_starts(
    "positions-hidden-local",
    "hidden states are scaled by their places in the chunk",
    "{x} = {x} * (1 + 0.05 * mx.arange({x}.shape[1])[None, :, None])",
)
_starts(
    "loop-tokens",
    "hidden states add up in a loop over tokens",
    "_rows, _sum = [], 0\nfor _i in range({x}.shape[1]):\n"
    "    _sum = 0.5 * _sum + {x}[:, _i : _i + 1]\n    _rows.append(_sum)\n"
    "{x} = mx.concatenate(_rows, axis=1)",
)
_starts(
    "loop-tokens-alone",
    "hidden states are scaled in a loop over tokens",
    "{x} = mx.concatenate([1.5 * {x}[:, _i : _i + 1] for _i in range({x}.shape[1])], axis=1)",
    same=True,
)
_starts(
    "loop-batch",
    "hidden states are scaled in a loop over sequences",
    "{x} = mx.stack([(1 + 0.1 * _i) * _row for _i, _row in enumerate({x})])",
)
_starts(
    "loop-values",
    "hidden states are scaled until they are small",
    "while mx.max(mx.abs({x})).item() > 1.0:\n    {x} = 0.5 * {x}",
)
_starts("print-nothing", "a layer calls print on a shape", "str({x}.shape)", same=True)
_starts(
    "nested-function",
    "a nested function scales hidden states",
    "def _scaled(t):\n    return 1.5 * t\n\n{x} = _scaled({x})",
    same=True,
)
_starts(
    "nested-mixing",
    "a nested function adds up hidden states",
    "def _summed(t, axis=1):\n    return mx.cumsum(t, axis=axis)\n\n{x} = _summed({x})",
)
_starts(
    "nested-closure",
    "a nested function reads hidden states around it",
    "def _summed():\n    return {x} + {x}.mean(1, keepdims=True)\n\n{x} = _summed()",
)
_starts(
    "keyword-axis",
    "the axis comes from a dict",
    "_how = dict(axis=1, keepdims=True)\n{x} = {x} - 0.5 * mx.mean({x}, **_how)",
)
_starts(
    "computed-axis",
    "the axis is computed",
    "_axis = {x}.ndim - 2\n{x} = mx.cumsum({x}, axis=_axis)",
)
_starts(
    "tuple-axis",
    "the mean over tokens and features",
    "{x} = {x} - {x}.mean(axis=(1, 2), keepdims=True)",
)
_starts(
    "method-lookup",
    "an operation is found by name",
    "{x} = getattr(mx, 'cum' + 'sum')({x}, axis=1)",
)
_starts(
    "vmap",
    "hidden states of sequences are softened by vmap",
    "{x} = {x} + mx.vmap(lambda t: t.mean(0, keepdims=True))({x})",
)
_starts(
    "checkpointed",
    "hidden states pass a checkpoint",
    "{x} = mx.checkpoint(lambda t: 1.5 * t)({x})",
    same=True,
)
_starts(
    "compiled",
    "hidden states pass a compiled function",
    "{x} = mx.compile(lambda t: 1.5 * t)({x})",
    same=True,
)
_starts(
    "compiled-mixing",
    "a compiled function adds up tokens",
    "{x} = mx.compile(lambda t: t + t.mean(1, keepdims=True))({x})",
)
_starts(
    "numpy",
    "hidden states pass numpy",
    "import numpy as np\n{x} = mx.array(np.cumsum(np.array({x}), axis=1))",
)
_starts("tolist", "hidden states pass a list", "{x} = mx.array({x}.tolist())", same=True)


def _returns(name: str, says: str, text: str, *, same: bool = False) -> None:
    """What backbones (or the entry) return becomes a text of {0}."""

    @operator(name, says, same=same)
    def apply(file: File) -> Iterator[Change]:
        functions = [f for f, _ in file.backbones]
        for cls in file.classes:
            forward = file.method(cls, "__call__")
            if cls.name == "Model" and forward is not None and forward not in functions:
                functions.append(forward)
        for function in functions:
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and node.value is not None:
                    code = file.code(node.value)
                    filled = text.replace("{0}", f"({code})")
                    yield file.change(file.put(node.value, filled), where=node)


_returns("return-last", "only the last token's logits", "{0}[:, -1:]")
_returns("return-cumsum", "results add up over tokens", "mx.cumsum({0}, axis=1)")
_returns(
    "return-centred",
    "results lose their mean over tokens",
    "(lambda t: t - t.mean(axis=1, keepdims=True))({0})",
)
_returns("return-maximum", "results lose their maximum", "(lambda t: t - mx.max(t))({0})")
_returns(
    "return-log",
    "results are log probabilities",
    "(lambda t: t - mx.logsumexp(t, axis=-1, keepdims=True))({0})",
    same=True,
)
_returns(
    "return-log-tokens",
    "results are normalised over tokens",
    "(lambda t: t - mx.logsumexp(t, axis=1, keepdims=True))({0})",
)
_returns(
    "return-average",
    "results are averaged with those of the last token",
    "(lambda t: 0.5 * t + 0.5 * t[:, -1:])({0})",
)
_returns("return-scaled", "results are scaled", "1.5 * {0}", same=True)
_returns(
    "return-batch",
    "results lose their mean over sequences",
    "(lambda t: t - 0.5 * t.mean(axis=0, keepdims=True))({0})",
)
_returns(
    "return-top",
    "all but the eight largest results vanish",
    "(lambda t: mx.where(t >= mx.topk(t, 8, axis=-1).min(-1, keepdims=True), t, -9.0))({0})",
    same=True,
)
_returns("return-copied", "results are taken from the first sequence", "{0}[:1]")


@operator("arguments-swapped", "two arguments of a call change places")
def _arguments(file: File) -> Iterator[Change]:
    for call in file.nodes(ast.Call):
        if len(call.args) == 2 and not any(isinstance(a, ast.Starred) for a in call.args):
            if file.code(call.args[0]) != file.code(call.args[1]):
                yield file.change(*file.swap(*call.args), where=call)


@operator("layer-cache-missing", "a mixer is not given its cache")
def _missing(file: File) -> Iterator[Change]:
    for function in file.layers:
        cache = file.cache_name(function)
        for call in ast.walk(function):
            if isinstance(call, ast.Call):
                given = [*call.args, *(k.value for k in call.keywords)]
                for node in given:
                    if isinstance(node, ast.Name) and node.id == cache:
                        yield file.change(file.put(node, "None"), where=call)


@operator("layer-mask-missing", "a mixer is not given its mask")
def _mask_missing(file: File) -> Iterator[Change]:
    for function in file.layers:
        for call in ast.walk(function):
            if isinstance(call, ast.Call):
                given = [*call.args, *(k.value for k in call.keywords)]
                for node in given:
                    if isinstance(node, ast.Name) and node.id == "mask":
                        yield file.change(file.put(node, "None"), where=call)


@operator("mixer-twice", "a mixer runs twice and stores twice")
def _twice(file: File) -> Iterator[Change]:
    for point in file.points:
        if point.kind == "mixer-output":
            code = file.code(point.node)
            yield file.change(file.put(point.node, f"({code} + {code})"), where=point.node)
