"""The pages of the environments have Gymnasium's form."""

from __future__ import annotations

import re

import pytest

from .pages import DOCS

HEADINGS = [
    "Description",
    "Action Space",
    "Observation Space",
    "Rewards",
    "Starting State",
    "Episode End",
    "Arguments",
    "Version History",
]


@pytest.mark.parametrize("name", ["dispatch", "preemption", "workflow", "cluster"])
def test_a_page_has_the_eight_headings_in_their_order(name):
    text = (DOCS / "environments" / f"{name}.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == HEADINGS
