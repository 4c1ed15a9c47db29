"""Processes that hang are told from those that have nothing to do."""

import asyncio

from servegym.serve.router.workers.heartbeats import Heartbeats


def test_who_beats_is_not_silent_and_who_has_stopped_is():
    beats = Heartbeats(2)

    async def test() -> float:
        beats.beat(1)
        return asyncio.get_running_loop().time()

    begin_s = asyncio.run(test())  # the clock is time.monotonic
    assert beats.silent_s(0, 0.0, begin_s + 100.0) == 0.0  # has yet to begin
    assert 99.0 < beats.silent_s(1, 0.0, begin_s + 100.0) < 101.0
    assert beats.silent_s(1, begin_s + 95.0, begin_s + 100.0) == 5.0
    beats.forget(1)
    assert beats.silent_s(1, 0.0, begin_s + 100.0) == 0.0


def test_a_loop_that_turns_beats_on(monkeypatch):
    monkeypatch.setattr("servegym.serve.router.workers.heartbeats._BEAT_S", 0.01)
    beats = Heartbeats(1)

    async def test() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        beats.beat(0)
        first_s = loop.time()
        until_s = first_s + 5.0
        while beats.silent_s(0, 0.0, first_s) >= 0.0 and loop.time() < until_s:
            await asyncio.sleep(0.01)
        return first_s, loop.time()

    first_s, end_s = asyncio.run(test())
    assert beats.silent_s(0, 0.0, first_s) < 0.0  # it has beaten after that
    assert end_s - first_s < 5.0
