"""Branches of an episode: they change nothing, and tell what then really happens."""

from __future__ import annotations

import math

import numpy as np
import pytest

from servegym.agents.workflow_features import NUM_PAIR_FEATURES, PAIR_FEATURES
from servegym.agents.workflow_policy import WorkflowWeights, learned_rule
from servegym.train.workflow_branch import Branching, look_ahead
from servegym.workflow.job import JobBuilder
from servegym.workflow.online.run import begin, run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import DeviceType, Episode, FleetSpec
from servegym.workflow.online.state import DECISION, WAIT
from servegym.workflow_scenario import load_workflow_scenario


def prefers_the_first():
    weights = np.zeros(NUM_PAIR_FEATURES)
    weights[0] = 1.0
    weights[PAIR_FEATURES.index("mean")] = 0.1  # of two stages the longer one
    return learned_rule(WorkflowWeights("none", 5.0, 1.0, weights))


def two_jobs() -> tuple[FleetSpec, Episode]:
    """A long and a short job, and one device."""
    spec = FleetSpec((DeviceType("any"),))
    jobs = []
    for length_s in (5.0, 1.0):
        builder = JobBuilder("one", spec.task_types)
        builder.task(0, {"any": length_s})
        jobs.append(builder.build())
    return spec, Episode.of(jobs, [0])


def test_costs_of_both_orders_by_hand():
    spec, episode = two_jobs()
    simulator, rule = Simulator(spec, [episode, episode]), prefers_the_first()
    begin(simulator, rule)
    simulator.advance()
    rule.act(simulator, np.zeros(1, np.int64))
    costs = Branching(simulator, rule, "jct").costs(np.array([0, 1]), math.inf)
    assert costs.tolist() == [5.0 + 6.0, 1.0 + 6.0]
    spans = Branching(simulator, rule, "makespan").costs(np.array([0]), math.inf)
    assert spans.tolist() == [6.0]
    # two jobs in the system for two seconds, or one of them gone after the first
    near = Branching(simulator, rule, "jct").costs(np.array([0, 1]), 2.0)
    assert near.tolist() == [4.0, 3.0]


@pytest.mark.parametrize("name", ["text-to-sql", "random-dags"])
def test_a_branch_with_the_rules_own_choice_ends_as_the_episode_does(name):
    scenario = load_workflow_scenario(name)
    episode = scenario.episode(3, num_jobs=5)
    whole = Simulator(scenario.spec, [episode])
    run(whole, prefers_the_first())
    simulator, rule = Simulator(scenario.spec, [episode, episode]), prefers_the_first()
    begin(simulator, rule)
    branching, first = Branching(simulator, rule, "jct"), np.zeros(1, np.int64)
    for _ in range(12):
        assert simulator.advance()[0] == DECISION
        action = rule.act(simulator, first)
        simulator.state.env["deciding"][1] = 0
        before = simulator.snapshot().state
        (cost,) = branching.costs(action, math.inf)
        for old, new in zip(before, simulator.state, strict=True):
            assert old[0].tobytes() == new[0].tobytes()
        total = cost + branching.counted(0)
        assert total == pytest.approx(float(whole.state.env[0]["area"]))
        simulator.state.env["deciding"][1] = 0
        simulator.apply(np.array([action[0], WAIT]))


def test_looking_ahead_finds_the_better_order():
    spec, episode = two_jobs()
    plain = Simulator(spec, [episode])
    run(plain, prefers_the_first())
    assert plain.state.env[0]["area"] == 11.0
    assert look_ahead(spec, episode, prefers_the_first(), "jct", math.inf) == 7.0
