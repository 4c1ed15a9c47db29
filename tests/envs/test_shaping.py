"""Shaped rewards: the sums they keep, the optima they keep, and what they are for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from servegym.cluster.spec import Episode
from servegym.envs.dispatch import DispatchEnv, DispatchVectorEnv
from servegym.envs.shaping import CostToGo
from servegym.errors import ConfigError
from servegym.workloads.table import RequestTable

#: What sums of hundreds of float64 rewards may be off by.
ROUNDING = 1e-9
OBJECTIVES = {
    "DispatchEnv": ("latency", "goodput"),
    "PreemptionEnv": ("latency", "goodput"),
    "ClusterEnv": ("latency", "goodput"),
    "WorkflowEnv": ("jct", "makespan", "deadline"),
}


def play(env, *, seed: int = 0) -> tuple[np.ndarray, float, float]:
    """Return the rewards of an episode of random actions, and the potential at its ends."""
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)

    def potential() -> float:
        shaping = env.batch._shaping
        return float(shaping.value[0]) if shaping else 0.0

    first, rewards, over = potential(), [], False
    while not over:
        mask = env.action_masks()
        _, reward, done, truncated, _ = env.step((rng.random(len(mask)) * mask).argmax())
        rewards.append(reward)
        over = done or truncated
    return np.array(rewards), first, potential()


@pytest.mark.parametrize("episode_end", ["drained", "last-arrival"])
@pytest.mark.parametrize("scale", [1.0, "auto"])
def test_return_changes_by_the_potential_at_the_ends_alone(problem, episode_end, scale):
    assert OBJECTIVES[problem.single.__name__]
    for objective in OBJECTIVES[problem.single.__name__]:
        settings = {**problem.settings, "objective": objective, "episode_end": episode_end}
        plain, _, _ = play(problem.single(**settings))
        env = problem.single(**settings, shaping="cost-to-go", reward_scale=scale)
        shaped, first, last = play(env)
        assert len(shaped) == len(plain)
        change = shaped.sum() * env.batch.reward_scale - plain.sum()
        assert change == pytest.approx(last - first, rel=1e-6, abs=ROUNDING)
        if episode_end == "drained":
            assert last == 0.0  # nothing is left to come
        else:
            assert last != 0.0
        assert not np.allclose(shaped * env.batch.reward_scale, plain)


def test_return_is_kept_with_crashes_holds_and_rejections(make_scenario):
    scenario = make_scenario(
        disturbances={"fail_stop": {"rate_per_replica_hour": 7200.0, "recovery_s": 0.3}},
        actions={"hold": True, "reject": True},
    )
    plain, _, _ = play(DispatchEnv(scenario))
    shaped, first, last = play(DispatchEnv(scenario, shaping="cost-to-go"))
    assert (first, last) == (0.0, 0.0)
    assert shaped.sum() == pytest.approx(plain.sum(), rel=ROUNDING)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_vector_form_shapes_as_single_environments_do(problem, num_threads):
    settings = {**problem.settings, "shaping": "cost-to-go", "warmup": 2}
    env = problem.vector(3, **settings, autoreset_mode="SameStep", num_threads=num_threads)
    singles = [problem.single(**settings) for _ in range(3)]
    env.reset(seed=[4, 5, 6])
    for e, single in enumerate(singles):
        single.reset(seed=4 + e)
    rng = np.random.default_rng(0)
    for _ in range(60):
        mask = env.action_masks()
        actions = (rng.random(mask.shape) * mask).argmax(-1)
        _, rewards, terminated, truncated, _ = env.step(actions)
        for e, single in enumerate(singles):
            _, reward, done, cut, _ = single.step(actions[e])
            assert (rewards[e], terminated[e], truncated[e]) == (reward, done, cut)
            if done or cut:
                single.reset()
    env.close()


def tree(make_scenario, episode: Episode, shaping: str) -> dict[tuple[int, ...], np.ndarray]:
    """Return the rewards of every sequence of actions on two replicas."""
    env = DispatchEnv(
        make_scenario(fleet=[{"gpu": "A100-SXM-80GB"}, {"gpu": "L40S"}]), shaping=shaping
    )
    found = {}
    for actions in itertools.product((0, 1), repeat=len(episode.table.arrival_s)):
        env.reset(options={"episode": episode})
        found[actions] = np.array([env.step(a)[1] for a in actions])
    return found


def best(rewards: dict[tuple[int, ...], np.ndarray], gamma: float) -> tuple[int, ...]:
    def discounted(actions: tuple[int, ...]) -> float:
        r = rewards[actions]
        return float((r * gamma ** np.arange(len(r))).sum())

    return max(rewards, key=discounted)


def test_every_policy_keeps_its_rank_and_a_short_sight_does_not_mislead(make_scenario):
    """All 256 ways to dispatch eight requests, 0.3 s apart, to a faster and a slower replica.

    Histories are the states of this decision process, so the sequences are all its policies.
    """
    n = 8
    prompts, outputs = np.array([4000, 200] * 4), np.array([600, 600] + [10] * 6)
    table = RequestTable.build(np.arange(n) * 0.3, prompts, outputs)
    episode = Episode(table, np.array([0, 1], np.int16), np.ones(2))
    plain = tree(make_scenario, episode, "none")
    shaped = tree(make_scenario, episode, "cost-to-go")
    # the sums are equal, so the optimum and every order of policies is
    for actions, rewards in plain.items():
        assert shaped[actions].sum() == pytest.approx(rewards.sum(), rel=ROUNDING)
    optimum = best(plain, 1.0)
    assert best(shaped, 1.0) == optimum
    assert set(optimum) == {0, 1}
    # discounted by 0.2 a step the plain rewards do not see what follows; the shaped ones hold it
    loss = {
        name: plain[best(rewards, 0.2)].sum() / plain[optimum].sum()
        for name, rewards in (("plain", plain), ("shaped", shaped))
    }
    assert loss["plain"] > 1.2
    assert loss["shaped"] < 1.02


def test_from_any_state_on_the_best_actions_are_the_same(make_scenario):
    """Backward induction over the tree of histories: optimal actions agree in every state."""
    n = 6
    prompts, outputs = np.array([4000, 200] * 3), np.array([600, 600] + [10] * 4)
    table = RequestTable.build(np.arange(n) * 0.3, prompts, outputs)
    episode = Episode(table, np.array([0, 1], np.int16), np.ones(2))

    def optimal(rewards: dict[tuple[int, ...], np.ndarray]) -> dict[tuple[int, ...], int]:
        values = {actions: 0.0 for actions in rewards}
        choice = {}
        for depth in range(n - 1, -1, -1):
            values, later = {}, values
            for history in itertools.product((0, 1), repeat=depth):
                worth = []
                for a in (0, 1):
                    after = (*history, a)
                    some = after + (0,) * (n - depth - 1)
                    worth.append(rewards[some][depth] + later[after])
                values[history], choice[history] = max(worth), int(np.argmax(worth))
        return choice

    plain = optimal(tree(make_scenario, episode, "none"))
    assert optimal(tree(make_scenario, episode, "cost-to-go")) == plain
    assert set(plain.values()) == {0, 1}


def test_estimate_is_near_what_the_requests_still_take(make_scenario):
    """Stop somewhere in an episode and let all end: the estimate against what happened."""
    ratios = []
    for seed in range(6):
        env = DispatchEnv(make_scenario(), shaping="cost-to-go", num_requests=40 - 5 * (seed % 3))
        rewards, _, _ = play(env, seed=seed)
        fate = env.batch.simulator.outcomes(0)
        last_s = fate["arrival_s"].max()
        plain_last = -np.maximum(fate["finish_s"] - last_s, 0.0).sum()
        # what is left of the last step: its own cost, and the error of the estimate
        ratios.append(rewards[-1] / plain_last)
    assert np.abs(ratios).max() < 0.25


def test_estimate_of_an_empty_system_is_nothing_and_of_one_request_its_time(
    make_scenario, make_episode
):
    env = DispatchEnv(make_scenario(), shaping="cost-to-go")
    episode = make_episode([0.0, 0.001, 200.0], prompt=500, output=200)
    env.reset(options={"episode": episode})
    assert env.batch._shaping.value[0] == 0.0
    _, first, *_ = env.step(0)
    charged = env.batch._shaping.value[0]
    env.step(1)
    assert env.batch._shaping.value[0] == 0.0  # 200 s later
    env.step(1)
    fate = env.batch.simulator.outcomes(0)
    took_s = fate["finish_s"] - fate["arrival_s"]
    assert -charged == pytest.approx(took_s[0] - 0.001, rel=0.03)
    # the decision pays for its request at once, not the step in which the request ends
    assert -first == pytest.approx(took_s[0], rel=0.03)


def test_last_step_no_longer_holds_the_fate_of_the_episode(make_scenario):
    share = {}
    for shaping in ("none", "cost-to-go"):
        env = DispatchEnv(make_scenario(), load=3.0, num_requests=120, shaping=shaping)
        rewards, _, _ = play(env, seed=1)
        share[shaping] = rewards[-1] / rewards.sum()
    assert share["none"] > 0.3
    assert abs(share["cost-to-go"]) < 0.06


def test_goodput_estimate_is_within_the_worth_of_what_is_there(make_scenario):
    limits = [{"name": "all", "ttft_s": 0.2, "tpot_s": 0.02, "weight": 2.0}]
    env = DispatchVectorEnv(
        1, make_scenario(slo_classes=limits), objective="goodput", shaping="cost-to-go", load=2.0
    )
    env.reset(seed=0)
    values = []
    for step in range(35):
        env.step(np.array([step % 3]))
        value = env.batch._shaping.value[0]
        in_system = env.batch.simulator.state.env["in_system"][0]
        assert 0.0 <= value <= 2.0 * in_system
        values.append(value)
    assert max(values) > 1.0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"shaping": "yes"}, "shaping must be one of none, cost-to-go, got 'yes'"),
        ({"reward_scale": "big"}, "reward_scale must be above 0 or \"auto\", got 'big'"),
        ({"episode_end": "soon"}, "episode_end must be one of drained, last-arrival, got 'soon'"),
        ({"warmup": -1}, "warmup must be at least 0 arrivals, got -1"),
    ],
)
def test_wrong_setting_is_refused(problem, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        problem.single(**{**problem.settings, **settings})


def test_automatic_scale_is_of_the_order_of_what_a_decision_costs(problem):
    env = problem.single(**problem.settings, shaping="cost-to-go", reward_scale="auto")
    rewards, _, _ = play(env)
    assert 0.03 < np.abs(rewards).mean() < 10.0
    again = problem.single(**problem.settings, reward_scale="auto")
    assert again.batch.reward_scale == env.batch.reward_scale  # a fact of the scenario


def test_a_batch_has_a_potential_for_each_environment():
    assert CostToGo(3, goodput=False, scale=1.0).value.tolist() == [0.0, 0.0, 0.0]
