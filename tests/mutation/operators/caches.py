"""Changes of the cache list: which layer gets which cache, and what caches there are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from ..source import Change, File, called
from . import operator


def _loops(name: str, says: str, text: str, *, same: bool = False) -> None:
    """The list of caches that a loop over layers goes through becomes a text of {0}."""

    @operator(name, says, same=same)
    def apply(file: File) -> Iterator[Change]:
        for _, loop in file.backbones:
            for call in ast.walk(loop.iter):
                if not isinstance(call, ast.Call) or called(call) != "zip":
                    continue
                for argument in call.args[1:]:
                    code = file.code(argument)
                    if "cache" in code:
                        filled = text.replace("{0}", code)
                        yield file.change(file.put(argument, filled), where=loop)


_loops("caches-first", "every layer gets the first cache", "[{0}[0]] * len({0})")
_loops("caches-last", "every layer gets the last cache", "[{0}[-1]] * len({0})")
_loops("caches-reversed", "layers get the caches in reverse order", "{0}[::-1]")
_loops(
    "caches-reversed-call", "layers get the caches in reverse order, by reversed", "reversed({0})"
)
_loops("caches-rotated", "every layer gets the cache of the next", "({0}[1:] + {0}[:1])")
_loops("caches-shared", "two layers share a cache", "[{0}[i // 2] for i in range(len({0}))]")
_loops("caches-none", "layers get no cache", "[None] * len({0})")
_loops(
    "caches-some-none",
    "the second layer gets no cache",
    "[c if i != 1 else None for i, c in enumerate({0})]",
)
_loops("caches-listed", "the list of caches is copied", "list({0})", same=True)
_loops(
    "caches-comprehended",
    "the list of caches is copied by a comprehension",
    "[c for c in {0}]",
    same=True,
)
_loops("caches-iterated", "the list of caches is an iterator", "iter({0})", same=True)
_loops("caches-sorted", "caches are sorted by offset", "sorted({0}, key=lambda c: c.offset)")


@operator("layers-twice", "every layer runs twice")
def _layers_twice(file: File) -> Iterator[Change]:
    for _, loop in file.backbones:
        body = "\n".join(file.code(s) for s in loop.body)
        lines = "for _ in range(2):\n" + "\n".join(f"    {line}" for line in body.split("\n"))
        if len(loop.body) == 1 and "\n" not in body:
            indent = file.indent(loop.body[0])
            filled = lines.replace("\n", f"\n{indent}")
            yield file.change(file.put(loop.body[0], filled), where=loop)


@operator("layers-rounds", "all layers run twice, over the same caches")
def _layers_rounds(file: File) -> Iterator[Change]:
    for _, loop in file.backbones:
        if "zip(" in file.code(loop.iter) and "enumerate" not in file.code(loop.iter):
            text = f"list({file.code(loop.iter)}) * 2"
            yield file.change(file.put(loop.iter, text), where=loop)


@operator("layers-reversed", "layers run in reverse order with their caches")
def _layers_reversed(file: File) -> Iterator[Change]:
    for _, loop in file.backbones:
        text = f"reversed(list({file.code(loop.iter)}))"
        yield file.change(file.put(loop.iter, text), where=loop)


@operator("layers-early-exit", "single tokens leave after the second layer")
def _early_exit(file: File) -> Iterator[Change]:
    for _, loop in file.backbones:
        last = loop.body[-1]
        if isinstance(last, ast.Assign) and isinstance(last.targets[0], ast.Name):
            name = last.targets[0].id
            test = f"if {name}.shape[1] == 1:\n    break"
            yield file.change(file.after(last, test), where=loop)


@operator("layers-skipped-by-offset", "layers are skipped in the first chunk")
def _skipped(file: File) -> Iterator[Change]:
    for _, loop in file.backbones:
        names = [n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name)]
        cache = next((n for n in names if n in ("c", "cache", "layer_cache")), None)
        if cache is not None:
            lines = f"if {cache} is not None and {cache}.offset == 0 and False:\n    continue"
            yield file.change(file.before(loop.body[0], lines), where=loop)
            lines = f"if {cache} is not None and {cache}.offset == 0:\n    continue"
            yield file.change(file.before(loop.body[0], lines), where=loop)


@operator("layers-offset-scale", "hidden states are scaled by the layer's offset")
def _offset_scale(file: File) -> Iterator[Change]:
    for _, loop in file.backbones:
        names = [n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name)]
        cache = next((n for n in names if n in ("c", "cache", "layer_cache")), None)
        last = loop.body[-1]
        if cache and isinstance(last, ast.Assign) and isinstance(last.targets[0], ast.Name):
            name = last.targets[0].id
            lines = f"{name} = {name} * (1 + 0.01 * {cache}.offset)"
            yield file.change(file.after(last, lines), where=loop)
            yield file.change(file.before(loop.body[0], lines), where=loop)


def _rounds(name: str, says: str, text: str, *, end: bool = False, same: bool = False) -> None:
    """A loop over layers and their caches: a text of {layer}, {cache}, {h} and {layers} begins or
    ends every round."""

    @operator(name, says, same=same)
    def apply(file: File) -> Iterator[Change]:
        for function in file.forwards:
            for loop in (n for n in ast.walk(function) if isinstance(n, ast.For)):
                words = _words_of(file, loop)
                if words is not None:
                    lines = text.format(**words)
                    at = file.after(loop.body[-1], lines)
                    yield file.change(at if end else file.before(loop.body[0], lines), where=loop)


def _words_of(file: File, loop: ast.For) -> dict[str, str] | None:
    zipped = next(
        (n for n in ast.walk(loop.iter) if isinstance(n, ast.Call) and called(n) == "zip"), None
    )
    pair = next(
        (n for n in ast.walk(loop.target) if isinstance(n, ast.Tuple) and len(n.elts) > 1), None
    )
    stored = [
        target.id
        for n in ast.walk(loop)
        if isinstance(n, ast.Assign)
        for target in n.targets
        if isinstance(target, ast.Name) and isinstance(n.value, ast.Call)
    ]
    if zipped is None or pair is None or not stored or len(zipped.args) != len(pair.elts):
        return None
    parts = list(zip(zipped.args, pair.elts, strict=True))
    caches = [file.code(name) for given, name in parts if "cache" in file.code(given)]
    if len(caches) != 1 or "cache" in file.code(zipped.args[0]):
        return None
    layers, layer = map(file.code, parts[0])
    return {"layer": layer, "layers": layers, "cache": caches[0], "h": stored[-1]}


_FIRST, _LAST = "if {layer} is {layers}[0]:\n    ", "if {layer} is {layers}[-1]:\n    "
_WAVE = "mx.cos(mx.arange({h}.shape[1]) + mx.array({cache}.offset)[..., None])[..., None]"
_rounds("layers-first-left-out", "the first layer is left out", _FIRST + "continue")
_rounds("layers-last-left-out", "the last layer is left out", _LAST + "break")
_rounds("layers-first-uncached", "the first layer gets no cache", _FIRST + "{cache} = None")
_rounds("layers-last-uncached", "the last layer gets no cache", _LAST + "{cache} = None")
_rounds(
    "layers-wave",
    "hidden states are scaled by their positions, before each layer",
    "{h} = {h} * " + _WAVE,
    same=True,
)
_rounds(
    "layers-wave-behind",
    "hidden states are scaled by what a layer's cache says behind it",
    "{h} = {h} * " + _WAVE,
    end=True,
)


def _made(name: str, says: str, text: str, *, helpers: str = "", same: bool = False) -> None:
    """`make_cache` returns a text."""

    @operator(name, says, same=same)
    def apply(file: File) -> Iterator[Change]:
        entry = next((c for c in file.classes if c.name == "Model"), None)
        if entry is None or not file.method(entry, "__call__"):
            return
        own = file.method(entry, "make_cache")
        imports = "from .cache import KVCache, RotatingKVCache, ArraysCache\n"
        imports += "from .cache import ChunkedKVCache, QuantizedKVCache, ConcatenateKVCache\n"
        helper = imports + helpers
        if own is not None:
            if "{0}" not in text and "ArraysCache" in file.code(own):
                return
            returns = [n for n in ast.walk(own) if isinstance(n, ast.Return) and n.value]
            if "{0}" in text:
                splices = [
                    file.put(r.value, text.replace("{0}", f"({file.code(r.value)})"))
                    for r in returns
                ]
                yield file.change(*splices, where=own, helpers=helper)
            return
        if file.fetches or file.attends:
            filled = text.replace("{0}", "[KVCache() for _ in self.layers]")
            method = f"def make_cache(self):\n    return {filled}\n"
            first = entry.body[-1]
            yield file.change(file.after(first, "\n" + method), where=entry, helpers=helper)


_made("make-cache-own", "the model makes its caches itself", "{0}", same=True)
_made("make-cache-one", "one cache object for all layers", "[KVCache()] * len(self.layers)")
_made(
    "make-cache-aliased",
    "the second layer has the first one's cache",
    "(lambda made: made[:1] * 2 + made[2:])({0})",
)
_made(
    "make-cache-rotating",
    "caches keep four positions",
    "[RotatingKVCache(max_size=4) for _ in self.layers]",
)
_made(
    "make-cache-rotating-some",
    "every second cache keeps five positions",
    "[RotatingKVCache(max_size=5) if i % 2 else c for i, c in enumerate({0})]",
)
_made(
    "make-cache-keep",
    "caches keep the first position for ever",
    "[RotatingKVCache(max_size=5, keep=1) for _ in self.layers]",
)
_made(
    "make-cache-chunked",
    "caches keep chunks of four positions",
    "[ChunkedKVCache(4) for _ in self.layers]",
)
_made("make-cache-quantised", "caches are quantised", "[QuantizedKVCache() for _ in self.layers]")
_made(
    "make-cache-concatenated",
    "caches are concatenated",
    "[ConcatenateKVCache() for _ in self.layers]",
)
_made(
    "make-cache-subclass",
    "caches are of a class of the file",
    "[_Own() for _ in self.layers]",
    helpers="\n\nclass _Own(KVCache):\n    pass",
    same=True,
)
_made(
    "make-cache-overriding",
    "caches of a class of the file that scales keys",
    "[_Own() for _ in self.layers]",
    helpers="\n\nclass _Own(KVCache):\n    def update_and_fetch(self, keys, values):\n"
    "        return super().update_and_fetch(1.5 * keys, values)",
)
_made(
    "make-cache-shadowed",
    "a class of the file is called KVCache",
    "[KVCache() for _ in self.layers]",
    helpers="\n\nclass KVCache(KVCache):\n    def update_and_fetch(self, keys, values):\n"
    "        return super().update_and_fetch(1.5 * keys, values)",
)
_made(
    "make-cache-reassigned",
    "caches carry a method of the file",
    "[_patched(c) for c in {0}]",
    helpers="\n\ndef _patched(cache):\n    inner = cache.update_and_fetch\n"
    "    cache.update_and_fetch = lambda k, v: inner(1.5 * k, v)\n    return cache",
)
_made(
    "make-cache-offset",
    "caches start at position three",
    "[_late(c) for c in {0}]",
    helpers="\n\ndef _late(cache):\n    cache.base = 3\n    return cache",
    same=True,
)
_made("make-cache-tuple", "caches are a tuple", "tuple({0})")
_made(
    "make-cache-filled",
    "caches start with something in them",
    "[_filled(c) for c in {0}]",
    helpers="\n\ndef _filled(cache):\n    cache.keys = None\n    cache.started = True\n"
    "    return cache",
    same=True,
)


@operator("state-index", "another element of a state is read or written")
def _state_index(file: File) -> Iterator[Change]:
    for cls in file.mixers:
        for node in ast.walk(cls):
            if (
                isinstance(node, ast.Subscript)
                and isinstance(node.value, ast.Name)
                and "cache" in node.value.id
                and isinstance(node.slice, ast.Constant)
                and node.slice.value in (0, 1)
            ):
                yield file.change(file.put(node.slice, str(1 - node.slice.value)), where=node)


@operator("state-store-dropped", "a state is not stored")
def _state_dropped(file: File) -> Iterator[Change]:
    for cls in file.mixers:
        for node in ast.walk(cls):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
                if "cache" in file.code(node.targets[0].value):
                    yield file.change(file.put(node, "pass"), where=node)


@operator("state-store-scaled", "a state is stored scaled")
def _state_scaled(file: File) -> Iterator[Change]:
    for cls in file.mixers:
        for node in ast.walk(cls):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
                if "cache" in file.code(node.targets[0].value):
                    text = f"0.5 * ({file.code(node.value)})"
                    yield file.change(file.put(node.value, text), where=node)


@operator("state-slice", "another stretch of tokens is kept as state")
def _state_slice(file: File) -> Iterator[Change]:
    for cls in file.mixers:
        for node in ast.walk(cls):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
                code = file.code(node.value)
                moved = re.sub(r"\[:, -\(?", lambda m: m.group() + "1 + ", code)
                if "cache" in file.code(node.targets[0].value) and moved != code:
                    yield file.change(file.put(node.value, moved), where=node)


@operator("state-advance", "the state's count of tokens is not moved on")
def _advance(file: File) -> Iterator[Change]:
    for call in file.nodes(ast.Call):
        if called(call) == "advance":
            yield file.change(file.put(file.statement(call), "pass"), where=call)
