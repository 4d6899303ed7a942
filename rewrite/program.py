"""All modules of one compilation, linked: names followed through imports, classes through bases."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .ir import ClassFacts, Method, ModuleFacts, Value


@dataclass(frozen=True, eq=False, slots=True)
class Program:
    """Facts of every module by dotted name: the ones to rewrite and the ones they import."""

    modules: dict[str, ModuleFacts]
    _resolved: dict[str, str] = field(default_factory=dict)
    _unnamed: dict[str, frozenset[str]] = field(default_factory=dict)

    def resolve(self, dotted: str) -> str:
        """Follow re-exports: the name under which a thing is defined."""
        known = self._resolved.get(dotted)
        if known is not None:
            return known
        self._resolved[dotted] = dotted  # ends a circle of imports
        module, name = self._split(dotted)
        result = dotted
        if module is not None and name:
            head, _, rest = name.partition(".")
            bound = self.modules[module].names.get(head)
            if bound is not None and bound.data != f"{module}.{head}":
                target = f"{bound.data}.{rest}" if rest else bound.data
                result = self.resolve(target)
        self._resolved[dotted] = result
        return result

    def _split(self, dotted: str) -> tuple[str | None, str]:
        """The longest prefix that is a module, and the rest."""
        parts = dotted.split(".")
        for end in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:end])
            if module in self.modules:
                return module, ".".join(parts[end:])
        return None, dotted

    def class_of(self, dotted: str) -> ClassFacts | None:
        module, name = self._split(self.resolve(dotted))
        return self.modules[module].classes.get(name) if module is not None else None

    def function_of(self, dotted: str) -> Method | None:
        module, name = self._split(self.resolve(dotted))
        return self.modules[module].functions.get(name) if module is not None else None

    def lineage(self, cls: ClassFacts) -> Iterator[ClassFacts]:
        """The class and its bases as far as they are known, the class first."""
        seen = {cls.qualified}
        queue = [cls]
        while queue:
            current = queue.pop(0)
            yield current
            for base in current.bases:
                found = self.class_of(base.data) if base.op == "global" else None
                if found is not None and found.qualified not in seen:
                    seen.add(found.qualified)
                    queue.append(found)

    def method(self, cls: ClassFacts, name: str) -> tuple[ClassFacts, Method] | None:
        """The method `name` as an instance of `cls` finds it, with the class that defines it."""
        for owner in self.lineage(cls):
            if name in owner.methods:
                return owner, owner.methods[name]
        return None

    def unnamed(self, cls: ClassFacts) -> frozenset[str]:
        """Methods of a module's class that nothing in the program names: no forward runs them.

        Only of classes that derive from mlx.nn: what is called of others (caches, configs) may be
        named in libraries that are not read.
        """
        if cls.qualified not in self._unnamed:
            self._unnamed[cls.qualified] = self._find_unnamed(cls)
        return self._unnamed[cls.qualified]

    def _find_unnamed(self, cls: ClassFacts) -> frozenset[str]:
        lines = list(self.lineage(cls))
        bases = [base for owner in lines for base in owner.bases]
        if not any(base.op == "global" and base.data.startswith("mlx.nn.") for base in bases):
            return frozenset()
        names = {name for owner in lines for name in owner.methods if not name.startswith("__")}
        if not names:
            return frozenset()
        own = {owner.module for owner in lines}
        texts = [(m.source.data, name in own) for name, m in self.modules.items()]
        if any(_MADE_NAME.search(text) for text, _ in texts):
            return frozenset()
        return frozenset(n for n in names if not any(_names(t, n, mine) for t, mine in texts))

    def attribute(self, cls: ClassFacts, name: str) -> Value | None:
        for owner in self.lineage(cls):
            if name in owner.attributes:
                return owner.attributes[name]
        return None

    def constructed(self, cls: ClassFacts, name: str) -> list[ClassFacts]:
        """The classes an instance may hold in `self.<name>`, lists of modules included."""
        value = self.attribute(cls, name)
        return self.classes_in(value) if value is not None else []

    def classes_in(self, value: Value) -> list[ClassFacts]:
        """The classes whose constructors a value may come from."""
        found: dict[str, ClassFacts] = {}
        stack = [value]
        while stack:
            current = stack.pop()
            if current.op == "call":
                for name in _globals(current.args[0]):
                    cls = self.class_of(name)
                    if cls is not None:
                        found[cls.qualified] = cls
            if current.op in ("phi", "comp", "list", "tuple", "binary", "call", "loop"):
                stack.extend(reversed(current.args))
        return list(found.values())

    def reachable(self, entry: ClassFacts) -> dict[str, ClassFacts]:
        """All classes an instance of `entry` is built from, by qualified name, `entry` first."""
        found: dict[str, ClassFacts] = {}
        queue = [entry]
        while queue:
            cls = queue.pop(0)
            if cls.qualified in found:
                continue
            found[cls.qualified] = cls
            for owner in self.lineage(cls):
                for value in owner.attributes.values():
                    queue.extend(self.classes_in(value))
        return found

    # ----------------------------------------------------------------- types

    def types(self, value: Value, owner: ClassFacts, method: Method) -> list[ClassFacts]:
        """The classes of the module instances a value may be; lists count as their elements."""
        found: dict[str, ClassFacts] = {}
        for cls in self._types(value, owner, method, 0):
            found[cls.qualified] = cls
        return list(found.values())

    def _types(
        self, value: Value, owner: ClassFacts, method: Method, depth: int
    ) -> Iterator[ClassFacts]:
        if depth > 12:
            return
        match value.op:
            case "param":
                if method.params and value is method.params[0]:
                    yield owner
            case "attr":
                for cls in list(self._types(value.args[0], owner, method, depth + 1)):
                    made = self.constructed(cls, value.data)
                    yield from made
                    found = self.method(cls, value.data) if not made else None
                    if found is not None and _is_property(found[1]):
                        for effect in found[1].returns:
                            yield from self._types(effect.value, cls, found[1], depth + 1)
            case "elem" | "index" | "item" | "carried":
                yield from self._types(value.args[0], owner, method, depth + 1)
            case "phi":
                for part in value.args[1:]:
                    yield from self._types(part, owner, method, depth + 1)
            case "loop" | "binary" | "tuple" | "list":
                for part in value.args:
                    yield from self._types(part, owner, method, depth + 1)

    def callees(
        self, call: Value, owner: ClassFacts, method: Method
    ) -> list[tuple[ClassFacts, Method]]:
        """The methods of the program's classes that a call may reach."""
        callee = call.args[0]
        found = [
            hit
            for cls in self.types(callee, owner, method)
            if (hit := self.method(cls, "__call__")) is not None
        ]
        if callee.op == "attr":
            for cls in self.types(callee.args[0], owner, method):
                hit = self.method(cls, callee.data)
                if hit is not None:
                    found.append(hit)
        return found


# An attribute whose name the text does not hold.
_MADE_NAME = re.compile(rb"getattr\(\s*[^,\n]+,\s*[^\"'\s]|\b(?:methodcaller|attrgetter)\b")


def _names(text: bytes, name: str, mine: bool) -> bool:
    """A text may reach a method: as an attribute, by a string or, in its class's file, barely."""
    word = re.escape(name.encode())
    pattern = rb"(?<!def )\b" if mine else rb"(?:\.\s*|[\"'])"
    return re.search(pattern + word + rb"\b", text) is not None


def _globals(callee: Value) -> Iterator[str]:
    """The global names a callee may be: a name, or a choice of names."""
    if callee.op == "global":
        yield callee.data
    elif callee.op in ("phi", "dict", "list", "tuple"):
        for part in callee.args:
            yield from _globals(part)
    elif callee.op in ("index", "attr"):
        yield from _globals(callee.args[0])


def _is_property(method: Method) -> bool:
    return any(d.op == "name" and d.data == "property" for d in method.function.decorators)
