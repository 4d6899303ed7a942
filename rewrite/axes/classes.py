"""Classes: their bases, their members as instances find them, and instances made."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir import Assign, Expr, Function
from .domain import (
    CONSTANT,
    ClassValue,
    Constant,
    Instance,
    Library,
    Refused,
    Routine,
    Value,
    is_live,
    options,
)
from .machine import ROPES
from .names import Names

_CONFIGS = ("mlx_lm.models.base.BaseModelArgs", "mlx_vlm.models.base.BaseModelConfig")


class Classes(Names):
    def lineage(self, cls: ClassValue) -> list[ClassValue | Library]:
        """The class and its bases, the class first; library classes as such."""
        key = (cls.module, id(cls.syntax))
        if key not in self.lineages:
            self.lineages[key] = self._lineage(cls)
        return self.lineages[key]

    def _lineage(self, cls: ClassValue) -> list[ClassValue | Library]:
        found: list[ClassValue | Library] = []
        queue: list[Value] = [cls]
        while queue:
            current = queue.pop(0)
            if isinstance(current, Library):
                found.append(current)
            if not isinstance(current, ClassValue) or current in found:
                continue
            found.append(current)
            with self.setup(current.module):
                for base in current.syntax.bases:
                    queue += options(self.value(base))
        return found

    def member(
        self, cls: ClassValue, name: str, after: ClassValue | None = None
    ) -> tuple[ClassValue, Function | Expr] | None:
        """A method or a class-level value, as an instance finds it."""
        lineage = [c for c in self.lineage(cls) if isinstance(c, ClassValue)]
        if after is not None:
            lineage = lineage[lineage.index(after) + 1 :]
        for owner in lineage:
            for statement in owner.syntax.body:
                if isinstance(statement, Function) and statement.name == name:
                    return owner, statement
                if isinstance(statement, Assign) and statement.value is not None:
                    if any(t.op == "name" and t.data == name for t in statement.targets):
                        return owner, statement.value
        return None

    def rope(self) -> Instance:
        """A rope of mlx_vlm, of whatever sort the config asks for."""
        self.assume("a rope that takes the largest position of a batch runs once per sequence")
        return Instance(None, {}, "RoPE", self.depth, self.forward)

    def instantiate(self, cls: ClassValue, args: Sequence[Value], more: dict[str, Value]) -> Value:
        if cls.qualified == f"{ROPES}.SuScaledRoPE":
            return self.rope()
        lineage = self.lineage(cls)
        names = [c.name for c in lineage if isinstance(c, Library)]
        if any(isinstance(c, ClassValue) and c.qualified in _CONFIGS for c in lineage):
            if any(map(is_live, (*args, *more.values()))):
                raise Refused("unknown-operation", "a config made from tokens")
            return Constant(("config", cls.qualified))
        layers = [n.rpartition(".")[2] for n in names if n.startswith("mlx.nn.")]
        layer = next((n for n in layers if n != "Module"), "")
        made = Instance(cls, {}, layer, self.depth, self.forward)
        found = self.member(cls, "__init__")
        if found is not None and isinstance(found[1], Function):
            owner, function = found
            routine = Routine(owner.module, function, None, made, owner)
            self.call_routine(routine, args, more)
            return made
        fields = [
            (s.targets[0].data, s.value)
            for c in reversed([c for c in lineage if isinstance(c, ClassValue)])
            for s in c.syntax.body
            if isinstance(s, Assign) and s.targets[0].op == "name"
        ]
        if layer or not fields:
            if any(map(is_live, (*args, *more.values()))) and not layer:
                raise Refused("unknown-operation", f"`{cls.name}` is made from tokens")
            return made
        given = dict(zip((name for name, _ in fields), args, strict=False)) | more
        with self.setup(cls.module):
            for name, default in fields:
                made.attributes[name] = given.get(
                    name, self.value(default) if default is not None else CONSTANT
                )
        return made

    def bound_member(self, base: Value, owner: ClassValue, syntax: Function | Expr) -> Value:
        if isinstance(syntax, Expr):
            with self.setup(owner.module):
                return self.value(syntax)
        if any(d.op == "name" and d.data == "property" for d in syntax.decorators) or any(
            d.op in ("name", "attr") and d.data == "cached_property" for d in syntax.decorators
        ):
            return self.call_routine(Routine(owner.module, syntax, None, base, owner), (), {})
        if any(d.op == "name" and d.data == "classmethod" for d in syntax.decorators):
            cls = base.cls if isinstance(base, Instance) else base
            return Routine(owner.module, syntax, None, cls, owner)
        return self.decorated(syntax, owner.module, base, owner)
