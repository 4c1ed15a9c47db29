"""Replicas that come and go behind a picker: operators, a watched file, an InferencePool."""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp
import pytest
import yaml

from servegym.errors import ConfigError
from servegym.serve.picker.app import Picker
from servegym.serve.picker.config import PickerConfig

from ..api_server import NAMESPACE, PODS, POOL, ApiServer, pod  # noqa: TID252 - tests are no package
from ..running import RATES, run, until  # noqa: TID252
from ..upstream import Upstream  # noqa: TID252
from .gateway import DESTINATION, DUPLEX, NONE, body_of, destination, event, picking

DONE = b"data: [DONE]\n\n"


@contextlib.asynccontextmanager
async def upstream():
    one = Upstream()
    await one.start()
    try:
        yield one
    finally:
        await one.stop()


def endpoint(replica: Upstream) -> str:
    return f"127.0.0.1:{replica.port}"


async def operate(gateway, method: str, path: str, body=None) -> tuple[int, dict]:
    url = f"http://127.0.0.1:{gateway.picker.admin_port}{path}"
    async with (
        aiohttp.ClientSession() as client,
        client.request(method, url, json=body) as response,
    ):
        return response.status, await response.json()


async def place(gateway, *modes: int, **headers) -> tuple[object, str]:
    """Begin with a request; return it and where it goes."""
    stream = gateway.stream(*modes)
    return stream, await gateway.send_to(stream, body_of(stream=True), **headers)


def test_one_that_joins_is_chosen_and_one_that_leaves_only_ends_what_it_has():
    async def test():
        async with picking(1, fallbacks=1) as gateway, upstream() as newcomer:
            fleet = gateway.picker.fleet
            stream, to = await place(gateway)
            assert to == gateway.endpoints[0]
            await stream.answer()
            new = {"name": "new", "url": newcomer.url, "rates": RATES}
            status, said = await operate(gateway, "POST", "/replicas", new)
            assert (status, said["takes_requests"]) == (201, False)
            await until(lambda: gateway.state.is_up(fleet["new"].slot))
            # a fallback, too: r0 has one request and the newcomer none
            _, to = await place(gateway)
            assert to == f"{endpoint(newcomer)},{gateway.endpoints[0]}"
            status, said = await operate(gateway, "DELETE", "/replicas/r0")
            assert (status, said["outstanding_requests"]) == (200, 1)
            assert [(await place(gateway))[1] for _ in range(3)] == [endpoint(newcomer)] * 3
            assert [member.replica.name for member in fleet.leaving] == ["r0"]
            # its answer comes back through the picker as if nothing had happened
            await stream.response_headers()
            await stream.answer()
            await stream.body("response", event("a"), ends=False)
            await stream.answer()
            assert gateway.state._generated[0] == 1
            await stream.body("response", event("", "stop") + DONE, ends=True)
            await stream.answer()
            await until(lambda: not fleet.leaving)
            assert gateway.picker.telemetry.outcomes == {"finished": 1}
            assert gateway.picker.dispatcher.names == ["", "new"]
            _, page = await operate(gateway, "GET", "/state")
            assert [replica["name"] for replica in page["replicas"]] == ["new"]

    run(test, loop=asyncio.new_event_loop)


def test_one_that_leaves_stays_until_its_unseen_requests_have_ended():
    async def test():
        settings = {"ends": {"look_s": 0.02, "settle_s": 0.05}, "metrics": {"interval_s": 0.02}}
        async with picking(2, response="none", **settings) as gateway:
            for replica in gateway.replicas:
                replica.running = 1
            for _ in range(2):
                stream, _ = await place(gateway, DUPLEX, NONE)
                await stream.done()
            await until(lambda: gateway.picker.telemetry.in_flight == 0)
            assert gateway.outstanding() == [1, 1]
            gateway.picker.fleet.remove("r0")
            assert len(gateway.picker.fleet.leaving) == 1
            gateway.replicas[0].running = 0  # so its own metrics say, which are still asked for
            await until(lambda: not gateway.picker.fleet.leaving)
            assert gateway.picker.ends.num_counted == 1
            assert gateway.picker.dispatcher.names == ["", "r1"]

    run(test, loop=asyncio.new_event_loop)


def test_a_request_for_an_endpoint_that_is_not_there_yet_waits_for_it():
    async def test():
        async with picking(1) as gateway, upstream() as newcomer:
            stream = gateway.stream()
            hint = {"envoy.lb.subset_hint": {f"{DESTINATION}-subset": [endpoint(newcomer)]}}
            await stream.request_headers(metadata=hint)
            await stream.body("request", body_of(), ends=True)
            await until(lambda: gateway.state.num_held == 1)
            new = {"name": "new", "url": newcomer.url, "rates": RATES}
            await operate(gateway, "POST", "/replicas", new)
            assert destination(await stream.answer()) == endpoint(newcomer)
            # under a new name it is another one: the old one leaves, the new one is meant
            status, _ = await operate(gateway, "DELETE", "/replicas/new")
            assert status == 200
            await operate(gateway, "POST", "/replicas", {**new, "name": "again"})
            slot = gateway.picker.fleet["again"].slot
            await until(lambda: gateway.state.is_up(slot))
            _, to = await place(gateway, metadata=hint)
            assert to == endpoint(newcomer)
            assert gateway.state.outstanding(slot) == 1
            # an answer to the old one's request is its own, though the endpoint is the same
            await stream.answer()
            await stream.response_headers(served=endpoint(newcomer))
            await stream.answer()
            assert (gateway.state.outstanding(1), gateway.state.outstanding(slot)) == (1, 1)
            assert gateway.picker.telemetry.upstream_failures == {}
            # one that the gateway has tried there again is at the new one
            other, to = await place(gateway)
            assert to == gateway.endpoints[0]
            await other.answer()
            await other.response_headers(served=endpoint(newcomer))
            await other.answer()
            assert [gateway.state.outstanding(r) for r in (0, 1, slot)] == [0, 1, 2]
            assert gateway.picker.telemetry.upstream_failures == {("r0", "disconnected"): 1}

    run(test, loop=asyncio.new_event_loop)


def test_a_file_of_replicas_is_followed_and_one_that_gateways_cannot_name_changes_nothing(
    tmp_path, caplog
):
    path = tmp_path / "replicas.yaml"

    async def test():
        async with upstream() as a, upstream() as b:
            entries = [
                {"name": name, "url": one.url, "rates": RATES} for name, one in (("a", a), ("b", b))
            ]
            path.write_text(yaml.safe_dump(entries[:1]))
            async with picking(0, replicas_file=str(path)) as gateway:
                assert (await place(gateway))[1] == endpoint(a)
                path.write_text(yaml.safe_dump([{**entries[1], "url": "http://engine.svc:8000"}]))
                gateway.picker.read_anew()
                await until(lambda: "replica b must have an IP address in its url" in caplog.text)
                assert [member.replica.name for member in gateway.picker.fleet] == ["a"]
                path.write_text(yaml.safe_dump(entries[1:]))
                gateway.picker.read_anew()
                await until(lambda: "b" in gateway.picker.fleet)
                await until(lambda: gateway.state.is_up(gateway.picker.fleet["b"].slot))
                assert (await place(gateway))[1] == endpoint(b)
                named = {"name": "c", "url": "http://engine.svc:8000", "rates": RATES}
                status, said = await operate(gateway, "POST", "/replicas", named)
                assert status == 400
                assert "replica c must have an IP address" in said["error"]["message"]
                assert "c" not in gateway.picker.fleet

    run(test, loop=asyncio.new_event_loop)


def test_pods_of_an_inference_pool_are_chosen_as_they_come_and_go(tmp_path):
    async def test():
        async with upstream() as replica:
            api = ApiServer()
            await api.start()
            (tmp_path / "token").write_text(api.token)
            labels = {"app": "llama"}
            api.documents[POOL] = {
                "spec": {
                    "selector": {"matchLabels": labels},
                    "targetPorts": [{"number": replica.port}],
                }
            }
            await api.set(PODS, pod("llama-0", "127.0.0.1", labels))
            source = {
                "pool": "llama",
                "namespace": NAMESPACE,
                "server": api.url,
                "token_file": str(tmp_path / "token"),
            }
            discover = {"kubernetes": [source], "templates": [{"rates": RATES}]}
            try:
                async with picking(0, discover=discover) as gateway:
                    _, to = await place(gateway)
                    assert to == endpoint(replica)
                    await api.delete(PODS, "llama-0")
                    await until(lambda: len(gateway.picker.fleet) == 0)
                    held = gateway.stream()
                    await held.request_headers()
                    await held.body("request", body_of(), ends=True)
                    await until(lambda: gateway.state.num_held == 1)
                    await api.set(PODS, pod("llama-1", "127.0.0.1", labels))
                    assert destination(await held.answer()) == endpoint(replica)
            finally:
                await api.stop()

    run(test, loop=asyncio.new_event_loop)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "there is no replica: give replicas, replicas_file or discover"),
        (
            {
                "discover": {
                    "dns": [{"name": "a", "port": 1, "scheme": "https"}],
                    "templates": [{"rates": RATES}],
                }
            },
            "discover needs scheme: http, got https",
        ),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        PickerConfig.model_validate(settings)


def test_a_picker_does_not_start_with_a_file_that_gateways_cannot_follow(tmp_path):
    path = tmp_path / "replicas.yaml"
    config = PickerConfig(replicas_file=path)
    with pytest.raises(ConfigError, match="there is no file of replicas at"):
        Picker(config)
    path.write_text(
        "- {name: a, url: 'https://10.0.0.1', "
        "rates: {prefill_tokens_per_s: 1000, decode_step_s: 0.01}}"
    )
    with pytest.raises(
        ConfigError, match=r"replicas\.yaml: the url of replica a must be like http://10\.0\.0\.1"
    ):
        Picker(config)
