"""The code around the mixers: masks, positions and ropes of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .edits import names_before, rename_callee, replace, spell
from .ir import Diagnostic, Edit, Method, ModuleFacts, Span, Value
from .match import (
    ATTENTION_MASK,
    STATE_MASK,
    callee_name,
    every_value,
    library_call,
    uses,
)
from .program import Program

_ROPE = "mlx_lm.models.rope_utils.initialize_rope"


@dataclass(frozen=True, slots=True)
class DriverEdits:
    edits: tuple[Edit, ...]
    imports: tuple[str, ...]
    notes: tuple[Diagnostic, ...]


def driver_edits(
    program: Program, module: ModuleFacts, per_sequence: frozenset[str]
) -> DriverEdits:
    """Edits of everything but the methods of per-sequence mixers, which stay original."""
    edits: list[Edit] = []
    imports: set[str] = set()
    if any(value.data == _ROPE for value in module.names.values()):
        imports.add("initialize_rope")
    for method in _methods(module, frozenset()):
        for edit in _ropes(program, module, method):
            edits.append(edit)
            imports.add("initialize_rope")
    for method in _methods(module, per_sequence):
        taken: list[Span] = []
        for edit, name, span in (*_chunk_masks(program, module, method),):
            edits.append(edit)
            imports.add(name)
            taken.append(span)
        for edit, name, span in (
            *_masks(program, module, method),
            *_position_ranges(program, module, method),
        ):
            if not any(region.start <= span.start < region.end for region in taken):
                edits.append(edit)
                imports.add(name)
    return DriverEdits(tuple(edits), tuple(sorted(imports)), ())


Found = tuple[Edit, str, Span]


def _methods(module: ModuleFacts, per_sequence: frozenset[str]) -> Iterator[Method]:
    yield from module.functions.values()
    for cls in module.classes.values():
        if cls.qualified not in per_sequence:
            yield from cls.methods.values()


def _masks(program: Program, module: ModuleFacts, method: Method) -> Iterator[Found]:
    """Masks become values that say what a row may see."""
    for effect in method.calls():
        name = callee_name(program, effect.value)
        if name in ATTENTION_MASK or name in STATE_MASK:
            new = "paged_mask" if name in ATTENTION_MASK else "sequence_mask"
            edit = rename_callee(module.source, effect.value, new, "mask")
            yield edit, new, effect.value.span


def _ropes(program: Program, module: ModuleFacts, method: Method) -> Iterator[Edit]:
    """Ropes made by mlx_lm's function under another name; under its own, the import shadows it."""
    for effect in method.calls():
        call = effect.value
        if callee_name(program, call) == _ROPE and call.syntax is not None:
            callee = call.syntax.args[0]
            if not (callee.op == "name" and callee.data == _ROPE.rpartition(".")[2]):
                yield rename_callee(module.source, call, "initialize_rope", "rope")


def _position_ranges(program: Program, module: ModuleFacts, method: Method) -> Iterator[Found]:
    """`arange(a, a + L)`: the positions of this step's tokens, each row its own."""
    table = uses(method)
    for value in every_value(method):
        bounds = library_call(program, value, "mlx.core.arange", "numpy.arange")
        if bounds is None or len(bounds) != 2 or not _is_step(*bounds):
            continue
        if not _reads_offset(bounds[0]):
            continue
        whole = value
        for use in table.get(id(value), ()):
            if use.user is not None and library_call(program, use.user, "mlx.core.array"):
                whole = use.user
        dimensions = 3 if _gets_new_axis(table, whole) else 2
        start = spell(module.source, bounds[0], names_before(method, value))
        if start is None:
            continue
        text = f"row_positions({start}, {dimensions})"
        edit = replace(module.source, whole.span, text, "positions")
        yield edit, "row_positions", whole.span


def _is_step(start: Value, stop: Value) -> bool:
    """`stop` is `start` plus the number of tokens."""
    first, second = _terms(start), _terms(stop)
    rest = list(second)
    for term in first:
        match = next((other for other in rest if _equal(term, other)), None)
        if match is None:
            return False
        rest.remove(match)
    return len(rest) == 1 and _is_length(rest[0])


def _terms(value: Value) -> list[Value]:
    if value.op == "binary" and value.data == "+":
        return [*_terms(value.args[0]), *_terms(value.args[1])]
    return [value]


def _equal(one: Value, two: Value) -> bool:
    if one is two:
        return True
    if one.op != two.op or one.data != two.data or len(one.args) != len(two.args):
        return False
    if not one.args:
        return one.op in ("const", "global")
    return all(_equal(a, b) for a, b in zip(one.args, two.args, strict=True))


def _is_length(value: Value) -> bool:
    """`x.shape[1]`."""
    if value.op == "item":
        return value.data == 1 and _is_shape(value.args[0])
    if value.op == "index":
        key = value.args[1]
        return key.op == "const" and key.data in (1, -1) and _is_shape(value.args[0])
    return False


def _is_shape(value: Value) -> bool:
    return value.op == "attr" and value.data == "shape"


def _reads_offset(value: Value) -> bool:
    return any(part.op == "attr" and part.data == "offset" for part in value.walk())


def _gets_new_axis(table: object, value: Value) -> bool:
    """Something computed from the positions gets a trailing axis: `x[:, None]`."""
    from .match import Use

    assert isinstance(table, dict)
    queue, seen = [value], {id(value)}
    while queue:
        current = queue.pop()
        uses_: list[Use] = table.get(id(current), [])
        for use in uses_:
            user = use.user
            if user is None or id(user) in seen:
                continue
            seen.add(id(user))
            if user.op == "index" and use.position == 0 and user.args[1].op == "tuple":
                keys = user.args[1].args
                if keys[-1].op == "const" and keys[-1].data is None:
                    return True
            if user.op in ("binary", "call", "phi", "unary"):
                queue.append(user)
    return False


def _chunk_masks(program: Program, module: ModuleFacts, method: Method) -> Iterator[Found]:
    """`(keys // chunk == rows // chunk) & (keys <= rows)` over ranges of positions."""
    for value in every_value(method):
        if value.op != "binary" or value.data != "&":
            continue
        chunk = _chunk_size(program, value)
        cache = _offset_cache(value)
        if chunk is None or cache is None:
            continue
        region = _statements_for(method, value)
        if region is None:
            continue
        source = module.source
        line = source.indent(region.start)
        name = _assigned_name(method, value)
        names = names_before(method, region)
        view, size = spell(source, cache, names), spell(source, chunk, names)
        if name is None or view is None or size is None:
            continue
        text = (
            f"# mlxrewrite: a row sees the keys of its own chunk up to itself\n{line}"
            f"{name} = chunked_mask({view}, {size})"
        )
        yield replace(source, region, text, "mask"), "chunked_mask", region


def _chunk_size(program: Program, value: Value) -> Value | None:
    sizes = [
        part.args[1]
        for side in value.args
        for part in side.walk()
        if part.op == "binary" and part.data == "//"
    ]
    orders = [part for part in value.args if part.op == "compare" and part.data[0] in ("<=", ">=")]
    equal = [part for part in value.args if part.op == "compare" and part.data == ("==",)]
    if len(sizes) == 2 and _equal_text(sizes) and orders and equal:
        return sizes[0]
    return None


def _equal_text(sizes: list[Value]) -> bool:
    one, two = sizes
    return one.op == two.op and one.data == two.data


def _offset_cache(value: Value) -> Value | None:
    for part in value.walk():
        if part.op == "attr" and part.data == "offset":
            return part.args[0]
    return None


def _statements_for(method: Method, value: Value) -> Span | None:
    """From the first statement that needs the number of tokens to the one with the mask."""
    body = method.function.body
    last = next((s for s in body if s.span.start <= value.span.start < s.span.end), None)
    if last is None:
        return None
    needed = [
        part.span.start
        for part in value.walk()
        if part.op == "binary" and any(_is_length(arg) for arg in part.args)
    ]
    first = next(
        (s for s in body if any(s.span.start <= start < s.span.end for start in needed)), last
    )
    return Span(first.span.start, last.span.end)


def _assigned_name(method: Method, value: Value) -> str | None:
    from .ir import Assign

    for statement in method.function.body:
        if isinstance(statement, Assign) and statement.span.start <= value.span.start < (
            statement.span.end
        ):
            target = statement.targets[0]
            return str(target.data) if target.op == "name" else None
    return None
