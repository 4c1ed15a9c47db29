"""Clients' connections: one request after the other, bodies in all forms, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import zlib

import pytest
import uvloop

from .running import VirtualTimeLoop, run, running, until

BODY = json.dumps({"model": "m", "prompt": "hello", "max_tokens": 5}).encode()
STREAM = json.dumps({"model": "m", "prompt": "hello", "max_tokens": 5, "stream": True}).encode()


def post(body: bytes = BODY, *lines: bytes, version: bytes = b"1.1", path: bytes = b"") -> bytes:
    head = [
        b"POST " + (path or b"/v1/completions") + b" HTTP/" + version,
        *(b"Host: x", b"Content-Type: application/json", *lines),
    ]
    if not any(line.startswith(b"Transfer-Encoding") for line in lines):
        head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


class Raw:
    """A client that writes bytes and reads answers by the letter."""

    def __init__(self, reader, writer) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        lines = head.split("\r\n")[:-2]
        fields = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines[1:])}
        status = int(lines[0].split()[1])
        if "content-length" in fields:
            body = await self.reader.readexactly(int(fields["content-length"]))
        elif fields.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await self.reader.readline(), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        else:
            body = await self.reader.read()
        return status, fields, body

    async def ask(self, data: bytes):
        self.writer.write(data)
        return await self.answer()

    async def is_closed(self) -> bool:
        with contextlib.suppress(ConnectionError):
            return await self.reader.read(1) == b""
        return True


@contextlib.asynccontextmanager
async def raw(it):
    reader, writer = await asyncio.open_connection("127.0.0.1", it.router.port)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_a_connection_is_used_for_one_request_after_the_other(loop):
    async def test() -> None:
        async with running(1) as it, raw(it) as client:
            for i in range(3):
                status, fields, body = await client.ask(post(STREAM))
                assert (status, fields["transfer-encoding"]) == (200, "chunked")
                assert body.endswith(b"data: [DONE]\n\n")
                status, fields, body = await client.ask(post(BODY, b"X-Request-Id: id%d" % i))
                assert (status, fields["x-request-id"]) == (200, f"id{i}")
                assert json.loads(body)["usage"]["completion_tokens"] == 5
                assert "date" in fields
            assert len(it.router._server.connections) == 1
            assert it.idle()
        assert not it.router._server.connections

    run(test, loop=loop)


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_a_token_does_not_wait_until_the_client_has_acknowledged_the_one_before(loop):
    async def test() -> None:
        async with running(1) as it, raw(it) as client:
            assert (await client.ask(post(STREAM)))[0] == 200
            (connection,) = it.router._server.connections
            transport = connection._transport.get_extra_info("socket")
            assert transport.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    run(test, loop=loop)


def test_requests_that_come_early_are_answered_in_their_order():
    async def test() -> None:
        async with running(1) as it, raw(it) as client:
            it.replicas[0].gap_s = 0.01
            early = b"".join(post(STREAM, b"X-Request-Id: %d" % i) for i in range(5))
            client.writer.write(early + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answers = [await client.answer() for _ in range(6)]
            assert [a[1]["x-request-id"] for a in answers[:5]] == list("01234")
            assert [a[0] for a in answers] == [200] * 6
            assert json.loads(answers[5][2])["status"] == "ok"

    run(test)


def test_whatever_pieces_a_request_comes_in():
    async def test() -> None:
        async with running(1) as it, raw(it) as client:
            whole = post(BODY) + post(chunked(BODY, 7), b"Transfer-Encoding: chunked")
            for size in (1, 13):
                for i in range(0, len(whole), size):
                    client.writer.write(whole[i : i + size])
                    await asyncio.sleep(0)
                assert (await client.answer())[0] == 200
                assert (await client.answer())[0] == 200
            assert it.replicas[0].bodies == [json.loads(BODY)] * 4

    run(test)


@pytest.mark.parametrize(
    ("coding", "pack"),
    [
        (b"gzip", gzip.compress),
        (b"deflate", zlib.compress),
        (b"deflate", lambda body: zlib.compress(body, wbits=-15)),
        (b"identity", lambda body: body),
    ],
)
def test_packed_bodies_are_unpacked(coding, pack):
    async def test() -> None:
        async with running(1, request={"max_body_bytes": 5000}) as it, raw(it) as client:
            line = b"Content-Encoding: " + coding
            assert (await client.ask(post(pack(BODY), line)))[0] == 200
            assert it.replicas[0].bodies == [json.loads(BODY)]
            large = BODY.replace(b"hello", b"x" * 10_000)
            assert (await client.ask(post(pack(large), line)))[0] == 413
            assert (await client.ask(post(b"junk", line)))[0] == 400

    run(test)


def test_other_packings_are_refused_in_a_sentence():
    async def test() -> None:
        async with running(1) as it, raw(it) as client:
            status, _, body = await client.ask(post(BODY, b"Content-Encoding: br"))
            assert status == 415
            assert "must be gzip or deflate, got 'br'" in json.loads(body)["error"]["message"]

    run(test)


def test_a_client_that_waits_to_be_told_is_told_to_send_its_body():
    async def test() -> None:
        async with running(1) as it, raw(it) as client:
            data = post(BODY, b"Expect: 100-continue")
            client.writer.write(data[: -len(BODY)])
            assert await client.reader.readline() == b"HTTP/1.1 100 Continue\r\n"
            assert await client.reader.readline() == b"\r\n"
            assert (await client.ask(BODY))[0] == 200
            # not if there is no need to
            assert (await client.ask(data))[0] == 200

    run(test)


def test_a_client_of_http_1_0_gets_no_chunks_and_the_end_of_its_connection():
    async def test() -> None:
        async with running(1) as it:
            async with raw(it) as client:
                status, fields, body = await client.ask(post(STREAM, version=b"1.0"))
                assert (status, fields["connection"]) == (200, "close")
                assert "transfer-encoding" not in fields
                assert body.startswith(b"data: {")
                assert body.endswith(b"[DONE]\n\n")
            it.replicas[0].mode = "die"
            async with raw(it) as client:
                with pytest.raises(ConnectionError):  # it must not pass for whole
                    await client.ask(post(STREAM, version=b"1.0"))

    run(test)


def test_connection_close_is_kept():
    async def test() -> None:
        async with running(1) as it, raw(it) as client:
            status, fields, _ = await client.ask(post(BODY, b"Connection: close"))
            assert (status, fields["connection"]) == (200, "close")
            assert await client.is_closed()

    run(test)


def test_head_is_get_without_the_body():
    async def test() -> None:
        async with running(1) as it, raw(it) as client:
            client.writer.write(b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n")
            head = (await client.reader.readuntil(b"\r\n\r\n")).lower()
            assert head.startswith(b"http/1.1 200 ok")
            assert b"content-length: " in head
            assert (await client.ask(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200

    run(test)


class TestBodiesThatNobodyReads:
    def test_one_that_comes_to_its_end_leaves_the_connection_good(self):
        async def test() -> None:
            async with running(1, request={"max_body_bytes": 100}) as it, raw(it) as client:
                large = post(b"x" * 200_000)
                client.writer.write(large[:1000])
                assert (await client.answer())[0] == 413
                client.writer.write(large[1000:])
                assert (await client.ask(post()))[0] == 200
                client.writer.write(post(chunked(b"x" * 5000, 50), b"Transfer-Encoding: chunked"))
                assert (await client.answer())[0] == 413
                assert (await client.ask(post()))[0] == 200

        run(test)

    def test_one_without_end_costs_the_connection(self):
        async def test() -> None:
            async with running(1, request={"max_body_bytes": 100}) as it, raw(it) as client:
                client.writer.write(post(b"x" * 200_000)[:1000])
                assert (await client.answer())[0] == 413
                assert await client.is_closed()
                await until(lambda: not it.router._server.connections)

        run(test)

    def test_after_chunks_that_are_none_nothing_is_read(self):
        async def test() -> None:
            async with running(1) as it, raw(it) as client:
                bad = post(b"5\r\nhelloX\r\n", b"Transfer-Encoding: chunked")
                client.writer.write(bad + post())
                status, _, body = await client.answer()
                assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_body")
                assert await client.is_closed()
                assert it.replicas[0].bodies == []

        run(test)


def test_a_client_that_sends_on_and_on_is_not_read_on_and_on():
    async def test() -> None:
        async with running(1) as it, raw(it) as client:
            it.replicas[0].gap_s = 0.1
            client.writer.write(post(STREAM))
            await until(lambda: it.replicas[0].running == 1)
            for _ in range(40):
                client.writer.write(post(BODY.replace(b"hello", b"x" * 50_000)))  # 2 MB
            await asyncio.sleep(0.1)
            (connection,) = it.router._server.connections
            assert 0 < len(connection._buffer) < 500_000
            it.replicas[0].gap_s = 0.0
            assert [(await client.answer())[0] for _ in range(41)] == [200] * 41

    run(test, loop=VirtualTimeLoop)


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_pieces_for_a_client_that_has_just_gone_go_nowhere(loop):
    async def test() -> None:
        async with running(1) as it, raw(it) as client:
            it.replicas[0].gap_s = 0.05
            client.writer.write(post(STREAM))
            await client.reader.readuntil(b"\r\n\r\n")
            (connection,) = it.router._server.connections
            request, relay = connection._request, connection._request.flow
            lost = connection.connection_lost

            def piece_at_once(error) -> None:
                lost(error)
                asyncio.get_running_loop().call_soon(relay.piece, b"1\r\nx\r\n", b"x")

            connection.connection_lost = piece_at_once
            connection._transport.abort()
            await until(lambda: it.replicas[0].cancelled == 1)
            request.write(b"late")
            await until(it.idle)
            assert it.router.telemetry.outcomes == {"cancelled": 1}

    run(test, loop=loop)


def test_an_unknown_error_is_a_500_and_the_next_request_is_answered(monkeypatch, caplog):
    async def test() -> None:
        async with running(1) as it, raw(it) as client:
            real = it.router.dispatcher.arrive
            monkeypatch.setattr(it.router.dispatcher, "arrive", lambda *a, **k: 1 / 0)
            status, _, body = await client.ask(post())
            assert (status, json.loads(body)["error"]["code"]) == (500, "internal_error")
            monkeypatch.setattr(it.router.dispatcher, "arrive", real)
            assert (await client.ask(post()))[0] == 200
            assert it.idle()

    run(test)
    assert "a request failed in the router" in caplog.text
