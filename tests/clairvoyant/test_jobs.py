"""The search through starts of stages, against trying all of them."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from servegym.baselines.workflow.online.registry import RULES, online_rule
from servegym.clairvoyant.jobs import METRICS, best_starts
from servegym.errors import ConfigError
from servegym.evaluate.harness import CLAIRVOYANT, evaluate
from servegym.problems.job_metrics import alone_s, measure_jobs
from servegym.problems.workflow import Workflow
from servegym.workflow.job import JobBuilder
from servegym.workflow.online.run import run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import DeviceType, Episode, FleetSpec
from servegym.workflow.online.state import DECISION, WAIT


def tiny(seed: int) -> tuple[FleetSpec, list[Episode]]:
    """Make two unequal devices and four jobs of one stage that come together."""
    rng = np.random.default_rng(seed)
    jobs = []
    for _ in range(4):
        builder = JobBuilder("toy", ("a", "b"))
        builder.task(0, {"a": float(rng.uniform(1, 9)), "b": float(rng.uniform(1, 9))})
        jobs.append(builder.build(deadline_s=float(rng.uniform(2, 9))))
    spec = FleetSpec((DeviceType("a"), DeviceType("b")))
    return spec, [Episode.of(jobs, [0, 1], [0.0] * 4)]


def played(spec, episodes, name) -> Simulator:
    simulator = Simulator(spec, episodes)
    run(simulator, online_rule(name))
    return simulator


def best_of_all(spec, episodes, metric) -> float:
    """Play every list of (stage, device) pairs in every order, waiting where it must."""
    found = []
    alone = alone_s(spec, episodes)[0]
    for order, places in product(permutations(range(4)), product(range(2), repeat=4)):
        simulator = Simulator(spec, episodes)
        left = list(order)
        while simulator.advance()[0] == DECISION:
            fitting = [i for i in left if simulator.state.device[0, places[i]]["num_running"] == 0]
            action = WAIT
            if fitting:
                left.remove(fitting[0])
                action = fitting[0] * 2 + places[fitting[0]]
            simulator.apply(np.array([action]))
        found.append(measure_jobs(simulator, 0, alone)[metric])
    assert len(found) == 24 * 16
    return max(found) if metric == "deadline_attainment" else min(found)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_search_finds_the_best_of_all_schedules(seed, metric):
    spec, episodes = tiny(seed)
    # one starts whatever it can, the other waits for a faster device
    runs = [(online_rule(name), played(spec, episodes, name)) for name in ("fifo", "mct")]
    alone = alone_s(spec, episodes)[0]
    found = best_starts(spec, episodes, runs, metric, budget=3000.0)[0]
    after = measure_jobs(found, 0, alone)[metric]
    best = best_of_all(spec, episodes, metric)
    assert after == pytest.approx(best, rel=1e-12)


def test_the_row_is_never_worse_than_any_rule_it_could_begin_with():
    problem = Workflow()
    scenario = problem.find("random-dags")
    policies = [RULES.make(rule) for rule in ("fifo", "srpt-cp", "random")]
    result = evaluate(scenario, policies, num_seeds=2, num_units=15, bound_budget=100.0)
    bound = result.values(CLAIRVOYANT, 1.0, "jct_mean_s")
    for rule in policies:
        assert (bound < result.values(rule.name, 1.0, "jct_mean_s")).all()


def test_a_planner_that_is_no_compiled_rule_is_no_start():
    spec, episodes = tiny(0)
    planner = online_rule("heft-replan")
    with pytest.raises(ConfigError, match="compiled rule"):
        best_starts(spec, episodes, [(planner, Simulator(spec, episodes))], "jct_mean_s", budget=1)
