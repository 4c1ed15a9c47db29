"""Where a body ends that comes in pieces: in chunks, after so many bytes, or with its connection.

A framing takes the bytes that follow a head. It returns what of them may be passed on as it is, and
what of that is the body. Bytes are looked at no more than needed to find the end.

Heads are llhttp's to read (`head`), chunks are not: through httptools it hands out copies of what
they hold, but says neither at which byte a message ends, so that what follows would be lost, nor
how long a chunk is that has begun. Without these, chunks cannot be passed on as they came, nor one
that its replica broke off be filled up.
"""

from __future__ import annotations

import re
from typing import Protocol

#: A chunk's first line: at most 15 digits, and extensions that nobody reads.
_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[\t -~\x80-\xff]*)?\r\n")
_MAX_LINE_BYTES = 1024
_MAX_TRAILER_BYTES = 16 * 1024
#: The end of a body in chunks.
LAST_CHUNK = b"0\r\n\r\n"


class FramingError(ValueError):
    """Raised when what comes is not framed as it was said to be."""


class Framing(Protocol):
    """What all framings have.

    Attributes:
        ended: Whether the body is all there.
    """

    ended: bool

    @property
    def missing(self) -> int:
        """Bytes that what was passed on still lacks.

        Of a chunk with its line end, 0 between two chunks; of a body of known length.
        """

    def feed(self, data: bytes) -> tuple[bytes, bytes, bytes]:
        """Take in bytes; return those to pass on, the body in them, and those beyond its end.

        Raises:
            FramingError: If they are not framed so.
        """


class Chunked:
    """A body in chunks (RFC 9112, section 7.1). The last chunk and trailers are not passed on."""

    __slots__ = ("_held", "_left", "_trailer_bytes", "ended")

    def __init__(self) -> None:
        self.ended = False
        self._left = 0  # of the chunk that has begun, with the line end behind it
        self._held = b""  # a line that is not complete
        self._trailer_bytes = -1  # before the last chunk

    @property
    def missing(self) -> int:
        """Bytes that the chunk in progress still lacks, with its line end."""
        return self._left

    @property
    def is_between(self) -> bool:
        """Whether what comes next begins a chunk."""
        return not self._left and not self._held and self._trailer_bytes < 0

    def feed(self, data: bytes) -> tuple[bytes, bytes, bytes]:
        """See `Framing`."""
        if self.is_between:
            found = _SIZE.match(data)
            if found is not None:
                begin = found.end()
                size = len(data) - begin - 2
                if size > 0 and int(found[1], 16) == size and data.endswith(b"\r\n"):
                    return data, data[begin:-2], b""  # one whole chunk: so it nearly always is
        return self._feed(data)

    def _feed(self, data: bytes) -> tuple[bytes, bytes, bytes]:
        if self._held:
            data, self._held = self._held + data, b""
        at, pieces = 0, []
        while at < len(data) and self._trailer_bytes < 0:
            if self._left:
                end = min(len(data), at + self._left)
                body = data[at : min(end, at + self._left - 2)] if self._left > 2 else b""
                line_end = data[at + len(body) : end]
                if line_end != b"\r\n"[2 - min(2, self._left) :][: len(line_end)]:
                    raise FramingError("a chunk longer than it says")
                pieces.append(body)
                self._left -= end - at
                at = end
                continue
            found = _SIZE.match(data, at)
            if found is None:
                self._hold(data[at:])
                return data[:at], b"".join(pieces), b""
            size = int(found[1], 16)
            if size == 0:
                self._trailer_bytes = 0
                return data[:at], b"".join(pieces), self._end(data[found.end() :])
            at = found.end()
            self._left = size + 2
        if self._trailer_bytes >= 0:
            return b"", b"", self._end(data)
        return data, b"".join(pieces), b""

    def _hold(self, line: bytes) -> None:
        """Keep the beginning of a chunk's first line, if it may be one."""
        if len(line) > _MAX_LINE_BYTES or b"\n" in line or not line[:1].isalnum():
            raise FramingError("no size of a chunk")
        self._held = line

    def _end(self, data: bytes) -> bytes:
        """Skip trailers; return what comes after their empty line."""
        while True:
            line, found, rest = data.partition(b"\r\n")
            self._trailer_bytes += len(line)
            if self._trailer_bytes > _MAX_TRAILER_BYTES:
                raise FramingError("trailers without end")
            if not found:
                self._trailer_bytes -= len(line)  # it is counted when it is whole
                self._held = line
                return b""
            if not line:
                self.ended = True
                return rest
            data = rest


class Sized:
    """A body of known length.

    Args:
        length: Bytes.
    """

    __slots__ = ("ended", "missing")

    def __init__(self, length: int) -> None:
        self.missing = length
        self.ended = not length

    def feed(self, data: bytes) -> tuple[bytes, bytes, bytes]:
        """See `Framing`."""
        piece, rest = data, b""
        if len(data) > self.missing:
            piece, rest = data[: self.missing], data[self.missing :]
        self.missing -= len(piece)
        self.ended = not self.missing
        return piece, piece, rest


class UntilClosed:
    """A body that ends with its connection; whoever sees that sets `ended`."""

    __slots__ = ("ended",)

    missing = 0

    def __init__(self) -> None:
        self.ended = False

    def feed(self, data: bytes) -> tuple[bytes, bytes, bytes]:
        """See `Framing`."""
        return data, data, b""


def chunk(piece: bytes) -> bytes:
    """Write a chunk, which must not be empty."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)
