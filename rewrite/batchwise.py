"""Whether a mixer treats each sequence of an unpadded batch [N, L, ...] on its own: a proof.

The interpreter that proves files row by row (`axes/`) runs the mixer's `__call__`, as it will be
written, with whole sequences as rows: x is [rows][length][width], an entry of the cache what the
call before left there, and everything else what the runtime lets pass. Nothing of one row may show
in another, or in Python. Without a proof the mixer runs once per sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from .axes import Interpreter, Text, World, text_of
from .axes.domain import LENGTH, NONE, ROWS, Array, Value, choice, feature
from .axes.interpret import Failure
from .axes.recurrences import CALLED, CONVOLVE, DECORATING, WINDOWS
from .axes.states import NUMBER, OBJECT, STATES
from .ir import ClassFacts, Edit, ModuleFacts, Source, Span
from .match import Mixer, callee_name
from .passes.emit import splice
from .passes.parse import ParseError, parse
from .program import Program

_RUNTIME = "mlxrewrite.runtime"
_ARRAYS = {
    n: Array(((ROWS,), *map(feature, ("length", "width", "more")[: n - 1]))) for n in (1, 2, 3, 4)
}
_ROWS = {
    n: Array(((ROWS,), (LENGTH,), *map(feature, ("width", "more")[: n - 2]))) for n in (3, 4)
} | {1: Array(((ROWS,),), tag=("start",))}
# What an argument beside the first may be whatever it is called: no array of single sequences.
_PLAIN = (NONE, NUMBER, OBJECT, STATES)
# Positions of sequences, or something computed from the rows of an earlier layer.
_MORE = (1, 3, 4)
_WEIGHTS = {"weight", "bias", "scales", "biases"}  # arrays, whoever loads or quantises them
_SETTING = ("builtins.setattr", "builtins.object.__setattr__")


def kept_apart(
    mixer: Mixer, edits: Iterable[Edit], rank: int
) -> dict[str, tuple[int, ...]] | Failure:
    """The ranks of the arrays that a mixer may be given, by parameter, where it is proved to keep
    sequences apart, its source after `edits`. The first parameter is x, of rank `rank`; those
    without an entry may be given no arrays.
    """
    call = mixer.cls.methods["__call__"]
    if len(call.params) < 2 or any(p.kind.startswith("*") for p in call.function.parameters):
        return _unknown("arguments of any number")
    world = _world(mixer, edits)
    if world is None:
        return _unknown("edits that do not fit together")
    first, others, cached = _parameters(mixer)
    plain = {name: (NONE, STATES) if name in cached else _PLAIN for name in others}

    set_ = frozenset(_set_elsewhere(mixer))

    def proof(more: dict[str, tuple[Value, ...]]) -> Failure | None:
        given = {name: choice(values) for name, values in (plain | more).items()}
        given[first] = _ARRAYS[rank]
        for name in _instances(mixer):
            interpreter = Interpreter(world, {})
            failure = interpreter.keeps_apart(mixer.source.module, name, given)
            read = sorted(n for _, n in interpreter.reads if n in set_ or "*" in set_)
            if read:
                failure = _unknown(f"`.{read[0]}` of an object is set by another")
            if failure is not None:
                return failure
        return None

    failure = proof({})
    if failure is not None:
        return failure
    found = {
        name: tuple(r for r in _MORE if proof({name: (_ARRAYS[r],)}) is None)
        for name in others
        if name not in cached
    }
    found = {name: ranks for name, ranks in found.items() if ranks}
    # Calls of every sort, in any order: what one leaves in the cache the next finds.
    every = {name: (*plain[name], *(_ARRAYS[r] for r in found[name])) for name in found}
    together = found if found and proof(every) is None else {}
    return {first: (rank,)} | together


def rows_alone(
    mixer: Mixer, edits: Iterable[Edit], ranks: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...] | None:
    """Whether a mixer that keeps sequences apart may run on rows [T, 1, ...], its source after
    `edits`: if what it does of a token depends on nothing but that and what ops read.

    The parameters that must always be given the rows' positions for that; None if it may not.
    """
    world = _world(mixer, edits)
    if world is None:
        return None
    first, others, cached = _parameters(mixer)
    given: dict[str, Value] = {name: choice(_PLAIN) for name in others}
    given |= dict.fromkeys(cached, STATES)
    for name, more in ranks.items():
        if name != first:
            given[name] = choice((given[name], *(_ROWS[rank] for rank in more)))
    given[first] = _ROWS[ranks[first][0]]
    numbers = ((name,) for name, more in ranks.items() if name != first and 1 in more)
    for positions in ((), *numbers):
        each = given | dict.fromkeys(positions, _ROWS[1])
        if all(
            Interpreter(world, {}).rows_alone(mixer.source.module, name, each) is None
            for name in _instances(mixer)
        ):
            return positions
    return None


def _world(mixer: Mixer, edits: Iterable[Edit]) -> World | None:
    """What proofs read: the mixer's file after the edits, others as they are."""
    text = _text(mixer, tuple(edits))
    if text is None:
        return None
    return World(lambda name: _read(mixer, name), {mixer.source.module: text})


def _parameters(mixer: Mixer) -> tuple[str, list[str], set[str]]:
    """Of the mixer's `__call__`: its first parameter, the others, and which of them are caches."""
    call = mixer.cls.methods["__call__"]
    _, first, *others = (p.name for p in call.function.parameters)
    return first, others, {p.data[1] for p in call.params if p.op == "param" and mixer.is_cache(p)}


def _unknown(message: str) -> Failure:
    return Failure("unknown-operation", message, "", None, "")


def _instances(mixer: Mixer) -> Iterator[str]:
    """The class, and classes of its file that run the same `__call__` with methods of their own.

    The runtime takes no others.
    """
    for cls in mixer.program.modules[mixer.cls.module].classes.values():
        found = mixer.program.method(cls, "__call__")
        if found is not None and found[0] is mixer.cls:
            yield cls.name


def _set_elsewhere(mixer: Mixer) -> Iterator[str]:
    """Attributes that the mixer's file sets of other objects than a method's own."""
    for name, _ in set_of_others(mixer.program, mixer.program.modules[mixer.cls.module]):
        yield name


def set_on(program: Program, cls: ClassFacts) -> Iterator[tuple[ModuleFacts, str, Span]]:
    """Where files other than the class's own set what its instances, or their parts, are proved
    with."""
    parts = program.reachable(cls).values()
    own = {name for part in parts for name in (*part.methods, *part.attributes)} - _WEIGHTS
    for module in program.modules.values():
        if module.source.module != cls.module:
            for name, span in set_of_others(program, module):
                if name in own or name == "*":
                    yield module, name, span


def set_of_others(program: Program, module: ModuleFacts) -> Iterator[tuple[str, Span]]:
    """Attributes that a file sets of other objects than a method's own; "*" for any."""
    for method in module.methods():
        if method.name == "shard":
            continue  # parts of weights
        own = method.params[0] if method.owner is not None and method.params else None
        for effect in method.effects:
            target = effect.target
            if target is not None and target.op == "attr" and target.args[0] is not own:
                yield target.data, target.span
        for call in method.calls():
            name = callee_name(program, call.value)
            if name in _SETTING and len(call.value.args) > 2:
                key = call.value.args[2]
                yield (key.data if key.op == "const" else "*"), call.value.span


def _text(mixer: Mixer, edits: tuple[Edit, ...]) -> Text | None:
    """The mixer's file after the edits, names of the runtime's ops bound."""
    source = mixer.source
    if not edits:
        return _read(mixer, source.module)
    edits = tuple(sorted(edits, key=lambda edit: edit.span))
    try:
        data = splice(source.data, edits)
        text = text_of(parse(Source.of(source.module, source.path, data)), source, edits)
    except (ValueError, ParseError):
        return None
    for name in (CONVOLVE, *CALLED, *DECORATING, *WINDOWS):
        text.names[name] = [f"{_RUNTIME}.{name}"]
    return text


def _read(mixer: Mixer, name: str) -> Text | None:
    module = mixer.program.modules.get(name)
    return text_of(module.module, module.source) if module is not None else None
