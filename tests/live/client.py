"""A client that sends requests at given times and notes when tokens come."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Answer:
    """What became of a request; times in seconds since the stream began.

    Attributes:
        due_s: When it was to be sent.
        sent_s: When it was.
        first_token_s: When the first text came.
        end_s: When the stream ended.
        token_ids: If they were asked for.
        cached_tokens: Of the prompt, that were not computed anew, if the server tells.
        error: What went wrong, if anything.
    """

    due_s: float
    sent_s: float = 0.0
    first_token_s: float = 0.0
    end_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""


async def send(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], start_s: float, due_s: float
) -> Answer:
    """Send one request when it is due, and read its stream."""
    answer = Answer(due_s)
    await asyncio.sleep(max(0.0, start_s + due_s - time.monotonic()))
    answer.sent_s = time.monotonic() - start_s
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                answer.error = f"{response.status} {(await response.text())[:200]}"
                return answer
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if event.get("usage"):
                    answer.output_tokens = event["usage"]["completion_tokens"]
                    details = event["usage"].get("prompt_tokens_details") or {}
                    answer.cached_tokens = details.get("cached_tokens") or 0
                for choice in event["choices"]:
                    if not answer.first_token_s:
                        answer.first_token_s = time.monotonic() - start_s
                    answer.token_ids += choice.get("token_ids") or []
                    if choice.get("finish_reason"):
                        answer.end_s = time.monotonic() - start_s
    except (TimeoutError, aiohttp.ClientError, ValueError) as error:
        answer.error = repr(error)
    return answer


async def play(
    url: str,
    bodies: Sequence[dict[str, Any]],
    due_s: Sequence[float],
    timeout_s: float = 900.0,
    *,
    after: Sequence[int] | None = None,
    delay_s: Sequence[float] = (),
) -> list[Answer]:
    """Send all requests, each at its time; return when all have ended.

    Args:
        url: Of the server.
        bodies: What is sent.
        due_s: When; of one that waits for another this is not used.
        timeout_s: Of a request.
        after: An earlier request whose answer each one waits for, or -1.
        delay_s: And for so long.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        start_s = time.monotonic() + 0.5
        sent: list[asyncio.Task[Answer]] = []

        async def turn(i: int) -> Answer:
            due = due_s[i]
            if after is not None and after[i] >= 0:
                before = await sent[after[i]]
                due = (before.end_s or time.monotonic() - start_s) + delay_s[i]
            return await send(session, url, bodies[i], start_s, due)

        for i in range(len(bodies)):
            sent.append(asyncio.create_task(turn(i)))
        return await asyncio.gather(*sent)
