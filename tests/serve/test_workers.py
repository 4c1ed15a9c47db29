"""Workers carry, one decides: what several processes do is what one would have done."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from servegym.policy.contract import REPLICA_FEATURES
from servegym.serve.decision_log import read_rows
from servegym.serve.router.workers.decider import Decider

from .running import RATES, VirtualTimeLoop, run, running, until
from .upstream import Upstream

STREAM = {"model": "m", "prompt": "hello", "stream": True}
WHOLE = {"model": "m", "prompt": "hello"}
#: What a decision rests on that is no matter of milliseconds.
STEADY = [
    i
    for i, feature in enumerate(REPLICA_FEATURES[:21])
    if feature.name
    in (
        "outstanding_requests",
        "outstanding_prompt_tokens",
        "outstanding_predicted_tokens",
        "pending_prefill_tokens",
        "prefix_hit_tokens",
        "up",
    )
]
HITS = [REPLICA_FEATURES[i].name for i in STEADY].index("prefix_hit_tokens")


def story(i: int) -> str:
    """One of three beginnings, and an end of its own."""
    return f"{'abc'[i % 3] * 600} and so it went on {i * 37 % 11} times {'.' * (i % 5) * 40}"


async def play(it, num_workers: int) -> list[str]:
    """Send requests one after the other, each through the next worker; return where they went."""
    went = []

    async def ask(i: int, body, **headers) -> str:
        named = {"x-request-id": f"q{i}", **headers}
        worker = i % max(1, num_workers)
        status, _, got = await it.post(body, worker=worker, headers=named)
        assert status == 200
        return got["x-servegym-replica"]

    open_streams = []
    for replica in it.replicas:
        replica.gap_s = 30.0  # after their first token they go on and on
    for i in range(5):
        body = {**STREAM, "prompt": story(i), "max_tokens": 100 * (i + 1)}
        url = it.urls[i % len(it.urls)] + "/v1/completions"
        response = await it.client.post(url, json=body, headers={"x-request-id": f"open{i}"})
        await response.content.readany()
        open_streams.append(response)
        went.append(response.headers["x-servegym-replica"])
    for replica in it.replicas:
        replica.gap_s = 0.0
    for i in range(40):
        body = {**(STREAM if i % 4 else WHOLE), "prompt": story(i), "max_tokens": 50 + i}
        body["stream_options"] = {"include_usage": True}
        session = {"x-session-id": f"s{i % 7}"} if i % 3 else {}
        went.append(await ask(i, body, **session))
    for response in open_streams:
        response.close()
    await until(it.idle)
    return went


def steady(row) -> dict[str, object]:
    """What a row of the log says, without times."""
    kept = {
        name: row[name]
        for name in (
            "key",
            "prompt_tokens",
            "output_tokens",
            "predicted_output_tokens",
            "cached_tokens",
            "hash_ids",
            "status",
            "replica",
        )
    }
    kept["follows"] = row["follows"] and (row["follows"]["key"], row["follows"]["by"])
    kept["decisions"] = [
        (
            one["action"],
            one["by"],
            one["reason"],
            [[features[i] for i in STEADY] for features in one["observation"]["replicas"]],
        )
        for one in row["decisions"]
    ]
    return kept


@pytest.mark.parametrize("policy", ["prefix-load", "sglang"])
def test_workers_place_a_sequence_of_requests_as_one_process_does(tmp_path, policy):
    found = {}
    for num_workers in (0, 3):
        folder = tmp_path / str(num_workers)

        async def test(num_workers=num_workers, folder=folder) -> None:
            dispatch = {
                "runtime": {"policy": policy, "max_metrics_age_s": 600.0},
                "log": {"folder": str(folder), "observations": True},
                "seed": 1,
            }
            metrics = {"interval_s": 600.0}
            settings = {"dispatch": dispatch, "metrics": metrics}
            async with running(4, num_workers, **settings) as it:
                found[num_workers] = [await play(it, num_workers)]

        run(test, loop=VirtualTimeLoop)
        rows = sorted(map(steady, read_rows(folder)), key=lambda row: row["key"])
        found[num_workers].append(rows)
    assert found[3][0] == found[0][0]
    assert len(found[3][1]) == 45
    assert found[3][1] == found[0][1]
    assert len(set(found[0][0])) > 1
    decided = [one for row in found[0][1] for one in row["decisions"]]
    assert max(features[HITS] for *_, fleet in decided for features in fleet) > 100.0
    assert sum(row["follows"] is not None for row in found[0][1]) > 10


def test_workers_divide_a_sequence_of_requests_as_one_process_does(tmp_path):
    found = {}
    for num_workers in (0, 3):
        folder = tmp_path / str(num_workers)

        async def test(num_workers=num_workers, folder=folder) -> None:
            dispatch = {
                "runtime": {"policy": "prefix-load+least-tpot", "max_metrics_age_s": 600.0},
                "log": {"folder": str(folder)},
                "seed": 1,
            }
            roles = ("prefill", "prefill", "decode", "decode", "mixed")
            metrics = {"interval_s": 600.0}
            async with running(5, num_workers, roles, dispatch=dispatch, metrics=metrics) as it:
                for replica in it.replicas:
                    replica.params = {"do_remote_prefill": True}
                went = []
                for i in range(24):
                    body = {**(STREAM if i % 3 else WHOLE), "prompt": story(i), "max_tokens": 9 + i}
                    named = {"x-request-id": f"q{i:02}"}
                    worker = i % max(1, num_workers)
                    status, _, got = await it.post(body, worker=worker, headers=named)
                    assert status == 200
                    went.append(got["x-servegym-replica"])
                await until(it.idle)
                found[num_workers] = [went]

        run(test)
        rows = sorted(read_rows(folder), key=lambda row: row["key"])
        found[num_workers].append(
            [
                (
                    row["key"],
                    row["prefill_replica_name"],
                    [one["replica_name"] for one in row["decisions"]],
                    [one["replica_name"] for one in row["placements"]],
                    row["cached_tokens"],
                )
                for row in rows
            ]
        )
    assert found[3] == found[0]
    assert {row[1] for row in found[0][1]} == {"r0", "r1", None}
    assert len(set(found[0][0])) > 1
    assert all(len(row[3]) == (row[1] is not None) for row in found[0][1])


def test_a_long_prompt_and_its_continuation_find_each_other_through_two_workers(tmp_path):
    async def test() -> None:
        dispatch = {"runtime": {"policy": "prefix-load"}, "log": {"folder": str(tmp_path)}}
        async with running(4, 2, dispatch=dispatch) as it:
            first = "".join(f"{i} bottles of beer on the wall, " for i in range(4000))
            for i, prompt in enumerate((first, f"{first} and one fell down", first[:9000])):
                headers = {"x-request-id": f"q{i}"}
                body = {**STREAM, "prompt": prompt}
                status, *_ = await it.post(body, worker=i % 2, headers=headers)
                assert status == 200

    run(test, loop=VirtualTimeLoop)
    rows = {row["key"]: row for row in read_rows(tmp_path)}
    assert rows["q1"]["follows"]["key"] == "q0"
    assert rows["q2"]["follows"] is None
    assert rows["q0"]["replica"] == rows["q1"]["replica"] == rows["q2"]["replica"]


def test_limits_of_a_tenant_hold_over_all_workers(monkeypatch):
    monkeypatch.setenv("KEYS", "alice=sk-alice-0123456789,bob=sk-bob-0123456789")
    alice = {"Authorization": "Bearer sk-alice-0123456789"}

    async def test() -> None:
        limits = {"alice": {"max_concurrent": 1}}
        async with running(1, 2, auth={"keys_env": "KEYS"}, tenants=limits) as it:
            it.replicas[0].gap_s = 30.0
            async with it.client.post(
                it.urls[0] + "/v1/completions", json=STREAM, headers=alice
            ) as response:
                await response.content.readany()
                status, body, _ = await it.post(WHOLE, worker=1, headers=alice)
                assert status == 429
                assert json.loads(body)["error"]["code"] == "concurrency_limit_exceeded"
            it.replicas[0].gap_s = 0.0
            await until(it.idle)
            for i in range(20):  # each through the other worker than the one before
                assert (await it.post(WHOLE, worker=i % 2, headers=alice))[0] == 200
            wrong = {"Authorization": "Bearer sk-nobody-0123456789"}
            assert (await it.post(WHOLE, worker=1, headers=wrong))[0] == 401

    run(test, loop=VirtualTimeLoop)


def test_a_limit_is_known_before_a_body_that_does_not_come(monkeypatch):
    async def test() -> None:
        limits = {"requests_per_min": 1.0}
        async with running(1, 1, limits=limits) as it:
            assert (await it.post(WHOLE))[0] == 200
            port = int(it.url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nsome"
            )
            line = await asyncio.wait_for(reader.readline(), 5.0)
            assert line.startswith(b"HTTP/1.1 429 ")
            writer.close()

    run(test, loop=VirtualTimeLoop)


def test_pages_and_counts_are_those_of_all():
    async def test() -> None:
        async with running(2, 2) as it:
            for worker in (0, 1, 1):
                assert (await it.post(STREAM, worker=worker))[0] == 200
            for url in it.urls:
                async with it.client.get(url + "/v1/models") as response:
                    assert [one["id"] for one in (await response.json())["data"]] == ["m"]
                async with it.client.get(url + "/v1/models/other") as response:
                    assert response.status == 404
                async with it.client.get(url + "/health") as response:
                    assert (await response.json())["replicas_up"] == 2
            ok = ("/v1/completions", 200)
            await until(lambda: it.router.telemetry.requests[ok] == 3)
            async with it.client.get(it.urls[1] + "/metrics") as response:
                page = await response.text()
            assert "servegym_router_workers 2.0" in page
            assert 'servegym_router_outcomes_total{outcome="finished"} 3.0' in page
            async with it.client.get(it.admin + "/state") as response:
                assert [w["requests"] for w in (await response.json())["workers"]] == [0, 0]

    run(test, loop=VirtualTimeLoop)


def test_clients_that_leave_leave_nothing_behind():
    async def test() -> None:
        async with running(2, 2) as it:
            for replica in it.replicas:
                replica.gap_s = 30.0
            asks = [
                asyncio.create_task(it.post({**WHOLE, "stream": i % 2 == 0}, worker=i % 2))
                for i in range(8)
            ]
            await until(lambda: it.router.telemetry.in_flight == 8)
            await until(lambda: sum(replica.running for replica in it.replicas) == 8)
            for ask in asks:
                ask.cancel()
            await until(it.idle)
            assert it.router.telemetry.outcomes == {"cancelled": 8}
            await until(lambda: sum(replica.cancelled for replica in it.replicas) == 8)

    run(test, loop=VirtualTimeLoop)


def test_a_request_is_tried_again_and_held_by_the_decider():
    async def test() -> None:
        async with running(2, 2, health={"down_after": 1}) as it:
            it.replicas[0].mode = 500
            for worker in (0, 1, 0, 1):
                assert (await it.post(STREAM, worker=worker))[0] == 200
            assert it.router.telemetry.retries["status_500"] >= 1
            for replica in it.replicas:
                replica.mode, replica.healthy = "ok", False
            await until(lambda: not it.state.up.any())
            held = [asyncio.create_task(it.post(STREAM, worker=i % 2)) for i in range(4)]
            await until(lambda: it.state.num_held == 4)
            held[0].cancel()
            await until(lambda: it.state.num_held == 3)
            it.replicas[1].healthy = True
            answers = await asyncio.gather(*held[1:])
            assert [status for status, *_ in answers] == [200, 200, 200]
            await until(it.idle)

    run(test, loop=VirtualTimeLoop)


def test_what_a_worker_had_is_ended_when_it_goes(caplog):
    caplog.set_level(logging.WARNING, "servegym")

    async def test() -> None:
        async with running(1, 2) as it:
            it.replicas[0].gap_s = 30.0
            asks = [asyncio.create_task(it.post(STREAM, worker=i // 3)) for i in range(5)]
            await until(lambda: it.state.outstanding(0) == 5)
            it.workers[0]._desk.close()  # as if its process had gone
            await until(lambda: it.state.outstanding(0) == 2)
            assert it.router.telemetry.outcomes == {"lost": 3}
            assert it.router.telemetry.in_flight == 2
            for ask in asks:
                ask.cancel()
            await until(it.idle)

    run(test, loop=VirtualTimeLoop)
    assert "a worker has gone with 3 requests" in caplog.text


def test_without_a_decider_streams_go_on_and_new_requests_are_refused_until_one_comes():
    async def test() -> None:
        async with running(1, 1) as it:
            it.replicas[0].gap_s = 0.1
            stream = asyncio.create_task(it.post(STREAM))
            await until(lambda: it.state.outstanding(0) == 1 and it.replicas[0].sent >= 1)
            router, path = it.router, it.router._shared.path
            staying = asyncio.create_task(it.workers[0].stay_connected())
            router._decider.stop()
            await asyncio.sleep(0.02)
            status, body, headers = await it.post(WHOLE)
            assert (status, headers["Retry-After"]) == (503, "1")
            assert json.loads(body)["error"]["code"] == "no_decider"
            assert await it.get("/health") == (503, body.decode())
            status, body, _ = await stream
            assert (status, body.count(b"data: {")) == (200, 5)
            router._decider = Decider(router._desk, None)
            router._decider.listen(path)
            await until(lambda: router._decider.workers)
            assert (await it.post(WHOLE))[0] == 200
            staying.cancel()
            await until(it.idle)

    run(test, loop=VirtualTimeLoop)


def test_changed_keys_reach_all_workers(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text("alice: sk-alice-0123456789")
    path.chmod(0o600)

    async def test() -> None:
        async with running(1, 2, auth={"keys_file": str(path)}) as it:

            async def status(worker: int, key: str) -> int:
                headers = {"Authorization": f"Bearer {key}"}
                return (await it.post(WHOLE, worker=worker, headers=headers))[0]

            assert [await status(w, "sk-alice-0123456789") for w in (0, 1)] == [200, 200]
            path.write_text("bob: sk-bob-0123456789")
            it.router.reload_keys()  # as SIGHUP does
            await until(lambda: all("bob" in w._api.keys.tenants for w in it.workers))
            assert [await status(w, "sk-alice-0123456789") for w in (0, 1)] == [401, 401]
            assert [await status(w, "sk-bob-0123456789") for w in (0, 1)] == [200, 200]

    run(test, loop=VirtualTimeLoop)


def test_replicas_that_come_are_used_by_all_workers_and_those_that_leave_by_none():
    async def test() -> None:
        new = Upstream()
        await new.start()
        async with running(1, 2) as it:
            entry = {"name": "new", "url": new.url, "rates": RATES}
            status, _ = await it.operate("/replicas", entry)
            assert status == 201
            await until(lambda: it.state.up.sum() == 2)
            for worker in range(2):  # in turn, give or take one: eight reach both
                went = [(await it.post(WHOLE, worker=worker))[2] for _ in range(8)]
                assert {headers["x-servegym-replica"] for headers in went} == {"r0", "new"}
            async with it.client.delete(it.admin + "/replicas/new") as response:
                assert response.status == 200
            went = [(await it.post(WHOLE, worker=i % 2))[2] for i in range(4)]
            assert [headers["x-servegym-replica"] for headers in went] == ["r0"] * 4
        await new.stop()

    run(test, loop=VirtualTimeLoop)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_has_only_a_length_is_measured_where_lengths_are_learnt(num_workers, tmp_path):
    async def test() -> None:
        dispatch = {"runtime": {"policy": "least-outstanding"}, "log": {"folder": str(tmp_path)}}
        async with running(1, num_workers, dispatch=dispatch) as it:
            reader = it.router.dispatcher.reader
            for _ in range(300):
                reader.learn(reader.read("x" * 400), 200)  # two bytes a token
            body = {"model": "m", "input": ["x" * 600, "y" * 200]}
            status, *_ = await it.post(body, "/v1/embeddings")
            assert status == 200

    run(test, loop=VirtualTimeLoop)
    (row,) = read_rows(tmp_path)
    decided = row["decisions"][0]
    assert decided["action"] == 0
    assert 395 <= row["prompt_tokens"] <= 405
