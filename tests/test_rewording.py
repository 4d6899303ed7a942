"""The same program in other words is the same kind, takes the same route and gives the same logits.

hypothesis chooses the model, the ways of rewording and the chances; a failure shrinks to the way
that matters.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import cache
from pathlib import Path
from random import Random

import pytest
from compiling import EXAMPLES, compile_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlxrewrite.cli import main
from rewording import WAYS, reworded, split_over_files

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "__init__")
# Not refused, and with a config of a few thousand weights.
RUNNING = [
    name
    for name in NAMES
    if name not in ("reads_cache", "shared_cache") and (EXAMPLES / f"{name}.json").exists()
]
ways = st.lists(st.sampled_from(sorted(WAYS)), min_size=1, unique=True)
chances = st.integers(0, 2**32 - 1)


# What builds a model, and is never rewritten itself.
BUILDING = ("__init__", "sanitize", "layers", "make_cache")


def outcome(text: str, parts: str = "") -> tuple:
    """What the compiler makes of a text, names left out. `parts` is a file beside it."""
    with tempfile.TemporaryDirectory() as folder:
        if parts:
            (Path(folder) / "parts.py").write_text(parts)
        compiled = compile_text(Path(folder), text)
    assert not compiled.errors, compiled.errors
    assert compiled.emitted is not None
    plan = compiled.emitted.plan
    kinds = [(m.kind, m.route, m.features, [s.rule for s in m.sites]) for m in plan.matches]
    notes = [d.slug for d in plan.notes]
    refused = sorted(d.slug for refusal in plan.refusals for d in refusal.diagnostics)
    return plan.route, sorted(kinds, key=repr), sorted(notes), refused


@cache
def original(name: str) -> tuple:
    return outcome((EXAMPLES / f"{name}.py").read_text())


def same_outcome(name: str, chosen: list[str], chance: int) -> None:
    text = reworded((EXAMPLES / f"{name}.py").read_text(), chosen, Random(chance))
    compile(text, name, "exec")
    assert outcome(text) == original(name), text


def same_logits(name: str, chosen: list[str], chance: int) -> None:
    """The rewritten form of the reworded model against the reworded model itself."""
    from mlxrewrite.runtime.verify import verify

    text = reworded((EXAMPLES / f"{name}.py").read_text(), chosen, Random(chance))
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source" / f"{name}.py"
        source.parent.mkdir()
        source.write_text(text)
        made = Path(temporary) / "made"
        assert main([str(source), "-o", str(made), "-q", "--no-cache"]) in (0, 1)
        report = verify(EXAMPLES / f"{name}.json", generated=made, source=source)
    assert report.passed, report.text()


def split(name: str, chance: int, sibling: str, only: tuple[str, ...] = ()) -> tuple[str, str]:
    """The example with some methods in another file, the first chances that move any."""
    text = (EXAMPLES / f"{name}.py").read_text()
    for more in range(100):
        try:
            return split_over_files(text, Random(chance + more), sibling, only)
        except ValueError:
            continue
    return text, ""


def same_logits_of_files(name: str, chance: int) -> str:
    """A model in two files against itself; its route. The original is imported as it is written."""
    from mlxrewrite.runtime.verify import verify

    with tempfile.TemporaryDirectory() as temporary:
        package = f"split{Path(temporary).name}"
        source = Path(temporary) / package / f"{name}.py"
        source.parent.mkdir()
        text, parts = split(name, chance, f"{package}.parts")
        source.write_text(text)
        (source.parent / "parts.py").write_text(parts)
        made = Path(temporary) / "made"
        assert main([str(source), "-o", str(made), "-q", "--no-cache"]) in (0, 1)
        route = json.loads((made / f"{name}.json").read_text())["route"]
        sys.path.insert(0, temporary)
        try:
            report = verify(EXAMPLES / f"{name}.json", generated=made, source=source)
        finally:
            sys.path.remove(temporary)
    assert report.passed, f"{text}\n{parts}\n{report.text()}"
    return str(route)


def few(number: int) -> settings:
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=number, deadline=None, derandomize=True, database=None,
        suppress_health_check=quiet,
    )  # fmt: skip


@few(16)
@given(name=st.sampled_from(NAMES), chosen=ways, chance=chances)
def test_other_words_are_the_same_kind(name, chosen, chance):
    same_outcome(name, chosen, chance)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_each_way_is_the_same_kind(way):
    same_outcome("gqa", [way], 1)


@few(5)
@given(name=st.sampled_from(RUNNING), chosen=ways, chance=chances)
def test_other_words_give_the_same_logits(name, chosen, chance):
    same_logits(name, chosen, chance)


def test_caches_named_through_their_module_are_paged():
    """`cache.ChunkedKVCache(...)` makes mlx_lm's own cache, which was taken for a foreign one."""
    same_logits("chunked", ["imports"], 1)


def test_functions_of_imported_packages_keep_their_names():
    """`import mlx.core` binds `mlx`, and `mlx.core.linalg.norm` is not the model's `norm`."""
    text = "import mlx.core\n\nclass A:\n    def norm(self, x):\n        return mlx.core.norm(x)\n"
    assert "mlx.core.norm(x)" in reworded(text, ["names"], Random(1))
    same_outcome("token_shift", ["arguments", "bases", "names", "imports"], 49)


@pytest.mark.slow
@few(120)
@given(name=st.sampled_from(NAMES), chosen=ways, chance=chances)
def test_many_other_words_are_the_same_kind(name, chosen, chance):
    same_outcome(name, chosen, chance)


@pytest.mark.slow
@few(30)
@given(name=st.sampled_from(RUNNING), chosen=ways, chance=chances)
def test_many_other_words_give_the_same_logits(name, chosen, chance):
    same_logits(name, chosen, chance)


# Its rope is made by a function that only a rewritten file replaces.
SPLIT = sorted({*NAMES} - {"qk_norm"})


@few(8)
@given(name=st.sampled_from(SPLIT), chance=chances)
def test_bases_in_another_file_are_the_same_kind(name, chance):
    assert outcome(*split(name, chance, ".parts", BUILDING)) == original(name)


@few(3)
@given(name=st.sampled_from(RUNNING), chance=chances)
def test_bases_in_another_file_give_the_same_logits(name, chance):
    """Where a mixer's own forward is in the other file, which is not written, the whole model runs
    once per sequence."""
    same_logits_of_files(name, chance)


@pytest.mark.slow
@few(60)
@given(name=st.sampled_from(SPLIT), chance=chances)
def test_many_bases_in_another_file_are_the_same_kind(name, chance):
    assert outcome(*split(name, chance, ".parts", BUILDING)) == original(name)


@pytest.mark.slow
@few(30)
@given(name=st.sampled_from(RUNNING), chance=chances)
def test_many_bases_in_another_file_give_the_same_logits(name, chance):
    same_logits_of_files(name, chance)


def test_a_rope_made_in_another_file_is_not_taken_for_a_rewritten_one():
    route, _, notes, refused = outcome(*split("qk_norm", 1, ".parts", ("__init__",)))
    assert (route, notes, refused) == ("model", ["token-count"], [])


def test_a_split_that_changes_something_is_told_apart():
    """The property can fail: a base in the other file that does something else."""
    text, parts = split("short_conv", 1, ".parts", ("__init__",))
    wrong = parts.replace("nn.Conv1d(", "nn.ConvTranspose1d(")
    assert wrong != parts
    assert outcome(text, wrong) != original("short_conv")


def test_a_base_makes_the_convolution():
    """Attributes that a base made were not seen by the kinds of recurrences."""
    same_outcome("selective_scan", ["arguments", "bases"], 0)


def entry(text: str) -> str:
    """An example that mixes rows, with another end."""
    given = (EXAMPLES / "row_mixing.py").read_text()
    return given.replace("class Model(nn.Module)", "class Whole(nn.Module)") + text


def test_an_entry_that_inherits_its_forward_runs_once_per_sequence(tmp_path):
    """Nothing told such a model so: it ran at once over paged caches."""
    from mlxrewrite.runtime.verify import verify

    source = tmp_path / "row_mixing.py"
    source.write_text(entry("\n\nclass Model(Whole):\n    pass\n"))
    made = tmp_path / "made"
    assert main([str(source), "-o", str(made), "-q", "--no-cache"]) == 0
    report = verify(EXAMPLES / "row_mixing.json", generated=made, source=source)
    assert report.passed and report.route == "model", report.text()


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("class Model(Whole): pass\n", "sibling"),
        ("class More:\n    pass\n\n\nclass Model(More, Whole):\n    pass\n", "sibling"),
        ("class Model(Whole):\n    __call__ = Whole.__call__\n", "patched"),
        (
            "class Model(Whole):\n    def __call__(self, inputs, cache=None):\n"
            "        return inputs\n\n    __call__ = Whole.__call__\n",
            "patched",
        ),
    ],
)
def test_an_entry_without_a_forward_of_its_own_is_refused(text, slug):
    route, _, _, refused = outcome(entry(f"\n\n{text}"))
    assert route == "refused" and slug in refused


def test_another_program_is_told_apart():
    """What the property compares can differ: a word that is not the same changes the outcome."""
    text = (EXAMPLES / "gqa.py").read_text()
    other = text.replace("self.norm(h)", "self.norm(h - h.mean(axis=1, keepdims=True))")
    assert outcome(other) != original("gqa")


@pytest.mark.parametrize("chance", [3, 4, 6])
def test_brackets_around_a_kept_row_change_nothing(chance):
    same_outcome("token_shift", ["layout"], chance)


def test_a_comment_with_brackets_bounds_no_expression():
    """A span ended in the comment before it, and what was put in began there."""
    text = (EXAMPLES / "gqa.py").read_text()
    old = "return self.model.embed_tokens.as_linear(h)"
    assert old in text
    new = "return self.model.embed_tokens.as_linear((  # noise ('#' (\n            h))"
    assert outcome(text.replace(old, new)) == original("gqa")
