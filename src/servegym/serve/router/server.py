"""The port for clients: who comes is taken, who is idle for long is let go, in the end all are."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate

from servegym.serve.listening import BACKLOG, bind
from servegym.serve.router.client import LINGER_S, Connection, Request
from servegym.serve.router.errors import RequestError

#: An idle connection is kept longer than what stands in front keeps its own, seconds: else requests
#: would be sent into closing connections.
_KEEPALIVE_S = 3630.0
_SWEEP_S = 10.0
#: Between two looks at connections that are to end, seconds.
_LOOK_S = 0.05


class Server:
    """Listens for clients.

    Args:
        answer: Answers a request.
        max_body_bytes: Larger bodies are refused.

    Attributes:
        loop: That it runs on.
        connections: That are open.
        leaving: Whether every connection ends with its next answer.
    """

    def __init__(self, answer: Callable[[Request], Awaitable[None]], max_body_bytes: int) -> None:
        self.answer = answer
        self.max_body_bytes = max_body_bytes
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self.leaving = False
        self._taking: set[asyncio.Task[None]] = set()
        self._listening: asyncio.Server | None = None
        self._listener: socket.socket | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._date = (0, "")

    async def start(self, host: str, port: int) -> int:
        """Take connections; return the port.

        Raises:
            OSError: If the address cannot be had, or `OverflowError` if there is no such port.
        """
        listener = bind(host, port)
        listener.setblocking(False)
        self._listener = listener.dup()  # the loop's own cannot be asked who waits
        self._listening = await self.loop.create_server(
            lambda: Connection(self), sock=listener, backlog=BACKLOG
        )
        self.sweep()
        return int(self._listening.sockets[0].getsockname()[1])

    @property
    def num_connections(self) -> int:
        """How many connections are open, or being taken."""
        return len(self.connections) + len(self._taking)

    def accept(self, listener: socket.socket) -> None:
        """Take a connection that waits at a socket.

        Raises:
            OSError: If there is none, or its client has gone.
        """
        connection, _ = listener.accept()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        taking = self.loop.create_task(self._take(connection))
        self._taking.add(taking)
        taking.add_done_callback(self._taking.discard)

    def accept_all(self, listener: socket.socket) -> None:
        """Take all connections that wait at a socket: closing it would reset them."""
        while True:
            try:
                self.accept(listener)
            except ConnectionAbortedError:
                continue
            except OSError:
                return

    def sweep(self) -> None:
        """Close connections that are idle for long, from now on."""
        self._sweep = self.loop.call_later(_SWEEP_S, self._close_idle)

    async def leave(self, unready_s: float, stop_listening: Callable[[], None]) -> None:
        """Let clients go elsewhere without losing a request; return when they have gone.

        Who connects is refused, which may always be tried again elsewhere. Whoever is connected
        already may have sent a request, which is answered; the answer says that the connection
        ends with it. One that is idle for a moment will be closed.

        Args:
            unready_s: For so long connections are taken as before: whoever balances looks at the
                router's health only now and then.
            stop_listening: Takes all that wait and refuses who comes later.
        """
        self.leaving = True
        await asyncio.sleep(unready_s)
        stop_listening()
        while self._taking or any(
            c.idle_since_s > self.loop.time() - LINGER_S for c in self.connections
        ):
            await asyncio.sleep(_LOOK_S)

    def stop_listening(self) -> None:
        """Refuse who comes from now on; does nothing the second time."""
        if self._listening is None or self._listener is None:
            return
        self.accept_all(self._listener)
        self._listening.close()
        self.accept_all(self._listener)  # who came meanwhile
        self._listener.close()
        self._listening = self._listener = None

    async def stop(self) -> None:
        """Take no more connections and cut off those that there are."""
        if self._sweep is not None:
            self._sweep.cancel()
        self.stop_listening()
        if self._taking:
            await asyncio.wait(self._taking)
        for connection in list(self.connections):
            connection.close_if_idle()
        until_s = self.loop.time() + LINGER_S
        while self.connections and self.loop.time() < until_s:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.stop()
        await asyncio.sleep(0)

    async def _take(self, connection: socket.socket) -> None:
        try:
            await self.loop.connect_accepted_socket(lambda: Connection(self), connection)
        except OSError:  # its client has gone
            connection.close()

    def too_large(self) -> RequestError:
        """Make the refusal of a body that is too large."""
        message = f"the body may have {self.max_body_bytes} bytes at most"
        return RequestError(413, message, "body_too_large")

    def date(self) -> str:
        """Return the time as heads give it; it is written once a second."""
        now = int(time.time())
        if self._date[0] != now:
            self._date = now, formatdate(now, usegmt=True)
        return self._date[1]

    def _close_idle(self) -> None:
        oldest_s = self.loop.time() - _KEEPALIVE_S
        for connection in [c for c in self.connections if c.idle_since_s < oldest_s]:
            connection.close_if_idle()
        self.sweep()
