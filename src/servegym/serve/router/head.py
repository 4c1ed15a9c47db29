"""Heads of HTTP/1.1 messages, read strictly and written (RFC 9112).

What is doubtful is refused, not guessed: spaces before a colon, folded lines, bare line feeds,
lengths that are no plain number or are given twice, a length beside `Transfer-Encoding`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import NamedTuple

#: Longest head read, bytes.
MAX_HEAD_BYTES = 32 * 1024
_MAX_FIELDS = 128
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(
    rf"({_TOKEN}) (?:https?://[0-9A-Za-z.:\[\]-]+)?(/[!-~]*) HTTP/1\.([01])\r\n"
)
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
_VALUE = r"[^\x00-\x08\x0a-\x1f\x7f]*"
_FIELD = re.compile(rf"({_TOKEN}):({_VALUE})\r\n")
_FIELDS = re.compile(rf"(?:{_TOKEN}:{_VALUE}\r\n)*\r\n")
_NUMBER = re.compile(r"[0-9]{1,18}")
#: How the first line of a request may begin.
_BEGINNING = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}(?: |$)")
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
    """

    status: int
    minor: int
    fields: Fields
    length: int | None
    chunked: bool

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection may be used again after the body."""
        if self.length is None and not self.chunked:
            return False
        asked = self.fields.tokens("connection")
        return "close" not in asked and (self.minor == 1 or "keep-alive" in asked)


def may_begin_request(data: bytes) -> bool:
    """Whether bytes may be the beginning of a request, as far as they go."""
    if b"\r\n" in data:
        line = data[: data.index(b"\r\n") + 2].decode("utf-8", "surrogateescape")
        return _REQUEST_LINE.fullmatch(line) is not None
    return not data or _BEGINNING.match(data) is not None


def read_request_head(data: bytes) -> RequestHead:
    """Read the head of a request, up to and with its empty line.

    Raises:
        HeadError: If it is none.
    """
    text = data.decode("utf-8", "surrogateescape")
    line = _REQUEST_LINE.match(text)
    if line is None:
        raise HeadError("no request line of HTTP/1.1")
    method, target, minor = line.groups()
    fields = _read_fields(text, line.end())
    if minor == "1" and len(fields.all("host")) != 1:
        raise HeadError("not one Host")
    chunked, length = _framing(fields)
    if chunked and minor == "0":
        raise HeadError("chunks in HTTP/1.0")
    path, _, query = target.partition("?")
    return RequestHead(method, path, query, int(minor), fields, None if chunked else length or 0)


def read_response_head(data: bytes) -> ResponseHead:
    """Read the head of a response to a POST, up to and with its empty line.

    Raises:
        HeadError: If it is none.
    """
    text = data.decode("utf-8", "surrogateescape")
    line = _STATUS_LINE.match(text)
    if line is None:
        raise HeadError("no status line of HTTP/1.1")
    status, fields = int(line[2]), _read_fields(text, line.end())
    chunked, length = _framing(fields)
    if status < 200 or status in (204, 304):
        chunked, length = False, 0
    return ResponseHead(status, int(line[1]), fields, length, chunked)


def write_response_head(status: int, pairs: Iterable[tuple[str, str]]) -> bytes:
    """Write the head of a response, with its empty line."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in pairs])
    text = f"HTTP/1.1 {status} {_PHRASES.get(status, '')}\r\n{lines}\r\n"
    return text.encode("utf-8", "surrogateescape")


def _read_fields(text: str, start: int) -> Fields:
    """Read all lines up to the empty one, which must be the end."""
    if _FIELDS.fullmatch(text, start) is None:
        raise HeadError("a line that is no field")
    pairs = [(name, value.strip(" \t")) for name, value in _FIELD.findall(text, start)]
    if len(pairs) > _MAX_FIELDS:
        raise HeadError(f"more than {_MAX_FIELDS} fields")
    return Fields(pairs)


def _framing(fields: Fields) -> tuple[bool, int | None]:
    """Say whether a body comes in chunks, and else how long it is, if that is known."""
    length, coding = fields.get("content-length"), fields.get("transfer-encoding")
    if coding is not None:
        if length is not None:
            raise HeadError("a length beside Transfer-Encoding")
        if fields.tokens("transfer-encoding") != ["chunked"]:
            raise HeadError("a Transfer-Encoding other than chunked")
        return True, None
    if length is None:
        return False, None
    if _NUMBER.fullmatch(length) is None or len(fields.all("content-length")) != 1:
        raise HeadError("a Content-Length that is not one number")
    return False, int(length)
