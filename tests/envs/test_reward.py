"""The reward identities, and the time between decisions."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.cluster.outcome import within_slo
from servegym.envs.dispatch import DispatchEnv, DispatchVectorEnv

#: Rewards are differences of an integral: rounding of float64.
ROUNDING = 1e-10


def random_action(observation, rng):
    return (rng.random(observation["action_mask"].shape) * observation["action_mask"]).argmax(-1)


def first_action(observation, rng):
    return observation["action_mask"].argmax(-1)


def least_outstanding(observation, rng):
    allowed = observation["action_mask"][:, : observation["replicas"].shape[1]] == 1
    return np.where(allowed, observation["replicas"][:, :, 1], np.inf).argmin(-1)


def play(env: DispatchVectorEnv, act) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return sums of rewards and of dt_s and the first arrivals, of one episode each."""
    rng = np.random.default_rng(0)
    observation, _ = env.reset(seed=0)
    first_s = env.batch.simulator.state.env["now_s"].copy()
    total, span, over = np.zeros(env.num_envs), np.zeros(env.num_envs), False
    alive = np.ones(env.num_envs, bool)
    while not over:
        observation, reward, terminated, _, info = env.step(act(observation, rng))
        total += np.where(alive, reward, 0.0)
        span += np.where(alive, info["dt_s"], 0.0)
        alive &= ~terminated
        over = not alive.any()
        # NEXT_STEP begins anew where an episode ended; what was played is looked at before that
        if not over:
            assert not terminated.any()  # without holds, all take one step per request
    return total, span, first_s


@pytest.mark.parametrize("act", [random_action, first_action, least_outstanding])
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_latency_rewards_sum_to_minus_the_time_in_the_system(make_scenario, act, scale):
    env = DispatchVectorEnv(3, make_scenario(), reward_scale=scale)
    total, span, first_s = play(env, act)
    for e in range(3):
        fate = env.batch.simulator.outcomes(e)
        in_system_s = (fate["finish_s"] - fate["arrival_s"]).sum()
        assert in_system_s > 1.0
        assert total[e] * scale == pytest.approx(-in_system_s, rel=ROUNDING)
        # the integral behind the reward is exact
        area = env.batch.simulator.state.env[e]["area"]
        assert area == pytest.approx(in_system_s, rel=1e-12)
        # decisions and drain cover the episode without gap or overlap
        assert span[e] == pytest.approx(fate["finish_s"].max() - first_s[e], rel=1e-12)
        assert first_s[e] == fate["arrival_s"][0]


def test_latency_rewards_hold_with_crashes_holds_and_rejections(make_scenario):
    scenario = make_scenario(
        disturbances={"fail_stop": {"rate_per_replica_hour": 7200.0, "recovery_s": 0.3}},
        actions={"hold": True, "reject": True},
    )
    env = DispatchEnv(scenario)
    rng = np.random.default_rng(1)
    _, info = env.reset(seed=2)
    total = span = 0.0
    begin_s, done = info["now_s"], False
    while not done:
        mask = info["action_mask"]
        _, reward, done, _, info = env.step(int((rng.random(len(mask)) * mask).argmax()))
        total += reward
        span += info["dt_s"]
    fate = env.batch.simulator.outcomes(0)
    assert fate["num_holds"].sum() > 0
    assert fate["rejected"].sum() > 0
    assert fate["num_restarts"].sum() > 0
    # a rejected request is in the system until its rejection
    assert total == pytest.approx(-(fate["finish_s"] - fate["arrival_s"]).sum(), rel=ROUNDING)
    assert span == pytest.approx(info["now_s"] - begin_s, rel=1e-12)


def test_latency_reward_of_a_lone_request_is_its_own_latency(make_scenario, make_episode):
    env = DispatchEnv(make_scenario())
    env.reset(options={"episode": make_episode([5.0, 105.0])})
    _, first, _, _, info = env.step(0)
    # the first one ends long before the second arrives: 100 s pass, but only its own time counts
    assert info["dt_s"] == 100.0
    _, second, done, _, info = env.step(0)
    assert done
    fate = env.batch.simulator.outcomes(0)
    alone_s = fate["finish_s"] - fate["arrival_s"]
    assert alone_s[0] == pytest.approx(alone_s[1], rel=1e-9)
    assert (first, second) == pytest.approx((-alone_s[0], -alone_s[1]), rel=ROUNDING)
    assert info["dt_s"] == pytest.approx(alone_s[1])


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_goodput_rewards_sum_to_the_weight_of_what_met_its_limits(make_scenario, scale):
    classes = [
        {"name": "tight", "ttft_s": 0.02, "tpot_s": 0.01, "weight": 3.0},
        {"name": "loose", "ttft_s": 0.05, "tpot_s": 0.01, "weight": 1.0},
    ]
    scenario = make_scenario(slo_classes=classes, objective="goodput")
    env = DispatchVectorEnv(3, scenario, reward_scale=scale)
    total, _, _ = play(env, first_action)
    shares = []
    for e in range(3):
        fate = env.batch.simulator.outcomes(e)
        good = within_slo(fate, scenario.spec)
        worth = np.where(fate["slo_class"] == 0, 3.0, 1.0)
        assert total[e] * scale == worth[good].sum()
        shares.append(good.mean())
    assert 0.0 < np.mean(shares) < 1.0  # some met them and some did not


def test_scenario_judged_by_the_tail_rewards_latency(make_scenario):
    plain, tail = (
        DispatchVectorEnv(2, make_scenario(objective=objective))
        for objective in ("latency", "tail")
    )
    assert tail.batch.objective == "latency"
    rewards = [play(env, first_action)[0] for env in (plain, tail)]
    np.testing.assert_array_equal(rewards[0], rewards[1])
    assert (rewards[0] < 0.0).all()


def test_goodput_reward_comes_when_a_request_ends(make_scenario, make_episode):
    limits = [{"name": "all", "ttft_s": 10.0, "tpot_s": 1.0, "weight": 2.0}]
    env = DispatchEnv(make_scenario(slo_classes=limits), objective="goodput")
    env.reset(options={"episode": make_episode([0.0, 0.0, 60.0])})
    # nothing ends between simultaneous arrivals; two by 60 s; the last one in the drain
    assert [env.step(0)[1] for _ in range(3)] == [0.0, 4.0, 2.0]
