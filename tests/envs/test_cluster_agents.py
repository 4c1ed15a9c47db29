"""PettingZoo's forms of a fleet: its own tests, who is asked, who earns what, when agents leave."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from pettingzoo.test import (
    api_test,
    max_cycles_test,
    parallel_api_test,
    parallel_seed_test,
    render_test,
    seed_test,
)
from pettingzoo.test.state_test import state_test

from servegym.cluster.outcome import within_slo
from servegym.cluster.state import ADMIT, DISPATCH, PREEMPT
from servegym.envs import cluster_v0
from servegym.envs.cluster import ClusterEnv, ClusterVectorEnv
from servegym.envs.cluster_forms import ClusterParallel
from servegym.errors import ConfigError, EnvironmentClosed, InvalidAction, ResetNeeded
from servegym.export.resolve import resolve_dispatch
from servegym.policy import run_placed as placed
from servegym.policy.contract import (
    HAS_PREFILL,
    NUM_OBSERVED_FEATURES,
    NUM_OBSERVED_REQUEST_FEATURES,
    NUM_REQUEST_FEATURES,
    REPLICA_FEATURES,
)
from servegym.policy.ordering import NUM_ORDERING_FEATURES, OrderingFeature
from servegym.policy.policy import Observations
from servegym.policy.run_pair import make_simulator, run_pair
from servegym.scenario import Scenario, load_scenario, scenario_names

BUNDLED = [
    name
    for name in scenario_names()
    if load_scenario(name).max_replicas > 1
    and {t.engine for t in load_scenario(name).spec.types} == {"vllm-priority"}
]
ENGINE = {"gpu": "L4", "num_blocks": 120, "engine": "vllm-priority"}
TIGHT = {
    "name": "tight fleet",
    "engine": {"block_size": 16, "max_num_seqs": 8, "prefix_caching": False},
    "fleet": [{**ENGINE, "count": 2}],
    "workload": {
        "kind": "generated",
        "rate_rps": 3.0,
        "prompt": {"medians_tokens": [200.0], "max_tokens": 800},
        "output": {"medians_tokens": [150.0], "max_tokens": 600},
    },
    "num_requests": 40,
}
FAILING = {"disturbances": {"fail_stop": {"rate_per_replica_hour": 120.0, "recovery_s": 10.0}}}
HOLDS = {"actions": {"hold": True, "hold_s": 0.5, "reject": True}}


def tight(**changes) -> Scenario:
    return Scenario.model_validate({**TIGHT, **changes})


LINK = {"gb_per_s": 10.0}
SPLIT = {
    "name": "split",
    "engine": {"block_size": 16, "max_num_seqs": 8},
    "fleet": [
        {"gpu": "L4", "count": 2, "num_blocks": 120, "role": "prefill", "link": LINK},
        {"gpu": "L4", "count": 2, "num_blocks": 120, "role": "decode", "link": LINK},
        {"gpu": "L4", "count": 1, "num_blocks": 120, "link": LINK},
    ],
}


def split(**changes) -> Scenario:
    """A fleet in which requests are placed, too: there is a dispatcher alone."""
    return Scenario.model_validate({**TIGHT, **SPLIT, **changes})


PLACED = [name for name in scenario_names() if load_scenario(name).spec.disaggregated]
SCENARIOS = [
    *(pytest.param({"scenario": name}, id=name) for name in PLACED),
    pytest.param({"scenario": split(**FAILING, **HOLDS), "rewards": "class"}, id="split"),
    *(pytest.param({"scenario": name}, id=name) for name in BUNDLED),
    pytest.param({"scenario": tight(), "max_waiting": 4, "allow_none": True}, id="tight"),
    pytest.param({"scenario": tight(**FAILING), "normalise": True}, id="failing"),
    pytest.param({"scenario": tight(**HOLDS), "rewards": "team"}, id="holds"),
    pytest.param(
        {"scenario": tight(fleet=[{**ENGINE, "count": (2, 4)}]), "rewards": "class"}, id="varying"
    ),
]
EVERY = pytest.mark.parametrize("settings", SCENARIOS)


@contextlib.contextmanager
def quiet():
    """PettingZoo's advice that does not hold for masked agents of several kinds; all else fails."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        for advice in (
            "Observation is not a NumPy array",  # its own form of masks is a dict
            "Observation space for each agent probably should be",
            "Observations are different shapes",  # a dispatcher is no scheduler
            "Agents have different observation space sizes",
            "No agents present but not all possible_agents",  # fleets smaller than the largest
        ):
            warnings.filterwarnings("ignore", advice)
        yield


@EVERY
def test_pettingzoos_own_tests_pass(settings):
    settings = {"num_requests": 60, **settings}
    with quiet():
        api_test(cluster_v0.env(**settings), num_cycles=200)
        parallel_api_test(cluster_v0.parallel_env(**settings), num_cycles=200)
        seed_test(lambda: cluster_v0.env(**settings), num_cycles=100)
        parallel_seed_test(lambda: cluster_v0.parallel_env(**settings), num_cycles=100)
        render_test(lambda render_mode: cluster_v0.env(render_mode=render_mode, **settings))
        state_test(cluster_v0.env(**settings), cluster_v0.parallel_env(**settings), num_cycles=60)


@pytest.mark.parametrize("settings", SCENARIOS[:-1])  # where the fleet varies, some take no part
def test_pettingzoos_test_of_cycles_passes(settings):
    if not isinstance(settings["scenario"], str):
        settings = {**settings, "load": 3.0}  # so that every agent is asked often enough
    module = SimpleNamespace(
        env=functools.partial(cluster_v0.env, **settings),
        parallel_env=functools.partial(cluster_v0.parallel_env, **settings),
    )
    max_cycles_test(module)


@pytest.mark.slow
def test_the_module_itself_passes_with_whole_episodes():
    with quiet():
        api_test(cluster_v0.env(), num_cycles=100_000)
        parallel_api_test(cluster_v0.parallel_env(), num_cycles=100_000)
    max_cycles_test(cluster_v0)


LEFT = int(OrderingFeature["PREDICTED_REMAINING_TOKENS"])


def shortest(seen) -> int:
    """SRPT as a pick: admit the fewest tokens left, preempt the most."""
    rows = (len(seen["observation"]) - 6) // NUM_ORDERING_FEATURES
    left = seen["observation"][: rows * NUM_ORDERING_FEATURES].reshape(rows, -1)[:, LEFT]
    left = -left if seen["observation"][-1] else left
    return int(np.where(seen["action_mask"][:rows] == 1, left, np.inf).argmin())


class Turns:
    """Requests in turn to all replicas; the engines go by srpt."""

    def __init__(self, num_replicas):
        self.count, self.num_replicas = 0, num_replicas

    def __call__(self, agent, seen):
        if agent != "dispatcher_0":
            return shortest(seen)
        self.count += 1
        return (self.count - 1) % self.num_replicas


def play_turns(env, seed=0):
    """Play an episode one agent at a time; return who was asked, and what each earned."""
    env.reset(seed=seed)
    policy, asked = Turns(len(env.agents) - 1), []
    earned = dict.fromkeys(env.agents, 0.0)
    for agent in env.agent_iter():
        seen, reward, terminated, truncated, info = env.last()
        earned[agent] += reward
        if terminated or truncated:
            env.step(None)
            continue
        assert info["is_asked"]
        assert [a for a in env.agents if env.infos[a]["is_asked"]] == [agent]
        asked.append(agent)
        env.step(policy(agent, seen))
    return asked, earned


def play_rounds(env, seed=0):
    """Play an episode in rounds; return who was asked, what each earned, and the last infos."""
    seen, infos = env.reset(seed=seed)
    policy, asked = Turns(len(env.agents) - 1), []
    earned = dict.fromkeys(env.agents, 0.0)
    while env.agents:
        (agent,) = [a for a in env.agents if infos[a]["is_asked"]]
        for other in env.agents:
            assert seen[other] in env.observation_space(other)
            if other != agent:
                assert np.flatnonzero(seen[other]["action_mask"]).tolist() == [
                    env.action_space(other).n - 1
                ]
        asked.append(agent)
        actions = {a: int(env.action_space(a).n) - 1 for a in env.agents}
        actions[agent] = policy(agent, seen[agent])
        seen, rewards, _, _, infos = env.step(actions)
        for a, reward in rewards.items():
            earned[a] += reward
    return asked, earned, infos


@pytest.mark.parametrize("form", ["aec", "parallel"])
def test_agents_that_follow_rules_do_what_the_pair_of_rules_does(form):
    scenario = tight(fleet=[{**ENGINE, "count": 3}], num_requests=90)
    settings = {"scenario": scenario, "invalid_action": "raise", "load": 1.5}
    if form == "aec":
        env = cluster_v0.raw_env(**settings)
        asked, _ = play_turns(env)
    else:
        env = cluster_v0.parallel_env(**settings)
        asked, _, infos = play_rounds(env)
        assert infos["scheduler_0"]["episode_metrics"]["num_preemptions"] > 0
    pair = resolve_dispatch("round-robin+srpt")
    want = make_simulator(scenario.spec, env.batch.simulator.episodes, pair)
    run_pair(want, pair)
    got, want = env.batch.simulator.outcomes(), want.outcomes()
    for column in got.dtype.names:
        np.testing.assert_allclose(got[column], want[column], rtol=1e-12, err_msg=column)
    assert set(asked) == {"dispatcher_0", "scheduler_0", "scheduler_1", "scheduler_2"}
    assert asked.count("dispatcher_0") == 90


def test_both_forms_and_the_single_agent_are_the_same_process():
    settings = {"scenario": tight(), "load": 1.5}
    turns, earned = play_turns(cluster_v0.env(**settings), seed=4)
    rounds, earned_in_rounds, _ = play_rounds(cluster_v0.parallel_env(**settings), seed=4)
    assert turns == rounds
    assert earned == pytest.approx(earned_in_rounds)
    single = ClusterEnv(**settings)
    seen, _ = single.reset(seed=4)
    policy, total, done, asked = Turns(2), 0.0, False, []
    while not done:
        agent = ("dispatcher_0", "scheduler_0", "scheduler_1")[seen["agent"].argmax()]
        asked.append(agent)
        first = 0 if agent == "dispatcher_0" else single.batch.num_dispatch
        own = {
            "observation": np.concatenate(
                (seen["requests"].ravel(), seen["engine"], seen["kind"][2:])
            ),
            "action_mask": seen["action_mask"][first:],
        }
        seen, reward, done, _, _ = single.step(first + policy(agent, own))
        total += reward
    assert asked == turns
    assert earned == pytest.approx(dict.fromkeys(earned, total))


@pytest.mark.parametrize("objective", ["latency", "goodput"])
def test_rewards_of_the_team_are_parts_and_those_of_the_schedulers_are_their_requests(objective):
    settings = {"scenario": tight(), "load": 1.5, "objective": objective}
    shared, team, by_class = (
        play_turns(cluster_v0.env(rewards=rewards, **settings))[1]
        for rewards in ("shared", "team", "class")
    )
    total = shared["dispatcher_0"]
    assert set(shared.values()) == {total}
    assert sum(team.values()) == pytest.approx(total)
    assert team == pytest.approx(dict.fromkeys(team, total / 3))
    assert by_class["dispatcher_0"] == pytest.approx(total)
    assert by_class["scheduler_0"] + by_class["scheduler_1"] == pytest.approx(total)
    assert 0.1 < by_class["scheduler_0"] / total < 0.9
    env = cluster_v0.raw_env(rewards="class", **settings)
    play_turns(env)
    fate = env.batch.simulator.outcomes()
    mine = fate[fate["replica"] == 1]
    if objective == "latency":
        want = -(mine["finish_s"] - mine["arrival_s"]).sum()
    else:
        want = within_slo(mine, env.batch.scenario.spec).sum()
    assert by_class["scheduler_1"] == pytest.approx(want)


def test_who_acts_against_the_rules_pays_alone_where_classes_earn():
    settings = {"scenario": tight(), "invalid_action": "penalise", "invalid_penalty": 1e6}
    env = cluster_v0.parallel_env(rewards="class", **settings)
    _, infos = env.reset(seed=0)
    wrong = {a: int(env.action_space(a).n) - 1 for a in env.agents}  # all pass
    fined: set[str] = set()
    assert len(wrong) > 2
    while len(fined) < 3:
        (asked,) = [a for a in env.agents if infos[a]["is_asked"]]
        _, rewards, _, _, infos = env.step(wrong)
        assert [a for a, reward in rewards.items() if reward < -1e5] == [asked]
        assert infos[asked]["invalid_action"]
        fined.add(asked)


def test_forbidden_actions_are_refused_if_wanted():
    env = cluster_v0.parallel_env(tight(), invalid_action="raise")
    with pytest.raises(ResetNeeded):
        env.step({})
    env.reset(seed=0)
    passing = {a: int(env.action_space(a).n) - 1 for a in env.agents}
    before = env.state()
    for actions, message in (
        ({"scheduler_0": passing["scheduler_0"]}, "dispatcher_0 is asked and must act"),
        (passing, r"action 2 of dispatcher_0 is not allowed: choose one of \[0, 1\]"),
        (
            {**passing, "dispatcher_0": 0, "scheduler_1": 3},
            "scheduler_1 is not allowed: .* only pass",
        ),
        ({**passing, "dispatcher_0": "left"}, "must be a whole number, got 'left'"),
    ):
        with pytest.raises(InvalidAction, match=message):
            env.step(actions)
    np.testing.assert_array_equal(env.state(), before)
    env.step({**passing, "dispatcher_0": np.int32(1)})
    aec = cluster_v0.raw_env(tight(), invalid_action="raise")
    with pytest.raises(ResetNeeded):
        aec.step(0)
    aec.reset(seed=0)
    with pytest.raises(InvalidAction, match=r"action 7 of dispatcher_0 .* \[0, 1\]"):
        aec.step(7)
    play_turns(aec)
    with pytest.raises(ResetNeeded):
        aec.step(0)


def test_the_scheduler_of_a_failed_replica_stays_and_nobody_asks_it():
    env = cluster_v0.parallel_env(tight(**FAILING, num_requests=120), load=1.5)
    down, back = 0, 0
    for seed in range(6):
        seen, infos = env.reset(seed=seed)
        everyone, was_up = list(env.agents), dict.fromkeys(env.agents, True)
        while env.agents:
            assert env.agents == everyone
            for name in everyone:
                up = infos[name]["is_up"]
                down += not up
                back += up and not was_up[name]
                was_up[name] = up
                assert up or not infos[name]["is_asked"]
            (asked,) = [a for a in everyone if infos[a]["is_asked"]]
            if asked == "dispatcher_0":
                ups = [infos[f"scheduler_{r}"]["is_up"] for r in range(2)]
                assert seen[asked]["action_mask"].tolist() == [*ups, 0]
            seen, _, _, _, infos = env.step({a: 0 for a in everyone})
    assert down > 0
    assert back > 0


def test_smaller_fleets_have_fewer_agents():
    env = cluster_v0.env(tight(fleet=[{**ENGINE, "count": (2, 4)}]))
    assert env.possible_agents == ["dispatcher_0", *(f"scheduler_{r}" for r in range(4))]
    sizes = set()
    for seed in range(8):
        env.reset(seed=seed)
        num_replicas = env.unwrapped.batch.simulator.episodes[0].num_replicas
        assert env.agents == env.possible_agents[: 1 + num_replicas]
        assert env.state() in env.unwrapped.state_space
        sizes.add(num_replicas)
    assert len(sizes) > 1


def test_agents_see_their_own_and_the_state_sees_all():
    env = cluster_v0.raw_env(tight(**HOLDS), max_waiting=4)
    env.reset(seed=0)
    assert env.action_space("dispatcher_0").n == 4  # two replicas, hold, reject
    assert env.action_space("scheduler_1").n == 4 + 8
    width = 2 * NUM_OBSERVED_FEATURES
    assert env.observation_space("dispatcher_0")["observation"].shape == (
        width + NUM_OBSERVED_REQUEST_FEATURES,
    )
    speeds = [f.name for f in REPLICA_FEATURES].index("relative_speed")
    kinds, prompts, steps = set(), 0, 0
    for agent in env.agent_iter(400):
        seen, _, terminated, _, _ = env.last()
        if terminated:
            break
        steps += 1
        batch, state = env.batch, env.state()
        own = env.observe("dispatcher_0")["observation"]
        np.testing.assert_array_equal(state[: len(own)], own)
        assert own[speeds] == own[NUM_OBSERVED_FEATURES + speeds] == 1.0
        np.testing.assert_array_equal(state[-3:], [a == agent for a in env.possible_agents])
        assert (own[width:] == 0).all() == (agent != "dispatcher_0")
        kinds.add(int(batch.simulator.state.env[0]["decision"]))
        for r in range(2):
            engine = env.observe(f"scheduler_{r}")["observation"]
            v = batch.simulator.state.replica[0, r]
            assert engine[-6:-4].tolist() == [v["num_running"], v["num_waiting"]]
            assert engine[-1] == (agent == f"scheduler_{r}" and batch.kind[0] == 2)
            rows = engine[:-6].reshape(12, NUM_ORDERING_FEATURES)
            prompts += (rows[:, 5] > 0).sum() == min(v["num_waiting"], 4) + v["num_running"]
        env.step(env.action_space(agent).sample(seen["action_mask"]))
    assert kinds == {DISPATCH, ADMIT, PREEMPT}
    assert prompts == 2 * steps


def test_an_agent_is_truncated_after_its_cycles_and_a_rule_takes_over():
    env = cluster_v0.env(tight(), max_cycles=3, load=3.0)
    env.reset(seed=1)
    turns = dict.fromkeys(env.agents, 0)
    total = dict.fromkeys(env.agents, 0.0)
    for agent in env.agent_iter():
        seen, reward, terminated, truncated, _ = env.last()
        total[agent] += reward
        assert not terminated
        assert truncated == (turns[agent] == 3)
        turns[agent] += not truncated
        env.step(None if truncated else env.action_space(agent).sample(seen["action_mask"]))
    assert set(turns.values()) == {3}
    assert all(reward < 0 for reward in total.values())
    rounds = cluster_v0.parallel_env(tight(), max_cycles=3)
    rounds.reset(seed=1)
    for i in range(3):
        assert rounds.agents
        _, _, terminations, truncations, _ = rounds.step(dict.fromkeys(rounds.agents, 0))
        assert not any(terminations.values())
        assert set(truncations.values()) == {i == 2}
    assert not rounds.agents


def test_truncation_at_the_last_arrival_ends_both_forms():
    settings = {"scenario": tight(), "episode_end": "last-arrival", "warmup": 5, "load": 0.5}
    asked, _ = play_turns(cluster_v0.env(**settings))
    rounds, _, infos = play_rounds(cluster_v0.parallel_env(**settings))
    assert asked == rounds
    assert asked.count("dispatcher_0") < 40 - 5
    assert infos["dispatcher_0"]["episode_metrics"]["mean_e2e_s"] > 0


def test_a_person_is_shown_text_at_each_step(capsys):
    env = cluster_v0.parallel_env(tight(), render_mode="human")
    env.reset(seed=0)
    env.step(dict.fromkeys(env.agents, 0))
    shown = capsys.readouterr().out
    assert shown.count("requests have ended") == 2
    assert env.render() is None


def test_what_makes_no_sense_is_refused():
    for settings, message in (
        ({"scenario": "kv-starved"}, "must have a fleet of two replicas or more"),
        ({"scenario": "mixed-chat"}, "engine: vllm-priority in every entry"),
        ({"rewards": "each"}, "rewards must be one of shared, team, class, got 'each'"),
        ({"max_cycles": 0}, "max_cycles must be at least 1, got 0"),
        ({"flat": True}, "flat is for batches"),
        ({"rewards": "class", "shaping": "cost-to-go"}, 'must have shaping="none"'),
        ({"render_mode": "film"}, "must be None, rgb_array, ansi or human, got 'film'"),
        ({"invalid_action": "ignore"}, "invalid_action must be one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            cluster_v0.parallel_env(**settings)
    env = cluster_v0.parallel_env(tight())
    with pytest.raises(ConfigError, match="unknown option of reset 'episod'"):
        env.reset(options={"episod": 1})
    with pytest.raises(ConfigError, match="episode must be an Episode, got int"):
        env.reset(options={"episode": 1})
    env.reset(options={"episode": tight().episode(5)})
    env.close()
    with pytest.raises(EnvironmentClosed):
        env.reset()


def test_episodes_are_given_and_copies_go_on_as_the_original():
    episode = tight().episode(5)
    env = cluster_v0.raw_env(tight())
    env.reset(options={"episode": episode})
    assert env.batch.simulator.episodes[0] is episode
    for _ in range(30):
        env.step(int(env.last()[0]["action_mask"].argmax()))
    twin = copy.deepcopy(env)
    for _ in range(20):
        assert twin.agent_selection == env.agent_selection
        np.testing.assert_array_equal(twin.state(), env.state())
        for one in (env, twin):
            one.step(int(one.last()[0]["action_mask"].argmax()))


class Rules:
    """Plays the dispatcher by a rule for dispatches and one for places, from what it observes."""

    def __init__(self, text: str, batch) -> None:
        self.placed, self.batch = resolve_dispatch(text), batch
        self.placed.reset(1, 0)

    def __call__(self, seen: np.ndarray, mask: np.ndarray) -> int:
        batch, width = self.batch, self.batch.num_replicas
        rows = seen[: width * len(batch.shown)].reshape(width, -1)
        replicas = np.zeros((1, len(REPLICA_FEATURES), width))
        for column, feature in enumerate(batch.shown):
            replicas[0, REPLICA_FEATURES.index(feature)] = rows[:, column]
        request = np.zeros((1, NUM_REQUEST_FEATURES))
        own = seen[width * len(batch.shown) :][:NUM_OBSERVED_REQUEST_FEATURES]
        request[0, : len(own)] = own
        allowed = np.zeros((1, width + 2), np.bool_)
        allowed[0, : len(mask)] = mask
        rule = self.placed.place if replicas[0, HAS_PREFILL].any() else self.placed.dispatch
        return int(rule.act(Observations(replicas, request, allowed), np.zeros(1, np.int64))[0])


def play_placed(env, text, seed=0):
    """Play an episode of a fleet in which requests are placed, whatever the form."""
    if isinstance(env, ClusterEnv):
        seen, info = env.reset(seed=seed)
        rules, done = Rules(text, env.batch), False
        while not done:
            flat = np.concatenate((seen["replicas"].ravel(), seen["request"]))
            seen, _, done, _, info = env.step(rules(flat, info["action_mask"]))
        return env.batch.simulator
    if isinstance(env, ClusterParallel):
        seen, _ = env.reset(seed=seed)
        rules = Rules(text, env.batch)
        while env.agents:
            own = seen["dispatcher_0"]
            action = rules(own["observation"], own["action_mask"][:-1])
            seen, *_ = env.step({"dispatcher_0": action})
        return env.batch.simulator
    env.reset(seed=seed)
    rules = Rules(text, env.batch)
    for _ in env.agent_iter():
        seen, _, terminated, _, _ = env.last()
        env.step(None if terminated else rules(seen["observation"], seen["action_mask"]))
    return env.batch.simulator


@pytest.mark.parametrize("make", [ClusterEnv, cluster_v0.raw_env, cluster_v0.parallel_env])
@pytest.mark.parametrize("reservation", ["source", "destination"])
def test_a_dispatcher_that_follows_rules_places_as_the_rules_do(make, reservation):
    scenario = split(transfers={"reservation": reservation}, num_requests=90)
    text = "token-least-load+least-tpot"
    got = play_placed(make(scenario, load=2.0, invalid_action="raise"), text)
    want = placed.make_simulator(scenario.spec, got.episodes)
    placed.run_placed(want, resolve_dispatch(text))
    assert len(set(want.outcomes()["prefill_replica"])) == 3  # two that prefill, and none
    assert len(set(want.outcomes()["replica"])) == 3
    for column in want.outcomes().dtype.names:
        np.testing.assert_allclose(
            got.outcomes()[column], want.outcomes()[column], rtol=1e-12, err_msg=column
        )


def test_a_dispatcher_is_asked_with_the_actions_of_each_of_its_decisions():
    vector = ClusterVectorEnv(num_envs=3, scenario=split(**HOLDS))
    seen, info = vector.reset(seed=0)
    assert set(seen) == {"replicas", "request", "kind", "action_mask"}
    rng, kinds = np.random.default_rng(0), []
    prefill, decode, mixed, extra = [0, 1], [2, 3], [4], [5, 6]
    for _ in range(60):
        for kind, mask in zip(seen["kind"], seen["action_mask"], strict=True):
            kinds.append(int(kind.argmax()))
            want = [*prefill, *mixed, *extra] if kinds[-1] == 0 else [*decode, *mixed]
            assert np.flatnonzero(mask).tolist() == want
        actions = [rng.choice(np.flatnonzero(mask)) for mask in info["action_mask"]]
        seen, *_, info = vector.step(np.array(actions))
    assert 40 < kinds.count(1) < 140


@pytest.mark.parametrize(
    "given", [{"max_waiting": 8}, {"queue_order": "arrival"}, {"allow_none": True}]
)
def test_settings_of_schedulers_are_refused_where_there_are_none(given):
    with pytest.raises(ConfigError, match=r"about the schedulers .* leave it out"):
        ClusterEnv(split(), **given)


def test_shaped_rewards_of_a_fleet_in_which_requests_are_placed_add_up_to_the_plain_ones():
    totals = []
    for shaping in ("none", "cost-to-go"):
        env = ClusterEnv(split(), shaping=shaping)
        env.reset(seed=2)
        start, total, done = float(0), 0.0, False
        if shaping != "none":
            start = float(env.batch._shaping.value[0])
        while not done:
            action = int(np.flatnonzero(env.action_masks())[0])
            _, reward, done, _, _ = env.step(action)
            total += reward
        totals.append(total + start)
    assert totals[0] == pytest.approx(totals[1])


def test_a_picture_shows_roles_and_kv_on_its_way():
    env = ClusterEnv(split(), render_mode="ansi", load=3.0)
    env.reset(seed=0)
    texts, done = [env.render()], False
    while not done:
        action = int(np.flatnonzero(env.action_masks())[0])
        _, _, done, _, _ = env.step(action)
        texts.append(env.render())
    shown = "".join(texts)
    for words in (
        "prefills, ",
        "decodes, ",
        "does all, ",
        "where to decode",
        "will decode on replica",
    ):
        assert words in shown
