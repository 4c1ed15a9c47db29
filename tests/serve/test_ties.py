"""Equally good replicas get requests in turn, of one router and of several."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from servegym.serve.dispatcher import DispatchConfig, Dispatcher
from servegym.serve.facts import Rates, fleet_facts
from servegym.serve.runtime import RuntimeConfig


def make(num_replicas: int, policy: str = "least-outstanding", seed: int | None = None):
    runtime = RuntimeConfig(policy=policy, fallback=policy)
    rates = [Rates(prefill_tokens_per_s=1000.0, decode_step_s=0.01)] * num_replicas
    clock = itertools.count()
    dispatcher = Dispatcher(
        DispatchConfig(runtime=runtime, seed=seed),
        [f"r{i}" for i in range(num_replicas)],
        fleet_facts(rates),
        clock=lambda: float(next(clock)),
    )
    for replica in range(num_replicas):
        dispatcher.state.set_up(replica, True)
    return dispatcher


def send(dispatcher: Dispatcher, *, keep: bool = False) -> int:
    job = dispatcher.arrive("hello", key="k")
    action = dispatcher.decide(job).action
    assert job.replica == action
    if not keep:
        dispatcher.finish(job, 5)
    return action


@pytest.mark.parametrize("seed", range(5))
def test_two_routers_side_by_side_share_an_idle_fleet_as_round_robin_would(seed):
    routers = [make(3, seed=seed), make(3, seed=100 + seed)]
    shares = Counter(send(router) for _ in range(100) for router in routers)
    assert max(shares.values()) - min(shares.values()) <= 6
    # each for itself goes round: none waits longer than two rounds
    chosen = [send(routers[0]) for _ in range(60)]
    assert all(len(set(chosen[i : i + 6])) == 3 for i in range(54))


def test_many_routers_do_not_all_begin_with_the_same_replica():
    first = Counter(send(make(3)) for _ in range(60))
    assert len(first) == 3
    assert max(first.values()) < 40


def test_a_seed_makes_decisions_repeatable():
    def decisions(seed):
        router = make(5, seed=seed)
        return [send(router, keep=True) for _ in range(50)]

    assert decisions(7) == decisions(7)
    assert decisions(7) != decisions(8)


def test_only_ties_are_broken():
    router = make(4, seed=1)
    for _ in range(4):
        send(router, keep=True)  # one on each
    busy = router.arrive("hello", key="busy")
    action = router.decide(busy).action
    assert router.state.replicas[1, action] == 2
    assert action not in {send(router, keep=True) for _ in range(3)}


def test_replicas_that_are_down_stay_out_and_round_robin_keeps_its_place():
    router = make(3, seed=3)
    router.state.set_up(1, False)
    assert {send(router) for _ in range(20)} == {0, 2}
    router = make(3, policy="round-robin")
    assert [send(router) for _ in range(6)] == [0, 1, 2, 0, 1, 2]
