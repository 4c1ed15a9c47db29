"""The shape of an event of output: by far most events differ from the one before in their text.

An event that has a known shape is one token and nothing else, and need not be read.
"""

from __future__ import annotations

import functools
import re

#: The text of an event, and what makes it more than output. A name within generated text cannot be
#: mistaken for a field: there its quotes are escaped.
_TEXT = re.compile(rb'"(?:text|content|reasoning|reasoning_content)":"([^"\\]*)"')
_UNFINISHED = b'"finish_reason":null'
_TELLING = re.compile(rb'"(?:error|usage|role|tool_calls)"')
_BACKSLASH = 0x5C


class Shape:
    """What is around the text of an event.

    Args:
        head: All bytes before the text, from the beginning of the event's line.
        tail: All bytes after it, to the end of the empty line behind the event.
    """

    __slots__ = ("_chunk_tail", "_head", "_tail")

    def __init__(self, head: bytes, tail: bytes) -> None:
        self._head = head
        self._tail = tail
        self._chunk_tail = tail + b"\r\n"

    def fits(self, piece: bytes) -> bool:
        """Whether a piece is an event of this shape, and nothing else."""
        head, tail = self._head, self._tail
        if not piece.startswith(head) or not piece.endswith(tail):
            return False
        end = len(piece) - len(tail)
        # no quote in the text: it ends where the other ended, and brings no field of its own
        return (
            end >= len(head)
            and piece.find(b'"', len(head), end) < 0
            and piece[end - 1] != _BACKSLASH
        )

    def fits_chunk(self, data: bytes) -> bool:
        """Whether bytes are one chunk that holds an event of this shape, and nothing else.

        The chunk's first line must be just what `framing.chunk` writes.
        """
        line, head, tail = _size_line(len(data)), self._head, self._chunk_tail
        if (
            not line
            or not data.startswith(line)
            or not data.startswith(head, len(line))
            or not data.endswith(tail)
        ):
            return False
        begin, end = len(line) + len(head), len(data) - len(tail)
        return end >= begin and data.find(b'"', begin, end) < 0 and data[end - 1] != _BACKSLASH


def shape_of(piece: bytes) -> Shape | None:
    """Return the shape of a piece that is a whole event of output in one line, else `None`."""
    plain = piece.startswith(b"data: {") and piece.endswith(b"}\n\n") and piece.count(b"\n") == 2
    if not plain or b"\r" in piece or _UNFINISHED not in piece:
        return None
    found = _TEXT.search(piece)
    if found is None or _TELLING.search(piece) or _TEXT.search(piece, found.end()):
        return None
    return Shape(piece[: found.start(1)], piece[found.end(1) :])


@functools.lru_cache(maxsize=4096)
def _size_line(num_bytes: int) -> bytes:
    """Return the first line of a chunk that has so many bytes, both its line ends counted.

    It is empty where no chunk has: one digit more in the first line skips a length.
    """
    for digits in range(1, 9):
        size = num_bytes - digits - 4
        if size > 0 and len(line := b"%x\r\n" % size) == digits + 2:
            return line
    return b""
