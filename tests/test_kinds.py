"""The kinds' own examples: each is accepted by its kind and by no other."""

from __future__ import annotations

import pytest
from compiling import judge, module
from mlxrewrite.ir import Match, Miss, Refusal
from mlxrewrite.kinds import all_kinds
from mlxrewrite.match import Mixer
from mlxrewrite.program import Program

ACCEPTED = [
    pytest.param(kind, example, id=f"{kind.name}-{number}")
    for kind in all_kinds()
    for number, example in enumerate(kind.accepts)
]
REJECTED = [
    pytest.param(kind, counter, id=f"{kind.name}-{number}")
    for kind in all_kinds()
    for number, counter in enumerate(kind.rejects)
]


@pytest.mark.parametrize(("kind", "example"), ACCEPTED)
def test_accepts_with_its_route(kind, example):
    found = judge(example.source, example.name)
    assert isinstance(found, Match), found
    assert (found.kind, found.route) == (kind.name, example.route)
    assert found.edits and found.sites and found.evidence


@pytest.mark.parametrize(("kind", "counter"), REJECTED)
def test_rejects(kind, counter):
    found = judge(counter.source, counter.name)
    if counter.kind is None:
        assert not isinstance(found, Match), found
    else:
        assert isinstance(found, Match) and found.kind == counter.kind != kind.name


@pytest.mark.parametrize(("kind", "example"), ACCEPTED)
def test_no_other_kind_takes_an_example(kind, example):
    found = module(example.source)
    program = Program({found.source.module: found})
    mixer = Mixer(program, found.classes[example.name])
    takers = [other.name for other in all_kinds() if isinstance(other.match(mixer), Match)]
    assert takers == [kind.name]


@pytest.mark.parametrize("kind", all_kinds(), ids=lambda kind: kind.name)
def test_documents_itself(kind):
    assert kind.doc.startswith(f"{kind.name}: ")
    for heading in ("Matches ", "Refuses ", "Becomes "):
        assert heading in kind.doc


def test_a_miss_says_what_was_missing():
    for kind in all_kinds():
        for counter in kind.rejects:
            found = module(counter.source)
            program = Program({found.source.module: found})
            result = kind.match(Mixer(program, found.classes[counter.name]))
            assert isinstance(result, Miss) and result.missing and result.kind == kind.name


def test_a_refusal_names_place_and_nearest_kind():
    kind = next(kind for kind in all_kinds() if kind.name == "softmax_attention")
    counter = next(counter for counter in kind.rejects if counter.kind is None)
    refusal = judge(counter.source, counter.name)
    assert isinstance(refusal, Refusal)
    (diagnostic,) = refusal.diagnostics
    assert diagnostic.slug == "no-kind"
    assert diagnostic.place is not None and diagnostic.place.line > 1
    assert diagnostic.nearest
