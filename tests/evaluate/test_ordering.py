"""Orders in `servegym evaluate`: by name, tuned, as oracles."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.cli import main
from servegym.errors import ConfigError
from servegym.evaluate.harness import evaluate
from servegym.evaluate.tune import candidates, tune
from servegym.export.resolve import resolve_order
from servegym.problems.order import Order
from servegym.scenario import load_scenario


@pytest.fixture(scope="module")
def small():
    return load_scenario("kv-starved").model_copy(update={"num_requests": 150})


def test_orders_are_compared_on_the_same_requests(small):
    policies = [resolve_order(text) for text in ("fcfs", "srpt", "srpt-oracle")]
    result = evaluate(small, policies, loads=[1.5], num_seeds=4)
    assert dict(result.policies) == {
        "fcfs": "blind",
        "srpt": "predictive",
        "srpt-oracle": "oracle",
    }
    assert result.learned == []
    assert result.best_heuristic(1.5) == "srpt"
    assert result.mean("srpt", 1.5, "e2e_mean_s") < 0.9 * result.mean("fcfs", 1.5, "e2e_mean_s")
    assert np.isfinite(result.decision_s["srpt"]).all()
    outcomes = [trail.outcomes["arrival_s"] for trail in result.trails.values()]
    np.testing.assert_array_equal(outcomes[0], outcomes[1])


def test_tuning_finds_what_is_best_on_training_seeds(small):
    found = tune(Order(), small, "trail", [1.5], budget=3, num_seeds=2)
    episodes = Order().episodes(small, [0, 1], load=1.5)
    losses = {
        text: episodes.losses(resolve_order(text)).mean()
        for text in candidates([(Order.rules, "trail")], 3)
    }
    assert found.text == min(losses, key=losses.__getitem__)
    assert found.loss == pytest.approx(min(losses.values()))
    with pytest.raises(ConfigError, match="unknown tunable order 'srpt'"):
        tune(Order(), small, "srpt", [1.0])


def test_a_dispatch_rule_is_no_order(capsys):
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--scenario", "kv-starved", "--policies", "round-robin"])
    assert end.value.code == 2
    assert "unknown order 'round-robin'" in capsys.readouterr().err


def test_simulate_takes_an_order(capsys):
    main(["simulate", "--scenario", "long-tailed", "--num-requests", "100", "--seeds", "1"])
    assert "fcfs on long-tailed" in capsys.readouterr().out
