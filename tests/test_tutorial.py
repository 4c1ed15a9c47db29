"""The tutorial, done as it is written; its live step on free ports of the loopback."""

from __future__ import annotations

import pytest

from .pages import DOCS, follow, free_ports

STEPS = ["1-simulate", "2-compare", "3-train", "4-live"]


@pytest.mark.slow
def test_the_tutorial_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engines, routers = free_ports(3), free_ports(2)
    changes = {str(8100 + i): str(port) for i, port in enumerate(engines)}
    changes |= {str(8080 + i): str(port) for i, port in enumerate(routers)}
    pages = [DOCS / "tutorial" / f"{step}.md" for step in STEPS]
    done = follow(pages, tmp_path, changes)
    assert done == {"file": 4, "command": 11, "server": 2, "program": 0}


def test_every_page_of_the_tutorial_is_followed():
    pages = {path.stem for path in (DOCS / "tutorial").glob("*.md")}
    assert pages == {*STEPS, "index"}
