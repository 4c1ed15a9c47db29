"""Policies that learn while they serve: what they are told, in the simulator and live."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines.registry import policy
from servegym.cluster.simulator import Simulator
from servegym.cluster.state import EV_ARRIVE, EV_FINISH, EV_FIRST_TOKEN
from servegym.errors import ConfigError
from servegym.export.resolve import resolve_dispatch
from servegym.policy.contract import Group, ReplicaFeature, RequestFeature
from servegym.policy.online import Fared, Learner, OnlinePolicy
from servegym.policy.policy import Observations
from servegym.policy.run import run
from servegym.problems.registry import find_problem
from servegym.scenario import load_scenario
from servegym.serve.dispatcher import DispatchConfig, Dispatcher
from servegym.serve.runtime import RuntimeConfig
from servegym.serve.state import EngineMetrics
from servegym.serve.ties import TieBreaker


class Listener(Learner):
    """Goes round, and writes down what it is told."""

    def __init__(self) -> None:
        self.turn = 0
        self.told: list[Fared] = []
        self.first: list[tuple[float, float]] = []

    def decide(self, replicas, request, mask):
        allowed = np.flatnonzero(mask[:-2])
        self.turn += 1
        return int(allowed[self.turn % len(allowed)])

    def describe(self, replicas, request, r):
        return np.array([request[RequestFeature["PROMPT_TOKENS"]], r])

    def learn_ttft(self, seen, ttft_s):
        self.first.append((seen[0], ttft_s))

    def learn(self, fared):
        self.told.append(fared)


def listening() -> tuple[OnlinePolicy, list[Listener]]:
    made: list[Listener] = []

    def make(params, seed):
        made.append(Listener())
        return made[-1]

    return OnlinePolicy("listening", "metric", Group.COUNTERS, make, np.zeros(0), ()), made


@pytest.mark.parametrize("name", ["mixed-chat", "failures"])
def test_each_request_that_ends_is_told_once_in_order_with_its_times(name):
    scenario = load_scenario(name)
    episodes = [scenario.episode(seed, num_requests=150) for seed in range(2)]
    simulator, (policy_, made) = Simulator(scenario.spec, episodes), listening()
    run(simulator, policy_)
    assert len(made) == 2
    for env, learner in enumerate(made):
        ends = simulator.outcomes(env)
        last_arrival_s = np.nanmax(ends["arrival_s"])
        known = ends[ends["finish_s"] < last_arrival_s]
        known = known[np.argsort(known["finish_s"], kind="stable")]
        assert len(known) > 30
        assert len(learner.told) >= len(known)
        told = learner.told[: len(known)]
        np.testing.assert_array_equal([x.seen[0] for x in told], known["prompt_tokens"])
        np.testing.assert_array_equal([x.seen[1] for x in told], known["replica"])
        once = known["num_restarts"] == 0  # others were decided about again
        e2e_s = np.array([x.e2e_s for x in told])
        np.testing.assert_allclose(
            e2e_s[once], (known["finish_s"] - known["arrival_s"])[once], atol=1e-9
        )
        first = ends[(ends["first_token_s"] < last_arrival_s) & (ends["num_restarts"] == 0)]
        first = first[np.argsort(first["first_token_s"], kind="stable")]
        assert len(first) > 30
        wanted = {
            (float(x["prompt_tokens"]), round(float(x["first_token_s"] - x["arrival_s"]), 9))
            for x in first
        }
        got = [(prompt, round(ttft_s, 9)) for prompt, ttft_s in learner.first]
        assert wanted <= set(got)
        assert len(got) <= np.count_nonzero(~np.isnan(ends["first_token_s"]))
        tokens = known["output_tokens"]
        np.testing.assert_allclose(
            [x.tpot_s for x in told],
            np.where(
                tokens > 1,
                (known["finish_s"] - known["first_token_s"]) / np.maximum(tokens - 1, 1),
                np.nan,
            ),
        )


@pytest.mark.parametrize("name", ["linucb", "llm-d-predicted:typed=1"])
def test_everything_is_forgotten_between_episodes(name):
    scenario = load_scenario("azure-conv-fit")
    episodes = [scenario.episode(seed, num_requests=300) for seed in (0, 1)]
    found, learning = [], policy(name)
    for batch in (episodes, episodes, episodes[:1]):
        simulator = Simulator(scenario.spec, batch)
        run(simulator, learning, seed=4)
        found.append(simulator.outcomes(0)["replica"])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])  # nor do environments learn from each other


def test_what_comes_before_the_decision_or_from_nobody_is_not_learned():
    policy_, made = listening()
    policy_.reset(1, 0)
    (learner,) = made
    replicas, request = np.ones((40, 2)), np.ones(11)
    policy_.chosen(0, "a", replicas, request, 1, 10.0)
    policy_.ended(0, "unknown", first_token_s=1.0, finish_s=2.0, tokens=5)
    policy_.first_token(0, "unknown", 11.0)
    policy_.first_token(0, "a", 11.0)
    policy_.ended(0, "a", first_token_s=9.0, finish_s=12.0, tokens=4)
    policy_.ended(0, "a", first_token_s=9.0, finish_s=12.0, tokens=4)
    policy_.chosen(0, "b", replicas, request, 1, 10.0)
    policy_.gone(0, "b")
    policy_.ended(0, "b", first_token_s=11.0, finish_s=12.0, tokens=1)
    (fared,) = learner.told
    assert learner.first == [(1.0, 1.0)]
    assert (fared.tpot_s, fared.e2e_s) == (1.0, 2.0)


def test_what_no_replica_may_have_is_held_or_rejected():
    policy_ = policy("linucb")
    policy_.reset(1, 0)
    for mask, action in (([0, 0, 1, 1], 2), ([0, 0, 0, 1], 3)):
        seen = Observations(np.ones((1, 40, 2)), np.ones((1, 11)), np.array([mask], bool))
        assert policy_.act(seen, np.zeros(1, np.int64)).tolist() == [action]


def test_it_is_a_rule_that_decides_alone():
    assert not find_problem("dispatch").is_learned(policy("linucb"))
    with pytest.raises(ConfigError, match="learns from ended requests"):
        resolve_dispatch("linucb+footprint")


class Recorded:
    """A policy, and the observations it decided by."""

    def __init__(self, inner: OnlinePolicy) -> None:
        self.seen: list[Observations] = []
        act = inner.act

        def recorded(observations, env_ids):
            self.seen.append(Observations(*(array.copy() for array in observations)))
            return act(observations, env_ids)

        inner.act = recorded  # type: ignore[method-assign]


@pytest.mark.parametrize("name", ["linucb", "llm-d-predicted:typed=1"])
def test_a_live_dispatcher_decides_as_the_simulator_does(name, monkeypatch):
    """The same events in the same order, through the dispatcher of a router."""
    scenario = load_scenario("azure-conv-fit")
    episode = scenario.episode(3, num_requests=260)
    simulator, learning = Simulator(scenario.spec, [episode], record=True), policy(name)
    recorded = Recorded(learning)
    run(simulator, learning)
    wanted = simulator.outcomes(0)["replica"]

    def in_place(self, observations, *, in_turn):
        return observations, np.arange(observations.mask.shape[1])

    monkeypatch.setattr(TieBreaker, "show", in_place)
    facts = simulator.state.observation[0, 8:15].copy()
    now = [0.0]
    dispatcher = Dispatcher(
        DispatchConfig(
            runtime=RuntimeConfig(policy=name, timeout_s=60.0),
            slo_classes=[
                {"name": x.name, "ttft_s": x.ttft_s, "tpot_s": x.tpot_s}
                for x in scenario.slo_classes
            ],
        ),
        [f"replica {r}" for r in range(facts.shape[1])],
        facts,
        clock=lambda: now[0],
    )
    table, decisions = episode.table, iter(recorded.seen)
    jobs, chosen = {}, np.full(len(wanted), -1)
    for event in simulator.events():
        i, now[0] = int(event["request"]), float(event["time_s"])
        if event["kind"] == EV_ARRIVE:
            seen = next(decisions).replicas[0]
            monkeypatch.setattr(
                dispatcher.predictor, "predict", lambda *_, i=i: table.predicted_output_tokens[i]
            )
            hits = seen[ReplicaFeature["PREFIX_HIT_TOKENS"]]
            monkeypatch.setattr(dispatcher, "hits", lambda job, hits=hits: hits)
            for r in range(facts.shape[1]):
                rows = ("NUM_RUNNING", "NUM_WAITING", "KV_CACHE_USAGE", "GENERATED_TOKENS")
                metrics = EngineMetrics(*(float(seen[ReplicaFeature[row], r]) for row in rows))
                dispatcher.update_metrics(r, metrics, now[0])
            jobs[i] = dispatcher.arrive(
                [1] * int(table.prompt_tokens[i]), key=str(i), slo_class=int(table.slo_class[i])
            )
            chosen[i] = dispatcher.decide(jobs[i]).action
        elif event["kind"] == EV_FIRST_TOKEN:
            dispatcher.first_token(jobs[i])
        elif event["kind"] == EV_FINISH:
            dispatcher.finish(jobs[i], int(table.output_tokens[i]))
    assert len(set(wanted)) > 2
    np.testing.assert_array_equal(chosen, wanted)
