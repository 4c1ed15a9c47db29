"""A process that is started anew whenever it ends, later and later if it fails at once."""

from __future__ import annotations

import time
from collections.abc import Callable

#: One that lives shorter than this, seconds, has failed to start.
STEADY_S = 10.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0


class Child:
    """The decider or a worker.

    Attributes:
        name: In the log.
        run: What it does, and its exit status.
        pid: Of its process, 0 while there is none.
        start_s: When it is, or was, to be started.
        is_up: Whether it has begun its work since.
        failures: How often in a row it has ended soon after, or before it was up.
    """

    def __init__(self, name: str, run: Callable[[], int]) -> None:
        self.name = name
        self.run = run
        self.pid = 0
        self.start_s = 0.0
        self.is_up = False
        self.failures = 0

    def ended(self) -> None:
        """Its process has ended: when to start it again?"""
        now_s = time.monotonic()
        self.pid = 0
        is_early = not self.is_up or now_s - self.start_s < STEADY_S
        self.failures = self.failures + 1 if is_early else 1
        self.is_up = False
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** (self.failures - 1), _LONGEST_PAUSE_S)
        self.start_s = now_s + pause_s
