"""A server's life in a process: from its start to the signal that says to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

_log = logging.getLogger(__name__)


class Served(Protocol):
    """What can be served until it is told to stop."""

    async def start(self) -> None:
        """Begin to serve."""

    async def drain(self) -> int:
        """Refuse what is new, wait for what is in progress, and return how much of it is left."""

    async def stop(self) -> None:
        """Stop serving; what is in progress is cut off."""

    def read_anew(self) -> None:
        """Read files of the configuration anew."""

    @property
    def in_flight(self) -> int:
        """How many requests are in progress."""


_S = TypeVar("_S", bound=Served)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes event loops: uvloop, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def serve_until_told(
    served: _S, ready: Callable[[_S], None], stop: asyncio.Event | None = None
) -> None:
    """Serve until a signal (SIGTERM, SIGINT) or an event says to stop, then let requests end.

    SIGHUP reads files anew and stops nothing.

    Args:
        served: What serves.
        ready: Called with it once it serves.
        stop: The event, if anything but a signal may say it.
    """
    stop, loop = stop or asyncio.Event(), asyncio.get_running_loop()
    with told_by_signals(stop.set, served.read_anew):
        await served.start()
        with kept_as_it_is():
            ready(served)
            await stop.wait()
        told_s = loop.time()
        _log.warning("stopping: %d requests in progress", served.in_flight)
        if left := await served.drain():
            _log.warning("%d requests are cut off after %.3g s", left, loop.time() - told_s)
        await served.stop()


@contextmanager
def told_by_signals(
    stop: Callable[[], None], read_anew: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hear signals in the running event loop, and leave the process as it was found.

    Args:
        stop: Called on SIGTERM and SIGINT.
        read_anew: Called on SIGHUP; None leaves that signal alone.
    """
    loop = asyncio.get_running_loop()
    heard = {signal.SIGTERM: stop, signal.SIGINT: stop}
    if read_anew is not None:
        heard[signal.SIGHUP] = read_anew
    before = {number: signal.getsignal(number) for number in heard}
    for number, call in heard.items():
        loop.add_signal_handler(number, call)
    try:
        yield
    finally:
        # a loop of uvloop's keeps its handlers when it is closed: Ctrl-C would do nothing after it
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


@contextmanager
def kept_as_it_is() -> Iterator[None]:
    """Keep the garbage collector from what is there now; through all of it, it takes 0.1 s."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
