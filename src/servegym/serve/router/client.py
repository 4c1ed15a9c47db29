"""The connections of clients: requests in, bytes of answers out, no coroutine per piece.

Every connection has one request in progress, which one task answers; what comes early waits. The
body is there when the task starts, if it came with the head.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

from servegym.serve.router.errors import RequestError
from servegym.serve.router.framing import Chunked, Framing, FramingError, Sized
from servegym.serve.router.head import (
    MAX_HEAD_BYTES,
    Fields,
    HeadError,
    RequestHead,
    may_begin_request,
    read_request_head,
    write_response_head,
)
from servegym.serve.router.reply import Reply

if TYPE_CHECKING:
    from servegym.serve.router.server import Server
    from servegym.serve.router.tracing import Trace

_log = logging.getLogger(__name__)

ID_HEADER = "X-Request-Id"
_MAX_ID_CHARACTERS = 128
#: Of requests that come before the last one is answered, bytes.
_MAX_EARLY_BYTES = 64 * 1024
#: For a client to take the end of an answer, to send the rest of a body that nobody reads, or to
#: use a connection that it has made or been answered on, before that is closed, seconds.
LINGER_S = 1.0
#: For a client to take what was sent before its connection is closed.
_FLUSH_S = 60.0


def _drop(data: bytes) -> None:
    """Write to a client that has gone: uvloop's transport would raise."""


class Flow(Protocol):
    """Whoever passes an answer on: told when its client takes no more, and when it does again."""

    def paused(self) -> None:
        """The client takes no more for now."""

    def resumed(self) -> None:
        """The client takes more again."""


class Request:
    """One request of a client.

    Attributes:
        head: Of it.
        key: The id that the client has given it, else a new one.
        begun: Whether any of its answer has been sent.
        is_last: Whether the connection ends with its answer.
        flow: Told of the client's pace.
        tenant: Who has sent it, once that is known.
        replica: Name of the one that was asked last.
        trace: Its spans, where there are any.
        write: Sends more of the body, framed as the head of the answer says.
    """

    __slots__ = (
        "_connection",
        "begun",
        "flow",
        "head",
        "is_last",
        "key",
        "replica",
        "tenant",
        "trace",
        "write",
    )

    def __init__(self, connection: Connection, head: RequestHead) -> None:
        self._connection = connection
        self.head = head
        self.begun = False
        self.is_last = not head.keeps_alive
        self.flow: Flow | None = None
        self.tenant = self.replica = ""
        self.trace: Trace | None = None
        self.write = connection.write
        key = head.fields.get("x-request-id") or ""
        good = 0 < len(key) <= _MAX_ID_CHARACTERS and key.isprintable()
        self.key = key if good else secrets.token_hex(12)

    @property
    def fields(self) -> Fields:
        """Of the head."""
        return self.head.fields

    @property
    def takes_chunks(self) -> bool:
        """Whether the client knows chunks."""
        return self.head.minor == 1

    @property
    def is_paused(self) -> bool:
        """Whether the client takes no more for now."""
        return self._connection.paused

    @property
    def is_whole(self) -> bool:
        """Whether all of the body is there, or no more of it will be read."""
        return self._connection.has_body

    async def body(self, timeout_s: float) -> bytes:
        """Return the body as it came, once all of it is there.

        Raises:
            RequestError: If it is too large, not framed as it should be, or late.
        """
        return await self._connection.body(timeout_s)

    def reply(self, reply: Reply) -> None:
        """Send an answer of the router's own."""
        pairs = [*reply.headers, (ID_HEADER, self.key), ("Content-Length", str(len(reply.body)))]
        self.begin(reply.status, pairs, b"" if self.head.method == "HEAD" else reply.body)

    def begin(self, status: int, pairs: list[tuple[str, str]], piece: bytes) -> None:
        """Send the head of an answer and the first of its body, framed as the head says."""
        self.begun = True
        pairs.append(("Date", self._connection.date()))
        self.is_last |= self._connection.is_leaving
        if self.is_last:
            pairs.append(("Connection", "close"))
        self.write(write_response_head(status, pairs) + piece)

    def break_off(self, last: bytes) -> None:
        """Cut the connection: an answer that ends properly would pass for a whole one.

        Args:
            last: What is sent before, framed; a chunk, as without chunks nothing more fits.
        """
        self._connection.break_off(last if self.takes_chunks else b"")


class Connection(asyncio.Protocol):
    """One client's connection.

    Args:
        server: That it is of.

    Attributes:
        write: Sends bytes.
        paused: Whether the client takes no more for now.
        idle_since_s: When its last request ended, on the loop's clock; infinite while there is one.
    """

    write: Callable[[bytes], None]

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._request: Request | None = None
        self._task: asyncio.Task[None] | None = None
        self._framing: Framing | None = None  # of the body that is being read
        self._pieces: list[bytes] = []
        self._num_bytes = 0
        self._wanted: asyncio.Future[None] | None = None  # the whole body
        self._refused: RequestError | None = None  # why there is no body
        self._closing = False
        self._holds_back = False  # a client that sends too much too early
        self._lingers: asyncio.TimerHandle | None = None
        self.paused = False
        self.idle_since_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; see `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self.write = self._transport.write  # as it is: it is called for every token
        self.idle_since_s = self._server.loop.time()
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End what is in progress; see `asyncio.Protocol`."""
        self._server.connections.discard(self)
        self._closing = True
        self._buffer = b""
        self._transport = None
        self.write = _drop
        if self._request is not None:
            self._request.write = _drop  # pieces may come before the task has seen its end
        if self._lingers is not None:
            self._lingers.cancel()
        if self._task is not None:
            self._task.cancel()  # a client that goes away ends its request upstream too

    def pause_writing(self) -> None:
        """Tell whoever sends; see `asyncio.Protocol`."""
        self.paused = True
        if self._request is not None and self._request.flow is not None:
            self._request.flow.paused()

    def resume_writing(self) -> None:
        """Tell whoever sends; see `asyncio.Protocol`."""
        self.paused = False
        if self._request is not None:
            if self._request.flow is not None:
                self._request.flow.resumed()
        elif not self._closing:
            if self._lingers is not None and self._framing is None:
                self._lingers.cancel()
            self._next()

    def data_received(self, data: bytes) -> None:
        """Take in what a client sends; see `asyncio.Protocol`."""
        if self._closing:
            return
        if self._framing is not None:
            self._read_body(data)
            return
        self._buffer = self._buffer + data if self._buffer else data
        if self._request is None:
            self._next()
        elif len(self._buffer) > _MAX_EARLY_BYTES and self._transport is not None:
            self._holds_back = True
            self._transport.pause_reading()

    @property
    def is_leaving(self) -> bool:
        """See `Server.leaving`."""
        return self._server.leaving

    @property
    def has_body(self) -> bool:
        """See `Request.is_whole`."""
        return self._framing is None or self._refused is not None

    async def body(self, timeout_s: float) -> bytes:
        """See `Request.body`."""
        if self._request is not None and self._framing is not None and self._refused is None:
            if "100-continue" in self._request.fields.tokens("expect"):
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._wanted = self._server.loop.create_future()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wanted
            except TimeoutError:
                raise RequestError(408, "the body did not come in time", "body_timeout") from None
            finally:
                self._wanted = None
        if self._refused is not None:
            raise self._refused
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    def break_off(self, last: bytes) -> None:
        """Send something and cut the connection, without an end of the answer."""
        transport = self._transport
        if transport is None or self._closing:
            return
        self._closing = True
        if last:
            transport.write(last)
            transport.close()  # once that is sent
            self._lingers = self._server.loop.call_later(LINGER_S, transport.abort)
        else:
            # a reset: where nothing frames an answer, the end of the connection would end it well
            reset = struct.pack("ii", 1, 0)
            transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, reset
            )
            transport.abort()

    def date(self) -> str:
        """Return the time as heads give it."""
        return self._server.date()

    def close_if_idle(self) -> None:
        """Close the connection unless a request is in progress."""
        if self._request is None and self._transport is not None:
            self._closing = True
            self._transport.close()

    def stop(self) -> None:
        """Cut everything off."""
        if self._transport is not None:
            self._transport.abort()

    def _next(self) -> None:
        """Begin with the next request that is there."""
        if self.paused or self._closing:
            return  # who takes no answers gets none
        data = self._buffer.lstrip(b"\r\n") if self._buffer[:1] in (b"\r", b"\n") else self._buffer
        end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
        self._buffer = data
        if end < 0:
            if len(data) >= MAX_HEAD_BYTES:
                self._refuse("a head that is too long")
            elif not may_begin_request(data):
                self._refuse("no request line of HTTP/1.1")
            return
        try:
            head = read_request_head(data[: end + 4])
        except HeadError as error:
            self._refuse(str(error))
            return
        self._request = Request(self, head)
        self._pieces, self._num_bytes, self._refused, self._buffer = [], 0, None, b""
        if head.length != 0:
            self._framing = Chunked() if head.length is None else Sized(head.length)
            if (head.length or 0) > self._server.max_body_bytes:
                self._refused = self._server.too_large()
        self.idle_since_s = float("inf")
        if len(data) > end + 4:
            if self._framing is None:
                self._buffer = data[end + 4 :]
            else:
                self._read_body(data[end + 4 :])
        self._task = self._server.loop.create_task(self._answer(self._request))

    async def _answer(self, request: Request) -> None:
        """Let a request be answered, and be ready for the next one."""
        try:
            await self._server.answer(request)
        finally:
            self._task = None
            self._end(request)

    def _end(self, request: Request) -> None:
        """A request has been answered."""
        self._request = None
        transport = self._transport
        if self._closing or transport is None:
            return
        loop = self._server.loop
        if self._framing is not None:
            # nobody has read the body: it must not keep the connection, nor may the connection be
            # cut before the client has seen why
            self._refused = self._refused or self._server.too_large()
            self._lingers = loop.call_later(LINGER_S, transport.close)
        elif request.is_last:
            self._closing = True
            transport.close()
            self._lingers = loop.call_later(_FLUSH_S, transport.abort)
        else:
            self.idle_since_s = loop.time()
            if self._holds_back:
                self._holds_back = False
                transport.resume_reading()
            if self.paused:
                self._lingers = loop.call_later(_FLUSH_S, transport.abort)
            elif self._buffer:
                self._next()

    def _read_body(self, data: bytes) -> None:
        """Take in more of a body."""
        framing = self._framing
        assert framing is not None
        try:
            _, piece, rest = framing.feed(data)
        except FramingError:
            message = "the body's chunks cannot be read"
            self._refused = RequestError(400, message, "invalid_body")
            self._give_body_up()
            return
        if piece and self._refused is None:
            self._num_bytes += len(piece)
            self._pieces.append(piece)
            if self._num_bytes > self._server.max_body_bytes:
                self._refused = self._server.too_large()
        if self._refused is not None:
            self._pieces.clear()
            self._settle_body()
        if framing.ended:
            self._framing = None
            self._buffer = rest
            self._settle_body()
            if self._request is None:  # it was answered before
                if self._lingers is not None:
                    self._lingers.cancel()
                self.idle_since_s = self._server.loop.time()
                self._next()

    def _settle_body(self) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    def _give_body_up(self) -> None:
        """What comes next cannot be told from the body: nothing more is read."""
        self._settle_body()
        if self._transport is not None:
            self._transport.pause_reading()

    def _refuse(self, why: str) -> None:
        """Answer what is not HTTP, and hang up."""
        transport = self._transport
        assert transport is not None
        _log.info("not HTTP: %s", why)
        reply = RequestError(400, f"this is no request: {why}", "invalid_request").reply()
        pairs = [*reply.headers, ("Content-Length", str(len(reply.body))), ("Connection", "close")]
        transport.write(write_response_head(reply.status, pairs) + reply.body)
        self._closing, self._buffer = True, b""
        self._lingers = self._server.loop.call_later(LINGER_S, transport.close)
