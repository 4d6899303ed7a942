"""The cache of a mixer that runs once for several sequences: states [rows][...], or none yet."""

from __future__ import annotations

from collections.abc import Sequence

from .domain import (
    NONE,
    Array,
    Axis,
    Constant,
    Dead,
    Factor,
    Known,
    Library,
    Opaque,
    Refused,
    Slice,
    Tuple,
    Value,
    choice,
    feature,
    join,
    leads,
    options,
)
from .machine import Machine
from .rules import array
from .shapes import describe, within

STATES = Opaque("states")
NUMBER = Constant(("number",))
# Of a mixer on rows: what an entry holds before a step, by its number, and what an op made of it.
HELD, NEW = "state before ", "state after "
OBJECT = Opaque("object")  # a mask as a value: it raises where an array is asked for


def _unsized(axis: Axis) -> Axis:
    """Sizes that another call may have otherwise are forgotten."""
    return tuple(f if f.is_token or isinstance(f.size, int) else Factor(f.kind) for f in axis)


_ABSENT = ("lengths", "left_padding")
_METHODS = ("update_window", "update_recurrent", "advance", "make_mask")


class States(Machine):
    """What the runtime's cache of several sequences answers. Anything else is an error there.

    An entry is what an earlier call left, or None: the mixer is called until nothing new is left.
    """

    def read_state(self, key: Value) -> Value:
        if self.on_rows:
            return Opaque(f"{HELD}{self._entry_number(key)}")
        return choice((NONE, *options(self.states.get(self._entry_number(key), NONE))))

    def any_state(self) -> Value:
        if self.on_rows:
            raise Refused("cache-use", "states of a mixer on rows, which entry is not known")
        return choice((NONE, *(v for held in self.states.values() for v in options(held))))

    def keep_state(self, key: Value, value: Value) -> None:
        number = self._entry_number(key)
        if self.on_rows:
            if any(one != Opaque(f"{NEW}{number}") for one in options(value)):
                raise Refused("cache-use", "a state that is not what an op made of the same entry")
            return
        if self.unmemoised:
            raise Refused("token-count", "the number of sequences decides what a state becomes")
        for one in options(value):
            if one == NONE:
                continue  # the runtime raises
            x = array(one)
            if not leads(x):
                raise Refused("row-mixing", f"a state of {describe(x)}", "[rows][...]")
            new = Array(tuple(map(_unsized, x.axes or ())), x.open)
            old = self.states.get(number)
            joined = join(old, new) if old is not None else new
            if joined != old:
                self.states[number] = joined
                self.changes += 1
                self.memo.clear()

    @staticmethod
    def _entry_number(key: Value) -> int:
        if isinstance(key, Known) and type(key.value) is int and key.value >= 0:
            return key.value
        if isinstance(key, (Array, Slice, Tuple)) or key == NONE:
            raise Dead
        raise Refused("cache-use", "an entry of a cache that is not a plain number")

    def state_attribute(self, name: str) -> Value:
        if name in _ABSENT:
            return NONE
        if name in _METHODS:
            return Library(f"states.{name}", STATES)
        raise Dead

    @staticmethod
    def states_have(name: Value) -> bool:
        if not isinstance(name, Known):
            raise Refused("cache-use", "whether a cache has what is computed")
        return name.value in (*_ABSENT, *_METHODS)

    def call_states(self, method: str, args: Sequence[Value], more: dict[str, Value]) -> Value:
        if method in ("advance", "make_mask"):
            return NONE
        if self.on_rows:
            raise Refused("cache-use", f"`.{method}` of the states of a mixer on rows")
        if method == "update_window":
            return self.each(lambda a, k: self._update_window(*a, **k), args, more)
        return self._update_recurrent(*args, **more)

    def _update_window(
        self, index: Value, source: Value, width: Value, *, lengths: Value = NONE
    ) -> Value:
        if lengths != NONE:
            raise Dead
        x = array(source)
        within(x, Known(1), "a window")
        axes = x.axes or ()
        state = Array((*axes[:1], feature(("at", self.here())), *axes[2:]), x.open)
        self.keep_state(index, state)
        return state

    def _update_recurrent(self, index: Value, length: Value, update: Value) -> Value:
        def kept(pair: Value) -> Value:
            items = self.known_pair(pair)
            self.keep_state(index, items[1])
            return Tuple(items)

        return self.join_calls(kept, options(self.call(update, (self.read_state(index), NONE), {})))

    @staticmethod
    def known_pair(value: Value) -> tuple[Value, Value]:
        if isinstance(value, Tuple) and len(value.items) >= 2:
            return value.items[0], value.items[1]
        raise Refused("unknown-operation", "an update of a state that is no pair")
