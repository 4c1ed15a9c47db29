"""Job shops in the simulator of jobs: schedules that hold, equal to those of static dispatching."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.agents.workflow_features import NUM_PAIR_FEATURES, PAIR_FEATURES
from servegym.agents.workflow_policy import WorkflowWeights, learned_rule
from servegym.baselines.workflow.mwkr import mwkr
from servegym.baselines.workflow.online.heft_static import HeftStatic
from servegym.baselines.workflow.spt import spt
from servegym.errors import ConfigError
from servegym.workflow.graph import make_workflow
from servegym.workflow.jobshop import job_shop
from servegym.workflow.online.run import run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.schedule import violations
from servegym.workflow.shop_jobs import schedule_shop, shop_jobs
from servegym.workflow_scenario import load_workflow_scenario


def shop(seed: int, jobs: int = 7, machines: int = 4):
    rng = np.random.default_rng(seed)
    machine = np.array([rng.permutation(machines) for _ in range(jobs)])
    # no two operations take the same time, so no rule has ties
    duration_s = rng.permutation(jobs * machines).reshape(jobs, machines) + 0.5
    return job_shop(machine, duration_s)


def policy(base: str, **theta: float):
    weights = np.zeros(NUM_PAIR_FEATURES)
    for name, value in theta.items():
        weights[PAIR_FEATURES.index(name)] = value
    return learned_rule(WorkflowWeights(base, 5.0, 10.0, weights))


@pytest.mark.parametrize("seed", range(4))
def test_the_same_rules_make_the_same_schedules_as_static_dispatching(seed):
    workflow = shop(seed)
    for rule, twin in (
        (mwkr, policy("rank")),
        (spt, policy("none", one=100.0, mean=-1.0)),
    ):
        want, got = rule(workflow), schedule_shop(workflow, twin)
        assert not violations(got)
        np.testing.assert_allclose(got.start_s, want.start_s)


def test_a_schedule_with_waiting_holds():
    got = schedule_shop(shop(0), policy("none", one=-1.0))
    assert not violations(got)
    assert got.makespan_s == pytest.approx(sum(range(28)) + 14.0)  # one after the other


def test_stages_are_the_tasks_of_each_chain_in_order():
    jobs, tasks = shop_jobs(shop(1, jobs=3, machines=4))
    assert [job.num_stages for job in jobs] == [4, 4, 4]
    assert tasks.tolist() == list(range(12))


def test_other_workflows_are_refused():
    fork = make_workflow("abc", ["x"], [[1.0]] * 3, [(0, 1), (0, 2)])
    with pytest.raises(ConfigError, match="is a job-shop rule"):
        schedule_shop(fork, policy("rank"))


def test_static_heft_keeps_its_plan_when_durations_differ():
    scenario = load_workflow_scenario("random-dags")
    calm = scenario.episode(0, num_jobs=1)
    assert calm.noise_sigma > 0
    kept = []
    for sigma in (0.0, 0.5):
        episode = type(calm)(**{**vars(calm), "noise_sigma": sigma})
        simulator = Simulator(scenario.spec, [episode])
        run(simulator, HeftStatic())
        kept.append(simulator.stages())
    assert (kept[0]["device"] == kept[1]["device"]).all()
    assert (kept[0]["finish_s"] != kept[1]["finish_s"]).any()
