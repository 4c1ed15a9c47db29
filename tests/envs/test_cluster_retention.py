"""Schedulers that say what becomes of the KV of ended turns: what they see, may do, and bring."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from pettingzoo.test import (
    api_test,
    max_cycles_test,
    parallel_api_test,
    parallel_seed_test,
    render_test,
    seed_test,
)
from pettingzoo.test.state_test import state_test

from servegym.baselines.registry import policy
from servegym.baselines.retention.registry import retention
from servegym.cluster.identities import private_names
from servegym.cluster.state import DISPATCH, DROP, KEEP, LEAVE, NUM_TIERS, OFFLOAD, RETAIN, STORE
from servegym.envs import cluster_v0
from servegym.envs.cluster import ClusterEnv, ClusterVectorEnv
from servegym.envs.cluster_forms import ClusterParallel
from servegym.envs.retention_kernels import TIER_FEATURES, turn_features
from servegym.envs.sb3 import ClusterVecEnv
from servegym.errors import ConfigError
from servegym.policy.contract import OUTSTANDING_REQUESTS
from servegym.policy.retention import Kept, RetentionRule, Turn
from servegym.policy.run_kept import Turns, make_simulator, run_kept
from servegym.scenario import Scenario, load_scenario

from .test_cluster_agents import quiet

WIDTH = 2
KEEPS = (0.5, 2.0, 8.0, 30.0)
TURN = [feature.name for feature in turn_features(KEEPS)]
TIERS = [feature.name for feature in TIER_FEATURES]
BACK_WITHIN = TURN.index("back_within_0.5_s")
AGENTS = {
    "kind": "agents",
    "rate_rps": 0.6,
    "first_prompt": {"medians_tokens": [900.0], "sigmas": [0.3], "max_tokens": 2000},
    "added": {"medians_tokens": [200.0], "max_tokens": 600},
    "system_prompt_tokens": 256,
    "max_context_tokens": 4096,
    "max_pause_s": 60.0,
}
TIERED = {
    "name": "tiered",
    "engine": {"block_size": 32, "max_num_seqs": 8},
    "fleet": [
        {"gpu": "L4", "num_blocks": 200, "host_kv": {"gib": 0.5, "gb_per_s": 4.0}},
        {"gpu": "L4", "num_blocks": 200, "disk_kv": {"gib": 1.0, "gb_per_s": 2.0}},
    ],
    "kv_store": {"gib": 4.0, "gb_per_s": 8.0, "link_gb_per_s": 1.0, "latency_s": 0.002},
    "kv_tiers": {"interference": 1.5},
    "workload": AGENTS,
    "num_requests": 90,
}


def tiered(**changes) -> Scenario:
    return Scenario.model_validate({**TIERED, **changes})


def ordered(**changes) -> Scenario:
    """Engines with orders, no tiers: what is not kept may be computed anew."""
    fleet = [{"gpu": "L4", "num_blocks": 200, "count": WIDTH, "engine": "vllm-priority"}]
    return Scenario.model_validate(
        {
            **TIERED,
            "name": "ordered",
            "fleet": fleet,
            "kv_store": None,
            "kv_tiers": {},
            "workload": {**AGENTS, "rate_rps": 2.0},
            **changes,
        }
    )


def by_chance(back_within: list[float], tokens: float, share: float) -> int:
    """Choose the time that pays most, or offload: by-tool with what a scheduler sees."""
    worth = [
        chance * tokens * 1e-4 - 0.3 * share * s
        for chance, s in zip(back_within, KEEPS, strict=True)
    ]
    best = int(np.argmax(np.round(worth, 6)))
    return KEEP + best if worth[best] > 1e-6 else OFFLOAD


def chance_rule() -> RetentionRule:
    """The same as a rule that is told all gaps."""

    def retain(turn: Turn) -> tuple[int, float]:
        within = [0.0 if not len(turn.gaps_s) else (turn.gaps_s <= s).mean() for s in KEEPS]
        answer = by_chance(within, turn.kept_tokens, turn.kv_share)
        return (KEEP, KEEPS[answer - KEEP]) if answer >= KEEP else (answer, 0.0)

    return RetentionRule("by-chance", "predictive", retain)


class Agent:
    """Least outstanding requests, and a rule for ended turns, from what agents see."""

    def __init__(self, rule: str) -> None:
        self.rule = rule

    def dispatch(self, replicas: np.ndarray, mask: np.ndarray) -> int:
        load = np.where(mask[:WIDTH] == 1, replicas[:, OUTSTANDING_REQUESTS], np.inf)
        return int(load.argmin())

    def retain(self, turn: np.ndarray, mask: np.ndarray) -> int:
        assert mask.tolist() == [1] * (KEEP + len(KEEPS))
        if self.rule == "lru":
            return OFFLOAD
        if self.rule == "ttl":
            return KEEP + KEEPS.index(8.0)
        seen = dict(zip(TURN, turn.tolist(), strict=True))
        within = turn[BACK_WITHIN:].tolist()
        return by_chance(within, seen["kept_tokens"], seen["kept_share"])


def play(env, agent: Agent):
    """Play an episode, whatever the form; return the simulator that did."""
    columns = len(env.unwrapped.batch.shown)
    cut = WIDTH * columns
    if isinstance(env, ClusterEnv):
        seen, info = env.reset(seed=0)
        done = False
        while not done:
            mask = info["action_mask"]
            if seen["kind"][1]:
                action = WIDTH + agent.retain(seen["turn"], mask[WIDTH:])
            else:
                action = agent.dispatch(seen["replicas"], mask)
            seen, _, done, _, info = env.step(action)
        return env.batch.simulator

    def choose(name: str, own: dict) -> int:
        if name == "dispatcher_0":
            return agent.dispatch(own["observation"][:cut].reshape(WIDTH, -1), own["action_mask"])
        assert own["observation"][-1] == 1.0  # it is asked about a turn
        answers = own["action_mask"][: KEEP + len(KEEPS)]
        return agent.retain(own["observation"][: len(TURN)], answers)

    if isinstance(env, ClusterParallel):
        seen, infos = env.reset(seed=0)
        while env.agents:
            asked = next(name for name in env.agents if infos[name]["is_asked"])
            seen, _, _, _, infos = env.step({asked: choose(asked, seen[asked])})
        return env.batch.simulator
    env.reset(seed=0)
    for name in env.agent_iter():
        seen, _, terminated, _, _ = env.last()
        env.step(None if terminated else choose(name, seen))
    return env.batch.simulator


RULES = {
    "lru": retention("lru"),
    "ttl": retention("ttl:seconds=8"),
    "by-chance": chance_rule(),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [ClusterEnv, cluster_v0.raw_env, cluster_v0.parallel_env])
def test_agents_that_follow_rules_play_as_dispatch_and_retention_do(make, rule):
    scenario = tiered()
    got = play(make(scenario, keep_s=KEEPS, invalid_action="raise"), Agent(rule))
    want = make_simulator(scenario.spec, got.episodes)
    run_kept(want, Kept(policy("least-outstanding"), RULES[rule], "both"))
    outcomes = want.outcomes()
    assert outcomes["moved_bytes"].sum() > 0
    assert outcomes["stored_bytes"].sum() > 0
    for column in outcomes.dtype.names:
        np.testing.assert_allclose(
            got.outcomes()[column], outcomes[column], rtol=1e-12, err_msg=column
        )


def copies(sim, r: int, request: int) -> list[float]:
    """Look for the blocks of a turn in all tiers, one after the other."""
    q, state, size = sim.state.request[0, request], sim.state, sim.spec.block_size
    segments = sim.state.segment[0, q["segment_first"] : q["segment_stop"]]
    own = private_names(request)
    found = []
    for tier in range(NUM_TIERS):
        blocks = state.store_block[0] if tier == STORE else state.tier_block[0, r, tier]
        count = state.tier[0, r, tier]["num_blocks"]
        held = set(
            blocks["identity"][: state.env[0]["store_num_blocks"] if tier == STORE else count]
        )
        there = 0
        for j in range(int(q["table_len"])):
            names = segments["first_name"][segments["end"] > (j + 1) * size - 1]
            there += (int(names[0]) if len(names) else own) + j in held
        found.append(there / int(q["table_len"]))
    return found


def test_a_scheduler_sees_what_rules_are_told_and_where_the_kv_is():
    scenario = tiered()
    env = ClusterEnv(scenario, keep_s=KEEPS)
    seen, info = env.reset(seed=1)
    sim, rng = env.batch.simulator, np.random.default_rng(0)
    turns, table = Turns(sim), sim.episodes[0].table
    done, most_gaps, most_copies, full = False, 0, np.zeros(NUM_TIERS), 0.0
    while not done:
        state = sim.state.env[0]
        if state["decision"] == RETAIN:
            request, r, now_s = int(state["deciding"]), int(state["asking"]), float(state["now_s"])
            told = turns.due(0, tell=False)
            got = dict(zip(TURN, seen["turn"].tolist(), strict=True))
            assert got["kept_tokens"] == told.kept_tokens > 0
            assert got["kept_share"] == pytest.approx(told.kv_share)
            kind, steps_s = sim.spec.types[sim.episodes[0].type_idx[r]], 0.0
            for begin in range(0, told.kept_tokens, kind.max_num_batched_tokens):
                chunk = min(kind.max_num_batched_tokens, told.kept_tokens - begin)
                steps_s += kind.grid.step_s([(chunk, begin)])
            assert got["recompute_s"] == pytest.approx(steps_s, rel=1e-5)
            shares = [got["in_host"], got["in_disk"], got["in_store"]]
            np.testing.assert_allclose(shares, copies(sim, r, request), rtol=1e-6)
            most_copies = np.maximum(most_copies, shares)
            done_s = sim.state.request[0, request]["arrival_s"]
            assert got["latency_s"] == pytest.approx(now_s - done_s, rel=1e-5)
            assert got["prompt_tokens"] == table.prompt_tokens[request]
            assert got["output_tokens"] == table.output_tokens[request]
            assert got["cached_tokens"] == sim.state.request[0, request]["cached"]
            chain = [request]
            while table.after[chain[-1]] >= 0:
                chain.append(int(table.after[chain[-1]]))
            assert got["num_turns"] == len(chain)
            begin_s = float(sim.state.request[0, chain[-1]]["arrival_s"])
            assert got["session_s"] == pytest.approx(now_s - begin_s, rel=1e-5)
            assert got["tool"] == told.tool
            assert got["num_gaps"] == len(told.gaps_s)
            if len(told.gaps_s):
                logs = np.log(np.maximum(told.gaps_s, 1e-3))
                assert got["typical_gap_s"] == pytest.approx(math.exp(logs.mean()), rel=1e-5)
                assert got["gap_spread"] == pytest.approx(logs.std(), abs=1e-3)
                within = [(told.gaps_s <= s).mean() for s in KEEPS]
                np.testing.assert_allclose(seen["turn"][BACK_WITHIN:], within, rtol=1e-6)
            most_gaps = max(most_gaps, len(told.gaps_s))
            own = dict(zip(TIERS, seen["tiers"].tolist(), strict=True))
            v, blocks = sim.state.replica[0, r], sim.state.block[0, r][:-1]
            kept = (blocks["holders"] == 0) & (blocks["keepers"] > 0)
            assert own["retained_blocks"] == kept.sum() > 0
            assert own["num_running"] == v["num_running"]
            assert own["num_waiting"] == v["num_waiting"]
            assert own["num_coming"] == sim.state.link[0, r]["num_remote"]
            assert own["host_fill"] == 0.0 or r == 0
            assert own["disk_fill"] == 0.0 or r == 1
            full = max(full, own["host_fill"])
        mask = info["action_mask"]
        seen, _, done, _, info = env.step(int(rng.choice(np.flatnonzero(mask))))
    assert most_gaps > 5
    assert (most_copies > 0.5).all()
    assert full == 1.0


@pytest.mark.parametrize("make", [tiered, ordered])
def test_schedulers_that_act_at_random_leave_nobody_behind(make):
    retains = {"retention": True, "max_waiting": 8} if make is ordered else {}
    vector = ClusterVectorEnv(num_envs=3, scenario=make(num_requests=40), keep_s=KEEPS, **retains)
    seen, info = vector.reset(seed=0)
    kinds = np.zeros(4 if retains else 2, int)
    assert seen["kind"].shape == (3, len(kinds))  # to dispatch, (admit, preempt,) retain
    assert seen["agent"].shape == (3, 1 + WIDTH)
    assert seen["turn"].shape == (3, len(TURN))
    rng, first, ends = np.random.default_rng(0), vector.batch.first_answer, 0
    for _ in range(900):
        kinds += seen["kind"].sum(0)
        for i, mask in enumerate(info["action_mask"]):
            retains_now = seen["kind"][i, -1] == 1
            assert mask.any()
            assert mask[:first].any() != retains_now
            assert mask[first:].any() == retains_now
            assert (mask[first + OFFLOAD] == 1) == (retains_now and make is tiered)
            assert seen["turn"][i].any() == retains_now
            assert seen["tiers"][i].any() == retains_now
            assert not retains_now or seen["agent"][i, 1:].any()
        actions = [rng.choice(np.flatnonzero(mask)) for mask in info["action_mask"]]
        seen, _, ended, _, info = vector.step(np.array(actions))
        ends += ended.sum()
    assert (kinds > 20).all()
    assert ends > 3


def test_the_rule_of_the_warm_up_offloads_or_keeps_as_the_engine_would():
    plain, keeping = tiered(), tiered(engine={**TIERED["engine"], "retain_kv_s": 7.0})
    for scenario, answer in ((plain, OFFLOAD), (keeping, KEEP + 2)):
        env = ClusterEnv(scenario, keep_s=KEEPS, warmup=20)
        env.reset(seed=0)
        state = env.batch.simulator.state.env
        assert state["num_arrived"][0] > 20
        while state["decision"][0] != RETAIN:
            env.step(env.batch.stand_in(0))
        assert env.batch.stand_in(0) == env.batch.first_answer + answer
    env = ClusterEnv(ordered(), retention=True)
    env.reset(seed=0)
    while env.batch.simulator.state.env["decision"][0] != RETAIN:
        env.step(env.batch.stand_in(0))
    assert env.batch.stand_in(0) == env.batch.first_answer + LEAVE


def test_a_longer_episode_with_more_tools_finds_room():
    small, large = tiered(num_requests=20), tiered()
    env = ClusterVectorEnv(num_envs=2, scenario=small, keep_s=KEEPS)
    env.reset(seed=0)
    turns = env.batch._output.turns
    short = turns.tool.shape[1]
    env.batch.reset(np.array([1]), [large.episode(3)])
    grown = env.batch._output.turns
    assert grown.tool.shape[1] >= 90 > short
    np.testing.assert_array_equal(grown.tool[0, :short], turns.tool[0])
    np.testing.assert_array_equal(grown.number[0, :short], turns.number[0])
    assert grown.number[1].max() > 3


SETTINGS = [
    pytest.param({"scenario": "agents-tiers", "num_requests": 30}, id="agents-tiers"),
    pytest.param({"scenario": tiered(), "rewards": "class", "num_requests": 40}, id="tiered"),
    pytest.param(
        {
            "scenario": ordered(),
            "retention": True,
            "max_waiting": 4,
            "allow_none": True,
            "normalise": True,
            "num_requests": 40,
        },
        id="ordered",
    ),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_pettingzoos_own_tests_pass(settings):
    with quiet():
        api_test(cluster_v0.env(**settings), num_cycles=60)
        parallel_api_test(cluster_v0.parallel_env(**settings), num_cycles=60)
        seed_test(lambda: cluster_v0.env(**settings), num_cycles=30)
        parallel_seed_test(lambda: cluster_v0.parallel_env(**settings), num_cycles=30)
        render_test(lambda render_mode: cluster_v0.env(render_mode=render_mode, **settings))
        state_test(cluster_v0.env(**settings), cluster_v0.parallel_env(**settings), num_cycles=30)
    env = cluster_v0.raw_env(**settings)
    width = env.batch.num_replicas
    assert env.possible_agents == ["dispatcher_0", *(f"scheduler_{r}" for r in range(width))]


def test_pettingzoos_test_of_cycles_passes():
    settings = {"scenario": tiered(), "load": 3.0}  # so that every agent is asked often enough
    module = SimpleNamespace(
        env=functools.partial(cluster_v0.env, **settings),
        parallel_env=functools.partial(cluster_v0.parallel_env, **settings),
    )
    max_cycles_test(module)


@pytest.mark.filterwarnings("ignore:.*(not within the observation|not recommended).*")
def test_gymnasiums_own_check_passes_on_agents_with_tiers():
    env = gymnasium.make("servegym/Cluster-v0", scenario="agents-tiers", num_requests=40)
    check_env(env.unwrapped, skip_render_check=True)
    shaped = gymnasium.make("servegym/ClusterShaped-v0", scenario="agents-tiers", num_requests=40)
    check_env(shaped.unwrapped, skip_render_check=True)


def test_the_batch_of_sb3_is_that_of_gymnasium():
    theirs = ClusterVecEnv(3, "agents-tiers", num_requests=60, flat=True)
    ours = ClusterVectorEnv(3, "agents-tiers", num_requests=60, flat=True)
    theirs.seed(5)
    got, (want, _) = theirs.reset(), ours.reset(seed=[5, 6, 7])
    rng, asked = np.random.default_rng(0), 0
    for _ in range(80):
        np.testing.assert_array_equal(got, want)
        masks = np.array(theirs.env_method("action_masks"))
        asked += int(masks[:, ours.batch.first_answer :].any(1).sum())
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
        got, *_ = theirs.step(actions)
        want, *_ = ours.step(actions)
    assert asked > 30


@pytest.mark.parametrize("rewards", ["shared", "team", "class"])
def test_schedulers_earn_what_the_fleet_does_or_their_part(rewards):
    env = cluster_v0.parallel_env(tiered(), rewards=rewards)
    seen, infos = env.reset(seed=0)
    totals = dict.fromkeys(env.possible_agents, 0.0)
    rng = np.random.default_rng(0)
    while env.agents:
        asked = next(name for name in env.agents if infos[name]["is_asked"])
        action = int(rng.choice(np.flatnonzero(seen[asked]["action_mask"])))
        seen, earned, _, _, infos = env.step({asked: action})
        for name, more in earned.items():
            totals[name] += more
    done = env.batch.simulator.outcomes()
    fleet = -(done["finish_s"] - done["arrival_s"]).sum()
    schedulers = [totals[f"scheduler_{r}"] for r in range(WIDTH)]
    if rewards == "class":
        assert sum(schedulers) == pytest.approx(fleet)
        assert max(schedulers) < 0.0
    for total in totals.values() if rewards != "class" else [totals["dispatcher_0"]]:
        assert total == pytest.approx(fleet / (3 if rewards == "team" else 1))


def test_pictures_show_the_tiers_and_what_became_of_turns():
    env = ClusterEnv(tiered(), keep_s=KEEPS, render_mode="ansi")
    picture = ClusterEnv(tiered(), keep_s=KEEPS, render_mode="rgb_array")
    env.reset(seed=0)
    picture.reset(seed=0)
    texts, shapes, rng, done = [], set(), np.random.default_rng(0), False
    while not done:
        action = int(rng.choice(np.flatnonzero(env.action_masks())))
        _, _, done, _, _ = env.step(action)
        picture.step(action)
        texts.append(env.render())
        if len(texts) % 20 == 0 or done:
            shapes.add(picture.render().shape)
    shown = "".join(texts)
    for words in (
        "what becomes of",
        "was dropped",
        "was left",
        "was offloaded",
        "was kept for 8 s",
        "host 100%",
        "disk ",
        "% full",
        "KV moves",
    ):
        assert words in shown
    assert len(shapes) == 1


def test_what_is_not_asked_is_not_answered():
    off = Scenario.model_validate(
        {**TIERED, "kv_store": None, "kv_tiers": {}, "fleet": [{"gpu": "L4", "count": 2}]}
    )
    env = ClusterEnv(off, retention=True)
    assert env.batch.num_answers == KEEP + 6
    env.reset(seed=0)
    assert env.batch.simulator.state.env["decision"][0] == DISPATCH
    assert DROP == 0
    for scenario, settings, words in (
        (off, {}, "or with tiers of KV, as agents-tiers has; or give retention=True"),
        (tiered(), {"retention": False}, "must have a fleet of two replicas or more"),
        (tiered(), {"max_waiting": 8}, "max_waiting is about the schedulers of engines with ord"),
        (tiered(), {"keep_s": ()}, "keep_s must be one or more times in seconds, above 0"),
        (tiered(), {"keep_s": (3.0, 1.0)}, r"ascending, got \(3.0, 1.0\)"),
        (tiered(), {"keep_s": (0.0, 1.0)}, "above 0"),
        (tiered(), {"keep_s": (1.0, math.inf)}, "finite"),
        ("kv-starved-fleet", {"keep_s": (1.0,)}, "here nobody is asked: leave it out, or give"),
        ("kv-starved-fleet", {"retention": True}, "prefix cache, which is off: turn it on"),
        ("pd-equal", {"retention": True}, "do not go together yet: leave it out, or take"),
        ("near-full-kv", {"retention": True}, "do not go together yet: leave it out, or take"),
    ):
        with pytest.raises(ConfigError, match=words):
            ClusterEnv(scenario, **settings)
    assert load_scenario("agents-tiers").spec.tiered
