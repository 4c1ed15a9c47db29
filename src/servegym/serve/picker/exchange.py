"""One request's conversation with the gateway, from its headers to the end of its answer."""

from __future__ import annotations

from collections.abc import Iterator

from servegym.serve.picker.desk import PickerDesk, PickerPlacement
from servegym.serve.picker.ends import AssumedEnds
from servegym.serve.picker.reading import Reading
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
from servegym.serve.router.errors import RequestError
from servegym.serve.router.forms import FORMS
from servegym.serve.router.headers import PREFILLER_HEADER, retry_after_s
from servegym.serve.router.pages import no_replica
from servegym.serve.router.placement import Ending
from servegym.serve.router.stream import Reader
from servegym.serve.router.typed_events import Dialect

_REQUEST, _RESPONSE = Direction.REQUEST, Direction.RESPONSE
#: The gateway waits for an answer to each message, and these bodies it sends when it has had that
#: to the headers; their headers can still be changed with them.
_WHOLE = (BodyMode.BUFFERED, BodyMode.BUFFERED_PARTIAL)
#: Statuses of a replica that has no room.
_FULL = (429, 503)


class Exchange:
    """Answers a gateway's messages about one request, and keeps its books.

    Args:
        desk: Decides, and is told what becomes of requests.
        reading: Of requests.
        ends: Of requests whose answers are not seen.
        modes: How bodies of requests and responses come, if the gateway does not say.
        sees_headers: Whether the gateway sends headers of responses.

    Attributes:
        over: Whether nothing more is to be said.
    """

    def __init__(
        self,
        desk: PickerDesk,
        reading: Reading,
        ends: AssumedEnds,
        modes: tuple[BodyMode, BodyMode],
        *,
        sees_headers: bool,
    ) -> None:
        self.over = False
        self._desk = desk
        self._reading = reading
        self._ends = ends
        self._request_mode, self._response_mode = modes
        self._sees_headers = sees_headers
        self._headers: Headers | None = None
        self._subset: tuple[str, ...] | None = None
        self._body = bytearray()
        self._is_decided = False  # or about to be
        self._placement: PickerPlacement | None = None
        self._is_placed = False
        self._reader: Reader | None = None
        self._begun = False  # the first token has come
        self._status = 0

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
            if self._placement is not None:
                self._placement.end("failed")  # does nothing if it was rejected
            reply = error.reply(self._dialect)
            return [refuse(reply.status, reply.headers, reply.body, error.code)]

    def close(self) -> None:
        """The gateway has ended the conversation, and with it perhaps the request."""
        placement = self._placement
        if placement is None:
            return
        sees_end = self._response_mode is not BodyMode.NONE
        if self._is_placed and not (sees_end or (self._sees_headers and not self._status)):
            self._ends.expect(placement.unseen())
        else:
            # it would have been told of the answer: the client has left, or the replica broke off
            placement.end("cancelled")
        placement.leave()

    async def _take_request(self, part: Headers | Body | Trailers) -> list[bytes]:
        duplex = self._request_mode is BodyMode.FULL_DUPLEX_STREAMED
        if isinstance(part, Headers):
            if self._placement is None:
                self._enter(part)
            if part.ends or not (duplex or self._request_mode in _WHOLE):
                return [pass_headers(_REQUEST, await self._place(None))]
            return [] if duplex else [pass_headers(_REQUEST)]
        if self._is_decided:  # it was decided about without its body
            if isinstance(part, Trailers):
                return [pass_trailers(_REQUEST)]
            if duplex:
                return list(stream_body(_REQUEST, part.data, ends=part.ends))
            return [pass_body(_REQUEST)]
        if isinstance(part, Body):
            self._body += part.data
            limit = self._reading.config.max_body_bytes
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

    def _enter(self, headers: Headers) -> None:
        self._headers = headers
        self._placement = self._desk.enter(*self._reading.names(headers.fields))

    @property
    def _path(self) -> str:
        return self._headers.fields.get(":path", "").partition("?")[0] if self._headers else ""

    @property
    def _dialect(self) -> Dialect:
        """In which errors are written."""
        form = FORMS.get(self._path)
        return form.dialect if form is not None else "openai"

    async def _place(self, body: bytes | None) -> Destination:
        """Decide where the request goes.

        Raises:
            RequestError: If the client is to be answered instead.
        """
        self._is_decided = True
        if self._subset is not None and not self._subset:  # nobody who comes will be in it
            raise no_replica(self._reading.config.retry_after_s)
        form, headers, placement = FORMS.get(self._path), self._headers, self._placement
        if form is None or headers is None or placement is None:
            return Destination(self._desk.in_turn(self._subset))
        sees_tokens = self._response_mode is not BodyMode.NONE
        arrival = await self._reading.read(form, headers.fields, body, streams=sees_tokens)
        placement.subset = self._subset
        placement.arrive(arrival)
        await placement.place()
        self._is_placed = True
        prefiller = placement.prefiller()
        # tokens cannot be counted in a packed answer, and it is not for clients to say who prefills
        without = ["accept-encoding"] if sees_tokens else []
        without += [] if prefiller else [PREFILLER_HEADER]
        return Destination(placement.endpoints(), without, prefiller)

    def _take_response(
        self, part: Headers | Body | Trailers, served: str | None
    ) -> Iterator[bytes]:
        placed = self._placement if self._is_placed else None
        if placed is not None and placed.job.ended:
            placed = None
        if placed is not None and served is not None:
            placed.served(served)
        if isinstance(part, Headers):
            yield pass_headers(_RESPONSE)
            if placed is not None:
                self._note_head(placed, part)
            return
        if isinstance(part, Trailers):
            yield pass_trailers(_RESPONSE)
        elif self._response_mode is BodyMode.FULL_DUPLEX_STREAMED:
            yield from stream_body(_RESPONSE, part.data, ends=part.ends)
        else:
            yield pass_body(_RESPONSE)
        if placed is None or self._reader is None:
            return
        if isinstance(part, Body):
            self._note_piece(placed, self._reader, part.data)
        if isinstance(part, Trailers) or part.ends:
            self._note_end(placed, self._reader)

    def _note_head(self, placed: PickerPlacement, head: Headers) -> None:
        status = head.fields.get(":status", "")
        self._status = int(status) if status.isdecimal() else 200
        if self._status in _FULL:
            placed.busy(retry_after_s(list(head.fields.items())))
        is_stream = "text/event-stream" in head.fields.get("content-type", "")
        self._reader = Reader(is_stream)
        # engines send the head of an answer in one piece when they have all of it
        if head.ends or (self._response_mode is BodyMode.NONE and not is_stream):
            self._note_end(placed, self._reader)

    def _note_piece(self, placed: PickerPlacement, reader: Reader, data: bytes) -> None:
        count = reader.feed(data)
        if reader.is_stream and self._status == 200:
            self._note_tokens(placed, reader, count)
            if reader.done and not reader.failed:
                placed.answered()

    def _note_tokens(self, placed: PickerPlacement, reader: Reader, count: int) -> None:
        now_s = self._desk.dispatcher.clock()
        if reader.begun and not self._begun:
            self._begun = True
            placed.begin()
            # from now on the replica owes nothing: a client that takes nothing looks the same here
            placed.paused(now_s)
        if count:
            placed.tokens(count, now_s)

    def _note_end(self, placed: PickerPlacement, reader: Reader) -> None:
        count, cause = reader.close(), ""
        if reader.is_stream and self._status == 200 and self._response_mode is not BodyMode.NONE:
            self._note_tokens(placed, reader, count)
            cause = "error_event" if reader.failed else "" if reader.whole else "cut"
        if cause:
            placed.broke(cause, placed.attempt.standing.last_token_s, reader.error_status)
        prompt_tokens, _, cached_tokens = reader.usage()
        placed.close(
            Ending(
                self._status,
                bool(cause),
                reader.failed,
                prompt_tokens,
                cached_tokens,
                reader.output_tokens(),
            )
        )
