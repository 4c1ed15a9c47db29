"""What passes through the router, what it logs, and what its own answers look like."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import threading

import aiohttp
import pytest
from yarl import URL

from servegym.errors import ConfigError
from servegym.serve.router import api, app
from servegym.serve.router.config import parse_config
from servegym.serve.router.forms import COMPLETION
from servegym.serve.router.request import read_request
from servegym.serve.until_told import serve_until_told

from .running import RATES, VirtualTimeLoop, run, running, until
from .upstream import Upstream

BODY = {"model": "m", "prompt": "hello there", "max_tokens": 5}
KEY = "sk-of-alice-0123456789"


async def raw(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    answer = await reader.read(10_000)
    writer.close()
    return answer


class TestForwarding:
    def test_context_sessions_and_queries_reach_the_replica_and_the_rest_does_not(self):
        async def test() -> None:
            async with running(1) as it:
                passed = {
                    "Traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                    "tracestate": "a=b",
                    "Baggage": "user=7",
                    "X-Session-Id": "s-1",
                    "User-Agent": "mine/1.0",
                }
                kept = {"Authorization": f"Bearer {KEY}", "Cookie": "a=b", "X-Secret": "x"}
                place = f"{it.url}/v1/completions?api-version=2024-01&x=%2Fa%20b&x="
                url = URL(place, encoded=True)
                headers = {**passed, **kept}
                async with it.client.post(url, json=BODY, headers=headers) as response:
                    assert response.status == 200
                seen = it.replicas[0].headers[0]
                assert {name: seen[name] for name in passed} == passed
                assert not set(seen) & set(kept)
                assert it.replicas[0].queries == ["api-version=2024-01&x=%2Fa%20b&x="]

        run(test)

    def test_which_ones_is_a_setting(self):
        async def test() -> None:
            settings = {"forward_headers": ["X-Tenant-*", "cookie"], "forward_query": False}
            async with running(1, request=settings) as it:
                headers = {"x-tenant-name": "a", "Cookie": "a=b", "Baggage": "c"}
                await it.post(BODY, "/v1/completions?key=secret", headers=headers)
                seen = it.replicas[0].headers[0]
                assert (seen["X-Tenant-Name"], seen["Cookie"]) == ("a", "a=b")
                assert "Baggage" not in seen
                assert seen["Content-Type"] == "application/json"  # an engine needs it
                assert it.replicas[0].queries == [""]

        run(test)

    @pytest.mark.parametrize(
        ("rule", "sentence"),
        [
            ("Authorization", "upstream_key_env names the replicas' key"),
            ("Host", "host is never forwarded"),
            ("accept-encoding", "is never forwarded"),
            ("a b", "is no name of a header"),
            ("", "must not be empty"),
        ],
    )
    def test_what_may_not_be_forwarded_is_refused_in_a_sentence(self, rule, sentence):
        data = {
            "replicas": [{"name": "a", "url": "http://x", "rates": RATES}],
            "request": {"forward_headers": [rule]},
        }
        with pytest.raises(ConfigError, match=sentence):
            parse_config(data, "test")


class TestOwnAnswers:
    def test_each_has_the_id_of_its_request(self, monkeypatch):
        monkeypatch.setenv("KEYS", f"alice={KEY}")
        alice = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "mine"}

        async def test() -> None:
            limits = {"requests_per_min": 4}
            settings = {"auth": {"keys_env": "KEYS"}, "limits": limits}
            async with running(1, request={"max_hold_s": 0.0}, **settings) as it:
                for body, headers, expected in (
                    (BODY, {"X-Request-Id": "mine"}, 401),
                    ({"model": "m"}, alice, 400),
                    ({**BODY, "model": "x"}, alice, 404),
                    (BODY, alice, 200),
                ):
                    status, _, got = await it.post(body, headers=headers)
                    assert (status, got["X-Request-Id"]) == (expected, "mine")
                it.router._health.drain(0, True)
                status, _, got = await it.post(BODY, headers=alice)
                assert (status, got["X-Request-Id"]) == (503, "mine")
                status, _, got = await it.post(BODY, headers=alice)
                assert (status, got["X-Request-Id"]) == (429, "mine")
                status, _, got = await it.post(BODY, "/v1/nothing")
                assert (status, len(got["X-Request-Id"])) == (404, 24)
                status, _, got = await it.post(BODY, headers={"X-Request-Id": "x" * 200})
                assert (status, len(got["X-Request-Id"])) == (401, 24)

        run(test)

    def test_one_model_by_its_name(self, monkeypatch):
        async def test() -> None:
            async with running(2) as it:
                it.replicas[1].model = "meta-llama/Llama-3.1-8B"
                await it.router._health._read_models(1)
                for name in ("m", "meta-llama/Llama-3.1-8B", "meta-llama%2FLlama-3.1-8B"):
                    status, text = await it.get(f"/v1/models/{name}")
                    assert status == 200
                    assert json.loads(text)["object"] == "model"
                status, text = await it.get("/v1/models/gpt")
                assert status == 404
                assert json.loads(text)["error"]["code"] == "model_not_found"
            monkeypatch.setenv("KEYS", f"alice={KEY}")
            async with running(1, auth={"keys_env": "KEYS"}) as it:
                assert (await it.get("/v1/models/m"))[0] == 401

        run(test)


class TestLog:
    @pytest.mark.parametrize(
        "request_bytes",
        [
            f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: {KEY}\0\r\n\r\n".encode(),
            f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthoriz ation: {KEY}\r\n\r\n".encode(),
            f"GET /?{KEY} HTTP/9.9\r\n\r\n".encode(),
            f"GET / HTTP/1.1\r\nHost: a\r\nX: {KEY * 2000}\r\n\r\n".encode(),
            f"{KEY}\r\n\r\n".encode(),
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\n"
            b"Content-Length: 22\r\n\r\n" + KEY.encode(),
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 22\r\n\r\n\xff"
            + b"{" * 21,
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,  # TLS
        ],
    )
    def test_what_is_no_good_request_leaves_no_traceback_and_no_key(self, request_bytes, caplog):
        caplog.set_level(logging.DEBUG, "servegym")
        caplog.set_level(logging.INFO, "aiohttp")

        async def test() -> None:
            async with running(1) as it:
                answer = await raw(it.router.port, request_bytes)
                assert b" 400 " in answer.split(b"\r\n")[0]
                await asyncio.sleep(0.05)
                assert it.idle()

        run(test, loop=VirtualTimeLoop)
        text = caplog.text + "".join(str(r.exc_info or "") for r in caplog.records)
        assert KEY not in text
        assert "Traceback" not in text
        assert all(record.exc_info is None for record in caplog.records)
        assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []

    def test_a_key_that_is_wrong_is_not_logged(self, caplog, monkeypatch):
        monkeypatch.setenv("KEYS", f"alice={KEY}")
        caplog.set_level(logging.DEBUG)
        wrong = "sk-wrong-0123456789"

        async def test() -> None:
            async with running(1, auth={"keys_env": "KEYS"}) as it:
                for value in (wrong, f"Bearer  {wrong}", f"Bearer {wrong} x", f"Bearer {wrong}ä"):
                    assert (await it.post(BODY, headers={"Authorization": value}))[0] == 401

        run(test)
        assert wrong not in caplog.text

    def test_what_operators_do_leaves_a_line(self, caplog):
        async def test() -> None:
            async with running(2) as it:
                await it.operate("/drain", {"replica": "r0"})
                await it.operate("/undrain", {"replica": "r0"})
                await it.operate("/mode", {"mode": "shadow", "canary_fraction": 0.25})
                await it.operate("/policy", {"policy": "round-robin"})
                await it.operate("/policy", {"policy": "no-such-rule"})

        run(test)
        lines = [r.getMessage() for r in caplog.records if r.name.endswith("admin")]
        assert [line.partition(": ")[0] for line in lines] == ["operator at 127.0.0.1"] * 5
        for line, words in zip(
            lines,
            (
                "r0 drains, with 0 requests",
                "r0 takes requests again",
                "the mode is shadow with a canary of 0.25, it was live with 1",
                "the policy is 'round-robin' (round-robin), it was least-outstanding",
                "the policy 'no-such-rule' is refused",
            ),
            strict=True,
        ):
            assert words in line


class TestWhatEnginesTake:
    """Pydantic's lax reading, which vLLM's and SGLang's requests have."""

    @pytest.mark.parametrize("given", ["16", "16.0", '"16"', "1.6e1"])
    def test_numbers(self, given):
        body = f'{{"prompt": "a", "max_tokens": {given}}}'.encode()
        assert read_request(body, COMPLETION).max_tokens == 16

    def test_absurd_numbers_are_the_engines_business(self):
        body = f'{{"prompt": "a", "max_tokens": {"9" * 400}}}'.encode()
        assert read_request(body, COMPLETION).max_tokens == 2**31

    @pytest.mark.parametrize(
        ("given", "stream"),
        [("true", True), ('"true"', True), ("1", True), ('"off"', False), ("0", False)],
    )
    def test_truth_values(self, given, stream):
        body = f'{{"prompt": "a", "stream": {given}}}'.encode()
        assert read_request(body, COMPLETION).stream is stream

    @pytest.mark.parametrize("given", ["null", "false"])
    def test_no_stream(self, given):
        body = f'{{"prompt": "a", "stream": {given}, "max_tokens": null}}'.encode()
        assert read_request(body, COMPLETION)[2:4] == (None, False)

    @pytest.mark.parametrize(
        ("given", "tokens"),
        [("[1, 2.0]", [1, 2]), ("[[1], [2, 3]]", [1, 2, 3]), ('[["4"]]', [4])],
    )
    def test_token_ids(self, given, tokens):
        asked = read_request(f'{{"prompt": {given}}}'.encode(), COMPLETION)
        assert list(asked.prompt) == tokens

    def test_prompts_of_embeddings_have_a_length_of_sorts_and_no_prefix(self):
        tensor = "A" * 1_092_267  # 100 tokens of 4,096 numbers of two bytes, in Base64
        for embeds in (tensor, [tensor[:500_000], tensor[500_000:]]):
            body = json.dumps({"prompt": None, "prompt_embeds": embeds}).encode()
            prompt = read_request(body, COMPLETION).prompt
            assert (prompt.tokens, len(prompt.keys)) == (100, 0)

    def test_what_json_takes_is_taken(self):
        for text in (b'"\\ud800"', b'"a\x7f"', b"[" * 300 + b"]" * 300, b"NaN", b"1e400"):
            assert read_request(b'{"prompt": "a", "x": ' + text + b"}", COMPLETION).prompt == "a"

    def test_they_reach_the_replica_as_they_came(self):
        async def test() -> None:
            async with running(1) as it:
                for more in (
                    {"max_tokens": 16.0, "stream": "true"},
                    {"prompt": None, "prompt_embeds": "AAAA"},
                    {"max_tokens": int("9" * 400)},
                ):
                    assert (await it.post({**BODY, **more}))[0] == 200
                    assert it.replicas[0].bodies[-1] == {**BODY, **more}
                assert it.idle()

        run(test)


def test_large_bodies_are_read_beside_the_loop(monkeypatch):
    threads = []
    real = api.read_request

    def read(*args, **kwargs):
        threads.append(threading.current_thread().name)
        return real(*args, **kwargs)

    monkeypatch.setattr(api, "read_request", read)

    async def test() -> None:
        async with running(1, request={"engine_hints": True}) as it:
            large = {**BODY, "prompt": "x y z " * 200_000}
            assert (await it.post(large))[0] == 200
            assert it.replicas[0].bodies[0]["prompt"] == large["prompt"]
            assert (await it.post(BODY))[0] == 200
            status, _, _ = await it.post({**large, "stream": "maybe"})
            assert status == 400
            assert it.idle()

    run(test)
    assert threads[0].startswith("large-bodies")
    assert threads[1] == "MainThread"
    assert threads[2].startswith("large-bodies")


def test_sighup_reads_the_keys_anew_and_stops_nothing(tmp_path, caplog):
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"alice: {KEY}\n")
    keys.chmod(0o600)
    caplog.set_level(logging.INFO, "servegym")
    frozen = gc.get_freeze_count()

    async def test() -> None:
        replica = Upstream()
        replica.gap_s = 0.1
        await replica.start()
        config = parse_config(
            {
                "replicas": [{"name": "a", "url": replica.url, "rates": RATES}],
                "listen": {"port": 0, "admin_port": 0},
                "dispatch": {"runtime": {"policy": "least-outstanding"}},
                "auth": {"keys_file": str(keys)},
            },
            "test",
        )
        started: asyncio.Future[app.Router] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(serve_until_told(app.Router(config), started.set_result))
        router = await started
        async with aiohttp.ClientSession() as session:

            async def ask(key: str, **more) -> int:
                url = f"http://127.0.0.1:{router.port}/v1/completions"
                headers = {"Authorization": f"Bearer {key}"}
                async with session.post(url, json={**BODY, **more}, headers=headers) as response:
                    await response.read()
                    return response.status

            stream = asyncio.create_task(ask(KEY, stream=True))
            await until(lambda: replica.running == 1)
            new = "sk-of-bob-0123456789ab"
            keys.write_text(f"bob: {new}\n")
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: "read anew" in caplog.text)
            assert await stream == 200
            assert (await ask(new), await ask(KEY)) == (200, 401)
            keys.write_text("bob: short\n")
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: "stay as they are" in caplog.text)
            assert await ask(new) == 200
            assert not serving.done()
        os.kill(os.getpid(), signal.SIGTERM)
        await serving
        await replica.stop()

    heard = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in heard]
    run(test)
    assert [signal.getsignal(number) for number in heard] == before
    assert gc.get_freeze_count() == frozen
