"""Timers that share one of the event loop's."""

from __future__ import annotations

import asyncio
import time
import weakref

from servegym.serve.router.timers import Timers


def test_functions_are_called_in_the_order_they_are_due_and_those_called_off_are_not():
    async def test() -> None:
        timers, log = Timers(), []
        timers.after(0.03, lambda: log.append("late"))
        timers.after(0.01, lambda: log.append("early"))  # the loop's timer has to come earlier
        off = timers.after(0.02, lambda: log.append("never"))
        timers.after(0.0, lambda: log.append("first"))
        last = asyncio.Event()
        timers.after(0.04, last.set)
        off.cancel()
        assert log == []
        await last.wait()
        assert log == ["first", "early", "late"]

    asyncio.run(test())


def test_nothing_is_called_before_its_time():
    async def test() -> None:
        timers, ended = Timers(), asyncio.get_running_loop().create_future()
        begin_s = time.monotonic()
        timers.after(0.0123, lambda: ended.set_result(time.monotonic()))
        assert await ended - begin_s >= 0.0123

    asyncio.run(test())


def test_function_that_fails_is_reported_and_keeps_no_other_from_being_called():
    async def test() -> None:
        loop, said = asyncio.get_running_loop(), []
        loop.set_exception_handler(lambda _, context: said.append(context["exception"]))
        timers, ended = Timers(), asyncio.Event()
        error = RuntimeError("of a test")

        def fail() -> None:
            raise error

        timers.after(0.0, fail)
        timers.after(0.0, ended.set)
        await ended.wait()
        assert said == [error]

    asyncio.run(test())


def test_function_may_set_the_next_timer_and_a_timer_is_called_once():
    async def test() -> None:
        timers, log, ended = Timers(), [], asyncio.Event()

        def again() -> None:
            log.append(len(log))
            if len(log) < 3:
                timers.after(0.0, again)
            else:
                ended.set()

        timer = timers.after(0.0, again)
        await ended.wait()
        timer.cancel()
        assert log == [0, 1, 2]

    asyncio.run(test())


def test_what_is_called_off_is_let_go_at_once():
    async def test() -> None:
        class Held:
            def look(self) -> None: ...

        timers, held = Timers(), Held()
        alive = weakref.ref(held)
        timer = timers.after(1000.0, held.look)
        timer.cancel()
        del held
        assert alive() is None

    asyncio.run(test())


def test_what_is_called_off_does_not_pile_up():
    async def test() -> None:
        timers, called = Timers(), []
        kept = [timers.after(0.05, lambda i=i: called.append(i)) for i in range(500)]
        for _ in range(50_000):
            timers.after(600.0, called.clear).cancel()
        assert len(timers._heap) <= 2 * 1024
        for timer in kept[::2]:
            timer.cancel()
        await asyncio.sleep(0.2)
        assert called == list(range(1, 500, 2))

    asyncio.run(test())
