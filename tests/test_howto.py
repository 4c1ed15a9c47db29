"""The how-to pages, done as they are written."""

from __future__ import annotations

import sys

import pytest

from .pages import DOCS, follow

PAGES = {
    "add-a-rule": {"program": 1, "file": 2, "command": 1},
    "add-a-reward": {"program": 2},
    "add-a-network": {"program": 3, "command": 1},
    "train-many-agents": {"program": 4},
    "add-a-scenario": {"file": 1, "command": 2, "program": 1},
    "add-a-gpu": {"file": 3, "command": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_page_does_what_it_says(tmp_path, monkeypatch, name):
    if name in ("add-a-network", "train-many-agents"):
        pytest.importorskip("stable_baselines3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    done = follow([DOCS / "how-to" / f"{name}.md"], tmp_path)
    assert {kind: count for kind, count in done.items() if count} == PAGES[name]


def test_every_page_is_followed():
    assert {path.stem for path in (DOCS / "how-to").glob("*.md")} == {*PAGES, "index"}
