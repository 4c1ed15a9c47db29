"""Taking connections from a socket that several workers share, so that all have as many."""

from __future__ import annotations

import asyncio
import mmap
import socket

from servegym.serve.router.server import Server

#: For a worker with fewer connections to take the next one, seconds; it may be busy, or hang.
_WAIT_S = 0.002
#: Of a worker that is not there.
NOBODY = 2**31 - 1


def shared_counts(num_workers: int) -> memoryview[int]:
    """Return a count of connections for each worker, in memory that forked processes share."""
    counts = memoryview(mmap.mmap(-1, 4 * num_workers)).cast("i")
    for index in range(num_workers):
        counts[index] = NOBODY
    return counts


class Acceptor:
    """Takes connections for one worker, one at a time.

    The system wakes all workers when a client comes, and favours one of them; and an event loop
    takes all clients that wait at once. Connections stay, so one worker would carry most of them.
    Here the one with the fewest takes the next, and another only if that one does not.

    Args:
        listener: Shared, and listening.
        counts: Of all workers' connections; each writes its own.
        index: Of this worker.
        server: Gets the connections.
    """

    def __init__(
        self, listener: socket.socket, counts: memoryview[int], index: int, server: Server
    ) -> None:
        self._listener = listener
        self._counts = counts
        self._index = index
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.TimerHandle | None = None
        self._has_waited = False
        counts[index] = 0
        self._loop.add_reader(listener, self._come)

    def stop(self) -> None:
        """Take those that wait, and no more; does nothing the second time.

        The socket is closed here, and stays open where others have it.
        """
        self._counts[self._index] = NOBODY
        if self._listener.fileno() < 0:
            return
        self._loop.remove_reader(self._listener)
        self._server.accept_all(self._listener)
        self._listener.close()
        if self._waiting is not None:
            self._waiting.cancel()

    def _come(self) -> None:
        """A client waits."""
        own = self._server.num_connections
        self._counts[self._index] = own
        if own > min(self._counts) and not self._has_waited:
            self._loop.remove_reader(self._listener)
            self._waiting = self._loop.call_later(_WAIT_S, self._look_again)
            return
        self._has_waited = False
        try:
            self._server.accept(self._listener)
        except OSError:  # another was faster, or the client has gone
            return
        self._counts[self._index] = own + 1

    def _look_again(self) -> None:
        self._has_waited = True
        self._loop.add_reader(self._listener, self._come)
