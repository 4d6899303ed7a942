"""Every refusal is documented with its cure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mlxrewrite.diagnostics import SLUGS

PAGE = (Path(__file__).parent.parent / "docs" / "new-models.md").read_text()
CURED = {
    slug
    for line in PAGE.split("How each refusal is cured")[1].splitlines()
    if line.startswith("- ")
    for slug in re.findall(r"`([a-z-]+)`", line.split(":", 1)[0])
}


@pytest.mark.parametrize("slug", sorted(SLUGS))
def test_cure_is_documented(slug):
    assert slug in CURED


def test_no_other_slug_is_documented():
    assert set(SLUGS) >= CURED
