"""Requests that wait at a replica and would now go to another: they are sent there instead.

No engine's API moves a request that decodes. What a router can do is to take back a stream of which
no token has come, as if its client had left, and to send it elsewhere: as far as a router can tell
it was queued. If its prefill had begun, that is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from servegym.serve.router.placement import MovingPlacement, Seat
from servegym.serve.router.upstream import Exchange


class RequeuedError(Exception):
    """Raised when a request has been placed elsewhere while it waited.

    Args:
        seat: Where it is now.
    """

    def __init__(self, seat: Seat) -> None:
        super().__init__(seat.name)
        self.seat = seat


async def ask_or_move(
    asking: Coroutine[Any, Any, Exchange], placement: MovingPlacement, after_s: float
) -> Exchange:
    """Wait until an answer has begun, and ask again and again whether to wait elsewhere.

    Args:
        asking: Of the replica.
        placement: Of the request.
        after_s: Between two looks, and before the first.

    Raises:
        UpstreamError: If there is no answer.
        RequestError: If the router fails it.
        RequeuedError: If it has been placed elsewhere; the replica is told to stop.
    """
    waiting = asyncio.create_task(asking)
    try:
        while True:
            await asyncio.wait({waiting}, timeout=after_s)
            if waiting.done():
                return waiting.result()
            seat = await placement.move_on()
            if seat is not None:  # wherever it is asked, it is booked there: an answer that has
                # begun meanwhile is dropped, as nothing of it has been passed on
                raise RequeuedError(seat)
    except BaseException:
        if not waiting.cancel() and not waiting.cancelled() and waiting.exception() is None:
            waiting.result().close()
        await asyncio.wait({waiting})
        raise
