"""Queues with a known answer: one request at a time, shared processors, and Little's law."""

from __future__ import annotations

import math

import numpy as np
import pytest

from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import DECISION, EV_ARRIVE, EV_FINISH, EV_REJECT
from servegym.workloads.table import RequestTable

from ..toys import linear_grid  # noqa: TID252 - tests are no package
from .test_invariants import play, scenario
from .test_toys import replica_type, toy_cluster, toy_episode

NUM_RUNS = 30
NUM_REQUESTS = 10_000
WARM_UP = 500
#: Two-sided 99 % quantile of Student's t with 29 degrees of freedom.
T_99 = 2.756


def serve_all(
    spec: ClusterSpec, episodes: list[Episode], *, num_replicas: int = 1
) -> list[np.ndarray]:
    """Play all episodes, each request going to a random replica."""
    rng = np.random.default_rng(5)
    sim = Simulator(spec, episodes)
    while (sim.advance() == DECISION).any():
        sim.apply(rng.integers(num_replicas, size=len(episodes)))
    return [sim.outcomes(env) for env in range(len(episodes))]


def poisson_episodes(
    rate_rps: float, prompt: np.ndarray, output: np.ndarray, num_replicas: int = 1
) -> list[Episode]:
    """Draw runs of Poisson arrivals with the given `[NUM_RUNS, NUM_REQUESTS]` lengths."""
    arrival = np.random.default_rng(3).exponential(1 / rate_rps, prompt.shape).cumsum(axis=1)
    return [
        Episode(
            RequestTable.build(arrival[i], prompt[i], output[i]),
            np.zeros(num_replicas, np.int16),
            np.ones(num_replicas),
        )
        for i in range(len(prompt))
    ]


def confidence(samples: np.ndarray) -> tuple[float, float]:
    """Return the mean of independent runs and the half width of its 99 % interval."""
    return samples.mean(), T_99 * samples.std(ddof=1) / math.sqrt(len(samples))


SHAPE = (NUM_RUNS, NUM_REQUESTS)
PROMPTS = {
    "M/D/1": np.full(SHAPE, 10),
    "M/G/1 with two lengths": np.random.default_rng(0).choice([4, 50], SHAPE, p=[0.8, 0.2]),
    "M/G/1 with geometric lengths": np.random.default_rng(1).geometric(0.05, SHAPE),
}
ONE_AT_A_TIME = toy_cluster(
    replica_type(linear_grid(cpu_s=0.5, pair_s=0.0), seqs=1, budget=4096, num_blocks=4096)
)


def service_s(prompt: np.ndarray) -> np.ndarray:
    """One step: 0.5 s and 0.1 s per prompt token."""
    return 0.5 + 0.1 * prompt


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize("queue", PROMPTS)
def test_the_mean_wait_is_that_of_pollaczek_and_khinchine(queue, num_replicas):
    prompt = PROMPTS[queue]
    service = service_s(prompt)
    rate_rps = 0.6 / service.mean()
    episodes = poisson_episodes(num_replicas * rate_rps, prompt, np.ones(SHAPE), num_replicas)
    runs = serve_all(ONE_AT_A_TIME, episodes, num_replicas=num_replicas)
    waits = [np.mean((run["scheduled_s"] - run["arrival_s"])[WARM_UP:]) for run in runs]
    expected = rate_rps * (service**2).mean() / (2 * (1 - 0.6))
    mean, half_width = confidence(np.array(waits))
    assert half_width < 0.05 * expected
    assert abs(mean - expected) < half_width


def test_an_arrival_finds_the_engine_idle_as_often_as_it_is_idle():
    prompt = PROMPTS["M/D/1"]
    rate_rps = 0.6 / 1.5
    runs = serve_all(ONE_AT_A_TIME, poisson_episodes(rate_rps, prompt, np.ones(SHAPE)))
    at_once = [np.mean((run["scheduled_s"] - run["arrival_s"] < 1e-9)[WARM_UP:]) for run in runs]
    mean, half_width = confidence(np.array(at_once))
    assert abs(mean - 0.4) < half_width < 0.02


@pytest.mark.parametrize("queue", PROMPTS)
def test_every_wait_follows_lindleys_recursion(queue):
    prompt = PROMPTS[queue][:1]
    output = np.random.default_rng(2).integers(1, 5, prompt.shape)
    run = serve_all(ONE_AT_A_TIME, poisson_episodes(0.2, prompt, output))[0]
    # one step for the prompt, then 0.5 + 0.1 + 0.001 * (prompt + i) s for the i-th decode
    decodes = output[0] - 1
    service = service_s(prompt[0]) + decodes * (0.6 + 0.001 * (prompt[0] + (decodes + 1) / 2))
    wait, expected = 0.0, []
    for gap, previous in zip(np.diff(run["arrival_s"], prepend=0), [0, *service[:-1]], strict=True):
        wait = max(0.0, wait + previous - gap)
        expected.append(wait)
    assert max(expected) > 10
    np.testing.assert_allclose(run["scheduled_s"] - run["arrival_s"], expected, atol=1e-8)
    np.testing.assert_allclose(run["finish_s"] - run["scheduled_s"], service, atol=1e-8)


@pytest.mark.parametrize("lengths", ["equal", "geometric"])
def test_a_step_as_long_as_its_batch_shares_the_engine_like_a_processor(lengths):
    # every token takes 1 ms whoever it is for: processor sharing in slices of 1 ms, whose mean
    # sojourn depends on the mean length alone. A slice adds less than two rounds to a sojourn.
    shape = (NUM_RUNS, 4000)
    rng = np.random.default_rng(4)
    output = np.full(shape, 400) if lengths == "equal" else rng.geometric(1 / 400, shape)
    grid = linear_grid(cpu_s=1e-12, token_s=1e-3, pair_s=0.0, kv_s=0.0)
    spec = toy_cluster(replica_type(grid, seqs=256, budget=256, num_blocks=100_000))
    mean_s = 1e-3 * output.mean()
    runs = serve_all(spec, poisson_episodes(0.5 / mean_s, np.ones(shape), output))
    mean, half_width = confidence(
        np.array([np.mean((run["finish_s"] - run["arrival_s"])[WARM_UP:]) for run in runs])
    )
    expected = mean_s / (1 - 0.5)
    round_s = 2 * 1e-3  # the mean number in the system is at most 2 at this load
    assert half_width + 2 * round_s < 0.05 * expected
    assert abs(mean - expected) < half_width + 2 * round_s


def test_with_steps_of_equal_length_nobody_slows_anybody():
    # step times that ignore the batch: all of many servers, and each sojourn is known exactly
    rng = np.random.default_rng(6)
    output = rng.integers(1, 60, 300)
    requests = [(i + 0.5, 1, int(n)) for i, n in enumerate(output)]
    grid = linear_grid(token_s=0.0, pair_s=0.0, kv_s=0.0)
    spec = toy_cluster(replica_type(grid, seqs=128, budget=256, num_blocks=10_000))
    first = (0.0, 1, 400)  # keeps the steps aligned to whole seconds
    run = serve_all(spec, [toy_episode([first, *requests])])[0]
    assert (run["finish_s"] - run["arrival_s"])[1:].tolist() == (0.5 + output).tolist()


@pytest.mark.parametrize("prompt", [1, 95, 1000])
@pytest.mark.parametrize("output", [2, 500])
def test_decode_times_of_a_lone_request_are_an_arithmetic_series(prompt, output):
    spec = toy_cluster(replica_type(budget=4096, num_blocks=4096))
    run = serve_all(spec, [toy_episode([(0, prompt, output)])])[0]
    series = sum(1.1 + 0.001 * (prompt + i) for i in range(1, output))
    assert run["finish_s"][0] - run["first_token_s"][0] == pytest.approx(series, rel=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_littles_law_holds_exactly(seed):
    sim = play(*scenario(seed))
    outcomes, events = sim.outcomes(), sim.events()
    sojourns_s = math.fsum(outcomes["finish_s"] - outcomes["arrival_s"])
    ended = np.isin(events["kind"], (EV_FINISH, EV_REJECT))
    in_system = np.cumsum((events["kind"] == EV_ARRIVE) * 1 - ended)[:-1]
    integral = math.fsum(in_system * np.diff(events["time_s"]))
    assert integral == pytest.approx(sojourns_s, rel=1e-9)
    assert float(sim.state.env[0]["area"]) == pytest.approx(sojourns_s, rel=1e-9)
