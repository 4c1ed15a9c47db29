"""One request's conversation with the gateway, from its headers to the end of its answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

from servegym.serve.dispatcher import Job
from servegym.serve.picker.ends import AssumedEnds
from servegym.serve.picker.placer import Asking, Placer
from servegym.serve.picker.wire import (
    Body,
    BodyMode,
    Destination,
    Direction,
    Headers,
    Message,
    Trailers,
    pass_body,
    pass_headers,
    pass_trailers,
    refuse,
    stream_body,
)
from servegym.serve.router.books import Books, Failures
from servegym.serve.router.ejection import Attempt, Ejection
from servegym.serve.router.errors import RequestError
from servegym.serve.router.headers import retry_after_s
from servegym.serve.router.stream import Reader
from servegym.serve.router.upstream import UpstreamError

_log = logging.getLogger(__name__)

_REQUEST, _RESPONSE = Direction.REQUEST, Direction.RESPONSE
#: The gateway waits for an answer to each message, and these bodies it sends when it has had that
#: to the headers; their headers can still be changed with them.
_WHOLE = (BodyMode.BUFFERED, BodyMode.BUFFERED_PARTIAL)
#: Statuses of a replica that has no room.
_FULL = (429, 503)


class Exchange:
    """Answers a gateway's messages about one request, and keeps its books.

    Args:
        placer: Decides.
        books: Of what becomes of requests.
        ejection: Told at which replica it is.
        ends: Of requests whose answers are not seen.
        modes: How bodies of requests and responses come, if the gateway does not say.
        sees_headers: Whether the gateway sends headers of responses.

    Attributes:
        over: Whether nothing more is to be said.
    """

    def __init__(
        self,
        placer: Placer,
        books: Books,
        ejection: Ejection,
        ends: AssumedEnds,
        modes: tuple[BodyMode, BodyMode],
        *,
        sees_headers: bool,
    ) -> None:
        self.over = False
        self._placer = placer
        self._books = books
        self._ejection = ejection
        self._ends = ends
        self._request_mode, self._response_mode = modes
        self._sees_headers = sees_headers
        self._headers: Headers | None = None
        self._subset: tuple[str, ...] | None = None
        self._body = bytearray()
        self._is_placed = False
        self._job: Job | None = None
        self._attempt: Attempt | None = None
        self._reader: Reader | None = None
        self._failures: Failures = []
        self._begun = False  # the first token has come
        self._status = 0
        self._prefill: asyncio.TimerHandle | None = None

    async def take(self, message: Message) -> list[bytes]:
        """Take in a message; return the answers to it, none or several."""
        if message.modes is not None:
            self._request_mode, self._response_mode = message.modes
        if message.subset is not None:
            self._subset = message.subset
        part = message.part
        if message.observes or part is None:
            self.over = message.observes  # no answer is wanted: the gateway need not send more
            return []
        try:
            if part.direction is _REQUEST:
                return await self._take_request(part)
            return list(self._take_response(part, message.served))
        except RequestError as error:
            self.over = True
            reply = error.reply()
            return [refuse(reply.status, reply.headers, reply.body, error.code)]

    def close(self) -> None:
        """The gateway has ended the conversation, and with it perhaps the request."""
        if self._prefill is not None and (self._job is None or self._job.ended):
            self._prefill.cancel()
        job, attempt = self._job, self._attempt
        if job is None or attempt is None:
            return
        sees_end = self._response_mode is not BodyMode.NONE
        if not job.ended and (sees_end or (self._sees_headers and not self._status)):
            # it would have been told of the answer: the client has left, or the replica broke off
            self._books.end(job, "cancelled")
        elif not job.ended:
            self._ends.expect(job)
        self._ejection.end(attempt)

    async def _take_request(self, part: Headers | Body | Trailers) -> list[bytes]:
        duplex = self._request_mode is BodyMode.FULL_DUPLEX_STREAMED
        if isinstance(part, Headers):
            self._headers = part
            if part.ends or not (duplex or self._request_mode in _WHOLE):
                return [pass_headers(_REQUEST, await self._place(None))]
            return [] if duplex else [pass_headers(_REQUEST)]
        if self._is_placed:  # it was decided about without its body
            if isinstance(part, Trailers):
                return [pass_trailers(_REQUEST)]
            if duplex:
                return list(stream_body(_REQUEST, part.data, ends=part.ends))
            return [pass_body(_REQUEST)]
        if isinstance(part, Body):
            self._body += part.data
            limit = self._placer.max_body_bytes
            if len(self._body) > limit:
                raise RequestError(
                    413, f"the body may have {limit} bytes at most", "body_too_large"
                )
            if not part.ends and duplex:
                return []
        body, self._body = bytes(self._body), bytearray()
        to = await self._place(body)
        if not duplex:
            return [pass_body(_REQUEST, to)]
        ends = isinstance(part, Body)
        answers = [pass_headers(_REQUEST, to), *stream_body(_REQUEST, body, ends=ends)]
        return answers if ends else [*answers, pass_trailers(_REQUEST)]

    async def _place(self, body: bytes | None) -> Destination:
        """Decide where the request goes.

        Raises:
            RequestError: If the client is to be answered instead.
        """
        fields = self._headers.fields if self._headers else {}
        path = fields.get(":path", "").partition("?")[0]
        self._is_placed = True
        placed = await self._placer.place(Asking(path, fields, body, self._subset))
        if placed.job is None:
            return Destination(placed.endpoints)
        job = self._job = placed.job
        sees_tokens = self._response_mode is not BodyMode.NONE
        self._attempt = self._ejection.begin(job.replica, stream=placed.stream and sees_tokens)
        if not (placed.stream and sees_tokens):
            self._assume_prefill(job)
        # tokens cannot be counted in a packed answer
        return Destination(placed.endpoints, ("accept-encoding",) if sees_tokens else ())

    def _assume_prefill(self, job: Job) -> None:
        """Nobody says when the prompt is computed: take the known rate for it."""
        left_s = self._books.dispatcher.state.prefill_left_s(job.replica)
        loop = asyncio.get_running_loop()
        self._prefill = loop.call_later(left_s, self._books.dispatcher.end_prefill, job)

    def _take_response(
        self, part: Headers | Body | Trailers, served: str | None
    ) -> Iterator[bytes]:
        if served is not None:
            self._note_served(served)
        if isinstance(part, Headers):
            yield pass_headers(_RESPONSE)
            self._note_head(part)
            return
        if isinstance(part, Trailers):
            yield pass_trailers(_RESPONSE)
            self._note_end()
            return
        if self._response_mode is BodyMode.FULL_DUPLEX_STREAMED:
            yield from stream_body(_RESPONSE, part.data, ends=part.ends)
        else:
            yield pass_body(_RESPONSE)
        self._note_piece(part.data)
        if part.ends:
            self._note_end()

    def _note_served(self, endpoint: str) -> None:
        """Another replica than the chosen one has answered: the gateway has tried again."""
        job, attempt = self._job, self._attempt
        replica = self._placer.replica_at.get(endpoint)
        if job is None or attempt is None or job.ended or replica in (None, job.replica):
            return
        assert replica is not None
        self._ejection.end(attempt)
        self._failures.append((attempt, UpstreamError("disconnected")))
        self._books.dispatcher.moved(job, replica)
        self._attempt = self._ejection.begin(replica, stream=attempt.stream)

    def _note_head(self, head: Headers) -> None:
        job, status = self._job, head.fields.get(":status", "")
        self._status = int(status) if status.isdecimal() else 200
        if job is None or job.ended:
            return
        if self._status in _FULL:
            self._ejection.busy(job.replica, retry_after_s(list(head.fields.items())))
        is_stream = "text/event-stream" in head.fields.get("content-type", "")
        self._reader = Reader(is_stream)
        # engines send the head of an answer in one piece when they have all of it
        if head.ends or (self._response_mode is BodyMode.NONE and not is_stream):
            self._note_end()

    def _note_piece(self, data: bytes) -> None:
        job, reader = self._job, self._reader
        if job is None or job.ended or reader is None:
            return
        count = reader.feed(data)
        if reader.is_stream and self._status == 200:
            self._note_tokens(job, reader, count)
            if reader.done and not reader.failed:
                self._books.dispatcher.answered(job)

    def _note_tokens(self, job: Job, reader: Reader, count: int) -> None:
        attempt = self._attempt
        assert attempt is not None
        if reader.begun and not self._begun:
            self._begun = True
            # from now on the replica owes nothing: a client that takes nothing looks the same here
            self._books.begin(job, attempt, self._failures)
        if count:
            self._books.dispatcher.tokens(job, count)
            attempt.standing.last_token_s = self._books.dispatcher.clock()

    def _note_end(self) -> None:
        job, reader, attempt = self._job, self._reader, self._attempt
        if job is None or job.ended or reader is None or attempt is None:
            return
        count = reader.close()
        broken = False
        if reader.is_stream and self._status == 200 and self._response_mode is not BodyMode.NONE:
            self._note_tokens(job, reader, count)
            broken = not reader.whole
        self._books.close(job, attempt, reader, self._status, self._failures, broken=broken)
        self._ejection.end(attempt)
