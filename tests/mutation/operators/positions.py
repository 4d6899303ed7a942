"""Changes of positions: ropes, offsets, ranges."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from ..source import Change, File, called
from . import operator


def _offset(call: ast.Call) -> ast.keyword:
    return next(k for k in call.keywords if k.arg == "offset")


def _at_ropes(name: str, says: str, text: str, *, same: bool = False) -> None:
    """The offset of a rope becomes a text of {0}, itself, and {x}, what is rotated."""

    @operator(name, says, same=same)
    def apply(file: File) -> Iterator[Change]:
        for call in file.ropes:
            value = _offset(call).value
            filled = text.replace("{0}", file.code(value))
            filled = filled.replace("{x}", file.code(call.args[0]))
            yield file.change(file.put(value, filled), where=call)


_at_ropes("rope-offset-plus-one", "positions are one more", "{0} + 1")
_at_ropes("rope-offset-minus-one", "positions are one less", "{0} - 1")
_at_ropes("rope-offset-zero", "every chunk starts at position zero", "0")
_at_ropes("rope-offset-doubled", "positions of chunks are doubled", "2 * {0}")
_at_ropes("rope-offset-halved", "chunks start at half the position", "{0} // 2")
_at_ropes("rope-offset-modulo", "positions of chunks wrap around", "{0} % 4")
_at_ropes(
    "rope-offset-plus-length", "positions are moved on by the chunk's length", "{0} + {x}.shape[2]"
)
_at_ropes("rope-offset-negated", "positions run backwards", "-({0})")
_at_ropes("rope-offset-limited", "positions of chunks end at four", "min({0}, 4)")
_at_ropes("rope-offset-maximum", "positions of chunks end at four, by mlx", "mx.minimum({0}, 4)")
_at_ropes("rope-offset-int", "the offset as an integer", "int({0})", same=True)
_at_ropes("rope-offset-array", "the offset as an array", "mx.array({0})", same=True)
_at_ropes("rope-offset-float", "the offset through a float", "int(float({0}))", same=True)
_at_ropes("rope-offset-conditional", "early chunks start at zero", "({0} if {0} > 5 else 0)")
_at_ropes("rope-offset-or", "the offset or one", "({0} or 1)")
_at_ropes("rope-offset-summed", "the offset summed", "mx.array({0}).sum().item()", same=True)
_at_ropes("rope-offset-first", "the first row's offset", "mx.array({0}).reshape(-1)[:1]", same=True)
_at_ropes("rope-offset-largest", "the largest row's offset", "mx.array({0}).max()", same=True)


def _ropes(name: str, says: str, text: str, *, same: bool = False) -> None:
    """A rope's call becomes a text of {0} itself, {x} what is rotated, {o} the offset."""

    @operator(name, says, same=same)
    def apply(file: File) -> Iterator[Change]:
        for call in file.ropes:
            filled = text.replace("{0}", file.code(call)).replace("{x}", file.code(call.args[0]))
            filled = filled.replace("{f}", file.code(call.func))
            filled = filled.replace("{o}", file.code(_offset(call).value))
            yield file.change(file.put(call, filled), where=call)


_ropes("rope-skipped", "a rope is left out", "{x}")
_ropes("rope-twice", "a rope is applied twice", "{f}({0}, offset={o})")
_ropes("rope-no-offset", "a rope without offset", "{f}({x})")
_ropes("rope-scaled", "what is rotated is scaled", "{f}(1.5 * ({x}), offset={o})")
_ropes(
    "rope-reversed",
    "tokens are rotated in reverse order",
    "{f}(({x})[:, :, ::-1], offset={o})[:, :, ::-1]",
)
_ropes("rope-positional", "the offset is positional", "{f}({x}, {o})", same=True)
_ropes(
    "rope-token-by-token",
    "a rope in a loop over tokens",
    "mx.concatenate([{f}(({x})[:, :, i : i + 1], offset={o} + i) "
    "for i in range(({x}).shape[2])], axis=2)",
    same=True,
)
_ropes(
    "rope-fixed-stride",
    "a rope in a loop over tokens, one position apart from where they are",
    "mx.concatenate([{f}(({x})[:, :, i : i + 1], offset={o} + 2 * i) "
    "for i in range(({x}).shape[2])], axis=2)",
)
_ropes(
    "rope-first-excluded",
    "the first token is not rotated",
    "mx.concatenate([({x})[:, :, :1], {f}({x}, offset={o})[:, :, 1:]], axis=2)",
)
_ropes(
    "rope-conditional-length",
    "single tokens are not rotated",
    "({0} if ({x}).shape[2] > 1 else {x})",
)
_ropes("rope-conditional-offset", "the first chunk is not rotated", "({0} if {o} else {x})")
_ropes(
    "rope-conditional-zero",
    "the first chunk is not rotated, by comparison",
    "({x} if {o} == 0 else {0})",
)


@operator("rope-after-fetch", "keys are rotated after they were fetched")
def _after_fetch(file: File) -> Iterator[Change]:
    for fetch in file.fetches:
        for call in file.ropes:
            statement = file.statement(call)
            target = statement.targets[0] if isinstance(statement, ast.Assign) else None
            if not isinstance(target, ast.Name) or target.id != fetch.targets[0]:
                continue
            if file.above(call, ast.FunctionDef) is not file.above(fetch.call, ast.FunctionDef):
                continue
            moved = f"{target.id} = {file.code(call.func)}({target.id})"
            yield file.change(
                file.put(statement, "pass"), file.after(fetch.statement, moved), where=call
            )
            late = f"{fetch.cache}.offset"
            moved = f"{target.id} = {file.code(call.func)}({target.id}, offset={late})"
            yield file.change(
                file.put(statement, "pass"), file.after(fetch.statement, moved), where=call
            )


@operator("rope-query-after-fetch", "queries are rotated by the offset after the fetch")
def _late_query(file: File) -> Iterator[Change]:
    for fetch in file.fetches:
        for call in file.ropes:
            statement = file.statement(call)
            target = statement.targets[0] if isinstance(statement, ast.Assign) else None
            if not isinstance(target, ast.Name) or target.id in fetch.targets:
                continue
            if file.above(call, ast.FunctionDef) is file.above(fetch.call, ast.FunctionDef):
                moved = file.code(statement)
                yield file.change(
                    file.put(statement, "pass"), file.after(fetch.statement, moved), where=call
                )


def _in_mixers(name: str, says: str, before: str, after: str = "", *, same: bool = False) -> None:
    """Lines before (and after) a fetch, of {c} the cache, {k} {v} what is stored."""

    @operator(name, says, same=same)
    def apply(file: File) -> Iterator[Change]:
        for fetch in file.fetches:
            marks = {
                "{c}": fetch.cache,
                "{k}": fetch.arguments[0],
                "{v}": fetch.arguments[1],
                "{a}": fetch.targets[0],
                "{b}": fetch.targets[1],
            }
            first, second = before, after
            for mark, value in marks.items():
                first, second = first.replace(mark, value), second.replace(mark, value)
            splices = []
            if first:
                splices.append(file.before(fetch.statement, first))
            if second:
                splices.append(file.after(fetch.statement, second))
            yield file.change(*splices, where=fetch.statement)


_in_mixers(
    "offset-in-place",
    "a copy of the offset is counted up in place",
    "_at = {c}.offset\n_at += 1\n{v} = {v} * 1.5",
)
_in_mixers(
    "offset-in-place-early",
    "the offset is counted up in place before it is used",
    "_at = {c}.offset\n_at += {k}.shape[2]",
)
_in_mixers(
    "offset-in-place-used",
    "an offset counted up in place scales values",
    "_at = {c}.offset\n_at += 1\n{v} = {v} / _at",
)
_in_mixers(
    "offset-scale",
    "values are scaled by their chunk's position",
    "{v} = {v} * (1 + 0.1 * {c}.offset)",
)
_in_mixers(
    "offset-late-scale",
    "values are scaled by the offset after the fetch",
    "",
    "{b} = {b} * (1 + 0.1 * {c}.offset)",
)
_in_mixers(
    "offset-late",
    "something is scaled by the offset after the fetch",
    "",
    "_late = {c}.offset\n{a} = {a} if _late else {a}",
)
_in_mixers(
    "offset-if", "values are scaled in the first chunk", "if {c}.offset == 0:\n    {v} = {v} * 1.5"
)
_in_mixers(
    "offset-truth", "values are scaled after the first chunk", "if {c}.offset:\n    {v} = {v} * 1.5"
)
_in_mixers(
    "offset-text",
    "values are scaled by the digits of the offset",
    "{v} = {v} * len(f'{{{c}.offset}}')".replace("{{", "{").replace("}}", "}"),
)
_in_mixers(
    "offset-range",
    "values are scaled once a position",
    "for _ in range(min({c}.offset, 3)):\n    {v} = {v} * 1.1",
)
_in_mixers(
    "positions-scale",
    "values are scaled by their positions",
    "_at = mx.arange({c}.offset, {c}.offset + {k}.shape[2])\n"
    "{v} = {v} * (1 + 0.1 * _at[None, None, :, None])",
)
_in_mixers(
    "positions-plus-one",
    "values are scaled by their positions, one more",
    "_at = mx.arange({c}.offset + 1, {c}.offset + 1 + {k}.shape[2])\n"
    "{v} = {v} * (1 + 0.1 * _at[None, None, :, None])",
)
_in_mixers(
    "positions-stepped",
    "values are scaled by every second position",
    "_at = mx.arange({c}.offset, {c}.offset + 2 * {k}.shape[2], 2)\n"
    "{v} = {v} * (1 + 0.1 * _at[None, None, :, None])",
)
_in_mixers(
    "positions-late",
    "values are scaled by positions counted from the end",
    "",
    "_at = mx.arange({c}.offset - {k}.shape[2], {c}.offset)\n{a} = {a} * 1.0",
)
_in_mixers(
    "positions-local",
    "values are scaled by their places in the chunk",
    "_at = mx.arange({k}.shape[2])\n{v} = {v} * (1 + 0.1 * _at[None, None, :, None])",
)
_in_mixers(
    "positions-added",
    "values are scaled by offset and place in the chunk",
    "_at = {c}.offset + mx.arange({k}.shape[2])\n{v} = {v} * (1 + 0.1 * _at[None, None, :, None])",
)
_in_mixers(
    "positions-rows",
    "values are scaled by positions as rows",
    "_at = mx.arange({c}.offset, {c}.offset + {k}.shape[2])[:, None]\n{v} = {v} * (1 + 0.1 * _at)",
)
_in_mixers(
    "positions-parity",
    "values at even positions are negated",
    "_at = mx.arange({c}.offset, {c}.offset + {k}.shape[2])\n"
    "{v} = mx.where((_at % 2 == 0)[None, None, :, None], -{v}, {v})",
)
_in_mixers(
    "positions-from-size",
    "values are scaled by positions from the end of the cache",
    "_end = {c}.offset + {k}.shape[-2]\n"
    "_at = mx.arange(_end - {k}.shape[-2], _end)\n"
    "{v} = {v} * (1 + 0.1 * _at[:, None])",
)


@operator("range-moved", "the bounds of a range are moved on by one")
def _moved(file: File) -> Iterator[Change]:
    for call in file.nodes(ast.Call):
        if called(call) == "arange" and len(call.args) >= 2:
            splices = [file.put(a, f"({file.code(a)}) + 1") for a in call.args[:2]]
            yield file.change(*splices, where=call)


@operator("range-from-zero", "a range of positions starts at zero")
def _zero(file: File) -> Iterator[Change]:
    for call in file.nodes(ast.Call):
        if called(call) == "arange" and len(call.args) == 2:
            first, second = (file.code(a) for a in call.args)
            text = f"{file.code(call.func)}(({second}) - ({first}))"
            yield file.change(file.put(call, text), where=call)


@operator("range-longer", "a range ends later and is cut off", same=True)
def _longer(file: File) -> Iterator[Change]:
    for call in file.nodes(ast.Call):
        if called(call) == "arange" and len(call.args) == 2:
            first, second = (file.code(a) for a in call.args)
            text = f"{file.code(call.func)}({first}, ({second}) + 1)[: ({second}) - ({first})]"
            yield file.change(file.put(call, text), where=call)
