"""The search through priorities inside an engine, against trying all orders."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from servegym.baselines.ordering.registry import RULES
from servegym.clairvoyant.goal import METRICS, judged, make_goal
from servegym.clairvoyant.order import best_keys, play_keys, search_keys
from servegym.cluster.spec import ClusterSpec, Episode, ReplicaType, SloClass
from servegym.evaluate.harness import CLAIRVOYANT, evaluate
from servegym.problems.order import Order
from servegym.workloads.table import RequestTable

from ..toys import token_grid  # noqa: TID252 - tests are no package


def tiny(seed: int, num_requests: int = 4) -> tuple[ClusterSpec, Episode]:
    """Make an engine that runs one request at a time, and a crowd before it."""
    rng = np.random.default_rng(seed)
    table = RequestTable.build(
        np.sort(rng.uniform(0.0, 0.05, num_requests)),
        rng.integers(5, 60, num_requests),
        rng.integers(1, 12, num_requests),
    )
    engine = ReplicaType("toy", token_grid(0.01, 0.001), 40, max_num_seqs=1, engine="vllm-priority")
    spec = ClusterSpec((engine,), (SloClass("toy", ttft_s=0.12, tpot_s=0.02),))
    return spec, Episode(table, np.zeros(1, np.int16), np.ones(1))


def loss_of(spec, episode, metric, key) -> float:
    simulator = play_keys(spec, [episode], [key])
    return judged(make_goal(metric, spec, episode), simulator.state.request[0])[0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(4))
def test_search_finds_the_best_of_all_orders(seed, metric):
    spec, episode = tiny(seed)
    key = search_keys(spec, episode, metric, budget=200.0, seed=seed)
    every = [
        loss_of(spec, episode, metric, np.array(order, float)) for order in permutations(range(4))
    ]
    assert len(every) == 24
    assert loss_of(spec, episode, metric, key) == min(every)


def test_more_simulation_is_never_worse():
    spec, episode = tiny(7, num_requests=40)
    losses = [
        loss_of(
            spec,
            episode,
            "e2e_mean_s",
            best_keys(spec, [episode], "e2e_mean_s", budget=budget)[0],
        )
        for budget in (0.0, 20.0, 200.0)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < losses[0]


@pytest.mark.parametrize("name", ["kv-starved", "slo-tiers"])
def test_the_row_is_never_worse_than_any_rule_it_could_begin_with(name):
    problem = Order()
    scenario = problem.find(name)
    policies = [RULES.make(rule) for rule in ("fcfs", "footprint", "srpt-oracle")]
    result = evaluate(scenario, policies, num_seeds=2, num_units=150, bound_budget=60.0)
    sign, metric = result.objective.sign, result.objective.metric
    bound = sign * result.values(CLAIRVOYANT, 1.0, metric)
    for rule in policies:
        assert (bound <= sign * result.values(rule.name, 1.0, metric)).all()
    assert (bound < sign * result.values("fcfs", 1.0, metric)).all()
