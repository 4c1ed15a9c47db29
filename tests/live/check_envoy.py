"""Send requests through the real Envoy, which asks the endpoint picker where they go.

    python check_envoy.py /path/to/envoy

Envoy gets `examples/envoy.yaml`, but for its ports and its modes of bodies; two small engines, the
picker and the clients are in this process. Every line printed has been asserted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/serve"))

from upstream import Upstream  # noqa: E402

from servegym.serve.picker.app import Picker  # noqa: E402
from servegym.serve.picker.config import PickerConfig  # noqa: E402

RATES = {"prefill_tokens_per_s": 1000.0, "decode_step_s": 0.01}
NUM_AT_ONCE = 60


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def envoy_config(
    port: int, picker_port: int, engines: list[int], modes: dict[str, str], *, hint: bool
) -> Any:
    """Return the example's configuration with other ports and modes.

    Args:
        port: Envoy's.
        picker_port: The picker's.
        engines: Ports of the engines.
        modes: Of bodies, headers and trailers, in place of the example's.
        hint: Whether Envoy says that the second engine must be chosen.
    """
    data = yaml.safe_load((ROOT / "examples/envoy.yaml").read_text())
    resources = data["static_resources"]
    (listener,) = resources["listeners"]
    listener["address"]["socket_address"]["port_value"] = port
    (chain,) = listener["filter_chains"]
    manager = chain["filters"][0]["typed_config"]
    manager["http_filters"][0]["typed_config"]["processing_mode"].update(modes)
    if hint:
        endpoints = [f"127.0.0.1:{engines[1]}"]
        entry = {
            "metadata_namespace": "envoy.lb.subset_hint",
            "value": {"x-gateway-destination-endpoint-subset": endpoints},
        }
        kind = "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config"
        setter = {"@type": kind, "metadata": [entry]}
        manager["http_filters"].insert(
            0, {"name": "envoy.filters.http.set_metadata", "typed_config": setter}
        )
    for cluster, ports in zip(resources["clusters"], (engines, [picker_port]), strict=True):
        (group,) = cluster["load_assignment"]["endpoints"]
        example = group["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
        group["lb_endpoints"] = [
            {"endpoint": {"address": {"socket_address": {**example, "port_value": each}}}}
            for each in ports
        ]
    return data


class Setup:
    """Engines, picker and Envoy, and a client of the last."""

    def __init__(self, picker: Picker, engines: list[Upstream], client: Any, port: int) -> None:
        self.picker, self.engines, self.client = picker, engines, client
        self.url = f"http://127.0.0.1:{port}"
        self.state = picker.dispatcher.state

    async def post(self, **body: Any) -> tuple[int, bytes]:
        """Ask for a completion; return its status and all of the answer."""
        asked = {"model": "m", "prompt": "hello", **body}
        async with self.client.post(f"{self.url}/v1/completions", json=asked) as response:
            return response.status, await response.read()

    def outstanding(self) -> int:
        """Requests that are somewhere in the books."""
        return sum(self.state.outstanding(r) for r in range(len(self.engines)))

    async def idle(self, timeout_s: float = 5.0) -> None:
        """Wait until nothing is left in the books."""
        async with asyncio.timeout(timeout_s):
            while self.outstanding() or self.picker.telemetry.in_flight:
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def setup(
    envoy: str, modes: dict[str, str] | None = None, *, hint: bool = False, **settings: Any
) -> AsyncIterator[Setup]:
    """Start everything; stop it again."""
    engines = [Upstream() for _ in range(2)]
    for engine in engines:
        await engine.start()
    data = {
        "replicas": [
            {"name": f"r{i}", "url": engine.url, "rates": RATES} for i, engine in enumerate(engines)
        ],
        "listen": {"port": 0, "admin_port": 0},
        "dispatch": {"runtime": {"policy": "least-outstanding"}},
        "metrics": {"interval_s": 0.05},
        "request": {"max_hold_s": 1.0},
        "drain_s": 1.0,
        **settings,
    }
    picker = Picker(PickerConfig.model_validate(data))
    await picker.start()
    port = free_port()
    ports = [engine.port for engine in engines]
    config = envoy_config(port, picker.port, ports, modes or {}, hint=hint)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "envoy.yaml"
        path.write_text(yaml.safe_dump(config))
        log = (Path(folder) / "log").open("wb")
        process = await asyncio.create_subprocess_exec(
            *(envoy, "-c", str(path), "--use-dynamic-base-id", "--concurrency", "1", "-l", "warn"),
            stdout=log,
            stderr=log,
        )
        async with aiohttp.ClientSession() as client:
            try:
                await listening(port)
                yield Setup(picker, engines, client, port)
            except BaseException:
                print((Path(folder) / "log").read_text()[-4000:])
                raise
            finally:
                process.terminate()
                await process.wait()
                log.close()
                await picker.stop()
                for engine in engines:
                    await engine.stop()


async def listening(port: int) -> None:
    """Wait until a port takes connections."""
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return


async def whole_protocol(envoy: str) -> None:
    """Bodies of requests and of answers, both ways at once, as the protocol asks for."""
    async with setup(envoy, fallbacks=1) as s:
        for engine in s.engines:
            engine.tokens = 20
        status, answer = await s.post(stream=True)
        assert (status, answer.count(b"data: ")) == (200, 21), answer
        await s.idle()
        assert s.picker.telemetry.outcomes == {"finished": 1}
        assert s.picker.telemetry.latencies.total(lambda times: times.ttft).count == 1
        print("a stream of 20 tokens: passed whole, its first token and its end booked")

        status, answer = await s.post()
        assert (status, json.loads(answer)["usage"]["completion_tokens"]) == (200, 20)
        await s.idle()
        print("an answer in one piece: passed whole and booked")

        long = "x" * 3_000_000
        status, _ = await s.post(prompt=long, stream=True)
        assert status == 200
        assert any(body["prompt"] == long for engine in s.engines for body in engine.bodies)
        await s.idle()
        print("a body of 3 MB: passed whole")

        for engine in s.engines:
            engine.bodies.clear()
            engine.gap_s = 0.1
        answers = await asyncio.gather(*(s.post(stream=True) for _ in range(NUM_AT_ONCE)))
        assert all(status == 200 and answer.count(b"data: ") == 21 for status, answer in answers)
        await s.idle()
        shares = sorted(len(engine.bodies) for engine in s.engines)
        assert shares == [NUM_AT_ONCE // 2, NUM_AT_ONCE // 2], shares
        print(f"{NUM_AT_ONCE} streams at once: all whole, {shares[0]} and {shares[1]} by engine")

        for engine in s.engines:
            engine.gap_s = 0.2
        ending = asyncio.create_task(s.post(stream=True))
        await asyncio.sleep(0.5)
        assert s.outstanding() == 1
        ending.cancel()
        await s.idle()
        assert s.picker.telemetry.outcomes["cancelled"] == 1
        print("a client that leaves: cancelled in the books")

        s.engines[0].mode, s.engines[1].mode = 503, "ok"
        for engine in s.engines:
            engine.gap_s = 0.0
            engine.bodies.clear()
        done = [await s.post(stream=True) for _ in range(4)]
        await s.idle()
        assert [status for status, _ in done] == [200] * 4, done
        assert s.engines[0].bodies
        assert len(s.engines[1].bodies) == 4
        print("an engine that is full: Envoy goes to the fallback, and the books follow it")

        s.engines[0].mode = "ok"
        async with s.client.get(f"{s.url}/v1/models") as response:
            assert response.status == 200
        print("a list of models: from one of the engines")

        for engine in s.engines:
            engine.healthy = False
        async with asyncio.timeout(10):
            while s.state.up.any():
                await asyncio.sleep(0.05)
        status, answer = await s.post()
        assert (status, json.loads(answer)["error"]["code"]) == (503, "no_replica")
        print("no engine is up: 503, in OpenAI's form")


async def refused(envoy: str) -> None:
    """What the picker answers itself."""
    dispatch = {
        "runtime": {"policy": "added-delay-reject:ttft=0.1"},
        "slo_classes": [{"name": "hasty", "ttft_s": 1e-6, "tpot_s": 1e-6}],
        "allow_reject": True,
    }
    async with setup(envoy, dispatch=dispatch) as s:
        status, answer = await s.post()
        assert (status, json.loads(answer)["error"]["code"]) == (429, "overloaded")
        async with s.client.post(f"{s.url}/v1/completions", data=b"{") as response:
            assert response.status == 400
            assert json.loads(await response.read())["error"]["code"] == "invalid_json"
        assert not any(engine.bodies for engine in s.engines)
        await s.idle()
        print("a request the policy rejects: 429; one that is no JSON: 400; no engine sees them")


async def hinted(envoy: str) -> None:
    """A gateway that says among whom to choose."""
    async with setup(envoy, hint=True) as s:
        done = await asyncio.gather(*(s.post(stream=True) for _ in range(4)))
        assert [status for status, _ in done] == [200] * 4
        await s.idle()
        assert [len(engine.bodies) for engine in s.engines] == [0, 4]
        s.engines[1].healthy = False
        async with asyncio.timeout(10):
            while s.state.is_up(1):
                await asyncio.sleep(0.05)
        assert (await s.post())[0] == 503
        print("a subset of one engine: only it is chosen, and without it 503")


async def less_is_sent(envoy: str) -> None:
    """Gateways that send only requests, or buffer them."""
    buffered = {"request_body_mode": "BUFFERED", "request_trailer_mode": "SKIP"}
    async with setup(envoy, buffered) as s:
        status, answer = await s.post(stream=True)
        assert (status, answer.count(b"data: ")) == (200, 6)
        await s.idle()
        assert s.picker.telemetry.outcomes == {"finished": 1}
        print("request bodies buffered: passed and booked")

    silent = {"response_body_mode": "NONE", "response_trailer_mode": "SKIP"}
    for response, mode in (("headers", "SEND"), ("none", "SKIP")):
        modes = {**silent, "response_header_mode": mode}
        ends = {"look_s": 0.05, "settle_s": 0.2}
        async with setup(envoy, modes, response=response, ends=ends) as s:
            for engine in s.engines:
                engine.gap_s = 0.2  # a second in all
            answers = [asyncio.create_task(s.post(stream=True)) for _ in range(4)]
            await asyncio.sleep(0.7)
            assert s.outstanding() == 4  # Envoy has closed its streams, and nobody has ended
            assert all(status == 200 for status, _ in await asyncio.gather(*answers))
            await s.idle()
            assert s.picker.ends.num_counted == 4
            print(f"response {response}: four streams counted as ended when the engines had none")


async def without_picker(envoy: str) -> None:
    """A picker that has gone, and a gateway that does without."""
    async with setup(envoy) as s:
        assert (await s.post())[0] == 200
        await s.picker.stop()
        async with asyncio.timeout(10):
            while (await s.post())[0] != 200:  # its body was on the way to nobody
                await asyncio.sleep(0.1)
        for engine in s.engines:
            engine.bodies.clear()
        done = [await s.post(stream=True) for _ in range(4)]
        assert [status for status, _ in done] == [200] * 4
        assert [len(engine.bodies) for engine in s.engines] == [2, 2]
        print("the picker has gone: once Envoy knows it, requests go round robin")

    buffered = {"request_body_mode": "BUFFERED", "request_trailer_mode": "SKIP"}
    async with setup(envoy, buffered) as s:
        assert (await s.post())[0] == 200
        await s.picker.stop()
        done = [await s.post(stream=True) for _ in range(4)]
        assert [status for status, _ in done] == [200] * 4
        print("the same with request bodies buffered: at once")


async def check(envoy: str) -> None:
    """Check everything."""
    await whole_protocol(envoy)
    await refused(envoy)
    await hinted(envoy)
    await less_is_sent(envoy)
    await without_picker(envoy)


if __name__ == "__main__":
    asyncio.run(check(sys.argv[1]))
