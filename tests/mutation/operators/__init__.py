"""Every operator, by name. A module of this folder holds one family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..source import Change, File

Apply = Callable[[File], Iterator[Change]]


@dataclass(frozen=True)
class Operator:
    """One way to change a model file.

    `says` is one line for the report. `same` operators spell the same computation differently:
    refusing one of their mutants is over-cautious, not wrong.
    """

    name: str
    family: str
    says: str
    apply: Apply
    same: bool = False


OPERATORS: dict[str, Operator] = {}


def operator(name: str, says: str, *, same: bool = False) -> Callable[[Apply], Apply]:
    """Register a generator of changes."""

    def register(apply: Apply) -> Apply:
        if name in OPERATORS:
            raise ValueError(f"two operators are called {name}")
        family = apply.__module__.rsplit(".", 1)[-1]
        OPERATORS[name] = Operator(name, family, says, apply, same)
        return apply

    return register


def all_operators() -> dict[str, Operator]:
    from . import (  # noqa: F401
        attention,
        blocks,
        caches,
        classic,
        fetch,
        masks,
        positions,
        structure,
        tokens,
    )

    return dict(sorted(OPERATORS.items()))
