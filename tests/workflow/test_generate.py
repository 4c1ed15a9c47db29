"""Random workflows have the shape asked for, and the rules rank on them as published."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines.workflow.cpop import cpop
from servegym.baselines.workflow.heft import heft
from servegym.baselines.workflow.registry import DAG_RULES, JOB_SHOP_RULES
from servegym.errors import ConfigError
from servegym.workflow.generate import RandomDag, random_job_shop


def levels(flow) -> np.ndarray:
    """Tasks on the longest chain that ends at each task."""
    depth = np.ones(flow.num_tasks, int)
    g = flow.graph
    for v in g.order:
        parents = g.parent[g.pred_edge[g.pred_start[v] : g.pred_start[v + 1]]]
        depth[v] = 1 + max(depth[parents], default=0)
    return depth


def test_same_seed_gives_the_same_workflow():
    one, same, other = (RandomDag(num_tasks=30).sample(seed) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one.graph, same.graph, strict=True))
    assert one.graph.duration_s.tolist() != other.graph.duration_s.tolist()


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0])
def test_mean_number_of_levels_is_root_of_tasks_over_shape(shape):
    generator = RandomDag(num_tasks=100, shape=shape)
    heights = [levels(generator.sample(seed)).max() for seed in range(200)]
    # uniform from 1 to 2 * 10 / shape: mean half a level above 10 / shape
    assert np.mean(heights) == pytest.approx(10 / shape + 0.5, rel=0.15)


@pytest.mark.parametrize("ccr", [0.1, 10.0])
def test_ccr_is_the_ratio_of_mean_transfer_to_mean_duration(ccr):
    flow = RandomDag(num_tasks=3000, ccr=ccr).sample(0)
    assert flow.mean_moving_s.mean() / flow.mean_duration_s.mean() == pytest.approx(ccr, rel=0.1)


def test_durations_stay_within_the_spread():
    flow = RandomDag(num_tasks=500, num_devices=4, heterogeneity=0.5).sample(0)
    ratio = flow.graph.duration_s.max(1) / flow.graph.duration_s.min(1)
    assert 1.4 < ratio.max() <= 1.25 / 0.75
    assert (RandomDag(heterogeneity=0.0).sample(0).graph.duration_s.std(1) < 1e-12).all()


def test_no_task_has_more_children_than_asked_and_one_parent_ensured():
    flow = RandomDag(num_tasks=200, out_degree=1).sample(3)
    depth = levels(flow)
    children = np.diff(flow.graph.succ_start)
    assert (np.diff(flow.graph.pred_start)[depth > 1] >= 1).all()
    assert (children[depth < depth.max()] >= 1).all()


@pytest.mark.parametrize("num_tasks", [1, 2, 3])
def test_tiny_workflow_can_be_drawn(num_tasks):
    for seed in range(20):
        assert RandomDag(num_tasks=num_tasks).sample(seed).num_tasks == num_tasks


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_tasks": 0}, "num_tasks must be at least 1, got 0"),
        ({"shape": 0.0}, "shape must be above 0"),
        ({"ccr": -1.0}, "ccr must be at least 0"),
        ({"heterogeneity": 2.5}, "heterogeneity must be from 0 to 2"),
    ],
)
def test_impossible_parameters_are_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        RandomDag(**changes)


@pytest.fixture(scope="module")
def ratios() -> dict[float, dict[str, float]]:
    """Mean SLR of each rule for each CCR, on 90 graphs of 60 tasks."""
    found = {}
    for ccr in (0.1, 1.0, 10.0):
        flows = [
            RandomDag(60, 4, shape=(0.5, 1.0, 2.0)[seed % 3], ccr=ccr).sample(seed)
            for seed in range(90)
        ]
        found[ccr] = {
            name: float(np.mean([rule(flow).slr for flow in flows]))
            for name, rule in DAG_RULES.items()
        }
    return found


@pytest.mark.parametrize("ccr", [0.1, 1.0, 10.0])
def test_heft_beats_cpop_and_all_beat_those_that_ignore_load_or_speed(ratios, ccr):
    slr = ratios[ccr]
    assert slr["heft"] < slr["cpop"]
    for name in ("heft", "cpop", "peft", "min-min", "sufferage", "mct"):
        assert slr[name] < min(slr["met"], slr["olb"]), name


def test_peft_is_within_a_few_percent_of_heft(ratios):
    assert ratios
    for slr in ratios.values():
        assert slr["peft"] == pytest.approx(slr["heft"], rel=0.08)


def test_gap_of_cpop_to_heft_grows_with_ccr_on_devices_of_like_speed():
    def gap(ccr: float) -> float:
        generator = RandomDag(60, 4, shape=0.5, ccr=ccr, heterogeneity=0.1)
        flows = [generator.sample(seed) for seed in range(150)]
        return float(np.mean([cpop(flow).slr - heft(flow).slr for flow in flows]))

    assert gap(10.0) > 1.5 * gap(0.1) > 0


def test_job_shop_rules_rank_as_published():
    shops = [random_job_shop(15, 15, seed) for seed in range(30)]
    makespan_s, flow_s = {}, {}
    for name, rule in JOB_SHOP_RULES.items():
        schedules = [rule(shop) for shop in shops]
        makespan_s[name] = np.mean([schedule.makespan_s for schedule in schedules])
        flow_s[name] = np.mean([schedule.mean_flow_s for schedule in schedules])
    assert max(makespan_s["mwkr"], makespan_s["mopnr"]) < min(makespan_s["spt"], makespan_s["fifo"])
    assert min(flow_s, key=flow_s.__getitem__) == "spt"
