"""A socket between a worker and the decider."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable

from servegym.serve.router.workers.frames import (
    Kind,
    Packet,
    read_packets,
    token_record,
    write_frame,
    write_packet,
)

#: Read at once; what has come is nearly always less.
_READ_BYTES = 256 * 1024
#: What can wait (tokens, counts) waits no longer than this, seconds: a packet costs both sides tens
#: of microseconds, however much is in it.
_PAUSE_S = 0.005


class Link:
    """One end of a connection; what is written has left for the other end when a call returns.

    That matters: a worker tells the decider that an answer is over before the client can know, so
    that whatever the client does next, through whichever worker, is decided with that known.

    Args:
        connection: Not blocking.
        readable: Called when there is something to `receive`.

    Attributes:
        lost: Whether the other end has gone.
    """

    def __init__(self, connection: socket.socket, readable: Callable[[], None]) -> None:
        connection.setblocking(False)
        self.lost = False
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection, readable)
        self._unread = b""
        self._unsent = bytearray()
        self._put: list[bytes] = []
        self._tokens: list[bytes] = []
        self._flushing: asyncio.TimerHandle | None = None

    def send(self, kind: Kind, ticket: int = 0, body: bytes = b"") -> None:
        """Say something now, and before it what was `put`; nothing once the other end has gone."""
        if not self.lost:
            self._put.append(write_frame(kind, ticket, body))
            self.flush()

    def put(self, kind: Kind, ticket: int = 0, body: bytes = b"") -> None:
        """Say something with what is sent next, or a little later."""
        if not self.lost:
            self._put.append(write_frame(kind, ticket, body))
            self._flush_soon()

    def put_tokens(self, ticket: int, count: int, now_s: float) -> None:
        """Say that tokens have come, with what is sent next, or a little later."""
        if not self.lost:
            self._tokens.append(token_record(ticket, count, now_s))
            self._flush_soon()

    def receive(self) -> list[Packet]:
        """Return what has come."""
        try:
            data = self._connection.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.close()
            return []
        packets, self._unread = read_packets(self._unread + data if self._unread else data)
        return packets

    def close(self) -> None:
        """Hang up; does nothing the second time."""
        if self.lost:
            return
        self.lost = True
        if self._flushing is not None:
            self._flushing.cancel()
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        self._connection.close()

    def flush(self) -> None:
        """Send what was `put`, if anything was."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        if not self._put and not self._tokens:
            return
        frames, self._put = self._put, []
        if self._tokens:
            frames.insert(0, write_frame(Kind.TOKENS, 0, b"".join(self._tokens)))
            self._tokens.clear()
        data = write_packet(time.monotonic(), frames)
        sent = 0 if self._unsent else self._write(data)
        if sent < len(data) and not self.lost:
            if not self._unsent:
                self._loop.add_writer(self._connection, self._write_on)
            self._unsent += data[sent:]

    def _flush_soon(self) -> None:
        if self._flushing is None:
            self._flushing = self._loop.call_later(_PAUSE_S, self.flush)

    def _write_on(self) -> None:
        """The other end reads again."""
        del self._unsent[: self._write(self._unsent)]
        if not self._unsent and not self.lost:
            self._loop.remove_writer(self._connection)

    def _write(self, data: bytes | bytearray) -> int:
        """Write what can be written; return how much that is."""
        try:
            return self._connection.send(data)
        except BlockingIOError:
            return 0
        except OSError:  # reading finds out what is left to be read, and then the end
            return len(data)
