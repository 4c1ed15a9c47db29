"""Replicas' connections: answers in every framing and in any pieces, kept and not kept."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import ssl
import subprocess
import time

import aiohttp
import pytest
import uvloop

from servegym.serve.router import upstream
from servegym.serve.router.config import RequestConfig
from servegym.serve.router.proxy import Proxy

from .running import RATES, VirtualTimeLoop, run, running, until

STREAM = {"model": "m", "prompt": "hello", "max_tokens": 5, "stream": True}
TOKEN = b'data: {"choices":[{"index":0,"text":"x","finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"index":0,"text":"y","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def its_pool(it):
    """The connections to a router's only replica."""
    (pool,) = it.router._proxy._pools.values()
    return pool


def chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


class Script:
    """An engine that answers each request with the bytes of a script, and says what it got."""

    def __init__(self, pieces: list[bytes | None], gap_s: float = 0.0) -> None:
        self.pieces = pieces  # None: the connection is cut
        self.gap_s = gap_s
        self.requests: list[bytes] = []
        self.connections = set()
        self.url = ""

    async def serve(self, reader, writer) -> None:
        asked = len(self.requests)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self.answer(reader, writer):
                    if len(self.requests) > asked:  # else it is one of the polls'
                        self.connections.add(writer)
        finally:
            writer.close()

    async def answer(self, reader, writer) -> bool:
        """Answer a request; return whether the connection goes on."""
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"POST"):
            status = b"200" if head.startswith(b"GET /health") else b"404"
            writer.write(b"HTTP/1.1 " + status + b" x\r\nContent-Length: 0\r\n\r\n")
            return True
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        self.requests.append(head + await reader.readexactly(length))
        for piece in self.pieces:
            if piece is None:
                return False
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(self.gap_s)
        return True

    @contextlib.asynccontextmanager
    async def router(self, tls: ssl.SSLContext | None = None, **settings):
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=tls)
        port = server.sockets[0].getsockname()[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{port}"
        replica = {"name": "r0", "url": self.url, "rates": RATES}
        settings["health"] = {"down_after": 1000, "interval_s": 60.0, "path": "/health"}
        try:
            async with running(0, replicas=[replica], **settings) as it:
                it.router._health._set_up(0, True)
                it.router._health._settle()
                yield it
        finally:
            server.close()


def whole(*pieces: bytes) -> list[bytes]:
    return [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *pieces, b"0\r\n\r\n"]


@pytest.mark.parametrize(
    "script",
    [
        whole(chunks(TOKEN, END)),
        whole(chunks(TOKEN), chunks(END)),
        [
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 x\r\nLink: a\r\n\r\n",
            *whole(chunks(TOKEN, END)),
        ],
        [HEAD + b"Content-Length: %d\r\n\r\n" % len(TOKEN + END), TOKEN, END],
        [HEAD + b"\r\n", TOKEN, END, None],
        [HEAD.replace(b"1.1", b"1.0") + b"\r\n", TOKEN, END, None],
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunks(TOKEN, END), b"0\r\nA: b\r\n\r\n"],
    ],
)
@pytest.mark.parametrize("cut", [None, 1, 11])
def test_an_answer_is_whole_however_it_is_framed_and_cut(script, cut):
    pieces = list(script)
    if cut:
        data = b"".join(piece for piece in script if piece)
        pieces = [data[i : i + cut] for i in range(0, len(data), cut)]
        pieces += [None] if script[-1] is None else []

    async def test() -> None:
        engine = Script(pieces)
        async with engine.router() as it:
            for _ in range(2):
                status, body, _ = await it.post(STREAM)
                assert (status, body) == (200, TOKEN + END)
            assert it.router.telemetry.outcomes == {"finished": 2}
            assert len(engine.requests) == 2
            assert it.idle()

    run(test)


def test_a_chunk_whose_size_comes_in_two_pieces_is_not_taken_for_a_smaller_one():
    rest = b": ".ljust(252, b"c") + b"\n\n"
    large = TOKEN + b"\r\n" + rest  # 0x100 more than the event, which alone would end so, too
    size = b"%x" % len(large)
    assert size == b"1%x" % len(TOKEN)
    pieces = [chunks(TOKEN), size[:1], size[1:] + b"\r\n" + TOKEN + b"\r\n", rest + b"\r\n"]

    async def test() -> None:
        engine = Script(whole(chunks(TOKEN), *pieces, chunks(END)), gap_s=0.02)
        async with engine.router() as it:
            status, body, _ = await it.post(STREAM)
            assert (status, body) == (200, TOKEN + TOKEN + large + END)
            assert it.router.telemetry.latencies.total(lambda times: times.itl).count == 3

    run(test, loop=VirtualTimeLoop)


def test_random_scripts_pass_byte_by_byte():
    rng = random.Random(0)

    async def test() -> None:
        engine = Script([])
        async with engine.router() as it:
            for _ in range(60):
                events = [TOKEN] * rng.randint(0, 5) + [b": comment\n\n"] * rng.randint(0, 2)
                rng.shuffle(events)
                body = TOKEN + b"".join(events) + END
                cuts = sorted(rng.sample(range(1, len(body)), rng.randint(0, 6)))
                parts = [body[i:j] for i, j in zip([0, *cuts], [*cuts, len(body)], strict=True)]
                data = b"".join(whole(chunks(*parts)))
                size = rng.choice((3, 50, 10_000))
                engine.pieces = [data[i : i + size] for i in range(0, len(data), size)]
                assert (await it.post(STREAM))[:2] == (200, body)
            assert it.router.telemetry.outcomes == {"finished": 60}

    run(test)


@pytest.mark.parametrize(
    "script",
    [
        [b"SSH-2.0-OpenSSH\r\n\r\n"],
        [b"HTTP/1.1 101 Switching\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nA: " + b"b" * 40_000],
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"],
        [HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"],
        [None],
        [HEAD, None],
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", None],
    ],
)
def test_what_is_no_answer_is_a_502_after_all_tries(script):
    async def test() -> None:
        engine = Script(script)
        async with engine.router() as it:
            status, body, _ = await it.post(STREAM)
            assert (status, json.loads(body)["error"]["code"]) == (502, "upstream_failed")
            assert len(engine.requests) == 3
            assert it.router.telemetry.upstream_failures == {("r0", "disconnected"): 3}
            await until(it.idle)

    run(test)


@pytest.mark.parametrize("missing", [0, 1, 2, 3, 40])
def test_a_stream_that_breaks_within_a_chunk_still_ends_with_an_error_event(missing):
    data = chunks(TOKEN, TOKEN)

    async def test() -> None:
        engine = Script([HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(TOKEN)])
        engine.pieces += [data[: len(data) - missing], None]
        engine.gap_s = 0.01
        async with engine.router() as it:
            body = b""

            async def read() -> None:
                nonlocal body
                async with it.client.post(f"{it.url}/v1/completions", json=STREAM) as response:
                    async for piece in response.content.iter_any():
                        body += piece

            with pytest.raises(aiohttp.ClientPayloadError):
                await read()
            assert body.startswith(TOKEN)
            error = json.loads(body.partition(b'data: {"error"')[2].join((b'{"error"', b"")))
            assert error["error"]["code"] == "broken"
            await until(it.idle)

    run(test)


class TestConnections:
    def test_one_is_kept_and_used_again(self):
        async def test() -> None:
            engine = Script(whole(chunks(TOKEN, END)))
            async with engine.router() as it:
                for _ in range(5):
                    assert (await it.post(STREAM))[0] == 200
                assert len(engine.connections) == 1
                pool = its_pool(it)
                assert len(pool._idle) == 1
            assert pool._idle == []

        run(test)

    @pytest.mark.parametrize(
        "script",
        [
            [
                HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n",
                *whole(chunks(END))[1:],
            ],
            [*whole(chunks(END)), b"HTTP/1.1 200 OK\r\n\r\nmore than was asked for"],
        ],
    )
    def test_one_that_cannot_be_trusted_is_not(self, script):
        async def test() -> None:
            engine = Script([b"".join(script)])
            async with engine.router() as it:
                for _ in range(3):
                    status, body, _ = await it.post(STREAM)
                    assert (status, body) == (200, END)
                    await until(lambda: not its_pool(it)._idle)
                assert len(engine.connections) == 3

        run(test)

    def test_an_old_one_is_closed(self, monkeypatch):
        monkeypatch.setattr(upstream, "KEEPALIVE_S", 0.05)

        async def test() -> None:
            engine = Script(whole(chunks(TOKEN, END)))
            async with engine.router() as it:
                assert (await it.post(STREAM))[0] == 200
                pool = its_pool(it)
                assert len(pool._idle) == 1
                await until(lambda: not pool._idle)

        run(test, loop=VirtualTimeLoop)

    def test_one_that_the_replica_closes_while_idle_is_forgotten(self):
        async def test() -> None:
            engine = Script([*whole(chunks(TOKEN, END)), None])
            async with engine.router() as it:
                for _ in range(3):
                    assert (await it.post(STREAM))[0] == 200
                    await until(lambda: not its_pool(it)._idle)
                assert len(engine.requests) == 3

        run(test)


def test_what_a_replica_gets():
    async def test() -> None:
        engine = Script(whole(chunks(TOKEN, END)))
        async with engine.router() as it:
            await it.post(STREAM, "/v1/completions?a=b", headers={"X-Request-Id": "k"})
            head, _, body = engine.requests[0].partition(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            assert lines[0] == b"POST /v1/completions?a=b HTTP/1.1"
            names = [line.partition(b":")[0].lower() for line in lines[1:]]
            assert sorted(names) == sorted(set(names))
            assert {b"host", b"content-length", b"x-request-id", b"content-type"} <= set(names)
            assert b"accept-encoding" not in names
            assert json.loads(body) == STREAM

    run(test)


def test_tls_to_replicas(tmp_path, monkeypatch):
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")),
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("openssl is not there")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "cert", tmp_path / "key")

    async def test(trusted: bool) -> None:
        engine = Script(whole(chunks(TOKEN, END)))
        async with engine.router(server, request={"max_hold_s": 0.0}) as it:
            for _ in range(2):
                status, body, _ = await it.post(STREAM)
                it.router._health._set_up(0, True)
                it.router._health._settle()
                assert status == (200 if trusted else 503)
            assert (body == TOKEN + END) is trusted

    run(lambda: test(False))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
    run(lambda: test(True))


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_a_connection_that_was_made_while_nobody_could_look_counts(loop):
    async def test() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        pool = upstream.Pool(f"http://127.0.0.1:{port}", 0.05, loop.time)
        connecting = asyncio.create_task(pool.connect())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        time.sleep(0.2)  # as on a machine without a free processor
        made = await connecting
        assert made.is_open
        made.close()
        server.close()

    run(test, loop=loop)


def test_a_replica_that_takes_no_connection_in_time_is_given_up():
    async def test() -> None:
        deaf = socket.socket()
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        place = deaf.getsockname()
        waiting = [socket.socket() for _ in range(3)]  # the queue is full
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(place)
        pool = upstream.Pool(f"http://127.0.0.1:{place[1]}", 0.1, asyncio.get_running_loop().time)
        with pytest.raises(upstream.UpstreamError, match="unreached"):
            await pool.connect()
        connecting = asyncio.create_task(pool.connect())
        await asyncio.sleep(0.02)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        for one in (deaf, *waiting):
            one.close()

    run(test)


def test_connections_that_are_all_in_use_are_known_when_another_replica_is_asked_first():
    async def test() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        proxy = Proxy(RequestConfig(), loop.time, None)
        pool = proxy._pool(url)
        making = asyncio.create_task(pool.connect())
        with contextlib.closing(server):
            await asyncio.sleep(0)
            proxy._pool("http://127.0.0.1:1")
            assert proxy._pool(url) is pool  # its only connection is in the making
            with contextlib.closing(await making):
                proxy._pool("http://127.0.0.1:2")
                assert proxy._pool(url) is pool  # its only connection is in use
            await until(lambda: pool.is_empty)
            proxy._pool("http://127.0.0.1:3")
            assert list(proxy._pools) == ["http://127.0.0.1:3"]  # of replicas that may have gone

    run(test)
