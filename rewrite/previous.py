"""State that is the last token's row: what a window of two tokens needs of the past.

A class stores `rows[:, :, -1:]` in a cache and computes with what it finds there next time. Where
every token is a batch row of its own, what each of them finds is the row before it, in the step
or from the one before: `previous_rows`. The rest of the class stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from .attention import Sites
from .edits import names_before, replace, site_comment, spell
from .ir import Assign, Edit, Effect, Method, Miss, Site, Span, Value
from .match import (
    Mixer,
    callee_name,
    every_value,
    is_none_test,
    library_call,
    same,
    size_of,
    uses,
)

READ, KEEP = "previous_rows", "keep_last_rows"


@dataclass(frozen=True, slots=True)
class _State:
    """One array of the state: where it is stored, and which rows' last one it is."""

    store: Effect
    rows: Value
    axis: int  # of tokens
    loads: tuple[Value, ...]

    @property
    def place(self) -> Value:
        assert self.store.target is not None
        return self.store.target


def previous_rows_sites(mixer: Mixer, kind: str) -> Sites | Miss:
    """Every load and store of state as an op; a miss if one of them is anything else."""
    edits: list[Edit] = []
    sites: list[Site] = []
    lines: set[int] = set()
    joined: set[int] = set()
    entered: dict[str, set[int]] = {}

    def note(where: Span, text: str) -> None:
        line = mixer.source.line_start(where.start)
        if line not in lines:
            lines.add(line)
            edits.append(site_comment(mixer.source, where, text, kind))

    for method in mixer.methods:
        stores = [s for s in mixer.state_stores if any(s is effect for effect in method.effects)]
        states = [_state(mixer, method, store) for store in stores]
        for state, store in zip(states, stores, strict=True):
            if state is None:
                where = mixer.place(store)
                return Miss(kind, 3, "each state is the last token's row, stored once", where)
        found = [state for state in states if state is not None]
        stray = _stray(method, found)
        if stray is not None:
            return Miss(kind, 3, "states are only read and stored", mixer.place(stray))
        for state in found:
            for load in state.loads:
                rows = spell(mixer.source, state.rows, names_before(method, load))
                if rows is None:
                    return Miss(kind, 3, "the rows are there when the state is read")
                joins = _joins(mixer, method, load, state.rows, entered)
                axes = {join.args[2].data for join in joins or ()}
                if joins is None or axes != {state.axis}:
                    where = mixer.place(load)
                    text = "zeros before a sequence, and the state before its rows"
                    return Miss(kind, 3, text, where)
                for join in joins:
                    written = join.syntax.args[1].args[0] if join.syntax is not None else None
                    if written is not None and join.span.start not in joined:
                        joined.add(join.span.start)
                        note(join.span, f"{kind} has a row's predecessor: tokens are rows")
                        text = mixer.source.text(written.span)
                        edits.append(replace(mixer.source, join.span, text, kind))
                base, key = (mixer.source.text(part.span) for part in load.args)
                note(load.span, f"{kind} reads each row's predecessor in its own sequence")
                text = f"{READ}({rows}, {base}, {key})"
                edits.append(replace(mixer.source, load.span, text, kind))
                sites.append(Site(READ, mixer.place(load)))
            statement = state.store.statement
            assert isinstance(statement, Assign) and statement.value is not None
            base, key = (mixer.source.text(part.span) for part in state.place.args)
            rows_text = mixer.source.text(statement.value.args[0].span)
            note(statement.span, f"{kind} keeps the last row of each sequence")
            text = f"{KEEP}({base}, {key}, {rows_text}, {state.axis})"
            edits.append(replace(mixer.source, statement.span, text, kind))
            sites.append(Site(KEEP, mixer.place(state.store)))
    others = [name for name, calls in entered.items() if mixer.mentions(name) != len(calls)]
    if others:
        return Miss(kind, 3, f"nothing else calls `{others[0]}`")
    evidence = [mixer.evidence("state stored", effect) for effect in mixer.state_stores]
    return Sites(tuple(edits), tuple(evidence), tuple(sites))


def _state(mixer: Mixer, method: Method, store: Effect) -> _State | None:
    """`cache[i] = rows[:, :, -1:]`, on every path with a cache, after `cache[i]` was read."""
    target, value, statement = store.target, store.value, store.statement
    if target is None or store.path.in_loop or not isinstance(statement, Assign):
        return None
    if len(statement.targets) != 1 or statement.targets[0].op != "subscript":
        return None
    if target.args[1].op != "const" or type(target.args[1].data) is not int:
        return None
    axis = _last_along(value.args[1]) if value.op == "index" else None
    if axis is None or statement.value is None or statement.value.op != "subscript":
        return None
    if not all(_always(mixer, test, held) for test, held in store.path.conditions):
        return None
    twins = [s for s in mixer.state_stores if s is not store and _same_place(s.target, target)]
    loads = tuple(
        found
        for found in every_value(method)
        if found is not target and found.op == "index" and _same_place(found, target)
    )
    begun = statement.span.start
    if twins or not loads or any(load.span.start >= begun for load in loads):
        return None
    return _State(store, value.args[0], axis, loads)


def _same_place(one: Value | None, other: Value) -> bool:
    return one is not None and all(map(same, one.args, other.args))


def _last_along(key: Value) -> int | None:
    """The axis of `[:, -1:]` or `[:, :, -1:]`, with whole axes behind."""
    if key.op != "tuple" or not all(part.op == "slice" for part in key.args):
        return None
    cut = [place for place, part in enumerate(key.args) if not _is_slice(part, None, None)]
    one = len(cut) == 1 and cut[0] in (1, 2) and _is_slice(key.args[cut[0]], -1, None)
    return cut[0] if one else None


def _is_slice(part: Value, lower: int | None, upper: int | None) -> bool:
    """`lower:upper`."""
    bounds = [_number(bound) for bound in part.args[:3]]
    return bounds == [lower, upper, None]


def _number(value: Value) -> object:
    if value.op == "unary" and value.data == "-" and value.args[0].op == "const":
        return -value.args[0].data
    return value.data if value.op == "const" else value


def _always(mixer: Mixer, test: Value, held: bool) -> bool:
    """What holds whenever there is a cache: that there is, and that there are tokens."""
    known = is_none_test(test)
    if known is not None:
        return known[1] is not held and mixer.is_cache(known[0])
    if not held or test.op != "compare" or test.data not in ((">",), ("!=",), (">=",)):
        return False
    length, least = test.args
    size = size_of(length)
    if size is None or least.op != "const":
        return False
    return size[1] in (1, 2) and least.data == (1 if test.data == (">=",) else 0)


def _stray(method: Method, states: list[_State]) -> Value | None:
    """Something else that is done with a cache of states than to read, store and test it."""
    table = uses(method)
    for value in every_value(method):
        if not any(same(value, state.place.args[0]) for state in states):
            continue
        known = [part for state in states for part in (*state.loads, state.place)]
        for use in table.get(id(value), ()):
            user = use.user
            if user is None:
                return value
            tested = user.op == "compare" and is_none_test(user) is not None
            if not tested and not any(user is part for part in known):
                return user
    return None


def _joins(
    mixer: Mixer,
    method: Method,
    value: Value,
    rows: Value | None,
    entered: dict[str, set[int]],
    depth: int = 0,
) -> list[Value] | None:
    """Where the value is put before rows of the step, `concatenate([value, rows[:, :, :-1]], 2)`.

    None if that is done with other rows, or if the value may be None and anything but zeros stands
    for it then. `entered` gets the calls that the value goes through, by the method's name.
    """
    table = uses(method)
    found: list[Value] = []
    for use in table.get(id(value), ()):
        user = use.user
        if user is None or depth > 3:
            return None
        test = is_none_test(user)
        if user.op == "compare" and test is not None:
            if not _only_chooses(mixer, method, user, value):
                return None
        elif user.op == "phi" and use.position > 0:
            if _is_choice(mixer, user, value):
                inner = _shifts(mixer, method, user, rows)
            else:  # without a cache there is none
                test = is_none_test(user.args[0])
                other = user.args[3 - use.position]
                absent = other.op == "const" and other.data is None
                if test is None or not mixer.is_cache(test[0]) or not absent:
                    return None
                inner = _joins(mixer, method, user, rows, entered, depth + 1)
            if inner is None:
                return None
            found += inner
        elif user.op == "call" and use.position > 0:
            reached = mixer.program.callees(user, mixer.cls, method)
            own = len(reached) == 1 and any(reached[0][1] is m for m in mixer.methods)
            given = _given(reached[0][1], user) if own else {}
            param = given.get(use.position)
            if param is None:
                return None
            within = [given.get(i) for i, part in enumerate(user.args) if i and part is rows]
            same_rows = within[0] if len(within) == 1 else None
            entered.setdefault(reached[0][1].name, set()).add(id(user))
            inner = _joins(mixer, reached[0][1], param, same_rows, entered, depth + 1)
            if inner is None:
                return None
            found += inner
        else:
            return None
    return found


def _given(inner: Method, call: Value) -> dict[int, Value]:
    """The parameter that each argument of a call of a method is given as."""
    names = {str(param.data[1]): param for param in inner.params}
    found: dict[int, Value] = {}
    for position, keyword in enumerate(call.data, 1):
        if keyword is None and position < len(inner.params):
            found[position] = inner.params[position]
        elif keyword in names:
            found[position] = names[keyword]
    return found


def _shifts(mixer: Mixer, method: Method, state: Value, rows: Value | None) -> list[Value] | None:
    """Concatenations of the state and all rows but the last; None if there is any other."""
    table = uses(method)
    found: list[Value] = []
    for use in table.get(id(state), ()):
        if use.user is None or use.user.op not in ("list", "tuple"):
            continue
        for outer in table.get(id(use.user), ()):
            got = library_call(mixer.program, outer.user, "mlx.core.concatenate") if (
                outer.user is not None
            ) else None  # fmt: skip
            if got is None or outer.user is None or len(got) != 2 or got[1].op != "const":
                return None
            parts, axis = got[0].args, got[1].data
            if rows is None or len(parts) != 2 or parts[0] is not state or axis not in (1, 2):
                return None
            rest = parts[1]
            if rest.op != "index" or rest.args[0] is not rows or not _drops_last(rest, axis):
                return None
            found.append(outer.user)
    return found


def _drops_last(value: Value, axis: int) -> bool:
    """`rows[:, :, :-1]`, along the axis."""
    key = value.args[1]
    if key.op != "tuple" or not all(part.op == "slice" for part in key.args):
        return False
    cut = [place for place, part in enumerate(key.args) if not _is_slice(part, None, None)]
    return cut == [axis] and _is_slice(key.args[axis], None, -1)


def _only_chooses(mixer: Mixer, method: Method, test: Value, value: Value) -> bool:
    """All that a test of the value decides is whether there are zeros in its place."""
    for effect in method.effects:
        if any(condition is test for condition, _ in effect.path.conditions):
            made = library_call(
                mixer.program, effect.value, "mlx.core.zeros", "mlx.core.zeros_like"
            )
            if effect.kind != "call" or made is None:
                return False
    return all(
        use.user is not None and use.user.op == "phi" and _is_choice(mixer, use.user, value)
        for use in uses(method).get(id(test), ())
    )


def _is_choice(mixer: Mixer, phi: Value, value: Value) -> bool:
    """The value, or zeros where it is None."""
    test = is_none_test(phi.args[0])
    if test is None or test[0] is not value:
        return False
    given, absent = (phi.args[2], phi.args[1]) if test[1] else phi.args[1:]
    zeros = ("mlx.core.zeros", "mlx.core.zeros_like")
    return given is value and absent.op == "call" and callee_name(mixer.program, absent) in zeros
