"""Agents of many fleets as one batch: each is what PettingZoo's agent is, whenever it is asked."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.cluster.spec import Episode
from servegym.envs import cluster_v0
from servegym.envs.agent_batch import AgentBatch, Turn
from servegym.envs.rllib import FleetsByName, policy_of
from servegym.errors import ConfigError, InvalidAction, ResetNeeded
from servegym.policy.contract import NUM_OBSERVED_FEATURES, OUTSTANDING_REQUESTS
from servegym.workloads.table import RequestTable

from .test_cluster_agents import ENGINE, FAILING, HOLDS, tight
from .test_cluster_migration import moving
from .test_cluster_retention import tiered

VARYING = {"fleet": [{**ENGINE, "count": (2, 4)}]}


def act(kind: str, seen: np.ndarray, mask: np.ndarray) -> int:
    """Choose by a rule that looks at what is seen."""
    allowed = np.flatnonzero(mask)
    if kind == "dispatcher":
        load = seen[OUTSTANDING_REQUESTS::NUM_OBSERVED_FEATURES]
        return int(min(allowed, key=lambda a: load[a] if a < len(load) else np.inf))
    return int(allowed[int(1e4 * float(np.abs(seen).sum())) % len(allowed)])


def acts(turn: Turn) -> dict[str, np.ndarray]:
    return {
        kind: np.array([act(kind, *x) for x in zip(a.observation, a.action_mask, strict=True)], int)
        for kind, a in turn.asked.items()
    }


def rows_of(turn: Turn, fleet: int) -> tuple[str, int]:
    """Return the class and the row of who is asked in a fleet."""
    found = [
        (kind, row)
        for kind, asked in turn.asked.items()
        for row in np.flatnonzero(asked.fleet == fleet)
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {"scenario": tight(**FAILING, num_requests=60), "rewards": "class"}, id="down"
        ),
        pytest.param(
            {"scenario": tight(**HOLDS, **VARYING), "normalise": True, "rewards": "team"}, id="size"
        ),
        pytest.param({"scenario": tight(), "episode_end": "last-arrival"}, id="truncated"),
        pytest.param(
            {"scenario": moving("vllm-priority"), "num_requests": 50, "rewards": "class"},
            id="moves",
        ),
        pytest.param({"scenario": tiered(), "num_requests": 40}, id="turns"),
    ],
)
def test_a_fleet_of_the_batch_is_that_of_pettingzoo_for_episodes_on_end(settings):
    settings = {"invalid_action": "raise", "load": 2.0, **settings}
    batch, env = AgentBatch(2, **settings), cluster_v0.raw_env(**settings)
    assert batch.possible_agents == env.possible_agents
    assert batch.state_space == env.state_space
    turn = batch.reset(seed=5)
    decided: set[str] = set()
    steps = 0
    for episode in range(2):
        env.reset(seed=5 if episode == 0 else None)
        taking_part = np.isin(batch.possible_agents, env.agents)
        np.testing.assert_array_equal(batch.is_present[0], taking_part)
        has_decided = dict.fromkeys(env.agents, False)
        while True:
            kind, row = rows_of(turn, 0)
            asked = turn.asked[kind]
            name = batch.possible_agents[asked.agent[row]]
            assert name == env.agent_selection
            seen, reward, _, _, info = env.last()
            np.testing.assert_array_equal(asked.observation[row], seen["observation"])
            np.testing.assert_array_equal(asked.action_mask[row], seen["action_mask"])
            steps += 1
            if steps % 5 == 0:  # to look at all takes most of the test's time
                np.testing.assert_array_equal(batch.states()[0], env.state())
            ups = [batch.is_up[0, env.possible_agents.index(a)] for a in env.agents]
            assert ups == [env.infos[a]["is_up"] for a in env.agents]
            assert asked.is_first[row] != has_decided[name]
            assert asked.reward[row] == pytest.approx(reward if has_decided[name] else 0.0)
            has_decided[name] = True
            actions = acts(turn)
            env.step(int(actions[kind][row]))
            turn = batch.step(actions)
            for place, other in enumerate(batch.possible_agents):
                earned = env.rewards.get(other, 0.0) if other in env.agents else 0.0
                assert turn.earned[0, place] == pytest.approx(earned)
            if 0 in turn.ended.fleet:
                break
            assert turn.dt_s[0] == env.infos[name]["dt_s"]
        end = turn.ended
        row = int(np.flatnonzero(end.fleet == 0)[0])
        assert end.truncated[row] == ("episode_end" in settings)
        np.testing.assert_array_equal(end.is_present[row], taking_part)
        for place, name in enumerate(batch.possible_agents):
            if name in env.agents:
                assert end.has_decided[row, place] == has_decided[name]
                # what it has earned since its own last decision, or since the episode began
                assert end.reward[row, place] == pytest.approx(env._cumulative_rewards[name])
                if end.truncated[row]:
                    last = env.observe(name)["observation"]
                    np.testing.assert_array_equal(end.observations[row][name], last)
        info = env.infos[env.agents[0]]
        assert {k: v[row] for k, v in end.metrics.items()} == info["episode_metrics"]
        decided |= {name for name, did in has_decided.items() if did}
    # every class was asked
    assert {name.rpartition("_")[0] for name in decided} == set(batch.classes)
    assert steps > 60


def test_an_agents_rewards_and_times_add_up_to_its_episode():
    batch = AgentBatch(4, tight(num_requests=60), load=2.0, rewards="class")
    turn = batch.reset(seed=1)
    reward, elapsed_s, begun_s = (np.zeros((4, 3)) for _ in range(3))
    ended = 0
    while ended < 8:
        for asked in turn.asked.values():
            reward[asked.fleet, asked.agent] += asked.reward
            elapsed_s[asked.fleet, asked.agent] += asked.dt_s
            now_s = batch.batch.now_s[asked.fleet[asked.is_first]]
            begun_s[asked.fleet[asked.is_first], asked.agent[asked.is_first]] = now_s
        before = {fleet: batch.batch.simulator.episodes[fleet] for fleet in range(4)}
        turn = batch.step(acts(turn))
        for row, fleet in enumerate(turn.ended.fleet.tolist()):
            assert turn.ended.has_decided[row].all()
            total = reward[fleet] + turn.ended.reward[row]
            in_system_s = turn.ended.metrics["mean_e2e_s"][row] * 60
            # the first decision comes with the first request: the dispatcher earns all of it
            assert total[0] == pytest.approx(-in_system_s)
            assert elapsed_s[fleet, 0] + turn.ended.dt_s[row, 0] > before[fleet].table.arrival_s[-1]
            assert (begun_s[fleet, 1:] >= begun_s[fleet, 0]).all()
            reward[fleet] = elapsed_s[fleet] = 0.0
            ended += 1
    assert ended >= 8


def test_who_decides_once_earns_the_rest_at_the_end_and_who_never_does_has_not_decided():
    """Three requests that fill an engine each, one after the other, come at once."""
    table = RequestTable.build(np.zeros(3), np.full(3, 800), np.full(3, 400))
    episode = Episode(table, np.zeros(2, np.int16), np.ones(2))
    batch = AgentBatch(1, tight())
    turn = batch.reset(seed=0, episodes=[episode])
    for _ in range(3):  # all to the first replica, whose 120 blocks hold one of them at a time
        assert turn.asked["dispatcher"].dt_s.tolist() == [0.0]
        turn = batch.step({"dispatcher": np.zeros(1, np.int64)})
    names = []
    while not len(turn.ended.fleet):
        asked = turn.asked["scheduler"]
        names.append(batch.possible_agents[asked.agent[0]])
        turn = batch.step({"scheduler": asked.action_mask.argmax(1)})
    assert set(names) == {"scheduler_0"}
    in_system_s = turn.ended.metrics["mean_e2e_s"][0] * 3
    # all came at 0 s, and the dispatcher decided nothing after that
    assert turn.ended.reward[0, 0] == pytest.approx(-in_system_s)
    assert turn.ended.dt_s[0, 0] > 0.4 * in_system_s  # until the last one's end
    assert turn.ended.has_decided[0].tolist() == [True, True, False]
    assert turn.ended.dt_s[0, 2] == 0.0


def test_fleets_that_are_not_active_wait_and_their_decision_is_due_again():
    batch = AgentBatch(3, tight(), load=2.0)
    turn = batch.reset(seed=3)
    for _ in range(20):
        turn = batch.step(acts(turn))
    kind, row = rows_of(turn, 1)
    before = [value[row] for value in turn.asked[kind]]
    now_s = batch.batch.now_s
    active = np.array([True, False, True])
    for _ in range(10):
        turn = batch.step(acts(turn), active)
        assert turn.earned[1].tolist() == [0.0, 0.0, 0.0]
        assert turn.dt_s[1] == 0.0
    kind, row = rows_of(turn, 1)
    for value, want in zip(turn.asked[kind], before, strict=True):
        np.testing.assert_array_equal(value[row], want)
    later_s = batch.batch.now_s
    assert later_s[1] == now_s[1]
    assert (later_s[[0, 2]] > now_s[[0, 2]]).all()


def test_what_is_wrong_is_refused_before_anything_happens():
    batch = AgentBatch(2, tight())
    with pytest.raises(ResetNeeded):
        batch.step({})
    turn = batch.reset(seed=0)
    before = batch.states()
    two = np.zeros(2, np.int64)
    for actions, message in (
        ({}, "actions of class 'dispatcher' are missing: 2 of it are asked"),
        ({"dispatcher": two, "router": two}, r"no agents of class 'router': choose from \['disp"),
        (
            {"dispatcher": np.array([0, 2])},
            r"action 2 of dispatcher_0 in fleet 1 is not allowed: choose one of \[0, 1\]",
        ),
        ({"dispatcher": np.zeros(3, np.int64)}, "3"),
    ):
        with pytest.raises(InvalidAction, match=message):
            batch.step(actions)
    np.testing.assert_array_equal(batch.states(), before)
    assert len(turn.asked["scheduler"].fleet) == 0
    batch.step({"dispatcher": two})
    with pytest.raises(ConfigError, match="flat must be left out"):
        AgentBatch(2, tight(), flat=True)
    with pytest.raises(ConfigError, match='rewards="class" must have shaping="none"'):
        AgentBatch(2, tight(), rewards="class", shaping="cost-to-go")
    with pytest.raises(ConfigError, match="no agent or class of agents 'scheduler_9'"):
        batch.action_space("scheduler_9")
    assert batch.action_space("scheduler") == batch.action_space("scheduler_1")
    assert (
        len(turn.asked["dispatcher"].observation[0])
        == batch.spaces["dispatcher_0"]["observation"].shape[0]
    )


def test_fleets_stepped_together_begin_anew_in_the_step_after_their_end():
    vector = FleetsByName(3, {"scenario": tight(), "load": 2.0})
    seen, _ = vector.reset(seed=1)
    ended, began, rng = 0, 0, np.random.default_rng(0)
    decided = [set[str]() for _ in range(3)]
    while ended < 6:
        was_over = vector.is_over.copy()
        actions = [
            {}
            if over
            else {name: rng.choice(np.flatnonzero(view["action_mask"])) for name, view in s.items()}
            for over, s in zip(was_over, seen, strict=True)
        ]
        for fleet in range(3):
            decided[fleet] |= set(actions[fleet])
        seen, rewards, terminated, _, _ = vector.step(actions)
        for fleet in range(3):
            if terminated[fleet]["__all__"]:
                assert seen[fleet] == {}
                assert set(rewards[fleet]) == decided[fleet] > {"dispatcher_0"}
                decided[fleet] = set()
                ended += 1
            else:
                assert len(seen[fleet]) == 1
                assert rewards[fleet].keys() == seen[fleet].keys()
            if was_over[fleet]:
                assert rewards[fleet] == {"dispatcher_0": 0.0}
                began += 1
    assert began >= 3
    assert {policy_of(name) for name in vector.fleets.possible_agents} == {
        "dispatcher",
        "scheduler",
    }
    vector.is_over[:] = False
    with pytest.raises(
        InvalidAction, match=r"_\d is asked in fleet \d and must act, got actions of"
    ):
        vector.step([{}, {}, {}])
