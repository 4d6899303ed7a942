"""Calls of what is not read: mlx by its rules, layers, caches, sites of the runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256

from ..ir import Block, Expr, For, Function, If, Return, Stmt, While
from .builtin import Builtins
from .domain import (
    CONSTANT,
    LENGTH,
    NONE,
    PARAMETER,
    ROWS,
    Array,
    Barred,
    Count,
    Dead,
    Instance,
    Items,
    Known,
    Library,
    Numbers,
    Opaque,
    Partial,
    Refused,
    Routine,
    Table,
    Tuple,
    Value,
    choice,
    feature,
    is_live,
    leads,
    parts,
    tokens,
)
from .indexing import store
from .layers import (
    FUNCTIONS,
    KERNELS,
    LAYERS,
    ROW_OPS,
    SEQUENCE_KERNELS,
    SITES,
    as_linear,
    check_rows,
    some_site,
    updated,
)
from .recurrences import CALLED, CONVOLVE, DECORATING, KEEPING, WINDOWS, of_windows
from .rules import RULES, Rule, array
from .shapes import size_key
from .states import STATES
from .terms import termed

_ONCE = {
    "per_sequence": "once per sequence",
    "per_sequence_model": "once per sequence",
    "per_length": "once for all sequences with equally many rows",
    "on_rows": "on all rows, whose states only ops know",
}
# Methods of a layer that change nothing.
_READING = (
    "children", "filter_and_map", "items", "keys", "leaf_modules", "modules", "named_modules",
    "parameters", "state", "trainable_parameters", "values",
)  # fmt: skip
_OUTPUT = "mlx_vlm.models.base.LanguageModelOutput"
_FIRST_ROW = "mlx_vlm.models.base.cache_position_offset"
_PLAIN = "mlx_vlm.models.base.dequantize_kv_state"
_KEY_COUNT = "mlx_vlm.models.base.kv_sequence_length"
_PASSED = ("copy.copy", "copy.deepcopy", "functools.lru_cache")
_NO_ARRAYS = ("finfo", "iinfo", "distributed", "metal", "default_device", "fast", "issubdtype")


class LibraryCalls(Builtins):
    def call_library(self, callee: Library, args: Sequence[Value], more: dict[str, Value]) -> Value:
        name = callee.name
        if callee.bound is not None:
            return self.call_bound(name, callee.bound, args, more)
        if name.startswith("mlx.core."):
            return self.call_core(name.removeprefix("mlx.core."), args, more)
        if name.startswith("mlx.nn."):
            return self.call_nn(name.removeprefix("mlx.nn."), args, more)
        if name.startswith("builtins."):
            return self.call_builtin(name.removeprefix("builtins."), args, more)
        if name.startswith("mlxrewrite."):
            return self.call_site(name, args, more)
        if name == _OUTPUT:
            held = dict(zip(("logits", "hidden_states"), args, strict=False)) | more
            return Instance(None, held, "", self.depth, self.forward)
        if name == _FIRST_ROW and args and args[0] == Opaque("cache"):
            return Barred("position-special", "one position for all rows")
        if name == _PLAIN and len(args) == 3 and args[1] == args[2] == Opaque("handle"):
            return Tuple((args[1], args[2]))  # what has a shape is given back
        if name == _KEY_COUNT and args and args[0] == Opaque("handle"):
            return Opaque("number of keys")
        if name in ("functools.partial",):
            return Partial(args[0], tuple(args[1:]), tuple(more.items()))
        if name == "functools.wraps":
            return Library("wrapping", NONE)
        if name in _PASSED:
            return args[0] if args and not isinstance(args[0], Known) else callee
        if any(map(is_live, (*args, *more.values()))):
            raise Refused("unknown-operation", f"`{name}` has no rule")
        return CONSTANT

    def call_core(self, name: str, args: Sequence[Value], more: dict[str, Value]) -> Value:
        if name in ("compile", "checkpoint"):
            if not args:
                return Partial(Library(f"mlx.core.{name}"), (), ())
            return args[0]
        rule = RULES.get(name)
        if rule is not None:
            more.pop("stream", None)
            return self.apply(rule, args, more)
        if any(map(is_live, (*args, *more.values()))):
            raise Refused("unknown-operation", f"mx.{name} has no rule")
        if name == "fast.metal_kernel":
            return self.kernel(more)
        return CONSTANT if name.split(".", maxsplit=1)[0] in _NO_ARRAYS else PARAMETER

    @staticmethod
    def kernel(more: dict[str, Value]) -> Value:
        """A custom kernel, known by its text."""
        text = more.get("source", NONE)
        digest = ""
        if isinstance(text, Known) and isinstance(text.value, str):
            digest = sha256(text.value.encode()).hexdigest()[:16]
        return Library(f"kernel.{digest}", NONE)

    def call_kernel(self, digest: str, args: Sequence[Value], more: dict[str, Value]) -> Value:
        """Rows in, rows out, as the kernel's text was read; any other kernel is refused."""
        if not any(map(is_live, (*args, *more.values()))):
            return CONSTANT
        reason = KERNELS.get(digest)
        if self.sequences:
            reason = self.sequence_kernel(digest, args, more)
        shapes = more.get("output_shapes", NONE)
        known = self.known_items(shapes)
        if reason is None or known is None:
            raise Refused("unknown-operation", "a custom kernel", "mlx's own operations")
        self.assume(f"a custom kernel, read and not run: {reason}")
        made = [self.apply(RULES["zeros"], (shape,), {}) for shape in known]
        return Tuple(tuple(termed(v, None) for v in made))

    @staticmethod
    def sequence_kernel(digest: str, args: Sequence[Value], more: dict[str, Value]) -> str | None:
        """Why a launch keeps sequences apart: a kernel that was read, with sequences in front of
        all that it is given and gives, and a place in the grid for each of them."""
        reason, place = SEQUENCE_KERNELS.get(digest, (None, 0))
        grid = more.get("grid", NONE)
        if (
            args
            or not isinstance(grid, Tuple)
            or grid.items[place : place + 1] != (Count((ROWS,)),)
        ):
            return None
        shapes = more.get("output_shapes", NONE)
        for shape in parts(shapes):
            first, *rest = shape.items if isinstance(shape, Tuple) and shape.items else (NONE,)
            if first != Count((ROWS,)) or any(map(is_live, rest)):
                return None
        if not all(leads(v) for v in parts(more.get("inputs", NONE)) if is_live(v)):
            return None
        told = ("grid", "output_shapes", "inputs")
        return None if any(is_live(v) for k, v in more.items() if k not in told) else reason

    def call_nn(self, name: str, args: Sequence[Value], more: dict[str, Value]) -> Value:
        last = name.rpartition(".")[2]
        rule = FUNCTIONS.get(last)
        if rule is not None:
            return self.apply(rule, args, more)
        if last[:1].isupper():
            if any(map(is_live, (*args, *more.values()))):
                raise Refused("unknown-operation", f"a layer nn.{last} made from tokens")
            made = Instance(None, {}, last, self.depth, self.forward)
            if last == "Sequential":
                made.attributes = {str(i): v for i, v in enumerate(args)}
            elif last in ("Linear", "Embedding"):
                width = more.get(
                    "output_dims", more.get("dims", args[1] if len(args) > 1 else NONE)
                )
                made.width = size_key(width)
                if more.get("bias") == Known(False):
                    made.attributes["bias"] = NONE
            return made
        if any(map(is_live, (*args, *more.values()))):
            raise Refused("unknown-operation", f"nn.{name} has no rule")
        return CONSTANT

    def call_site(self, name: str, args: Sequence[Value], more: dict[str, Value]) -> Value:
        if name == "mlxrewrite.runtime.rope.initialize_rope":
            return Instance(None, {}, "RoPE", self.depth, self.forward)
        last = name.rpartition(".")[2]
        if self.sequences or self.on_rows:
            return self.call_op(last, args, more)
        if last in _ONCE:
            if not any(isinstance(a, Routine) for a in args):  # the decorator is told ranks
                return Library(name)
            return Library("per_sequence", Tuple((*args, Known(_ONCE[last]))))
        if last in ROW_OPS:
            return Library("row_op", Tuple((Known(last), *args)))
        entry = SITES.get(last)
        if entry is not None:
            function, reason = entry
            return self.apply(Rule(last, function, reason), args, more)
        if not any(map(is_live, (*args, *more.values()))):
            return CONSTANT
        self.assume(f"`{last}` treats each row by itself (a site of the runtime)")
        return some_site(self, last, tuple(args), more)

    def call_op(self, name: str, args: Sequence[Value], more: dict[str, Value]) -> Value:
        """An op of the runtime, in a mixer that runs once for several sequences."""
        if name == CONVOLVE:
            return of_windows(args[0], lambda x: self.call(args[1], (x,), {}))
        if self.on_rows and name in WINDOWS:
            return self.apply(WINDOWS[name], args, more)
        if name in DECORATING:
            return Library("op", Tuple((Known(name), *args)))
        if name not in CALLED:
            raise Refused("unknown-operation", f"`{name}` in a mixer")
        rule = CALLED[name]
        held = more.pop("cache", NONE)
        place = more.pop("cache_index", Known(1))
        if held == STATES and name in KEEPING:
            state = self.read_state(place)
            found = self.apply(rule, args, {**more, "state": state})
            self.keep_state(place, found.items[1] if isinstance(found, Tuple) else NONE)
            return found
        if held != NONE:
            raise Refused("cache-use", f"`{name}` of a state that is not a cache's")
        return self.apply(rule, args, more)

    def call_bound(
        self, name: str, bound: Value, args: Sequence[Value], more: dict[str, Value]
    ) -> Value:
        if name == "wrapping":  # a wrapper gets the name and the docstring of another function
            return args[0] if len(args) == 1 and not more else CONSTANT
        if name == "per_sequence":
            assert isinstance(bound, Tuple)
            return self.call_mixer(bound.items[0], bound.items[1], args, more)
        if name == "op":
            assert isinstance(bound, Tuple)
            if not isinstance(bound.items[-1], Routine):
                return Library("op", Tuple((*bound.items, *args)))
            op, *names, routine = bound.items
            assert isinstance(op, Known) and isinstance(routine, Routine)
            given = self.bind(routine, args, more)
            roles = [given[n.value] for n in names if isinstance(n, Known) and n.value in given]
            return self.apply(DECORATING[op.value], roles, {})
        if name == "row_op":
            assert isinstance(bound, Tuple)
            if not isinstance(bound.items[-1], Routine):  # the decorator is given its function
                return Library("row_op", Tuple((*bound.items, *args)))
            return self.call_row_op(bound.items, args, more)
        kind, _, method = name.partition(".")
        if kind == "kernel":
            return self.call_kernel(method, args, more)
        if kind == "array":
            return self.call_array(bound, method, args, more)
        if kind == "at":
            assert isinstance(bound, Tuple)
            base, key = bound.items
            if method not in ("add", "subtract", "multiply", "divide", "maximum", "minimum"):
                raise Refused("unknown-operation", f"`.at[...].{method}` has no rule")
            rule = Rule("at", lambda c, b, v: store(c, array(b), key, v), "")
            found = self.apply(rule, (base, *args), more)
            return self.with_term(("at", method), found, (base, key, *args), more)
        if kind == "opaque":
            return self.call_opaque(method, args, more)
        if kind == "states":
            return self.call_states(method, args, more)
        if kind == "layer":
            assert isinstance(bound, Instance)
            return self.call_layer_method(bound, method, args, more)
        if kind == "items":
            if not isinstance(bound, (Items, Tuple)):
                raise Refused("unknown-operation", f"`{method}` of a list of unknown length")
            return self.call_items(bound, method, args)
        if kind == "table":
            assert isinstance(bound, Table)
            return self.call_table(bound, method, args)
        raise Refused("unknown-operation", f"`.{method}` of something that is not known")

    def call_row_op(
        self, made: tuple[Value, ...], args: Sequence[Value], more: dict[str, Value]
    ) -> Value:
        """An op in place of a function of the file: on rows, if its state is in a cache."""
        op, *names, routine = made
        assert isinstance(op, Known) and isinstance(routine, Routine)
        given = self.bind(routine, args, more)
        roles = [given[name.value] for name in names if isinstance(name, Known)]
        state = roles.pop()
        if state == NONE:
            return self.call_routine(routine, args, more)
        if state != Opaque("cache"):
            raise Refused("cache-use", f"`{op.value}` of a state that is not a cache's")
        function, reason = ROW_OPS[op.value]
        self.assume(f"`{op.value}` of the runtime: {reason}")
        return self.apply(Rule(op.value, function, reason), roles, {})

    def call_mixer(
        self, routine: Value, how: Value, args: Sequence[Value], more: dict[str, Value]
    ) -> Value:
        """The original mixer over each sequence's own rows: [rows][length] and features."""
        assert isinstance(routine, Routine) and isinstance(routine.syntax, Function)
        assert isinstance(how, Known)
        owner = routine.owner.name if routine.owner is not None else routine.syntax.name
        if not any(map(_has_cache, (*args, *more.values()))):
            self.cacheless.setdefault(routine.owner, self.here())
            raise Dead  # the runtime raises: without a cache each row would begin a sequence
        self.cached.add(routine.owner)
        self.written = self.grown = True
        check_rows(f"`{owner}` {how.value}", (*args, *more.values()))
        widths = {_width(s.value) for s in _returns(routine.syntax.body)}
        self.assume(
            f"`{owner}` runs {how.value} and gives [rows][length][features]; "
            "the runtime checks the first two axes"
        )
        rows = Array(((ROWS,), (LENGTH,), feature(("of", owner))))
        if widths == {0}:
            return rows
        if len(widths) == 1:
            return Tuple((rows,) * widths.pop())
        raise Refused("unknown-operation", f"`{owner}` returns one or several values")

    def call_array(
        self, bound: Value, method: str, args: Sequence[Value], more: dict[str, Value]
    ) -> Value:
        if method == "tolist" and isinstance(bound, Array) and bound.axes and not bound.tag:
            if tokens(bound.axes[0]) and not any(map(tokens, bound.axes[1:])):
                return Numbers(bound.axes[0])
        if method in ("item", "tolist"):
            if is_live(bound):
                raise Refused("token-branch", "what tokens hold is read by Python")
            return CONSTANT
        rule = RULES.get(method)
        if rule is not None:
            return self.apply(rule, (bound, *args), more)
        if is_live(bound) or any(map(is_live, args)):
            raise Refused("unknown-operation", f"array method `{method}` has no rule")
        return PARAMETER

    def call_opaque(self, method: str, args: Sequence[Value], more: dict[str, Value]) -> Value:
        if method.startswith("update_and_fetch"):
            self.written = self.grown = True
        if method in ("update_and_fetch", "keys_and_values"):
            if not args and not more:
                return Tuple((Opaque("handle"), Opaque("handle")))
            rule = Rule(method, lambda c, keys, values: updated(keys, values), "keys go to pages")
            return self.apply(rule, args, more)
        if method == "update_and_fetch_latents":
            rule = Rule(method, lambda c, latents, ropes: updated(latents, ropes), "as keys")
            return self.apply(rule, args, more)
        if method == "update_and_fetch_index":
            rule = Rule(method, lambda c, keys, values: updated(keys, values), "as keys")
            self.apply(rule, args, more)
            return Tuple((Opaque("index"), NONE))
        if method == "make_mask":
            return Opaque("mask")
        if method == "maybe_trim_front":
            return NONE
        raise Refused("cache-use", f"`.{method}` of a paged cache")

    def call_layer(self, layer: Instance, args: Sequence[Value], more: dict[str, Value]) -> Value:
        if layer.layer == "Sequential":
            (value,) = args
            for inner in layer.attributes.values():
                value = self.call(inner, (value,), {})
            return value
        entry = LAYERS.get(layer.layer)
        if entry is None:
            if any(map(is_live, (*args, *more.values()))):
                raise Refused("unknown-operation", f"nn.{layer.layer or 'Module'} has no rule")
            return CONSTANT
        function, reason = entry
        name = f"nn.{layer.layer}"
        rule = Rule(name, lambda c, *a, **k: function(c, layer, *a, **k), reason)
        return self.with_term((name, id(layer)), self.apply(rule, args, more), args, more)

    def call_layer_method(
        self, layer: Instance, method: str, args: Sequence[Value], more: dict[str, Value]
    ) -> Value:
        if method == "as_linear":
            rule = Rule(method, lambda c, x: as_linear(c, layer, x), "a product")
            return self.with_term((method, id(layer)), self.apply(rule, args, more), args, more)
        if method == "__call__":
            return self.call_layer(layer, args, more)
        if method == "get":
            key = args[0].value if args and isinstance(args[0], Known) else None
            self.consulted(layer, str(key))
            return layer.attributes.get(str(key), choice((NONE, PARAMETER)))
        if any(map(is_live, (*args, *more.values()))):
            raise Refused("unknown-operation", f"nn.{layer.layer}.{method} has no rule")
        if self.forward and method not in _READING:
            raise Refused("state-on-self", f"`.{method}` of a layer may change it")
        if self.forward and not layer.forward:
            self.reads.add((id(layer), "*"))
            if any(kept[0] == id(layer) for kept in self.kept):
                raise Refused("state-on-self", "whether an attribute is kept already shows")
        return CONSTANT


def _has_cache(value: Value) -> bool:
    """Whether a value may be, or have in it, what finds the sequences of rows."""
    return value == Opaque("cache") or any(map(_has_cache, parts(value)))


def _returns(body: Sequence[Stmt]) -> Iterator[Return]:
    for statement in body:
        match statement:
            case Return():
                yield statement
            case If(body=one, orelse=two) | For(body=one, orelse=two):
                yield from _returns(one)
                yield from _returns(two)
            case While(body=one):
                yield from _returns(one)
            case Block(bodies=bodies):
                for part in bodies:
                    yield from _returns(part)


def _width(expr: Expr | None) -> int:
    return len(expr.args) if expr is not None and expr.op == "tuple" else 0
