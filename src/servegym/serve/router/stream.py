"""Reading along with an answer that passes through: its tokens and what the engine reports.

Streams are read as the standard of server-sent events says (WHATWG, HTML, section 9.2.6), whatever
the pieces they come in. What an event means follows what engines send (vLLM, SGLang, OpenAI):

- output is a choice with text, or a delta with anything but its role, or with token ids or
  log-probabilities; an event that only announces the role is none, nor is a comment;
- an error is an object with a true `error`, or `object` or `type` equal to `"error"`, or an event
  of type `error`; what comes after it, `[DONE]` included, changes nothing;
- a stream is whole after `[DONE]`, or if every choice it has shown has its `finish_reason`.

Events that name their type mean what `typed_events` says; such a stream is whole after its last.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from servegym.serve.router.json_body import parse_json
from servegym.serve.router.shape import Shape, shape_of
from servegym.serve.router.typed_events import Dialect, Meaning, meaning

#: Events, and answers in one piece, are read up to this size; beyond it only the end is looked at,
#: where engines put their usage.
_MAX_READ_BYTES = 128 * 1024
_TAIL_BYTES = 8192
#: Larger counts are no counts of tokens.
_MAX_TOKENS = 2**31
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,10})\b')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,10})\b')
_CACHED = re.compile(rb'"cached_tokens"\s*:\s*(\d{1,10})\b')
_BOM = b"\xef\xbb\xbf"
#: Events whose shape is learnt; an engine that changes its events all the time is read in full.
_MAX_SHAPES = 16


@dataclass(slots=True, eq=False)
class Reader:
    """Follows one answer, piece by piece, in time linear in its length.

    Attributes:
        is_stream: Whether it is a stream of server-sent events.
        begun: Whether there has been output, or its end without any.
        done: Whether the stream has said that it is complete.
        failed: Whether the engine has reported an error in an answer that began as a good one.
        error: That error as it came, if it was an object.
        error_status: The HTTP status that it names, 500 if none.
        num_tokens: Events with output so far.
        dialect: Whose words the events are in.
        shape: Of the last event of output, if others may have it.
    """

    is_stream: bool
    begun: bool = False
    done: bool = False
    failed: bool = False
    error: dict[str, Any] | None = None
    error_status: int = 500
    num_tokens: int = 0
    dialect: Dialect = "openai"
    shape: Shape | None = None
    _prompt_tokens: int | None = None
    _completion_tokens: int | None = None
    _cached_tokens: int | None = None
    # of a stream: the line and the event that are not complete, and its choices
    _line: list[bytes] = field(default_factory=list)
    _line_bytes: int = 0
    _data: list[bytes] = field(default_factory=list)
    _num_bytes: int = 0  # of the event; of an answer in one piece
    _kind: bytes = b""
    _at_start: bool = True
    _skip_lf: bool = False
    _num_shapes: int = 0
    _seen: set[int] = field(default_factory=set)
    _finished: set[int] = field(default_factory=set)
    # of an answer in one piece: all of it, or its end
    _kept: bytearray = field(default_factory=bytearray)

    @property
    def whole(self) -> bool:
        """Whether an answer whose bytes have ended is all there."""
        if not self.is_stream:
            return not self.failed
        ended = self.done or (bool(self._seen) and self._seen <= self._finished)
        return ended and not self.failed

    @property
    def is_between(self) -> bool:
        """Whether what comes next begins an event."""
        return not self._line_bytes and not self._num_bytes

    def feed(self, piece: bytes) -> int:
        """Take in a piece; return how many events with output ended in it."""
        if not self.is_stream:
            self._keep(piece)
            return 0
        if self.shape is not None and self.is_between and self.shape.fits(piece):
            self.num_tokens += 1
            return 1
        before = self.num_tokens
        if self._skip_lf and piece:
            self._skip_lf = False
            piece = piece[1:] if piece.startswith(b"\n") else piece
        lines = piece.splitlines()
        rest = b"" if piece.endswith((b"\n", b"\r")) or not lines else lines.pop()
        self._skip_lf = piece.endswith(b"\r")
        size = self._line_bytes
        if lines and size:
            lines[0] = b"".join(self._line) + lines[0]
            self._line.clear()
            self._line_bytes = 0
        for line in lines:
            self._take(line, max(size, len(line)))
            size = 0
        if self._num_shapes < _MAX_SHAPES and self.num_tokens == before + 1 and not rest:
            self._num_shapes += 1
            self.shape = shape_of(piece) or self.shape
        if rest:
            self._line_bytes += len(rest)
            if self._line_bytes <= _MAX_READ_BYTES:
                self._line.append(rest)
        return self.num_tokens - before

    def close(self) -> int:
        """The answer has ended; return how many events with output ended with it.

        Engines that leave out the last empty line are understood, as clients do.
        """
        if not self.is_stream:
            self._read_document()
            return 0
        before = self.num_tokens
        if self._line:
            line = b"".join(self._line)
            self._line.clear()
            self._take(line, self._line_bytes)
        self._dispatch()
        return self.num_tokens - before

    def usage(self) -> tuple[int | None, int | None, int | None]:
        """Return prompt, completion and cached tokens as the engine reports them, if it does."""
        return self._prompt_tokens, self._completion_tokens, self._cached_tokens

    def output_tokens(self) -> int:
        """Return the length of the answer: as reported, else one token an event."""
        return self.num_tokens if self._completion_tokens is None else self._completion_tokens

    def _take(self, line: bytes, size: int) -> None:
        """Take in a line of a stream, whose end may be missing where `size` is more."""
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BOM)
        if not line:
            self._dispatch()
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._num_bytes += size
            self._data.append(
                value.removeprefix(b" ") if self._num_bytes <= _MAX_READ_BYTES else b""
            )
        elif name == b"event":
            self._num_bytes += size
            self._kind = value.removeprefix(b" ")

    def _dispatch(self) -> None:
        """An event is complete."""
        data, kind, size = self._data, self._kind, self._num_bytes
        self._num_bytes = 0
        if not data:
            self._kind = b""
            return
        self._data, self._kind = [], b""
        if size > _MAX_READ_BYTES:  # prompt log-probabilities, say
            self._output(1)
            return
        text = data[0] if len(data) == 1 else b"\n".join(data)
        if text.strip() == b"[DONE]":
            self.done = True
            return
        try:
            event = parse_json(text)
        except ValueError:
            event = None
        if kind == b"error":
            self._fail(event)
        elif isinstance(event, dict):
            self._read_event(event)
        else:
            self._output(1)  # whatever it is, the engine has said something

    def _read_event(self, event: dict[str, Any]) -> None:
        if _is_error(event):
            self._fail(event)
            return
        if (said := meaning(event)) is not None:
            self._read_typed(said)
            return
        usage, choices = event.get("usage"), event.get("choices")
        if isinstance(usage, dict):
            self._read_usage(usage)
        if isinstance(choices, list):
            for choice in choices:
                if isinstance(choice, dict):
                    self._read_choice(choice)
        elif not isinstance(usage, dict):
            self._output(1)

    def _read_typed(self, said: Meaning) -> None:
        self.dialect = said.dialect
        if isinstance(said.usage, dict):
            self._read_usage(said.usage)
        if said.error is not None:
            self._fail(said.error)
        elif said.is_output:
            self._output(1)
        elif said.ends:
            self.begun = self.done = True

    def _read_choice(self, choice: dict[str, Any]) -> None:
        index = choice.get("index")
        index = index if isinstance(index, int) else 0
        self._seen.add(index)
        delta = choice.get("delta")
        said = delta if isinstance(delta, dict) else {}
        ends = choice.get("finish_reason") is not None
        makes = bool(choice.get("text") or choice.get("logprobs") or choice.get("token_ids"))
        makes = makes or any(value for name, value in said.items() if name != "role")
        # a token may have no text of its own: half of a character, or kept back for a stop word
        makes = makes or (self.begun and not ends and "role" not in said)
        if makes:
            self._output(1)
        if ends:
            self._finished.add(index)
            self.begun = True

    def _read_usage(self, usage: dict[str, Any]) -> None:
        """Read lengths by OpenAI's older names and by its newer ones, which Anthropic's are too."""
        prompt = _count(usage.get("prompt_tokens", usage.get("input_tokens")), None)
        cached = _count(usage.get("cache_read_input_tokens"), None)
        if prompt is not None and cached is not None:  # Anthropic does not count them as input
            prompt += cached + (_count(usage.get("cache_creation_input_tokens"), 0) or 0)
        details = usage.get("prompt_tokens_details", usage.get("input_tokens_details"))
        if isinstance(details, dict):
            cached = _count(details.get("cached_tokens"), cached)
        completion = usage.get("completion_tokens", usage.get("output_tokens"))
        self._prompt_tokens = self._prompt_tokens if prompt is None else prompt
        self._cached_tokens = self._cached_tokens if cached is None else cached
        self._completion_tokens = _count(completion, self._completion_tokens)

    def _output(self, tokens: int) -> None:
        self.begun = True
        self.num_tokens += tokens

    def _fail(self, event: object) -> None:
        self.failed = True
        self.error = event if isinstance(event, dict) else None
        error = event.get("error") if isinstance(event, dict) else None
        for place in (error, event):
            if isinstance(place, dict):
                for name in ("code", "status", "status_code"):
                    status = place.get(name)
                    if type(status) is int and 400 <= status <= 599:
                        self.error_status = status
                        return

    def _keep(self, piece: bytes) -> None:
        self._num_bytes += len(piece)
        self._kept += piece
        if len(self._kept) > _MAX_READ_BYTES:
            del self._kept[:-_TAIL_BYTES]

    def _read_document(self) -> None:
        text = bytes(self._kept)
        if self._num_bytes > len(text):
            self._prompt_tokens = _last(_PROMPT, text)
            self._completion_tokens = _last(_COMPLETION, text)
            self._cached_tokens = _last(_CACHED, text)
            return
        try:
            document = parse_json(text)
        except ValueError:
            return
        if isinstance(document, dict):
            if _is_error(document):
                self._fail(document)
            elif isinstance(document.get("usage"), dict):
                self._read_usage(document["usage"])


def _is_error(event: dict[str, Any]) -> bool:
    return bool(event.get("error")) or "error" in (event.get("object"), event.get("type"))


def _count(value: object, known: int | None) -> int | None:
    return value if type(value) is int and 0 <= value < _MAX_TOKENS else known


def _last(pattern: re.Pattern[bytes], text: bytes) -> int | None:
    found = pattern.findall(text)
    return _count(int(found[-1]), None) if found else None
