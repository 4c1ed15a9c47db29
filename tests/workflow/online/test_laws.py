"""What must hold whatever is played: conservation, capacity, queueing theory, finer simulation."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from servegym.baselines.registry import policy
from servegym.baselines.workflow.online.registry import online_rule
from servegym.cluster.simulator import Simulator as EngineSimulator
from servegym.policy.run import run as run_engines
from servegym.scenario import load_scenario
from servegym.workflow.job import JobBuilder, StageKind
from servegym.workflow.online.run import run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import DeviceType, Episode, FleetSpec
from servegym.workflow.online.state import ENDED

from .strategies import random_case

RULES = ("fifo", "heft-rt", "hexgen", "weighted-fair", "round-robin-urgency", "heft-replan")


def peak(begin_s, end_s, amount) -> float:
    """Largest sum of amounts held at once; what ends at a moment is gone at that moment."""
    times = np.concatenate((end_s, begin_s))
    change = np.concatenate((-amount, amount))
    order = np.lexsort((np.arange(len(times)), times))
    return float(np.cumsum(change[order]).max(initial=0.0))


def check_laws(spec, episode, simulator) -> None:
    stages, jobs, env = simulator.stages(), simulator.jobs(), simulator.state.env[0]
    assert (simulator.state.stage["status"][0, : len(stages)] == ENDED).all()
    order = ("ready_s", "start_s", "begin_s", "finish_s")
    for earlier, later in itertools.pairwise(order):
        assert (stages[earlier] <= stages[later] + 1e-12).all()
    on_device = stages["kind"] != StageKind.TOOL
    np.testing.assert_array_equal(stages["device"] >= 0, on_device)
    whole = len(episode.faults) == 0  # starts before a failure are not in the outcomes
    for d, type_idx in enumerate(episode.type_idx.tolist()):
        mine = stages[stages["device"] == d]
        held = mine["start_s"], mine["finish_s"]
        assert peak(*held, np.ones(len(mine))) <= spec.types[type_idx].num_slots
        tokens = (mine["prompt_tokens"] + mine["output_tokens"]).astype(float)
        assert peak(*held, tokens) <= spec.kv_tokens(type_idx)
        if whole:
            held_s = (mine["finish_s"] - mine["start_s"]).sum()
            assert simulator.devices()["slot_s"][d] == pytest.approx(held_s, abs=1e-9)
    for run_, job_idx in enumerate(episode.order.tolist()):
        job, mine = episode.jobs[job_idx], stages[stages["job"] == run_]
        assert (mine["ready_s"][job.child] >= mine["finish_s"][job.parent]).all()
        assert (mine["ready_s"] >= episode.arrival_s[run_]).all()
        assert jobs["finish_s"][run_] == mine["finish_s"].max()
    times_s = jobs["finish_s"] - jobs["arrival_s"]
    assert float(env["area"]) == pytest.approx(times_s.sum(), rel=1e-9)
    assert float(env["weighted_area"]) == pytest.approx((times_s * jobs["weight"]).sum(), rel=1e-9)
    good = jobs["weight"][times_s <= jobs["deadline_s"]].sum()
    assert float(env["good"]) == good
    assert float(env["makespan_s"]) == jobs["finish_s"].max()
    assert int(env["num_ready"]) == int(env["num_started"]) == int(env["in_system"]) == 0
    assert (simulator.state.ready_on == 0).all()
    assert (simulator.state.device["kv_reserved"] == 0).all()
    np.testing.assert_allclose(simulator.state.job["work_left_s"], 0.0)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("oracle", [False, True])
def test_every_stage_ends_once_within_capacity_and_order(name, oracle):
    for seed in range(40):
        spec, episode = random_case(1000 + seed)
        simulator = Simulator(spec, [episode])
        run(simulator, online_rule(name + "-oracle" * oracle))
        check_laws(spec, episode, simulator)


def single_tasks(durations_s) -> tuple:
    jobs = []
    for duration_s in durations_s.tolist():
        builder = JobBuilder("task", ("P",))
        builder.task(0, {"P": duration_s})
        jobs.append(builder.build())
    return tuple(jobs)


def test_one_device_in_order_is_the_lindley_recursion_and_near_m_m_1():
    rng = np.random.default_rng(0)
    arrival_s = np.cumsum(rng.exponential(1.0 / 0.7, 40_000))
    work_s = rng.exponential(1.0, 40_000)
    spec = FleetSpec((DeviceType("P"),))
    simulator = Simulator(spec, [Episode.of(single_tasks(work_s), [0], arrival_s)])
    run(simulator, online_rule("fifo"))
    jobs = simulator.jobs()
    end_s, expected_s = 0.0, []
    for arrival, work in zip(arrival_s, work_s, strict=True):
        end_s = max(end_s, arrival) + work
        expected_s.append(end_s)
    np.testing.assert_allclose(jobs["finish_s"], expected_s, rtol=1e-9)
    assert (jobs["finish_s"] - arrival_s).mean() == pytest.approx(1.0 / (1.0 - 0.7), rel=0.1)


def test_two_devices_in_order_are_m_m_2():
    rng = np.random.default_rng(1)
    arrival_s = np.cumsum(rng.exponential(1.0 / 1.2, 40_000))
    jobs = single_tasks(rng.exponential(1.0, 40_000))
    spec = FleetSpec((DeviceType("P"),))
    simulator = Simulator(spec, [Episode.of(jobs, [0, 0], arrival_s)])
    run(simulator, online_rule("fifo"))
    times_s = simulator.jobs()["finish_s"] - arrival_s
    assert times_s.mean() == pytest.approx(1.0 / (1.0 - 0.6**2), rel=0.06)  # T = s / (1 - rho^2)


def test_shortest_first_beats_arrival_order_for_single_tasks():
    rng = np.random.default_rng(2)
    arrival_s = np.cumsum(rng.exponential(1.0 / 0.9, 5_000))
    jobs = single_tasks(rng.exponential(1.0, 5_000))
    mean_s = {}
    for name in ("fifo", "sjf-cp"):
        simulator = Simulator(FleetSpec((DeviceType("P"),)), [Episode.of(jobs, [0], arrival_s)])
        run(simulator, online_rule(name))
        mean_s[name] = (simulator.jobs()["finish_s"] - arrival_s).mean()
    assert mean_s["sjf-cp"] < 0.6 * mean_s["fifo"]


@pytest.mark.parametrize(
    ("name", "load", "mean", "p99"),
    [("homogeneous-light", 0.8, 0.005, 0.01), ("mixed-chat", 0.5, 0.03, 0.05)],
)
def test_coarse_engine_agrees_with_the_one_that_goes_step_by_step(name, load, mean, p99):
    scenario = load_scenario(name)
    fine = replace(scenario.spec, prefix_caching=False, metrics_interval_s=0.0, noise_sigma=0.0)
    drawn = scenario.episode(3, load=load, num_requests=1500)
    drawn = replace(drawn, table=drawn.table.open_loop())
    engines = EngineSimulator(fine, [drawn])
    run_engines(engines, policy("round-robin"))
    want = engines.outcomes()["finish_s"] - drawn.table.arrival_s
    jobs = []
    for prompt, output in zip(
        drawn.table.prompt_tokens.tolist(), drawn.table.output_tokens.tolist(), strict=True
    ):
        builder = JobBuilder("request")
        builder.llm(0, prompt, output)
        jobs.append(builder.build())
    spec = FleetSpec(
        tuple(DeviceType(t.name, engine=t) for t in fine.types), block_size=fine.block_size
    )
    episode = Episode.of(jobs, drawn.type_idx, drawn.table.arrival_s, speed=drawn.speed)
    simulator = Simulator(spec, [episode])
    run(simulator, online_rule("round-robin"))
    got = simulator.jobs()["finish_s"] - drawn.table.arrival_s
    np.testing.assert_array_equal(simulator.stages()["device"], engines.outcomes()["replica"])
    assert got.mean() == pytest.approx(want.mean(), rel=mean)
    assert np.percentile(got, 99) == pytest.approx(np.percentile(want, 99), rel=p99)


def test_noise_keeps_the_mean_and_is_the_same_under_every_policy():
    jobs = single_tasks(np.ones(4000))
    spec = FleetSpec((DeviceType("P"),))
    episode = replace(Episode.of(jobs, [0]), noise_sigma=0.5, noise_seed=7)
    taken = []
    for name in ("fifo", "random"):
        simulator = Simulator(spec, [episode])
        run(simulator, online_rule(name), seed=3)
        stages = simulator.stages()
        taken.append(stages["finish_s"] - stages["start_s"])
    np.testing.assert_allclose(taken[0], taken[1], rtol=1e-6)
    logs = np.log(taken[0])
    assert taken[0].mean() == pytest.approx(1.0, abs=0.03)
    assert logs.std() == pytest.approx(0.5, abs=0.02)
