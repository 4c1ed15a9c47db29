"""The examples run, and say what their readers are told."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("01_make_env", "least loaded"),
        ("02_roll_out_many", "decisions/s"),
        ("03_train_with_sb3", "A2C: 2048 steps"),
        ("04_decide_live", "decided by the policy: 12 of 12"),
        ("05_pose_a_problem", "quiet:gap_s=0.01316"),
    ],
)
def test_example_runs(name, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what one writes stays there
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert says in capsys.readouterr().out


def test_every_example_is_tested_here():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    tested = {
        row[0]
        for mark in test_example_runs.pytestmark
        if mark.name == "parametrize"
        for row in mark.args[1]
    }
    assert names == tested


def test_generated_pages_are_up_to_date():
    pages = runpy.run_path(str(EXAMPLES.parent / "scripts" / "write_docs.py"))
    docs = EXAMPLES.parent / "docs"
    assert (docs / "observation.md").read_text() == pages["observation_page"]()
    assert (docs / "policies.md").read_text() == pages["policies_page"]()
