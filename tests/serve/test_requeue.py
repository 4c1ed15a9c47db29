"""Streams that wait for their first token and are sent elsewhere."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from servegym.serve.decision_log import read_rows
from servegym.serve.facts import Rates, fleet_facts
from servegym.serve.router.placement import Seat
from servegym.serve.router.requeue import RequeuedError, ask_or_move
from servegym.serve.state import LiveState

from .running import RATES, VirtualTimeLoop, run, running, until

ASK = {"model": "m", "prompt": "x", "stream": True}
REQUEUE = {"after_s": 0.05, "margin_requests": 2}


async def crowd(router, number: int = 4, body=ASK) -> list[asyncio.Task]:
    """Let so many requests wait at the first replica, which says nothing; the other is free."""
    await router.operate("/drain", {"replica": "r1"})
    router.replicas[0].mode = "hang"
    asking = [asyncio.create_task(router.post(body)) for _ in range(number)]
    await until(lambda: len(router.replicas[0].bodies) == number)
    await router.operate("/undrain", {"replica": "r1"})
    return asking


async def leave(router, asking) -> None:
    for one in asking:
        one.cancel()
    await until(router.idle)


def test_as_many_move_as_gain_the_margin(start, tmp_path):
    async def test():
        settings = {"request": {"requeue": REQUEUE}, "dispatch": {"log": {"folder": str(tmp_path)}}}
        async with start(2, **settings) as router:
            asking = await crowd(router)
            # 3 others here and none there, then 2: both move; with 1 here the rest stays
            await until(lambda: sum(one.done() for one in asking) == 2)
            answers = [await one for one in asking if one.done()]
            for status, _, headers in answers:
                assert (status, headers["X-Servegym-Replica"]) == (200, "r1")
            assert len(router.replicas[1].bodies) == 2
            await asyncio.sleep(0.15)  # they are looked at again, and stay
            assert sum(one.done() for one in asking) == 2
            assert router.replicas[0].cancelled == 2
            assert router.router.telemetry.requeues == {("r0", "r1"): 2}
            await leave(router, asking)
        moved = [row for row in read_rows(tmp_path) if row["status"] == "finished"]
        assert len(moved) == 2
        for row in moved:
            assert [one["replica_name"] for one in row["decisions"]] == ["r0", "r1"]
            assert row["num_retries"] == 1

    run(test, loop=VirtualTimeLoop)


def test_a_request_moves_no_more_often_than_it_may(start):
    async def test():
        async with start(2, request={"requeue": REQUEUE}) as router:
            router.replicas[1].mode = "hang"
            asking = await crowd(router, 5)
            await until(lambda: len(router.replicas[1].bodies) == 2)
            await router.operate("/drain", {"replica": "r0"})
            await asyncio.sleep(0.2)
            assert len(router.replicas[0].bodies) == 5
            assert sum(router.router.telemetry.requeues.values()) == 2
            assert router.state.outstanding(0) == 3
            await leave(router, asking)

    run(test, loop=VirtualTimeLoop)


@pytest.mark.parametrize(
    ("settings", "body"),
    [
        ({}, ASK),  # it is off by default
        ({"requeue": REQUEUE, "retry_share": 0.0, "retry_reserve": 0}, ASK),
        ({"requeue": REQUEUE | {"margin_requests": 4}}, ASK),
        ({"requeue": REQUEUE}, ASK | {"stream": False}),  # it may be half done
    ],
)
def test_nothing_moves_without_leave_budget_margin_or_stream(start, settings, body):
    async def test():
        async with start(2, request=settings) as router:
            asking = await crowd(router, body=body)
            await asyncio.sleep(0.2)
            assert not router.replicas[1].bodies
            assert router.replicas[0].cancelled == 0
            await leave(router, asking)

    run(test, loop=VirtualTimeLoop)


def test_a_stream_that_has_begun_stays(start):
    async def test():
        async with start(2, request={"requeue": REQUEUE}) as router:
            router.replicas[0].gap_s = 0.1
            await router.operate("/drain", {"replica": "r1"})
            asking = [asyncio.create_task(router.post(ASK)) for _ in range(4)]
            await until(lambda: router.replicas[0].sent >= 4)
            await router.operate("/undrain", {"replica": "r1"})
            answers = await asyncio.gather(*asking)
            assert {headers["X-Servegym-Replica"] for _, _, headers in answers} == {"r0"}

    run(test, loop=VirtualTimeLoop)


def test_a_fleet_seen_without_a_request_is_as_before_afterwards():
    state = LiveState(fleet_facts([Rates(**RATES)] * 2))
    requests = [
        state.arrive(0.0, key=str(k), prompt_tokens=100.0 + k, predicted_output_tokens=9.0)
        for k in range(3)
    ]
    for request in requests:
        state.observe(request, 0.0)
        state.dispatch(request, 0, 0.0)
    before = state.replicas.copy()
    with state.without(requests[1]):
        assert state.replicas[1:5, 0].tolist() == [2.0, 202.0, 202.0, 18.0]
    np.testing.assert_array_equal(state.replicas, before)
    for request in requests:
        state.leave(request)
    assert not state.replicas[1:5].any()


class Moves:
    """A placement that is moved once, when the answer has begun while it was asked."""

    def __init__(self, begins: asyncio.Event) -> None:
        self.begins = begins

    async def move_on(self) -> Seat | None:
        self.begins.set()
        for _ in range(10):
            await asyncio.sleep(0)
        return Seat("there", "http://there", 0.0, None, 0, 1.0)


class Answer:
    """An exchange that has begun."""

    closed = False

    def close(self) -> None:
        self.closed = True


def test_an_answer_that_begins_while_a_move_is_asked_for_is_dropped():
    async def test():
        begins, answer = asyncio.Event(), Answer()

        async def ask():
            await begins.wait()
            return answer

        with pytest.raises(RequeuedError) as moved:
            await ask_or_move(ask(), Moves(begins), 0.01)
        assert moved.value.seat.name == "there"
        assert answer.closed

    run(test)


def test_a_stream_that_waits_stays_when_the_decider_goes():
    async def test():
        async with running(1, 1, request={"requeue": REQUEUE}) as router:
            router.replicas[0].script = [0.5, b'data: {"choices": [{"text": "t"}]}\n\n']
            router.replicas[0].script.append(b"data: [DONE]\n\n")
            asking = asyncio.create_task(router.post(ASK))
            await until(lambda: bool(router.replicas[0].bodies))
            router.router._decider.stop()
            status, answer, _ = await asking
            assert (status, answer.count(b"data: {")) == (200, 1)
            assert len(router.replicas[0].bodies) == 1

    run(test)
