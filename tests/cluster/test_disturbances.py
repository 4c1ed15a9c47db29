"""Stale metrics, noisy steps, slow replicas and failed ones."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import DECISION, FAULT_DOWN, FAULT_SLOW, FAULT_UP
from servegym.policy.contract import Group, ReplicaFeature
from servegym.policy.observe import observe_batch

from ..toys import linear_grid  # noqa: TID252 - tests are no package
from .test_toys import Played, play, replica_type, toy_cluster, toy_episode

__all__ = ["play"]  # a fixture: both programs

#: Every step lasts a second, whatever is in it.
SECONDS = replica_type(linear_grid(token_s=0.0, pair_s=0.0, kv_s=0.0), num_blocks=1000)


def observe_last(spec: ClusterSpec, episode: Episode, actions: list[int]) -> np.ndarray:
    """Take all decisions but the last, and return the replica features shown for that one."""
    sim = Simulator(spec, [episode])
    for action in actions:
        sim.advance()
        sim.apply(np.array([action]))
    assert sim.advance()[0] == DECISION
    return observe_batch(sim, Group.METRICS | Group.PREFIX)[0].replicas[0]


def row(features: np.ndarray, name: str) -> list[float]:
    return features[int(ReplicaFeature[name.upper()])].tolist()


@pytest.mark.parametrize(
    ("interval_s", "age_s", "running", "waiting", "blocks", "generated"),
    [
        # one request of 10 tokens from 0 s on in steps of a second, another from 2.25 s on behind
        # it. At 4.5 s the first has 4 tokens, and the step in progress holds 14: 4 blocks
        (0.0, 0.0, 1, 1, 4, 4),
        (4.5, 0.0, 1, 1, 4, 4),  # the scrape of that instant comes before the decision
        (1.0, 0.5, 1, 1, 4, 4),  # scraped at 4, after the step that ended then
        (3.0, 1.5, 1, 1, 4, 3),
        (2.0, 0.5, 1, 1, 4, 4),
        (2.125, 0.25, 1, 1, 4, 4),  # scraped at 4.25
        (2.4, 2.1, 1, 1, 3, 2),  # scraped at 2.4
        (2.24, 0.02, 1, 1, 4, 4),  # scraped at 4.48
        (10.0, 4.5, 0, 0, 0, 0),  # scraped at 0, before the first arrival
    ],
)
def test_metrics_are_as_old_as_the_last_scrape(
    interval_s, age_s, running, waiting, blocks, generated
):
    one = replica_type(SECONDS.grid, seqs=1, num_blocks=1000)
    spec = toy_cluster(one, metrics_interval_s=interval_s)
    episode = toy_episode([(0, 10, 50), (2.25, 10, 50), (4.5, 10, 50)], type_idx=[0, 0])
    shown = observe_last(spec, episode, [0, 0])
    assert row(shown, "metrics_age_s") == pytest.approx([age_s] * 2)
    assert row(shown, "num_running") == [running, 0]
    assert row(shown, "num_waiting") == [waiting, 0]
    assert row(shown, "kv_cache_usage") == pytest.approx([blocks / 1000, 0])
    assert row(shown, "generated_tokens") == [generated, 0]


@pytest.mark.parametrize("interval_s", [0.0, 10.0])
def test_what_the_router_counts_itself_is_never_stale(interval_s):
    spec = toy_cluster(SECONDS, metrics_interval_s=interval_s)
    episode = toy_episode([(0, 10, 50), (2.25, 7, 50), (4.5, 10, 50)], type_idx=[0, 0])
    shown = observe_last(spec, episode, [0, 0])
    assert row(shown, "outstanding_requests") == [2, 0]
    assert row(shown, "outstanding_prompt_tokens") == [17, 0]
    assert row(shown, "since_dispatch_s") == [2.25, 1e6]
    assert row(shown, "recent_ttft_s") == pytest.approx([1 + 0.1 * (1.75 - 1), 0])


def noise_factors(
    sigma: float, period: int = 1, *, seed: int = 0, num_replicas: int = 1, steps: int = 4000
) -> np.ndarray:
    """Return the durations of steps that would last a second, `float64[num_replicas, steps]`."""
    spec = toy_cluster(
        replica_type(SECONDS.grid, num_blocks=10_000),
        noise_sigma=sigma,
        noise_period_steps=period,
    )
    requests = [(0.0, 1, steps)] * num_replicas
    sim = Simulator(
        spec,
        [toy_episode(requests, type_idx=[0] * num_replicas, noise_seed=seed)],
        record=True,
    )
    for replica in range(num_replicas):
        sim.advance()
        sim.apply(np.array([replica]))
    sim.advance()
    log = sim.steps()
    factors = []
    for replica in range(num_replicas):
        mine = log[log["replica"] == replica]
        mean_s = (mine["end_s"] - mine["begin_s"]) / mine["num_steps"]
        factors.append(np.repeat(mean_s, mine["num_steps"]))
    return np.array(factors)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 0.8])
def test_step_noise_is_log_normal_with_mean_one(sigma):
    factors = noise_factors(sigma)[0]
    z = (np.log(factors) + sigma**2 / 2) / sigma
    n = len(z)
    # four standard errors of the mean, the variance, the skewness and the mean of the factors
    assert abs(z.mean()) < 4 / np.sqrt(n)
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * np.sqrt(15 / n)
    assert abs(factors.mean() - 1) < 4 * np.sqrt(np.expm1(sigma**2) / n)
    assert abs(np.corrcoef(z[1:], z[:-1])[0, 1]) < 4 / np.sqrt(n)


def test_without_noise_every_step_lasts_as_long_as_it_should():
    assert (noise_factors(0.0, steps=100) == 1.0).all()


@pytest.mark.parametrize("period", [2, 7])
def test_steps_of_one_window_share_one_draw(period):
    factors = noise_factors(0.3, period, steps=700)[0]
    windows = factors.reshape(-1, period)
    assert windows == pytest.approx(np.repeat(windows[:, :1], period, axis=1), rel=1e-9)
    assert len(np.unique(windows[:, 0].round(9))) == len(windows)
    # a window has the same draw whatever its length
    each = noise_factors(0.3, 1, steps=700)[0]
    assert windows[:, 0] == pytest.approx(each[: len(windows)], rel=1e-9)


def test_noise_belongs_to_a_seed_and_a_replica():
    factors = noise_factors(0.3, num_replicas=3)
    independent = np.corrcoef([*factors, noise_factors(0.3, seed=1)[0]])
    assert np.abs(independent - np.eye(4)).max() < 4 / np.sqrt(factors.shape[1])
    assert (noise_factors(0.3, num_replicas=3) == factors).all()


@pytest.mark.parametrize("speed", [1.0, 4.0])
@pytest.mark.parametrize(
    ("begin_s", "end_s", "finish_s"),
    [
        # ten steps of 1 s; one that begins within the window lasts 2 s
        (3.5, 8.25, 13),  # begins at 4, 6 and 8
        (4.0, 8.25, 13),  # a fault comes before the step that begins at the same instant
        (3.5, 8.0, 12),  # and so does its end
        (3.25, 3.75, 10),  # no step begins
        (0.0, 100.0, 20),
        (9.5, 100.0, 10),
    ],
)
def test_a_slow_replica_stretches_the_steps_that_begin_in_its_window(
    play, speed, begin_s, end_s, finish_s
):
    faults = [(begin_s / speed, 0, FAULT_SLOW, 0.5), (end_s / speed, 0, FAULT_SLOW, 1.0)]
    requests = [(0, 5, 10), (0, 5, 10)]
    episode = toy_episode(requests, type_idx=[0, 0], speed=[speed, speed], faults=faults)
    played: Played = play(toy_cluster(SECONDS), episode, {1: [1]})
    assert played.outcomes["finish_s"] * speed == pytest.approx([finish_s, 10])


@pytest.mark.parametrize("factor", [0.25, 0.8, 2.0])
def test_a_slow_fault_divides_step_times_by_its_speed_multiplier(play, factor):
    faults = [(0.0, 0, FAULT_SLOW, factor)]
    played: Played = play(toy_cluster(), toy_episode([(0, 10, 3)], faults=faults), {})
    assert played.outcomes["finish_s"] * factor == pytest.approx([2 + 1.111 + 1.112])


def test_an_arrival_at_the_end_of_a_decode_step_joins_one_step_later(play):
    played: Played = play(toy_cluster(SECONDS), toy_episode([(0, 5, 10), (5.0, 5, 1)]), {})
    assert played.outcomes["scheduled_s"] == pytest.approx([0, 6])


@pytest.mark.parametrize("down_s", [4.0, 4.5])
def test_restarts_are_counted_and_tokens_are_kept(play, down_s):
    # four steps of a second count either way; the fifth is lost at 4.5. The replica comes back at
    # 6, works to 8 and fails once more with 4 + 2 tokens; the other one gives the last four.
    faults = [
        (down_s, 0, FAULT_DOWN, 0.0),
        (6.0, 0, FAULT_UP, 0.0),
        (8.25, 0, FAULT_DOWN, 0.0),
        (20.0, 0, FAULT_UP, 0.0),
    ]
    spec = toy_cluster(SECONDS, allow_hold=True, hold_s=6.0 - down_s)
    episode = toy_episode([(0, 5, 10), (0, 5, 20)], type_idx=[0, 0], faults=faults)
    played: Played = play(spec, episode, {0: [0, 2, 0, 1], 1: [1]})  # 2 holds
    assert played.outcomes["num_restarts"].tolist() == [2, 0]
    assert played.outcomes["num_holds"].tolist() == [1, 0]
    assert played.outcomes["first_token_s"].tolist() == [1, 1]
    # the second replica is in the step from 8 to 9 when the request comes
    assert played.outcomes["finish_s"] == pytest.approx([13, 20])


def test_a_replica_that_is_down_shows_nothing_and_takes_nothing():
    faults = [(4.0, 0, FAULT_DOWN, 0.0), (20.0, 0, FAULT_UP, 0.0)]
    episode = toy_episode([(0, 5, 50), (0, 5, 50), (8, 5, 1)], type_idx=[0, 0], faults=faults)
    sim = Simulator(toy_cluster(SECONDS), [episode])
    for action in (0, 1, 1):  # the third decision is that about the returned request
        sim.advance()
        sim.apply(np.array([action]))
    sim.advance()
    observations, _ = observe_batch(sim, Group.METRICS)
    shown = observations.replicas[0]
    assert observations.mask[0].tolist() == [False, True, False, False]
    assert row(shown, "up") == [0, 1]
    assert row(shown, "outstanding_requests") == [0, 2]
    assert row(shown, "num_running") == [0, 2]
    # 8 steps of its own request, and 4 + 3 tokens of the returned one
    assert row(shown, "generated_tokens") == [0, 8 + 7]


@pytest.mark.parametrize(("down_s", "hit"), [(50.0, 0), (None, 12)])
def test_a_failure_empties_the_prefix_cache(down_s, hit):
    faults = [(down_s, 0, FAULT_DOWN, 0.0), (60.0, 0, FAULT_UP, 0.0)] if down_s else []
    spec = toy_cluster(SECONDS, prefix_caching=True)
    requests = [(0, 13, 1), (100, 13, 1)]
    episode = toy_episode(requests, texts=[(1, 13), (1, 13)], faults=faults)
    assert row(observe_last(spec, episode, [0]), "prefix_hit_tokens") == [hit]
