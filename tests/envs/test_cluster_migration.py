"""The controller of a fleet whose requests migrate: what it sees, may do, and brings about."""

from __future__ import annotations

import numpy as np
import pytest
from pettingzoo.test import api_test, parallel_api_test, parallel_seed_test, seed_test

from servegym.baselines.registry import policy
from servegym.cluster.simulator import Simulator
from servegym.envs import cluster_v0
from servegym.envs.cluster import ClusterEnv, ClusterVectorEnv
from servegym.envs.cluster_forms import ClusterParallel
from servegym.envs.migration_kernels import MOVE_FEATURES
from servegym.policy.contract import (
    NUM_OBSERVED_FEATURES,
    OUTSTANDING_REQUESTS,
)
from servegym.policy.run import run
from servegym.scenario import Scenario

from .test_cluster_agents import quiet

WIDTH = 3
NOBODY = WIDTH * WIDTH
COLUMNS = {feature.name: i for i, feature in enumerate(MOVE_FEATURES)}


def moving(engine: str = "vllm", **migration) -> Scenario:
    link = {"gb_per_s": 5.0, "latency_s": 0.001}
    return Scenario.model_validate(
        {
            "name": "moving",
            "engine": {"block_size": 16, "max_num_seqs": 16, "prefix_caching": False},
            "fleet": [
                {"gpu": "L4", "count": WIDTH, "num_blocks": 130, "engine": engine, "link": link}
            ],
            "migration": {"interval_s": 0.1, "last_stage_blocks": 4, **migration},
            "workload": {
                "kind": "generated",
                "rate_rps": 5.0,
                "prompt": {"medians_tokens": [200.0], "max_tokens": 800},
                "output": {"medians_tokens": [150.0], "max_tokens": 600},
            },
            "num_requests": 120,
        }
    )


class Llumnix:
    """Least outstanding requests, and pairs by freeness, from what agents see."""

    def __init__(self, below: float = 3.0, above: float = 3.0) -> None:
        self.below, self.above, self.now_s = below, above, -1.0
        self.used: set[int] = set()

    def dispatch(self, replicas: np.ndarray, mask: np.ndarray) -> int:
        load = np.where(mask[:WIDTH] == 1, replicas[:, OUTSTANDING_REQUESTS], np.inf)
        return int(load.argmin())

    def control(self, moves: np.ndarray, mask: np.ndarray, now_s: float) -> int:
        if now_s != self.now_s:
            self.now_s, self.used = now_s, set()
        freeness, lately = moves[:, COLUMNS["freeness"]], moves[:, COLUMNS["has_preempted"]]
        order = sorted(range(WIDTH), key=lambda r: float(freeness[r]))
        for a in order:
            if a in self.used or moves[a, COLUMNS["is_sending"]]:
                continue
            if freeness[a] >= self.below and not lately[a]:
                continue
            targets = [
                b
                for b in order
                if b != a and b not in self.used and freeness[b] > self.above and not lately[b]
            ]
            if not targets:
                break
            self.used.add(a)
            b = max(targets, key=lambda r: (float(freeness[r]), -r))
            if mask[a * WIDTH + b]:
                self.used.add(b)
                return a * WIDTH + b
        return NOBODY


def play(env, agent: Llumnix, seed: int = 0):
    """Play an episode, whatever the form; return the simulator that did."""
    first = WIDTH  # the actions of a dispatch, where nothing is held or rejected
    cut = WIDTH * NUM_OBSERVED_FEATURES
    moves = (WIDTH, len(MOVE_FEATURES))
    if isinstance(env, ClusterEnv):
        seen, info = env.reset(seed=seed)
        done = False
        while not done:
            mask = info["action_mask"]
            if seen["kind"][1]:
                now_s = float(env.batch.simulator.state.env["now_s"][0])
                action = first + agent.control(seen["moves"], mask[first:], now_s)
            else:
                action = agent.dispatch(seen["replicas"], mask)
            seen, _, done, _, info = env.step(action)
        return env.batch.simulator
    if isinstance(env, ClusterParallel):
        seen, infos = env.reset(seed=seed)
        while env.agents:
            asked = next(name for name in env.agents if infos[name]["is_asked"])
            own, now_s = seen[asked], infos[asked]["now_s"]
            if asked == "controller_0":
                action = agent.control(own["observation"].reshape(moves), own["action_mask"], now_s)
            else:
                shown = own["observation"][:cut].reshape(WIDTH, -1)
                action = agent.dispatch(shown, own["action_mask"])
            seen, _, _, _, infos = env.step({asked: action})
        return env.batch.simulator
    env.reset(seed=seed)
    for name in env.agent_iter():
        seen, _, terminated, _, info = env.last()
        action = None
        if not terminated and name == "controller_0":
            shown = seen["observation"].reshape(moves)
            action = agent.control(shown, seen["action_mask"], info["now_s"])
        elif not terminated:
            shown = seen["observation"][:cut].reshape(WIDTH, -1)
            action = agent.dispatch(shown, seen["action_mask"])
        env.step(action)
    return env.batch.simulator


@pytest.mark.parametrize("make", [ClusterEnv, cluster_v0.raw_env, cluster_v0.parallel_env])
def test_agents_that_follow_rules_play_as_the_rules_do(make):
    scenario = moving()
    got = play(make(scenario, invalid_action="raise"), Llumnix())
    want = Simulator(scenario.spec, got.episodes)
    run(want, policy("least-outstanding"))
    outcomes = want.outcomes()
    assert outcomes["num_migrations"].sum() > 10
    assert outcomes["moved_bytes"].sum() > 0
    for column in outcomes.dtype.names:
        np.testing.assert_allclose(
            got.outcomes()[column], outcomes[column], rtol=1e-12, err_msg=column
        )


@pytest.mark.parametrize("rule", ["freeness", "queues", "none"])
def test_the_rule_of_the_warm_up_moves_as_the_core_does(rule):
    scenario = moving(rule=rule)
    env = ClusterEnv(scenario, invalid_action="raise")
    env.reset(seed=1)
    agent, done, asked = Llumnix(), False, 0
    while not done:
        action = env.batch.stand_in(0)
        if env.batch.is_dispatchers(0):
            action = agent.dispatch(env.batch.replicas[0], env.action_masks())
        else:
            asked += 1
        _, _, done, _, _ = env.step(action)
    got = env.batch.simulator.outcomes()
    want = Simulator(scenario.spec, env.batch.simulator.episodes)
    run(want, policy("least-outstanding"))
    assert asked > 0
    assert (got["num_migrations"].sum() > 5) == (rule != "none")
    np.testing.assert_allclose(got["finish_s"], want.outcomes()["finish_s"], rtol=1e-12)


def test_a_controller_that_acts_at_random_leaves_nobody_behind():
    vector = ClusterVectorEnv(3, moving("vllm-priority"), max_waiting=8, allow_none=True)
    seen, info = vector.reset(seed=0)
    assert seen["moves"].shape == (3, WIDTH, len(MOVE_FEATURES))
    assert seen["kind"].shape == (3, 4)  # to dispatch, admit, preempt, migrate
    assert seen["agent"].shape == (3, 2 + WIDTH)
    rng, kinds, nobody = np.random.default_rng(0), np.zeros(4, int), 0
    first = vector.batch.first_move
    for _ in range(1500):
        kinds += seen["kind"].sum(0)
        for i, mask in enumerate(info["action_mask"]):
            assert mask.any()
            controls = seen["kind"][i, 3] == 1
            assert mask[first:].any() == controls
            assert mask[:first].any() != controls
            nobody += int(mask[first - 1])  # is admitted, not moved
            assert seen["moves"][i].any() == controls
            assert (seen["agent"][i, 1 + WIDTH] == 1) == controls
        actions = [rng.choice(np.flatnonzero(mask)) for mask in info["action_mask"]]
        seen, *_, info = vector.step(np.array(actions))
    assert (kinds > 20).all()
    assert nobody > 20


@pytest.mark.parametrize("engine", ["vllm", "vllm-priority"])
def test_pettingzoos_own_tests_pass(engine):
    scenario = moving(engine)
    with quiet():
        api_test(cluster_v0.env(scenario, num_requests=25), num_cycles=80)
        parallel_api_test(cluster_v0.parallel_env(scenario, num_requests=25), num_cycles=80)
        seed_test(lambda: cluster_v0.env(scenario, num_requests=15), num_cycles=20)
        parallel_seed_test(lambda: cluster_v0.parallel_env(scenario, num_requests=15), 20)
    agents = cluster_v0.raw_env(scenario).possible_agents
    schedulers = [f"scheduler_{r}" for r in range(WIDTH)] if engine != "vllm" else []
    assert agents == ["dispatcher_0", *schedulers, "controller_0"]


@pytest.mark.parametrize("rewards", ["shared", "team", "class"])
def test_a_controller_earns_what_the_fleet_does_or_its_part(rewards):
    env = cluster_v0.parallel_env(moving(), rewards=rewards)
    env.reset(seed=0)
    totals = dict.fromkeys(env.possible_agents, 0.0)
    rng = np.random.default_rng(0)
    while env.agents:
        masks = {name: env._mask(env.possible_agents.index(name)) for name in env.agents}
        actions = {name: rng.choice(np.flatnonzero(mask)) for name, mask in masks.items()}
        _, earned, _, _, _ = env.step(actions)
        for name, more in earned.items():
            totals[name] += more
    done = env.batch.simulator.outcomes()
    fleet = -(done["finish_s"] - done["arrival_s"]).sum()
    share = 0.5 if rewards == "team" else 1.0
    for total in totals.values():
        assert total == pytest.approx(share * fleet)
    assert len(totals) == 2


def test_a_picture_says_who_moved():
    env = ClusterEnv(moving(), render_mode="ansi")
    env.reset(seed=0)
    texts, done = [env.render()], False
    while not done:
        mask = env.action_masks()
        _, _, done, _, _ = env.step(int(np.flatnonzero(mask)[0]))
        texts.append(env.render())
    shown = "".join(texts)
    for words in ("who moves to another replica", "gave a request to replica"):
        assert words in shown
