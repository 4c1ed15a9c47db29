"""Asking one replica: until the first token, nothing is passed on and another may be asked."""

from __future__ import annotations

import asyncio
import json
from typing import NamedTuple

import aiohttp
from yarl import URL

from servegym.serve.router.headers import retry_after_s
from servegym.serve.router.stream import Reader

#: Most that is kept of a refusal, and of what a stream says before its first token.
_MAX_HELD_BYTES = 256 * 1024
#: For the body of a refusal to come, seconds.
_REFUSAL_S = 2.0
#: A replica that is full. It is well, and what it says is for the client if no other has room.
_FULL = frozenset({429, 503})


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
        cause: For the counters: `refused` (took no connection), `disconnected`, `timeout`,
            `empty`, `error_event` or `status_...`.
        refusal: What it said, if it said something.
    """

    def __init__(self, cause: str, refusal: Refusal | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.refusal = refusal

    @property
    def of_connection(self) -> bool:
        """Whether it is about the connection and not about the request."""
        return self.cause in ("refused", "disconnected")

    @property
    def is_full(self) -> bool:
        """Whether the replica only has no room."""
        return self.refusal is not None and self.refusal.status in _FULL

    @property
    def retry_after_s(self) -> float | None:
        """When it has room, as it says."""
        return retry_after_s(self.refusal.headers) if self.refusal else None


class Answer(NamedTuple):
    """A replica's answer that has begun.

    Attributes:
        response: The rest of it.
        reader: Has read what came.
        first: What came.
    """

    response: aiohttp.ClientResponse
    reader: Reader
    first: bytes


async def ask(
    session: aiohttp.ClientSession,
    url: URL,
    body: bytes,
    headers: list[tuple[str, str]],
    *,
    timeout: aiohttp.ClientTimeout,
    first_token_s: float | None,
) -> Answer:
    """Send a request to a replica and wait until its answer has begun.

    A stream has begun with its first token; what comes before (the head, comments, the role) is
    held back until then, up to a limit. Another answer has begun with its first byte.

    Args:
        session: To the replicas.
        url: Of the endpoint there.
        body: Of the request.
        headers: Of the request.
        timeout: Of the connection.
        first_token_s: How long a stream may take to begin; `None`: no stream was asked for, and
            the answer may take as long as it wants.

    Raises:
        UpstreamError: If there is no answer, or one that another replica may better.
    """
    response: aiohttp.ClientResponse | None = None
    try:
        async with asyncio.timeout(first_token_s):
            response = await session.post(
                url, data=body, headers=headers, timeout=timeout, allow_redirects=False
            )
            if response.status in _FULL or response.status >= 500:
                raise await _refused(response)
            return await _begin(response)
    except BaseException as error:
        if response is not None:
            response.close()
        if isinstance(error, aiohttp.ClientConnectorError):
            raise UpstreamError("refused") from None
        if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError):
            raise UpstreamError("timeout") from None
        if isinstance(error, (aiohttp.ClientError, OSError)):  # to connect took too long, say
            raise UpstreamError("disconnected") from None
        raise


async def _begin(response: aiohttp.ClientResponse) -> Answer:
    is_stream = response.status == 200 and response.content_type == "text/event-stream"
    reader = Reader(is_stream=is_stream)
    pieces: list[bytes] = []
    held = 0
    while True:
        piece = await response.content.readany()
        if piece:
            pieces.append(piece)
            held += len(piece)
            reader.feed(piece)
        elif is_stream:
            reader.close()
        if reader.failed and not reader.begun and reader.error_status >= 500:
            raise UpstreamError("error_event", _as_refusal(reader))
        if not piece and not held and response.status == 200:
            raise UpstreamError("empty")
        begun = reader.begun or reader.failed or reader.done or not is_stream
        if begun or not piece or held > _MAX_HELD_BYTES:
            return Answer(response, reader, b"".join(pieces))


def _as_refusal(reader: Reader) -> Refusal | None:
    """Make an error that came instead of a stream's first token what it should have been."""
    if reader.error is None:
        return None
    body = json.dumps(reader.error).encode()
    return Refusal(reader.error_status, [("Content-Type", "application/json")], body)


async def _refused(response: aiohttp.ClientResponse) -> UpstreamError:
    """Read what a replica says instead of an answer."""
    body = b""
    try:
        async with asyncio.timeout(_REFUSAL_S):
            while len(body) < _MAX_HELD_BYTES and (piece := await response.content.readany()):
                body += piece
    except (TimeoutError, aiohttp.ClientError, OSError):
        pass
    headers = list(response.headers.items())
    return UpstreamError(f"status_{response.status}", Refusal(response.status, headers, body))
