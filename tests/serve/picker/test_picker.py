"""The endpoint picker, by a client that plays the gateway's part message by message."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest

from ..running import run, until
from .gateway import BUFFERED, CHAT, DESTINATION, DUPLEX, NONE, STREAMED, body_of, destination, event, picking

DONE = b"data: [DONE]\n\n"


def test_a_stream_goes_out_and_its_tokens_come_back_into_the_books():
    async def play():
        async with picking() as gateway:
            stream = gateway.stream()
            await stream.request_headers(x_request_id="one")
            body = body_of("x" * 100_000, stream=True)
            await stream.body("request", body[:50_000], ends=False)
            await stream.body("request", body[50_000:], ends=True)
            to = destination(await stream.answer())
            assert to in gateway.endpoints
            pieces = [(await stream.answer()).request_body.response.body_mutation for _ in range(2)]
            sent = [piece.streamed_response for piece in pieces]
            assert b"".join(piece.body for piece in sent) == body  # as it came
            assert [len(piece.body) for piece in sent] == [60_000, len(body) - 60_000]
            assert [piece.end_of_stream for piece in sent] == [False, True]
            chosen = gateway.endpoints.index(to)
            assert gateway.outstanding()[chosen] == 1
            row = gateway.state.replicas[:, chosen]
            assert row[3] == 25_000  # pending prefill: 100,000 bytes at four a token

            await stream.response_headers()
            assert (await stream.answer()).HasField("response_headers")
            assert row[3] == 25_000  # headers are no token
            for text in ("a", "b", "c"):
                await stream.body("response", event(text), ends=False)
                passed = (await stream.answer()).response_body.response.body_mutation
                assert passed.streamed_response.body == event(text)
            assert row[3] == 0
            assert gateway.state._generated[chosen] == 3
            end = event("", "length") + DONE
            await stream.body("response", end, ends=True)
            last = (await stream.answer()).response_body.response.body_mutation.streamed_response
            assert (last.body, last.end_of_stream) == (end, True)
            await stream.done()
            assert await stream.answer() is None
            await until(gateway.idle)
            assert gateway.picker.telemetry.outcomes == {"finished": 1}

    run(play, plain=True)
