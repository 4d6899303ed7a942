"""What names are: of a call, of a module, of a library that is not read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..ir import Class, Function, Span
from .domain import CONSTANT, ClassValue, Dead, Library, Value, choice
from .machine import Frame, Machine, Scope


class Names(Machine):
    def global_value(self, module: str, name: str) -> Value:
        key = (module, name)
        if key not in self.module_values:
            self.module_values[key] = CONSTANT  # ends a circle
            self.module_values[key] = self._global_value(module, name)
        return self.module_values[key]

    def _global_value(self, module: str, name: str) -> Value:
        text = self.world.text(module)
        if text is None:
            return Library(f"{module}.{name}")
        bindings = text.names.get(name)
        if bindings is None:
            inner = f"{module}.{name}"
            return Library(inner)
        found: list[Value] = []
        for binding in bindings:
            if isinstance(binding, str):
                found.append(self.dotted(binding))
            elif isinstance(binding, Class):
                found.append(ClassValue(module, binding))
            elif isinstance(binding, Function):
                found.append(self.decorated(binding, module, None, None))
            else:
                with self.setup(module):
                    try:
                        found.append(self.value(binding))
                    except Dead:
                        continue
        return choice(found)

    def dotted(self, name: str) -> Value:
        """What an absolute dotted name is: a module, or something in one."""
        base, _, last = name.rpartition(".")
        if base and not base.startswith("mlxrewrite.") and self.world.text(base) is not None:
            text = self.world.text(base)
            assert text is not None
            if last in text.names:
                return self.global_value(base, last)
        return Library(name)

    @contextmanager
    def setup(self, module: str) -> Iterator[None]:
        """Evaluate something of a module as it is when the module is imported."""
        forward, self.forward = self.forward, False
        depth, self.depth = self.depth, 0
        self.frames.append(Frame(Scope(module, {}, None, False), None, None, Span(0, 0)))
        yield
        self.frames.pop()
        self.forward, self.depth = forward, depth

    def lookup(self, name: str) -> Value:
        scope: Scope | None = self.frame.scope
        while scope is not None:
            found = scope.names.get(name)
            if found is not None:
                return found
            scope = scope.parent
        text = self.world.text(self.frame.scope.module)
        if text is not None and name in text.names:
            return self.global_value(self.frame.scope.module, name)
        return Library(f"builtins.{name}")
