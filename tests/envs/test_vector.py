"""The vector environment plays what single environments play, in every autoreset mode."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from servegym.envs.dispatch import DispatchEnv, DispatchVectorEnv
from servegym.errors import ConfigError, InvalidAction, ResetNeeded, ServeGymError


def row(observation, e):
    return {key: value[e] for key, value in observation.items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key in got:
        np.testing.assert_array_equal(got[key], want[key], err_msg=key)


def record(env: DispatchVectorEnv, num_steps: int) -> bytes:
    """Play the lowest allowed action, except every third time the highest; return all bytes."""
    observation, info = env.reset(seed=11)
    parts = []
    for step in range(num_steps):
        mask = info["action_mask"]
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(-1)
        actions = np.where((np.arange(len(mask)) + step) % 3 == 0, last, mask.argmax(-1))
        observation, reward, terminated, _, info = env.step(actions)
        for array in (*observation.values(), reward, terminated, info["dt_s"]):
            parts.append(array.tobytes())
    return b"".join(parts)


def test_make_vec_uses_the_vector_entry_point():
    env = gymnasium.make_vec("servegym/Dispatch-v1", num_envs=3, num_requests=10)
    assert isinstance(env, DispatchVectorEnv)
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space
    assert env.action_space.shape == (3,)


def test_first_environment_plays_what_a_single_one_plays_with_the_same_seed(make_scenario):
    single = DispatchEnv(make_scenario())
    many = DispatchVectorEnv(3, make_scenario())
    assert_same(row(many.reset(seed=9)[0], 0), single.reset(seed=9)[0])


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_environment_equals_single_ones_step_by_step(make_scenario, choose, mode):
    fleet = [{"gpu": "H100-SXM-80GB", "count": [1, 2]}, {"gpu": "L40S", "count": [1, 2]}]
    scenario = make_scenario(fleet=fleet, actions={"hold": True, "hold_s": 0.05}, num_requests=25)
    num_envs = 3
    env = DispatchVectorEnv(num_envs, scenario, autoreset_mode=mode)
    singles = [DispatchEnv(scenario) for _ in range(num_envs)]

    def begin(e):
        return singles[e].reset(options={"episode": env.batch.simulator.episodes[e]})[0]

    observation, _ = env.reset(seed=2)
    for e in range(num_envs):
        assert_same(row(observation, e), begin(e))
    over = np.zeros(num_envs, bool)
    num_ended = 0
    for _ in range(150):
        actions = choose(observation["action_mask"])
        observation, reward, terminated, truncated, info = env.step(actions)
        assert not truncated.any()
        assert ("final_obs" in info) == (mode is AutoresetMode.SAME_STEP and terminated.any())
        for e, single in enumerate(singles):
            if over[e]:  # NEXT_STEP: the action is ignored
                want, expected, done, dt_s = begin(e), 0.0, False, 0.0
            else:
                want, expected, done, _, single_info = single.step(actions[e])
                dt_s = single_info["dt_s"]
            assert (reward[e], terminated[e]) == (expected, done)
            final = info["final_info"] if done and mode is AutoresetMode.SAME_STEP else info
            assert final["dt_s"][e] == dt_s
            if done:
                for name, value in single_info["episode_metrics"].items():
                    assert final["episode_metrics"][name][e] == value
            if done and mode is AutoresetMode.SAME_STEP:
                assert info["_final_obs"][e]
                assert info["_final_info"][e]
                assert_same(info["final_obs"][e], want)
                want = begin(e)
            assert_same(row(observation, e), want)
            np.testing.assert_array_equal(info["action_mask"][e], want["action_mask"])
        if mode is AutoresetMode.SAME_STEP and terminated.any():
            np.testing.assert_array_equal(info["_final_obs"], terminated)
        if mode is AutoresetMode.DISABLED and terminated.any():
            with pytest.raises(ResetNeeded, match="reset_mask"):
                env.step(actions)
            observation, _ = env.reset(options={"reset_mask": terminated})
            for e in np.flatnonzero(terminated):
                assert_same(row(observation, e), begin(e))
        over = terminated if mode is AutoresetMode.NEXT_STEP else np.zeros(num_envs, bool)
        num_ended += int(terminated.sum())
    assert num_ended >= 2 * num_envs  # every environment was begun anew


@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_threads_change_no_bit(make_scenario, num_threads):
    plain = DispatchVectorEnv(5, make_scenario())
    threaded = DispatchVectorEnv(5, make_scenario(), num_threads=num_threads)
    assert record(plain, 100) == record(threaded, 100)
    threaded.close()


def test_episodes_do_not_depend_on_the_number_of_environments(make_scenario):
    few, many = DispatchVectorEnv(2, make_scenario()), DispatchVectorEnv(6, make_scenario())
    first, _ = few.reset(seed=4)
    second, _ = many.reset(seed=4)
    for e in range(2):
        assert_same(row(first, e), row(second, e))
        few_s, many_s = (env.batch.simulator.episodes[e].table.arrival_s for env in (few, many))
        np.testing.assert_array_equal(few_s, many_s)


def test_a_group_plays_the_same_requests_episode_after_episode(make_scenario):
    env = DispatchVectorEnv(
        4, make_scenario(), group_size=2, load=(0.5, 1.5), autoreset_mode="SameStep"
    )
    _, info = env.reset(seed=0)
    seen = set()
    for _ in range(3):
        np.testing.assert_array_equal(info["input_id"], [0, 0, 1, 1])
        arrivals = [e.table.arrival_s for e in env.batch.simulator.episodes]
        np.testing.assert_array_equal(arrivals[0], arrivals[1])
        np.testing.assert_array_equal(arrivals[2], arrivals[3])
        assert not np.array_equal(arrivals[0], arrivals[2])
        first, second, *_ = env.batch.simulator.episodes
        assert first is second  # drawn once
        seen.add(arrivals[0].tobytes())
        for _ in range(40):  # members of a group act differently
            *_, info = env.step(np.array([0, 1, 2, 0]))
    assert len(seen) == 3


def test_load_is_drawn_from_its_range(make_scenario):
    env = DispatchVectorEnv(64, make_scenario(), load=(0.5, 2.0), num_requests=200)
    env.reset(seed=0)
    rates = np.array([e.table.rate_rps for e in env.batch.simulator.episodes]) / 30.0
    # 200 gaps: the rate of one episode has a standard error of 7 %
    assert 0.35 < rates.min() < 0.75
    assert 1.6 < rates.max() < 2.6
    assert rates.mean() == pytest.approx(1.25, abs=0.2)


def test_statistics_wrapper_records_returns_and_lengths(make_scenario):
    env = RecordEpisodeStatistics(DispatchVectorEnv(2, make_scenario(), num_requests=12))
    env.reset(seed=0)
    total = np.zeros(2)
    for _ in range(12):
        _, reward, terminated, _, info = env.step(np.array([0, 1]))
        total += reward
    assert terminated.all()
    np.testing.assert_array_equal(info["episode"]["l"], [12, 12])
    np.testing.assert_allclose(info["episode"]["r"], total)


def test_seeds_reproduce_and_differ(make_scenario):
    env = DispatchVectorEnv(2, make_scenario())
    first, _ = env.reset(seed=1)
    other, _ = env.reset(seed=2)
    again, _ = env.reset(seed=1)
    assert_same(first, again)
    assert not np.array_equal(first["request"], other["request"])
    assert not np.array_equal(first["request"][0], first["request"][1])


def test_invalid_action_names_the_environment_and_changes_nothing(make_scenario):
    env, other = (DispatchVectorEnv(3, make_scenario()) for _ in range(2))
    env.reset(seed=0)
    other.reset(seed=0)
    with pytest.raises(InvalidAction, match=r"action 3 is not allowed in environment 1"):
        env.step(np.array([0, 3, 0]))
    assert_same(env.step(np.array([0, 1, 2]))[0], other.step(np.array([0, 1, 2]))[0])


def test_actions_of_the_wrong_number_are_refused(make_scenario):
    env = DispatchVectorEnv(4, make_scenario())
    env.reset(seed=0)
    enough = np.zeros(8, np.int64)  # so that reading on behind the end is harmless
    with pytest.raises(ServeGymError, match="4"):
        env.step(enough[:2])


def test_step_needs_a_reset(make_scenario):
    with pytest.raises(ResetNeeded, match="call reset before step"):
        DispatchVectorEnv(2, make_scenario()).step(np.zeros(2, np.int64))


@pytest.mark.parametrize("settings", [{"num_envs": 0}, {"group_size": 0}, {"num_threads": 0}])
def test_number_below_one_is_refused(make_scenario, settings):
    with pytest.raises(ConfigError, match="must be at least 1"):
        DispatchVectorEnv(**{"num_envs": 2, "scenario": make_scenario(), **settings})


def test_returned_arrays_are_never_written_again(make_scenario):
    env = DispatchVectorEnv(2, make_scenario())
    env.reset(seed=0)
    observation, reward, *_ = env.step(np.array([0, 1]))
    kept = {k: v.copy() for k, v in observation.items()} | {"reward": reward.copy()}
    env.step(np.array([2, 2]))
    assert_same({**observation, "reward": reward}, kept)
