"""The examples run, and print what stands in the file beside each; `...` is for what varies."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from .pages import require_output

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = [
    "01_make_env",
    "02_roll_out_many",
    "03_train_with_sb3",
    "04_decide_live",
    "05_pose_a_problem",
    "06_plan_a_fleet",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_example_prints_what_stands_beside_it(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what one writes stays there
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    wanted = (EXAMPLES / f"{name}.out").read_text(encoding="utf-8")
    require_output(capsys.readouterr().out, wanted, f"examples/{name}.py")


def test_every_example_has_its_output_and_is_tested_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NAMES)
    assert {path.stem for path in EXAMPLES.glob("*.out")} == set(NAMES)


def test_generated_pages_are_up_to_date():
    made = runpy.run_path(str(EXAMPLES.parent / "scripts" / "write_docs.py"))["pages"]()
    assert len(made) == 7
    for name, text in made.items():
        assert (EXAMPLES.parent / "docs" / name).read_text() == text
