"""A fleet in which some replicas only prefill: dispatch and placement decided together."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines.ordering.registry import RULES as ORDERS
from servegym.baselines.placement import PLACEMENTS, placement
from servegym.baselines.registry import RULES, policy
from servegym.cluster.simulator import Simulator
from servegym.errors import ConfigError
from servegym.evaluate.harness import evaluate
from servegym.evaluate.tune import candidates
from servegym.export.resolve import resolve_dispatch
from servegym.policy.placed import Placed
from servegym.policy.run import run
from servegym.policy.run_placed import make_simulator, run_placed
from servegym.problems.dispatch import Dispatch
from servegym.scenario import Scenario

LINK = {"gb_per_s": 10.0}
SPLIT = {
    "name": "split",
    "engine": {"block_size": 16, "max_num_seqs": 16},
    "fleet": [
        {"gpu": "L4", "count": 2, "num_blocks": 300, "role": "prefill", "link": LINK},
        {"gpu": "L4", "count": 3, "num_blocks": 300, "role": "decode", "link": LINK},
        {"gpu": "L4", "count": 1, "num_blocks": 300, "link": LINK},
    ],
    "workload": {
        "kind": "generated",
        "rate_rps": 4.0,
        "prompt": {"medians_tokens": [200.0], "max_tokens": 800},
        "output": {"medians_tokens": [50.0], "max_tokens": 200},
    },
    "num_requests": 80,
}


def split(**changes) -> Scenario:
    return Scenario.model_validate({**SPLIT, **changes})


class Delegate:
    """A dispatch policy that is no `Heuristic`, so that it runs batch by batch."""

    def __init__(self, rule):
        self.name, self.information, self.needs = rule.name, rule.information, rule.needs
        self.reset, self.act = rule.reset, rule.act


def played(text: str, scenario: Scenario | None = None, *, batch: bool = False) -> Simulator:
    scenario = scenario or split()
    rule = resolve_dispatch(text)
    assert isinstance(rule, Placed)
    if batch:
        rule = Placed(Delegate(rule.dispatch), rule.place, rule.name)
    simulator = make_simulator(scenario.spec, [scenario.episode(s) for s in (0, 1)])
    run_placed(simulator, rule, seed=3)
    return simulator


@pytest.mark.parametrize("place", list(PLACEMENTS))
def test_rules_dispatch_to_those_that_prefill_and_place_on_those_that_decode(place):
    simulator = played(f"added-delay+{place}")
    outcomes = simulator.outcomes(0)
    moved = outcomes["prefill_replica"] >= 0
    assert moved.sum() > 20
    assert set(outcomes["prefill_replica"][moved]) <= {0, 1}
    assert set(outcomes["replica"][moved]) <= {2, 3, 4, 5}
    assert len(set(outcomes["replica"][moved])) > 1
    assert (outcomes["landed_s"][moved] > outcomes["prefilled_s"][moved]).all()
    assert set(outcomes["replica"][~moved]) <= {5}


@pytest.mark.parametrize("text", ["llm-d+power-of-two", "round-robin+least-outstanding"])
def test_compiled_and_batched_loops_decide_alike(text):
    a, b = played(text), played(text, batch=True)
    for env in range(2):
        for column in ("replica", "prefill_replica", "finish_s"):
            np.testing.assert_array_equal(a.outcomes(env)[column], b.outcomes(env)[column])


def test_without_a_placement_rule_the_least_busy_replica_is_taken():
    scenario = split()
    simulator = Simulator(scenario.spec, [scenario.episode(0)])
    run(simulator, policy("round-robin"))
    assert len(set(simulator.outcomes()["replica"])) > 2


def test_names_of_placements_are_no_names_of_orders():
    assert set(PLACEMENTS.names()).isdisjoint(ORDERS.names())


def test_a_placed_policy_knows_what_the_better_informed_of_both_knows():
    assert resolve_dispatch("random+least-outstanding").information == "blind"
    assert resolve_dispatch("random+min-kv").information == "metric"
    assert resolve_dispatch("mct+min-kv").information == "predictive"
    assert resolve_dispatch("mct-oracle+min-kv").information == "oracle"


def test_both_parts_are_tuned():
    texts = candidates(Dispatch().parts("added-delay+least-tpot"), 4)
    assert len(texts) == 4
    assert all(text.endswith("+least-tpot") for text in texts)
    assert not Dispatch().is_learned(resolve_dispatch("conductor+least-tpot"))


def test_pairs_are_compared_as_any_policy():
    names = ["random+least-outstanding", "added-delay+min-kv"]
    done = evaluate(split(), [resolve_dispatch(name) for name in names], num_seeds=2)
    for name in names:
        assert done.mean(name, 1.0, "transferred_share") > 0.3
        assert done.mean(name, 1.0, "moved_gb") > 0.1
        assert done.mean(name, 1.0, "transfer_mean_s") > 0.0
        assert done.mean(name, 1.0, "unfetched_mean_s") >= 0.0


def test_where_nothing_is_prefilled_elsewhere_a_placement_is_refused():
    fleet = [{"gpu": "L4", "num_blocks": 300}]
    with pytest.raises(ConfigError, match="all replicas here have the role mixed"):
        played("added-delay+min-kv", split(fleet=fleet))


def test_planners_that_know_no_transfers_are_refused():
    planner = next(name for name in RULES if "what-if" in name)
    with pytest.raises(ConfigError, match="as if it did all of a request"):
        played(f"{planner}+min-kv")
    scenario = split()
    with pytest.raises(ConfigError, match="as if it did all of a request"):
        run(Simulator(scenario.spec, [scenario.episode(0)]), policy(planner))


def test_an_unknown_placement_names_the_nearest_order_or_rule():
    with pytest.raises(ConfigError, match="least-tpott"):
        resolve_dispatch("added-delay+least-tpott")
    with pytest.raises(ConfigError, match="placement"):
        placement("least-tpott")
