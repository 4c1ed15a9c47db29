"""The router in front of small engines: what clients get, and what the books say."""

from __future__ import annotations

import asyncio
import functools
import json

import aiohttp
import pytest

from servegym.serve.router import app

from .running import VirtualTimeLoop, run, running, until

BODY = {"model": "m", "prompt": "hello there", "max_tokens": 5}
STREAM = {**BODY, "stream": True}


def test_a_stream_passes_through_byte_by_byte():
    async def test() -> None:
        async with running() as it:
            status, body, headers = await it.post(STREAM)
            assert status == 200
            assert headers["Content-Type"] == "text/event-stream"
            events = body.decode().split("\n\n")
            assert [json.loads(e[6:])["choices"][0]["text"] for e in events[:5]] == [
                f"t{i}" for i in range(5)
            ]
            assert events[5] == "data: [DONE]"
            assert it.idle()
            assert it.router.telemetry.outcomes["finished"] == 1
            assert it.router.telemetry.latencies.total(lambda times: times.ttft).count == 1

    run(test)


def test_each_token_arrives_when_it_is_made():
    async def test() -> None:
        async with running(1) as it:
            it.replicas[0].gap_s = 0.05
            loop = asyncio.get_running_loop()
            times = []
            async with it.client.post(f"{it.url}/v1/completions", json=STREAM) as response:
                async for _ in response.content.iter_any():
                    times.append(loop.time())
                    if len(times) == 3:
                        assert it.state.replicas[1, 0] == 1  # outstanding
                        assert it.state._generated[0] == 3
            assert len(times) >= 5
            assert times[4] - times[0] > 0.15

    run(test, loop=VirtualTimeLoop)


def test_an_answer_without_stream_keeps_its_headers_and_length():
    async def test() -> None:
        async with running() as it:
            status, body, headers = await it.post(BODY)
            assert status == 200
            assert json.loads(body)["usage"]["completion_tokens"] == 5
            assert headers["X-Engine"] == "fake"
            assert int(headers["Content-Length"]) == len(body)
            assert it.idle()

    run(test)


def test_the_engine_is_told_what_the_router_knows_and_not_what_clients_claim():
    async def test() -> None:
        config = {
            "request": {"engine_hints": True},
            "dispatch": {
                "prediction": {"kind": "max-tokens"},
                "slo_classes": [{"name": "chat", "ttft_s": 0.5, "tpot_s": 0.1}],
            },
        }
        async with running(1, **config) as it:
            claimed = {"servegym_ttft_slo_s": 1e-3, "servegym_x": 1, "mine": 2}
            await it.post({**BODY, "priority": -9, "vllm_xargs": claimed})
            (got,) = it.replicas[0].bodies
            assert {k: v for k, v in got.items() if k != "vllm_xargs"} == BODY
            assert got["vllm_xargs"] == {
                "mine": 2,
                "servegym_predicted_output_tokens": 5,
                "servegym_ttft_slo_s": 0.5,
                "servegym_e2e_slo_s": pytest.approx(0.5 + 0.1 * 4),
            }

    run(test)


def test_the_body_reaches_the_replica_as_it_is_and_the_clients_key_does_not(monkeypatch):
    monkeypatch.setenv("UPSTREAM", "secret-of-the-fleet")

    async def test() -> None:
        async with running(1, upstream_key_env="UPSTREAM") as it:
            body = {**BODY, "messages": [{"role": "user", "content": "x"}], "anything": [1, {}]}
            headers = {"Authorization": "Bearer mine", "X-Request-Id": "abc", "Cookie": "a=b"}
            _, _, got = await it.post(body, "/v1/chat/completions", headers=headers)
            assert it.replicas[0].bodies == [body]
            seen = it.replicas[0].headers[0]
            assert seen["Authorization"] == "Bearer secret-of-the-fleet"
            assert seen["X-Request-Id"] == got["X-Request-Id"] == "abc"
            assert "Cookie" not in seen

    run(test)


def test_models_health_and_metrics():
    async def test() -> None:
        async with running() as it:
            status, text = await it.get("/v1/models")
            assert [entry["id"] for entry in json.loads(text)["data"]] == ["m"]
            status, text = await it.get("/health")
            assert (status, json.loads(text)["replicas_up"]) == (200, 2)
            await it.post(STREAM)
            status, text = await it.get("/metrics")
            assert 'servegym_decisions_total{by="policy"} 1.0' in text
            assert (
                'servegym_router_requests_total{endpoint="/v1/completions",status="200"} 1.0'
                in text
            )
            assert 'servegym_decision_reasons_total{reason="stale_state"} 0.0' in text
            assert "servegym_decision_seconds_count 1.0" in text
            assert 'servegym_replica_up{replica="r1"} 1.0' in text

    run(test)


def test_load_is_spread_and_metrics_are_scraped():
    async def test() -> None:
        async with running(metrics={"interval_s": 0.02}) as it:
            for replica in it.replicas:
                replica.gap_s = 0.04
            answers = asyncio.gather(*(it.post(STREAM) for _ in range(10)))
            await until(lambda: it.state.replicas[15].sum() == 10)  # num_running
            assert it.state.replicas[1].tolist() == [5, 5]
            assert it.state.kv_capacity_tokens(0) == 16000
            assert {status for status, _, _ in await answers} == {200}
            assert it.idle()

    run(test, loop=VirtualTimeLoop)


@pytest.mark.parametrize(
    ("body", "path", "sentence"),
    [
        (b"{", "/v1/completions", "the body is not JSON"),
        (b"[1]", "/v1/completions", "the body must be a JSON object"),
        (b"\xff\xfe", "/v1/completions", "the body is not JSON"),
        (b"[" * 100_000, "/v1/completions", "the body is not JSON"),
        (b'{"model": "m"}', "/v1/completions", "prompt must be"),
        (b'{"model": "m", "prompt": [1, "a"]}', "/v1/completions", "prompt must be"),
        (b'{"model": "m", "prompt": "a", "max_tokens": -1}', "/v1/completions", "max_tokens"),
        (b'{"model": "m", "prompt": "a", "max_tokens": 1.5}', "/v1/completions", "max_tokens"),
        (b'{"model": "m", "prompt": "a", "max_tokens": [1]}', "/v1/completions", "max_tokens"),
        (b'{"model": "m", "prompt": "a", "stream": "maybe"}', "/v1/completions", "stream must be"),
        (b'{"model": "m", "prompt": [1, 18446744073709551616]}', "/v1/completions", "prompt must"),
        (b'{"model": 7, "prompt": "a"}', "/v1/completions", "model must be"),
        (b'{"model": "m", "messages": []}', "/v1/chat/completions", "messages must be"),
        (b'{"model": "m", "messages": ["a"]}', "/v1/chat/completions", "every message"),
    ],
)
def test_a_wrong_body_gets_one_sentence_in_openais_form(body, path, sentence):
    async def test() -> None:
        async with running(1) as it:
            async with it.client.post(it.url + path, data=body) as response:
                error = (await response.json())["error"]
            assert response.status == 400
            assert sentence in error["message"]
            assert error["type"] == "invalid_request_error"
            assert it.replicas[0].bodies == []
            assert it.idle()

    run(test)


def test_unknown_models_paths_and_methods():
    async def test() -> None:
        async with running(1) as it:
            status, body, _ = await it.post({**BODY, "model": "gpt"})
            assert status == 404
            assert json.loads(body)["error"]["code"] == "model_not_found"
            assert (await it.post(BODY, "/v1/images/generations"))[0] == 404
            assert (await it.get("/v1/completions"))[0] == 405

    run(test)


def test_a_fleet_of_one_model_need_not_be_told_which():
    async def test() -> None:
        nameless = {key: value for key, value in BODY.items() if key != "model"}
        async with running(2) as it:
            assert (await it.post(nameless))[0] == 200
            assert (await it.post({**nameless, "model": None}))[0] == 200
            it.replicas[1].model = "other"
            await it.router._health._read_models(1)
            assert (await it.post(nameless))[0] == 404
            assert (await it.post({**nameless, "model": "other"}))[0] == 200

    run(test)


def test_a_body_that_is_too_large_is_refused_before_and_while_it_is_read():
    async def test() -> None:
        async with running(1, request={"max_body_bytes": 1000}) as it:
            large = {**BODY, "prompt": "x" * 2000}
            status, body, _ = await it.post(large)
            assert status == 413
            assert "1000 bytes at most" in json.loads(body)["error"]["message"]

            async def pieces():
                for _ in range(100):
                    yield b"x" * 100

            async with it.client.post(f"{it.url}/v1/completions", data=pieces()) as response:
                assert response.status == 413
            assert (await it.post(BODY))[0] == 200

    run(test)


def test_a_body_that_does_not_come_is_not_waited_for():
    async def test() -> None:
        async with running(1, request={"body_timeout_s": 0.1}) as it:
            reader, writer = await asyncio.open_connection("127.0.0.1", it.router.port)
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"
            )
            assert b" 408 " in await reader.readline()
            writer.close()
            await until(it.idle)

    run(test, loop=VirtualTimeLoop)


class TestKeys:
    KEY = "sk-of-alice-0123456789"

    def settings(self, monkeypatch, **more):
        monkeypatch.setenv("KEYS", f"alice={self.KEY}, bob=sk-of-bob-01234567890")
        return {"auth": {"keys_env": "KEYS"}, **more}

    def test_no_key_no_service(self, monkeypatch):
        settings = self.settings(monkeypatch)

        async def test() -> None:
            async with running(1, **settings) as it:
                for value in (None, "Bearer wrong", self.KEY, f"Basic {self.KEY}", "Bearer ", "ä"):
                    headers = {"Authorization": value} if value else {}
                    status, body, got = await it.post(BODY, headers=headers)
                    assert status == 401
                    assert got["WWW-Authenticate"] == "Bearer"
                    assert json.loads(body)["error"]["code"] == "invalid_api_key"
                    for path in ("/v1/models", "/metrics"):
                        assert (await it.get(path, headers=headers))[0] == 401
                assert (await it.get("/health"))[0] == 200
                assert it.replicas[0].bodies == []
                headers = {"Authorization": f"Bearer {self.KEY}"}
                assert (await it.post(BODY, headers=headers))[0] == 200
                assert (await it.get("/metrics", headers=headers))[0] == 200

        run(test)

    def test_changed_keys_are_good_at_once_and_wrong_ones_change_nothing(
        self, tmp_path, monkeypatch, caplog
    ):
        path = tmp_path / "keys.yaml"
        path.write_text("alice: sk-alice-0123456789")
        watch = functools.partial(app.watch_file, interval_s=0.01)
        monkeypatch.setattr(app, "watch_file", watch)

        async def test():
            async with running(auth={"keys_file": str(path)}) as r:

                async def status(key):
                    header = {"Authorization": f"Bearer {key}"}
                    return (await r.get("/v1/models", headers=header))[0]

                async def becomes(key, wanted):
                    async with asyncio.timeout(5):
                        while await status(key) != wanted:
                            await asyncio.sleep(0.01)

                assert await status("sk-alice-0123456789") == 200
                path.write_text("bob: sk-bob-0123456789")
                await becomes("sk-bob-0123456789", 200)
                assert await status("sk-alice-0123456789") == 401
                path.write_text("bob: short")
                await until(lambda: "the API keys stay as they are" in caplog.text)
                assert await status("sk-bob-0123456789") == 200
                path.write_text("carol: sk-carol-0123456789")
                r.router.reload_keys()  # as SIGHUP does
                assert await status("sk-carol-0123456789") == 200

        run(test)

    def test_a_tenant_may_have_only_so_many_requests_in_progress(self, monkeypatch):
        settings = self.settings(monkeypatch, tenants={"alice": {"max_concurrent": 2}})

        async def test() -> None:
            async with running(1, **settings) as it:
                it.replicas[0].gap_s = 0.05
                alice = {"Authorization": f"Bearer {self.KEY}"}
                bob = {"Authorization": "Bearer sk-of-bob-01234567890"}
                answers = await asyncio.gather(
                    *(it.post(STREAM, headers=h) for h in [alice] * 4 + [bob] * 4)
                )
                assert sorted(s for s, _, _ in answers[:4]) == [200, 200, 429, 429]
                assert {s for s, _, _ in answers[4:]} == {200}
                refused = next(a for a in answers if a[0] == 429)
                assert int(refused[2]["Retry-After"]) >= 1
                assert json.loads(refused[1])["error"]["type"] == "rate_limit_error"
                assert (await it.post(STREAM, headers=alice))[0] == 200

        run(test, loop=VirtualTimeLoop)

    def test_a_tenant_may_send_only_so_many_requests_a_minute(self, monkeypatch):
        settings = self.settings(monkeypatch, limits={"requests_per_min": 3})

        async def test() -> None:
            async with running(1, **settings) as it:
                alice = {"Authorization": f"Bearer {self.KEY}"}
                answers = [await it.post(BODY, headers=alice) for _ in range(5)]
                assert [s for s, _, _ in answers] == [200, 200, 200, 429, 429]
                assert 15 < int(answers[-1][2]["Retry-After"]) <= 20

        run(test)


class TestFailures:
    def test_a_dead_replica_costs_no_request(self):
        async def test() -> None:
            async with running(2) as it:
                await it.replicas[0].stop()
                answers = await asyncio.gather(*(it.post(STREAM) for _ in range(20)))
                assert {(s, h["X-Servegym-Replica"]) for s, _, h in answers} == {(200, "r1")}
                assert it.router.telemetry.upstream_failures["r0", "refused"] >= 1
                await until(lambda: not it.state.is_up(0))
                await it.replicas[0].start()
                await until(lambda: it.state.is_up(0))
                answers = await asyncio.gather(*(it.post(STREAM) for _ in range(4)))
                assert {h["X-Servegym-Replica"] for _, _, h in answers} == {"r0", "r1"}
                assert it.idle()

        run(test, loop=VirtualTimeLoop)

    @pytest.mark.parametrize("mode", [500, "hang", "headers", "error_first"])
    def test_what_fails_before_the_first_token_is_tried_elsewhere(self, mode):
        async def test() -> None:
            async with running(2, request={"first_byte_timeout_s": 0.4}) as it:
                it.replicas[0].mode = mode
                answers = [await it.post(STREAM) for _ in range(8)]
                assert {(s, h["X-Servegym-Replica"]) for s, _, h in answers} == {(200, "r1")}
                assert sum(it.router.telemetry.retries.values()) >= 3
                assert it.standing(0).num_ejections == 1
                assert it.idle()

        run(test, loop=VirtualTimeLoop)

    def test_errors_that_are_the_requests_own_are_passed_on(self):
        async def test() -> None:
            async with running(2) as it:
                for replica in it.replicas:
                    replica.mode = 422
                status, body, _ = await it.post(STREAM)
                assert (status, json.loads(body)) == (422, {"error": {"message": "no"}})
                assert sum(len(replica.bodies) for replica in it.replicas) == 1
                assert it.router.telemetry.outcomes["refused"] == 1
                assert it.idle()

        run(test)

    @pytest.mark.parametrize(
        ("mode", "status", "code"),
        [
            ("hang", 504, "upstream_timeout"),
            ("die_first", 502, "upstream_failed"),
        ],
    )
    def test_when_all_fail_the_client_is_told_so(self, mode, status, code):
        async def test() -> None:
            settings = {"first_byte_timeout_s": 0.05, "max_retries": 3, "max_hold_s": 0.1}
            health = {"eject_after": 100}
            async with running(2, request=settings, health=health) as it:
                for replica in it.replicas:
                    replica.mode = mode
                got, body, _ = await it.post(STREAM)
                assert (got, json.loads(body)["error"]["code"]) == (status, code)
                assert sum(len(replica.bodies) for replica in it.replicas) == 2
                assert it.router.telemetry.outcomes["failed"] == 1
                assert it.idle()

        run(test, loop=VirtualTimeLoop)

    @pytest.mark.parametrize(("max_broken", "killed"), [(1, 1), (2, 2), (3, 3), (9, 4)])
    def test_a_request_that_kills_replicas_gets_only_so_many(self, max_broken, killed):
        async def test() -> None:
            request = {"max_broken": max_broken, "max_retries": 3}
            async with running(5, request=request, health={"eject_after": 100}) as it:
                for replica in it.replicas:
                    replica.mode = "die_first"
                status, body, _ = await it.post(STREAM)
                assert (status, json.loads(body)["error"]["code"]) == (502, "upstream_failed")
                assert sorted(len(replica.bodies) for replica in it.replicas) == [
                    *[0] * (5 - killed),
                    *[1] * killed,
                ]
                denied = it.router.telemetry.retries_denied
                assert denied == ({"poison": 1} if killed == max_broken else {})
                assert it.idle()

        run(test)

    @pytest.mark.parametrize("mode", ["die", "error"])
    def test_a_stream_that_breaks_is_not_repeated_and_does_not_pass_for_whole(self, mode):
        async def test() -> None:
            async with running(2) as it:
                for replica in it.replicas:
                    replica.mode = mode
                body = b""

                async def read() -> None:
                    nonlocal body
                    async with it.client.post(f"{it.url}/v1/completions", json=STREAM) as response:
                        assert response.status == 200
                        async for piece in response.content.iter_any():
                            body += piece

                with pytest.raises(aiohttp.ClientPayloadError):
                    await read()
                assert b'"t0"' in body
                assert b"[DONE]" not in body
                assert b'data: {"error"' in body
                assert sum(len(replica.bodies) for replica in it.replicas) == 1
                assert it.router.telemetry.outcomes["failed"] == 1
                await until(it.idle)

        run(test)

    def test_an_answer_that_stops_in_the_middle_is_cut_off(self):
        async def test() -> None:
            async with running(1, request={"stall_timeout_s": 0.1}) as it:
                it.replicas[0].gap_s = 0.5
                with pytest.raises(aiohttp.ClientPayloadError):
                    await it.post(STREAM)
                await until(lambda: it.replicas[0].cancelled == 1)
                assert it.router.telemetry.upstream_failures["r0", "stall"] == 1
                assert it.idle()

        run(test, loop=VirtualTimeLoop)

    def test_a_client_that_goes_away_frees_the_replica(self):
        async def test() -> None:
            async with running(1) as it:
                it.replicas[0].gap_s = 0.02
                it.replicas[0].tokens = 1000
                for _ in range(3):
                    async with it.client.post(f"{it.url}/v1/completions", json=STREAM) as response:
                        await response.content.readany()
                        response.close()
                await until(lambda: it.replicas[0].cancelled == 3)
                await until(it.idle)
                assert it.router.telemetry.outcomes["cancelled"] == 3
                assert it.state.is_up(0)  # nobody's fault

        run(test, loop=VirtualTimeLoop)

    def test_a_client_that_goes_away_before_the_first_byte_frees_the_replica_too(self):
        async def test() -> None:
            async with running(1) as it:
                it.replicas[0].mode = "hang"
                task = asyncio.create_task(it.post(STREAM))
                await until(lambda: it.replicas[0].running == 1)
                task.cancel()
                await until(lambda: it.replicas[0].cancelled == 1)
                await until(it.idle)
                assert it.router.telemetry.outcomes["cancelled"] == 1

        run(test, loop=VirtualTimeLoop)

    def test_a_client_that_reads_slowly_slows_its_replica_and_is_dropped_at_last(self):
        async def test() -> None:
            async with running(1, request={"client_timeout_s": 0.8}) as it:
                replica = it.replicas[0]
                replica.tokens, replica.pad = 10_000, "x" * 10_000  # 100 MB
                async with it.client.post(f"{it.url}/v1/completions", json=STREAM) as response:
                    sent = -1
                    while sent < replica.sent:
                        sent = replica.sent
                        await asyncio.sleep(0.2)
                    # the kernel's buffers hold some megabytes of each connection, the router none
                    assert 0 < sent < 3000
                    await until(lambda: it.router.telemetry.outcomes["cancelled"] == 1)
                    response.close()
                await until(it.idle)

        run(test, loop=VirtualTimeLoop)

    def test_no_replica_is_a_503_after_a_while_and_all_is_well_when_one_comes(self):
        async def test() -> None:
            async with running(1, request={"max_hold_s": 0.2, "hold_s": 0.02}) as it:
                it.replicas[0].healthy = False
                await until(lambda: not it.state.is_up(0))
                assert (await it.get("/health"))[0] == 503
                status, body, headers = await it.post(STREAM)
                assert (status, json.loads(body)["error"]["code"]) == (503, "no_replica")
                assert headers["Retry-After"] == "1"
                task = asyncio.create_task(it.post(STREAM))
                await until(lambda: it.state.num_held == 1)
                it.replicas[0].healthy = True
                assert (await task)[0] == 200
                assert it.idle()

        run(test, loop=VirtualTimeLoop)

    def test_the_hold_queue_is_bounded(self):
        async def test() -> None:
            settings = {"max_hold_s": 1.0, "hold_s": 0.02, "max_held": 3}
            async with running(1, request=settings) as it:
                it.replicas[0].healthy = False
                await until(lambda: not it.state.is_up(0))
                tasks = [asyncio.create_task(it.post(STREAM)) for _ in range(8)]
                await until(lambda: sum(task.done() for task in tasks) == 5)
                it.replicas[0].healthy = True
                answers = await asyncio.gather(*tasks)
                assert sorted(s for s, _, _ in answers) == [200] * 3 + [503] * 5

        run(test, loop=VirtualTimeLoop)

    def test_metrics_that_fail_are_stale_and_the_fallback_decides(self):
        async def test() -> None:
            runtime = {"policy": "llumnix", "max_metrics_age_s": 0.15}
            metrics = {"interval_s": 0.02}
            async with running(2, dispatch={"runtime": runtime}, metrics=metrics) as it:
                await it.post(BODY)
                counters = it.router.dispatcher.runtime.counters
                assert counters.num_policy == 1
                it.replicas[1].metrics = False
                await asyncio.sleep(0.3)
                assert (await it.post(BODY))[0] == 200
                assert counters.by_reason["stale_state"] == 1
                it.replicas[1].metrics = True
                await asyncio.sleep(0.1)
                await it.post(BODY)
                assert counters.num_policy == 2

        run(test, loop=VirtualTimeLoop)


class TestOperators:
    def test_a_draining_replica_ends_its_requests_and_gets_no_more(self):
        async def test() -> None:
            async with running(2) as it:
                for replica in it.replicas:
                    replica.gap_s = 0.03
                tasks = [asyncio.create_task(it.post(STREAM)) for _ in range(4)]
                await until(lambda: it.state.replicas[1].tolist() == [2, 2])
                status, said = await it.operate("/drain", {"replica": "r0"})
                assert (status, said["outstanding_requests"]) == (200, 2)
                late = [await it.post(STREAM) for _ in range(3)]
                assert {h["X-Servegym-Replica"] for _, _, h in late} == {"r1"}
                assert {s for s, _, _ in await asyncio.gather(*tasks)} == {200}
                await it.operate("/undrain", {"replica": "r0"})
                assert (await it.post(STREAM))[2]["X-Servegym-Replica"] == "r0"

        run(test, loop=VirtualTimeLoop)

    def test_a_policy_is_replaced_under_load_and_a_bad_one_is_not(self, tmp_path):
        async def test() -> None:
            async with running(2) as it:
                for replica in it.replicas:
                    replica.gap_s = 0.01
                tasks = [asyncio.create_task(it.post(STREAM)) for _ in range(20)]
                status, said = await it.operate("/policy", {"policy": "added-delay:prefill=1.9"})
                assert (status, said["policy"]) == (200, "added-delay:prefill=1.9")
                (tmp_path / "policy.onnx").write_bytes(b"broken")
                status, said = await it.operate(
                    "/policy", {"policy": str(tmp_path / "policy.onnx")}
                )
                assert status == 400
                assert "manifest.json" in said["error"]["message"]
                loaded = it.router.dispatcher.runtime.loaded
                assert loaded.text == "added-delay:prefill=1.9"
                assert {s for s, _, _ in await asyncio.gather(*tasks)} == {200}
                assert it.router.dispatcher.runtime.counters.num_refused == 1

        run(test, loop=VirtualTimeLoop)

    def test_mode_state_and_wrong_commands(self):
        async def test() -> None:
            async with running(2) as it:
                body = {"mode": "shadow", "canary_fraction": 0.5}
                assert (await it.operate("/mode", body))[1] == body
                await it.post(BODY)
                async with it.client.get(f"{it.admin}/state") as response:
                    state = await response.json()
                assert state["runtime"]["counters"]["reason_shadow"] == 1
                assert [replica["name"] for replica in state["replicas"]] == ["r0", "r1"]
                assert state["replicas"][0]["features"]["num_running"] == 0
                assert (await it.operate("/drain", {"replica": "r7"}))[0] == 404
                assert (await it.operate("/mode", {"mode": "wild"}))[0] == 400
                assert (await it.operate("/mode", {"colour": 1}))[0] == 400
                async with it.client.get(f"{it.admin}/metrics") as response:
                    assert "servegym_shadow 1.0" in await response.text()

        run(test)

    def test_a_web_page_cannot_operate_the_router(self):
        async def test() -> None:
            async with running(1) as it:
                headers = {"Origin": "http://evil.example"}
                assert (await it.operate("/mode", {"mode": "shadow"}, headers=headers))[0] == 403
                async with it.client.post(f"{it.admin}/mode", data="mode=shadow") as response:
                    assert response.status == 415
                assert it.router.dispatcher.runtime.mode == "live"

        run(test)

    def test_operators_endpoints_are_not_on_the_clients_port(self):
        async def test() -> None:
            async with running(1) as it:
                for path in ("/drain", "/policy", "/mode"):
                    assert (await it.post({}, path))[0] == 404
                assert (await it.get("/state"))[0] == 404

        run(test)


class TestHoldAndReject:
    def test_the_policy_holds_until_it_sends(self, monkeypatch):
        async def test() -> None:
            dispatch = {"runtime": {"policy": "least-outstanding"}, "allow_hold": True}
            async with running(1, dispatch=dispatch, request={"hold_s": 0.02}) as it:
                runtime = it.router.dispatcher.runtime
                asked = []
                real = runtime.loaded.policy.act

                def hold_twice(observations, env_ids):  # 1 holds: there is one replica
                    asked.append(float(observations.request[0, 5]))  # waited_s
                    return [1] if len(asked) <= 2 else real(observations, env_ids)

                monkeypatch.setattr(runtime.loaded.policy, "act", hold_twice)
                assert (await it.post(STREAM))[0] == 200
                assert len(asked) == 3
                assert asked[2] >= 0.04
                assert it.idle()

        run(test, loop=VirtualTimeLoop)

    def test_a_rejection_is_a_429(self, monkeypatch):
        async def test() -> None:
            dispatch = {"runtime": {"policy": "least-outstanding"}, "allow_reject": True}
            async with running(1, dispatch=dispatch, request={"retry_after_s": 7}) as it:
                runtime = it.router.dispatcher.runtime
                monkeypatch.setattr(runtime.loaded.policy, "act", lambda o, e: [2])  # rejects
                status, body, headers = await it.post(STREAM)
                assert (status, headers["Retry-After"]) == (429, "7")
                assert json.loads(body)["error"]["code"] == "overloaded"
                assert it.replicas[0].bodies == []
                assert it.router.telemetry.outcomes == {"rejected": 1}
                assert it.idle()

        run(test)


def test_service_classes_come_from_header_field_or_tenant():
    async def test() -> None:
        dispatch = {
            "runtime": {"policy": "least-outstanding"},
            "slo_classes": [{"name": "batch"}, {"name": "chat", "ttft_s": 1.0, "tpot_s": 0.05}],
        }
        settings = {"dispatch": dispatch, "request": {"slo_field": "service_tier"}}
        async with running(1, **settings) as it:
            seen = []
            real = it.state.observe

            def observe(request, *args, **kwargs):
                seen.append(request.slo_class)
                return real(request, *args, **kwargs)

            it.state.observe = observe
            await it.post(BODY)
            await it.post(BODY, headers={"X-SLO-Class": "chat"})
            await it.post({**BODY, "service_tier": "chat"})
            assert seen == [0, 1, 1]
            status, body, _ = await it.post(BODY, headers={"X-SLO-Class": "chta"})
            assert status == 400
            assert "did you mean chat" in json.loads(body)["error"]["message"]

    run(test)


def test_equal_prompts_find_their_replica_by_its_cache():
    async def test() -> None:
        dispatch = {"runtime": {"policy": "prefix-load"}}
        async with running(4, dispatch=dispatch, metrics={"interval_s": 0.02}) as it:
            prompts = [chr(ord("a") + i) * 4000 for i in range(4)]
            home = {}
            for p in prompts:
                home[p] = (await it.post({**STREAM, "prompt": p}))[2]["X-Servegym-Replica"]
            for p in prompts:
                again = (await it.post({**STREAM, "prompt": p + " and more"}))[2]
                assert again["X-Servegym-Replica"] == home[p]
            hits = it.state.replicas[20]
            assert hits.max() > 900

    run(test)


def test_a_replica_that_never_answered_is_said_to_be_down_at_the_start(caplog):
    async def test():
        rates = {"prefill_tokens_per_s": 1000.0, "decode_step_s": 0.01}
        gone = {"name": "gone", "url": "http://127.0.0.1:9", "rates": rates}
        async with running(replicas=[gone]):
            assert "gone is down: http://127.0.0.1:9/health has never answered" in caplog.text

    run(test)
