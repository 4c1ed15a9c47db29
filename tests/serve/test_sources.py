"""Sources of replicas: names of the DNS, templates, and a router that follows them."""

from __future__ import annotations

import asyncio
import json
import logging

import aiohttp
import pytest
from pydantic import ValidationError

from servegym.serve.discovery import sources
from servegym.serve.discovery.config import DiscoverConfig, DnsConfig, TemplateConfig
from servegym.serve.discovery.dns import DnsNames
from servegym.serve.discovery.found import Found, described
from servegym.serve.router.app import Router
from servegym.serve.router.config import parse_config
from servegym.serve.router.probe import probe

from .api_server import NAMESPACE, PODS, ApiServer, pod
from .running import RATES, Running, run, until
from .upstream import Upstream

FAST = {"prefill_tokens_per_s": 9000.0, "decode_step_s": 0.001}


def test_the_first_template_that_fits_describes_a_replica():
    templates = [
        TemplateConfig(names="h100-*", rates=FAST, metrics_path="/prometheus/metrics"),
        TemplateConfig(labels={"gpu": "h100", "tier": "gpu"}, rates=FAST),
        TemplateConfig(labels={"gpu": "a10"}, rates=RATES),
    ]
    found = [
        Found("h100-1", "10.0.0.1", 8000),
        Found("x", "10.0.0.2", 8000, labels={"gpu": "h100", "tier": "gpu", "more": "1"}),
        Found("y", "fd00::3", 8000, "https", {"gpu": "a10"}),
        Found("z", "10.0.0.4", 8000, labels={"gpu": "h100"}),
        Found("h100-2", "10.0.0.5]", 8000),
    ]
    replicas, complaints = described(found, templates)
    assert complaints == [
        "no template fits z: it is left out",
        "http://10.0.0.5]:8000 is no url: h100-2 is left out",
    ]
    assert [(r.name, r.url, r.metrics_page) for r in replicas] == [
        ("h100-1", "http://10.0.0.1:8000", "http://10.0.0.1:8000/prometheus/metrics"),
        ("x", "http://10.0.0.2:8000", "http://10.0.0.2:8000/metrics"),
        ("y", "https://[fd00::3]:8000", "https://[fd00::3]:8000/metrics"),
    ]
    assert [r.rates.prefill_tokens_per_s for r in replicas] == [9000.0, 9000.0, 1000.0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"templates": [{"rates": RATES}]}, "needs dns or kubernetes"),
        ({"dns": [{"name": "a", "port": 1}], "templates": []}, "at least 1 item"),
        ({"dns": [{"name": "a", "port": 1}], "templates": [{}]}, "needs either hardware or rates"),
    ],
)
def test_a_wrong_configuration_is_refused(given, words):
    with pytest.raises(ValidationError, match=words):
        DiscoverConfig(**given)


def test_a_name_is_looked_up_again_and_a_failure_changes_nothing(caplog):
    caplog.set_level(logging.ERROR)
    answers: list = [
        [(2, 1, 6, "", ("10.0.0.2", 8000)), (2, 1, 6, "", ("10.0.0.1", 8000))],
        OSError(-2, "Name or service not known"),
        OSError(-2, "Name or service not known"),
        [(10, 1, 6, "", ("fd00::1", 8000, 0, 0))],
    ]

    async def test():
        async def getaddrinfo(host, port, **settings):
            assert (host, port) == ("vllm.serving.svc", 8000)
            answer = answers.pop(0)
            if isinstance(answer, OSError):
                raise answer
            return answer

        asyncio.get_running_loop().getaddrinfo = getaddrinfo
        told = []
        async for found in DnsNames(
            DnsConfig(name="vllm.serving.svc", port=8000, every_s=0.001)
        ).watch():
            told.append([server.url for server in found])
            if not answers:
                break
        assert told == [
            ["http://10.0.0.1:8000", "http://10.0.0.2:8000"],
            ["http://[fd00::1]:8000"],
        ]
        assert caplog.text.count("Name or service not known; its replicas stay") == 1

    run(test, loop=asyncio.new_event_loop)


async def serving(discover: dict) -> Running:
    config = parse_config(
        {
            "discover": discover,
            "listen": {"port": 0, "admin_port": 0},
            "health": {"interval_s": 0.05},
            "request": {"expose_replica": True},
        },
        "test",
    )
    router = Router(config)
    await router.start()
    return Running(router, [], aiohttp.ClientSession(), {})


async def ended(it: Running) -> None:
    await it.client.close()
    await it.router.stop()


def test_a_router_serves_with_what_the_dns_says():
    async def test():
        replica = Upstream()
        await replica.start()
        dns = {"name": "localhost", "port": replica.port, "every_s": 0.05}
        it = await serving({"dns": [dns], "templates": [{"names": "127.*", "rates": RATES}]})
        try:
            status, _, headers = await it.post({"prompt": "hi"})
            assert (status, headers["X-Servegym-Replica"]) == (200, f"127.0.0.1:{replica.port}")
            status, _ = await it.operate("/replicas", {})
            assert status == 400
            async with it.client.delete(
                f"{it.admin}/replicas/127.0.0.1:{replica.port}"
            ) as response:
                assert response.status == 409
                assert "comes from dns localhost" in (await response.text())
        finally:
            await ended(it)
            await replica.stop()

    run(test)


def test_a_check_looks_where_replicas_are_to_be_found(monkeypatch):
    monkeypatch.setattr(sources, "_FIRST_S", 0.5)

    async def test():
        replica = Upstream()
        await replica.start()
        names = [{"name": n, "port": replica.port} for n in ("localhost", "no.invalid")]
        discover = {"dns": names, "templates": [{"names": "127.*", "rates": RATES}]}
        replica.healthy = False
        said = await probe(parse_config({"discover": discover}, "test"))
        await replica.stop()
        assert "dns no.invalid has named no replicas in 0.5 s" in said
        place = f"127.0.0.1:{replica.port}"
        (health,) = (line for line in said if line.startswith(place))
        assert health.startswith(f"{place}: http://{place}/health answers 503")

    run(test)


def test_a_router_follows_the_pods_that_kubernetes_names(tmp_path, caplog):
    caplog.set_level(logging.ERROR)

    async def test():
        replica, api = Upstream(), ApiServer()
        await replica.start()
        await api.start()
        (tmp_path / "token").write_text(api.token)
        labels = {"app": "llama", "gpu": "fast"}
        kubernetes = {
            "selector": {"app": "llama"},
            "port": replica.port,
            "namespace": NAMESPACE,
            "server": api.url,
            "token_file": str(tmp_path / "token"),
        }
        templates = [{"labels": {"gpu": "fast"}, "rates": FAST}]
        it = await serving({"kubernetes": [kubernetes], "templates": templates})
        try:
            status, text = await it.get("/health")
            assert (status, json.loads(text)["replicas"]) == (503, 0)  # there is no pod
            await api.set(PODS, pod("llama-0", "127.0.0.1", labels))
            await api.set(PODS, pod("llama-1", "127.0.0.9", {"app": "llama"}))
            status, _, headers = await it.post({"prompt": "hi"})
            assert (status, headers["X-Servegym-Replica"]) == (200, "llama-0")
            slot = it.router.fleet["llama-0"].slot
            assert it.state.describe(slot)["prefill_tokens_per_s"] == 9000.0
            await until(lambda: "no template fits llama-1: it is left out" in caplog.text)
            assert len(it.router.fleet) == 1
            await api.delete(PODS, "llama-0")
            await until(lambda: len(it.router.fleet) == 0)
            await until(lambda: not it.router.fleet.leaving)
        finally:
            await ended(it)
            await api.stop()
            await replica.stop()

    run(test)
