"""What classes with a recurrent state do, seen through the code they reach."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from .deltas import is_delta_rule
from .ir import ClassFacts, Effect, Method, Value
from .match import NOT_FORWARD, Mixer, callee_name, every_value, library_call
from .program import Program

_CONVOLUTIONS = frozenset(
    {"mlx.nn.Conv1d", "mlx.core.conv1d", "mlx.core.conv_general", "mlx.nn.Conv2d"}
)
_DELTA = ("mlx_lm.models.gated_delta.gated_delta", "mlx_vlm.models.gated_delta.gated_delta")
_LIBRARIES = (*_DELTA, "mlx_lm.models.ssm.", "mlx_vlm.models.ssm.")


class Reach:
    """The methods and functions a class's forward may run, those of its modules and of their bases
    included."""

    def __init__(self, mixer: Mixer) -> None:
        self.mixer = mixer
        self.program: Program = mixer.program

    @cached_property
    def methods(self) -> list[Method]:
        found: dict[int, Method] = {id(m): m for m in self.mixer.methods}
        for cls in self.classes:
            for name, method in cls.methods.items():
                if name not in NOT_FORWARD:
                    found[id(method)] = method
        queue = list(found.values())
        while queue:
            for effect in queue.pop().calls():
                callee = callee_name(self.program, effect.value)
                function = self.program.function_of(callee) if callee else None
                if function is not None and id(function) not in found:
                    found[id(function)] = function
                    queue.append(function)
        return list(found.values())

    @cached_property
    def classes(self) -> list[ClassFacts]:
        """What the class is built from, and the bases of all that."""
        built = self.program.reachable(self.mixer.cls).values()
        lines = (owner for cls in built for owner in self.program.lineage(cls))
        return list({cls.qualified: cls for cls in lines}.values())

    def calls(self) -> Iterator[Effect]:
        for method in self.methods:
            yield from method.calls()

    def convolutions(self) -> bool:
        """The forward uses a convolution: a module that __init__ made, or a function."""
        return self._uses_module(_CONVOLUTIONS) or any(
            callee_name(self.program, effect.value) in _CONVOLUTIONS for effect in self.calls()
        )

    def embeds(self) -> bool:
        """The forward looks up embeddings."""
        return self._uses_module(frozenset({"mlx.nn.Embedding"}))

    def _uses_module(self, constructors: frozenset[str]) -> bool:
        """The forward reads an attribute that __init__ made with one of the constructors."""
        names = {
            name
            for cls in self.classes
            for name, made in cls.attributes.items()
            for value in (*made.walk(), *appended_to(cls, name))
            if value.op == "call" and callee_name(self.program, value) in constructors
        }
        return any(
            value.op == "attr" and value.data in names and value.args[0].op == "param"
            for method in self.methods
            for value in every_value(method)
        )

    def library_recurrence(self) -> bool:
        return any(
            (callee_name(self.program, effect.value) or "").startswith(_LIBRARIES)
            for effect in self.calls()
        )

    def token_loops(self) -> bool:
        """A loop over `range(x.shape[1])`, or over a length taken from a shape."""
        for method in self.methods:
            for value in every_value(method):
                if value.op == "elem" and _is_range_of_length(self.program, value.args[0]):
                    return True
        return False

    def complement_roots(self) -> bool:
        """`sqrt(1 - a)`."""
        for method in self.methods:
            for value in every_value(method):
                got = library_call(self.program, value, "mlx.core.sqrt")
                if got and got[0].op == "binary" and got[0].data == "-":
                    left = got[0].args[0]
                    if left.op == "const" and left.data == 1:
                        return True
        return False

    def token_shifts(self) -> bool:
        """`concatenate([state, x[:, :-1]], axis=1)`."""
        return any(is_token_shift(self.program, method) for method in self.methods)

    def joins_state(self) -> bool:
        """`concatenate([cache[i], parameter], ...)`."""
        loads = set(map(id, self.mixer.state_loads))
        for method in self.mixer.methods:
            for value in every_value(method):
                got = library_call(self.program, value, "mlx.core.concatenate")
                if not got or got[0].op != "list":
                    continue
                parts = got[0].args
                if any(id(inner) in loads for part in parts for inner in part.walk()) and any(
                    inner.op == "param" for part in parts for inner in (part, *part.args)
                ):
                    return True
        return False


def is_token_shift(program: Program, method: Method) -> bool:
    """The method joins something with all but the last of something."""
    for value in every_value(method):
        got = library_call(program, value, "mlx.core.concatenate")
        if got and got[0].op == "list" and any(map(_drops_last, got[0].args)):
            return True
    return False


def appended_to(cls: ClassFacts, name: str) -> Iterator[Value]:
    """What __init__ appends to the list `self.<name>`."""
    init = cls.methods.get("__init__")
    for effect in init.calls() if init is not None else ():
        callee = effect.value.args[0]
        if callee.op == "attr" and callee.data == "append" and callee.args[0].op == "attr":
            if callee.args[0].data == name:
                yield from effect.value.args[1:]


def _is_range_of_length(program: Program, value: Value) -> bool:
    got = library_call(program, value, "builtins.range")
    if got is None:
        return False
    return any(
        part.op in ("item", "index") and part.args[0].op == "attr" and part.args[0].data == "shape"
        for bound in got
        for part in bound.walk()
    )


def _drops_last(value: Value) -> bool:
    """`x[:, :-1]` or `x[:, :-1, :]`."""
    if value.op != "index" or value.args[1].op != "tuple":
        return False
    keys = value.args[1].args
    if len(keys) < 2 or keys[1].op != "slice":
        return False
    lower, upper = keys[1].args[:2]
    return lower.data is None and upper.op == "const" and upper.data == -1


def delta_updates(mixer: Mixer) -> list[Effect]:
    """Calls of the gated delta rule by the class's own methods: the library's, or a copy of it."""
    found = []
    for effect in (effect for method in mixer.methods for effect in method.calls()):
        name = callee_name(mixer.program, effect.value) or ""
        if name.startswith(_DELTA) or _is_copy(mixer.program, name):
            found.append(effect)
    return found


def _is_copy(program: Program, name: str) -> bool:
    function = program.function_of(name)
    return function is not None and is_delta_rule(program, function)


def delta_gate_is_per_channel(call: Value) -> bool:
    """The gate (fourth argument) is reshaped to [B, L, heads, channels] before the call."""
    if len(call.args) < 5:
        return False
    gate = call.args[4]
    for value in gate.walk():
        if value.op == "call" and value.args[0].op == "attr" and value.args[0].data == "reshape":
            return len(value.args) >= 5
    return False
