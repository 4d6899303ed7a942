"""The vocabulary kinds are written in: what a class does with its caches, and how values relate.

Nothing here knows a model, and no name that an author chose is evidence. Names that count are those
of the libraries' own interfaces: `update_and_fetch`, `offset`, `mx.softmax`,
`scaled_dot_product_attention`, ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .branches import decided, is_dead
from .ir import ClassFacts, Effect, Evidence, Method, Place, Source, Span, Value
from .program import Program

ATTENTION = frozenset(
    {
        "mlx_lm.models.base.scaled_dot_product_attention",
        "mlx_vlm.models.base.scaled_dot_product_attention",
        "mlx.core.fast.scaled_dot_product_attention",
    }
)
ATTENTION_MASK = frozenset(
    {
        "mlx_lm.models.base.create_attention_mask",
        "mlx_vlm.models.base.create_attention_mask",
    }
)
# Gives keys and values of a quantised cache as arrays, and all others, paged ones too, as they are.
UNPACKED = "mlx_vlm.models.base.dequantize_kv_state"
STATE_MASK = frozenset(
    {"mlx_lm.models.base.create_ssm_mask", "mlx_vlm.models.base.create_ssm_mask"}
)
# What a paged view answers; anything else read from a cache is a reason to refuse.
VIEW_ATTRIBUTES = frozenset(
    {
        "offset",
        "update_and_fetch",
        "keys_and_values",
        "maybe_trim_front",
        "start_position",
        "make_mask",
    }
)
# Methods of a cache of states that work one out and keep it.
STATE_UPDATES = frozenset({"update_window", "update_recurrent"})
# What only a cache answers: these make a value a cache wherever they are read.
CACHE_ATTRIBUTES = VIEW_ATTRIBUTES | STATE_UPDATES
CACHE_ATTRIBUTES |= frozenset({"advance", "lengths", "left_padding", "trim"})


@dataclass(frozen=True, eq=False, slots=True)
class Fetch:
    """`keys, values = cache.update_and_fetch(keys, values)`, or keys_and_values()."""

    method: Method
    effect: Effect
    cache: Value

    @property
    def call(self) -> Value:
        return self.effect.value


@dataclass(frozen=True, eq=False, slots=True)
class Attend:
    """A call of a fused attention function."""

    method: Method
    effect: Effect
    queries: Value
    keys: Value
    values: Value
    scale: Value | None
    mask: Value | None
    sinks: Value | None

    @property
    def call(self) -> Value:
        return self.effect.value


@dataclass(frozen=True, eq=False, slots=True)
class Use:
    """A value used as operand `position` of `user` (None: of an effect)."""

    user: Value | None
    effect: Effect | None
    position: int


class Mixer:
    """What one class (or the free functions of a module) does about tokens and caches."""

    def __init__(self, program: Program, cls: ClassFacts) -> None:
        self.program = program
        self.cls = cls
        self.source: Source = program.modules[cls.module].source
        beside = NOT_FORWARD | program.unnamed(cls)
        self.methods = [m for name, m in cls.methods.items() if name not in beside]
        self.caches = {id(value): value for value in self._cache_values()}
        self.fetches = [f for m in self.methods for f in self._fetches(m)]
        self.attends = [a for m in self.methods for a in attends(program, m)]
        self.state_stores = [s for m in self.methods for s in self._state_stores(m)]
        self.state_updates = [u for m in self.methods for u in self._state_updates(m)]
        self.state_loads = self._state_loads()

    # ----------------------------------------------------------------- caches

    def _cache_values(self) -> Iterator[Value]:
        """Parameters (and elements of them) that are used as a cache is."""
        for method in self.methods:
            roots = set(map(id, method.params[1:]))
            for value in every_value(method):
                if value.op == "attr" and value.data in CACHE_ATTRIBUTES:
                    yield from _cache_roots(value.args[0], roots)
            stored = {
                id(e.target.args[0]): e.target.args[0]
                for e in method.effects
                if e.kind == "store" and e.target is not None and e.target.op == "index"
                if not _is_word(e.target.args[1])
            }
            for base in stored.values():
                for root in _cache_roots(base, roots):
                    if self._only_state(method, root):
                        yield root

    @staticmethod
    def _only_state(method: Method, root: Value) -> bool:
        """A parameter that is indexed and tested but never computed with."""
        for value in every_value(method):
            if value.op in ("binary", "unary") and any(part is root for part in value.args):
                return False
            if value.op == "attr" and value.args[0] is root and value.data in ("shape", "dtype"):
                return False
        return True

    def is_cache(self, value: Value) -> bool:
        """The value is a parameter known to be a cache, or an element of one."""
        roots = set(self.caches)
        return any(id(part) in roots for part in through(value))

    def _fetches(self, method: Method) -> Iterator[Fetch]:
        for effect in method.calls():
            callee = effect.value.args[0]
            if callee.op == "attr" and callee.data in ("update_and_fetch", "keys_and_values"):
                yield Fetch(method, effect, callee.args[0])

    def _state_stores(self, method: Method) -> Iterator[Effect]:
        for effect in method.effects:
            target = effect.target
            if effect.kind != "store" or target is None or target.op != "index":
                continue
            if is_dead(effect, lambda test: decided(self.program, test)):
                continue
            if is_pipeline_tail(self.program, effect) or _is_word(target.args[1]):
                continue
            base = live(target.args[0])
            if any(id(part) in self.caches for part in through(base)):
                yield effect

    def _state_updates(self, method: Method) -> Iterator[Effect]:
        """`cache.update_window(...)`: the cache keeps a state by itself."""
        for effect in method.calls():
            callee = effect.value.args[0]
            if callee.op == "attr" and callee.data in STATE_UPDATES:
                if self.is_cache(callee.args[0]):
                    yield effect

    def _state_loads(self) -> list[Value]:
        """`cache[i]` where the element is used as an array."""
        found = []
        for method in self.methods:
            for value in every_value(method):
                if value.op == "index" and id(value.args[0]) in self.caches:
                    found.append(value)
        return found

    def cache_reads(self) -> list[Value]:
        """Attributes read from caches that a paged view does not have."""
        found = []
        for method in self.methods:
            tails = {
                id(value)
                for effect in method.effects
                if is_pipeline_tail(self.program, effect)
                for value in (effect.target, *effect.value.args)
            }
            for value in every_value(method):
                if self._moved_on(method, value):
                    found.append(value)
                if value.op != "attr" or value.data in VIEW_ATTRIBUTES or id(value) in tails:
                    continue
                if value.data in ("keys", "values", "state", "lengths", "left_padding", "advance"):
                    if self.is_cache(value.args[0]):
                        found.append(value)
        return found

    def _moved_on(self, method: Method, value: Value) -> bool:
        """`cache.offset` behind the fetch: upstream it has moved on, in a view it has not."""
        if value.op != "attr" or value.data != "offset":
            return False
        return any(
            fetch.method is method
            and value.span.start >= fetch.call.span.end
            and (same(fetch.cache, value.args[0]) or live(fetch.cache) is live(value.args[0]))
            for fetch in self.fetches
            if method_call(fetch.call, "update_and_fetch") is not None
        )

    @property
    def mixes(self) -> bool:
        """The class does something about tokens that the rest of a model does not."""
        return bool(self.fetches or self.attends or self.state_stores or self.state_updates)

    # ----------------------------------------------------------------- calls

    def calls(self, *names: str) -> list[Effect]:
        """Calls of library or module functions, by resolved dotted name."""
        wanted = set(names)
        return [
            effect
            for method in self.methods
            for effect in method.calls()
            if callee_name(self.program, effect.value) in wanted
        ]

    def calls_into(self, prefix: str | tuple[str, ...]) -> list[Effect]:
        return [
            effect
            for method in self.methods
            for effect in method.calls()
            if (callee_name(self.program, effect.value) or "").startswith(prefix)
        ]

    def attribute_calls(self, *constructors: str) -> list[Effect]:
        """Calls of `self.x(...)` where __init__ made `self.x` with one of the constructors."""
        return [
            effect
            for method in self.methods
            for effect in method.calls()
            if self._is_made_by(effect.value.args[0], set(constructors))
        ]

    def _is_made_by(self, callee: Value, constructors: set[str]) -> bool:
        return made_by(self.program, self.cls, callee, constructors)

    def mentions(self, name: str) -> int:
        """How often the file reads an attribute of that name."""
        file = self.program.modules[self.cls.module]
        return sum(
            value.op == "attr" and value.data == name
            for method in file.methods()
            for value in every_value(method)
        )

    # ----------------------------------------------------------------- places

    def place(self, where: Value | Effect | Span) -> Place:
        if isinstance(where, Effect):
            where = where.value
        return place(self.source, where if isinstance(where, Span) else where.span)

    def evidence(self, role: str, where: Value | Effect | Span) -> Evidence:
        return Evidence(role, self.place(where))


NOT_FORWARD = frozenset(
    {"__init__", "sanitize", "shard", "make_cache", "pipeline", "from_dict", "__post_init__"}
)


def place(source: Source, span: Span) -> Place:
    line, column = source.line_column(span.start)
    end_line, end_column = source.line_column(max(span.end, span.start + 1))
    text = source.line_text(line)
    return Place(source.path, line, column, end_column if end_line == line else len(text) + 1, text)


def every_value(method: Method) -> Iterator[Value]:
    """Every value of a method, each once."""
    seen: set[int] = set()
    for effect in method.effects:
        for root in (effect.value, effect.target):
            if root is not None:
                yield from root.walk(seen)
        for test, _ in effect.path.conditions:
            yield from test.walk(seen)


def uses(method: Method) -> dict[int, list[Use]]:
    """Who uses each value, by id."""
    found: dict[int, list[Use]] = {}
    for value in every_value(method):
        for position, part in enumerate(value.args):
            found.setdefault(id(part), []).append(Use(value, None, position))
    for effect in method.effects:
        if effect.kind in ("return", "store", "augment"):
            found.setdefault(id(effect.value), []).append(Use(None, effect, 0))
    return found


def made_by(program: Program, cls: ClassFacts, value: Value, constructors: set[str]) -> bool:
    """The value is `self.x`, and the class's __init__ made that with one of the constructors."""
    if value.op != "attr" or value.args[0].op != "param":
        return False
    made = program.attribute(cls, value.data)
    return made is not None and any(
        part.op == "call" and callee_name(program, part) in constructors for part in made.walk()
    )


def callee_name(program: Program, call: Value) -> str | None:
    callee = call.args[0]
    return program.resolve(callee.data) if callee.op == "global" else None


def arguments(call: Value, names: Iterable[str]) -> dict[str, Value]:
    """Arguments of a call by parameter name."""
    found: dict[str, Value] = {}
    order = list(names)
    position = 0
    for keyword, value in zip(call.data, call.args[1:], strict=True):
        if keyword is None:
            if position < len(order):
                found[order[position]] = value
            position += 1
        elif keyword not in ("*", "**"):
            found[keyword] = value
    return found


_BASE_ORDER = ("queries", "keys", "values", "cache", "scale", "mask", "sinks")
_FAST_ORDER = ("q", "k", "v")


def is_pipeline_tail(program: Program, effect: Effect) -> bool:
    """`x.keys = mx.depends(x.keys, h)`: keeps a send in the graph, stores nothing new."""
    if effect.kind != "store" or effect.target is None:
        return False
    got = library_call(program, effect.value, "mlx.core.depends")
    return got is not None and same(got[0], effect.target)


def attends(program: Program, method: Method) -> Iterator[Attend]:
    for effect in method.calls():
        name = callee_name(program, effect.value)
        if name not in ATTENTION:
            continue
        fast = name.startswith("mlx.core")
        got = arguments(effect.value, _FAST_ORDER if fast else _BASE_ORDER)
        q, k, v = (got.get(n) for n in (_FAST_ORDER if fast else _BASE_ORDER[:3]))
        if q is None or k is None or v is None:
            continue
        scale, mask, sinks = got.get("scale"), got.get("mask"), got.get("sinks")
        yield Attend(method, effect, q, k, v, scale, mask, sinks)


def through(value: Value) -> Iterator[Value]:
    """A value and what it is an element, item or branch of."""
    stack = [value]
    while stack:
        current = stack.pop()
        yield current
        if current.op in ("index", "item", "elem"):
            stack.append(current.args[0])
        elif current.op == "phi":
            stack.extend(current.args[1:])
        elif current.op in ("loop", "carried"):
            stack.extend(current.args[:1])


def _is_word(key: Value) -> bool:
    """A key that is text: weights go by names, what a cache holds by numbers."""
    if key.op == "phi":
        return all(map(_is_word, key.args[1:]))
    return key.op == "string" or (key.op == "const" and isinstance(key.data, str))


def _cache_roots(value: Value, parameters: set[int]) -> Iterator[Value]:
    for part in through(value):
        if part.op == "param" and id(part) in parameters:
            yield part
        elif part.op in ("index", "elem") and part is not value:
            continue


# --------------------------------------------------------------------------- relations of values


def size_of(value: Value) -> tuple[Value, int] | None:
    """x and the axis in `x.shape[axis]`, unpacked or indexed by a number."""
    if value.op == "item":
        axis = value.data
    elif value.op == "index" and value.args[1].op == "const":
        axis = value.args[1].data
    else:
        return None
    shape = value.args[0]
    return (shape.args[0], axis) if shape.op == "attr" and shape.data == "shape" else None


def is_none_test(test: Value) -> tuple[Value, bool] | None:
    """`x is None` gives (x, True), `x is not None` and bare `x` give (x, False)."""
    if test.op == "compare" and len(test.data) == 1:
        left, right = test.args
        if right.op == "const" and right.data is None and test.data[0] in ("is", "is not"):
            return left, test.data[0] == "is"
    if test.op == "unary" and test.data == "not":
        inner = is_none_test(test.args[0])
        if inner is not None:
            return inner[0], not inner[1]
    if test.op in ("param", "elem", "index"):
        return test, False
    return None


def live(value: Value, caches: Callable[[Value], bool] = lambda _: True) -> Value:
    """Take the arm of `x if cache is not None else y` that runs when caches are given."""
    while value.op == "phi":
        test = is_none_test(value.args[0])
        if test is None or not caches(test[0]):
            break
        value = value.args[2] if test[1] else value.args[1]
    return value


def same(first: Value, second: Value) -> bool:
    """Both compute the same from the same: equal in structure down to shared leaves."""
    if first is second:
        return True
    if first.op != second.op or first.data != second.data or len(first.args) != len(second.args):
        return False
    if first.op in ("param", "const", "global"):
        return True
    return bool(first.args) and all(
        same(a, b) for a, b in zip(first.args, second.args, strict=True)
    )


def method_call(value: Value, *names: str) -> Value | None:
    """The receiver of `receiver.name(...)`."""
    if value.op == "call" and value.args[0].op == "attr" and value.args[0].data in names:
        return value.args[0].args[0]
    return None


def library_call(program: Program, value: Value, *names: str) -> tuple[Value, ...] | None:
    """The arguments of a call of one of the library functions."""
    if value.op == "call" and callee_name(program, value) in names:
        return value.args[1:]
    return None


@dataclass(frozen=True, slots=True)
class Flow:
    """Where fetched keys and values go inside one method, without being computed with."""

    members: frozenset[int]
    foreign: tuple[Value, ...] = ()  # values that compute with a member
    casts: tuple[Value, ...] = ()  # `member.astype(dtype)`, members too

    def holds(self, value: Value) -> bool:
        return id(value) in self.members


def flow(mixer: Mixer, method: Method, roots: Iterable[Value], consumers: Iterable[Value]) -> Flow:
    """Follow `roots` through assignments, tuples, branches and calls that end in attention.

    `consumers` are calls that may take a member. A use as an argument of a call passes the member
    on if the call reaches a method with attention in it, or is list.append; every other use is
    foreign.
    """
    table = uses(method)
    allowed = {id(value) for value in consumers}
    members: dict[int, Value] = {id(root): root for root in roots}
    foreign: list[Value] = []
    casts: list[Value] = []
    queue = list(members.values())
    while queue:
        value = queue.pop()
        for use in table.get(id(value), ()):
            user = use.user
            if user is None or id(user) in members or id(user) in allowed:
                continue
            if user.op in ("item", "tuple", "list", "loop", "carried") or (
                user.op == "phi" and use.position > 0
            ):
                members[id(user)] = user
                queue.append(user)
            elif (
                user.op == "phi"
                or is_none_test(user) is not None
                or (user.op == "attr" and user.data in ("dtype", "shape"))
            ):
                continue
            elif user.op == "attr" and user.data == "astype":
                for call in (u.user for u in table.get(id(user), ()) if u.user is not None):
                    casts.append(call)
                    members[id(call)] = call
                    queue.append(call)
            elif library_call(mixer.program, user, "mlx_vlm.models.base.kv_sequence_length"):
                continue  # a number of positions, as `shape` is
            elif library_call(mixer.program, user, UNPACKED):
                members[id(user)] = user
                queue.append(user)
            elif not _passes_on(mixer, method, user, use):
                foreign.append(user)
    return Flow(frozenset(members), tuple(foreign), tuple(casts))


def _passes_on(mixer: Mixer, method: Method, user: Value, use: Use) -> bool:
    if user.op != "call" or use.position == 0:
        return False
    if user.args[0].op == "attr" and user.args[0].data == "append":
        return True
    reached = mixer.program.callees(user, mixer.cls, method)
    return any(ends_in_attention(mixer.program, cls, found) for cls, found in reached)


def ends_in_attention(program: Program, cls: ClassFacts, method: Method, depth: int = 0) -> bool:
    """A call of the method may reach a fused attention call."""
    if any(True for _ in attends(program, method)):
        return True
    if depth > 4:
        return False
    return any(
        ends_in_attention(program, owner, found, depth + 1)
        for effect in method.calls()
        for owner, found in program.callees(effect.value, cls, method)
        if found is not method
    )
