"""The state of a proof, how rules are applied in it, and what its parts ask of each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..ir import Assumption, Expr, Function, Span, Stmt
from . import rules as array_rules
from .domain import (
    NONE,
    PARAMETER,
    UNDEFINED,
    Array,
    Choice,
    ClassValue,
    CountTest,
    Dead,
    Instance,
    Items,
    Known,
    Library,
    Refused,
    Routine,
    Value,
    choice,
    is_live,
    join,
)
from .marks import bare, marked, row_of, unturned
from .rules import Rule
from .terms import term_of, termed
from .world import World

# What a permutation of rows that is undone is made of: none of it changes an entry.
_PERMUTING = (
    "flatten",
    "unflatten",
    "index",
    "expand_dims",
    "squeeze",
    "stop_gradient",
    "contiguous",
)
UNROLLED = 24
ROPES = "mlx_vlm.models.rope_utils"
# Positions are no data: of all rules, these know them.
_PLACES = (("start",), ("end",), ("steps",))
_PLACED = frozenset("array fast.rope index nn.RoPE row_positions".split())


class Fork(Exception):
    """A branch on a number of tokens: the call is run both ways and compared."""

    def __init__(self, test: CountTest) -> None:
        self.test = test


@dataclass(eq=False, slots=True)
class Scope:
    """The names of one call."""

    module: str
    names: dict[str, Value]
    parent: Scope | None
    forward: bool
    aliases: set[str] = field(default_factory=set)  # names of what others hold, too
    outer: set[str] = field(default_factory=set)  # declared global or nonlocal


@dataclass(eq=False, slots=True)
class Frame:
    scope: Scope
    owner: ClassValue | None
    this: Value | None
    where: Span
    returns: Value = UNDEFINED
    breaks: list[dict[str, Value]] = field(default_factory=list)
    continues: list[dict[str, Value]] = field(default_factory=list)


def _hint(key: str, value: Value) -> Hashable:
    """The term of a keyword's value; whether indices are sorted tells how to compute, not what."""
    if key == "sorted_indices" and value == Known(False):
        return term_of(CountTest((), None))
    return term_of(value)


class Machine(ABC):
    """The state of one proof and what each part of the interpreter is built on."""

    def __init__(self, world: World, claims: dict[str, str]) -> None:
        self.world = world
        self.claims = claims
        self.frames: list[Frame] = []
        self.forward = False
        self.depth = 0
        self.module_values: dict[tuple[str, str], Value] = {}
        self.memo: dict[Any, Value] = {}
        self.lineages: dict[tuple[str, int], list[ClassValue | Library]] = {}
        self.unmemoised = 0
        self.assumed: dict[Any, bool] = {}
        self.digests: dict[str, str] = {}  # of functions known by their text
        self.singly = 0  # inside calls for each position of a chunk alone
        self.assumptions: dict[Assumption, None] = {}
        self.reads: set[tuple[int, str]] = set()  # of attributes, where they may show
        self.own_reads: set[tuple[int, str]] = set()  # by what is kept under the same name
        self.kept: dict[tuple[int, str], set[Any]] = {}  # by the forward, and where
        # Frames, names, and reads of these that show nowhere else.
        self.apart: list[tuple[int, frozenset[str], set[tuple[int, str]]]] = []
        self.noting: list[frozenset[str]] = []  # of branches that do nothing else
        self.noted: set[str] = set()  # attributes that caches get and only their setting reads
        self.operations: set[str] = set()
        self.positioned: Any = None  # where positions of a cache were read first
        self.position_places: set[Any] = set()  # all of these outside of mixers
        self.behind: Any = None  # where they were read behind what was written
        self.written = False  # whether anything writes keys, or runs a mixer on its own caches
        self.grown = False  # whether anything did on the way that leads here
        # Mixers that run on sequences' own rows, called with caches, and without any: where.
        self.cached: set[ClassValue | None] = set()
        self.cacheless: dict[ClassValue | None, Any] = {}
        self.states: dict[int, Value] = {}  # entries of the cache of several sequences
        self.ropes: tuple[str, ...] = (ROPES,)  # modules whose ropes are the runtime's own
        self.changes = 0  # of states, and of what is kept on a mixer
        self.sequences = False  # rows are whole sequences, positions the author's own business
        self.on_rows = False  # a mixer on rows: only ops know whose states are whose
        self.tying = False  # under a branch that only ties a cache's keys to other results
        self.added: list[tuple[Items, Value, int]] | None = None  # in a loop over tokens

    @property
    def frame(self) -> Frame:
        return self.frames[-1]

    def at(self, expr: Expr) -> None:
        self.frame.where = expr.span

    def here(self) -> Any:
        frame = self.frames[-1]
        return (frame.scope.module, frame.where)

    def consulted(self, base: Instance, name: str) -> None:
        """An attribute of the model is read, or asked for, by the forward.

        What a test reads whose branch does nothing but keep it shows nowhere else, nor what an
        attribute's own new value is made from.
        """
        if not self.forward or base.forward:
            return
        for depth, names, found in self.apart:
            if depth == len(self.frames) and name in names:
                found.add((id(base), name))
                return
        self.reads.add((id(base), name))

    def assume(self, text: str) -> None:
        place = None
        if self.frames:
            module = self.world.text(self.frames[-1].scope.module)
            place = module.place(self.frames[-1].where) if module is not None else None
        self.assumptions[Assumption(text, place)] = None

    def apply(self, rule: Rule, args: Sequence[Value], more: dict[str, Value]) -> Value:
        """A rule, for every combination of what its arguments may be."""

        def run(args: Sequence[Value], more: dict[str, Value]) -> Value:
            live = any(map(is_live, (*args, *more.values())))
            if live:
                self.operations.add(rule.name)
                if rule.name not in _PLACED:
                    for value in (*args, *more.values()):
                        if isinstance(value, Array) and value.tag[:1] in _PLACES:
                            array_rules.elementwise(self, value)
                if rule.name != "paged_attention":
                    for value in (*args, *more.values()):
                        if (wrong := unturned(value)) is not None:
                            array_rules.elementwise(self, wrong)
            try:
                row = row_of((*args, *more.values()))
                if row is not None:
                    return self.on_row(rule, row, args, more)
                return self.with_term(rule.name, rule.apply(self, *args, **more), args, more)
            except TypeError:
                if not live:
                    return PARAMETER
                raise Refused(
                    "unknown-operation", f"{rule.name} is called in a way that its rule lacks"
                ) from None
            except Refused:
                if not live:
                    return PARAMETER
                raise

        return self.each(run, args, more)

    def with_term(
        self, name: Hashable, result: Value, args: Sequence[Value], more: dict[str, Value]
    ) -> Value:
        """The result, told by how it was computed, while both ways of a branch are compared."""
        if not self.unmemoised:
            return result
        first = args[0] if args else NONE
        if name in _PERMUTING and isinstance(first, Array):
            order = [v for v in args[1:] if isinstance(v, Array) and v.live]
            restored = all(v.tag[:1] in (("order",), ("owner",), ("inverse",)) for v in order)
            if restored and (order or name != "index"):
                return termed(result, first.term)
        names = sorted(more)
        words = (*map(term_of, args), *(_hint(key, more[key]) for key in names))
        return termed(result, None if None in words else (name, *names, *words))

    def on_row(self, rule: Rule, row: Any, args: Sequence[Value], more: dict[str, Value]) -> Value:
        """A rule for one token's parts: whatever it computes, it computes for each token alone."""
        inner = [bare(v) for v in args]
        named = {k: bare(v) for k, v in more.items()}
        if any(map(is_live, (*inner, *named.values()))):
            raise Refused("row-mixing", "one token's part meets the parts of others")
        return marked(rule.apply(self, *inner, **named), row)

    def each(
        self,
        function: Callable[[Sequence[Value], dict[str, Value]], Value],
        args: Sequence[Value],
        more: dict[str, Value],
    ) -> Value:
        """Call a function for each choice among its arguments and join the results."""
        for i, value in enumerate(args):
            if isinstance(value, Choice):
                return self.join_calls(
                    lambda option, i=i: self.each(  # type: ignore[misc]
                        function, [*args[:i], option, *args[i + 1 :]], more
                    ),
                    value.options,
                )
        for key, value in more.items():
            if isinstance(value, Choice):
                return self.join_calls(
                    lambda option, key=key: self.each(  # type: ignore[misc]
                        function, args, {**more, key: option}
                    ),
                    value.options,
                )
        return function(args, more)

    def join_calls(self, function: Callable[[Value], Value], several: Sequence[Value]) -> Value:
        """What a function gives for any of several values; those that raise give nothing."""
        frames, depth, forward = len(self.frames), self.depth, self.forward
        found: list[Value] = []
        taken: list[Value] = []
        before = after = self.grown
        for option in several:
            self.grown = before
            try:
                found.append(function(option))
                taken.append(option)
            except Dead:
                del self.frames[frames:]
                self.depth, self.forward = depth, forward
            after = after or self.grown
        self.grown = after
        if not found:
            raise Dead
        result = choice(found) if len(found) > 2 else join(found[0], found[-1])
        if self.unmemoised and isinstance(result, Array) and result.term is None:
            words = tuple(map(term_of, (*taken, *found)))
            return termed(result, None if None in words else ("either", words))
        return result

    @abstractmethod
    def value(self, expr: Expr) -> Value:
        """What an expression is."""

    @abstractmethod
    def block(self, body: Sequence[Stmt]) -> bool:
        """Run statements in order; True if control never gets past them."""

    @abstractmethod
    def assign(self, target: Expr, value: Value, expr: Expr | None) -> None:
        """Bind a target."""

    @abstractmethod
    def call(self, callee: Value, args: Sequence[Value], more: dict[str, Value]) -> Value:
        """The result of a call of anything."""

    @abstractmethod
    def call_routine(
        self, routine: Routine, args: Sequence[Value], more: dict[str, Value]
    ) -> Value:
        """The result of a call of a function that is read."""

    @abstractmethod
    def bind(
        self, routine: Routine, args: Sequence[Value], more: dict[str, Value]
    ) -> dict[str, Value]:
        """Arguments to parameters, as Python does it."""

    @abstractmethod
    def decorated(
        self, function: Function, module: str, this: Value | None, owner: ClassValue | None
    ) -> Value:
        """A function with its decorators applied."""
