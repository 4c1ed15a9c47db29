"""Asking one replica: until the first token, nothing is passed on and another may be asked."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import ssl
from collections.abc import Callable
from typing import NamedTuple, Protocol, cast
from urllib.parse import unquote, urlsplit

from servegym.serve.router.framing import Chunked, Framing, FramingError, Sized, UntilClosed
from servegym.serve.router.head import (
    MAX_HEAD_BYTES,
    HeadError,
    ResponseHead,
    read_response_head,
)
from servegym.serve.router.headers import retry_after_s
from servegym.serve.router.patience import Patience
from servegym.serve.router.stream import Reader
from servegym.serve.router.timers import Timers

#: Most that is kept of a refusal, and of what a stream says before its first token.
_MAX_HELD_BYTES = 256 * 1024
#: For the body of a refusal to come, seconds.
_REFUSAL_S = 2.0
#: A replica that is full. It is well, and what it says is for the client if no other has room.
_FULL = frozenset({429, 503})
#: Seconds that an idle connection to a replica is kept: below the 5 s after which uvicorn, which
#: vLLM runs in, closes its end, or requests would be sent into closing connections.
KEEPALIVE_S = 4.0
#: Larger bodies are not copied to stand behind their head.
_LARGE_BYTES = 64 * 1024


class Refusal(NamedTuple):
    """What a replica said instead of an answer.

    Attributes:
        status: HTTP status.
        headers: As they came.
        body: Its beginning, if it is long.
    """

    status: int
    headers: list[tuple[str, str]]
    body: bytes


class UpstreamError(Exception):
    """Raised when a replica fails a request before the first token of its answer.

    Args:
        cause: For the counters: `refused` (took no connection), `unreached` (none came about in
            time), `disconnected` (while it had the request), `timeout`, `empty`, `error_event` or
            `status_...`.
        refusal: What it said, if it said something.
    """

    def __init__(self, cause: str, refusal: Refusal | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.refusal = refusal

    @property
    def of_connection(self) -> bool:
        """Whether it is about the connection and not about the request."""
        return self.cause in ("refused", "unreached", "disconnected")

    @property
    def is_full(self) -> bool:
        """Whether the replica only has no room."""
        return self.refusal is not None and self.refusal.status in _FULL

    @property
    def retry_after_s(self) -> float | None:
        """When it has room, as it says."""
        return retry_after_s(self.refusal.headers) if self.refusal else None


class Receiver(Protocol):
    """Whoever passes an answer on that has begun."""

    def repeats(self, data: bytes) -> bool:
        """Bytes have come: take them if they are only one more event like the last.

        Return whether they were; else nothing has happened, and what they hold follows.
        """

    def piece(self, framed: bytes, body: bytes) -> None:
        """More has come: as it is framed, and the body in that.

        Both are empty where it is a part of a chunk's first line, or what follows the last chunk.
        """

    def ended(self) -> None:
        """All of it has come."""

    def lost(self) -> None:
        """The connection has gone before."""

    def expired(self) -> None:
        """The exchange's patience is over."""


class Exchange:
    """One request at one replica, and its answer.

    A stream has begun with its first token; what comes before (the head, comments, the role) is
    held back until then, up to a limit. Another answer has begun with its first byte.

    Args:
        connection: That it is on.
        timers: By which `patience` looks.
        clock: Seconds that never go back.
        patience_s: Shortest time that `patience` is ever set to.

    Attributes:
        begun: Done when the answer has begun; its exception is an `UpstreamError`.
        patience: How long to wait for what comes next.
        head: Of the answer, once it has come; before it there is no `reader` or `framing`.
        reader: Has read what came.
        framing: Of the answer.
        held: What came before a receiver was there, each as framed and as body.
        ended: Whether all of it has come.
        lost: Whether its connection has gone before that.
        receiver: Gets what comes from now on.
    """

    __slots__ = (
        "_clock",
        "_connection",
        "_is_closed",
        "_num_held",
        "_refused",
        "begun",
        "ended",
        "framing",
        "head",
        "held",
        "lost",
        "patience",
        "reader",
        "receiver",
    )

    reader: Reader
    framing: Framing

    def __init__(
        self,
        connection: Connection,
        timers: Timers,
        clock: Callable[[], float],
        patience_s: float,
    ) -> None:
        self._connection = connection
        self._clock = clock
        self._is_closed = False
        self._num_held = 0
        self._refused = False
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.patience = Patience(timers, clock, patience_s, self._expired)
        self.head: ResponseHead | None = None
        self.held: list[tuple[bytes, bytes]] = []
        self.ended = False
        self.lost = False
        self.receiver: Receiver | None = None

    def pause(self) -> None:
        """Let the replica wait."""
        self._connection.pause()

    def resume(self) -> None:
        """Let the replica go on."""
        self._connection.resume()

    def close(self) -> None:
        """Give the connection back if the answer has ended, else cut it; the engine stops then.

        Does nothing the second time.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self.patience.end()
        self.receiver = None
        if not self.begun.done():
            self.begun.cancel()
        elif not self.begun.cancelled():
            self.begun.exception()  # it may be that nobody waits for it any more
        keeps = self.ended and self.head is not None and self.head.keeps_alive
        self._connection.release(self, keep=keeps)

    def take_head(self, head: ResponseHead) -> None:
        """The head of the answer has come."""
        self.head = head
        if head.chunked:
            self.framing = Chunked()
        else:
            self.framing = UntilClosed() if head.length is None else Sized(head.length)
        self.reader = Reader(is_stream=head.status == 200 and head.is_stream)
        self._refused = head.status in _FULL or head.status >= 500
        if self._refused:
            self.patience.due_s = min(self.patience.due_s, self._clock() + _REFUSAL_S)
        if self.framing.ended:
            self._end()

    def take(self, data: bytes) -> bytes:
        """More of the answer has come; return what is beyond its end.

        Raises:
            FramingError: If it is not framed as its head says.
        """
        framed, body, rest = self.framing.feed(data)
        if self.receiver is not None:
            self.receiver.piece(framed, body)
            if self.framing.ended:
                self.ended = True
                if self.receiver is not None:
                    self.receiver.ended()
            return rest
        if framed:
            self.held.append((framed, body))
        if body:
            self._num_held += len(body)
            self.reader.feed(body)
        if self.framing.ended:
            self._end()
        elif body:
            self._judge()
        return rest

    def lose(self, *, broken: bool = True) -> None:
        """The connection has gone, in order or broken."""
        if self.head is not None and isinstance(self.framing, UntilClosed) and not broken:
            self.framing.ended = self.ended = True
            if self.receiver is not None:
                self.receiver.ended()
            else:
                self._end()
            return
        self.lost = True
        if self.receiver is not None:
            self.receiver.lost()
        elif self._refused:
            self._end()
        elif not self.begun.done():
            self.begun.set_exception(UpstreamError("disconnected"))

    def _expired(self) -> None:
        if self.receiver is not None:
            self.receiver.expired()
        elif self._refused:
            self._end()
        elif not self.begun.done():
            self.begun.set_exception(UpstreamError("timeout"))

    def _end(self) -> None:
        """No more will come before the answer has a receiver."""
        self.ended = self.framing.ended
        if self.reader.is_stream:
            self.reader.close()
        self._judge(over=True)

    def _judge(self, *, over: bool = False) -> None:
        """Find out whether the answer has begun, or is none."""
        if self.begun.done():
            return
        head, reader = self.head, self.reader
        assert head is not None
        if self._refused:
            if over or self._num_held >= _MAX_HELD_BYTES:
                said = b"".join([body for _, body in self.held])
                refusal = Refusal(head.status, head.fields.pairs, said)
                self.begun.set_exception(UpstreamError(f"status_{head.status}", refusal))
        elif reader.failed and not reader.begun and reader.error_status >= 500:
            self.begun.set_exception(UpstreamError("error_event", _as_refusal(reader)))
        elif over and not self._num_held and head.status == 200:
            self.begun.set_exception(UpstreamError("empty"))
        elif (
            over
            or reader.begun
            or reader.failed
            or reader.done
            or not reader.is_stream
            or self._num_held > _MAX_HELD_BYTES
        ):
            self.begun.set_result(None)


class Connection(asyncio.Protocol):
    """A connection to a replica: one exchange at a time, kept between them.

    Args:
        pool: That it is of.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._buffer = b""
        self._paused = False
        self.idle_since_s = math.inf

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; see `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._pool.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever waits; see `asyncio.Protocol`."""
        self._transport = None
        self._pool.forget(self)
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.lose(broken=exc is not None)

    def data_received(self, data: bytes) -> None:
        """Take in what a replica sends; see `asyncio.Protocol`."""
        exchange = self._exchange
        if exchange is None:  # bytes that nobody asked for
            self._abort()
            return
        if exchange.receiver is not None and exchange.receiver.repeats(data):
            return  # by far most of what comes
        try:
            if exchange.head is None:
                data = self._read_head(exchange, data)
                if exchange.head is None or not (data or exchange.framing.ended):
                    return
            rest = exchange.take(data) if not exchange.framing.ended else data
        except (HeadError, FramingError):
            self._abort()
            self._exchange = None
            exchange.lose()
            return
        if rest:  # more than was asked for: what follows cannot be told from it
            self._abort()

    @property
    def is_open(self) -> bool:
        """Whether it can be written to."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, head: bytes, body: bytes, patience_s: float) -> Exchange:
        """Send a request."""
        pool = self._pool
        self._exchange = exchange = Exchange(self, pool.timers, pool.clock, patience_s)
        transport = self._transport
        if transport is None or transport.is_closing():
            exchange.lose()
        elif len(body) < _LARGE_BYTES:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)
        return exchange

    def release(self, exchange: Exchange, *, keep: bool) -> None:
        """An exchange is over; does nothing the second time."""
        transport = self._transport
        if self._exchange is not exchange:
            return
        self._exchange = None
        if transport is None or transport.is_closing():
            return
        # an answer that came before the whole request did: the rest is on its way
        if keep and not transport.get_write_buffer_size():
            self.resume()
            self._pool.put(self)
        else:
            self._abort()

    def pause(self) -> None:
        """Read no more for now."""
        if self._transport is not None and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and self._paused:
            self._paused = False
            self._transport.resume_reading()

    def close(self) -> None:
        """End an idle connection."""
        if self._transport is not None:
            self._transport.close()

    def _read_head(self, exchange: Exchange, data: bytes) -> bytes:
        """Read the head of an answer, if it is all there; return what follows."""
        data = self._buffer + data if self._buffer else data
        while True:
            end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
            if end < 0:
                if len(data) >= MAX_HEAD_BYTES:
                    raise HeadError("a head that is too long")
                self._buffer = data
                return b""
            head = read_response_head(data[: end + 4])
            data = data[end + 4 :]
            if head.status == 101:
                raise HeadError("another protocol that nobody asked for")
            if head.status >= 200:  # else it only says that an answer will come
                break
        self._buffer = b""
        exchange.take_head(head)
        return data

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Pool:
    """The connections to one replica. There is no limit: the policy decides how many requests.

    Args:
        url: Of the replica.
        connect_timeout_s: For a connection to be made.
        clock: Seconds that never go back.

    Attributes:
        host: Value of `Host`.
        prefix: Of the paths there.
        authorization: Header that the URL asks for, if it names a user.
        place: Its host and port.
        clock: As given.
        timers: For time-outs of its connections.
        connections: That are open, in use or not.
    """

    def __init__(self, url: str, connect_timeout_s: float, clock: Callable[[], float]) -> None:
        parts = urlsplit(url)
        self.host = parts.netloc.rpartition("@")[2]
        self.prefix = parts.path
        self.authorization: str | None = None
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self.authorization = f"Basic {base64.b64encode(pair.encode()).decode()}"
        self.clock = clock
        self.timers = Timers()
        secure = parts.scheme == "https"
        self.place = (parts.hostname or "", parts.port or (443 if secure else 80))
        self._tls = ssl.create_default_context() if secure else None
        self._connect_timeout_s = connect_timeout_s
        self.connections: set[Connection] = set()
        self._idle: list[Connection] = []
        self._num_making = 0
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is no connection, nor one in the making."""
        return not self.connections and not self._num_making

    def free(self) -> Connection | None:
        """Return a connection that no request is on, if there is one."""
        oldest_s = self.clock() - KEEPALIVE_S
        while self._idle:
            connection = self._idle.pop()  # the one that was used last
            if connection.is_open and connection.idle_since_s >= oldest_s:
                return connection
            connection.close()
        return None

    async def connect(self) -> Connection:
        """Return a new connection.

        Raises:
            UpstreamError: If it cannot be made.
        """
        host, port = self.place
        loop = asyncio.get_running_loop()
        making = loop.create_task(
            loop.create_connection(lambda: Connection(self), host, port, ssl=self._tls)
        )
        is_late = False

        def give_up() -> None:
            nonlocal is_late
            is_late = True
            making.cancel()

        patience = Patience(self.timers, self.clock, self._connect_timeout_s, give_up)
        patience.due_s = self.clock() + self._connect_timeout_s
        self._num_making += 1
        try:
            _, made = await making
        except asyncio.CancelledError:
            if is_late:
                raise UpstreamError("unreached") from None
            raise
        except TimeoutError:  # the system's own
            raise UpstreamError("unreached") from None
        except (OSError, UnicodeError):  # the latter of a host that cannot be one
            raise UpstreamError("refused") from None
        finally:
            self._num_making -= 1
            patience.end()
        return made

    def put(self, connection: Connection) -> None:
        """Keep a connection for the next request."""
        connection.idle_since_s = self.clock()
        self._idle.append(connection)
        if self._sweep is None:
            loop = asyncio.get_running_loop()
            self._sweep = loop.call_later(KEEPALIVE_S, self._close_idle)

    def forget(self, connection: Connection) -> None:
        """A connection has gone."""
        self.connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """End all idle connections."""
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _close_idle(self) -> None:
        oldest_s = self.clock() - KEEPALIVE_S
        old = [c for c in self._idle if c.idle_since_s < oldest_s]
        self._idle = [c for c in self._idle if c.idle_since_s >= oldest_s]
        for connection in old:
            connection.close()
        self._sweep = None
        if self._idle:
            loop = asyncio.get_running_loop()
            self._sweep = loop.call_later(KEEPALIVE_S / 2, self._close_idle)


async def ask(
    pool: Pool, head: bytes, body: bytes, *, first_token_s: float | None, patience_s: float
) -> Exchange:
    """Send a request to a replica and wait until its answer has begun.

    Args:
        pool: Of the replica.
        head: Of the request.
        body: Of the request.
        first_token_s: How long a stream may take to begin; `None`: no stream was asked for, and
            the answer may take as long as it wants.
        patience_s: Shortest time that the exchange's patience is set to later.

    Raises:
        UpstreamError: If there is no answer, or one that another replica may better.
    """
    until_s = math.inf if first_token_s is None else pool.clock() + first_token_s
    connection = pool.free() or await pool.connect()
    shortest_s = min(patience_s, first_token_s or math.inf, _REFUSAL_S)
    exchange = connection.send(head, body, shortest_s)
    exchange.patience.due_s = until_s
    try:
        await exchange.begun
    except BaseException:
        exchange.close()
        raise
    return exchange


def _as_refusal(reader: Reader) -> Refusal | None:
    """Make an error that came instead of a stream's first token what it should have been."""
    if reader.error is None:
        return None
    body = json.dumps(reader.error).encode()
    return Refusal(reader.error_status, [("Content-Type", "application/json")], body)
