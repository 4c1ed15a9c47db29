"""Heads of HTTP/1.1 messages (RFC 9112): read by llhttp, through httptools, and written.

What is doubtful is refused, not guessed. llhttp, none of whose leniencies is on, refuses spaces
before a colon, folded lines, bare line feeds, lengths that are no plain number or are given twice,
and a length beside `Transfer-Encoding`. What it lets through is refused here: first lines that are
not exactly HTTP/1's (it takes runs of spaces, and RTSP), any number of fields or of `Host`, and
codings besides chunks. Only heads are given to it: it does not say at which byte one ends.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from http import HTTPStatus
from typing import NamedTuple

from httptools import (
    HttpParserError,
    HttpParserUpgrade,
    HttpRequestParser,
    HttpResponseParser,
    parse_url,
)

#: Longest head read, bytes.
MAX_HEAD_BYTES = 32 * 1024
_MAX_FIELDS = 128
_MAX_KNOWN_HEADS = 64
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


class HeadError(ValueError):
    """Raised when a head is not HTTP/1.1; the message holds nothing of what was sent."""


class Fields:
    """The fields of a head.

    Attributes:
        pairs: Names and values as they came, in order.
    """

    __slots__ = ("_first", "_is_repeated", "pairs")

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self.pairs = pairs
        self._first = {name.lower(): value for name, value in reversed(pairs)}
        self._is_repeated = len(self._first) < len(pairs)  # any of them

    def get(self, name: str) -> str | None:
        """Return the first value of a field, whose name is given in small letters."""
        return self._first.get(name)

    def all(self, name: str) -> list[str]:
        """Return every value of a field, whose name is given in small letters."""
        if not self._is_repeated:
            return [self._first[name]] if name in self._first else []
        return [value for given, value in self.pairs if given.lower() == name]

    def tokens(self, name: str) -> list[str]:
        """Return the parts of a list, in small letters."""
        if name not in self._first:
            return []
        text = ",".join(self.all(name))
        return [part.strip(" \t").lower() for part in text.split(",") if part.strip(" \t")]


class RequestHead(NamedTuple):
    """The head of a request.

    Attributes:
        method: As it came.
        path: Of the target, as it came; of a target with a host, as proxies get it, only this.
        query: After the question mark, as it came.
        minor: Of HTTP/1.1 it is 1.
        fields: Of the head.
        length: Of the body, bytes; `None`: it comes in chunks.
    """

    method: str
    path: str
    query: str
    minor: int
    fields: Fields
    length: int | None

    @property
    def keeps_alive(self) -> bool:
        """Whether the client's connection may be used again."""
        return self.minor == 1 and "close" not in self.fields.tokens("connection")


class ResponseHead(NamedTuple):
    """The head of a response.

    Attributes:
        status: Of it.
        minor: Of HTTP/1.1 it is 1.
        fields: Of the head.
        length: Of the body, bytes; `None`: it comes in chunks or ends with the connection.
        chunked: Whether it comes in chunks.
        keeps_alive: Whether the connection may be used again after the body.
        is_stream: Whether it is a stream of server-sent events.
    """

    status: int
    minor: int
    fields: Fields
    length: int | None
    chunked: bool
    keeps_alive: bool
    is_stream: bool


def may_begin_request(data: bytes) -> bool:
    """Whether bytes may be the beginning of a request, as far as they go."""
    line, found, _ = data.partition(b"\r\n")  # no more: what comes in bits is looked at often
    parts = _Parts()
    parser = HttpRequestParser(parts)
    try:
        parser.feed_data(line + found)
    except HttpParserError:
        return False
    return not found or _target(data, parser, parts) != b""


def read_request_head(data: bytes) -> RequestHead:
    """Read the head of a request, up to and with its empty line.

    Raises:
        HeadError: If it is none.
    """
    parts = _Parts()
    parser = HttpRequestParser(parts)
    _feed(parser, data)
    target = _target(data, parser, parts)
    if not target:
        raise HeadError("no request line of HTTP/1.1")
    fields = parts.fields()
    minor = 1 if parser.get_http_version() == "1.1" else 0
    if minor and len(fields.all("host")) != 1:
        raise HeadError("not one Host")
    chunked, length = _framing(fields)
    if chunked and not minor:
        raise HeadError("chunks in HTTP/1.0")
    path, _, query = target.decode("ascii").partition("?")
    method = parser.get_method().decode("ascii")
    return RequestHead(method, path, query, minor, fields, None if chunked else length or 0)


@functools.lru_cache(maxsize=_MAX_KNOWN_HEADS)
def read_response_head(data: bytes) -> ResponseHead:
    """Read the head of a response to a POST, up to and with its empty line.

    Those of streams are often the same, within a second at least: the last ones are remembered,
    and what is returned must not be changed.

    Raises:
        HeadError: If it is none.
    """
    parts = _Parts()
    parser = HttpResponseParser(parts)
    _feed(parser, data)
    status = parser.get_status_code()
    if not data.startswith(b"HTTP/1.") or not 100 <= status <= 599:
        raise HeadError("no status line of HTTP/1.1")
    fields = parts.fields()
    chunked, length = _framing(fields)
    if status < 200 or status in (204, 304):
        chunked, length = False, 0
    minor = 1 if parser.get_http_version() == "1.1" else 0
    ends = length is not None or chunked
    asked = fields.tokens("connection")
    keeps_alive = ends and "close" not in asked and (minor == 1 or "keep-alive" in asked)
    kind = (fields.get("content-type") or "").partition(";")[0].strip().lower()
    is_stream = kind == "text/event-stream"
    return ResponseHead(status, minor, fields, length, chunked, keeps_alive, is_stream)


def write_response_head(status: int, pairs: Iterable[tuple[str, str]]) -> bytes:
    """Write the head of a response, with its empty line."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in pairs])
    text = f"HTTP/1.1 {status} {_PHRASES.get(status, '')}\r\n{lines}\r\n"
    return text.encode("utf-8", "surrogateescape")


class _Parts:
    """What the parser finds.

    Attributes:
        target: Of a request.
        pairs: Names and values of fields, with the spaces behind them.
    """

    __slots__ = ("pairs", "target")

    def __init__(self) -> None:
        self.target = b""
        self.pairs: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        """See `httptools.HTTPProtocol`."""
        self.target = url

    def on_header(self, name: bytes, value: bytes) -> None:
        """See `httptools.HTTPProtocol`."""
        self.pairs.append((name, value))

    def fields(self) -> Fields:
        """Return the fields as text.

        Raises:
            HeadError: If they are too many.
        """
        if len(self.pairs) > _MAX_FIELDS:
            raise HeadError(f"more than {_MAX_FIELDS} fields")
        return Fields(
            [
                (name.decode("ascii"), value.decode("utf-8", "surrogateescape").rstrip(" \t"))
                for name, value in self.pairs
            ]
        )


def _feed(parser: HttpRequestParser | HttpResponseParser, data: bytes) -> None:
    """Let a head be parsed, which must end where the bytes do."""
    if data.find(b"\r\n\r\n") + 4 != len(data):
        raise HeadError("no empty line at its end")
    try:
        parser.feed_data(data)
    except HttpParserUpgrade:
        pass  # nothing here speaks what else a client offers to: its request is one like others
    except HttpParserError as error:
        raise HeadError(str(error)) from None  # a fixed sentence for each rule that is broken


def _target(data: bytes, parser: HttpRequestParser, parts: _Parts) -> bytes:
    """Return path and query of a request; of a target with a host, as proxies get it, only these.

    It is empty if the first line is not just `METHOD TARGET HTTP/1.x`, or has no path.
    """
    target = parts.target
    if not data.startswith(b"%b %b HTTP/1." % (parser.get_method(), target)):
        return b""
    if target[:1] == b"/":
        return target
    try:
        url = parse_url(target)
    except HttpParserError:
        return b""
    if url.schema not in (b"http", b"https") or url.userinfo is not None or not url.path:
        return b""
    return target[target.index(b"/", len(url.schema) + 3) :]


def _framing(fields: Fields) -> tuple[bool, int | None]:
    """Say whether a body comes in chunks, and else how long it is, if that is known."""
    if fields.get("transfer-encoding") is not None:
        if fields.tokens("transfer-encoding") != ["chunked"]:
            raise HeadError("a Transfer-Encoding other than chunked")
        return True, None
    length = fields.get("content-length")
    return False, None if length is None else int(length)
