"""The workflow environment: Gymnasium's contract, masks, an observation by hand, reward sums."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from servegym.baselines.workflow.online.registry import online_rule
from servegym.envs.workflow import WorkflowEnv, WorkflowVectorEnv
from servegym.envs.workflow_features import (
    DEVICE_COLUMNS,
    GLOBAL_COLUMNS,
    NODE_COLUMNS,
    PAIR_COLUMNS,
    STAGE_COLUMNS,
)
from servegym.errors import ConfigError, InvalidAction, ResetNeeded
from servegym.workflow.job import JobBuilder
from servegym.workflow.online.run import begin, run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import Episode, Links
from servegym.workflow_scenario import WorkflowScenario, workflow_scenario_names

ENV_ID = "servegym/Workflow-v0"
SMALL: dict[str, Any] = {
    "name": "small",
    "devices": [{"name": "a", "count": 2}, {"name": "b", "count": 1}],
    "workload": {"kind": "random-dag", "device_types": ["a", "b"], "num_tasks": 8, "ccr": 0.5},
    "rate_jobs_per_s": 0.3,
    "num_jobs": 6,
}
LLM: dict[str, Any] = {
    "name": "llm",
    "model": "Llama-3.1-8B",
    "engine": {"max_num_seqs": 8},
    "engines": [{"gpu": "A100-SXM-80GB"}, {"gpu": "L40S", "count": [1, 2]}],
    "workload": {"kind": "text-to-sql"},
    "rate_jobs_per_s": 0.2,
    "objective": "deadline",
    "num_jobs": 4,
}
FAULTS = {
    "noise_sigma": 0.4,
    "fail_stop": {"rate_per_replica_hour": 200.0, "recovery_s": 5.0},
    "fail_slow": {"rate_per_replica_hour": 300.0},
}


def scenario(base=SMALL, **changes: Any) -> WorkflowScenario:
    return WorkflowScenario.model_validate({**base, **changes})


def make(base=SMALL, changes=None, **settings: Any) -> WorkflowEnv:
    return WorkflowEnv(scenario(base, **(changes or {})), **{"pool_size": 12, **settings})


def play(env: WorkflowEnv, seed: int = 0) -> float:
    """Play random allowed actions; return the sum of the rewards."""
    _, info = env.reset(seed=seed)
    rng, total, over = np.random.default_rng(seed), 0.0, False
    while not over:
        allowed = np.flatnonzero(info["action_mask"])
        _, reward, over, truncated, info = env.step(int(rng.choice(allowed)))
        total += reward
        assert not truncated
        assert info["action_mask"].any()
    return total


def column(columns, name: str) -> int:
    return [c.name for c in columns].index(name)


@pytest.mark.parametrize("name", workflow_scenario_names())
@pytest.mark.parametrize(
    "settings",
    [{}, {"graph": True, "placement": "eft"}, {"objective": "makespan", "shortlist": "slack"}],
)
def test_environment_passes_the_checker_without_warnings(name, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(ENV_ID, scenario=name, num_jobs=4, pool_size=4, **settings)
        check_env(env.unwrapped)


@pytest.mark.parametrize("base", [SMALL, LLM])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_rewards_sum_to_minus_the_weighted_times_in_the_system(base, scale):
    env = make(base, {"disturbances": FAULTS}, objective="jct", reward_scale=scale)
    for seed in range(4):
        total = play(env, seed)
        jobs = env.batch.simulator.jobs()
        waited_s = ((jobs["finish_s"] - jobs["arrival_s"]) * jobs["weight"]).sum()
        assert total * scale == pytest.approx(-waited_s, rel=1e-9)


def test_rewards_sum_to_the_weight_of_jobs_in_time():
    env = make(LLM)
    jobs = []
    for seed in range(4):
        total = play(env, seed)
        done = env.batch.simulator.jobs()
        in_time = done["finish_s"] - done["arrival_s"] <= done["deadline_s"]
        assert total == pytest.approx(done["weight"][in_time].sum())
        jobs.append(in_time.mean())
    assert 0 < np.mean(jobs) < 1


def test_rewards_sum_to_the_first_bound_less_the_makespan():
    env = make(changes={"rate_jobs_per_s": None}, objective="makespan")
    for seed in range(4):
        total = play(env, seed)
        simulator = env.batch.simulator
        bound_s = simulator.state.stage["tail_s"][0, : len(simulator.stages())].max()
        assert total == pytest.approx(bound_s - simulator.jobs()["finish_s"].max())
        assert total < 0


def toy() -> Episode:
    """Two tasks in a row, the first of which feeds a tool too, and one of another job."""
    builder = JobBuilder("chain", ("a", "b"))
    first = builder.task(0, {"a": 2.0, "b": 4.0})
    second = builder.task(1, {"a": 3.0})
    hidden = builder.tool(2, 1.0, hidden=True)
    builder.edge(first, second, data_bytes=10.0)
    builder.edge(first, hidden)
    other = JobBuilder("one", ("a", "b"))
    other.task(0, {"a": 1.0, "b": 1.0})
    return Episode.of(
        [builder.build(deadline_s=20.0), other.build(weight=2.0)],
        [0, 0, 1],
        [0.0, 1.5],
        links=Links.uniform(3, latency_s=0.5, bytes_per_s=10.0),
    )


def test_observation_is_what_one_computes_by_hand():
    env = make(graph=True, max_stages=3, max_nodes=8, max_edges=4)
    observation, info = env.reset(options={"episode": toy()})
    # only the first task is ready: on both devices of type a, and on the one of type b
    np.testing.assert_array_equal(np.flatnonzero(info["action_mask"]), [0, 1, 2])
    stage = dict(zip([c.name for c in STAGE_COLUMNS], observation["stages"][0], strict=True))
    mean_s = (2 + 2 + 4) / 3
    rank_s = mean_s + 1.5 + 3.0
    assert stage["mean_s"] == pytest.approx(mean_s)
    assert stage["rank_s"] == pytest.approx(rank_s)
    assert stage["tail_s"] == 5.0
    assert stage["num_children"] == 1.0  # the tool call is not known yet
    assert stage["job_work_left_s"] == pytest.approx(mean_s + 3.0)
    assert stage["slack_s"] == pytest.approx(20.0 - rank_s)
    assert not observation["stages"][1:].any()
    assert observation["pairs"][0, :, column(PAIR_COLUMNS, "duration_s")].tolist() == [2, 2, 4]
    assert observation["global"][column(GLOBAL_COLUMNS, "jobs_in_system")] == 1.0
    assert observation["node_mask"].sum() == 2
    assert observation["nodes"][:2, column(NODE_COLUMNS, "is_blocked")].tolist() == [0, 1]
    assert observation["edges"][observation["edge_mask"] > 0].tolist() == [[0, 1]]
    assert observation["stage_nodes"].tolist() == [0, -1, -1]

    observation, reward, _, _, info = env.step(2)  # on b: until 4 s
    assert (info["now_s"], reward) == (1.5, -1.5)  # at 1.5 s the other job arrives
    np.testing.assert_array_equal(np.flatnonzero(info["action_mask"]), [0, 1, 9])
    free_in_s = observation["devices"][:, column(DEVICE_COLUMNS, "free_in_s")]
    np.testing.assert_allclose(free_in_s, [0.0, 0.0, 2.5])

    observation, reward, _, _, info = env.step(9)  # wait: the first task ends, the tool begins
    assert (info["now_s"], reward) == (4.0, -(1 + 2) * 2.5)
    assert observation["nodes"][: observation["node_mask"].sum(), 4].tolist() == [0, 1, 0]
    # by work left: the other job, 1 s, then the chain, 3 s, whose data is on a at 4 + 0.5 + 1 s
    assert observation["stages"][:, column(STAGE_COLUMNS, "mean_s")].tolist() == [1, 3, 0]
    delay_s = observation["pairs"][:2, :, column(PAIR_COLUMNS, "delay_s")]
    np.testing.assert_allclose(delay_s, [[0, 0, 0], [1.5, 1.5, 0]])
    assert observation["pairs"][1, :, column(PAIR_COLUMNS, "can_start")].tolist() == [1, 1, 0]
    assert observation["stages"][0, column(STAGE_COLUMNS, "slack_s")] == 1e9  # no deadline

    *_, info = env.step(0)
    _, _, over, _, info = env.step(1)
    assert over
    assert info["episode_metrics"]["makespan_s"] == 8.5


def test_greedy_placement_takes_the_device_that_ends_first():
    env = make(placement="eft", max_stages=2)
    env.reset(options={"episode": toy()})
    assert env.action_space.n == 3
    env.step(0)
    assert env.batch.simulator.stages()["device"][0] == 0
    env.step(0)
    env.step(0)
    assert env.batch.simulator.stages()["device"].tolist() == [0, 0, -1, 1]


@pytest.mark.parametrize("name", ["fifo", "heft-rt", "srpt-cp", "weighted-fair"])
@pytest.mark.parametrize("base", [SMALL, LLM])
def test_rule_plays_the_same_through_the_environment(name, base):
    env = make(base, {"disturbances": FAULTS}, max_stages=64)
    env.reset(seed=3)
    rule = online_rule(name)
    begin(env.batch.simulator, rule)
    over = False
    while not over:
        action = env.batch.rule_actions(rule)[0]
        _, _, over, _, _ = env.step(action)
    direct = Simulator(env.batch.scenario.spec, env.batch.simulator.episodes)
    run(direct, online_rule(name))
    np.testing.assert_array_equal(direct.stages(), env.batch.simulator.stages())


@pytest.mark.parametrize(
    ("shortlist", "key"),
    [
        ("work-left", "job_work_left_s"),
        ("arrival", "job_age_s"),
        ("rank", "rank_s"),
        ("slack", "slack_s"),
    ],
)
def test_shortlist_shows_the_first_of_its_order(shortlist, key):
    changes = {"rate_jobs_per_s": None, "workload": {**SMALL["workload"], "num_tasks": 30}}
    sign = -1 if shortlist in ("arrival", "rank") else 1
    wide, narrow = (make(changes=changes, shortlist=shortlist, max_stages=most) for most in (64, 4))
    wide.reset(seed=1)
    narrow.reset(seed=1)
    for _ in range(20):
        everything, few = (env.batch.observation()["stages"][0] for env in (wide, narrow))
        of = column(STAGE_COLUMNS, key)
        shown = everything[everything[:, 0] > 0]
        assert (np.diff(sign * shown[:, of]) >= 0).all()
        np.testing.assert_array_equal(few, everything[:4])
        allowed = np.flatnonzero(narrow.batch.mask[0][:-1])
        if not len(allowed):
            break
        action = int(allowed[-1])
        wide.step(action)
        narrow.step(action)


def test_actions_outside_the_mask_are_refused_and_sampling_stays_inside():
    env = make(graph=True)
    _, info = env.reset(seed=0)
    bad = int(np.flatnonzero(info["action_mask"] == 0)[0])
    before = env.batch.simulator.snapshot()
    with pytest.raises(InvalidAction, match="is not allowed in environment 0"):
        env.step(bad)
    for old, new in zip(before.state, env.batch.simulator.state, strict=True):
        assert old.tobytes() == new.tobytes()
    for _ in range(50):
        assert env.action_masks()[env.action_space.sample()]


def test_step_needs_a_reset():
    env = make()
    with pytest.raises(ResetNeeded):
        env.step(0)
    play(env)
    with pytest.raises(ResetNeeded, match="the episode is over"):
        env.step(0)


def test_seeds_reproduce_and_differ_and_smaller_fleets_are_padded():
    env = make(LLM)
    first, _ = env.reset(seed=1)
    other, _ = env.reset(seed=2)
    again, _ = env.reset(seed=1)
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    assert any(not np.array_equal(first[key], other[key]) for key in first)
    present = {int(env.reset(seed=s)[0]["devices"][:, 0].sum()) for s in range(12)}
    assert present == {2, 3}


def test_vector_environment_equals_single_ones_and_ends_episodes():
    settings = {"pool_size": 12, "graph": True}
    many = gymnasium.make_vec(ENV_ID, num_envs=3, scenario=scenario(), **settings)
    assert isinstance(many, WorkflowVectorEnv)
    observation, info = many.reset(seed=2)
    assert observation in many.observation_space
    singles = [WorkflowEnv(scenario(), **settings) for _ in range(3)]

    def begin_single(e):
        return singles[e].reset(options={"episode": many.batch.simulator.episodes[e]})[0]

    want = [begin_single(e) for e in range(3)]
    rng, over, ended = np.random.default_rng(0), np.zeros(3, bool), 0
    for _ in range(200):
        for e in range(3):
            for key in observation:
                np.testing.assert_array_equal(observation[key][e], want[e][key], err_msg=key)
        actions = np.array([rng.choice(np.flatnonzero(row)) for row in info["action_mask"]])
        observation, reward, done, _, info = many.step(actions)
        for e in range(3):
            if over[e]:  # NEXT_STEP: the action is ignored, a new episode begins
                want[e] = begin_single(e)
                continue
            want[e], expected, finished, _, _ = singles[e].step(int(actions[e]))
            assert (reward[e], done[e]) == (expected, finished)
        over = done
        ended += int(done.sum())
    assert ended >= 6


def test_threads_and_the_number_of_environments_change_nothing():
    def bytes_of(num_envs, **settings):
        env = WorkflowVectorEnv(num_envs, scenario(), pool_size=12, **settings)
        observation, info = env.reset(seed=5)
        parts = []
        for step in range(80):
            mask = info["action_mask"]
            last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
            action = last if step % 4 == 0 else mask.argmax(1)
            observation, reward, *_, info = env.step(action)
            parts += [reward[:2].tobytes(), *(x[:2].tobytes() for x in observation.values())]
        env.close()
        return b"".join(parts)

    assert bytes_of(2) == bytes_of(5) == bytes_of(5, num_threads=3)


def test_a_group_plays_the_same_jobs():
    env = WorkflowVectorEnv(4, scenario(), pool_size=12, group_size=2, num_jobs=(2, 9))
    _, info = env.reset(seed=0)
    assert info["input_id"].tolist() == [0, 0, 1, 1]
    arrivals = [episode.arrival_s for episode in env.batch.simulator.episodes]
    np.testing.assert_array_equal(arrivals[0], arrivals[1])
    assert not np.array_equal(arrivals[0], arrivals[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_stages": 0}, "max_stages must be at least 1"),
        ({"pool_size": 0}, "pool_size must be at least 1"),
        ({"placement": "best"}, "placement must be one of agent, eft, got 'best'"),
        ({"shortlist": "x"}, "shortlist must be one of work-left"),
        ({"objective": "latency"}, "objective must be one of jct, makespan, deadline"),
        ({"reward_scale": 0.0}, "reward_scale must be above 0"),
    ],
)
def test_wrong_setting_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)
