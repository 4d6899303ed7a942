"""Attributes read and set; what the forward keeps on the model must not change it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..ir import Assign, Evaluate, Expr, For, If, Stmt
from .classes import Classes
from .domain import (
    CONSTANT,
    NONE,
    ROWS,
    UNDEFINED,
    Array,
    Barred,
    ByToken,
    Choice,
    ClassValue,
    Constant,
    Count,
    CountTest,
    Dead,
    Instance,
    Items,
    Iterable_,
    Known,
    Library,
    Numbers,
    Opaque,
    OpenShape,
    Partial,
    Refused,
    Routine,
    Super,
    Table,
    Tuple,
    Undefined,
    Value,
    feature,
    is_live,
    join,
)
from .rules import RULES
from .states import States
from .terms import termed
from .world import REWRITTEN

# Ways around names and attributes, to read or to set.
_INSIDES = frozenset(
    "__dict__ __globals__ __closure__ __code__ __defaults__ __kwdefaults__ __self__ __setattr__ "
    "__delattr__ __getattribute__ __setitem__ __delitem__".split()
)

# What the runtime's masks have; asked for anything else, they raise.
_OF_MASKS = ("window", "chunk", "prefix", "return_array", "kind", "path", "kept", "floating")

# What caches of mlx_lm and mlx_vlm keep for themselves.
CACHES_OWN = frozenset(
    "_buffer _idx _invalidate_derived_metadata _left_padding _left_padding_advance _lengths "
    "_lengths_advance _lru _lrus _n_bytes _n_bytes_by_type _offset _ordering _planned_drop "
    "_pool_lengths _processed _recorded_length _right_padding _size _speculation "
    "_speculation_generation _speculative_valid_lengths _target_size _temporal_order _trie _trim "
    "_update_concat _update_in_place __dict__ __class__ __slots__".split()
)
_PARAMETERS = ("weight", "bias", "scales", "biases")


class Attributes(Classes, States):
    def attribute(self, base: Value, name: str) -> Value:
        if self.forward and name in _INSIDES:
            raise Refused("unknown-operation", f"`{name}` shows what the proof does not follow")
        match base:
            case Choice(options=several):
                return self.join_calls(lambda one: self.attribute(one, name), several)
            case Array():
                return self.array_attribute(base, name)
            case Instance():
                return self.instance_attribute(base, name)
            case Super(this=this, owner=owner):
                return self.super_attribute(this, owner, name)
            case ClassValue():
                return self.class_attribute(base, name)
            case Library(bound=None):
                return self.dotted(f"{base.name}.{name}")
            case Library(name="at."):
                return Library(f"at.{name}", base.bound)
            case Opaque(kind="cache"):
                if name == "offset":
                    self.read_positions()
                    return Array(((ROWS,),), tag=("start",))
                if name == "state":
                    return Tuple((Opaque("handle"), Opaque("handle")))  # of what another wrote
                if name in ("keys", "values"):
                    return Opaque("pages")  # what mx.depends ties to the end of a pipeline
                if name.startswith("__"):
                    raise Refused("cache-use", f"`.{name}` of a cache: a paged one has another")
                if name == "start_position":
                    return Opaque("first position kept")
                return Library(f"opaque.{name}", base)
            case Opaque(kind="object") if name not in _OF_MASKS and not name.startswith("_"):
                raise Dead
            case Opaque(kind="states"):
                return self.state_attribute(name)
            case Opaque(kind="handle") if name == "dtype":
                return CONSTANT
            case Opaque(kind="handle") if name == "shape":
                end = Array(((ROWS,),), tag=("end",))
                return Tuple((Count((ROWS,)), CONSTANT, end, CONSTANT))
            case Opaque(kind=kind):
                raise Refused("cache-use", f"`.{name}` of a {kind}")
            case Items() | Tuple() | Iterable_() | OpenShape():
                return Library(f"items.{name}", base)
            case Table():
                return Library(f"table.{name}", base)
            case Known(value=None) | Undefined():
                raise Dead
            case Constant(key=("number",)):
                raise Dead
            case Barred():
                raise base.use()
            case Constant(key=key):
                return Constant((key, name)) if key is not None else CONSTANT
            case Partial() | Routine():
                if name in ("__name__", "__call__"):
                    return base if name == "__call__" else CONSTANT
                return CONSTANT
            case Count() | CountTest():
                raise Refused("token-count", "a number of tokens is used as data")
            case Numbers() | ByToken():
                raise Refused("token-branch", "what tokens hold is read by Python")
        if is_live(base):
            raise Refused("unknown-operation", f"`.{name}` of what is not known")
        return CONSTANT

    def read_positions(self) -> None:
        """A cache's positions are read: before it grows by this chunk, which mixers are known for.

        Elsewhere a place that is met for the first time after something was written reads them
        behind it, as far as this analysis can tell the caches of layers apart.
        """
        self.positioned = self.positioned or self.here()
        if any(frame.owner is not None and self.is_mixer(frame.owner) for frame in self.frames):
            return
        if self.grown and self.here() not in self.position_places:
            self.behind = self.behind or self.here()
        self.position_places.add(self.here())

    def is_mixer(self, owner: ClassValue) -> bool:
        name = owner.qualified
        return name in self.claims or name.removeprefix(REWRITTEN) in self.claims

    def array_attribute(self, base: Array, name: str) -> Value:
        if name == "shape":
            if base.axes is None:
                return Iterable_(CONSTANT)
            entries = tuple(self.shape_entry(base, i) for i in range(len(base.axes)))
            return OpenShape(entries) if base.open else Tuple(entries)
        if name == "size":
            if not base.live:
                return CONSTANT
            factors = tuple(f for axis in base.axes or () for f in axis)
            return Count(tuple(f for f in factors if f.is_token), ("size",), True)
        if name == "ndim":
            return Known(len(base.axes)) if base.axes is not None and not base.open else CONSTANT
        if name == "nbytes" and base.live:
            raise Refused("token-count", "the size of an array is used as data")
        if name in ("dtype", "itemsize", "nbytes"):
            return Constant((name, base.term)) if base.term is not None else CONSTANT
        if name == "T":
            return self.apply(RULES["transpose"], (base,), {})
        if name == "at":
            return Library("at", base)
        return Library(f"array.{name}", base)

    def shape_entry(self, x: Array, place: int) -> Value:
        assert x.axes is not None
        axis = x.axes[place]
        held = tuple(f for f in axis if f.is_token)
        rest = [f for f in axis if not f.is_token]
        if not held:
            if not axis:
                return Known(1)
            key = rest[0].size if len(rest) == 1 else None
            return Known(key) if isinstance(key, int) else Constant(key)
        if not rest:
            return Count(held)
        return Count(held, ("sizes", tuple(f.size for f in rest)), exact=len(rest) == 1)

    def instance_attribute(self, base: Instance, name: str) -> Value:
        self.consulted(base, name)
        if name == "__dict__" and self.forward and not base.forward:
            raise Refused("state-on-self", "the attributes of a layer as a dictionary")
        found = base.attributes.get(name)
        if found is not None:
            return self.held(base, name, found)
        if base.cls is not None:
            member = self.member(base.cls, name)
            if member is not None:
                return self.bound_member(base, *member)
        if base.layer and name in _PARAMETERS:
            rank = 1 if name == "bias" or base.layer.endswith("Norm") else 2
            return self.held(base, name, Array((feature(),) * rank))
        if name == "training":
            return Known(False)
        if self.forward and not base.layer and base.cls is not None and name in _PARAMETERS:
            raise Dead  # a module of the program's own has what its `__init__` made
        return Library(f"layer.{name}", base)

    def held(self, base: Instance, name: str, value: Value) -> Value:
        """A value of an object, known by whose it is while both ways of a branch are compared."""
        if self.unmemoised and isinstance(value, Array) and value.term is None:
            return termed(value, ("held", id(base), name))
        if isinstance(value, Constant) and value.key is None:
            return Constant(("held", id(base), name))
        return value

    def super_attribute(self, this: Value, owner: ClassValue, name: str) -> Value:
        if isinstance(this, Instance) and this.cls is not None:
            member = self.member(this.cls, name, after=owner)
            if member is not None:
                return self.bound_member(this, *member)
            if name == "__init__":
                return Library("builtins.object")
            return Library(f"layer.{name}", this)
        return CONSTANT

    def class_attribute(self, base: ClassValue, name: str) -> Value:
        member = self.member(base, name)
        if member is None:
            return CONSTANT
        owner, syntax = member
        if isinstance(syntax, Expr):
            with self.setup(owner.module):
                return self.value(syntax)
        if any(d.op == "name" and d.data == "classmethod" for d in syntax.decorators):
            return Routine(owner.module, syntax, None, base, owner)
        return Routine(owner.module, syntax, None, None, owner)

    def store_attribute(self, base: Value, name: str, value: Value, expr: Expr | None) -> None:
        if isinstance(base, Choice):
            for option in base.options:
                if isinstance(option, Instance) and (self.forward and not option.forward):
                    self.store_attribute(option, name, value, expr)
                elif isinstance(option, Instance):
                    held = option.attributes.get(name, UNDEFINED)
                    option.attributes[name] = join(held, value)
                elif option != NONE:
                    self.store_attribute(option, name, value, expr)
            return
        if isinstance(base, Instance):
            if self.forward and not base.forward:
                self.store_on_model(base, name, value, expr)
                return
            old = base.attributes.get(name)
            sure = base.depth == self.depth or old is None
            base.attributes[name] = value if sure or old is None else join(old, value)
        elif isinstance(base, Opaque):
            if base.kind == "cache" and name[:1] == "_" and not is_live(value):
                self.note(name)
            elif value != Opaque("pages"):
                raise Refused("cache-use", f"`.{name}` of a cache is set")
        elif self.forward:
            raise Refused("state-on-self", f"`.{name}` of something shared is set")

    def note(self, name: str) -> None:
        """A cache gets an attribute of the author's own: what only decides whether to set it."""
        if name in CACHES_OWN or not any(f"cache.{name}" in names for names in self.noting):
            raise Refused("cache-use", f"`.{name}` of a cache is set")
        if (0, name) in self.reads:
            raise Refused("cache-use", f"`.{name}` of a cache is read elsewhere and set here")
        self.noted.add(name)

    def noticed(self, name: str) -> bool:
        """An attribute of the author's own is asked of a cache; whether it may be there."""
        for depth, names, _ in self.apart:
            if depth == len(self.frames) and f"cache.{name}" in names:
                return True
        if name in self.noted:
            raise Refused("cache-use", f"`.{name}` of a cache is set and read elsewhere")
        self.reads.add((0, name))
        return False

    @contextmanager
    def reading_apart(self, names: frozenset[str]) -> Iterator[set[tuple[int, str]]]:
        """While an expression of this very frame is evaluated: what it reads of the names."""
        found: set[tuple[int, str]] = set()
        self.apart.append((len(self.frames), names, found))
        try:
            yield found
        finally:
            self.apart.pop()

    def store_on_model(self, base: Instance, name: str, value: Value, expr: Expr | None) -> None:
        """What the forward keeps on the model must be the same whenever it is kept, and nothing
        may tell whether it has been kept before: the first call would differ from later ones."""
        old = base.attributes.get(name, NONE)
        if is_live(value):
            raise Refused(
                "state-on-self", f"`.{name}` keeps what tokens hold for the next call", "a cache"
            )
        if self.sequences:  # what is kept holds nothing of a sequence; when, is not asked here
            kept = value if old == NONE else join(old, value)
            if kept != old:
                base.attributes[name] = kept
                self.changes += 1
                self.memo.clear()
            return
        key, here = (id(base), name), self.here()
        places = self.kept.setdefault(key, set())
        settles = expr is not None and mentions(expr, name) and _settles(expr)
        if here not in places:
            if key in self.reads or (id(base), "*") in self.reads:
                raise Refused("state-on-self", f"`.{name}` is read before it is kept", "a cache")
            if key in self.own_reads and not settles:
                raise Refused("state-on-self", f"`.{name}` changes from call to call", "a cache")
            if places and not settles:
                raise Refused("state-on-self", f"`.{name}` is kept in several places", "a cache")
        places.add(here)
        self.assume(f"`.{name}` is computed from the weights alone and kept on the model")
        base.attributes[name] = join(old, value) if old != NONE else value
        self.memo.clear()


def mentions(expr: Expr, name: str) -> bool:
    if expr.op in ("attr", "const", "string") and expr.data == name:
        return True
    return any(mentions(part, name) for part in expr.args)


def only_keeps(statement: If, body: Sequence[Stmt]) -> frozenset[str]:
    """The attributes that a branch without another sets, if it does nothing else."""
    names: set[str] = set()
    for part in body:
        if isinstance(part, Evaluate) and part.value.op in ("const", "string"):
            continue  # a docstring
        if not isinstance(part, Assign) or part.value is None or len(part.targets) != 1:
            return frozenset()
        if part.targets[0].op != "attr" or part.targets[0].data in names:
            return frozenset()
        names.add(part.targets[0].data)
    return frozenset() if statement.orelse or _binds(statement.test) else frozenset(names)


def only_notes(body: Sequence[Stmt]) -> frozenset[str]:
    """The attributes that statements set, if they do nothing else but take others away."""
    names: set[str] = set()
    for part in body:
        match part:
            case Assign(targets=(target,), value=value) if (
                target.op == "attr" and value is not None
            ):
                if target.args[0].op != "name" or value.op not in ("name", "const"):
                    return frozenset()
                names.add(f"cache.{target.data}")
            case For(body=inner, orelse=()) | If(body=inner, orelse=()):
                if not all(isinstance(s, For | If) or _takes_away(s) for s in inner):
                    return frozenset()
                names |= only_notes(inner)
            case _ if not _takes_away(part):
                return frozenset()
    return frozenset(names)


def _takes_away(statement: Stmt) -> bool:
    call = statement.value if isinstance(statement, Evaluate) else None
    if call is None or call.op != "call":
        return False
    return call.args[0].op == "name" and call.args[0].data == "delattr"


def _binds(expr: Expr) -> bool:
    return expr.op == "walrus" or any(map(_binds, expr.args))


def _settles(expr: Expr) -> bool:
    """Applied twice it does what it does once: a cast or a clip of the attribute itself."""
    callee = expr.args[0] if expr.op == "call" else None
    if callee is not None and callee.op == "attr" and callee.data in ("astype", "clip"):
        inside = [callee.args[0], *expr.args[1:]]
        return all(part.op in ("attr", "name", "const", "unary") for part in inside)
    return False
