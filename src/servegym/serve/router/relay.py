"""An answer on its way from a replica to a client: bytes as they come, and what they say.

Each piece goes from the replica's connection to the client's in one call. A client that takes no
more stops its replica; books and deadlines follow the tokens.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Literal

from servegym.serve.router.client import ID_HEADER, Request
from servegym.serve.router.config import RequestConfig
from servegym.serve.router.errors import error_event
from servegym.serve.router.framing import LAST_CHUNK, Chunked, chunk
from servegym.serve.router.headers import returned
from servegym.serve.router.placement import Ending, Placement
from servegym.serve.router.shape import Shape
from servegym.serve.router.upstream import Exchange

#: What a chunk lacks whose replica has gone is filled up to this size, so that an error can follow.
_MAX_FILLED_BYTES = 64 * 1024
#: How the client gets pieces: in the replica's chunks, in chunks made anew, or bare.
_Frame = Literal["as it came", "anew", "none"]


class Relay:
    """Passes one answer on.

    Args:
        config: Times.
        clock: Seconds that never go back.
        request: The client's.
        placement: Told what comes.
        exchange: With its replica; the answer has begun.
        whole_by_s: When the whole answer must be there, on that clock.

    Attributes:
        cause: Why the answer is not whole, once it has ended; empty if it is.
        first_token_s: When its first token came, on that clock; NaN as long as none is seen.
        done: Done when the client has its answer, or will not get it.
    """

    __slots__ = (
        "_answered",
        "_begun",
        "_client_s",
        "_clock",
        "_exchange",
        "_frame",
        "_paused",
        "_placement",
        "_reader",
        "_request",
        "_shape",
        "_stall_s",
        "_status",
        "_token_s",
        "_whole_by_s",
        "cause",
        "done",
        "first_token_s",
    )

    def __init__(
        self,
        config: RequestConfig,
        clock: Callable[[], float],
        request: Request,
        placement: Placement,
        exchange: Exchange,
        whole_by_s: float,
    ) -> None:
        head = exchange.head
        assert head is not None
        self._request = request
        self._placement = placement
        self._exchange = exchange
        self._reader = exchange.reader
        self._status = head.status
        self._clock = clock
        self._client_s = config.client_timeout_s
        self._stall_s = config.stall_timeout_s if exchange.reader.is_stream else math.inf
        self._whole_by_s = whole_by_s
        self._token_s = self._clock()
        self._frame: _Frame = "as it came" if head.chunked else "anew"
        if head.length is not None or not request.takes_chunks:
            self._frame = "none"
        self._begun = self._answered = self._paused = False
        self._shape: Shape | None = None  # of the next event, as far as can be told
        self.cause = ""
        self.first_token_s = math.nan
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self, pairs: list[tuple[str, str]]) -> None:
        """Pass on what is there, and from now on what comes.

        Args:
            pairs: Fields of the answer's head, without its framing.
        """
        exchange, reader, request = self._exchange, self._reader, self._request
        head = exchange.head
        assert head is not None
        if head.length is not None:
            pairs.append(("Content-Length", str(head.length)))
        elif request.takes_chunks:
            pairs.append(("Transfer-Encoding", "chunked"))
        exchange.receiver, request.flow = self, self
        if reader.begun:
            self._begin()
        if reader.num_tokens:
            self._tokens(reader.num_tokens)
        exchange.patience.due_s = min(self._token_s + self._stall_s, self._whole_by_s)
        first = b"".join([self._framed(*piece) for piece in exchange.held])
        exchange.held.clear()
        request.begin(self._status, pairs, first)
        self._note_answered()
        self._shape = self._known_shape()
        if request.is_paused and not self._paused:
            self.paused()
        if exchange.ended:
            self.ended()
        elif exchange.lost:
            self.lost()

    def repeats(self, data: bytes) -> bool:
        """See `Receiver`."""
        shape = self._shape
        if shape is None or not shape.fits_chunk(data):
            return False
        self._token_s = now_s = self._clock()
        self._reader.num_tokens += 1
        self._placement.tokens(1, now_s)
        self._exchange.patience.due_s = min(now_s + self._stall_s, self._whole_by_s)
        self._request.write(data)
        return True

    def piece(self, framed: bytes, body: bytes) -> None:
        """See `Receiver`."""
        if body and (count := self._reader.feed(body)):
            self._tokens(count)
            self._exchange.patience.due_s = min(self._token_s + self._stall_s, self._whole_by_s)
        if framed:
            self._request.write(self._framed(framed, body))
        if self._reader.done:
            self._note_answered()
        self._shape = self._known_shape()

    def ended(self) -> None:
        """See `Receiver`."""
        reader = self._reader
        if count := reader.close():
            self._tokens(count)
        cause = ""
        if reader.is_stream and not reader.whole:
            cause = "error_event" if reader.failed else "cut"
        self._end(cause)

    def lost(self) -> None:
        """See `Receiver`."""
        self._end("" if self._reader.done else "broken")  # else only the end was missing

    def expired(self) -> None:
        """See `Receiver`."""
        if self._paused:  # the client's side: it takes nothing
            self.cause = "cancelled"
            self._exchange.close()
            self._placement.end("cancelled")
            self._request.flow = None
            self._request.break_off(b"")
            self._finish()
        else:
            self._end("" if self._reader.done else "stall")

    def paused(self) -> None:
        """See `Flow`."""
        self._paused = True
        now_s = self._clock()
        self._exchange.pause()
        if self._begun:
            self._placement.paused(now_s)
        self._exchange.patience.due_s = now_s + self._client_s

    def resumed(self) -> None:
        """See `Flow`."""
        self._paused = False
        now_s = self._clock()
        if self._begun:
            self._placement.resumed(now_s)
        self._token_s = now_s  # what the client took to take it is no stall
        self._exchange.patience.due_s = min(now_s + self._stall_s, self._whole_by_s)
        self._exchange.resume()

    def _begin(self) -> None:
        self._begun = True
        self.first_token_s = self._clock()
        self._placement.begin()

    def _tokens(self, count: int) -> None:
        if not self._begun:
            self._begin()
        self._token_s = self._clock()
        self._placement.tokens(count, self._token_s)

    def _framed(self, framed: bytes, body: bytes) -> bytes:
        """Return a piece as the client is to get it."""
        if self._frame == "as it came":
            return framed
        return chunk(body) if body and self._frame == "anew" else body

    def _known_shape(self) -> Shape | None:
        """Return the shape that the next chunk is expected to have, if it may go as it comes."""
        framing, reader = self._exchange.framing, self._reader
        if self._frame != "as it came" or not isinstance(framing, Chunked):
            return None
        return reader.shape if framing.is_between and reader.is_between else None

    def _note_answered(self) -> None:
        """A stream may have said that it is complete: the client may go on."""
        reader = self._reader
        if reader.done and not self._answered and not reader.failed and self._status == 200:
            self._answered = True
            self._placement.answered()

    def _end(self, cause: str) -> None:
        """The answer is over, and whole unless there is a cause."""
        exchange, reader, request = self._exchange, self._reader, self._request
        missing = exchange.framing.missing if self._frame == "as it came" else 0
        is_whole = not cause and (exchange.ended or (self._frame != "none" and not missing))
        request.flow = None
        self.cause = cause
        try:
            exchange.close()
            if not is_whole:
                say = reader.is_stream and not reader.failed and bool(cause)
                self._break_off(missing, say=say)
            elif self._frame != "none":
                request.write(LAST_CHUNK)
            if cause:
                self._placement.broke(cause, self._token_s, reader.error_status)
            prompt_tokens, _, cached_tokens = reader.usage()
            self._placement.close(
                Ending(
                    self._status,
                    bool(cause),
                    reader.failed,
                    prompt_tokens,
                    cached_tokens,
                    reader.output_tokens(),
                )
            )
        finally:  # whoever waits must not wait for ever
            self._finish()

    def _break_off(self, missing: int, *, say: bool) -> None:
        """Tell a client that its answer is not whole: an error event, and no proper end.

        What the engine has said itself need not be said again.
        """
        last = b""
        if say and missing <= _MAX_FILLED_BYTES:
            message = "the replica failed in the middle of the answer"
            event = error_event(502, message, "broken", self._reader.dialect)
            line_end = b"\r\n"[2 - min(2, missing) :]
            last = line_end.rjust(missing, b"\n") + chunk(b"\n\n" + event)
        self._request.break_off(last)

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


def answer_pairs(given: list[tuple[str, str]], key: str, replica: str) -> list[tuple[str, str]]:
    """Return the fields of an answer that a client sees.

    Args:
        given: The replica's.
        key: Id of the request.
        replica: Name of the replica, empty if it is not told.
    """
    pairs = returned(given)
    pairs.append((ID_HEADER, key))
    if replica:
        pairs.append(("X-Servegym-Replica", replica))
    return pairs
