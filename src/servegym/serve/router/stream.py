"""Reading along with an answer that passes through: its tokens and what the engine reports."""

from __future__ import annotations

import re

#: The end of an answer that is kept to find its usage in: engines put it last.
_TAIL_BYTES = 8192
_PROMPT = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)')
_COMPLETION = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')
_CACHED = re.compile(rb'"cached_tokens"\s*:\s*(\d+)')
_DATA = b"data:"
_DONE = b"data: [DONE]"
_ERROR = b'data: {"error"'


class Reader:
    """Follows one answer, piece by piece.

    A field name within generated text cannot be mistaken for a field: there its quotes are
    escaped.

    Args:
        is_stream: Whether it is a stream of server-sent events.
        is_chat: Whether the first event announces the role and brings no token.

    Attributes:
        num_events: Events so far.
        done: Whether the stream has said that it is complete.
        failed: Whether the engine has reported an error in the stream.
    """

    __slots__ = ("_is_chat", "_is_stream", "_tail", "done", "failed", "num_events")

    def __init__(self, *, is_stream: bool, is_chat: bool) -> None:
        self._is_stream = is_stream
        self._is_chat = is_chat
        self._tail = b""
        self.num_events = 0
        self.done = False
        self.failed = False

    def feed(self, piece: bytes) -> int:
        """Take in a piece; return how many events began in it."""
        window = self._tail[1 - len(_DATA) :] + piece  # a name may be cut in two
        failed = self._is_stream and _ERROR in self._tail[1 - len(_ERROR) :] + piece
        self._tail = (self._tail + piece)[-_TAIL_BYTES:]
        if not self._is_stream:
            return 0
        count = window.count(_DATA)
        self.num_events += count
        self.failed |= failed
        self.done |= _DONE in self._tail[-64:]
        return count

    def usage(self) -> tuple[int | None, int | None, int | None]:
        """Return prompt, completion and cached tokens as the engine reports them, if it does."""
        return (
            _last(_PROMPT, self._tail),
            _last(_COMPLETION, self._tail),
            _last(_CACHED, self._tail),
        )

    def output_tokens(self) -> int:
        """Return the length of the answer: as reported, else one token an event."""
        reported = self.usage()[1]
        if reported is not None:
            return reported
        return max(0, self.num_events - self.done - self._is_chat)


def _last(pattern: re.Pattern[bytes], text: bytes) -> int | None:
    found = pattern.findall(text)
    return int(found[-1]) if found else None
