"""A limit of the CPU time that a reader may take: far above what a linear one needs."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

#: A megabyte takes a linear reader milliseconds, a quadratic one many minutes.
LONG = 1_000_000


@contextlib.contextmanager
def cpu_limit(seconds: float = 5.0) -> Iterator[None]:
    """Interrupt what takes more CPU time; regular expressions look for signals too."""

    def interrupt(number, frame):
        raise AssertionError(f"took more than {seconds} s of CPU time: more than its length costs")

    before = signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)
