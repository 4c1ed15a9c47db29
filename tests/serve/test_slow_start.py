"""Newcomers get their share of the load, and readiness is another thing than being alive."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from servegym.policy.contract import OUTSTANDING_REQUESTS
from servegym.serve.facts import Rates, fleet_facts
from servegym.serve.router.slow_start import SlowStart
from servegym.serve.state import LiveState

from .running import VirtualTimeLoop, run, running, until

SLOW = Rates(prefill_tokens_per_s=1000.0, decode_step_s=0.02)
FAST = Rates(prefill_tokens_per_s=2000.0, decode_step_s=0.01)


class Fleet:
    """Two warm replicas and a newcomer, slot 2, with loads of a test's own."""

    def __init__(self, newcomer: Rates = SLOW, duration_s: float = 10.0) -> None:
        self.now_s = 100.0
        self.state = LiveState(fleet_facts([SLOW, SLOW, newcomer]))
        self.slow_start = SlowStart(duration_s, self.state, lambda: self.now_s)
        self.slow_start.begin(2)

    def is_held_back(self, loads, allowed=(True, True, True)) -> bool:
        self.state.replicas[OUTSTANDING_REQUESTS] = loads
        held_back = self.slow_start.held_back(np.array(allowed))
        assert held_back in ([], [2])
        return held_back == [2]

    def most(self, warm) -> int:
        """How many requests the newcomer gets when it is preferred to all others."""
        return next(n for n in range(1000) if self.is_held_back([*warm, n]))


def test_a_newcomer_may_have_its_share_of_what_the_others_have():
    fleet = Fleet()
    assert fleet.most([30, 50]) == 1  # one in any case
    fleet.now_s += 2.5
    assert fleet.slow_start.share(2) == 0.25
    assert fleet.most([30, 50]) == 10  # a quarter of 40
    fleet.now_s += 5.0
    assert fleet.most([30, 50]) == 30
    assert fleet.most([0, 0]) == 1
    fleet.now_s += 2.5
    assert not fleet.is_held_back([0, 0, 1000])  # it is new no more
    assert fleet.slow_start.share(2) == 1.0


def test_a_faster_newcomer_may_have_more():
    fleet = Fleet(FAST)
    fleet.now_s += 5.0
    assert fleet.most([10, 10]) == 10  # half of 10, at twice the speed


def test_a_newcomer_is_not_held_back_where_there_is_none_but_newcomers():
    fleet = Fleet()
    assert not fleet.is_held_back([0, 0, 9], allowed=(False, False, True))
    assert not fleet.is_held_back([9, 9, 9], allowed=(True, True, False))  # not in question
    fleet.slow_start.begin(0)
    fleet.slow_start.begin(1)
    assert not fleet.is_held_back([0, 0, 9])


def test_who_goes_down_is_no_newcomer_and_zero_seconds_are_none():
    fleet = Fleet()
    fleet.slow_start.forget(2)
    assert not fleet.is_held_back([1, 1, 9])
    assert not Fleet(duration_s=0.0).is_held_back([1, 1, 9])


@pytest.mark.parametrize(("slow_start_s", "most"), [(0.0, 12), (60.0, 1)])
def test_a_replica_that_comes_up_gets_no_flood(slow_start_s, most):
    async def test():
        async with running(2, health={"slow_start_s": slow_start_s}) as it:
            for replica in it.replicas:
                replica.tokens, replica.gap_s = 400, 0.02
            it.replicas[1].healthy = False
            await until(lambda: not it.state.is_up(1))
            body = {"prompt": "hi", "stream": True}
            asking = [asyncio.create_task(it.post(body)) for _ in range(12)]
            await until(lambda: it.state.outstanding(0) == 12)
            it.replicas[1].healthy = True
            await until(lambda: it.state.is_up(1))
            asking += [asyncio.create_task(it.post(body)) for _ in range(12)]
            await until(lambda: it.state.outstanding(0) + it.state.outstanding(1) == 24)
            assert it.state.outstanding(1) == most
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    run(test, loop=VirtualTimeLoop)


def test_a_router_without_replicas_is_alive_and_not_ready():
    async def test():
        async with running(1) as it:

            async def ask(path):
                async with it.client.get(it.admin + path) as response:
                    return response.status, json.loads(await response.text())["status"]

            assert await ask("/livez") == (200, "alive")
            assert await ask("/readyz") == (200, "ok")
            it.router._health.drain(0, True)
            assert await ask("/livez") == (200, "alive")
            assert await ask("/readyz") == (503, "no replica")
            it.router._health.drain(0, False)
            it.router._desk.stopping = True
            assert await ask("/livez") == (200, "alive")
            assert await ask("/readyz") == (503, "stopping")

    run(test, loop=VirtualTimeLoop)
