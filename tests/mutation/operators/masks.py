"""Changes of masks where they are made and where layers get them."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from ..source import Change, File, called
from . import operator


def _made(name: str, says: str, text: str, *, same: bool = False, state: bool = False) -> None:
    """The call that makes a mask becomes a text of {0} itself, {h} its input, {c} its cache."""

    @operator(name, says, same=same)
    def apply(file: File) -> Iterator[Change]:
        for call in file.masks:
            if (called(call) == "create_ssm_mask") != state or not call.args:
                continue
            cache = [*call.args[1:], *(k.value for k in call.keywords if k.arg == "cache")]
            filled = text.replace("{0}", file.code(call)).replace("{h}", file.code(call.args[0]))
            filled = filled.replace("{c}", file.code(cache[0]) if cache else "None")
            filled = filled.replace("{f}", file.code(call.func))
            yield file.change(file.put(call, filled), where=call)


_made("mask-none", "no mask is made", "None")
_made("mask-word", "the mask is a word", "'causal'")
_made("mask-window", "a window of three positions", "{f}({h}, {c}, window_size=3)")
_made(
    "mask-window-array",
    "a window of three positions, as an array",
    "{f}({h}, {c}, window_size=3, return_array=True)",
)
_made("mask-array", "the mask is an array", "{f}({h}, {c}, return_array=True)", same=True)
_made("mask-without-cache", "the mask is made without a cache", "{f}({h}, None)")
_made("mask-of-none", "the mask is made without naming a cache", "{f}({h})")
_made("mask-of-last", "the mask is made for the last token", "{f}({h}[:, -1:], {c})")
_made(
    "mask-of-more",
    "the mask is made for one token more",
    "{f}(mx.concatenate([{h}, {h}[:, :1]], axis=1), {c}, return_array=True)[..., :-1, :-1]",
)
_made(
    "mask-chosen-length",
    "a mask only where several tokens come",
    "({0} if {h}.shape[1] > 2 else None)",
)
_made(
    "mask-and",
    "the mask array and itself",
    "(lambda m: m if m is None or isinstance(m, str) else m & m)({0})",
    same=True,
)
_made(
    "mask-inverted-made",
    "the mask array is inverted",
    "mx.logical_not({f}({h}, {c}, return_array=True))",
)
_made(
    "mask-float",
    "the mask is added to scores",
    "mx.where({f}({h}, {c}, return_array=True), 0.0, -1e9)",
    same=True,
)
_made(
    "mask-soft",
    "masked keys only lose weight",
    "mx.where({f}({h}, {c}, return_array=True), 0.0, -2.0)",
)
_made(
    "mask-hidden-first",
    "the first position is hidden",
    "(lambda m: m & (mx.arange(m.shape[-1]) > 0))({f}({h}, {c}, return_array=True))",
)
_made(
    "mask-alibi",
    "scores fall with distance",
    "(lambda m: mx.where(m, 0.1 * mx.arange(m.shape[-1]), -1e9))({f}({h}, {c}, return_array=True))",
)
_made(
    "mask-tril",
    "the mask is a triangle",
    "mx.tril(mx.ones(({h}.shape[1], {h}.shape[1]), dtype=mx.bool_))",
)
_made(
    "mask-ranges",
    "the mask is made of ranges",
    "(mx.arange({c}.offset, {c}.offset + {h}.shape[1])[:, None] >= "
    "mx.arange({c}.offset + {h}.shape[1])[None])",
    same=True,
)
_made(
    "mask-ranges-strict",
    "the mask of ranges hides a token from itself",
    "(mx.arange({c}.offset, {c}.offset + {h}.shape[1])[:, None] + 1 > "
    "1 + mx.maximum(mx.arange({c}.offset + {h}.shape[1])[None] - 1, 0))",
)
_made(
    "mask-chunked",
    "a mask of chunks of four positions",
    "((lambda rows, keys: (keys // 4 == rows // 4) & (keys <= rows))"
    "(mx.arange({c}.offset, {c}.offset + {h}.shape[1])[:, None], "
    "mx.arange({c}.offset + {h}.shape[1])[None]))",
)
_made(
    "mask-all",
    "every token sees every other",
    "mx.ones(({h}.shape[1], {c}.offset + {h}.shape[1]), dtype=mx.bool_)",
)
_made(
    "mask-make",
    "the mask is made by the cache",
    "{c}.make_mask({h}.shape[1], return_array=False, window_size=None)",
)
_made(
    "mask-make-window",
    "the mask is made by the cache, with a window of two",
    "{c}.make_mask({h}.shape[1], return_array=True, window_size=2)",
)
_made("state-mask-none", "no mask of states is made", "None", state=True)
_made(
    "state-mask-ones",
    "the mask of states lets all through",
    "mx.ones({h}.shape[:2], dtype=mx.bool_)",
    same=True,
    state=True,
)
_made(
    "state-mask-first",
    "the mask of states hides the first token",
    "(mx.arange({h}.shape[1]) > 0)[None]",
    state=True,
)


@operator("mask-window-changed", "the window of a mask is one wider")
def _wider(file: File) -> Iterator[Change]:
    for call in file.masks:
        for keyword in call.keywords:
            if keyword.arg == "window_size":
                text = f"({file.code(keyword.value)}) + 1"
                yield file.change(file.put(keyword.value, text), where=call)
                text = f"({file.code(keyword.value)}) - 1"
                yield file.change(file.put(keyword.value, text), where=call)
                yield file.change(file.put(keyword.value, "None"), where=call)
                text = f"({file.code(keyword.value)}) * {file.code(call.args[0])}.shape[1]"
                yield file.change(file.put(keyword.value, text), where=call)


@operator("mask-of-other-cache", "the mask is made from another layer's cache")
def _other(file: File) -> Iterator[Change]:
    for call in file.masks:
        for argument in call.args[1:]:
            if isinstance(argument, ast.Subscript):
                for index in ("0", "-1", "1"):
                    text = f"{file.code(argument.value)}[{index}]"
                    if text != file.code(argument):
                        yield file.change(file.put(argument, text), where=call)


@operator("masks-swapped", "two masks change places")
def _swapped(file: File) -> Iterator[Change]:
    for function, _ in file.backbones:
        calls = [c for c in file.masks if file.above(c, ast.FunctionDef) is function]
        if len(calls) == 2:
            yield file.change(*file.swap(*calls), where=calls[0])


@operator("masks-joined", "one mask serves where two did")
def _joined(file: File) -> Iterator[Change]:
    for function, _ in file.backbones:
        calls = [c for c in file.masks if file.above(c, ast.FunctionDef) is function]
        if len(calls) == 2:
            for one, two in (calls, calls[::-1]):
                yield file.change(file.put(one, file.code(two)), where=one)


@operator("mask-changed-later", "the mask is changed after it was made")
def _later(file: File) -> Iterator[Change]:
    for call in file.masks:
        statement = file.statement(call)
        if not isinstance(statement, ast.Assign) or statement.value is not call:
            continue
        name = file.code(statement.targets[0])
        lines = (
            f"if {name} is not None and not isinstance({name}, str):\n"
            f"    {name} = {name} & (mx.arange({name}.shape[-1]) != 1)"
        )
        yield file.change(file.after(statement, lines), where=call)
        yield file.change(file.after(statement, f"{name} = None"), where=call)
        lines = f"if {file.code(call.args[0])}.shape[1] == 1:\n    {name} = None"
        yield file.change(file.after(statement, lines), where=call)


@operator("mask-branch", "hidden states are scaled where there is no mask")
def _branch(file: File) -> Iterator[Change]:
    for call in file.masks:
        statement = file.statement(call)
        if not isinstance(statement, ast.Assign) or statement.value is not call:
            continue
        name, hidden = file.code(statement.targets[0]), file.code(call.args[0])
        if isinstance(call.args[0], ast.Name):
            lines = f"if {name} is None:\n    {hidden} = {hidden} * 1.5"
            yield file.change(file.after(statement, lines), where=call)
            lines = f"if isinstance({name}, str):\n    {hidden} = {hidden} * 1.5"
            yield file.change(file.after(statement, lines), where=call)


@operator("mask-imported-elsewhere", "the mask is made by a function of another file")
def _elsewhere(file: File) -> Iterator[Change]:
    beside = (
        "from .base import *\n"
        "from .base import create_attention_mask as _inner\n\n\n"
        "def create_attention_mask(h, cache=None, window_size=None, return_array=False):\n"
        "    return _inner(h, cache, window_size=2, return_array=True)\n"
    )
    for node in file.tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "base" and file.masks:
            text = file.code(node).replace(".base", ".mutant_masks", 1)
            yield file.change(file.put(node, text), where=node, beside=[("mutant_masks", beside)])
