"""The search through assignments against trying all of them, and against the simulator."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from servegym.baselines.registry import policy
from servegym.clairvoyant.dispatch import (
    best_choices,
    choice_of,
    plays_alone,
    replay,
    search,
)
from servegym.clairvoyant.fleet import UNKNOWN
from servegym.clairvoyant.goal import METRICS, is_better, judged, make_goal
from servegym.clairvoyant.replicas import REJECT
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, Faults, ReplicaType, SloClass
from servegym.cluster.state import FAULT_DOWN, FAULT_SLOW, FAULT_UP
from servegym.errors import ConfigError
from servegym.export.resolve import resolve_dispatch
from servegym.policy.run import run
from servegym.policy.run_placed import make_simulator, run_placed
from servegym.problems.dispatch import DispatchEpisodes
from servegym.problems.request_metrics import measure
from servegym.scenario import load_scenario
from servegym.workloads.table import BY_ITSELF, RequestTable

from ..toys import token_grid  # noqa: TID252 - tests are no package

LIMITS = SloClass("toy", ttft_s=0.15, tpot_s=0.02)


def tiny(seed: int, *, num_requests=5, waiting=False, **rules) -> tuple[ClusterSpec, Episode]:
    """Make two replicas of unequal speed and a handful of requests that crowd them."""
    rng = np.random.default_rng(seed)
    after = np.full(num_requests, BY_ITSELF)
    if waiting:
        after[3] = 1
    table = RequestTable.build(
        np.sort(rng.uniform(0.0, 0.1, num_requests)),
        rng.integers(5, 120, num_requests),
        rng.integers(1, 12, num_requests),
        after=after,
        delay_s=np.where(after >= 0, 0.01, 0.0),
    )
    engine = ReplicaType("toy", token_grid(0.01, 0.001), 40, max_num_seqs=2)
    spec = ClusterSpec((engine,), (LIMITS,), **rules)
    return spec, Episode(table, np.zeros(2, np.int16), np.array([1.0, 0.6]), Faults())


def played(spec, episode, name) -> Simulator:
    simulator = Simulator(spec, [episode], record=True)
    run(simulator, policy(name))
    return simulator


def losses_of(spec, episode, metric, choice) -> tuple[float, float]:
    simulator = replay(spec, [episode], [choice])
    return judged(make_goal(metric, spec, episode), simulator.state.request[0])


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(4))
def test_search_finds_the_best_of_all_assignments(seed, metric, waiting):
    spec, episode = tiny(seed, waiting=waiting)
    start = choice_of(played(spec, episode, "round-robin"))
    first = make_goal(metric, spec, episode).first
    assert plays_alone(spec, episode) != waiting
    found = search(spec, episode, start, metric, budget=400.0, seed=seed)
    every = []
    for places in product(range(2), repeat=len(start) - first):
        choice = start.copy()
        choice[first:, 0] = places
        every.append(losses_of(spec, episode, metric, choice))
    assert len(every) == 16
    assert losses_of(spec, episode, metric, found.choice)[0] == pytest.approx(
        min(every)[0], rel=1e-12
    )
    np.testing.assert_array_equal(found.choice[:first], start[:first])


@pytest.mark.parametrize("seed", range(3))
def test_search_finds_the_best_of_all_assignments_and_rejections(seed):
    spec, episode = tiny(seed, allow_reject=True)
    start = choice_of(played(spec, episode, "round-robin"))
    found = search(spec, episode, start, "goodput_rps", budget=1000.0, may_reject=True)
    every = []
    for places in product((REJECT, 0, 1), repeat=len(start) - 1):
        choice = np.concatenate((start[:1], np.array(places)[:, None]))
        every.append(losses_of(spec, episode, "goodput_rps", choice))
    assert len(every) == 81
    assert losses_of(spec, episode, "goodput_rps", found.choice)[0] == min(every)[0]


@pytest.mark.parametrize(
    "name", ["azure-conv-fit", "hetero-prefix", "mixed-chat", "failures", "agent-sessions"]
)
def test_search_is_never_worse_than_its_start(name):
    scenario = load_scenario(name)
    spec, episode = scenario.spec, scenario.episode(3, num_requests=120)
    simulator = played(spec, episode, "least-outstanding")
    goal = make_goal("e2e_mean_s", spec, episode)
    before = judged(goal, simulator.state.request[0])
    found = search(spec, episode, choice_of(simulator), "e2e_mean_s", budget=60.0)
    after = losses_of(spec, episode, "e2e_mean_s", found.choice)
    assert is_better(after, before)
    assert found.num_changes > 0
    # the last trial is played to its end
    assert 60.0 <= found.episodes_played < 62.0


def test_search_knows_fleets_in_which_prefilled_requests_move_on():
    _, episode = tiny(3, num_requests=12)
    prefill = ReplicaType("p", token_grid(0.01, 0.001), 40, max_num_seqs=2, role="prefill")
    decode = ReplicaType("d", token_grid(0.01, 0.001), 200, max_num_seqs=8, role="decode")
    spec = ClusterSpec((prefill, decode), (LIMITS,))
    episode = Episode(episode.table, np.array([0, 0, 1], np.int16), np.array([1.0, 0.6, 1.0]))
    simulator = played(spec, episode, "round-robin")
    assert not plays_alone(spec, episode)
    before = judged(make_goal("e2e_mean_s", spec, episode), simulator.state.request[0])
    found = search(spec, episode, choice_of(simulator), "e2e_mean_s", budget=100.0)
    assert losses_of(spec, episode, "e2e_mean_s", found.choice) == found.loss
    assert is_better(found.loss, before)


def apart(seed: int, num_requests=5) -> tuple[ClusterSpec, Episode]:
    """Make a fleet with two replicas that decode what a third one has prefilled."""
    _, episode = tiny(seed, num_requests=num_requests)
    prefill = ReplicaType("p", token_grid(0.01, 0.001), 40, max_num_seqs=2, role="prefill")
    decode = ReplicaType("d", token_grid(0.01, 0.001), 40, max_num_seqs=2, role="decode")
    spec = ClusterSpec((prefill, decode), (LIMITS,))
    types, speed = np.array([0, 1, 1], np.int16), np.array([1.0, 1.0, 0.4])
    return spec, Episode(episode.table, types, speed)


@pytest.mark.parametrize("seed", range(3))
def test_search_finds_the_best_of_all_places_to_decode(seed):
    spec, episode = apart(seed)
    start = choice_of(placed_run(spec, episode, "round-robin+least-outstanding"))
    assert start.shape == (5, 2)
    assert (start[:, 0] == 0).all()
    assert set(start[:, 1]) == {1, 2}
    first = make_goal("e2e_mean_s", spec, episode).first
    found = search(spec, episode, start, "e2e_mean_s", budget=400.0, seed=seed)
    every = []
    for places in product((1, 2), repeat=len(start) - first):
        choice = start.copy()
        choice[first:, 1] = places
        every.append(losses_of(spec, episode, "e2e_mean_s", choice))
    assert len(every) == 16
    assert losses_of(spec, episode, "e2e_mean_s", found.choice) == found.loss
    assert found.loss[0] == pytest.approx(min(every)[0], rel=1e-12)


def placed_run(spec, episode, name) -> Simulator:
    simulator = make_simulator(spec, [episode], record=True)
    run_placed(simulator, resolve_dispatch(name))
    return simulator


@pytest.mark.parametrize("name", ["pd-equal", "pd-unequal"])
def test_replayed_assignment_decodes_where_it_was_read_from(name):
    scenario = load_scenario(name)
    episode = scenario.episode(1, load=1.2, num_requests=300)
    simulator = placed_run(scenario.spec, episode, "sglang+power-of-two")
    choice = choice_of(simulator)
    again = replay(scenario.spec, [episode], [choice])
    mine, theirs = simulator.outcomes(0), again.outcomes(0)
    assert len(mine) == len(theirs) == 300
    for column in mine.dtype.names:
        np.testing.assert_allclose(mine[column], theirs[column], rtol=1e-12)


def test_where_requests_migrate_the_search_goes_by_the_rule_of_the_best_run():
    scenario = load_scenario("near-full-kv")
    episodes = DispatchEpisodes(scenario, [scenario.episode(2, load=1.2, num_requests=800)])
    names = ("least-outstanding+stay", "least-outstanding+freeness-waiting")
    rules = [resolve_dispatch(name) for name in names]
    alone = [episodes.play(rule).metrics[0]["ttft_p99_s"] for rule in rules]
    found = episodes.clairvoyant(rules, budget=10.0).metrics[0]
    assert found["migrations"] > 0
    assert found["ttft_p99_s"] < min(alone)


@pytest.mark.parametrize("name", ["azure-conv-fit", "bench", "hetero-prefix"])
@pytest.mark.parametrize("metric", METRICS)
def test_replicas_played_alone_give_what_the_simulator_gives_to_the_bit(name, metric):
    scenario = load_scenario(name)
    drawn = scenario.episode(5, num_requests=300)
    table = drawn.table.open_loop().scaled(10.0)
    slow = Faults(
        np.array([1.0, 2.5]),
        np.array([1, 1], np.int16),
        np.array([FAULT_SLOW, FAULT_SLOW], np.int8),
        np.array([0.3, 1.0]),
    )
    episode = Episode(table, drawn.type_idx, drawn.speed, slow, drawn.noise_seed)
    spec = ClusterSpec(
        scenario.spec.types,
        scenario.spec.slo_classes,
        prefix_caching=scenario.spec.prefix_caching,
        noise_sigma=0.2,
    )
    assert plays_alone(spec, episode)
    start = choice_of(played(spec, episode, "round-robin"))
    found = search(spec, episode, start, metric, budget=30.0)
    assert found.num_changes > 0 or found.loss[1] == 0.0  # all within their limits as it was
    simulator = replay(spec, [episode], [found.choice])
    measured = measure(
        simulator.outcomes(0), simulator.steps(0), simulator.itl_histogram(0), spec, episode
    )
    goal = make_goal(metric, spec, episode)
    sign = -1.0 if metric == "goodput_rps" else 1.0
    assert sign * judged(goal, simulator.state.request[0])[0] == pytest.approx(
        measured[metric], rel=1e-13
    )
    assert found.loss == judged(goal, simulator.state.request[0])


@pytest.mark.parametrize("name", ["round-robin", "least-outstanding"])
@pytest.mark.parametrize("scenario_name", ["mixed-chat", "failures", "slo-chat"])
def test_replayed_assignment_is_the_run_it_was_read_from(scenario_name, name):
    scenario = load_scenario(scenario_name)
    episode = scenario.episode(1, num_requests=400)
    simulator = played(scenario.spec, episode, name)
    again = replay(scenario.spec, [episode], [choice_of(simulator)])
    mine, theirs = simulator.outcomes(0), again.outcomes(0)
    assert len(mine) == len(theirs) == 400
    for column in mine.dtype.names:
        np.testing.assert_array_equal(mine[column], theirs[column])


def test_assignment_tells_what_happens_after_a_crash():
    spec, episode = tiny(0)
    down = Faults(
        np.array([0.05, 10.0]),
        np.zeros(2, np.int16),
        np.array([FAULT_DOWN, FAULT_UP], np.int8),
        np.zeros(2),
    )
    episode = Episode(episode.table, episode.type_idx, episode.speed, down)
    choice = choice_of(played(spec, episode, "round-robin"))
    assert choice.shape == (5, 2)
    sent_again = choice[:, 1] != UNKNOWN
    assert sent_again.any()
    assert (choice[sent_again, 1] == 1).all()
    assert not plays_alone(spec, episode)


def test_search_begins_with_the_best_run_of_each_episode():
    spec, episode = tiny(1, num_requests=8)
    runs = [played(spec, episode, name) for name in ("random", "added-delay", "round-robin")]
    goal = make_goal("e2e_mean_s", spec, episode)
    best = min(judged(goal, run.state.request[0]) for run in runs)
    choice = best_choices(spec, [episode], runs, "e2e_mean_s", budget=0.0)[0]
    assert losses_of(spec, episode, "e2e_mean_s", choice) == best


def test_search_is_the_same_for_the_same_seed():
    spec, episode = tiny(2, num_requests=40)
    start = choice_of(played(spec, episode, "round-robin"))
    found = [search(spec, episode, start, "e2e_mean_s", budget=50.0, seed=s) for s in (4, 4)]
    np.testing.assert_array_equal(found[0].choice, found[1].choice)
    assert found[0].num_changes == found[1].num_changes > 0


def short_of_kv(seed: int) -> tuple[ClusterSpec, Episode]:
    """Make two replicas that hold the KV of one long request and a little more."""
    rng = np.random.default_rng(seed)
    table = RequestTable.build(
        np.sort(rng.uniform(0.0, 0.1, 5)), rng.integers(40, 100, 5), rng.integers(20, 60, 5)
    )
    engine = ReplicaType("toy", token_grid(0.01, 0.001), 10, max_num_seqs=4)
    spec = ClusterSpec((engine,), (LIMITS,), allow_hold=True, hold_s=0.2)
    return spec, Episode(table, np.zeros(2, np.int16), np.array([1.0, 0.6]), Faults())


@pytest.mark.parametrize("seed", range(3))
def test_search_finds_what_holding_requests_brings(seed):
    spec, episode = short_of_kv(seed)
    start = choice_of(played(spec, episode, "round-robin"))
    assert start.shape == (5, 2)
    assert not start[:, 1].any()
    assert not plays_alone(spec, episode)
    assert plays_alone(replace(spec, allow_hold=False), episode)
    found = search(spec, episode, start, "e2e_mean_s", budget=3000.0, seed=seed)
    every = {}
    for told in product(range(2), (0, 2), repeat=4):
        choice = np.concatenate((start[:1], np.array(told).reshape(4, 2)))
        every[told] = losses_of(spec, episode, "e2e_mean_s", choice)
    sent_at_once = [least for told, least in every.items() if not any(told[1::2])]
    assert len(every) == 256
    assert len(sent_at_once) == 16
    least = losses_of(spec, episode, "e2e_mean_s", found.choice)
    assert least == found.loss
    assert least[0] <= min(every.values())[0] * (1 + 1e-12)
    assert least[0] < 0.99 * min(sent_at_once)[0]  # or these cases would not tell
    np.testing.assert_array_equal(found.choice[:1], start[:1])


def test_replayed_assignment_holds_whom_the_rule_held():
    scenario = load_scenario("short-kv-hold")
    episode = scenario.episode(1, load=1.2, num_requests=400)
    simulator = played(scenario.spec, episode, "added-delay-held")
    mine = simulator.outcomes(0)
    assert (mine["num_holds"] > 3).sum() > 10
    theirs = replay(scenario.spec, [episode], [choice_of(simulator)]).outcomes(0)
    assert len(mine) == len(theirs) == 400
    for column in mine.dtype.names:
        np.testing.assert_allclose(mine[column], theirs[column], rtol=1e-12)


def test_where_requests_may_be_held_the_search_tries_to_send_all_at_once_too():
    scenario = load_scenario("short-kv-hold")
    episode = scenario.episode(2, num_requests=300)
    runs = [played(scenario.spec, episode, name) for name in ("added-delay-held", "round-robin")]
    goal = make_goal("e2e_mean_s", scenario.spec, episode)
    held = judged(goal, runs[0].state.request[0])
    (at_once,) = best_choices(scenario.spec, [episode], runs[1:], "e2e_mean_s", budget=60.0)
    (best,) = best_choices(scenario.spec, [episode], runs, "e2e_mean_s", budget=60.0)
    least = losses_of(scenario.spec, episode, "e2e_mean_s", best)
    assert is_better(least, held)
    assert least <= losses_of(scenario.spec, episode, "e2e_mean_s", at_once)


def test_unknown_metric_is_refused():
    spec, episode = tiny(0)
    with pytest.raises(ConfigError, match="did you mean e2e_mean_s"):
        make_goal("e2e_mean", spec, episode)
