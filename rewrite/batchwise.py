"""Whether a mixer treats each sequence of an unpadded batch [N, L, ...] on its own: a proof.

The interpreter that proves files row by row (`axes/`) runs the mixer's `__call__`, as it will be
written, with whole sequences as rows: x is [rows][length][width], an entry of the cache what the
call before left there, and everything else what the runtime lets pass. Nothing of one row may show
in another, or in Python. Without a proof the mixer runs once per sequence.
"""

from __future__ import annotations

from collections.abc import Iterable

from .axes import Interpreter, Text, World, text_of
from .axes.domain import NONE, ROWS, Array, Value, choice, feature
from .axes.interpret import Failure
from .axes.recurrences import CALLED, CONVOLVE, DECORATING
from .axes.states import NUMBER, OBJECT, STATES
from .ir import Edit, Source
from .match import Mixer
from .passes.emit import splice
from .passes.parse import ParseError, parse

_RUNTIME = "mlxrewrite.runtime"
_ARRAYS = {
    n: Array(((ROWS,), *map(feature, ("length", "width", "more")[: n - 1]))) for n in (1, 2, 3, 4)
}
# What an argument beside the first may be whatever it is called: no array of single sequences.
_PLAIN = (NONE, NUMBER, OBJECT, STATES)
# Positions of sequences, or something computed from the rows of an earlier layer.
_MORE = (1, 3, 4)


def kept_apart(
    mixer: Mixer, edits: Iterable[Edit], rank: int
) -> dict[str, tuple[int, ...]] | Failure:
    """The ranks of the arrays that a mixer may be given, by parameter, where it is proved to keep
    sequences apart, its source after `edits`. The first parameter is x, of rank `rank`; those
    without an entry may be given no arrays.
    """
    call = mixer.cls.methods["__call__"]
    if len(call.params) < 2 or any(p.kind.startswith("*") for p in call.function.parameters):
        return Failure("unknown-operation", "arguments of any number", "", None, "")
    text = _text(mixer, tuple(edits))
    if text is None:
        return Failure("unknown-operation", "edits that do not fit together", "", None, "")
    _, first, *others = (p.name for p in call.function.parameters)
    cached = {p.data[1] for p in call.params if p.op == "param" and mixer.is_cache(p)}
    plain = {name: (NONE, STATES) if name in cached else _PLAIN for name in others}

    def proof(more: dict[str, tuple[Value, ...]]) -> Failure | None:
        world = World(lambda name: _read(mixer, name), {mixer.source.module: text})
        given = {name: choice(values) for name, values in (plain | more).items()}
        given[first] = _ARRAYS[rank]
        return Interpreter(world, {}).keeps_apart(mixer.source.module, mixer.cls.name, given)

    failure = proof({})
    if failure is not None:
        return failure
    found = {
        name: tuple(r for r in _MORE if proof({name: (_ARRAYS[r],)}) is None)
        for name in others
        if name not in cached
    }
    found = {name: ranks for name, ranks in found.items() if ranks}
    if len(found) > 1:
        arrays = {name: tuple(_ARRAYS[r] for r in ranks) for name, ranks in found.items()}
        failure = proof({name: (*plain[name], *held) for name, held in arrays.items()})
    return {first: (rank,)} | found if failure is None else failure


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
    for name in (CONVOLVE, *CALLED, *DECORATING):
        text.names[name] = [f"{_RUNTIME}.{name}"]
    return text


def _read(mixer: Mixer, name: str) -> Text | None:
    module = mixer.program.modules.get(name)
    return text_of(module.module, module.source) if module is not None else None
