"""Many streaming clients in one process, each checking every answer it gets.

The emulated engine's answers are a function of the prompt, so a token that was lost, repeated or
taken from another stream is seen; its stamped events tell how long they were on their way.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

from servegym.serve.engine.content import answer_text, request_digest

_STAMP = re.compile(rb"\n: (\d+\.\d+) (\d+\.\d+)\n")
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_EVENT = re.compile(rb"^data: (\{.*\})$", re.MULTILINE)


class Work(NamedTuple):
    """What the clients ask for.

    Attributes:
        prompt_chars: Least and most characters of a prompt.
        output_tokens: Least and most tokens of an answer.
    """

    prompt_chars: tuple[int, int] = (200, 3000)
    output_tokens: tuple[int, int] = (100, 300)


@dataclass
class Result:
    """One request as its client saw it; times are the machine's monotonic clock in seconds.

    Attributes:
        outcome: `ok`, `refused` (a status), `unreached` (no connection), `broken` (the connection
            ended before the answer did), `told` (an error event said so), `late` (given up) or
            `wrong` (whole, but not what it should be).
        begun: Whether a token had come.
        replica: Who answered, empty if unknown.
        url_idx: Which of the load's urls it was sent to; -1: to none.
    """

    prompt: str
    tokens: int
    sent_s: float
    outcome: str = ""
    status: int = 0
    begun: bool = False
    replica: str = ""
    url_idx: int = -1
    first_s: float = float("nan")
    end_s: float = float("nan")
    num_events: int = 0
    detail: str = ""


@dataclass
class Tally:
    """Everything a load run has seen."""

    results: list[Result] = field(default_factory=list)
    to_engine_s: array[float] = field(default_factory=lambda: array("d"))
    from_engine_s: array[float] = field(default_factory=lambda: array("d"))

    def outcomes(self) -> Counter[str]:
        """Count results by outcome."""
        return Counter(result.outcome for result in self.results)


class Connection(asyncio.Protocol):
    """One client's connection: one request at a time, kept alive between them."""

    def __init__(self, tally: Tally, url_idx: int) -> None:
        self.url_idx = url_idx
        self._tally = tally
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._body_at = 0
        self._length: int | None = None
        self._closes = False
        self._scanned = 0
        self._result: Result | None = None
        self._done: asyncio.Future[bool] | None = None
        self.open = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self.open = True

    def connection_lost(self, _: Exception | None) -> None:
        self.open = False
        if self._done is not None and not self._done.done():
            self._done.set_result(False)

    async def ask(self, message: bytes, result: Result) -> bytes | None:
        """Send a request and return the answer's body, or None if it did not come whole."""
        assert self._transport is not None
        self._buffer, self._body_at, self._length, self._scanned = bytearray(), 0, None, 0
        self._result = result
        self._done = asyncio.get_running_loop().create_future()
        if not self.open:
            return None
        self._transport.write(message)
        if not await self._done:
            return None
        return _body(bytes(self._buffer), self._body_at, self._length)

    def data_received(self, data: bytes) -> None:
        now_s, result = time.monotonic(), self._result
        if result is None or self._done is None or self._done.done():
            return
        self._buffer += data
        if not self._body_at:
            self._read_head(result)
        for stamp in _STAMP.finditer(self._buffer, self._scanned):
            self._scanned = stamp.end()
            if not result.begun:
                result.begun, result.first_s = True, now_s
                self._tally.to_engine_s.append(float(stamp[2]) - result.sent_s)
            result.num_events += 1
            self._tally.from_engine_s.append(now_s - float(stamp[1]))
        if self._body_at:
            if self._length is not None:
                whole = len(self._buffer) >= self._body_at + self._length
            else:
                whole = self._buffer.endswith(b"\r\n0\r\n\r\n")
            if whole:
                if self._closes:
                    self.close()
                self._done.set_result(True)

    def _read_head(self, result: Result) -> None:
        end = self._buffer.find(b"\r\n\r\n")
        if end >= 0:
            self._body_at = end + 4
            result.status = int(self._buffer[9:12])
            length = _LENGTH.search(self._buffer, 0, end + 2)
            self._length = int(length[1]) if length else None
            self._closes = b"\r\nconnection: close\r\n" in self._buffer[: end + 2].lower()

    def partial(self) -> bytes:
        """What has come of an answer that will not end."""
        return bytes(self._buffer[self._body_at :])

    def close(self) -> None:
        """Go away without a word."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()


def _body(buffer: bytes, at: int, length: int | None) -> bytes:
    if length is not None:
        return buffer[at : at + length]
    parts = []
    while True:
        end = buffer.index(b"\r\n", at)
        size = int(buffer[at:end], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(buffer[end + 2 : end + 2 + size])
        at = end + 4 + size


def check(result: Result, body: bytes) -> str:
    """Say what is wrong with a whole stream; nothing is the empty text."""
    events = [json.loads(event) for event in _EVENT.findall(body)]
    if any("error" in event for event in events):
        return "an error event"
    text = "".join(event["choices"][0]["text"] for event in events)
    wanted = answer_text(request_digest(result.prompt, None), result.tokens)
    if text != wanted:
        return f"{len(text) // 4} tokens, not {result.tokens}, or others"
    if len({event["id"] for event in events}) != 1:
        return "events of several requests"
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    if reasons[-1] != "length" or any(reasons[:-1]):
        return "no or early finish_reason"
    if body.count(b"data: [DONE]") != 1:
        return "not one [DONE]"
    return ""


class Load:
    """Closed-loop clients: each sends its next request when its last one has ended.

    Args:
        urls: Where to; client `i` always uses the `i`-th, wrapping around.
        work: What to ask for.
        seed: Of prompts and lengths.
        timeout_s: After which a client gives a request up.
        headers: Further header lines.
        model: Named in every request.
        elsewhere: Whether a client that is refused a connection goes to the next url.
    """

    def __init__(
        self,
        urls: Sequence[str],
        work: Work,
        *,
        seed: int = 0,
        timeout_s: float = 120.0,
        headers: str = "",
        model: str = "Llama-3.1-8B",
        elsewhere: bool = False,
    ) -> None:
        self.tally = Tally()
        self.active = 0
        self._targets = [(urlsplit(url).hostname or "", urlsplit(url).port or 80) for url in urls]
        self._work = work
        self._rng = random.Random(seed)
        self._timeout_s = timeout_s
        self._headers = headers
        self._model = model
        self._elsewhere = elsewhere
        self._number = 0
        self._seed = seed

    def request(self) -> tuple[Result, bytes]:
        """Draw a request; no other has its prompt."""
        self._number += 1
        least, most = self._work.prompt_chars
        head = f"{self._seed} {self._number} "
        prompt = head + "z" * (self._rng.randint(least, most) - len(head))
        return self.asked(prompt, self._rng.randint(*self._work.output_tokens))

    def asked(self, prompt: str, tokens: int) -> tuple[Result, bytes]:
        """Return a request as `one` takes it."""
        body = json.dumps(
            {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": tokens,
                "ignore_eos": True,
                "stream": True,
            }
        ).encode()
        message = (
            f"POST /v1/completions HTTP/1.1\r\nHost: load\r\nContent-Type: application/json\r\n"
            f"{self._headers}Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        return Result(prompt, tokens, 0.0), message

    async def run(
        self, concurrency: int, seconds: float, *, until: Callable[[], bool] | None = None
    ) -> Tally:
        """Keep so many streams open for so long, then let those that are open end."""
        stop_s = time.monotonic() + seconds
        clients = [
            asyncio.create_task(self._client(i, stop_s, seconds * 0.05 * i / concurrency, until))
            for i in range(concurrency)
        ]
        await asyncio.gather(*clients)
        return self.tally

    async def _client(
        self, i: int, stop_s: float, wait_s: float, until: Callable[[], bool] | None
    ) -> None:
        await asyncio.sleep(min(wait_s, 5.0))
        connection: Connection | None = None
        self.active += 1
        while time.monotonic() < stop_s and not (until and until()):
            if connection is None or not connection.open:
                connection = await self._connect(i)
            if connection is None:
                await asyncio.sleep(0.2)
                continue
            result = await self.one(connection, *self.request())
            if result.outcome not in ("ok", "wrong", "refused"):
                connection.close()
            if result.outcome != "ok":
                await asyncio.sleep(0.05)
        self.active -= 1
        if connection is not None:
            connection.close()

    async def _connect(self, i: int) -> Connection | None:
        """Connect the client `i`."""
        begin_s, count = time.monotonic(), len(self._targets)
        for at in range(i, i + count if self._elsewhere else i + 1):
            try:
                return await self._connect_to(at % count)
            except (OSError, TimeoutError) as error:
                detail = str(error)
        self.tally.results.append(
            Result("", 0, begin_s, "unreached", end_s=time.monotonic(), detail=detail)
        )
        return None

    async def _connect_to(self, url_idx: int) -> Connection:
        async with asyncio.timeout(10.0):
            _, made = await asyncio.get_running_loop().create_connection(
                lambda: Connection(self.tally, url_idx), *self._targets[url_idx]
            )
        return made

    async def one(self, connection: Connection, result: Result, message: bytes) -> Result:
        """Send one request on a connection and see it through."""
        result.sent_s, result.url_idx = time.monotonic(), connection.url_idx
        body: bytes | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await connection.ask(message, result)
        except TimeoutError:
            result.outcome = "late"
        result.end_s = time.monotonic()
        seen = body if body is not None else connection.partial()
        named = re.search(rb'"system_fingerprint": ?"([^"]*)"', seen)
        result.replica = named[1].decode() if named else ""
        if body is None:
            if not result.outcome:
                result.outcome = "told" if b'"error"' in seen else "broken"
        elif result.status != 200:
            result.outcome = "refused"
            with contextlib.suppress(ValueError, KeyError, TypeError):
                result.detail = json.loads(body)["error"]["message"]
        else:
            result.detail = check(result, body)
            result.outcome = "wrong" if result.detail else "ok"
        self.tally.results.append(result)
        return result
