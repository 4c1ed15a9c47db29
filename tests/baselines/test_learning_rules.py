"""Rules that learn while serving: how they decide, before and after they have learned."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines.linucb import LinearBandit, linucb
from servegym.baselines.llm_d import llm_d
from servegym.baselines.llm_d_predicted import PredictedLatency, llm_d_predicted
from servegym.baselines.registry import policy
from servegym.errors import ConfigError
from servegym.policy.contract import (
    NUM_REPLICA_FEATURES,
    NUM_REQUEST_FEATURES,
    ReplicaFeature,
    RequestFeature,
)
from servegym.policy.online import Fared
from servegym.policy.policy import Observations
from servegym.serve.loaded_policy import load_policy
from servegym.serve.runtime import RuntimeConfig

MASK = np.array([True, True, True, False, False])
FAR_S = 1e6


def seen(running, *, ttft_slo_s=FAR_S, tpot_slo_s=FAR_S):
    replicas = np.zeros((NUM_REPLICA_FEATURES, 3))
    rows = {
        "prefill_tokens_per_s": 10_000.0,
        "decode_step_s": 0.01,
        "decode_seq_s": 0.001,
        "max_num_seqs": 64.0,
        "num_running": running,
        "outstanding_requests": running,
    }
    for name, value in rows.items():
        replicas[ReplicaFeature[name.upper()]] = value
    request = np.zeros(NUM_REQUEST_FEATURES)
    for name, value in (
        ("prompt_tokens", 100.0),
        ("predicted_output_tokens", 10.0),
        ("ttft_slo_s", ttft_slo_s),
        ("tpot_slo_s", tpot_slo_s),
    ):
        request[RequestFeature[name.upper()]] = value
    return replicas, request


def taught(rule=None, times=lambda running: 0.01 * (1.0 + running)):
    """A learner that has seen times grow with the requests that run."""
    learner = PredictedLatency((rule or llm_d_predicted(quantile=0.5)).params, 0)
    rng = np.random.default_rng(0)
    for _ in range(400):
        running = rng.integers(0, 20, 3).astype(float)
        shown = learner.describe(*seen(running), 1)
        seconds = float(times(running[1]))
        learner.learn_ttft(shown, 10.0 * seconds)
        learner.learn(Fared(shown, seconds, 1.0))
    return learner


def test_before_it_has_learned_it_decides_as_llm_d():
    learner, usual = PredictedLatency(llm_d_predicted().params, 7), llm_d()
    usual.reset(1, 7)
    for running in ([3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]):
        replicas, request = seen(np.array(running))
        shown = Observations(replicas[None], request[None], MASK[None])
        assert learner.decide(replicas, request, MASK) == usual.act(shown, np.zeros(1, int))[0]


def test_without_limits_the_shortest_times_are_chosen():
    learner = taught()
    assert learner.decide(*seen(np.array([15.0, 9.0, 2.0])), MASK) == 2
    assert learner.decide(*seen(np.array([1.0, 9.0, 12.0])), MASK) == 0
    allowed = np.array([False, True, True, False, False])
    assert learner.decide(*seen(np.array([1.0, 9.0, 12.0])), allowed) == 1


def test_of_those_within_limits_one_with_little_to_spare_is_likelier():
    learner = taught(llm_d_predicted(quantile=0.5, explore=0.0))
    counts = np.zeros(3)
    for _ in range(300):
        shown = seen(np.array([18.0, 9.0, 1.0]), ttft_slo_s=1.3, tpot_slo_s=0.13)
        counts[learner.decide(*shown, MASK)] += 1
    assert counts[0] == 0  # over its limits
    assert counts[1] > 270
    spread = taught(llm_d_predicted(quantile=0.5, explore=0.0, least=0.0))
    others = [spread.decide(*shown, MASK) for _ in range(300)]
    assert np.mean(np.array(others) == 2) > 0.9


def test_now_and_then_one_beyond_its_limits_is_tried():
    learner = taught(llm_d_predicted(quantile=0.5, explore=1.0))
    shown = seen(np.array([18.0, 9.0, 1.0]), ttft_slo_s=1.3, tpot_slo_s=0.13)
    assert {learner.decide(*shown, MASK) for _ in range(20)} == {0}


def test_where_all_are_beyond_their_limits_the_shortest_times_are_chosen():
    learner = taught()
    shown = seen(np.array([18.0, 4.0, 12.0]), ttft_slo_s=0.01, tpot_slo_s=0.001)
    assert {learner.decide(*shown, MASK) for _ in range(20)} == {1}


def test_what_has_changed_is_learned_anew():
    learner = taught()
    rng = np.random.default_rng(1)
    for _ in range(2400):  # now those with more to do are faster
        running = rng.integers(0, 20, 3).astype(float)
        shown = learner.describe(*seen(running), 1)
        learner.learn_ttft(shown, 0.2 / (1.0 + running[1]))
        learner.learn(Fared(shown, 0.02 / (1.0 + running[1]), 1.0))
    assert learner.decide(*seen(np.array([1.0, 9.0, 18.0])), MASK) == 2


def test_the_bandit_has_the_weights_of_ridge_regression():
    learner = LinearBandit(linucb(memory=1e9).params, 0)
    rng = np.random.default_rng(0)
    rows, costs = [], []
    for _ in range(60):
        shown = learner.describe(*seen(rng.integers(0, 20, 3).astype(float)), 1)
        e2e_s = float(rng.uniform(0.1, 2.0))
        learner.learn(Fared(shown, 0.01, e2e_s))
        rows.append(shown[:-1])
        costs.append(e2e_s / shown[-1])
    x, y = np.array(rows), np.array(costs)
    prior = np.array([0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    ridge = 20.0 * np.eye(8)
    wanted = np.linalg.solve(x.T @ x + ridge, x.T @ y + ridge @ prior)
    np.testing.assert_allclose(learner._weights, wanted, rtol=1e-5, atol=1e-6)


def test_the_bandit_begins_with_what_is_known_and_learns_what_is_not():
    learner = LinearBandit(linucb(alpha=0.0, price=0.0).params, 0)
    shown = seen(np.array([8.0, 1.0, 4.0]))
    assert learner.decide(*shown, MASK) == 1
    # whoever has requests waiting is slow here, however few run
    shown[0][ReplicaFeature["NUM_WAITING"]] = [0.0, 6.0, 0.0]
    for _ in range(400):
        for r, e2e_s in ((0, 0.2), (1, 3.0), (2, 0.2)):
            learner.learn(Fared(learner.describe(*shown, r), 0.01, e2e_s))
    assert learner.decide(*shown, MASK) != 1


def test_doubt_makes_the_bandit_try_what_it_has_not():
    chosen = []
    for alpha in (0.0, 50.0):
        learner = LinearBandit(linucb(alpha=alpha, price=0.0).params, 0)
        shown = seen(np.array([2.0, 2.0, 3.0]))
        shown[0][ReplicaFeature["KV_CACHE_USAGE"]] = [0.0, 0.0, 0.9]
        for _ in range(200):
            learner.learn(Fared(learner.describe(*shown, 0), 0.01, 0.15))
        chosen.append(learner.decide(*shown, MASK))
    assert chosen[0] in (0, 1)
    assert chosen[1] == 2


@pytest.mark.parametrize("name", ["linucb", "llm-d-predicted"])
def test_learning_rules_can_be_live(name):
    assert load_policy(name, RuntimeConfig()).policy.name == name


@pytest.mark.parametrize(
    "text",
    ["linucb:memory=1", "llm-d-predicted:quantile=1", "llm-d-predicted:explore=2", "linucb:beta=1"],
)
def test_wrong_parameters_are_refused(text):
    with pytest.raises(ConfigError, match="parameter"):
        policy(text)
