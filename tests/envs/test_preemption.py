"""`servegym/Preemption-v0`: choices, masks, rewards, seeds, and the vector form of it."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from servegym.baselines.ordering.registry import ordering_policy
from servegym.envs.preemption import PreemptionEnv, PreemptionVectorEnv
from servegym.errors import ConfigError, InvalidAction, ResetNeeded
from servegym.policy.ordering import OrderingFeature
from servegym.policy.run_ordering import make_simulator, run_ordering
from servegym.scenario import Scenario, load_scenario, scenario_names

ENV_ID = "servegym/Preemption-v0"
RUNNING = int(OrderingFeature["IS_RUNNING"])
PROMPT = int(OrderingFeature["PROMPT_TOKENS"])
REMAINING = int(OrderingFeature["PREDICTED_REMAINING_TOKENS"])
SMALL = {
    "name": "tight",
    "engine": {"block_size": 16, "max_num_seqs": 8, "prefix_caching": False},
    "fleet": [{"gpu": "L4", "num_blocks": 120, "engine": "vllm-priority"}],
    "workload": {
        "kind": "generated",
        "rate_rps": 1.0,
        "prompt": {"medians_tokens": [200.0], "max_tokens": 800},
        "output": {"medians_tokens": [150.0], "max_tokens": 600},
    },
    "num_requests": 40,
}


def scenario(**changes) -> Scenario:
    return Scenario.model_validate({**SMALL, **changes})


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def shortest(observation) -> int:
    """SRPT as a pick: admit the fewest tokens left, preempt the most."""
    left = observation["requests"][:, REMAINING].astype(float)
    allowed = observation["action_mask"][: len(left)] == 1
    left = left if observation["kind"] == 0 else -left
    return int(np.where(allowed, left, np.inf).argmin())


@pytest.mark.parametrize(
    "name", [name for name in scenario_names() if load_scenario(name).orders_requests]
)
@pytest.mark.parametrize("settings", [{}, {"allow_none": True, "queue_order": "arrival"}])
def test_environment_passes_the_checker_without_warnings(name, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(ENV_ID, scenario=name, num_requests=200, load=2.0, **settings)
        check_env(env.unwrapped)


def test_both_kinds_of_choices_show_who_may_be_picked():
    env = PreemptionEnv(scenario())
    kinds = set()
    for seed in range(3):
        observation, info = env.reset(seed=seed)
        done = False
        while not done:
            assert observation in env.observation_space
            mask, rows = info["action_mask"], observation["requests"]
            np.testing.assert_array_equal(mask, observation["action_mask"])
            np.testing.assert_array_equal(env.action_masks(), mask == 1)
            there = rows[:, PROMPT] > 0
            # of the waiting rows all, or of the running ones all
            wanted = there & (rows[:, RUNNING] == observation["kind"])
            np.testing.assert_array_equal(mask == 1, wanted)
            assert wanted.sum() >= 2
            np.testing.assert_array_equal(rows[there][0, -5:], observation["engine"])
            waiting = rows[: env.batch.max_waiting][there[: env.batch.max_waiting]]
            assert (np.diff(waiting[:, REMAINING]) >= 0).all()
            kinds.add(int(observation["kind"]))
            observation, _, done, truncated, info = env.step(env.action_space.sample())
            assert not truncated
    assert kinds == {0, 1}


def test_picking_the_shortest_is_to_follow_srpt():
    # a queue longer than the rows shows its shortest, which is all that srpt looks at
    env = PreemptionEnv(scenario(), max_waiting=2, load=3.0)
    rule = ordering_policy("srpt")
    for seed in range(3):
        observation, _ = env.reset(seed=seed)
        done = False
        while not done:
            observation, _, done, _, info = env.step(shortest(observation))
        episode = env.batch.simulator.episodes[0]
        simulator = make_simulator(env.batch.scenario.spec, [episode], rule)
        run_ordering(simulator, rule)
        want, got = simulator.outcomes(), env.batch.simulator.outcomes()
        np.testing.assert_array_equal(got["num_preemptions"], want["num_preemptions"])
        np.testing.assert_array_equal(got["finish_s"], want["finish_s"])
        assert info["episode_metrics"]["num_preemptions"] == want["num_preemptions"].sum()
        assert want["num_preemptions"].sum() > 0


@pytest.mark.parametrize("scale", [1.0, 25.0])
def test_latency_rewards_sum_to_minus_the_time_in_the_system(scale):
    env = PreemptionEnv(scenario(), reward_scale=scale)
    for seed in range(3):
        env.reset(seed=seed)
        total, span, done = 0.0, env.batch.simulator.state.env[0]["now_s"], False
        while not done:
            _, reward, done, _, info = env.step(env.action_space.sample())
            total, span = total + reward, span + info["dt_s"]
        fate = env.batch.simulator.outcomes()
        want = (fate["finish_s"] - fate["arrival_s"]).sum()
        assert total * scale == pytest.approx(-want, rel=1e-9)
        assert span == pytest.approx(fate["finish_s"].max())
        assert info["episode_metrics"]["mean_e2e_s"] == pytest.approx(want / len(fate))


def test_goodput_rewards_count_requests_in_time():
    limits = [{"name": "a", "ttft_s": 5.0, "tpot_s": 0.2, "weight": 2.0}]
    env = PreemptionEnv(scenario(slo_classes=limits, objective="goodput"))
    env.reset(seed=0)
    total, done = 0.0, False
    while not done:
        _, reward, done, _, _ = env.step(env.action_space.sample())
        total += reward
    fate = env.batch.simulator.outcomes()
    tpot = (fate["finish_s"] - fate["first_token_s"]) / np.maximum(fate["output_tokens"] - 1, 1)
    good = (fate["first_token_s"] - fate["arrival_s"] <= 5.0) & (tpot <= 0.2)
    assert total == 2.0 * good.sum()
    assert 0 < good.sum() < len(fate)


def test_nobody_may_be_admitted_only_while_others_run():
    env = PreemptionEnv(scenario(), allow_none=True)
    nobody = env.action_space.n - 1
    _, info = env.reset(seed=1)
    done, waits = False, 0
    while not done:
        observation = env.batch.observation()
        may = info["action_mask"][nobody] == 1
        assert may == (observation["kind"][0] == 0 and observation["engine"][0, 0] > 0)
        waits += may
        _, _, done, _, info = env.step(nobody if may else env.action_space.sample())
    assert waits > 50
    # one at a time: nobody was ever admitted beside another
    fate = np.sort(env.batch.simulator.outcomes(), order="scheduled_s")
    assert (fate["scheduled_s"][1:] >= fate["finish_s"][:-1] - 1e-9).all()


def test_equal_seeds_give_equal_bytes_and_others_do_not():
    def play(seed: int) -> bytes:
        env = PreemptionEnv(scenario())
        observation, _ = env.reset(seed=seed)
        parts, done = [], False
        while not done:
            parts += [np.asarray(v).tobytes() for v in observation.values()]
            observation, reward, done, _, info = env.step(int(env.action_masks().argmax()))
            parts.append(np.array([reward, info["dt_s"]]).tobytes())
        return b"".join(parts)

    assert play(3) == play(3)
    assert play(3) != play(4)


def test_wrong_actions_are_refused_with_the_allowed_ones_and_change_nothing():
    env, other = PreemptionEnv(scenario()), PreemptionEnv(scenario())
    observation, _ = env.reset(seed=0)
    other.reset(seed=0)
    allowed = np.flatnonzero(observation["action_mask"]).tolist()
    for action in (-1, env.action_space.n, env.action_space.n - 1):
        with pytest.raises(InvalidAction, match=rf"action {action} .* choose one of \[0, 1"):
            env.step(action)
    got, want = env.step(allowed[-1]), other.step(allowed[-1])
    assert same(got[0], want[0])
    assert got[1:3] == want[1:3]


def test_episodes_without_choices_are_passed_over_or_refused():
    env = PreemptionEnv(scenario(num_requests=1))
    with pytest.raises(ConfigError, match="none of 100 episodes of tight has a choice"):
        env.reset(seed=0)
    alone = scenario(num_requests=1).episode(0)
    with pytest.raises(ConfigError, match="the episode has no choice"):
        PreemptionEnv(scenario()).reset(options={"episode": alone})
    with pytest.raises(ResetNeeded):
        PreemptionEnv(scenario()).step(0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"scenario": "mixed-chat"}, "mixed-chat must have a fleet of one replica"),
        ({"max_waiting": 1}, "max_waiting must be at least 2, got 1"),
        ({"queue_order": "lifo"}, "queue_order must be one of shortest, arrival, got 'lifo'"),
        ({"objective": "speed"}, "objective must be one of latency, goodput"),
    ],
)
def test_wrong_setting_is_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        PreemptionEnv(**{"scenario": scenario(), **settings})


def test_make_vec_uses_the_vector_entry_point():
    env = gymnasium.make_vec(ENV_ID, num_envs=3, scenario=scenario())
    assert isinstance(env.unwrapped, PreemptionVectorEnv)
    observation, info = env.reset(seed=0)
    assert observation in env.observation_space
    assert info["input_id"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("num_threads", [1, 2])
def test_vector_environment_equals_single_ones_step_by_step(mode, num_threads):
    num_envs = 3
    env = PreemptionVectorEnv(
        num_envs, scenario(num_requests=20), autoreset_mode=mode, load=2.0, num_threads=num_threads
    )
    singles = [PreemptionEnv(scenario(num_requests=20)) for _ in range(num_envs)]

    def begin(e):
        return singles[e].reset(options={"episode": env.batch.simulator.episodes[e]})[0]

    def assert_row(observation, e, want):
        for key, value in want.items():
            np.testing.assert_array_equal(observation[key][e], value, err_msg=key)

    rng = np.random.default_rng(0)
    observation, _ = env.reset(seed=2)
    for e in range(num_envs):
        assert_row(observation, e, begin(e))
    over = np.zeros(num_envs, bool)
    num_ended = 0
    for _ in range(200):
        actions = (
            rng.random(observation["action_mask"].shape) * observation["action_mask"]
        ).argmax(-1)
        observation, reward, terminated, _, info = env.step(actions)
        for e, single in enumerate(singles):
            if over[e]:
                want, expected, done = begin(e), 0.0, False
            else:
                want, expected, done, _, single_info = single.step(actions[e])
            assert (reward[e], terminated[e]) == (expected, done)
            if done:
                num_ended += 1
                final = info.get("final_info", info)["episode_metrics"]
                for name, value in single_info["episode_metrics"].items():
                    assert final[name][e] == value
                if mode is AutoresetMode.SAME_STEP:
                    for key, value in want.items():
                        np.testing.assert_array_equal(info["final_obs"][e][key], value)
                    want = begin(e)
            assert_row(observation, e, want)
        over = terminated.copy() if mode is AutoresetMode.NEXT_STEP else np.zeros(num_envs, bool)
        if mode is AutoresetMode.DISABLED and terminated.any():
            observation, _ = env.reset(options={"reset_mask": terminated})
            for e in np.flatnonzero(terminated):
                assert_row(observation, e, begin(e))
    assert num_ended >= 3
    env.close()
