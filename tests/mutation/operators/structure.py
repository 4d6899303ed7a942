"""The same computation in another form, and forms that hide a change: classes, imports, names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from ..source import Change, File, called
from . import operator


def _decorated(name: str, says: str, helper: str, *, same: bool = False) -> None:
    """A decorator on forwards of mixers, layers and feed-forward classes."""

    @operator(name, says, same=same)
    def apply(file: File) -> Iterator[Change]:
        for cls in file.classes:
            forward = file.method(cls, "__call__")
            if forward is not None and not forward.decorator_list:
                mark = file.before(forward, "@_decorator")
                yield file.change(mark, where=forward, helpers=helper)


_WRAPS = """
import functools as _functools


def _decorator(method):
    @_functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        return {}

    return wrapped
"""
_CHANGED = "{0} if isinstance(result, mx.array) else result"
_decorated(
    "decorator-identity",
    "a decorator that returns the method",
    "def _decorator(method):\n    return method",
    same=True,
)
_decorated(
    "decorator-wraps", "a decorator that calls the method", _WRAPS.format("result"), same=True
)
_decorated(
    "decorator-scaled",
    "a decorator that scales results",
    _WRAPS.format(_CHANGED.format("1.25 * result")),
    same=True,
)
_decorated(
    "decorator-mixing",
    "a decorator that adds up results over tokens",
    _WRAPS.format(_CHANGED.format("mx.cumsum(result, axis=1)")),
)
_decorated(
    "decorator-batch",
    "a decorator that centres results over sequences",
    _WRAPS.format(_CHANGED.format("result - 0.5 * result.mean(0, keepdims=True)")),
)
_decorated(
    "decorator-cached",
    "a decorator that keeps the first result",
    "def _decorator(method):\n    seen = {}\n\n    def wrapped(self, *args, **kwargs):\n"
    "        result = method(self, *args, **kwargs)\n"
    "        seen.setdefault(id(self), 0)\n        seen[id(self)] += 1\n"
    "        scale = 1 + 0.1 * seen[id(self)]\n"
    "        return scale * result if isinstance(result, mx.array) else result\n\n"
    "    return wrapped",
)


def _subclassed(name: str, says: str, body: str, *, same: bool = False) -> None:
    """A class derived from {name} takes its place wherever it is constructed."""

    @operator(name, says, same=same)
    def apply(file: File) -> Iterator[Change]:
        for cls in file.classes:
            if file.method(cls, "__call__") is None or cls.name == "Model":
                continue
            uses = [
                node
                for _, init in file.constructors
                for node in ast.walk(init)
                if isinstance(node, ast.Call) and called(node) == cls.name
            ]
            if not uses:
                continue
            text = f"\n\nclass {cls.name}Changed({cls.name}):\n" + "\n".join(
                f"    {line}" if line else "" for line in body.split("\n")
            )
            after = file.after(cls, text)
            splices = [file.put(node.func, f"{cls.name}Changed") for node in uses]
            yield file.change(after, *splices, where=cls)


_SUPER = "def __call__(self, *args, **kwargs):\n    result = super().__call__(*args, **kwargs)\n"
_CHOSEN = "    return {} if isinstance(result, mx.array) else result"
_subclassed("subclass-empty", "a subclass without anything of its own", "pass", same=True)
_subclassed(
    "subclass-super", "a subclass that calls its base", _SUPER + "    return result", same=True
)
_subclassed(
    "subclass-scaled",
    "a subclass that scales results",
    _SUPER + _CHOSEN.format("1.25 * result"),
    same=True,
)
_subclassed(
    "subclass-mixing",
    "a subclass that adds up results over tokens",
    _SUPER + _CHOSEN.format("mx.cumsum(result, axis=1)"),
)
_subclassed(
    "subclass-shifted",
    "a subclass that moves its input on by a token",
    "def __call__(self, x, *args, **kwargs):\n"
    "    x = mx.concatenate([x[:, :1], x[:, :-1]], axis=1)\n"
    "    return super().__call__(x, *args, **kwargs)",
)
_subclassed(
    "subclass-last",
    "a subclass that adds the last token",
    "def __call__(self, x, *args, **kwargs):\n"
    "    return super().__call__(x + x[:, -1:], *args, **kwargs)",
)
_subclassed(
    "subclass-counting",
    "a subclass that counts its calls",
    "calls = 0\n\ndef __call__(self, *args, **kwargs):\n"
    "    type(self).calls += 1\n    result = super().__call__(*args, **kwargs)\n"
    + _CHOSEN.format("result * (1 + 0.1 * type(self).calls)"),
)
_subclassed(
    "subclass-property",
    "a subclass with a property in place of an attribute",
    "@property\ndef changed(self):\n    return 1.5\n\n"
    "def __call__(self, *args, **kwargs):\n    result = super().__call__(*args, **kwargs)\n"
    + _CHOSEN.format("self.changed * result"),
    same=True,
)


@operator("inherited-scale", "a subclass sets another scale")
def _inherited_scale(file: File) -> Iterator[Change]:
    for cls in file.mixers:
        init = file.method(cls, "__init__")
        if init is None or "self.scale" not in file.code(init):
            continue
        uses = [
            node
            for _, other in file.constructors
            for node in ast.walk(other)
            if isinstance(node, ast.Call) and called(node) == cls.name
        ]
        text = (
            f"\n\nclass {cls.name}Changed({cls.name}):\n"
            "    def __init__(self, *args, **kwargs):\n"
            "        super().__init__(*args, **kwargs)\n"
            "        self.scale = 1.5 * self.scale"
        )
        splices = [file.put(node.func, f"{cls.name}Changed") for node in uses]
        yield file.change(file.after(cls, text), *splices, where=cls)


@operator("split-base", "the constructor moves to a base class", same=True)
def _split_base(file: File) -> Iterator[Change]:
    for cls in file.classes:
        init = file.method(cls, "__init__")
        forward = file.method(cls, "__call__")
        if init is None or forward is None or "super().__init__()" not in file.code(init):
            continue
        bases = ", ".join(file.code(b) for b in cls.bases)
        indent = file.indent(init)
        text = f"class _{cls.name}Base({bases}):\n{indent}{file.code(init)}\n\n"
        opened = f"class {cls.name}(_{cls.name}Base):"
        line = file.data[file.start(cls) :].split(b"\n", 1)[0].decode()
        if not line.endswith(":") or cls.decorator_list:
            continue
        splices = (
            file.put(init, "pass"),
            _at(file, file.start(cls), len(line.encode()), text + "\n" + opened),
        )
        yield file.change(*splices, where=cls)


def _at(file: File, start: int, length: int, text: str):  # type: ignore[no-untyped-def]
    from ..source import Splice

    return Splice(start, start + length, text)


@operator("split-file", "a class moves to a file beside", same=True)
def _split_file(file: File) -> Iterator[Change]:
    imports = "\n".join(
        file.code(n) for n in file.tree.body if isinstance(n, ast.Import | ast.ImportFrom)
    )
    defined = {n.name: n for n in file.tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    assigned = {
        t.id
        for n in file.tree.body
        if isinstance(n, ast.Assign)
        for t in n.targets
        if isinstance(t, ast.Name)
    }
    for cls in file.classes:
        used = {n.id for n in ast.walk(cls) if isinstance(n, ast.Name)}
        if used & (set(defined) | assigned) - {cls.name} or cls.decorator_list:
            continue
        if file.method(cls, "__call__") is None:
            continue
        beside = f"{imports}\n\n\n{file.code(cls)}\n"
        text = f"from .mutant_part import {cls.name}"
        yield file.change(file.put(cls, text), where=cls, beside=[("mutant_part", beside)])


@operator("split-file-annotated", "attention moves to a file beside", same=True)
def _split_mixer(file: File) -> Iterator[Change]:
    """As `split-file`, for classes that use the file's arguments in annotations only."""
    imports = "\n".join(
        file.code(n) for n in file.tree.body if isinstance(n, ast.Import | ast.ImportFrom)
    )
    names = {n.name for n in file.tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    for cls in file.mixers:
        annotated = {
            n.id
            for node in ast.walk(cls)
            if isinstance(node, ast.arg) and node.annotation is not None
            for n in ast.walk(node.annotation)
            if isinstance(n, ast.Name)
        }
        code = file.code(cls)
        used = {n.id for n in ast.walk(cls) if isinstance(n, ast.Name)}
        if (used & names) - annotated - {cls.name} or cls.decorator_list:
            continue
        beside = f"from __future__ import annotations\n\n{imports}\n\n\n{code}\n"
        text = f"from .mutant_part import {cls.name}"
        yield file.change(file.put(cls, text), where=cls, beside=[("mutant_part", beside)])


def _imports(name: str, says: str, opening: str, callee: str) -> None:
    """Functions of mlx_lm's base are reached through another import."""

    @operator(name, says, same=True)
    def apply(file: File) -> Iterator[Change]:
        calls = [a.call for a in file.attends] + file.masks
        for node in file.tree.body:
            if not isinstance(node, ast.ImportFrom) or node.module != "base" or not node.level:
                continue
            plain = [a.name for a in node.names if a.asname is None]
            targets = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id in plain]
            if targets:
                splices = [
                    file.put(c.func, callee.replace("{0}", file.code(c.func))) for c in targets
                ]
                extra = file.after(node, opening)
                yield file.change(extra, *splices, where=node)


_imports("import-module", "base is imported as a module", "from . import base", "base.{0}")
_imports(
    "import-module-alias", "base is imported under another name", "from . import base as b", "b.{0}"
)
_imports(
    "import-absolute",
    "base is imported by its full name",
    "import mlx_lm.models.base as b",
    "b.{0}",
)
_imports(
    "import-dotted",
    "base is reached through the package",
    "import mlx_lm.models.base",
    "mlx_lm.models.base.{0}",
)
_imports(
    "import-dynamic",
    "base is imported at run time",
    "import importlib\nb = importlib.import_module('mlx_lm.models.base')",
    "b.{0}",
)


@operator("import-star", "everything of base is imported", same=True)
def _star(file: File) -> Iterator[Change]:
    for node in file.tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "base" and node.level:
            if all(a.asname is None for a in node.names):
                text = "from .base import *"
                yield file.change(file.put(node, text), where=node)
                text = "from mlx_lm.models.base import *"
                yield file.change(file.put(node, text), where=node)


@operator("import-renamed", "functions of base have other names", same=True)
def _renamed(file: File) -> Iterator[Change]:
    for node in file.tree.body:
        if not isinstance(node, ast.ImportFrom) or node.module != "base" or not node.level:
            continue
        for alias in node.names:
            uses = [
                n for n in ast.walk(file.tree) if isinstance(n, ast.Name) and n.id == alias.name
            ]
            if uses and alias.asname is None:
                splices = [file.put(n, f"_{alias.name}_9") for n in uses]
                text = f"{alias.name} as _{alias.name}_9"
                yield file.change(file.put(alias, text), *splices, where=node)


@operator("import-inside", "functions of base are imported inside a method", same=True)
def _inside(file: File) -> Iterator[Change]:
    for attend in file.attends:
        function = file.above(attend.call, ast.FunctionDef)
        if function is not None:
            text = "from .base import scaled_dot_product_attention"
            yield file.change(file.before(function.body[0], text), where=function)


@operator("import-inside-other", "another function is imported inside a method")
def _inside_other(file: File) -> Iterator[Change]:
    for attend in file.attends:
        function = file.above(attend.call, ast.FunctionDef)
        if function is not None:
            text = "from .mutant_inside import scaled_dot_product_attention"
            beside = (
                "from .base import scaled_dot_product_attention as _inner\n\n\n"
                "def scaled_dot_product_attention(*args, **kwargs):\n"
                "    return 1.5 * _inner(*args, **kwargs)\n"
            )
            yield file.change(
                file.before(function.body[0], text),
                where=function,
                beside=[("mutant_inside", beside)],
            )


def _at_end(name: str, says: str, text: str, *, same: bool = False) -> None:
    """Lines at the end of the file, of {c} a class with a forward."""

    @operator(name, says, same=same)
    def apply(file: File) -> Iterator[Change]:
        for cls in file.classes:
            forward = file.method(cls, "__call__")
            if forward is None:
                continue
            end = len(file.data)
            from ..source import Splice

            filled = text.replace("{c}", cls.name)
            yield file.change(Splice(end, end, f"\n\n{filled}\n"), where=cls)


_at_end(
    "patched-forward",
    "a forward is replaced at the end of the file",
    "_original = {c}.__call__\n\n\ndef _replaced(self, *args, **kwargs):\n"
    "    result = _original(self, *args, **kwargs)\n"
    "    return 1.25 * result if isinstance(result, mx.array) else result\n\n\n"
    "{c}.__call__ = _replaced",
)
_at_end(
    "patched-forward-mixing",
    "a forward that mixes tokens is put in at the end of the file",
    "_original = {c}.__call__\n\n\ndef _replaced(self, *args, **kwargs):\n"
    "    result = _original(self, *args, **kwargs)\n"
    "    return mx.cumsum(result, axis=1) if isinstance(result, mx.array) else result\n\n\n"
    "{c}.__call__ = _replaced",
)
_at_end(
    "patched-setattr",
    "a forward is replaced by setattr",
    "setattr({c}, '__call__', (lambda inner: lambda self, x, *a, **k: "
    "inner(self, x[:, ::-1], *a, **k))({c}.__call__))",
)
_at_end(
    "redefined-class", "a class is defined again", "class _Old({c}):\n    pass\n\n\n_Kept = {c}"
)
_at_end(
    "redefined-deriving",
    "a class of the same name derives from the first",
    "class {c}({c}):\n    def __call__(self, *args, **kwargs):\n"
    "        result = super().__call__(*args, **kwargs)\n"
    "        return 1.25 * result if isinstance(result, mx.array) else result",
)
_at_end(
    "redefined-method",
    "a method is defined outside and put in",
    "def _call(self, *args, **kwargs):\n    return {c}._forward(self, *args, **kwargs)\n\n\n"
    "{c}._forward = {c}.__call__\n{c}.__call__ = _call",
    same=True,
)


@operator("forward-renamed", "the forward calls a method of another name", same=True)
def _forward_renamed(file: File) -> Iterator[Change]:
    for cls in file.classes:
        forward = file.method(cls, "__call__")
        if forward is None or forward.decorator_list:
            continue
        code = file.code(forward)
        text = re.sub(r"^def __call__", "def forward", code)
        indent = file.indent(forward)
        text += (
            f"\n\n{indent}def __call__(self, *args, **kwargs):\n"
            f"{indent}    return self.forward(*args, **kwargs)"
        )
        yield file.change(file.put(forward, text), where=forward)


@operator("forward-assigned", "the forward is a method of another name, assigned", same=True)
def _forward_assigned(file: File) -> Iterator[Change]:
    for cls in file.classes:
        forward = file.method(cls, "__call__")
        if forward is None or forward.decorator_list:
            continue
        text = re.sub(r"^def __call__", "def forward", file.code(forward))
        indent = file.indent(forward)
        yield file.change(file.put(forward, f"{text}\n\n{indent}__call__ = forward"), where=forward)


@operator("overridden-twice", "a second definition of the forward follows")
def _overridden(file: File) -> Iterator[Change]:
    for cls in file.mixers + [c for c in file.classes if "MLP" in c.name]:
        forward = file.method(cls, "__call__")
        if forward is None or forward.decorator_list:
            continue
        hidden = file.hidden_name(forward)
        if hidden is None:
            continue
        code, indent = file.code(forward), file.indent(forward)
        second = code.replace(f"({hidden})", f"({hidden}[:, ::-1])", 1)
        if second != code:
            yield file.change(file.put(forward, f"{code}\n\n{indent}{second}"), where=forward)


@operator("helper-method", "attention moves to a method", same=True)
def _helper_method(file: File) -> Iterator[Change]:
    for attend in file.attends:
        cls = file.above(attend.call, ast.ClassDef)
        function = file.above(attend.call, ast.FunctionDef)
        if cls is None or function is None:
            continue
        call = file.code(attend.call)
        inside = call[call.index("(") + 1 : -1]
        indent = file.indent(function)
        method = (
            "def _attend(self, *args, **kwargs):\n"
            "    return scaled_dot_product_attention(*args, **kwargs)\n"
        )
        splices = (
            file.before(function, method),
            file.put(attend.call, f"self._attend({inside})"),
        )
        yield file.change(*splices, where=attend.call)
        method = (
            "def _attend(self, queries, keys, values, cache=None, scale=None, mask=None, **kw):\n"
            "    return scaled_dot_product_attention(\n"
            "        queries, keys, values, cache=cache, scale=scale, mask=mask, **kw\n"
            "    )\n"
        )
        splices = (
            file.before(function, method),
            file.put(attend.call, f"self._attend({inside})"),
        )
        yield file.change(*splices, where=attend.call)
        del indent


@operator("module-counter", "a global counts calls")
def _module_counter(file: File) -> Iterator[Change]:
    helper = "_CALLS = [0]"
    for function in file.layers:
        hidden = file.hidden_name(function)
        if hidden is not None:
            lines = f"_CALLS[0] += 1\n{hidden} = {hidden} * (1 + 0.01 * _CALLS[0])"
            yield file.change(file.before(function.body[0], lines), where=function, helpers=helper)


@operator("module-global", "a global keeps the last hidden states")
def _module_global(file: File) -> Iterator[Change]:
    helper = "_LAST = None"
    for function in file.layers:
        hidden = file.hidden_name(function)
        if hidden is not None:
            lines = (
                f"global _LAST\n{hidden} = {hidden} if _LAST is None else {hidden} + 0.1 * _LAST\n"
                f"_LAST = {hidden}[:, -1:]"
            )
            yield file.change(file.before(function.body[0], lines), where=function, helpers=helper)


@operator("default-kept", "a default argument keeps the last hidden states")
def _default_kept(file: File) -> Iterator[Change]:
    helper = (
        "def _kept(t, held=[]):\n    held.append(t[:, -1:])\n"
        "    return t + 0.1 * held[-2] if len(held) > 1 else t"
    )
    for point in file.points:
        if point.kind in ("mlp-input", "mixer-input"):
            text = f"_kept({file.code(point.node)})"
            yield file.change(file.put(point.node, text), where=point.node, helpers=helper)


@operator("layers-shadowed", "a name of mlx means something else in a method")
def _shadowed(file: File) -> Iterator[Change]:
    for function in file.layers:
        hidden = file.hidden_name(function)
        if hidden is None:
            continue
        helper = (
            "class _Other:\n    @staticmethod\n    def tanh(t):\n"
            "        return mx.cumsum(t, axis=1)"
        )
        lines = f"_mx = _Other\n{hidden} = _mx.tanh({hidden})"
        yield file.change(file.before(function.body[0], lines), where=function, helpers=helper)
        helper = "tanh = mx.tanh\ntanh = lambda t: mx.cumsum(t, axis=1)"
        lines = f"{hidden} = tanh({hidden})"
        yield file.change(file.before(function.body[0], lines), where=function, helpers=helper)


@operator("module-attribute", "a parameterless module that mixes tokens")
def _module_attribute(file: File) -> Iterator[Change]:
    helper = (
        "class _Mixes(nn.Module):\n    def __call__(self, t):\n"
        "        return t + t.mean(axis=1, keepdims=True)\n\n\n"
        "class _Alone(nn.Module):\n    def __call__(self, t):\n        return 1.5 * t\n"
    )
    for cls, init in file.constructors:
        forward = file.method(cls, "__call__")
        if forward is None or forward not in file.layers:
            continue
        hidden = file.hidden_name(forward)
        for made in (
            "_Mixes()",
            "nn.Sequential(_Alone(), _Mixes())",
            "nn.AvgPool1d(1)",
            "nn.BatchNorm(1)",
            "nn.InstanceNorm(1)",
        ):
            splices = (
                file.after(init.body[-1], f"self._extra = {made}"),
                file.before(forward.body[0], f"{hidden} = self._extra({hidden})"),
            )
            yield file.change(*splices, where=forward, helpers=helper)


@operator("module-attribute-alone", "a parameterless module for each token alone", same=True)
def _module_alone(file: File) -> Iterator[Change]:
    helper = "class _Alone(nn.Module):\n    def __call__(self, t):\n        return 1.5 * t\n"
    for cls, init in file.constructors:
        forward = file.method(cls, "__call__")
        if forward is None or forward not in file.layers:
            continue
        hidden = file.hidden_name(forward)
        for made in (
            "_Alone()",
            "nn.Sequential(_Alone(), nn.GELU())",
            "nn.Identity()",
            "nn.Dropout(0.1)",
            "[_Alone()][0]",
        ):
            splices = (
                file.after(init.body[-1], f"self._extra = {made}"),
                file.before(forward.body[0], f"{hidden} = self._extra({hidden})"),
            )
            yield file.change(*splices, where=forward, helpers=helper)
