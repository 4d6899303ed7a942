"""Runs a rewritten model on abstract values: which axes everything has, from ids to logits.

The entry class is built by its own `__init__` from an unknown config, then called with ids
[rows][length] and caches. Branches on the config run both ways, loops run until nothing new is
learnt, calls are followed into every function and layer that can be read. What cannot be followed
is refused, unless a rule says what it does to token axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir import Function, Place
from .calls import Calls
from .domain import (
    LENGTH,
    ROWS,
    Array,
    ClassValue,
    Constant,
    Dead,
    Instance,
    Items,
    Opaque,
    Refused,
    Tuple,
    Value,
    feature,
    leads,
    options,
    parts,
)
from .expressions import Expressions
from .machine import ROPES
from .rules import array
from .shapes import are_rows
from .statements import Statements
from .world import REWRITTEN

_CALLS = 8
# What a language model inside a larger one is called with, beside ids and caches.
EMBEDS = Array(((ROWS,), (LENGTH,), feature(("embeds",))))
POSITIONS = Array((feature(3), (ROWS,), (LENGTH,)))
POSITIONS_LAST = Array(((ROWS,), (LENGTH,), feature(3)))  # as some models stack them


@dataclass(frozen=True, slots=True)
class Failure:
    """Where and why a proof ends."""

    slug: str
    message: str
    nearest: str
    place: Place | None
    label: str


class Interpreter(Statements, Expressions, Calls):
    """One proof. `claims` are the classes whose mixing a kind has taken, by name and kind."""

    def prove(
        self, module: str, entry: str, calls: Sequence[Mapping[str, Value]] = ({},)
    ) -> Failure | None:
        """Run `entry(config)(ids, cache=caches, **given)` for each of `calls`; None if every step
        is row by row."""

        def run(cls: ClassValue) -> None:
            model = self.instantiate(cls, (Constant(("config",)),), {})
            self.forward = True
            ids = Array(((ROWS,), (LENGTH,)))
            for given in calls:
                out = self.call(model, (ids,), {"cache": Opaque("cache"), **given})
                self.check_logits(out)
            self.check_caches()

        return self.failure_of(run, module, entry)

    def keeps_apart(self, module: str, entry: str, given: dict[str, Value]) -> Failure | None:
        """Run `entry(...)(**given)` on several sequences; None if none shows in another.

        Rows are sequences here, and what a call leaves in the cache is found by the next.
        """
        self.sequences = True
        self.ropes = (ROPES, "mlx_lm.models.rope_utils")

        def run(cls: ClassValue) -> None:
            mixer = self.made(cls)
            self.forward = True
            for _ in range(_CALLS):
                before = self.changes
                self.memo.clear()
                out = self.call(mixer, (), dict(given))
                if self.changes == before:
                    self.check_rows(out)
                    return
            raise Refused("unknown-operation", "states that keep changing their axes")

        return self.failure_of(run, module, entry)

    def rows_alone(self, module: str, entry: str, given: dict[str, Value]) -> Failure | None:
        """Run `entry(...)(**given)` on rows of single tokens; None if none shows in another.

        States of the cache may go to ops only, and only what an op made of one goes back.
        """
        self.on_rows = True
        self.ropes = (ROPES, "mlx_lm.models.rope_utils")

        def run(cls: ClassValue) -> None:
            mixer = self.made(cls)
            self.forward = True
            self.check_tokens(self.call(mixer, (), dict(given)))

        return self.failure_of(run, module, entry)

    def failure_of(
        self, run: Callable[[ClassValue], None], module: str, entry: str
    ) -> Failure | None:
        """What a run of a class ends with, None if nothing is refused."""
        try:
            cls = self.global_value(module, entry)
            if not isinstance(cls, ClassValue):
                raise Refused("unknown-operation", f"`{entry}` is not a class that can be read")
            run(cls)
        except Refused as problem:
            return self.failure(problem)
        except Dead:
            if self.cacheless:
                return self.failure(self.without_cache(*next(iter(self.cacheless.items()))))
            return self.failure(Refused("unknown-operation", "every path ends in an error"))
        except RecursionError:
            return self.failure(Refused("unknown-operation", "calls nest too deeply"))
        return None

    def made(self, cls: ClassValue) -> Value:
        """An instance, from arguments of which nothing is known."""
        found = self.member(cls, "__init__")
        more: dict[str, Value] = {}
        if found is not None and isinstance(found[1], Function):
            plain = [p for p in found[1].parameters[1:] if not p.kind.startswith("*")]
            more = {p.name: Constant(("given", p.name)) for p in plain}
        return self.instantiate(cls, (), more)

    def check_rows(self, out: Value) -> None:
        for one in options(out):
            if isinstance(one, (Tuple, Items)):
                for part in parts(one):
                    self.check_rows(part)
            elif isinstance(one, Array):  # the runtime takes nothing else but None
                if not leads(one):
                    raise Refused("row-mixing", f"the mixer returns axes {one}")

    def check_tokens(self, out: Value) -> None:
        for one in options(out):
            if isinstance(one, (Tuple, Items)):
                for part in parts(one):
                    self.check_tokens(part)
            elif isinstance(one, Array) and (one.tag or not are_rows(one.axes or ())):
                raise Refused("row-mixing", f"the mixer returns axes {one}")

    def check_logits(self, out: Value) -> None:
        for one in options(out):
            first = one.items[0] if isinstance(one, Tuple) and one.items else one
            if isinstance(one, Instance):
                first = one.attributes.get("logits", one)
            for logits in map(array, options(first)):
                axes = logits.axes or ()
                good = len(axes) == 3 and axes[0][:1] and axes[0][0].kind in ("rows", "wanted")
                if logits.open and len(axes) == 2:
                    good = True
                if not good or len(axes[0]) != 1 or axes[1] != (LENGTH,):
                    raise Refused("row-mixing", f"the model returns axes {logits}")

    def check_caches(self) -> None:
        """Caches grow by what is written to them, and mixers go on from what they find there: what
        no path does is refused here, what some paths may not do the runtime tells of."""
        for owner, where in self.cacheless.items():
            if owner not in self.cached:
                raise self.without_cache(owner, where)
        if self.behind is not None:
            message = "positions are read after tokens went to a cache"
            raise Refused("position-special", message, at=self.behind)
        if self.positioned is not None and not self.written:
            raise Refused(
                "position-special",
                "positions are read from a cache that nothing is written to: they stay 0",
                at=self.positioned,
            )

    @staticmethod
    def without_cache(owner: ClassValue | None, where: Any) -> Refused:
        name = f"`{owner.name}`" if owner is not None else "a mixer"
        message = f"{name} is never given a cache: each row would begin a sequence"
        return Refused("cache-use", message, at=where)

    def failure(self, problem: Refused) -> Failure:
        """The innermost place in the file itself, or in a rewritten sibling."""
        where, label = None, ""
        if problem.at is not None:
            module, span = problem.at
            text = self.world.text(module)
            self.frames.clear()
            place = text.place(span) if text is not None else None
            return Failure(problem.slug, problem.message, problem.nearest, place, "")
        for frame in reversed(self.frames):
            text = self.world.text(frame.scope.module)
            if text is None:
                continue
            found = text.place(frame.where)
            if where is None:
                where = found
            if frame.scope.module.startswith(REWRITTEN):
                if found is not where:
                    label = f"reaches {where}"
                where = found
                break
        self.frames.clear()
        return Failure(problem.slug, problem.message, problem.nearest, where, label)
