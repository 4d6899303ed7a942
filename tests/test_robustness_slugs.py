"""Every refusal: an input that provokes it, named with its place and reason, and its cure."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import test_vlm_compile as vlm
from compiling import EXAMPLES, compile_folder, compile_text, said_of
from mlxrewrite import build, passes
from mlxrewrite.diagnostics import SLUGS, render
from mlxrewrite.ir import Diagnostic, Edit
from mlxrewrite.passes import classify
from mlxrewrite.pipeline import Compiled, Compiler
from mlxrewrite.sources import locate

PAGE = (Path(__file__).parent.parent / "docs" / "new-models.md").read_text()
CURED = {
    slug: line.split(":", 1)[1].strip()
    for line in PAGE.split("How each refusal is cured")[1].splitlines()
    if line.startswith("- ")
    for slug in re.findall(r"`([a-z-]+)`", line.split(":", 1)[0])
}
BASE = (EXAMPLES / "gqa.py").read_text()
BLOCK = "        x = x + self.self_attn(self.input_layernorm(x), mask, cache)\n"
FETCH = "            k, v = cache.update_and_fetch(k, v)\n"
Provoke = Callable[[Path], list[Diagnostic]]


def said(compiled: Compiled) -> list[Diagnostic]:
    found = list(compiled.errors)
    if compiled.emitted is not None:
        found += said_of(compiled.emitted.plan)
    return found


def edited(old: str, new: str) -> Provoke:
    """The example with one edit in it."""

    def provoke(folder: Path) -> list[Diagnostic]:
        assert BASE.count(old) == 1
        return said(compile_text(folder, BASE.replace(old, new)))

    return provoke


def block(line: str) -> Provoke:
    """The example with one more statement in each layer."""
    return edited(BLOCK, f"{BLOCK}        {line}\n")


def language(old: str, new: str) -> Provoke:
    """A language model of mlx_vlm's layout with one edit in it."""

    def provoke(folder: Path) -> list[Diagnostic]:
        assert old in vlm.LANGUAGE
        return said(vlm.compiled(folder, vlm.LANGUAGE.replace(old, new)))

    return provoke


def unreadable(folder: Path) -> list[Diagnostic]:
    (folder / "gone.py").symlink_to("no_such_file.py")
    return said(Compiler(locate(str(folder)).package).compile(f"{folder.name}.gone"))


def changed(folder: Path) -> list[Diagnostic]:
    path = folder / "model.py"
    path.write_text(BASE)
    package = locate(str(folder)).package

    def save_again(_: str) -> None:
        path.write_text(f"{BASE}# saved again\n")

    name = f"{folder.name}.model"
    (built,) = build.build(package, [name], jobs=1, use_cache=False, progress=save_again)
    return list(built.errors)


def sibling(folder: Path) -> list[Diagnostic]:
    """An entry that inherits its forward method from a file that is rewritten otherwise."""
    (folder / "parent.py").write_text(BASE)
    (folder / "child.py").write_text(
        "from .parent import Model as Parent, ModelArgs\n\n\nclass Own:\n    pass\n\n\n"
        "class Model(Parent):\n    def make_cache(self):\n"
        "        return [Own() for _ in self.layers]\n"
    )
    return said(compile_folder(folder)[f"{folder.name}.child"])


def two_kinds(folder: Path) -> list[Diagnostic]:
    kinds = classify.all_kinds()
    softmax = next(kind for kind in kinds if kind.name == "softmax_attention")
    twin = replace(softmax, name="twin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "all_kinds", lambda: (*kinds, twin))
        return said(compile_text(folder, BASE))


def rewritten_twice(folder: Path) -> list[Diagnostic]:
    """A plan whose edits overlap: the first of them, twice."""
    with pytest.MonkeyPatch.context() as patch:
        planned = Compiler.plan

        def twice(self: Compiler, found: object) -> object:
            plan = planned(self, found)
            first = next(e for e in plan.edits if e.span.end > e.span.start)
            return replace(plan, edits=(*plan.edits, first))

        patch.setattr(Compiler, "plan", twice)
        return said(compile_text(folder, BASE))


def invalid_output(folder: Path) -> list[Diagnostic]:
    """A plan that puts in text which is no Python."""
    with pytest.MonkeyPatch.context() as patch:
        planned = Compiler.plan

        def broken(self: Compiler, found: object) -> object:
            plan = planned(self, found)
            edits = tuple(
                Edit(e.span, e.before, b"(" + e.after, *_rest(e)) if e is plan.edits[-1] else e
                for e in plan.edits
            )
            return replace(plan, edits=edits)

        patch.setattr(Compiler, "plan", broken)
        return said(compile_text(folder, BASE))


def _rest(edit: Edit) -> list[object]:
    names = list(type(edit).__dataclass_fields__)[3:]
    return [getattr(edit, name) for name in names]


SHIFT = "x = x + mx.concatenate([mx.zeros_like(x[:, :1]), x[:, :-1]], axis=1)"
PROVOKED: dict[str, Provoke] = {
    "syntax": lambda folder: said(compile_text(folder, "class Model(:\n    pass\n")),
    "unreadable": unreadable,
    "changed": changed,
    "no-entry": language("inputs, inputs_embeds=None, mask", "inputs, mask"),
    "no-kind": edited(
        FETCH, f"{FETCH}            k = k[:, :, ::2]\n            v = v[:, :, ::2]\n"
    ),
    "two-kinds": two_kinds,
    "cache-class": edited(
        "class Model(nn.Module):\n",
        "class Own:\n    pass\n\n\nclass Model(nn.Module):\n"
        "    def make_cache(self):\n        return [Own() for _ in self.layers]\n\n",
    ),
    "cache-use": block("x = x * cache.state[0].sum()"),
    "uncached-attention": edited(FETCH, "            pass\n"),
    "state-on-self": block("self.seen = x"),
    "rewritten-twice": rewritten_twice,
    "invalid-output": invalid_output,
    "patched": edited(
        "class Model(nn.Module)", "Attention.scale = 2.0\n\n\nclass Model(nn.Module)"
    ),
    "sibling": sibling,
    "row-mixing": block("x = x + mx.cumsum(x, axis=1)"),
    "token-count": block("x = x / x.shape[1]"),
    "position-special": block("x = x + x[:, -1:]"),
    "not-autoregressive": language("cache=None, **kwargs", "cache=None, encoder_outputs=None"),
    "length-dependent": block("x = x * (2 if x.shape[1] == 1 else 1)"),
    "token-branch": block("x = x * len(f'{cache.offset}')"),
    "unknown-operation": block("x = mx.linalg.inv(x)"),
}
# Of a whole file, or of what we made of it: there is no column to point to.
OF_A_FILE = {"unreadable", "changed", "rewritten-twice", "invalid-output"}


@pytest.mark.parametrize("slug", sorted(SLUGS))
def test_it_is_provoked_with_place_reason_and_cure(tmp_path, slug):
    folder = tmp_path / "probe"
    folder.mkdir()
    found = [d for d in PROVOKED[slug](folder) if d.slug == slug]
    assert found
    for diagnostic in found:
        text = render(diagnostic)
        assert re.match(rf"(refused|error|note)\[{slug}\]: \S.*", text), text
        assert len(diagnostic.message) > 12
        assert diagnostic.act in ("source", "compiler", "fundamental")
        if slug in OF_A_FILE:
            assert "probe" in diagnostic.message or "probe" in str(diagnostic.place)
        else:
            assert re.search(r"^ *--> \S+\.py:[1-9]\d*:[1-9]\d*$", text, re.MULTILINE), text
    assert len(CURED[slug]) > 20


def test_every_slug_is_provoked_and_cured_and_no_other():
    assert set(PROVOKED) == set(SLUGS) == set(CURED)


def test_every_slug_in_the_compiler_is_in_the_list():
    """Of the proof's refusals, too; and none in the list is never used."""
    folder = Path(passes.__path__[0]).parent
    text = "".join(p.read_text() for p in folder.rglob("*.py") if p.name != "diagnostics.py")
    used = set(re.findall(r'(?:Diagnostic|error|Refused)\(\s*"([a-z]+(?:-[a-z]+)*)"', text))
    assert used <= set(SLUGS)
    named = set(re.findall(r'"([a-z]+(?:-[a-z]+)*)"', text))
    assert set(SLUGS) <= named
