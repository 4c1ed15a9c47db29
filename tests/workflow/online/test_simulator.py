"""Snapshots, reloading, batches, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.baselines.workflow.online.registry import RULES, online_rule
from servegym.cluster.spec import Faults
from servegym.errors import ConfigError, InvalidAction
from servegym.workflow.graph import WorkflowError
from servegym.workflow.job import JobBuilder
from servegym.workflow.online.policy import WorkflowPolicy
from servegym.workflow.online.run import begin, run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import DeviceType, Episode, FleetSpec, Links
from servegym.workflow.online.state import DECISION, WAIT

from .strategies import choose, random_case


def play_on(simulator: Simulator, first: int = 0) -> None:
    count = first
    while simulator.advance()[0] == DECISION:
        count += 1
        simulator.apply(np.array([choose(count, simulator.startable().tolist(), False)]))


@pytest.mark.parametrize("seed", range(8))
def test_restored_simulator_plays_the_same_again(seed):
    spec, episode = random_case(seed)
    simulator = Simulator(spec, [episode])
    for count in range(5):
        if simulator.advance()[0] == DECISION:
            simulator.apply(np.array([choose(count, simulator.startable().tolist(), False)]))
    kept = simulator.snapshot()
    play_on(simulator)
    want = simulator.stages()
    simulator.restore(kept)
    play_on(simulator)
    np.testing.assert_array_equal(simulator.stages(), want)


@pytest.mark.parametrize("name", ["heft-rt", "hexgen", "random", "heft-replan"])
def test_environments_do_not_touch_each_other(name):
    spec, episode = random_case(3)
    others = [replace(episode, noise_seed=i, noise_sigma=0.4) for i in range(4)]
    together = Simulator(spec, others)
    run(together, online_rule(name), seed=5)
    for env, other in enumerate(others):
        if name == "random":
            break  # each environment has a stream of its own
        alone = Simulator(spec, [other])
        run(alone, online_rule(name))
        np.testing.assert_array_equal(alone.stages(), together.stages(env))


@pytest.mark.parametrize("name", ["fifo", "heft-rt", "hexgen-cumulative:alpha=0.4", "random"])
def test_rule_decides_the_same_inside_the_loop_and_from_python(name):
    spec, episode = random_case(12)
    inside, outside = Simulator(spec, [episode]), Simulator(spec, [episode])
    run(inside, online_rule(name), seed=1)
    policy = online_rule(name)
    begin(outside, policy, seed=1)
    while (outside.advance() == DECISION).any():
        outside.apply(policy.act(outside, np.zeros(1, np.int64)))
    np.testing.assert_array_equal(inside.stages(), outside.stages())


def test_larger_episode_is_loaded_into_grown_arrays():
    spec, small = random_case(5)
    builder = JobBuilder("large", spec.task_types)
    for i in range(100):
        builder.tool(i, 0.1)
    large = replace(
        small, jobs=(builder.build(),), job_idx=np.zeros(60, np.int64), arrival_s=np.arange(60.0)
    )
    simulator = Simulator(spec, [small, small])
    simulator.load(1, large)
    run(simulator, online_rule("fifo"))
    fresh = Simulator(spec, [small])
    run(fresh, online_rule("fifo"))
    np.testing.assert_array_equal(simulator.stages(0), fresh.stages())
    assert len(simulator.stages(1)) == 6000


def test_every_rule_is_a_policy_and_says_what_it_knows():
    for name in RULES.names():
        made = online_rule(name)
        assert isinstance(made, WorkflowPolicy)
        assert (made.information == "oracle") == name.endswith("-oracle")
        assert made.name == name


def test_action_that_cannot_be_taken_is_refused_and_nothing_happens():
    spec, episode = random_case(7)
    simulator = Simulator(spec, [episode])
    simulator.advance()
    before = simulator.snapshot()
    bad = [a for a in range(-3, 60) if a not in simulator.startable().tolist() and a != WAIT]
    for action in bad:
        with pytest.raises(InvalidAction):
            simulator.apply(np.array([action]))
    for old, new in zip(before.state, simulator.state, strict=True):
        assert old.tobytes() == new.tobytes()


class Stubborn:
    name, information, asks_when_ready = "stubborn", "metric", False

    def reset(self, simulator, seed):
        pass

    def act(self, simulator, envs):
        return np.full(len(envs), 10_000)


def test_policy_that_starts_what_it_may_not_is_named():
    spec, episode = random_case(7)
    with pytest.raises(InvalidAction, match="cannot start on device"):
        run(Simulator(spec, [episode]), Stubborn())


def task_job(**durations_s: float):
    builder = JobBuilder("toy", tuple(durations_s))
    builder.task(0, durations_s)
    return builder.build()


def test_stage_that_no_device_can_run_is_refused(engine):
    spec = FleetSpec((DeviceType("A"), DeviceType("B"), DeviceType("E", engine=engine())))
    job = task_job(A=1.0, B=np.inf)
    Simulator(spec, [Episode.of([job], [0, 1])])
    with pytest.raises(WorkflowError, match=r"stage 0 of toy can run on none .*: B"):
        Simulator(spec, [Episode.of([job], [1, 1])])
    with pytest.raises(WorkflowError, match="durations on 1 device types, but the fleet has 2"):
        Simulator(spec, [Episode.of([task_job(A=1.0)], [0])])
    builder = JobBuilder("long", ("A", "B"))
    builder.llm(0, 1500, 200)
    with pytest.raises(WorkflowError, match=r"needs 1700 KV tokens, but the largest .* holds 1600"):
        Simulator(spec, [Episode.of([builder.build()], [0, 2])])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrival_s": np.array([2.0, 1.0])}, "in order of arrival"),
        ({"arrival_s": np.array([-1.0, 1.0])}, "in order of arrival"),
        ({"type_idx": np.array([4])}, "type_idx must be within"),
        ({"speed": np.array([0.0])}, "a speed above 0"),
        ({"job_idx": np.array([0, 5])}, "job_idx must name one of 1 jobs"),
        ({"noise_sigma": -0.1}, "noise_sigma must be at least 0"),
        ({"links": Links.uniform(3)}, "tables of 1 x 1"),
        (
            {
                "faults": Faults(
                    np.ones(1), np.full(1, 9, np.int16), np.zeros(1, np.int8), np.ones(1)
                )
            },
            "faults must name devices",
        ),
    ],
)
def test_episode_that_does_not_fit_is_refused(changes, message):
    spec = FleetSpec((DeviceType("A"),))
    good = Episode.of([task_job(A=1.0)], [0], [0.0])
    good = replace(good, arrival_s=np.array([0.0, 1.0]), job_idx=np.zeros(2, np.int64))
    Simulator(spec, [good])
    with pytest.raises(ConfigError, match=message):
        Simulator(spec, [replace(good, **changes)])
