"""The state is all there is: same inputs, same bits, whoever computes them and in what order."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from servegym.cluster.kernels import advance, apply
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import DECISION
from servegym.policy.contract import NUM_REQUEST_FEATURES, Group
from servegym.policy.observe import observe, observe_batch
from servegym.workloads.table import RequestTable

from .strategies import choose
from .test_invariants import scenario
from .test_toys import bits, replica_type, toy_cluster, toy_episode

NUM_ENVS = 8
SEEDS = [1, 2, 3, 4, 5, 6]
EVERYTHING = Group.METRICS | Group.PREFIX


def siblings(seed: int) -> tuple[ClusterSpec, list[Episode]]:
    """Draw a cluster with holds and noise, and episodes of different sizes for it."""
    spec, first = scenario(seed)
    spec = replace(spec, allow_hold=True, noise_sigma=0.2)
    tables = [scenario(100 * seed + i)[1].table for i in range(NUM_ENVS)]
    return spec, [replace(first, table=t, noise_seed=i) for i, t in enumerate(tables)]


def big_episode(spec: ClusterSpec) -> Episode:
    """Make an episode that exceeds those of `siblings` in every dimension."""
    n, rng = 150, np.random.default_rng(0)
    faults = [(0.02 * i, i, kind, 0.0) for kind in (1, 2) for i in range(7)]
    requests = list(zip(np.arange(n) * 0.002, rng.integers(1, 70, n), rng.integers(2, 51, n)))
    requests[0] = (0.0, 69, 50)
    episode = toy_episode(requests, type_idx=[0] * 7, faults=sorted(faults))
    offsets, keys, ends = np.arange(n + 1) * 3, np.tile([1, 2, 3], n), np.tile([8, 16, 40], n)
    table = episode.table
    return replace(
        episode,
        table=RequestTable.build(
            table.arrival_s,
            table.prompt_tokens,
            table.output_tokens,
            prefix_offsets=offsets,
            prefix_keys=keys,
            prefix_ends=ends,
        ),
    )


def visit(sim: Simulator, env: int) -> tuple[int, int]:
    """Return the request that waits for a decision, and how often it was decided before."""
    request = int(sim.state.env[env]["deciding"])
    record = sim.state.request[env, request]
    return request, int(record["num_holds"] + record["num_restarts"])


def step(sim: Simulator, needs: Group = EVERYTHING) -> bool:
    """Take one decision in every environment; return whether there was any."""
    if not (sim.advance() == DECISION).any():
        return False
    observations, envs = observe_batch(sim, needs)
    actions = np.zeros(sim.num_envs, np.int64)
    for row, env in enumerate(envs.tolist()):
        actions[env] = choose(*visit(sim, env), observations.mask[row].tolist())
    sim.apply(actions)
    return True


def finish(sim: Simulator, needs: Group = EVERYTHING) -> Simulator:
    while step(sim, needs):
        pass
    return sim


def fate(sim: Simulator, env: int = 0) -> list[list[bytes]]:
    """Return the bits of everything that a finished environment tells."""
    num_replicas = sim.episodes[env].num_replicas
    clock = sim.state.env[["now_s", "area", "good", "arrival_gap_s", "engine_steps"]]
    return [
        bits(array)
        for array in (
            sim.outcomes(env),
            sim.events(env),
            sim.steps(env),
            sim.itl_histogram(env),
            clock[env : env + 1],
            sim.state.observation[env, :, :num_replicas],
        )
    ]


def alone(spec: ClusterSpec, episode: Episode, *, record: bool = True) -> list[list[bytes]]:
    return fate(finish(Simulator(spec, [episode], record=record)))


ORDERS = {
    "in order": range(NUM_ENVS),
    "reversed": range(NUM_ENVS)[::-1],
    "shuffled": [3, 0, 7, 5, 1, 6, 2, 4],
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("order", ORDERS)
def test_an_environment_does_the_same_alone_and_among_others(seed, order):
    spec, episodes = siblings(seed)
    batch = finish(Simulator(spec, [episodes[i] for i in ORDERS[order]], record=True))
    assert ORDERS[order]
    for env, i in enumerate(ORDERS[order]):
        assert fate(batch, env) == alone(spec, episodes[i])


@pytest.mark.parametrize("seed", SEEDS)
def test_episodes_differ_so_that_equal_bits_mean_something(seed):
    spec, episodes = siblings(seed)
    fates = [alone(spec, episode) for episode in episodes]
    assert all(a != b for i, a in enumerate(fates) for b in fates[:i])
    assert alone(spec, replace(episodes[0], noise_seed=99)) != fates[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_room_for_more_replicas_changes_nothing(seed):
    spec, episodes = siblings(seed)
    roomy = finish(Simulator(spec, episodes[:1], record=True, max_replicas=9))
    assert fate(roomy) == alone(spec, episodes[0])


@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_threads_that_share_the_arrays_change_nothing(num_threads):
    # kernels run without the GIL, and threads step the environments of one simulator
    spec, episodes = siblings(1)
    sim = Simulator(spec, episodes)

    def run(env: int) -> None:
        request, mask = np.zeros(NUM_REQUEST_FEATURES), sim.state.allowed[env]
        while advance(sim.params, sim.state, env) == DECISION:
            observe(sim.params, sim.state, env, int(EVERYTHING), request)
            apply(sim.params, sim.state, env, choose(*visit(sim, env), mask.tolist()))

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(run, range(NUM_ENVS)))
    serial = finish(Simulator(spec, episodes))
    assert [fate(sim, env) for env in range(NUM_ENVS)] == [
        fate(serial, env) for env in range(NUM_ENVS)
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_looking_at_the_cluster_does_not_disturb_it(seed):
    # a look at the prefix cache books the ended steps of a stretch, which may round differently
    spec, episodes = siblings(seed)
    seen = finish(Simulator(spec, episodes))
    unseen = finish(Simulator(spec, episodes), Group.COUNTERS)
    for env in range(NUM_ENVS):
        a, b = seen.outcomes(env), unseen.outcomes(env)
        assert a.dtype.names
        for column in a.dtype.names:
            np.testing.assert_allclose(a[column], b[column], rtol=1e-9, err_msg=column)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decisions", [0, 1, 7, 23])
def test_a_restored_simulator_goes_on_bit_by_bit(seed, decisions):
    spec, episodes = siblings(seed)
    sim = Simulator(spec, episodes)
    for _ in range(decisions):
        step(sim)
    saved = sim.snapshot()
    expected = [fate(finish(sim), env) for env in range(NUM_ENVS)]
    assert expected == [alone(spec, episode, record=False) for episode in episodes]
    sim.restore(saved)
    assert [fate(finish(sim), env) for env in range(NUM_ENVS)] == expected


def test_a_snapshot_does_not_follow_the_simulator():
    spec, episodes = siblings(1)
    sim = Simulator(spec, episodes)
    saved = sim.snapshot()
    before = [bits(array) for array in saved.state]
    finish(sim)
    assert [bits(array) for array in saved.state] == before
    assert [bits(array) for array in sim.state] != before


def test_a_decision_that_was_due_is_due_again_after_a_restore():
    # two branches from one decision, the first played to its end: what a planner does
    sim = Simulator(toy_cluster(), [toy_episode([(0, 10, 3)], type_idx=[0, 0], speed=[1.0, 2.0])])
    sim.advance()
    saved = sim.snapshot()
    finish_s = []
    for replica in range(2):
        sim.restore(saved)
        sim.apply(np.array([replica]))
        sim.advance()
        finish_s.append(float(sim.outcomes()["finish_s"][0]))
    assert finish_s == pytest.approx([4.223, 4.223 / 2])


def hold_often(sim: Simulator, holds: int) -> None:
    for _ in range(holds):
        sim.advance()
        sim.apply(np.array([1]))


def test_a_full_log_grows_and_loses_nothing():
    sim = Simulator(toy_cluster(allow_hold=True), [toy_episode([(0, 10, 3)])], record=True)
    hold_often(sim, 500)
    assert len(sim.events()) == 501
    assert np.diff(sim.events()["time_s"][1:]) == pytest.approx(0.05)


def test_a_snapshot_can_be_restored_after_the_logs_have_grown():
    sim = Simulator(toy_cluster(allow_hold=True), [toy_episode([(0, 10, 3)])], record=True)
    sim.advance()
    saved = sim.snapshot()
    hold_often(sim, 500)
    sim.restore(saved)
    assert len(sim.events()) == 1
    assert fate(finish(sim)) == alone(toy_cluster(allow_hold=True), sim.episodes[0])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decisions", [0, 5, 23, 60])
def test_growing_for_a_bigger_episode_leaves_the_others_as_they_were(seed, decisions):
    spec, episodes = siblings(seed)
    sim = Simulator(spec, episodes, record=True)
    for _ in range(decisions):
        step(sim)
    shapes = [array.shape for array in sim.state]
    sim.load(2, big_episode(spec))
    grown = [a != b.shape for a, b in zip(shapes, sim.state, strict=True)]
    assert sum(grown) >= 10
    finish(sim)
    assert fate(sim, 2) == alone(spec, big_episode(spec))
    for env in (0, 1, 3, 7):
        assert fate(sim, env) == alone(spec, episodes[env])


def with_segments(episode: Episode, num: int) -> Episode:
    """Return an episode whose first request has so many prefix segments, of two tokens each."""
    table = episode.table
    prefixes = {
        "prefix_offsets": np.array([0, *[num] * len(table)]),
        "prefix_keys": np.arange(1, num + 1),
        "prefix_ends": 2 * np.arange(1, num + 1, dtype=np.int32),
    }
    return replace(episode, table=replace(table, **prefixes))


def test_only_what_is_too_small_is_made_anew_with_room_for_the_next():
    episode = toy_episode([(0, 40, 3), (0.1, 10, 3)])
    sim = Simulator(toy_cluster(), [with_segments(episode, 4), episode], record=True)
    before = sim.state
    sim.load(0, with_segments(episode, 8))
    changed = [
        name for name in before._fields if getattr(before, name) is not getattr(sim.state, name)
    ]
    assert changed == ["segment"]
    assert sim.state.segment.shape == (2, 10)  # 8 and a quarter
    grown = sim.state
    sim.load(1, with_segments(episode, 10))
    assert sim.state is grown
    finish(sim)
    assert fate(sim, 0) == alone(toy_cluster(), with_segments(episode, 8))
    assert fate(sim, 1) == alone(toy_cluster(), with_segments(episode, 10))


def test_those_that_wait_for_one_request_are_chained_in_their_order():
    episode = toy_episode([(i, 10, 3) for i in range(6)])
    after = np.array([-1, 0, 0, 1, 0, -1], np.int32)
    sim = Simulator(toy_cluster(), [replace(episode, table=replace(episode.table, after=after))])
    assert sim.state.request["first_after"][0].tolist() == [1, 3, -1, -1, -1, -1]
    assert sim.state.request["next_after"][0].tolist() == [-1, 2, 4, -1, -1, -1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decisions", [0, 1, 23, 1000])
def test_a_new_episode_finds_no_trace_of_the_last_one(seed, decisions):
    spec, episodes = siblings(seed)
    sim = Simulator(spec, [big_episode(spec)], record=True)
    for _ in range(decisions):
        step(sim)
    assert episodes
    for episode in episodes:
        sim.load(0, episode)
        assert fate(finish(sim)) == alone(spec, episode)


def test_loading_one_environment_keeps_the_decision_that_is_due_in_another():
    # the loaded one had a decision due as well; it has none before it is advanced
    spec = toy_cluster(replica_type(seqs=1))
    episode = toy_episode([(0, 10, 1), (0, 10, 1)])
    sim = Simulator(spec, [episode, episode], record=True)
    sim.advance()
    sim.load(1, episode)
    sim.apply(np.array([0, 0]))
    assert [len(sim.events(env)) for env in range(2)] == [2, 0]
    finish(sim)
    assert fate(sim, 0) == fate(sim, 1) == alone(spec, episode)


def test_a_pickled_simulator_goes_on_in_another_process(tmp_path):
    """Addresses of compiled code are those of one process."""
    spec, episodes = siblings(1)
    simulator = Simulator(spec, episodes[:1])
    simulator.advance()
    stored = tmp_path / "simulator"
    stored.write_bytes(pickle.dumps(simulator))
    program = (
        "import pickle, pathlib, sys, numpy as np\n"
        "simulator = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "simulator.apply(np.zeros(1, np.int64))\n"
        "print(simulator.advance()[0], simulator.state.env[0]['now_s'].hex())\n"
    )
    simulator.apply(np.zeros(1, np.int64))
    here = f"{simulator.advance()[0]} {simulator.state.env[0]['now_s'].hex()}"
    there = subprocess.run(
        [sys.executable, "-c", program, stored], capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here
