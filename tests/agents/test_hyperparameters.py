"""Searching settings: stopped early, gone on with, written as a file that training takes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import yaml

from servegym.agents.network import NetworkConfig
from servegym.cli import _parse, main
from servegym.errors import ConfigError, ServeGymError
from servegym.train.hyperparameters import SPACES, search
from servegym.train.ppo_settings import PPOConfig
from servegym.train.registry import LEARNERS
from servegym.train.run_folder import StoredRun

optuna = pytest.importorskip("optuna", reason="the extra optuna")


class Killed(Exception):
    """Stands for a program that was ended."""


class Fake:
    """A trainer whose score is how far the learning rate is from a thousandth."""

    made: ClassVar[list[Fake]] = []
    kill_at = -1

    def __init__(self, config: PPOConfig, folder) -> None:
        self.config, self.folder = config, folder
        self.history, self.best_scores, self.num_updates_made = [], np.array([9.0]), 0
        Fake.made.append(self)

    def run(self, progress) -> None:
        for _ in range(4):
            self.num_updates_made += 1
            self.history.append({})
            if self.num_updates_made % 2 == 0:
                self.history[-1]["validation/objective"] = 1.0
                off = abs(math.log(self.config.learning_rate / 1e-3))
                self.best_scores = np.array([off + 1.0 / self.num_updates_made])
            if len(Fake.made) == Fake.kill_at and self.num_updates_made == 3:
                raise Killed
            progress("PPO", self.num_updates_made / 4)


FAKE = SimpleNamespace(folder="ppo", trainer=Fake)


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(Fake, "kill_at", -1)


def test_bad_trials_are_stopped_early_and_the_best_is_written(tmp_path):
    found = search("ppo", FAKE, PPOConfig(clip=0.25, seed=3), tmp_path, num_trials=25)
    assert len(Fake.made) == found.num_trials + found.num_pruned == 25
    whole = [x for x in Fake.made if x.num_updates_made == 4]
    assert len(whole) == found.num_trials
    assert all(x.num_updates_made == 4 for x in Fake.made[:5])
    assert 3 <= found.num_pruned <= 20
    best = min(whole, key=lambda x: x.best_scores[0])
    assert found.score == best.best_scores[0] < 0.5
    assert found.run_folder == best.folder
    content = yaml.safe_load(found.settings.read_text())
    assert content["learner"] == "ppo"
    assert content["settings"]["learning_rate"] == best.config.learning_rate
    assert content["settings"]["seed"] == 3


def test_a_search_that_was_killed_goes_on_with_the_trial_it_was_at(tmp_path, monkeypatch):
    monkeypatch.setattr(Fake, "kill_at", 3)
    with pytest.raises(Killed):
        search("ppo", FAKE, PPOConfig(), tmp_path, num_trials=6)
    found = search("ppo", FAKE, PPOConfig(), tmp_path, num_trials=6)
    assert found.num_trials + found.num_pruned == 6
    assert len(Fake.made) == 7
    assert Fake.made[3].folder == Fake.made[2].folder  # where its checkpoint is
    assert len({x.folder for x in Fake.made}) == 6
    again = search("ppo", FAKE, PPOConfig(), tmp_path, num_trials=6)
    assert again == found
    assert len(Fake.made) == 7
    with pytest.raises(ConfigError, match="holds a search with other settings: give another --out"):
        search("ppo", FAKE, PPOConfig(num_envs=64), tmp_path, num_trials=6)


@pytest.mark.parametrize("learner", SPACES)
def test_what_is_searched_are_settings_of_the_learner(learner):
    usual = LEARNERS["dispatch"][learner].settings()
    assert len(SPACES[learner]) >= 3
    for name, where in SPACES[learner].items():
        part, _, inner = name.partition(".")
        value = getattr(usual, part)
        value = getattr(value, inner) if inner else value
        assert where.low <= value <= where.high
        assert isinstance(value, int) == isinstance(where.low, int)


def test_the_command_searches_and_train_takes_what_it_finds(write_scenario, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scenario = write_scenario()
    tiny = (
        "--learner counterfactual --labels 16 --num-envs 4 --num-steps 16 --num-samples 2"
        " --num-requests 40 --memory 48 --batch 8 --validation-episodes 2 --validation-requests 40"
        " --base prefix-load"
    )
    main(["search", "--scenario", scenario, "--trials", "1", *tiny.split()])
    folder = tmp_path / "runs/search-counterfactual-small"
    (run,) = (folder / "trials").iterdir()
    given = ["train", "--scenario", scenario, "--settings", str(folder / "settings.yaml")]
    settings = _parse(given).settings
    assert settings.num_envs == 4
    assert settings.network == NetworkConfig(base="prefix-load", eta=settings.network.eta)
    stored = StoredRun.read(run).settings
    names = [name for name in SPACES["counterfactual"] if "." not in name]
    assert {name: getattr(settings, name) for name in names} == {n: stored[n] for n in names}
    assert _parse([*given, "--smoothing", "0.15"]).settings.smoothing == 0.15
    with pytest.raises(ServeGymError, match="settings of learner counterfactual: leave --learner"):
        _parse([*given, "--learner", "ppo"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learner: ppo\nsettings: {learning_rat: 1}", "unknown setting 'learning_rat'"),
        ("learner: ppo\nsettings: {epochs: many}", "epochs: Input should be a valid integer"),
        ("learner: ppo\nsettings: {num_envs: 0}", "num_envs and group_size must be at least 1"),
        ("learner: ppo", "settings: field required"),
        ("learner: sac\nsettings: {}", "has no learner sac"),
    ],
)
def test_a_wrong_file_of_settings_is_refused(tmp_path, text, said):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ServeGymError, match=said):
        _parse(["train", "--settings", str(file)])


def test_learners_whose_settings_are_not_searched_say_so(tmp_path):
    entry = LEARNERS["order"]["search"]
    with pytest.raises(ConfigError, match="settings of learner search are not searched"):
        search("search", entry, entry.settings(), tmp_path, num_trials=1)
