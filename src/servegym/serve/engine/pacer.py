"""A replica's clock tied to the wall's."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from servegym.serve.engine.replica import Replica
from servegym.serve.engine.request import EngineRequest
from servegym.serve.monitoring.prometheus import Histogram

#: Bounds of the lateness of steps, real seconds.
LATENESS_BOUNDS_S = tuple(
    base * 10.0**exponent for exponent in range(-5, 1) for base in (1.0, 2.0, 5.0)
)
#: Steps due within this much real time count as due: the sums of a clock's floats are not exact.
_TOLERANCE_S = 1e-6
#: What timers of event loops count in; uvloop's would fire too early if it had to round.
_TIMER_TICKS_PER_S = 1000


class Pacer:
    """Steps a replica when its time has come.

    Deadlines are absolute, so a step that is late does not make the next one late: after a pause
    of the process all steps that were due are done at once, and what they gave out is delivered
    together.

    Args:
        replica: The replica.
        speed: Seconds of its clock in one real second.
        deliver: Called with each request that has tokens to send.
        clock_s: The wall's clock, real seconds; `time.monotonic` if it is not given.
        origin_s: When the replica's clock is at 0, by the wall's; now if it is not given.

    Attributes:
        lateness_s: How long after their times steps were done, real seconds.
    """

    def __init__(
        self,
        replica: Replica,
        speed: float,
        deliver: Callable[[EngineRequest], None],
        clock_s: Callable[[], float] | None = None,
        origin_s: float | None = None,
    ) -> None:
        self.replica = replica
        self.lateness_s = Histogram(LATENESS_BOUNDS_S)
        self._speed = speed
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._clock_s = clock_s or time.monotonic
        self._origin_s = self._clock_s() if origin_s is None else origin_s
        self._timer: asyncio.TimerHandle | None = None
        self._hung = False
        self._left_s = math.inf  # of the step in progress when it hung

    @property
    def now_s(self) -> float:
        """Time of the replica's clock."""
        return (self._clock_s() - self._origin_s) * self._speed

    @property
    def hanging(self) -> bool:
        """Whether the engine stands still."""
        return self._hung

    def submit(self, request: EngineRequest) -> None:
        """Put a request into the waiting queue now; see `Replica.submit`."""
        self.do(lambda now_s: self.replica.submit(request, now_s))

    def do(self, action: Callable[[float], None]) -> None:
        """Do something to the replica that may give it something to do.

        Args:
            action: Called with the time, when all that was due before has been done.
        """
        self._catch_up()
        due_s = self.replica.due_s
        action(self.now_s)
        if self.replica.due_s < due_s:
            self._arm()

    def abort(self, request: EngineRequest) -> None:
        """Take a request off its replica, at the present time."""
        self.replica.abort(request, self.now_s)

    def set_multiplier(self, multiplier: float) -> None:
        """Change the replica's speed for steps that begin from now on."""
        self._catch_up()
        self.replica.speed_up(multiplier, self.now_s)

    def fail(self) -> list[EngineRequest]:
        """Lose everything; see `Replica.fail`."""
        self._catch_up()
        lost = self.replica.fail(self.now_s)
        self._left_s = math.inf
        self._arm()
        return lost

    def hang(self) -> None:
        """Stand still: requests are taken in, and nothing happens to them."""
        if not self.hanging:
            self._catch_up()
            self._hung = True
            self._left_s = self.replica.due_s - self.now_s
            self._arm()

    def resume(self) -> None:
        """Go on where `hang` interrupted; an engine that was idle begins with what has come."""
        if self.hanging:
            self._hung = False
            if not math.isinf(self.replica.due_s):
                left_s = self._left_s if math.isfinite(self._left_s) else 0.0
                self.replica.postpone(self.now_s + left_s)
            self._arm()

    def stop(self) -> None:
        """Do no more steps."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _catch_up(self) -> None:
        """Do the steps that are due, so that what comes now finds the replica as it is now."""
        replica = self.replica
        now_s = self.now_s
        horizon_s = now_s + _TOLERANCE_S * self._speed
        if self.hanging or replica.due_s > horizon_s:
            return
        while replica.due_s <= horizon_s:
            self.lateness_s.observe(max(now_s - replica.due_s, 0.0) / self._speed)
            replica.step()
        outbox, replica.outbox = replica.outbox, {}
        for request in outbox:
            self._deliver(request)

    def _tick(self) -> None:
        self._catch_up()
        self._arm()

    def _arm(self) -> None:
        self.stop()
        if not self.hanging and not math.isinf(self.replica.due_s):
            wait_s = (self.replica.due_s - self.now_s) / self._speed
            ticks = math.ceil(max(wait_s, 0.0) * _TIMER_TICKS_PER_S - 1e-3)
            self._timer = self._loop.call_later(ticks / _TIMER_TICKS_PER_S, self._tick)
