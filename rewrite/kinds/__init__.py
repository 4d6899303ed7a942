"""Token mixers, one kind a file.

A kind module has a docstring (what it matches, what it refuses, what becomes of it) and

    NAME      the kind's name, equal to the module's
    match     Mixer -> Match | Miss
    ACCEPTS   examples that match, each with the route it takes
    REJECTS   examples that do not, each with the kind that takes them instead, or None

Modules are found by listing this folder; there is no table to edit. Exactly one kind may match a
class: none is a refusal that names the nearest miss, two is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from ..ir import Match, Miss
from ..match import Mixer


@dataclass(frozen=True, slots=True)
class Example:
    """A class definition that a kind is shown. `name` is the class to classify."""

    name: str
    source: str
    route: str = "kernel"


@dataclass(frozen=True, slots=True)
class Counter:
    """A class a kind must not take; `kind` is who does (None: nobody)."""

    name: str
    source: str
    kind: str | None


@dataclass(frozen=True, slots=True)
class Kind:
    name: str
    doc: str
    match: Callable[[Mixer], Match | Miss]
    accepts: tuple[Example, ...]
    rejects: tuple[Counter, ...]


@cache
def all_kinds() -> tuple[Kind, ...]:
    """Every kind, by name."""
    found = []
    for info in sorted(iter_modules(__path__), key=lambda info: info.name):
        module = import_module(f"{__name__}.{info.name}")
        if info.name != module.NAME:
            raise TypeError(f"kind {info.name!r} calls itself {module.NAME!r}")
        if not (module.__doc__ and module.ACCEPTS and module.REJECTS):
            raise TypeError(f"kind {info.name!r} lacks a docstring, ACCEPTS or REJECTS")
        found.append(
            Kind(module.NAME, module.__doc__, module.match, module.ACCEPTS, module.REJECTS)
        )
    return tuple(found)
