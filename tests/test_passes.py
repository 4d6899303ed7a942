"""The stages, one by one: text in, values out."""

from __future__ import annotations

import pytest
from compiling import compile_text, mlx_lm, module
from mlxrewrite.ir import Edit, Source, Span
from mlxrewrite.match import every_value, live, same
from mlxrewrite.passes.emit import splice
from mlxrewrite.passes.parse import ParseError, parse


def returned(text: str, function: str = "f"):
    return module(text).functions[function].returns[-1].value


def test_names_become_values():
    value = returned(
        "import mlx.core as mx\ndef f(x):\n    y = mx.exp(x)\n    z = y\n    return z\n"
    )
    assert value.op == "call"
    assert value.args[0].data == "mlx.core.exp"
    assert value.args[1].op == "param"


def test_branches_join():
    value = returned("def f(x, c):\n    if c:\n        x = x + 1\n    return x\n")
    assert value.op == "phi"
    assert value.args[1].op == "binary" and value.args[2].op == "param"


def test_a_branch_that_returns_leaves_the_other():
    found = module("def f(x, c):\n    if c:\n        return x\n    return x + 1\n").functions["f"]
    assert [effect.value.op for effect in found.returns] == ["param", "binary"]
    assert found.returns[1].path.conditions[-1][1] is False


def test_loops_carry_values():
    value = returned(
        "def f(x, layers):\n    for layer in layers:\n        x = layer(x)\n    return x\n"
    )
    assert value.op == "loop"
    call = value.args[1]
    assert call.args[0].op == "elem" and call.args[1].op == "carried"


def test_zip_and_enumerate_are_seen_through():
    value = returned(
        "def f(a, b):\n    for i, (x, y) in enumerate(zip(a, b)):\n        z = y\n    return z\n"
    )
    assert value.op == "elem" and value.args[0].data == ("f", "b")


def test_tuples_are_seen_through():
    value = returned("def f(a, b):\n    x, y = a, b\n    x, y = y, x\n    return x\n")
    assert value.data == ("f", "b")


def test_live_takes_the_arm_with_a_cache():
    value = returned(
        "def f(cache, k):\n    if cache is not None:\n        k = cache.get(k)\n"
        "    else:\n        k = -k\n    return k\n"
    )
    assert live(value).op == "call"


def test_same_compares_structure():
    first = returned("def f(x):\n    return x.a + 1\n")
    assert same(first, first)
    second = module("def f(x):\n    y = x.a\n    return (y + 1) * (x.a + 1)\n").functions["f"]
    left, right = second.returns[0].value.args
    assert same(left, right)
    assert not same(left, left.args[0])


def test_in_place_addition_is_an_effect():
    found = module("def f(x):\n    x += 1\n    return x\n").functions["f"]
    assert [effect.kind for effect in found.effects] == ["augment", "return"]


@pytest.mark.parametrize(
    "text",
    ["def f(:\n", "x = \x00\n", "class A\n  pass\n", "\tx\n y"],
)
def test_broken_text_is_one_error_with_a_place(text):
    with pytest.raises(ParseError) as caught:
        parse(Source.of("m", "m.py", text.encode()))
    assert str(caught.value).startswith("m.py:")


def test_other_encodings_are_refused():
    with pytest.raises(ParseError, match=r"UTF-8|decode"):
        parse(Source.of("m", "m.py", b"# -*- coding: latin-1 -*-\nx = '\xe9'\n"))


def test_spans_are_exact_beyond_ascii():
    text = 'def f(x):\n    s = "é世"; y = g(x)\n    return y\n'
    found = module(text)
    call = next(v for v in every_value(found.functions["f"]) if v.op == "call")
    assert found.source.text(call.span) == "g(x)"
    assert found.source.line_column(call.span.start) == (2, 19)


def test_parentheses_belong_to_an_expression():
    found = module("def f(x):\n    return (x + 1).sum()\n")
    value = found.functions["f"].returns[0].value
    assert found.source.text(value.args[0].args[0].span) == "(x + 1)"


def test_splice_refuses_overlap_and_surprise():
    def edit(start: int, end: int, before: bytes) -> Edit:
        return Edit(Span(start, end), before, b"", "test")

    with pytest.raises(ValueError, match="overlap"):
        splice(b"abcdef", (edit(0, 3, b"abc"), edit(2, 4, b"cd")))
    with pytest.raises(ValueError, match="expects"):
        splice(b"abcdef", (edit(0, 3, b"xyz"),))


def test_unhashable_shapes_of_python_compile(tmp_path):
    """Syntax that models rarely use must not break the compiler."""
    text = """
import mlx.nn as nn
class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.table = {**{"a": 1}, "b": [*range(3)]}
        self.pairs = {k: v for k, v in self.table.items() if k}
    async def later(self, *args, key=None, **rest):
        async with key as k:
            await k
        return [x async for x in k]
    def __call__(self, x, cache=None):
        if (n := len(self.table)) > 1:
            x = x * n
        try:
            x = x if x is not None else 0
        except (ValueError, TypeError) as e:
            raise RuntimeError(f"{e!r:>{n}}") from e
        else:
            x = (lambda y, *, z=1: y + z)(x)
        finally:
            del n
        while False:
            break
        match x:
            case [a, *b]:
                x = a
            case _:
                pass
        x[..., 1:2, None] = 3
        global G
        G = x
        assert x, "x"
        return x
"""
    result = compile_text(tmp_path, text)
    assert not result.errors


def test_what_a_file_is_made_from_was_read_byte_for_byte(monkeypatch):
    """Of the file itself, and only of it: what it imports gets no output from this."""
    import libcst
    from mlxrewrite.passes import parse as passes_parse
    from mlxrewrite.pipeline import Compiler

    seen: list[bytes] = []

    def noting(data: bytes) -> libcst.Module:
        seen.append(data)
        return libcst.parse_module(data)

    class Reader:
        ParserSyntaxError = libcst.ParserSyntaxError
        parse_module = staticmethod(noting)

    monkeypatch.setattr(passes_parse, "libcst", Reader)
    package = mlx_lm()
    name = f"{package.name}.llama"
    assert Compiler(package).compile(name).emitted is not None
    assert seen == [package.read(name).data]

    Reader.parse_module = staticmethod(lambda data: libcst.parse_module(data + b"\n"))
    broken = Compiler(package).compile(name)
    assert broken.emitted is None
    assert [d.slug for d in broken.errors] == ["syntax"]
