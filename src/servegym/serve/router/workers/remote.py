"""The carrying end: a desk that asks the decider."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from servegym.serve.router.auth import Keys
from servegym.serve.router.config import RouterConfig
from servegym.serve.router.errors import RequestError
from servegym.serve.router.reply import Reply
from servegym.serve.router.workers.frames import Frame, Kind, pack, unpack
from servegym.serve.router.workers.link import Link
from servegym.serve.router.workers.remote_placement import RemotePlacement

#: Between two attempts to find the decider, seconds.
_AGAIN_S = 0.05
#: How late the decider may know how many clients were answered, seconds.
_COUNTS_S = 0.05


class RemoteDesk:
    """Asks the decider; see `Desk`. While there is none, requests are refused.

    Args:
        config: Of the router.
        path: Of the decider's socket.
        keys_changed: Called with the API keys whenever the decider tells them.
        leave: Called when the decider says that the router stops.
    """

    def __init__(
        self,
        config: RouterConfig,
        path: Path,
        keys_changed: Callable[[Keys | None], None],
        leave: Callable[[], None],
    ) -> None:
        log = config.dispatch.log
        self.follows = log is not None and log.max_ends > 0
        self._retry_after_s = config.request.retry_after_s
        self._path = path
        self._keys_changed = keys_changed
        self._leave = leave
        self._link: Link | None = None
        self._waiting: dict[int, RemotePlacement | asyncio.Future[Reply]] = {}
        self._last_ticket = 0
        self._lost = asyncio.Event()
        self._counts: Counter[tuple[str, int]] = Counter()
        self._counting: asyncio.TimerHandle | None = None

    async def connect(self, timeout_s: float) -> bool:
        """Find the decider; return whether it was there in time."""
        until_s = time.monotonic() + timeout_s
        connection = socket.socket(socket.AF_UNIX)
        while True:
            try:
                connection.connect(str(self._path))
                break
            except OSError:
                if time.monotonic() >= until_s:
                    connection.close()
                    return False
            await asyncio.sleep(_AGAIN_S)
        self._lost.clear()
        self._link = Link(connection, self._look)
        self._link.send(Kind.HELLO, 0, pack(os.getpid()))
        return True

    async def lost(self) -> None:
        """Wait until the decider has gone."""
        await self._lost.wait()

    def close(self) -> None:
        """Hang up."""
        if self._counting is not None:
            self._counting.cancel()
            self._tell_counts()
        if self._link is not None:
            self._link.close()

    def enter(self, tenant: str, key: str) -> RemotePlacement:
        """See `Desk`.

        Raises:
            RequestError: If there is no decider.
        """
        link, ticket = self._connected(), self._next_ticket()
        placement = self._waiting[ticket] = RemotePlacement(self, link, ticket)
        link.put(Kind.ENTER, ticket, pack(tenant, key))
        return placement

    def count(self, endpoint: str, status: int) -> None:
        """See `Desk`."""
        self._counts[endpoint, status] += 1
        if self._counting is None:
            loop = asyncio.get_running_loop()
            self._counting = loop.call_later(_COUNTS_S, self._tell_counts)

    def left(self) -> None:
        """Tell that all clients have gone."""
        if self._link is not None:
            self._link.send(Kind.LEFT)

    def lags(self, lag_s: float) -> None:
        """Tell how late this process' event loop is, seconds."""
        if self._link is not None:
            self._link.put(Kind.LAG, 0, pack(lag_s))

    async def page(self, path: str) -> Reply:
        """See `Desk`."""
        link, ticket = self._connected(), self._next_ticket()
        shown: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = shown
        link.send(Kind.PAGE, ticket, pack(path))
        try:
            return await shown
        finally:
            self._waiting.pop(ticket, None)

    def forget(self, ticket: int) -> None:
        """Nothing more is expected of a request."""
        self._waiting.pop(ticket, None)

    def away(self) -> RequestError:
        """Make the error of a request about which nobody can decide."""
        return RequestError(
            503,
            "the router's deciding process is away: come again later",
            "no_decider",
            retry_after_s=self._retry_after_s,
        )

    def _connected(self) -> Link:
        if self._link is None or self._link.lost:
            raise self.away()
        return self._link

    def _tell_counts(self) -> None:
        """Say how many clients have been answered since it was last said."""
        self._counting = None
        if self._link is not None and not self._link.lost:
            self._link.send(Kind.COUNT, 0, pack(dict(self._counts)))
            self._counts.clear()

    def _next_ticket(self) -> int:
        self._last_ticket = self._last_ticket % 0xFFFF_FFFF + 1
        return self._last_ticket

    def _look(self) -> None:
        """Take in what the decider has said."""
        assert self._link is not None
        for packet in self._link.receive():
            for frame in packet.frames:
                self._take(frame)
        if self._link.lost:
            for waiting in list(self._waiting.values()):
                _refuse(waiting, self.away())
            self._waiting.clear()
            self._lost.set()

    def _take(self, frame: Frame) -> None:
        kind, ticket, body = frame
        if kind == Kind.KEYS:
            self._keys_changed(*unpack(body))
            return
        if kind == Kind.LEAVING:
            self._leave()
            return
        waiting = self._waiting.get(ticket)
        if waiting is None:  # its client has gone
            return
        if kind == Kind.REFUSED:
            explained, status, message, code, retry_after_s = unpack(body)
            error = RequestError(status, message, code, retry_after_s=retry_after_s)
            if isinstance(waiting, RemotePlacement):
                waiting.learn(explained)
            _refuse(waiting, error)
        elif isinstance(waiting, RemotePlacement):
            waiting.told(unpack(body) if body else None)
        elif not waiting.done():
            waiting.set_result(Reply(*unpack(body)))


def _refuse(waiting: RemotePlacement | asyncio.Future[Reply], error: RequestError) -> None:
    if isinstance(waiting, RemotePlacement):
        waiting.refuse(error)
    elif not waiting.done():
        waiting.set_exception(error)
