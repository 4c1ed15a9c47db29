"""Faults while streams are running: the router in front of emulated engines, all in one process.

The same in full length, with real processes and a table: `python benchmarks/router_faults.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import time

import aiohttp

from servegym.scenario import parse_scenario
from servegym.serve.engine.content import answer_text, request_digest
from servegym.serve.engine.faults import Fault
from servegym.serve.engine.fleet import Fleet, FleetConfig
from servegym.serve.router.app import Router
from servegym.serve.router.config import parse_config

from .running import PATIENT_S, VirtualTimeLoop, run, until

SCENARIO = """
name: three
model: Llama-3.1-8B
engine: {block_size: 16, max_num_batched_tokens: 512, max_num_seqs: 8}
fleet:
  - {gpu: H100-SXM-80GB, count: 3, num_blocks: 2000}
workload: {kind: generated, rate_rps: 1.0}
"""
HARDWARE = {"gpu": "H100-SXM-80GB", "model": "Llama-3.1-8B", "max_num_seqs": 8}
REPLICAS = {"replica-0", "replica-1", "replica-2"}
#: A decode step of this model on this GPU takes 7 ms; 20 times as fast it is over before a timer.
SPEED = 5.0


class Service:
    """Engines, router and clients that check their answers."""

    def __init__(self, fleet: Fleet, router: Router, session: aiohttp.ClientSession) -> None:
        self.fleet, self.router, self.session = fleet, router, session
        self.url = f"http://127.0.0.1:{router.port}"
        self.admin = f"http://127.0.0.1:{router.admin_port}"
        self.begun: dict[str, str] = {}  # replica by prompt, for streams with a token

    async def ask(self, prompt: str, tokens: int = 40, **settings) -> str:
        """Stream an answer; say `ok`, the status of a refusal, or how it ended."""
        body = {
            "model": "Llama-3.1-8B",
            "prompt": prompt,
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
        }
        text, ended = "", False
        try:
            url = f"{self.url}/v1/completions"
            async with self.session.post(url, json=body, **settings) as response:
                if response.status != 200:
                    return str(response.status)
                async for line in response.content:
                    if not line.startswith(b"data: "):
                        continue
                    if line.strip() == b"data: [DONE]":
                        ended = True
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        return "told"
                    self.begun[prompt] = event["system_fingerprint"]
                    text += event["choices"][0]["text"]
        except aiohttp.ClientError:
            return "broken"
        whole = text == answer_text(request_digest(prompt, None), tokens)
        return "ok" if ended and whole else "wrong"

    def wave(self, name: str, count: int, tokens: int = 40) -> dict[str, asyncio.Task[str]]:
        """Start streams at once."""
        prompts = [f"{name} {i}" for i in range(count)]
        return {p: asyncio.create_task(self.ask(p, tokens)) for p in prompts}

    async def served_by(self, name: str, count: int) -> list[str]:
        """Let a wave end well and say who served each stream."""
        wave = self.wave(name, count)
        assert set(await asyncio.gather(*wave.values())) == {"ok"}
        return [self.begun[prompt] for prompt in wave]

    async def fault(self, kind: str, value: float = 1.0, replica: int = 0) -> None:
        await self.fleet.apply(Fault(replica, kind, value))

    def up(self, replica: int = 0) -> bool:
        return self.router.dispatcher.state.is_up(replica)

    def idle(self) -> bool:
        """Whether nothing is left anywhere."""
        state = self.router.dispatcher.state
        return (
            self.router.telemetry.in_flight == 0
            and all(state.outstanding(r) == 0 for r in range(3))
            and all(server.state()["num_streams"] == 0 for server in self.fleet.servers.values())
            and all(server.state()["kv_cache_usage"] == 0 for server in self.fleet.servers.values())
        )

    def reasons(self) -> dict[str, int]:
        """Decisions by reason."""
        counts = self.router.dispatcher.runtime.counters.by_reason
        return {reason.value: count for reason, count in counts.items()}

    async def operate(self, path: str, **body: object) -> tuple[int, str]:
        async with self.session.post(f"{self.admin}/{path}", json=body) as response:
            return response.status, await response.text()


@contextlib.asynccontextmanager
async def serving(**settings):
    fleet = Fleet(FleetConfig(parse_scenario(SCENARIO, "test"), port=0, speed=SPEED))
    await fleet.start()
    data = {
        "replicas": [
            {"name": f"replica-{i}", "url": server.url, "hardware": HARDWARE}
            for i, server in fleet.servers.items()
        ],
        "listen": {"port": 0, "admin_port": 0},
        "drain_s": 1.0,
    }
    defaults = {
        "dispatch": {"runtime": {"policy": "least-outstanding", "max_metrics_age_s": 0.3}},
        "health": {"interval_s": 0.05, "timeout_s": 0.5, "eject_s": 0.2},
        "metrics": {"interval_s": 0.05, "timeout_s": 0.2},
    }
    for key, value in {**defaults, **settings}.items():
        data[key] = {**defaults.get(key, {}), **value}
    data["dispatch"]["runtime"]["timeout_s"] = PATIENT_S
    router = Router(parse_config(data, "test"))
    try:
        await router.start()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            yield Service(fleet, router, session)
    finally:
        await router.stop()
        await fleet.stop()


def test_killed_replica_costs_only_the_streams_it_had_begun_and_comes_back():
    async def test():
        async with serving() as service:
            wave = service.wave("first", 48, tokens=200)  # 8 run on each replica, 8 wait
            await until(lambda: len(service.begun) >= 24)
            await service.fault("fail")
            outcomes = {p: await task for p, task in wave.items()}
            lost = {p for p, outcome in outcomes.items() if outcome != "ok"}
            assert 0 < len(lost) <= 16
            assert {service.begun.get(p) for p in lost} == {"replica-0"}
            assert {outcomes[p] for p in lost} <= {"told", "broken"}
            assert set(await service.served_by("second", 12)) == {"replica-1", "replica-2"}
            await service.fault("recover")
            await until(service.up)
            assert "replica-0" in await service.served_by("third", 12)
            await until(service.idle)

    run(test, loop=VirtualTimeLoop)


def test_slow_replica_fails_nothing_and_gets_less():
    async def test():
        async with serving() as service:
            await service.fault("slow", 10.0)
            outcomes, shares = [], []

            async def client(k):
                for i in range(6):
                    outcomes.append(await service.ask(f"{k} {i}"))
                    shares.append(service.begun[f"{k} {i}"])

            await asyncio.gather(*(client(k) for k in range(12)))
            assert set(outcomes) == {"ok"}
            assert 0 < shares.count("replica-0") < shares.count("replica-1") / 2
            await until(service.idle)

    run(test, loop=VirtualTimeLoop)


def test_hanging_replica_is_left_alone_until_it_goes_on():
    async def test():
        limits = {"first_byte_timeout_s": 0.3, "stall_timeout_s": 0.3}
        async with serving(request=limits) as service:
            await service.fault("hang")
            wave = service.wave("first", 24)
            # those that were sent there are tried again elsewhere: no token had come
            assert set(await asyncio.gather(*wave.values())) == {"ok"}
            assert set(service.begun.values()) == {"replica-1", "replica-2"}
            await service.fault("recover")
            await asyncio.sleep(0.5)
            await until(service.up)
            assert "replica-0" in await service.served_by("second", 24)
            await until(service.idle)

    run(test, loop=VirtualTimeLoop)


def test_streams_of_a_replica_that_begins_to_hang_end_in_time_and_say_so():
    async def test():
        async with serving(request={"stall_timeout_s": 0.3}) as service:
            wave = service.wave("first", 12, tokens=300)
            await until(lambda: len(service.begun) == 12)
            await service.fault("hang")
            async with asyncio.timeout(5):
                outcomes = {p: await task for p, task in wave.items()}
            assert len(outcomes) == 12
            for prompt, outcome in outcomes.items():
                stuck = service.begun[prompt] == "replica-0"
                assert outcome in (("told", "broken") if stuck else ("ok",))
            await service.fault("recover")
            await until(service.idle)

    run(test, loop=VirtualTimeLoop)


def test_without_metrics_the_fallback_serves_until_they_are_back():
    async def test():
        async with serving(
            dispatch={"runtime": {"policy": "llumnix", "max_metrics_age_s": 0.3}}
        ) as service:
            await service.served_by("first", 6)
            assert service.reasons()["policy"] == 6
            for replica in range(3):
                await service.fault("metrics-off", replica=replica)
            await asyncio.sleep(0.5)
            await service.served_by("second", 6)
            assert service.reasons()["policy"] == 6
            assert service.reasons()["stale_state"] == 6
            for replica in range(3):
                await service.fault("recover", replica=replica)
            await asyncio.sleep(0.3)
            await service.served_by("third", 6)
            assert service.reasons()["policy"] == 12

    run(test, loop=VirtualTimeLoop)


def test_metrics_that_stand_still_fail_nothing():
    async def test():
        async with serving() as service:
            wave = service.wave("first", 24)
            await until(lambda: len(service.begun) > 0)
            for replica in range(3):
                await service.fault("metrics-frozen", replica=replica)
            assert set(await asyncio.gather(*wave.values())) == {"ok"}
            assert len(set(await service.served_by("second", 24))) == 3
            await until(service.idle)

    run(test, loop=VirtualTimeLoop)


def test_a_wall_clock_that_jumps_changes_nothing(monkeypatch):
    real, jumps = time.time, itertools.cycle([0.0, 86_400.0, -86_400.0, 3600.0, -1e9])
    looks = 0

    def jumping() -> float:
        nonlocal looks
        looks += 1
        return real() + next(jumps)

    async def test():
        async with serving() as service:
            assert set(await service.served_by("before", 12)) == REPLICAS
            monkeypatch.setattr(time, "time", jumping)
            before = service.reasons()
            for name in ("first", "second", "third"):
                assert set(await service.served_by(name, 12)) == REPLICAS
            assert looks >= 36  # each request has one for the log
            after = service.reasons()
            assert {reason for reason in after if after[reason] > before.get(reason, 0)} == {
                "policy"
            }
            assert all(service.up(replica) for replica in range(3))
            await until(service.idle)
            monkeypatch.undo()

    run(test, loop=VirtualTimeLoop)


def test_corrupt_policy_is_refused_and_the_one_in_place_goes_on(tmp_path):
    async def test():
        async with serving() as service:
            wave = service.wave("first", 24, tokens=100)
            await until(lambda: len(service.begun) > 0)
            (tmp_path / "policy.onnx").write_bytes(b"no graph")
            (tmp_path / "manifest.json").write_text(json.dumps({"sha256": "0" * 64}))
            for wrong in (str(tmp_path / "policy.onnx"), "no-such-rule", str(tmp_path)):
                status, said = await service.operate("policy", policy=wrong)
                assert status == 400
                assert json.loads(said)["error"]["message"]
            assert set(await asyncio.gather(*wave.values())) == {"ok"}
            status, _ = await service.operate("policy", policy="round-robin")
            assert status == 200
            assert sorted(await service.served_by("second", 3)) == [
                "replica-0",
                "replica-1",
                "replica-2",
            ]
            assert set(service.reasons()) >= {"policy"}
            assert service.reasons()["policy"] == 27

    run(test, loop=VirtualTimeLoop)


def test_storm_of_clients_that_come_and_go_leaves_nothing_behind():
    async def test():
        async with serving() as service:
            steady = service.wave("steady", 6, tokens=400)
            await until(lambda: len(service.begun) == 6)
            for storm in range(3):
                wave = service.wave(f"storm {storm}", 60, tokens=400)
                await asyncio.sleep(0.05)
                for task in wave.values():
                    task.cancel()
                await asyncio.gather(*wave.values(), return_exceptions=True)
            host, port = "127.0.0.1", service.router.port
            for _ in range(40):  # some only knock
                knock = socket.create_connection((host, port))
                knock.close()
            assert set(await asyncio.gather(*steady.values())) == {"ok"}
            await until(service.idle)
            await service.served_by("after", 6)

    run(test, loop=VirtualTimeLoop)


def test_malformed_and_oversized_bodies_are_refused_beside_good_ones():
    async def test():
        async with serving(request={"max_body_bytes": 10_000}) as service:
            steady = service.wave("steady", 12, tokens=200)
            url = f"{service.url}/v1/completions"
            for body, expected in (
                (b"", {400}),
                (b"{", {400}),
                (b"[" * 5000, {400}),
                (b'{"model": "Llama-3.1-8B", "prompt": {"a": 1}}', {400}),
                (b'{"model": "Llama-3.1-8B", "prompt": "x", "max_tokens": -1}', {400}),
                (b'{"model": "Llama-3.1-8B", "prompt": "x", "max_tokens": 1e99}', {400}),
                (b'{"model": "Llama-3.1-8B", "prompt": "\xff\xfe"}', {400}),
                (b'{"model": "other", "prompt": "x"}', {404}),
                (b'{"model": "Llama-3.1-8B", "prompt": "' + b"x" * 20_000 + b'"}', {413}),
            ):
                async with service.session.post(url, data=body) as response:
                    assert response.status in expected, (body[:60], await response.text())
                    assert json.loads(await response.text())["error"]["message"]
            raw = b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n"
            for junk in (raw, b"\x00" * 3000, b"GET / HTTP/9.9\r\n\r\n"):
                reader, writer = await asyncio.open_connection("127.0.0.1", service.router.port)
                writer.write(junk)
                assert b"200 OK" not in await reader.read(1000)
                writer.close()
            assert set(await asyncio.gather(*steady.values())) == {"ok"}
            await until(service.idle)

    run(test, loop=VirtualTimeLoop)


def test_slow_clients_hold_up_nobody_and_are_not_waited_for_for_ever():
    async def test():
        limits = {"body_timeout_s": 0.3, "client_timeout_s": 0.5}
        async with serving(request=limits) as service:
            host, port = "127.0.0.1", service.router.port
            silent, mute = await asyncio.open_connection(host, port)
            half, writer = await asyncio.open_connection(host, port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
            deaf = socket.socket()
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            deaf.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(deaf, (host, port))
            body = json.dumps(
                {
                    "model": "Llama-3.1-8B",
                    "prompt": "deaf",
                    "max_tokens": 31_000,
                    "ignore_eos": True,
                    "stream": True,
                }
            ).encode()
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            await loop.sock_sendall(deaf, head.encode() + body)
            await service.served_by("beside", 12)
            async with asyncio.timeout(3):
                assert b" 408 " in await half.readline()
            for open_one in (deaf, writer, mute):
                open_one.close()
            await until(service.idle)
            del silent

    run(test, loop=VirtualTimeLoop)


def test_without_a_known_key_there_is_no_service(monkeypatch):
    monkeypatch.setenv("ROUTER_KEYS", "alice=secret-key-of-alice")

    async def test():
        async with serving(auth={"keys_env": "ROUTER_KEYS"}) as service:
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "secret-key-of-alice"},
            ):
                assert await service.ask("x", headers=headers) == "401"
                for path in ("/v1/models", "/metrics"):
                    async with service.session.get(service.url + path, headers=headers) as response:
                        assert response.status == 401
            key = {"Authorization": "Bearer secret-key-of-alice"}
            assert await service.ask("x", headers=key) == "ok"
            assert sum(s.state()["steps"] for s in service.fleet.servers.values()) > 0

    run(test, loop=VirtualTimeLoop)
