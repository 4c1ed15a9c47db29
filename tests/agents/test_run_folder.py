"""Folders of runs: what is compared, what a sentence says, and what a full disk leaves."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass

import pytest
import torch

from servegym.errors import ConfigError, OutputError
from servegym.train import run_folder
from servegym.train.run_folder import RunFolder, StoredRun, differences, name_some


@dataclass(frozen=True)
class Settings:
    """Of no real trainer."""

    seed: int = 0
    load: tuple[float, float] = (0.6, 1.1)
    max_minutes: float = float("inf")


SCENARIO = {"name": "small", "workload": {"kind": "trace", "path": "none.csv"}}


def test_differences_are_named_with_both_values():
    stored = {"settings": {"a": 1, "b": [1, 2], "c": {"d": 1}}, "scenario": {"fleet": [{"n": 1}]}}
    got = {
        "settings": {"a": 1, "b": [1, 3], "c": {"d": 2, "e": 0}},
        "scenario": {"fleet": [{"n": 2}]},
    }
    assert differences(stored, got) == [
        ("b", [1, 2], [1, 3]),
        ("c.d", 1, 2),
        ("c.e", "not set", 0),
        ("scenario.fleet.0.n", 1, 2),
    ]
    assert differences(stored, stored) == []
    assert name_some([("a", 1, "x")]) == 'a is 1 there, "x" here'
    five = [(name, 1, 2) for name in "abcde"]
    assert name_some(five).endswith("d is 1 there, 2 here; and 1 more")


def test_a_folder_is_begun_once_and_then_gone_on_with(tmp_path):
    folder = RunFolder(tmp_path / "run", "order", Settings(), SCENARIO)
    assert not (tmp_path / "run").exists()  # nothing is written before the run begins
    assert folder.begin() is None
    assert folder.begin() is None
    folder.save("3 steps", {"weights": torch.ones(2), "step": 3})
    again = RunFolder(tmp_path / "run", "order", Settings(), SCENARIO)
    content = again.begin()
    assert content is not None
    assert (content["step"], content["weights"].tolist()) == (3, [1.0, 1.0])
    assert again.saved == "3 steps"
    assert sorted(x.name for x in (tmp_path / "run").iterdir()) == ["checkpoint.pt", "config.json"]
    stored = StoredRun.read(tmp_path / "run")
    assert stored.rebuild(Settings) == Settings()
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    assert set(described["versions"]) == {"servegym", "python", "numpy", "numba", "torch"}


def test_a_trace_with_another_content_is_another_configuration(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("1")
    scenario = {"name": "small", "workload": {"kind": "trace", "path": str(trace)}}
    RunFolder(tmp_path / "run", "order", Settings(), scenario).begin()
    trace.write_text("2")
    with pytest.raises(ConfigError, match=r"files\..*trace\.csv is \"6b86b2.*there, \"d4735e"):
        RunFolder(tmp_path / "run", "order", Settings(), scenario)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"problem": "workflow"}, "holds a run of problem workflow, and this is one of order"),
        ({"format": 1}, "does not describe a training run of this version"),
        ({"settings": None}, "is broken"),
        ({"settings": {"seed": 0}}, "load is not set there"),
    ],
)
def test_folders_of_other_runs_are_refused_in_one_sentence(tmp_path, change, said):
    folder = RunFolder(tmp_path, "order", Settings(), SCENARIO)
    folder.begin()
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | change))
    with pytest.raises(ConfigError, match=said):
        RunFolder(tmp_path, "order", Settings(), SCENARIO)


@pytest.mark.parametrize("call", ["add_scalar", "close"])
def test_a_full_disk_under_the_log_is_one_sentence(tmp_path, monkeypatch, call):
    def full(self, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder.SummaryWriter, call, full)
    folder = RunFolder(tmp_path, "order", Settings(), SCENARIO)
    folder.begin()
    said = r"tensorboard cannot be written \(no space left"
    with pytest.raises(OutputError, match=said), folder.tensorboard(0) as writer:
        writer.add_scalar("x", 1.0, 0)


@pytest.mark.parametrize("at", ["before", "after"])
def test_an_interrupted_save_is_known_by_what_stands_in_the_folder(tmp_path, monkeypatch, at):
    folder = RunFolder(tmp_path / "run", "order", Settings(), SCENARIO)
    folder.begin()
    folder.save("3 steps", {"step": 3})
    real = run_folder.write_whole

    def interrupted(files):
        if at == "after":
            real(files)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.save("4 steps", {"step": 4})
    assert folder.saved == ("4 steps" if at == "after" else "3 steps")
