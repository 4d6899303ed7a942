"""The same program in other words is the same kind, takes the same route and gives the same logits.

hypothesis chooses the model, the ways of rewording and the chances; a failure shrinks to the way
that matters.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from random import Random

import pytest
from compiling import EXAMPLES, compile_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlxrewrite.cli import main
from rewording import WAYS, reworded

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "__init__")
# Not refused, and with a config of a few thousand weights.
RUNNING = [
    name
    for name in NAMES
    if name not in ("reads_cache", "shared_cache") and (EXAMPLES / f"{name}.json").exists()
]
ways = st.lists(st.sampled_from(sorted(WAYS)), min_size=1, unique=True)
chances = st.integers(0, 2**32 - 1)


def outcome(text: str) -> tuple:
    """What the compiler makes of a text, names left out."""
    with tempfile.TemporaryDirectory() as folder:
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


def test_another_program_is_told_apart():
    """What the property compares can differ: a word that is not the same changes the outcome."""
    text = (EXAMPLES / "gqa.py").read_text()
    other = text.replace("self.norm(h)", "self.norm(h - h.mean(axis=1, keepdims=True))")
    assert outcome(other) != original("gqa")


def test_a_comment_with_brackets_bounds_no_expression():
    """A span ended in the comment before it, and what was put in began there."""
    text = (EXAMPLES / "gqa.py").read_text()
    old = "return self.model.embed_tokens.as_linear(h)"
    assert old in text
    new = "return self.model.embed_tokens.as_linear((  # noise ('#' (\n            h))"
    assert outcome(text.replace(old, new)) == original("gqa")
