"""The pacer on a clock that the test moves."""

from __future__ import annotations

import asyncio
import heapq

import numpy as np
import pytest

from servegym.cluster.spec import ReplicaType
from servegym.serve.engine.metrics import EngineMetrics
from servegym.serve.engine.pacer import Pacer
from servegym.serve.engine.replica import Replica
from servegym.serve.engine.request import EngineRequest, Status

from ...cluster.strategies import random_grid  # noqa: TID252


class HandClock:
    """The part of an event loop that the pacer uses."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._timers: list = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, wait_s, callback):
        timer = asyncio.TimerHandle(self.now_s + wait_s, callback, (), self)
        heapq.heappush(self._timers, timer)
        return timer

    def _timer_handle_cancelled(self, timer) -> None:
        pass

    def get_debug(self) -> bool:
        return False

    def run_until(self, now_s: float, late_s: float = 0.0) -> None:
        """Run what is due; the loop wakes up `late_s` after each deadline."""
        while self._timers and self._timers[0].when() <= now_s:
            timer = heapq.heappop(self._timers)
            if not timer.cancelled():
                self.now_s = max(self.now_s, timer.when() + late_s)
                timer._callback()
        self.now_s = max(self.now_s, now_s)


@pytest.fixture
def clock(monkeypatch):
    clock = HandClock()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: clock)
    return clock


def make_pacer(clock, speed: float = 1.0):
    kind = ReplicaType("small", random_grid(np.random.default_rng(3)), 64, 64, 8)
    sent = []
    pacer = Pacer(Replica(kind, EngineMetrics("m", speed)), speed, sent.append, clock.time)
    return pacer, sent


def finish_times(clock, late_s: float, speed: float = 1.0) -> list[float]:
    pacer, _ = make_pacer(clock, speed)
    requests = [EngineRequest(str(i), 20 + i, 30, lambda j, i=i: 100 * i + j) for i in range(6)]
    start_s = clock.now_s
    for i, request in enumerate(requests):
        clock.run_until(start_s + 0.01 * i / speed, late_s)
        clock.now_s = start_s + 0.01 * i / speed
        pacer.submit(request)
    clock.run_until(start_s + 100.0, late_s)
    assert {q.status for q in requests} == {Status.FINISHED}
    return [q.first_token_s for q in requests]


def test_late_wake_ups_do_not_move_the_engine_clock(clock):
    assert finish_times(clock, 0.0) == pytest.approx(finish_times(clock, 0.004), abs=1e-9)


def test_engine_clock_runs_faster_than_the_wall_by_the_speed(clock):
    pacer, sent = make_pacer(clock, speed=10.0)
    request = EngineRequest("0", 20, 30, lambda j: j)
    pacer.submit(request)
    clock.run_until(clock.now_s + 100.0)
    plain, _ = make_pacer(clock)
    same = EngineRequest("0", 20, 30, lambda j: j)
    plain.submit(same)
    clock.run_until(clock.now_s + 100.0)
    lasted = [q.last_token_s - q.arrival_s for q in (request, same)]
    assert lasted[0] == pytest.approx(lasted[1], rel=1e-6)
    assert len(sent) == 30


def test_steps_missed_in_a_pause_are_done_at_once_and_delivered_together(clock):
    pacer, sent = make_pacer(clock)
    request = EngineRequest("0", 20, 30, lambda j: j)
    pacer.submit(request)
    clock.run_until(clock.now_s + 1e-3, late_s=60.0)
    assert request.status == Status.FINISHED
    assert sent == [request]
    assert pacer.lateness_s.count == 31  # the wake-up of the idle engine, and 30 steps
    assert pacer.lateness_s.quantile(0.5) > 1.0


def test_hanging_engine_takes_requests_and_goes_on_where_it_stood(clock):
    pacer, sent = make_pacer(clock)
    first = EngineRequest("0", 20, 30, lambda j: j)
    pacer.submit(first)
    clock.run_until(clock.now_s + 0.05)
    pacer.hang()
    before = len(sent)
    left_s = pacer.replica.due_s - pacer.now_s
    clock.run_until(clock.now_s + 30.0)
    second = EngineRequest("1", 20, 30, lambda j: 100 + j)
    pacer.submit(second)
    clock.run_until(clock.now_s + 30.0)
    assert len(sent) == before
    assert pacer.hanging
    pacer.resume()
    assert pacer.replica.due_s - pacer.now_s == pytest.approx(left_s)
    clock.run_until(clock.now_s + 30.0)
    assert {first.status, second.status} == {Status.FINISHED}


def test_engine_that_hung_while_idle_serves_what_came_meanwhile(clock):
    pacer, _ = make_pacer(clock)
    pacer.hang()
    request = EngineRequest("0", 20, 3, lambda j: j)
    pacer.submit(request)
    clock.run_until(clock.now_s + 30.0)
    assert request.status == Status.WAITING
    pacer.resume()
    assert pacer.replica.due_s == pacer.now_s  # not as long again as it hung
    clock.run_until(clock.now_s + 1.0)
    assert request.status == Status.FINISHED


def test_engine_that_failed_while_it_hung_serves_at_once_what_came_after(clock):
    pacer, _ = make_pacer(clock)
    pacer.submit(EngineRequest("0", 20, 30, lambda j: j))
    clock.run_until(clock.now_s + 0.05)
    pacer.hang()
    clock.run_until(clock.now_s + 30.0)
    pacer.fail()
    clock.run_until(clock.now_s + 30.0)
    request = EngineRequest("1", 20, 3, lambda j: j)
    pacer.submit(request)
    clock.run_until(clock.now_s + 30.0)
    pacer.resume()
    assert pacer.replica.due_s == pacer.now_s
    clock.run_until(clock.now_s + 1.0)
    assert request.status == Status.FINISHED
