"""A model file as operators see it: its text, its syntax, and places in both.

Changes are splices of the text, found through `ast`. That is another parser than the compiler's,
so a mistake in reading a file is not made twice.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

Node = TypeVar("Node", bound=ast.AST)
Callable_ = ast.FunctionDef

ATTENTION = "scaled_dot_product_attention"
_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "ff", "shared_mlp")
_MIXERS = (
    "self_attn attention attn mixer linear_attn mamba temporal_block token_mixer temporal "
    "short_conv self_attention"
).split()
_EMBEDDINGS = ("embed_tokens wte word_embeddings embeddings tok_embeddings embed_in wpe").split()
_LAST_NORMS = ["norm", "ln_f", "norm_f", "final_layernorm", "final_norm", "out_norm", "model_norm"]
_HEADS = ["lm_head", "as_linear", "output", "embed_out", "ff_out", "unembed", "head"]


@dataclass(frozen=True)
class Splice:
    """Bytes `start` up to `end` become `text`."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Change:
    """One mutant: splices of the file, functions put before its first class, files beside it."""

    splices: tuple[Splice, ...]
    where: str = ""
    helpers: str = ""
    beside: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Attend:
    """A call of the fused attention function and its arguments by role."""

    call: ast.Call
    queries: ast.expr
    keys: ast.expr
    values: ast.expr
    named: dict[str, ast.expr]


@dataclass(frozen=True)
class Fetch:
    """`keys, values = cache.update_and_fetch(k, v)`: the statement, its call, both name pairs."""

    statement: ast.Assign
    call: ast.Call
    cache: str
    targets: tuple[str, str]
    arguments: tuple[str, str]


@dataclass(frozen=True)
class Point:
    """An expression with hidden states [B, L, D], called by where in a model it stands."""

    kind: str
    node: ast.expr


@dataclass
class File:
    """One module of mlx_lm. `name` is its last part."""

    name: str
    text: str
    data: bytes = field(init=False)
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        self.data = self.text.encode()
        self.tree = ast.parse(self.text)

    # ------------------------------------------------------------------ places

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for line in self.data.split(b"\n"):
            starts.append(starts[-1] + len(line) + 1)
        return starts

    @cached_property
    def _parents(self) -> dict[ast.AST, ast.AST]:
        return {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    def start(self, node: ast.AST) -> int:
        return self._starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def end(self, node: ast.AST) -> int:
        return self._starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def code(self, node: ast.AST) -> str:
        return self.data[self.start(node) : self.end(node)].decode()

    def above(self, node: ast.AST, kind: type[Node]) -> Node | None:
        """The innermost node of a kind around a node."""
        current = self._parents.get(node)
        while current is not None and not isinstance(current, kind):
            current = self._parents.get(current)
        return current

    def statement(self, node: ast.AST) -> ast.stmt:
        current: ast.AST = node
        while not isinstance(current, ast.stmt):
            current = self._parents[current]
        return current

    def indent(self, node: ast.AST) -> str:
        line = self.data[self._starts[node.lineno - 1] :]  # type: ignore[attr-defined]
        return line[: len(line) - len(line.lstrip(b" "))].decode()

    # ------------------------------------------------------------------ splices

    def put(self, node: ast.AST, text: str) -> Splice:
        return Splice(self.start(node), self.end(node), text)

    def swap(self, one: ast.AST, two: ast.AST) -> tuple[Splice, Splice]:
        return self.put(one, self.code(two)), self.put(two, self.code(one))

    def before(self, statement: ast.AST, lines: str) -> Splice:
        """Lines in front of a statement, at its indentation."""
        indent = self.indent(statement)
        at = self._starts[statement.lineno - 1]  # type: ignore[attr-defined]
        if isinstance(statement, ast.FunctionDef | ast.ClassDef) and statement.decorator_list:
            at = self._starts[statement.decorator_list[0].lineno - 1]
        return Splice(at, at, "".join(f"{indent}{line}\n" for line in lines.split("\n")))

    def after(self, statement: ast.AST, lines: str) -> Splice:
        indent = self.indent(statement)
        at = self._starts[statement.end_lineno]  # type: ignore[attr-defined]
        return Splice(at, at, "".join(f"{indent}{line}\n" for line in lines.split("\n")))

    def add_argument(self, call: ast.Call, text: str) -> Splice:
        at = self.end(call) - 1
        said = self.data[:at].rstrip()
        comma = "" if said.endswith((b",", b"(")) else ", "
        return Splice(at, at, comma + text)

    def change(
        self,
        *splices: Splice,
        where: ast.AST | str = "",
        helpers: str = "",
        beside: Iterable[tuple[str, str]] = (),
    ) -> Change:
        if isinstance(where, ast.AST):
            where = self.scope(where)
        return Change(splices, where, helpers, tuple(beside))

    def scope(self, node: ast.AST) -> str:
        """`Class.method:line`."""
        names = []
        current: ast.AST | None = node
        while current is not None:
            if isinstance(current, ast.FunctionDef | ast.ClassDef):
                names.insert(0, current.name)
            current = self._parents.get(current)
        return f"{'.'.join(names)}:{node.lineno}"  # type: ignore[attr-defined]

    def apply(self, change: Change) -> str:
        """The changed text.

        Raises:
            ValueError: the splices overlap.
        """
        splices = list(change.splices)
        if change.helpers:
            first = next(n for n in self.tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef))
            splices.append(self.before(first, change.helpers.strip("\n") + "\n\n"))
        data, last = self.data, len(self.data) + 1
        for splice in sorted(splices, key=lambda s: (s.start, s.end), reverse=True):
            if splice.end > last:
                raise ValueError(f"splices overlap at byte {splice.start} of {self.name}")
            data = data[: splice.start] + splice.text.encode() + data[splice.end :]
            last = splice.start
        return data.decode()

    # ------------------------------------------------------------------ structure

    @cached_property
    def classes(self) -> list[ast.ClassDef]:
        return [node for node in self.tree.body if isinstance(node, ast.ClassDef)]

    def method(self, cls: ast.ClassDef, name: str) -> ast.FunctionDef | None:
        found = [n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == name]
        return found[-1] if found else None

    @cached_property
    def forwards(self) -> list[ast.FunctionDef]:
        """Every method and function that a forward pass may run."""
        quiet = {"__init__", "sanitize", "make_cache", "shard", "__post_init__", "from_dict"}
        found = [n for n in self.tree.body if isinstance(n, ast.FunctionDef)]
        for cls in self.classes:
            found += [n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name not in quiet]
        return [
            f
            for f in found
            if not any(isinstance(d, ast.Name) and d.id == "property" for d in f.decorator_list)
        ]

    def nodes(self, kind: type[Node]) -> Iterator[Node]:
        """Nodes of a kind inside forwards."""
        for function in self.forwards:
            for node in ast.walk(function):
                if isinstance(node, kind):
                    yield node

    @cached_property
    def mixers(self) -> list[ast.ClassDef]:
        """Classes that attend, fetch, or keep state in a cache."""
        return [cls for cls in self.classes if any(self._mixes(node) for node in ast.walk(cls))]

    def _mixes(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Call):
            return called(node) in (ATTENTION, "update_and_fetch")
        if isinstance(node, ast.Assign):
            return any(
                isinstance(t, ast.Subscript)
                and isinstance(t.value, ast.Name)
                and "cache" in t.value.id
                for t in node.targets
            )
        return False

    @cached_property
    def layers(self) -> list[ast.FunctionDef]:
        """Forwards of decoder layers: they call a mixer and hand it a cache."""
        found = []
        for cls in self.classes:
            forward = self.method(cls, "__call__")
            if forward is None or cls in self.mixers:
                continue
            if any(
                isinstance(n, ast.Call)
                and called(n) in _MIXERS
                and isinstance(n.func, ast.Attribute)
                for n in ast.walk(forward)
            ):
                found.append(forward)
        return found

    @cached_property
    def backbones(self) -> list[tuple[ast.FunctionDef, ast.For]]:
        """Forwards with a loop over layers, and the loop."""
        found = []
        for function in self.forwards:
            for node in ast.walk(function):
                if isinstance(node, ast.For) and "layers" in self.code(node.iter):
                    found.append((function, node))
        return found

    @cached_property
    def attends(self) -> list[Attend]:
        found = []
        for call in self.nodes(ast.Call):
            if called(call) != ATTENTION or len(call.args) < 3:
                continue
            if any(isinstance(argument, ast.Starred) for argument in call.args):
                continue
            order = ("cache", "scale", "mask", "sinks")
            named = dict(zip(order, call.args[3:], strict=False))
            named |= {k.arg: k.value for k in call.keywords if k.arg is not None}
            found.append(Attend(call, *call.args[:3], named))
        return found

    @cached_property
    def fetches(self) -> list[Fetch]:
        found = []
        for node in self.nodes(ast.Assign):
            call = node.value
            if not isinstance(call, ast.Call) or called(call) != "update_and_fetch":
                continue
            target = node.targets[0]
            if not isinstance(target, ast.Tuple) or len(call.args) != 2:
                continue
            assert isinstance(call.func, ast.Attribute)
            left, right = (self.code(part) for part in target.elts)
            one, two = (self.code(part) for part in call.args)
            found.append(Fetch(node, call, self.code(call.func.value), (left, right), (one, two)))
        return found

    @cached_property
    def ropes(self) -> list[ast.Call]:
        """Calls with `offset=`."""
        return [
            call
            for call in self.nodes(ast.Call)
            if any(k.arg == "offset" for k in call.keywords) and call.args
        ]

    @cached_property
    def masks(self) -> list[ast.Call]:
        return [
            call
            for call in self.nodes(ast.Call)
            if called(call) in ("create_attention_mask", "create_ssm_mask")
        ]

    @cached_property
    def points(self) -> list[Point]:
        """Hidden states, wherever they can be told by what is done with them."""
        found: list[Point] = []
        for call in self.nodes(ast.Call):
            name = called(call)
            own = isinstance(call.func, ast.Attribute) or name in ("layer", "l", "block")
            if not own or not call.args or isinstance(call.args[0], ast.Starred):
                continue
            first = call.args[0]
            parent = self._parents[call]
            alone = not (
                isinstance(parent, ast.Assign) and isinstance(parent.targets[0], ast.Tuple)
            )
            if name in _FEED_FORWARD:
                found += [Point("mlp-input", first), Point("mlp-output", call)]
            elif name in _MIXERS:
                found.append(Point("mixer-input", first))
                if alone:
                    found.append(Point("mixer-output", call))
            elif name in ("layer", "l", "block") and isinstance(call.func, ast.Name):
                found.append(Point("layer-input", first))
                if alone:
                    found.append(Point("layer-output", call))
            elif name in _EMBEDDINGS and isinstance(first, ast.Name):
                found.append(Point("embedding", call))
            elif name in _LAST_NORMS and self.above(call, ast.FunctionDef) in [
                f for f, _ in self.backbones
            ]:
                found.append(Point("before-norm", first))
                found.append(Point("after-norm", call))
            elif name in _HEADS:
                found += [Point("before-head", first), Point("logits", call)]
            elif name in ("q_proj", "k_proj", "v_proj"):
                found += [Point("projection-input", first), Point("projection", call)]
            elif name in ("o_proj", "out_proj"):
                found.append(Point("before-output", first))
            elif name == "down_proj":
                found += [Point("inside-mlp", first), Point("after-mlp", call)]
        return found

    @cached_property
    def constructors(self) -> list[tuple[ast.ClassDef, ast.FunctionDef]]:
        pairs = [(cls, self.method(cls, "__init__")) for cls in self.classes]
        return [(cls, init) for cls, init in pairs if init is not None]

    def cache_name(self, function: ast.FunctionDef) -> str | None:
        """The parameter that is one layer's cache."""
        names = [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]
        return next((n for n in ("cache", "kv_cache", "c") if n in names), None)

    def hidden_name(self, function: ast.FunctionDef) -> str | None:
        """The first parameter after self."""
        names = [a.arg for a in function.args.args]
        return names[1] if len(names) > 1 and names[0] == "self" else None


def called(call: ast.Call) -> str | None:
    """The last name of what is called."""
    if isinstance(call.func, ast.Name):
        return call.func.id
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return None
