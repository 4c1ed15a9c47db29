"""Learning an order: where it begins, what it keeps, and that vLLM's plug-in can run it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import yaml

from servegym.baselines.ordering.registry import ordering_policy
from servegym.cli import main
from servegym.errors import ConfigError
from servegym.export.ordering import save_ordering
from servegym.policy.learned_ordering import MlpOrdering
from servegym.policy.ordering import OrderingFeature
from servegym.policy.play_perceptron import play_perceptrons
from servegym.policy.run_ordering import make_simulator, run_ordering
from servegym.scenario import load_scenario
from servegym.serve.vllm.plugin import load_policy
from servegym.train import training_run
from servegym.train.ordering import OrderingTrainer
from servegym.train.ordering_settings import OrderingTraining
from servegym.train.search import Search

TIGHT = {
    "name": "tight",
    "engine": {"block_size": 16, "max_num_seqs": 8, "prefix_caching": False},
    "fleet": [{"gpu": "L4", "num_blocks": 120, "engine": "vllm-priority"}],
    "workload": {
        "kind": "generated",
        "rate_rps": 1.5,
        "prompt": {"medians_tokens": [200.0], "sigmas": [1.0], "max_tokens": 800},
        "output": {"medians_tokens": [150.0], "max_tokens": 600},
    },
    "num_requests": 60,
}


@pytest.fixture
def tight(tmp_path):
    path = tmp_path / "tight.yaml"
    path.write_text(yaml.safe_dump(TIGHT))
    return str(path)


def settings(scenario, **changes):
    small = OrderingTraining(
        scenario=scenario,
        load=(0.8, 1.2),
        max_minutes=0.05,
        num_hidden=2,
        num_candidates=8,
        num_episodes=2,
        num_validation=6,
    )
    return replace(small, **changes)


def test_search_begins_at_shortest_remaining_first(tight, tmp_path):
    trainer = OrderingTrainer(settings(tight), tmp_path / "run")
    scenario = load_scenario(tight)
    episodes = [scenario.episode(seed) for seed in range(3)]
    guess = trainer.space.perceptrons(trainer._first_guess()[None])
    learned = play_perceptrons(scenario.spec, episodes, guess)
    rule = ordering_policy("srpt")
    simulator = make_simulator(scenario.spec, episodes, rule)
    run_ordering(simulator, rule)
    for env in range(3):
        got, want = learned.outcomes(env)["finish_s"], simulator.outcomes(env)["finish_s"]
        np.testing.assert_array_equal(got, want)


def test_what_is_found_is_no_worse_on_validation_and_runs_in_the_plugin(tight, tmp_path):
    config = settings(tight, max_minutes=math.inf, max_generations=6)
    trainer = OrderingTrainer(config, tmp_path / "run")
    found = trainer.run()
    assert found.loss <= found.base_loss
    assert found.base_loss == pytest.approx(trainer.validate_rule("srpt").scores.mean())
    assert found.generations == 6
    path = save_ordering(found.weights, tmp_path / "mine", found.samples)
    policy = load_policy(str(path))
    assert isinstance(policy, MlpOrdering)
    assert policy.name == "mine"
    # the file plays as the search said
    simulator = make_simulator(trainer.scenario.spec, trainer._validation, policy)
    run_ordering(simulator, policy)
    env = simulator.state.env
    assert np.log(env["area"] / env["num_requests"]).mean() == pytest.approx(found.loss, rel=1e-3)
    # one service class: nothing can be learned about priorities
    assert not found.weights.weights[0][int(OrderingFeature["CLIENT_PRIORITY"])].any()


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return settings of a search, and what it finds if nobody interrupts it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    path = folder / "tight.yaml"
    path.write_text(yaml.safe_dump(TIGHT))
    # no clock: generations alone count, 4 of them for the linear score
    config = settings(str(path), max_minutes=math.inf, max_generations=10)
    return config, OrderingTrainer(config, folder / "run").run()


@pytest.mark.parametrize("killed_at", [1, 4, 8])
def test_killed_search_ends_as_an_uninterrupted_one(
    uninterrupted, tmp_path, monkeypatch, killed_at
):
    config, whole = uninterrupted
    real = Search.update
    made = []

    def update(self, *arguments):
        made.append(self.generation)
        if len(made) > killed_at:
            raise Killed
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Search, "update", update)
        with pytest.raises(Killed):
            OrderingTrainer(config, tmp_path / "parts").run()
    again = OrderingTrainer(config, tmp_path / "parts")
    again.prepare()
    assert (again.generation, again.stage) == (killed_at, int(killed_at >= 4))
    found = again.run()
    assert (found.generations, found.loss, found.base_loss) == (10, whole.loss, whole.base_loss)
    for got, want in zip(found.weights.weights, whole.weights.weights, strict=True):
        np.testing.assert_array_equal(got, want)
    # a third sitting has nothing to do, and knows what was found
    third = OrderingTrainer(config, tmp_path / "parts")
    third.prepare()
    assert third.finished
    assert third.run().loss == whole.loss
    assert list((tmp_path / "parts" / "tensorboard").iterdir())


def test_any_other_setting_is_refused_by_name(tight, tmp_path):
    config = settings(tight, max_generations=1)
    trainer = OrderingTrainer(config, tmp_path / "run")
    trainer.folder.begin()
    for other, named in (
        ({"num_candidates": 9}, "num_candidates is 8 there, 9 here"),
        ({"load": (0.8, 1.3)}, r"load is \[0.8, 1.2\] there, \[0.8, 1.3\] here"),
        ({"seed": 3, "max_minutes": 1.0}, "max_minutes is 0.05 there, 1.0 here; seed is 0 there"),
    ):
        with pytest.raises(ConfigError, match=rf"{named}.*: give another --out"):
            OrderingTrainer(replace(config, **other), tmp_path / "run")


def test_budget_counts_from_when_all_is_compiled_and_holds(tight, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training_run.time, "monotonic", lambda: now[0])
    real = OrderingTrainer._play

    def play(self, thetas, episodes):
        now[0] += 3.0 if len(thetas) > 1 else 1.0  # a generation, a validation
        return real(self, thetas, episodes)

    monkeypatch.setattr(OrderingTrainer, "_play", play)
    trainer = OrderingTrainer(settings(tight, max_minutes=0.5), tmp_path / "run")
    now[0] += 100.0
    assert trainer.prepare() == 101.0
    found = trainer.run()
    # 3 for the linear score: with a fourth and its validation it would take 14 of its 12 s
    assert found.generations == 9
    assert now[0] - 101.0 == found.spent_s == 9 * 3.0 + 3 * 1.0 == 30.0


def test_a_budget_shorter_than_a_generation_is_exceeded_by_one_alone(tight, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training_run.time, "monotonic", lambda: now[0])
    real = OrderingTrainer._play

    def play(self, thetas, episodes):
        now[0] += 46.0 if len(thetas) > 1 else 1.0
        return real(self, thetas, episodes)

    monkeypatch.setattr(OrderingTrainer, "_play", play)
    trainer = OrderingTrainer(settings(tight, max_minutes=0.3), tmp_path / "run")
    found = trainer.run()
    assert found.generations == 1
    assert found.spent_s == 47.0
    assert found.weights.weights[0].shape[1] == 4  # the linear score alone


@pytest.mark.slow
def test_command_trains_and_evaluates(tight, tmp_path, capsys):
    out = tmp_path / "learned"
    main(["train", "--scenario", tight, "--minutes", "0.05", "--out", str(out)])
    said = capsys.readouterr().out
    assert "which no budget counts" in said
    # the same again is finished; another scenario or seed is refused, and nothing is touched
    before = (out / "ordering.npz").read_bytes(), (out / "manifest.json").read_bytes()
    main(["train", "--scenario", tight, "--minutes", "0.05", "--out", str(out)])
    assert "finished with this configuration" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["train", "--scenario", tight, "--minutes", "0.05", "--seed", "1", "--out", str(out)])
    assert end.value.code == 2
    assert "seed is 0 there, 1 here" in capsys.readouterr().err
    main(["export", "--run-folder", str(out)])
    assert before == ((out / "ordering.npz").read_bytes(), (out / "manifest.json").read_bytes())
    json = tmp_path / "numbers.json"
    order = str(out / "ordering.npz")
    short = ["--loads", "1", "--seeds", "2", "--num-requests", "25", "--json", str(json)]
    rivals = ["--policies", "fcfs", "trail:tuned", "srpt-oracle", order]
    main(["evaluate", "--scenario", tight, *short, *rivals])
    shown = capsys.readouterr().out
    for name in ("fcfs", "trail:young=", "srpt-oracle", "learned"):
        assert name in shown
    assert json.is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--scenario", "kv-starved", "--imitate", "srpt"],
            "--imitate is for scenarios of dispatch, and kv-starved is one of order: leave it out",
        ),
        (
            ["--scenario", "kv-starved", "--load", "0", "1"],
            "load must be two ascending numbers above 0",
        ),
    ],
)
def test_wrong_options_are_refused(words, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", *words, "--out", str(tmp_path)])
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


def test_other_scenarios_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="mixed-chat must have a fleet of one replica"):
        OrderingTrainer(OrderingTraining(scenario="mixed-chat"), tmp_path)
