"""Clients that wait for their answers: who sends when, and the laws of closed loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import yaml

from servegym.cluster.simulator import Simulator
from servegym.cluster.state import NEVER, Asks
from servegym.errors import ConfigError
from servegym.scenario import parse_scenario
from servegym.workloads.clients import ClientsConfig
from servegym.workloads.table import ANY_END, BY_ITSELF


def table(num=2000, seed=0, load=1.0, shares=(1.0,), **settings):
    config = ClientsConfig(**{"count": 8, "think_s": 2.0, **settings})
    rng = np.random.default_rng(seed)
    return config.table(rng, num_requests=num, load=load, class_shares=shares)


def scenario(num_requests=120, **workload):
    data = {
        "name": "tiny",
        "fleet": [{"gpu": "L40S", "count": 2}],
        "workload": {"kind": "clients", "count": 8, "think_s": 2.0, **workload},
        "num_requests": num_requests,
    }
    return parse_scenario(yaml.safe_dump(data), "tiny.yaml")


def play(played, **options):
    episode = played.episode(0, **options)
    sim = Simulator(played.spec, [episode], asks=Asks(dispatch=NEVER))
    sim.advance()
    return episode.table, sim.outcomes()


def test_the_first_requests_come_by_themselves_and_the_others_after_ends():
    clients = table()
    assert (clients.after[:8] == BY_ITSELF).all()
    assert (clients.after[8:] == ANY_END).all()
    assert (clients.delay_s[:8] == 0).all()


@pytest.mark.parametrize(
    ("load", "clients"), [(1.0, 8), (0.5, 4), (2.0, 16), (0.3, 2), (0.01, 1), (1e9, 2000)]
)
def test_load_multiplies_the_clients_and_leaves_their_requests(load, clients):
    one, other = table(), table(load=load)
    assert (other.after == BY_ITSELF).sum() == clients
    for name in ("prompt_tokens", "output_tokens", "tenant"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 2.0])
def test_thinking_has_the_mean_and_variation_asked_for(cv):
    delay_s = table(20_000, think_cv=cv).delay_s[8:]
    # 20,000 draws: standard errors of the mean of at most 2 * cv / 141
    assert delay_s.mean() == pytest.approx(2.0, abs=0.001 + 0.08 * cv)
    assert delay_s.std() / delay_s.mean() == pytest.approx(cv, rel=0.06)


def test_clients_begin_within_their_first_thinking():
    first = np.concatenate([table(8, seed=s, think_cv=0.0).arrival_s for s in range(300)])
    assert first.max() < 2.0
    assert first.mean() == pytest.approx(1.0, abs=0.1)
    assert (table(think_s=0.0).arrival_s == 0).all()


def test_classes_and_tenants_are_drawn():
    clients = table(num_tenants=4, shares=(0.7, 0.3))
    assert clients.slo_class.mean() == pytest.approx(0.3, abs=0.04)
    assert np.bincount(clients.tenant).tolist() == pytest.approx([500] * 4, abs=80)


def test_a_single_client_by_hand():
    sent, run = play(scenario(count=1, think_s=3.0, think_cv=0.0), num_requests=5)
    assert 0 < run["arrival_s"][0] < 3
    np.testing.assert_allclose(run["arrival_s"][1:], run["finish_s"][:-1] + 3.0, rtol=1e-12)
    assert sent.delay_s.tolist() == [0.0, 3.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize("count", [1, 8, 40])
@pytest.mark.parametrize("think_s", [0.0, 2.0])
def test_no_more_than_the_clients_are_in_the_system_and_the_laws_hold(count, think_s):
    n = 200
    _, run = play(scenario(n, count=count, think_s=think_s, think_cv=0.0))
    arrival_s, finish_s = run["arrival_s"], run["finish_s"]
    # the k-th request of those that wait comes think_s after the k-th end
    ends = np.sort(finish_s)
    np.testing.assert_array_equal(arrival_s[count:], ends[: n - count] + think_s)
    # Little: the integral of those in the system is the sum of their times in it
    times = np.concatenate((arrival_s, finish_s))
    steps = np.concatenate((np.ones(n), -np.ones(n)))
    order = np.lexsort((steps, times))
    inside = np.cumsum(steps[order])[:-1]
    assert count / 2 < inside.max() <= count
    integral = math.fsum(inside * np.diff(times[order]))
    response_s = math.fsum(finish_s - arrival_s)
    assert integral == pytest.approx(response_s, rel=1e-9)
    # N = X (R + Z): while there is work left, each client is waiting or thinking. It does so from
    # its first arrival to its last end: the last `count` ends are those of the last requests
    spans_s = math.fsum(ends[-count:]) - math.fsum(arrival_s[:count])
    assert spans_s == pytest.approx(response_s + (n - count) * think_s, rel=1e-9)
    throughput_rps = n / (spans_s / count)
    cycle_s = (response_s + (n - count) * think_s) / n
    assert throughput_rps * cycle_s == pytest.approx(count, rel=1e-9)


def test_more_clients_make_answers_slower_but_never_without_limit():
    _, few = play(scenario(400, count=4))
    _, many = play(scenario(400, count=64))
    few_s, many_s = ((r["finish_s"] - r["arrival_s"]).mean() for r in (few, many))
    assert few_s < many_s < 64 / 4 * few_s


def test_faults_go_on_until_the_last_client_is_done():
    data = scenario(400, think_s=0.0).model_dump(mode="json")
    data["disturbances"]["fail_slow"]["rate_per_replica_hour"] = 360.0
    troubled = parse_scenario(yaml.safe_dump(data), "tiny.yaml")
    episode = troubled.episode(0)
    _, run = play(troubled)
    assert episode.table.arrival_s[-1] == 0
    assert episode.faults.time_s[0] < run["finish_s"].max() < episode.faults.time_s[-1]


def test_a_wrong_client_is_refused_with_its_key():
    with pytest.raises(ConfigError, match=r"workload\.count: .* greater than or equal to 1, got 0"):
        scenario(count=0)
    with pytest.raises(ConfigError, match=r"unknown key workload\.rate_rps: choose one of count"):
        scenario(rate_rps=3.0)
