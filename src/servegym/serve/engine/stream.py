"""One answer on its way to the client, in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from aiohttp import HttpVersion11, web

from servegym.serve.engine.content import CHARS_PER_TOKEN
from servegym.serve.engine.request import EngineRequest

#: A client that reads so slowly that more than this waits for it gets the rest in fewer pieces.
_MAX_UNREAD_BYTES = 64 * 1024
_DONE = b"data: [DONE]\n\n"


class Stream:
    """Text, tokens sent and the connection of one request.

    Args:
        request: The request in the engine.
        text: Its whole answer.
        chat: Whether it is a chat completion.
        model_name: Named in every event.
        fingerprint: Named in every event; tells which replica answered.
        stamped: Whether each event has a comment with the machine's monotonic clock, in seconds:
            when the event was sent, and when the request came.

    Attributes:
        done: Set when the last token is there.
    """

    __slots__ = (
        "_came_s",
        "_chat",
        "_fields",
        "_framed",
        "_head",
        "_lead",
        "_sent",
        "_stamped",
        "_tail",
        "_text",
        "_transport",
        "done",
        "request",
    )

    def __init__(
        self,
        request: EngineRequest,
        text: str,
        *,
        chat: bool,
        model_name: str,
        fingerprint: str,
        stamped: bool = False,
    ) -> None:
        self.request = request
        self.done = asyncio.Event()
        self._text = text
        self._chat = chat
        self._sent = 0
        self._transport: asyncio.WriteTransport | None = None
        self._framed = False
        self._stamped = stamped
        self._came_s = time.monotonic()
        kind = "chat.completion" if chat else "text_completion"
        self._fields: dict[str, Any] = {
            "id": request.request_id,
            "object": kind,
            "created": int(time.time()),
            "model": model_name,
            "system_fingerprint": fingerprint,
        }
        # the text of an event is plain hexadecimal and blanks: it needs no escapes
        event = _compact(self._chunk("\x00", None))
        head, tail = event.split(b"\\u0000")
        self._head, self._tail = b"data: " + head, tail + b"\n"
        # as in vLLM the role comes with the first output, not when the request is taken
        self._lead = _event(self._chunk("", None, "assistant")) if chat else b""

    def _chunk(
        self, text: str, finish_reason: str | None, role: str | None = None
    ) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        delta = {"role": role, "content": text} if role else {"content": text}
        said = {"delta": delta} if self._chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        return {**self._fields, "object": kind, "choices": [choice]}

    @property
    def usage(self) -> dict[str, Any]:
        """Numbers of tokens of the ended request."""
        prompt, output = self.request.prompt_tokens, self.request.output_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": self.request.cached_tokens},
        }

    def document(self) -> dict[str, Any]:
        """Return the whole answer as one object."""
        if self._chat:
            said: dict[str, Any] = {"message": {"role": "assistant", "content": self._text}}
        else:
            said = {"text": self._text}
        reason = self.request.finish_reason
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return {**self._fields, "choices": [choice], "usage": self.usage}

    async def open(self, http: web.Request) -> web.StreamResponse:
        """Send the head of a stream of server-sent events."""
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
            }
        )
        self._framed = http.version >= HttpVersion11
        if self._framed:
            response.enable_chunked_encoding()
        await response.prepare(http)
        # Events bypass the response: its `write` is a coroutine, which costs more than the event.
        self._transport = http.transport
        return response

    def send(self, generated: int) -> None:
        """Send the tokens up to the `generated`-th; the last ones wait for `rest`."""
        if generated == self.request.output_tokens:
            self.done.set()
            return
        transport = self._transport
        if transport is None or transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            return
        text = self._take(generated).encode()
        lead, self._lead = self._lead, b""
        self._write(b"%b%b%b%b%b\n" % (lead, self._head, text, self._tail, self._stamp()))

    def rest(self, include_usage: bool) -> bytes:
        """Return what is left to send when the request has ended."""
        event = self._chunk(self._take(self.request.output_tokens), self.request.finish_reason)
        parts = [self._lead, _event(event, self._stamp())]
        if include_usage:
            last = {**self._chunk("", None), "choices": [], "usage": self.usage}
            parts.append(_event(last))
        return b"".join([*parts, _DONE])

    def _stamp(self) -> bytes:
        return b": %.6f %.6f\n" % (time.monotonic(), self._came_s) if self._stamped else b""

    def _take(self, generated: int) -> str:
        first, self._sent = self._sent, generated
        return self._text[first * CHARS_PER_TOKEN : generated * CHARS_PER_TOKEN]

    def _write(self, event: bytes) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            frame = b"%x\r\n%b\r\n" % (len(event), event) if self._framed else event
            self._transport.write(frame)


def _compact(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _event(document: dict[str, Any], stamp: bytes = b"") -> bytes:
    return b"data: %b\n%b\n" % (_compact(document), stamp)
