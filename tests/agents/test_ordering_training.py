"""Learning an order: where it begins, what it keeps, and that vLLM's plug-in can run it."""

from __future__ import annotations

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
from servegym.train.ordering import OrderingTrainer, OrderingTraining

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
    guess = trainer.perceptrons(trainer._first_guess()[None])
    learned = play_perceptrons(scenario.spec, episodes, guess)
    rule = ordering_policy("srpt")
    simulator = make_simulator(scenario.spec, episodes, rule)
    run_ordering(simulator, rule)
    for env in range(3):
        got, want = learned.outcomes(env)["finish_s"], simulator.outcomes(env)["finish_s"]
        np.testing.assert_array_equal(got, want)


def test_what_is_found_is_no_worse_on_validation_and_runs_in_the_plugin(tight, tmp_path):
    trainer = OrderingTrainer(settings(tight), tmp_path / "run")
    found = trainer.run()
    assert found.loss <= found.base_loss
    assert found.base_loss == pytest.approx(trainer.base_loss("srpt"))
    assert found.generations >= 2
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


def test_command_trains_and_evaluates(tight, tmp_path, capsys):
    out = tmp_path / "learned"
    main(["train", "--scenario", tight, "--minutes", "0.05", "--out", str(out)])
    assert (out / "manifest.json").is_file()
    json = tmp_path / "numbers.json"
    order = str(out / "ordering.npz")
    short = ["--loads", "1", "--seeds", "2", "--json", str(json)]
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
            "--imitate is for scenarios of several",
        ),
        (["--scenario", "kv-starved", "--load", "0", "1"], "load must go from low to high"),
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
