"""Estimates from logs: by hand, from a dispatcher's own log, and against the simulator's truth."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from servegym.baselines.registry import policy
from servegym.cli import main
from servegym.errors import ConfigError, WorkloadError
from servegym.policy.contract import (
    NUM_OBSERVED_FEATURES,
    NUM_OBSERVED_REQUEST_FEATURES,
    OUTSTANDING_REQUESTS,
    TPOT_SLO_S,
    TTFT_SLO_S,
    UP,
)
from servegym.replay.dataset import OfflineDataset, read_dataset
from servegym.replay.off_policy import estimate, outcomes
from servegym.serve.decision_log import DecisionLogConfig
from servegym.serve.dispatcher import DispatchConfig, Dispatcher
from servegym.serve.facts import Rates, fleet_facts
from servegym.serve.runtime import RuntimeConfig

LOGS = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "off_policy.py"))["Logs"]


def dataset(action, propensity, e2e_s, **changes) -> OfflineDataset:
    """Decisions between two replicas of which the first is always the emptier one."""
    count = len(action)
    replicas = np.zeros((count, NUM_OBSERVED_FEATURES, 2), np.float32)
    replicas[:, UP] = 1.0
    replicas[:, OUTSTANDING_REQUESTS, 1] = 5.0
    request = np.ones((count, NUM_OBSERVED_REQUEST_FEATURES), np.float32)
    mask = np.array([[True, True, False, False]] * count)
    number, yes = np.arange(count), np.ones(count, np.bool_)
    columns = {
        "replicas": replicas,
        "request": request,
        "mask": mask,
        "action": np.array(action),
        "proposed": np.array(action),
        "propensity": np.array(propensity),
        "by_policy": yes,
        "request_id": number,
        "is_last": yes,
        "time_s": number.astype(float),
        "status": np.zeros(count, np.int64),
        "ttft_s": np.full(count, 0.1),
        "tpot_s": np.full(count, 0.1),
        "e2e_s": np.array(e2e_s),
        "output_tokens": np.full(count, 10),
        "num_skipped": 0,
    }
    return OfflineDataset(**{**columns, **changes})


def test_what_was_unlikely_counts_the_more():
    # the first replica, which the rule takes, with weights 1.25 and 5; the second with weight 0
    data = dataset([0, 0, 1] * 50, [0.8, 0.2, 0.8] * 50, [1.0, 2.0, 9.0] * 50)
    found = estimate(data, policy("least-outstanding"))
    assert found.logged.value == pytest.approx(4.0)
    assert found.sampled.value == pytest.approx((1.25 * 1.0 + 5.0 * 2.0) / 6.25)
    assert found.agreed == pytest.approx(2 / 3)
    assert found.effective == pytest.approx(50 * 6.25**2 / (1.25**2 + 5.0**2))
    assert found.sampled.low == pytest.approx(1.8)  # every stretch says the same
    assert found.num_requests == 150


def test_a_right_regression_needs_no_draws():
    # what a choice brings is told by the replica's outstanding requests alone
    rng = np.random.default_rng(0)
    action = rng.integers(0, 2, 400)
    e2e_s = np.where(action == 0, 1.0, 3.0)
    found = estimate(dataset(action, [0.5] * 400, e2e_s), policy("least-outstanding"))
    assert found.robust.value == pytest.approx(1.0, abs=0.02)
    assert found.robust.low <= 1.0 <= found.robust.high


def test_all_decisions_of_a_request_must_be_the_policys():
    # of each pair of rows, the request's hold and dispatch, the first has the weight 2
    held = dataset(
        [0, 0, 0, 1] * 40,
        [0.5, 1.0, 0.5, 1.0] * 40,
        [1.0, 1.0, 7.0, 7.0] * 40,
        request_id=np.arange(160) // 2,
        is_last=np.array([False, True] * 80),
    )
    assert estimate(held, policy("least-outstanding")).sampled.value == pytest.approx(1.0)


def test_requests_without_a_known_probability_or_an_outcome_are_left_out():
    propensity = [0.5] * 100 + [np.nan] * 20
    status = np.array([0] * 90 + [2] * 10 + [0] * 20)  # cancelled
    data = dataset([0] * 120, propensity, [1.0] * 90 + [99.0] * 30, status=status)
    found = estimate(data, policy("least-outstanding"))
    assert (found.num_requests, found.num_left_out) == (90, 30)
    assert found.sampled.value == pytest.approx(1.0)


def test_a_share_in_time_counts_those_that_failed():
    request = np.ones((6, NUM_OBSERVED_REQUEST_FEATURES), np.float32)
    request[:, TTFT_SLO_S], request[:, TPOT_SLO_S] = 0.5, 0.2
    data = dataset(
        [0] * 6,
        [0.5] * 6,
        [1.0] * 6,
        request=request,
        status=np.array([0, 0, 0, 0, 3, 2]),  # the last two failed, and were cancelled
        ttft_s=np.array([0.4, 0.6, 0.4, 0.4, np.nan, np.nan]),
        tpot_s=np.array([0.1, 0.1, 0.3, np.nan, np.nan, np.nan]),  # the fourth has one token
    )
    np.testing.assert_array_equal(outcomes(data, "in-time"), [1, 0, 0, 1, 0, np.nan])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("round-robin", "goes by what it did before"),
        ("mct-oracle", "needs more than a decision log keeps"),
        ("added-delay-inferred", "needs more than a decision log keeps"),
        ("what-if", "needs more than a decision log keeps"),
    ],
)
def test_policies_that_a_log_cannot_judge_are_refused(name, said):
    data = dataset([0] * 60, [0.5] * 60, [1.0] * 60)
    with pytest.raises(ConfigError, match=said):
        estimate(data, policy(name))


def test_too_few_draws_are_refused():
    with pytest.raises(WorkloadError, match=r"0 of 60 requests were drawn .* set `explored`"):
        estimate(dataset([0] * 60, [np.nan] * 60, [1.0] * 60), policy("least-outstanding"))


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_dispatcher_that_explores_logs_how_likely_its_choices_were(tmp_path, capsys, form):
    now = [100.0]
    config = DispatchConfig(
        runtime=RuntimeConfig(policy="least-outstanding", explored=0.4),
        log=DecisionLogConfig(folder=tmp_path, format=form, observations=True),
        seed=0,
    )
    facts = fleet_facts([Rates(prefill_tokens_per_s=1000.0, decode_step_s=0.01)] * 2)
    dispatcher = Dispatcher(config, ["fast", "slow"], facts, lambda: now[0])
    for i in range(200):
        job = dispatcher.arrive("some words", key=str(i))
        decision = dispatcher.decide(job)
        now[0] += 1.0 if decision.action == 0 else 3.0
        dispatcher.first_token(job)
        dispatcher.finish(job, 5)
    dispatcher.close()
    data = read_dataset([tmp_path])
    assert set(np.round(data.propensity, 6)) == {0.2, 0.8}
    # all is idle at each decision: the rule takes the first, the router either of them
    found = estimate(data, policy("least-outstanding"))
    assert found.sampled.value == pytest.approx(1.0)
    assert found.logged.value == pytest.approx(2.0, abs=0.2)
    main(["estimate", str(tmp_path), "--policies", "least-outstanding"])
    said = capsys.readouterr().out
    assert "least-outstanding" in said
    assert "1 [1, 1]" in said


@pytest.mark.slow
def test_intervals_cover_what_the_policy_really_brings(tmp_path):
    """Load is light, so that choices hardly change what later requests meet."""
    logs = LOGS(tmp_path, load=0.02, num_requests=300)
    truth_s = np.mean([logs.draw("added-delay", 10_000 + k).e2e_s.mean() for k in range(30)])
    covered = []
    for k in range(30):
        found = estimate(logs.draw("least-outstanding", k, 0.5), policy("added-delay"))
        covered.append([x.low <= truth_s <= x.high for x in (found.sampled, found.robust)])
        assert found.logged.low > truth_s  # what was logged is another policy's
    assert (np.mean(covered, axis=0) >= 0.9).all()
