"""Changes of the attention call, and of attention written out."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from ..source import Attend, Change, File, called
from . import operator


def _arguments(file: File, *pairs: tuple[str, str]) -> Iterator[Change]:
    """One argument of each attention call becomes a text of `{0}`, itself; added if absent."""
    for attend in file.attends:
        splices = []
        for name, text in pairs:
            node = getattr(attend, name, None) or attend.named.get(name)
            filled = _filled(file, attend, text, node)
            if node is not None:
                splices.append(file.put(node, filled))
            else:
                splices.append(file.add_argument(attend.call, f"{name}={filled}"))
        yield file.change(*splices, where=attend.call)


def _filled(file: File, attend: Attend, text: str, node: ast.AST | None) -> str:
    return text.format(
        file.code(node) if node is not None else "None",
        q=file.code(attend.queries),
        k=file.code(attend.keys),
        v=file.code(attend.values),
    )


def _simple(name: str, says: str, *pairs: tuple[str, str], same: bool = False) -> None:
    @operator(name, says, same=same)
    def apply(file: File) -> Iterator[Change]:
        yield from _arguments(file, *pairs)


_simple("swap-queries-keys", "queries and keys change places", ("queries", "{k}"), ("keys", "{q}"))
_simple("swap-keys-values", "keys and values change places", ("keys", "{v}"), ("values", "{k}"))
_simple("values-are-keys", "keys serve as values", ("values", "{k}"))
_simple("keys-are-values", "values serve as keys", ("keys", "{v}"))
_simple("keys-are-queries", "queries serve as keys", ("keys", "{q}"))
_simple("scale-dropped", "scores are not scaled", ("scale", "1.0"))
_simple("scale-doubled", "scores are scaled twice as much", ("scale", "2 * ({0})"))
_simple(
    "scale-by-length",
    "the scale grows with the number of tokens",
    ("scale", "({0}) * (1 + 0.1 * {q}.shape[2])"),
)
_simple(
    "scale-by-head-width", "the scale from the queries' width", ("scale", "{q}.shape[-1] ** -0.5")
)
_simple(
    "scale-by-keys", "the scale falls with the number of keys", ("scale", "({0}) / {k}.shape[2]")
)
_simple("mask-dropped", "attention without a mask", ("mask", "None"))
_simple("mask-causal", "the word causal as mask", ("mask", "'causal'"))
_simple(
    "mask-chosen",
    "a mask only where several tokens come",
    ("mask", "({0}) if {q}.shape[2] > 1 else None"),
)
_simple("mask-inverted", "the mask is inverted", ("mask", "~({0})"))
_simple("mask-ored", "the mask lets more through", ("mask", "({0}) | True"))
_simple(
    "mask-ored-guarded",
    "a mask array lets everything through",
    ("mask", "({0}) if ({0}) is None or isinstance(({0}), str) else ({0}) | True"),
)
_simple("mask-sliced", "the mask loses its last key", ("mask", "({0})[..., :-1]"))
_simple(
    "mask-sliced-guarded",
    "a mask array loses a column and gets another",
    ("mask", "({0}) if ({0}) is None or isinstance(({0}), str) else mx.roll(({0}), 1, -1)"),
)
_simple("mask-or-default", "no mask becomes a causal one", ("mask", "({0}) or 'causal'"))
_simple("sinks-zero", "sinks of zero", ("sinks", "mx.zeros(({q}.shape[1],))"))
_simple("sinks-one", "sinks of one", ("sinks", "mx.ones(({q}.shape[1],))"))
_simple("sinks-by-head", "sinks that grow by head", ("sinks", "mx.arange({q}.shape[1]) * 0.3"))
_simple("sinks-dropped", "sinks are left out", ("sinks", "None"))
_simple(
    "sinks-from-queries", "sinks computed from this step's tokens", ("sinks", "{q}.mean((0, 2, 3))")
)
_simple("keys-scaled", "keys are scaled after the fetch", ("keys", "2 * {k}"))
_simple(
    "keys-normed",
    "keys are normed after the fetch",
    ("keys", "{k} / mx.linalg.norm({k}, axis=-1, keepdims=True)"),
)
_simple("keys-copied", "keys are copied after the fetch", ("keys", "{k} + 0"), same=True)
_simple("keys-cast", "keys are cast to half precision", ("keys", "{k}.astype(mx.float16)"))
_simple("keys-cast-brain", "keys are cast to bfloat16", ("keys", "{k}.astype(mx.bfloat16)"))
_simple(
    "keys-cast-same",
    "keys are cast to their own type",
    ("keys", "{k}.astype({k}.dtype)"),
    same=True,
)
_simple("values-cast", "values are cast to half precision", ("values", "{v}.astype(mx.float16)"))
_simple(
    "everything-cast",
    "attention in half precision",
    ("queries", "{q}.astype(mx.float16)"),
    ("keys", "{k}.astype(mx.float16)"),
    ("values", "{v}.astype(mx.float16)"),
)
_simple(
    "keys-sliced",
    "the first key is not seen",
    ("keys", "{k}[:, :, 1:]"),
    ("values", "{v}[:, :, 1:]"),
)
_simple(
    "keys-tail",
    "only the last four keys are seen",
    ("keys", "{k}[:, :, -4:]"),
    ("values", "{v}[:, :, -4:]"),
)
_simple("keys-reversed", "keys in reverse order", ("keys", "{k}[:, :, ::-1]"))
_simple("keys-rolled", "keys move on by one head", ("keys", "mx.roll({k}, 1, axis=1)"))
_simple(
    "keys-tiled",
    "key heads are tiled over query heads",
    ("keys", "mx.tile({k}, (1, {q}.shape[1] // {k}.shape[1], 1, 1))"),
    ("values", "mx.tile({v}, (1, {q}.shape[1] // {v}.shape[1], 1, 1))"),
)
_simple(
    "keys-repeated",
    "key heads are repeated over query heads",
    ("keys", "mx.repeat({k}, {q}.shape[1] // {k}.shape[1], axis=1)"),
    ("values", "mx.repeat({v}, {q}.shape[1] // {v}.shape[1], axis=1)"),
    same=True,
)
_simple("queries-last", "only the last query", ("queries", "{q}[:, :, -1:]"))
_simple(
    "queries-centred",
    "queries lose their mean over tokens",
    ("queries", "{q} - {q}.mean(2, keepdims=True)"),
)
_simple("queries-rolled", "queries move on by one token", ("queries", "mx.roll({q}, 1, axis=2)"))
_simple("queries-scaled", "queries are scaled", ("queries", "{q} * 1.5"))
_simple("queries-heads-flipped", "query heads in reverse order", ("queries", "{q}[:, ::-1]"))
_simple(
    "queries-heads-mixed",
    "query heads are averaged",
    ("queries", "0.5 * {q} + 0.5 * {q}.mean(1, keepdims=True)"),
)
_simple("queries-cumsum", "queries add up over tokens", ("queries", "mx.cumsum({q}, axis=2)"))
_simple("cache-not-told", "attention is told of no cache", ("cache", "None"), same=True)
_simple(
    "cache-told-twice",
    "attention is told of another object",
    ("cache", "({0}) and ({0})"),
    same=True,
)


def _wrapped(name: str, says: str, text: str, helpers: str = "", *, same: bool = False) -> None:
    """The whole call becomes a text of `{0}`."""

    @operator(name, says, same=same)
    def apply(file: File) -> Iterator[Change]:
        for attend in file.attends:
            call = file.code(attend.call)
            filled = text.replace("{0}", call).replace("{q}", file.code(attend.queries))
            filled = filled.replace("{f}", file.code(attend.call.func))
            inside = call[call.index("(") + 1 : -1].rstrip().rstrip(",")
            filled = filled.replace("{a}", inside)
            yield file.change(
                file.put(attend.call, f"({filled})"), where=attend.call, helpers=helpers
            )


_wrapped("attend-twice", "attention twice, added", "{0} + {0}")
_wrapped("attend-average", "attention twice, averaged", "({0} + {0}) / 2", same=True)
_wrapped(
    "attend-conditional-length",
    "attention only for several tokens",
    "{0} if {q}.shape[2] > 1 else {q}",
)
_wrapped(
    "attend-conditional-config",
    "attention only for some widths",
    "{0} if {q}.shape[-1] % 2 == 0 else 2 * {0}",
)
_wrapped("attend-lambda", "attention inside a lambda", "(lambda: {0})()", same=True)
_wrapped("attend-list", "attention inside a list", "[{0}][0]", same=True)
_wrapped(
    "attend-comprehension",
    "attention inside a comprehension",
    "[{0} for _ in range(1)][0]",
    same=True,
)
_wrapped("attend-loop-sum", "attention summed over rounds", "sum({0} for _ in range(3))")
_wrapped("attend-cumsum", "results add up over tokens", "mx.cumsum({0}, axis=2)")
_wrapped("attend-heads-cumsum", "results add up over heads", "mx.cumsum({0}, axis=1)")
_wrapped(
    "attend-partial",
    "attention through functools.partial",
    "_partial({f})({a})",
    "from functools import partial as _partial",
    same=True,
)
_wrapped(
    "attend-getattr",
    "attention through getattr",
    "getattr(mx.fast, 'scaled_dot_product_attention')({a})",
)
_wrapped(
    "attend-globals",
    "attention through globals()",
    "globals()['scaled_dot_product_attention']({a})",
    same=True,
)
_wrapped(
    "attend-eval",
    "attention through a name made at run time",
    "(lambda f: f({a}))(eval('scaled_dot_product_' + 'attention'))",
    same=True,
)
_wrapped("attend-keywords", "attention with unpacked keywords", "{f}({a}, **{})", same=True)
_wrapped(
    "attend-helper",
    "attention inside a function of the file",
    "_attend({a})",
    "def _attend(*args, **kwargs):\n    return scaled_dot_product_attention(*args, **kwargs)",
    same=True,
)
_wrapped(
    "attend-helper-scaled",
    "a function of the file scales the result",
    "_attend({a})",
    "def _attend(*args, **kwargs):\n    return 2 * scaled_dot_product_attention(*args, **kwargs)",
)
_wrapped(
    "attend-helper-named",
    "attention inside a function with named parameters",
    "_attend({a})",
    "def _attend(queries, keys, values, cache=None, scale=1.0, mask=None, sinks=None):\n"
    "    return scaled_dot_product_attention(\n"
    "        queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks\n"
    "    )",
    same=True,
)
_wrapped(
    "attend-gated-by-length",
    "results are divided by the number of tokens",
    "{0} / {q}.shape[2] ** 0.25",
)

_FUSED = """
def _spelled(queries, keys, values, cache=None, scale=1.0, mask=None, sinks=None):
    B, H, L, D = queries.shape
    G = keys.shape[1]
    {spread}
    scores = (queries * scale) @ keys.swapaxes(-1, -2)
    if mask is None and L > 1:
        mask = "causal"
    if isinstance(mask, str):
        rows = mx.arange(keys.shape[-2] - L, keys.shape[-2])
        mask = rows[:, None] >= mx.arange(keys.shape[-2])[None]
    {between}
    if mask is not None:
        scores = mx.where(mask, scores, -1e9)
    scores = mx.softmax(scores, axis={axis}, precise=True)
    return ({after}).reshape(B, H, L, -1)
"""
_REPEAT = "keys, values = (mx.repeat(t, H // G, axis=1) for t in (keys, values))"
_TILE = "keys, values = (mx.tile(t, (1, H // G, 1, 1)) for t in (keys, values))"
_SPELLED = {
    "spelled": (_REPEAT, "pass", "-1", "scores @ values", True),
    "spelled-tiled": (_TILE, "pass", "-1", "scores @ values", False),
    "spelled-wrong-axis": (_REPEAT, "pass", "-2", "scores @ values", False),
    "spelled-capped": (_REPEAT, "scores = 5 * mx.tanh(scores / 5)", "-1", "scores @ values", False),
    "spelled-bias": (
        _REPEAT,
        "scores = scores + 0.1 * mx.arange(scores.shape[-1])",
        "-1",
        "scores @ values",
        False,
    ),
    "spelled-plus": (_REPEAT, "pass", "-1", "(scores + 0.01) @ values", False),
    "spelled-uniform": (_REPEAT, "scores = scores * 0", "-1", "scores @ values", False),
}


def _spelled(name: str, parts: tuple[str, str, str, str, bool]) -> None:
    spread, between, axis, after, same = parts

    @operator(name, f"attention written out: {between}, axis {axis}, {after}", same=same)
    def apply(file: File) -> Iterator[Change]:
        helper = _FUSED.format(spread=spread, between=between, axis=axis, after=after)
        for attend in file.attends:
            splice = file.put(attend.call.func, "_spelled")
            yield file.change(splice, where=attend.call, helpers=helper)


for _name, _parts in _SPELLED.items():
    _spelled(_name, _parts)


def _softmaxes(file: File) -> Iterator[ast.Call]:
    """Softmaxes in mixers: the one over scores."""
    for cls in file.mixers:
        for node in ast.walk(cls):
            if isinstance(node, ast.Call) and called(node) == "softmax":
                yield node


def _softmax(name: str, says: str, text: str, *, same: bool = False) -> None:
    @operator(name, says, same=same)
    def apply(file: File) -> Iterator[Change]:
        for call in _softmaxes(file):
            code = file.code(call)
            filled = text.replace("{0}", code).replace("{s}", file.code(call.args[0]))
            yield file.change(file.put(call, filled), where=call)


_softmax("softmax-axis-rows", "softmax over the rows", "mx.softmax({s}, axis=-2)")
_softmax("softmax-axis-heads", "softmax over the heads", "mx.softmax({s}, axis=1)")
_softmax("softmax-no-axis", "softmax over everything", "mx.softmax({s})")
_softmax("softmax-imprecise", "softmax without precise", "mx.softmax({s}, axis=-1)", same=True)
_softmax("softmax-scaled", "weights are scaled", "(0.9 * {0})")
_softmax("softmax-shifted", "a constant on the weights", "({0} + 0.01)")
_softmax("softmax-sharpened", "scores are scaled once more", "mx.softmax(1.5 * ({s}), axis=-1)")
_softmax("softmax-clipped", "scores are clipped", "mx.softmax(mx.clip({s}, -1, 1), axis=-1)")
_softmax(
    "softmax-masked", "small scores vanish", "mx.softmax(mx.where(({s}) > 0, ({s}), -5.0), axis=-1)"
)
_softmax("softmax-cumsum", "weights add up over keys", "mx.cumsum({0}, axis=-1)")
_softmax("softmax-sigmoid", "a sigmoid in place of the softmax", "mx.sigmoid({s})")
_softmax("softmax-cast", "weights in half precision", "{0}.astype(mx.float16).astype(mx.float32)")
_softmax(
    "softmax-biased",
    "scores favour late keys",
    "mx.softmax(({s}) + 0.2 * mx.arange(({s}).shape[-1]), axis=-1)",
)


@operator("shadowed-attention", "the file defines attention itself, scaled")
def _shadowed(file: File) -> Iterator[Change]:
    helper = (
        "_library_attention = scaled_dot_product_attention\n\n\n"
        "def scaled_dot_product_attention(*args, **kwargs):\n"
        "    return 2 * _library_attention(*args, **kwargs)"
    )
    if file.attends:
        yield file.change(where=file.attends[0].call, helpers=helper)


@operator("shadowed-attention-import", "another function is imported by the name of attention")
def _shadowed_import(file: File) -> Iterator[Change]:
    beside = (
        "from .base import *\n"
        "from .base import scaled_dot_product_attention as _inner\n\n\n"
        "def scaled_dot_product_attention(*args, **kwargs):\n"
        "    return 1.5 * _inner(*args, **kwargs)\n"
    )
    for node in file.tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "base" and file.attends:
            text = file.code(node).replace(".base", ".mutant_base", 1)
            yield file.change(file.put(node, text), where=node, beside=[("mutant_base", beside)])
