"""Abstract values: what is known of a value without running anything.

An array is known by its axes, and an axis by its factors, outermost first, because a reshape may
merge axes: `[rows][length][features]` flattened to two axes is `[rows*length][features]`.

    rows      axis 0 of everything in a rewritten model: one row for each token of the batch
    wanted    rows again, after those without wanted logits have been dropped
    length    axis 1, of size one when rewritten, the tokens of a chunk when original
    order     rows and more of them, permuted as the expert sorting of MoE layers does
    feature   everything else; `size` is a key that equal sizes share, or None

Rows, wanted, length and order are token axes: what lies along them belongs to different tokens in
the rewritten or in the original model, so nothing may be computed across them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..ir import Class, Expr, Function


class Factor(NamedTuple):
    kind: str  # "rows" | "wanted" | "length" | "order" | "feature"
    size: Hashable = None  # of features; of an order: its identity
    under: tuple[Factor, ...] = ()  # of an order: the factors it permutes

    @property
    def is_token(self) -> bool:
        return self.kind != "feature"


Axis = tuple[Factor, ...]
ROWS, WANTED, LENGTH = Factor("rows"), Factor("wanted"), Factor("length")


def feature(size: Hashable = None) -> Axis:
    """One feature axis; of size one, it has no factors."""
    return () if size == 1 else (Factor("feature", size),)


def tokens(axis: Iterable[Factor]) -> tuple[Factor, ...]:
    return tuple(f for f in axis if f.is_token)


def spell_axis(axis: Axis) -> str:
    if not axis:
        return "[1]"
    return f"[{'*'.join('features' if f.kind == 'feature' else f.kind for f in axis)}]"


class Value:
    """Base of all abstract values; equal values behave equally."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Known(Value):
    """A Python value: None, a number, a string, a slice of such, ..."""

    value: Any


@dataclass(frozen=True, slots=True)
class Constant(Value):
    """A Python value of the config: unknown, but the same for all tokens and all calls.

    `key` is shared by values known to be equal.
    """

    key: Hashable = None


@dataclass(frozen=True, slots=True)
class Array(Value):
    """An array. `axes` is None for an array without tokens of unknown rank (a parameter).

    `open`: more feature axes follow, at least one, how many is not known. `tag`: what else is known
    of the entries: "start", the position of a chunk's first token; "end", its sequence's length;
    "steps", places in a chunk; "unturned", a rotary embedding without positions; "order", "inverse"
    and "owner" of the expert sorting; "row", one token's part in a loop over tokens, and "each",
    such parts of all tokens. `term` says how entries were computed, where a branch on the number of
    tokens makes that matter: equal terms are equal entries, up to a permutation of rows.
    """

    axes: tuple[Axis, ...] | None
    open: bool = False
    tag: tuple[Hashable, ...] = ()
    term: Hashable = field(default=None, compare=False)

    @property
    def token_factors(self) -> tuple[Factor, ...]:
        return tuple(f for axis in self.axes or () for f in axis if f.is_token)

    @property
    def live(self) -> bool:
        """Whether the array has something of single tokens in it."""
        return bool(self.token_factors) or self.tag[:1] in (("row",), ("each",))

    def __str__(self) -> str:
        if self.axes is None:
            return "a parameter"
        return "".join(map(spell_axis, self.axes)) + ("[...]" if self.open else "")


@dataclass(frozen=True, slots=True)
class Count(Value):
    """A number of tokens: the product of the factors' sizes times `rest`.

    Not `exact`: some number that depends on it.
    """

    factors: tuple[Factor, ...]
    rest: Hashable = 1
    exact: bool = True


@dataclass(frozen=True, slots=True)
class CountTest(Value):
    """A condition on a number of tokens; `key` is where it stands.

    Or one on what a paged cache is: `paged` is then what that one says, `alone` what caches of one
    sequence say.
    """

    factors: tuple[Factor, ...]
    key: Hashable
    single: bool | None = None  # what it says of chunks of one token
    alone: bool | None = None  # what it says of one sequence, as the original runs
    paged: bool | None = None  # what it says of rows, whatever their number


@dataclass(frozen=True, slots=True)
class Opaque(Value):
    """What rewritten code passes on: a "cache", a "mask", "handle"s of keys and values, ..."""

    kind: str


@dataclass(frozen=True, slots=True)
class Barred(Value):
    """A value that may be passed on but not used: what its use is refused for.

    `factors`: of the number of tokens that decides whether it is None, if that does.
    """

    slug: str
    message: str
    factors: tuple[Factor, ...] = ()
    at: Any = None  # where it is decided: a module and a span

    def use(self) -> Refused:
        return Refused(self.slug, self.message, at=self.at)


@dataclass(frozen=True, slots=True)
class Tuple(Value):
    items: tuple[Value, ...]


@dataclass(eq=False, slots=True)
class Items(Value):
    """A list: its `items` if their number is known, else what any of them may be.

    `depth` is how many branches and loops it was made under.
    """

    items: list[Value] | None
    element: Value | None
    depth: int
    forward: bool
    sources: tuple[Items, ...] = ()  # lists this one may be; a change of it changes them


@dataclass(frozen=True, slots=True)
class OpenShape(Value):
    """The shape of an array with unknown axes at its end."""

    head: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Numbers(Value):
    """Python numbers read from an array: one list for each entry of `axis`, or one token's."""

    axis: Axis
    one: bool = False


@dataclass(frozen=True, slots=True)
class ByToken(Value):
    """What a loop over tokens runs over: arrays and numbers with the same leading axis."""

    values: tuple[Value, ...]
    zipped: bool


@dataclass(frozen=True, slots=True)
class Super(Value):
    """`super()` of a method of `owner`."""

    this: Value
    owner: ClassValue


@dataclass(frozen=True, slots=True)
class Iterable_(Value):
    """Something to loop over, of unknown length, once."""

    element: Value


@dataclass(eq=False, slots=True)
class Table(Value):
    """A dictionary: its entries if all keys are known, and what any other entry may be."""

    entries: dict[Any, Value]
    other: Value | None
    depth: int
    forward: bool


@dataclass(eq=False, slots=True)
class Instance(Value):
    """An object of a class of the program; `layer` is the library layer it is (or derives from)."""

    cls: ClassValue | None
    attributes: dict[str, Value] = field(default_factory=dict)
    layer: str = ""
    depth: int = 0
    forward: bool = False  # made during a forward pass
    width: Hashable = None  # of what it gives, if that is known

    def __repr__(self) -> str:
        return f"<{self.cls.name if self.cls else self.layer}>"


@dataclass(frozen=True, slots=True)
class ClassValue(Value):
    module: str
    syntax: Class = field(compare=True)

    @property
    def name(self) -> str:
        return self.syntax.name

    @property
    def qualified(self) -> str:
        return f"{self.module}.{self.syntax.name}"


@dataclass(frozen=True, slots=True)
class Routine(Value):
    """A function of the program; `scope` are the names of the enclosing call, `bound` its self."""

    module: str
    syntax: Function | Expr
    scope: Any = None  # identity counts
    bound: Value | None = None
    owner: ClassValue | None = None


@dataclass(frozen=True, slots=True)
class Library(Value):
    """Something of a library, by dotted name, or a method `name` of `bound`."""

    name: str
    bound: Value | None = None


@dataclass(frozen=True, slots=True)
class Partial(Value):
    function: Value
    args: tuple[Value, ...]
    keywords: tuple[tuple[str, Value], ...]


@dataclass(frozen=True, slots=True)
class Choice(Value):
    """One of several values."""

    options: tuple[Value, ...]


class Undefined(Value):
    """The value of a name that this path has not set."""

    __slots__ = ()


NONE = Known(None)
ZERO, LAST, NO = Known(0), Known(-1), Known(False)
UNDEFINED = Undefined()
PARAMETER = Array(None)
CONSTANT = Constant()


class Dead(Exception):
    """This path raises in Python: nothing comes after it."""


class Refused(Exception):
    """The proof ends here. `slug` is one of the diagnostics', `nearest` what would be provable.

    `at` is where, if that is not where the interpreter stands: a module and a span.
    """

    def __init__(self, slug: str, message: str, nearest: str = "", at: Any = None) -> None:
        super().__init__(message)
        self.slug, self.message, self.nearest, self.at = slug, message, nearest, at


def leads(value: Value) -> bool:
    """Whether rows are the first axis of an array and in no other."""
    if not isinstance(value, Array) or value.tag or not value.axes or value.axes[0] != (ROWS,):
        return False
    return not any(map(tokens, value.axes[1:]))


def options(value: Value) -> tuple[Value, ...]:
    return value.options if isinstance(value, Choice) else (value,)


def parts(value: Value) -> Iterator[Value]:
    """What a container holds."""
    match value:
        case Tuple(items=items):
            yield from items
        case Items(items=items, element=element):
            yield from items or ()
            if element is not None:
                yield element
        case Iterable_(element=element):
            yield element
        case Slice(lower=lower, upper=upper, step=step):
            yield from (lower, upper, step)
        case Table(entries=entries, other=other):
            yield from entries.values()
            if other is not None:
                yield other
        case Choice(options=several):
            yield from several
        case Partial(function=function, args=args, keywords=keywords):
            yield function
            yield from args
            yield from (v for _, v in keywords)


def is_live(value: Value) -> bool:
    """Whether tokens, or how many there are, may show in the value."""
    match value:
        case Array():
            return value.live
        case Count() | CountTest() | Opaque() | Barred() | Numbers() | ByToken():
            return True
        case Instance():
            return value.forward and any(is_live(v) for v in value.attributes.values())
        case Routine(scope=scope, bound=bound):
            if bound is not None and is_live(bound):
                return True
            return scope is not None and scope.forward
        case Library(bound=bound):
            return bound is not None and is_live(bound)
    return any(is_live(part) for part in parts(value))


# --------------------------------------------------------------------------- joins


def join_axes(one: Axis, two: Axis) -> Axis | None:
    if one == two:
        return one
    if tuple(f.kind for f in one) != tuple(f.kind for f in two):
        if not tokens(one) and not tokens(two):
            return feature()
        return None
    if tokens(one) != tokens(two):
        return None
    return tuple(
        a if a == b or a.is_token else Factor("feature", _either(a.size, b.size))
        for a, b in zip(one, two, strict=True)
    )


def _either(one: Hashable, two: Hashable) -> Hashable:
    """The key of a size that is one of two."""
    if one is None or two is None:
        return None
    found: set[Hashable] = set()
    for key in (one, two):
        several = isinstance(key, tuple) and key[:1] == ("or",)
        found |= key[1] if several else {key}  # type: ignore[index]
    return ("or", frozenset(found)) if len(found) <= 4 else None


def join(one: Value, two: Value) -> Value:
    """What is true of both, or a choice of both."""
    if one is two:
        return one
    if one == two and not isinstance(one, Tuple):
        differ = isinstance(one, Array) and isinstance(two, Array) and one.term != two.term
        return Array(one.axes, one.open, one.tag) if differ and isinstance(one, Array) else one
    if isinstance(one, Undefined):
        return two
    if isinstance(two, Undefined):
        return one
    match one, two:
        case Array(), Array():
            joined = _join_arrays(one, two)
            if joined is not None:
                return joined
        case Tuple(items=a), Tuple(items=b) if len(a) == len(b):
            return Tuple(tuple(join(x, y) for x, y in zip(a, b, strict=True)))
        case Iterable_(element=a), Iterable_(element=b):
            return Iterable_(join(a, b))
        case Items(), Items() if one.forward == two.forward:
            return _join_lists(one, two)
        case Count(factors=f, rest=r, exact=e), Count(factors=g, rest=s, exact=d):
            merged = f if f == g else tuple(dict.fromkeys((*f, *g)))
            return Count(merged, r, e and d and f == g and r == s)
        case Constant(), Constant() | Known():
            if not isinstance(two, Known) or two.value is not None:
                return CONSTANT
        case Known(), Constant():
            if one.value is not None:
                return CONSTANT
    return choice((*options(one), *options(two)))


def _join_lists(one: Items, two: Items) -> Items:
    """A list that is one of two; changes of it are told to both."""
    sources = tuple(dict.fromkeys((*(one.sources or (one,)), *(two.sources or (two,)))))
    if one.items is not None and two.items is not None and len(one.items) == len(two.items):
        items = [join(a, b) for a, b in zip(one.items, two.items, strict=True)]
        return Items(items, None, -1, one.forward, sources[-_WIDEST:])
    element = choice(
        v for held in (one, two) for v in (*(held.items or ()), held.element or UNDEFINED)
    )
    return Items(None, element, -1, one.forward, sources[-_WIDEST:])


def _join_arrays(one: Array, two: Array) -> Array | None:
    if one.tag != two.tag:
        return None
    if one.axes is None or two.axes is None:
        return PARAMETER if not one.live and not two.live else None
    if len(one.axes) != len(two.axes) or one.open != two.open:
        return PARAMETER if not one.live and not two.live else None
    merged = [join_axes(a, b) for a, b in zip(one.axes, two.axes, strict=True)]
    if any(axis is None for axis in merged):
        return None
    term = one.term if one.term == two.term else None
    return Array(tuple(axis for axis in merged if axis is not None), one.open, one.tag, term)


_WIDEST = 12


def choice(values: Iterable[Value]) -> Value:
    """One of the values; constants of the config beyond a few become one unknown."""
    found: list[Value] = []
    for value in values:
        for option in options(value):
            if isinstance(option, Undefined):
                continue
            if isinstance(option, Array):
                for i, other in enumerate(found):
                    if isinstance(other, Array):
                        joined = _join_arrays(other, option)
                        if joined is not None:
                            found[i] = joined
                            break
                else:
                    found.append(option)
            elif isinstance(option, Items):
                for i, other in enumerate(found):
                    if isinstance(other, Items) and other.forward == option.forward:
                        found[i] = other if other is option else _join_lists(other, option)
                        break
                else:
                    found.append(option)
            elif not any(option is other or option == other for other in found):
                found.append(option)
    constants = [v for v in found if isinstance(v, (Known, Constant)) and v != NONE]
    if len(constants) > 3 or (
        len(constants) > 1 and any(isinstance(v, Constant) for v in constants)
    ):
        found = [v for v in found if v not in constants] + [CONSTANT]
    if not found:
        return UNDEFINED
    if len(found) > _WIDEST:
        raise Refused("unknown-operation", f"more than {_WIDEST} different values meet here")
    return found[0] if len(found) == 1 else Choice(tuple(found))


@dataclass(frozen=True, slots=True)
class Slice(Value):
    lower: Value
    upper: Value
    step: Value
