"""T11: who meets deadlines on HexGen-Text2SQL's four engines, as its authors found it."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines.workflow.online.registry import online_rule
from servegym.evaluate.harness import Evaluation, evaluate
from servegym.workflow_scenario import load_workflow_scenario

ALPHAS = (0.0, 0.2, 0.4, 0.7)


def play(names: list[str], load: float, num_seeds: int) -> Evaluation:
    scenario = load_workflow_scenario("text-to-sql-deadlines")
    policies = [online_rule(name) for name in names]
    return evaluate(scenario, policies, loads=[load], num_seeds=num_seeds)


@pytest.mark.parametrize(
    ("in_order", "by_urgency", "load"),
    [
        ("round-robin", "round-robin-urgency", 0.6),
        ("hexgen-fcfs:alpha=0.3", "hexgen:alpha=0.3", 1.0),
        ("hexgen-cumulative-fcfs:alpha=0.4", "hexgen-cumulative:alpha=0.4", 1.0),
    ],
)
def test_urgency_is_in_time_more_often_than_order_of_arrival(in_order, by_urgency, load):
    result = play([in_order, by_urgency], load, num_seeds=12)
    points = 100 * np.array(result.against(by_urgency, in_order, load)[:3])
    assert points[1] > 1.0  # the low end of 95 %, paired


def test_speed_and_work_together_dispatch_better_than_work_alone_or_mostly_speed():
    names = [f"hexgen:alpha={alpha}" for alpha in ALPHAS]
    result = play(names, 1.2, num_seeds=6)
    shares = [result.mean(name, 1.2, "deadline_attainment") for name in names]
    assert 0 < int(np.argmax(shares)) < len(ALPHAS) - 1
