"""Replicas in Kubernetes, followed by list and watch, against a small API server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import ssl
import subprocess

import pytest
from pydantic import ValidationError

from servegym.serve.discovery import collection, kubernetes
from servegym.serve.discovery.config import KubernetesConfig
from servegym.serve.discovery.kubernetes import KubernetesPods

from .api_server import NAMESPACE, PODS, POOL, SLICES, ApiServer, endpoint_slice, pod
from .running import run, until


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(collection, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(kubernetes, "_SHORT_S", 0.0)


class Followed:
    """The servers that a source has named last."""

    def __init__(self, config: KubernetesConfig) -> None:
        self.found = None
        self.num_told = 0
        self._task = asyncio.create_task(self._follow(KubernetesPods(config)))

    async def _follow(self, source: KubernetesPods) -> None:
        async for found in source.watch():
            self.found = found
            self.num_told += 1

    def urls(self) -> dict[str, str] | None:
        return None if self.found is None else {f.name: f.url for f in self.found}

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@contextlib.asynccontextmanager
async def followed(tmp_path, api: ApiServer, tls=None, **what):
    await api.start(tls)
    (tmp_path / "token").write_text(api.token + "\n")
    (tmp_path / "namespace").write_text(NAMESPACE)
    files = {f"{name}_file": tmp_path / name for name in ("token", "namespace")}
    one = Followed(KubernetesConfig(server=api.url, **files, **what))
    try:
        yield one
    finally:
        await one.stop()
        await api.stop()


def test_endpoints_of_a_service_are_followed(tmp_path):
    async def test():
        api = ApiServer()
        await api.set(SLICES, endpoint_slice("vllm-1", {"a": "10.0.0.1", "b": "10.0.0.2"}))
        await api.set(SLICES, endpoint_slice("other", {"x": "10.0.9.9"}, service="other"))
        async with followed(tmp_path, api, service="vllm") as it:
            await until(lambda: it.urls() is not None)
            assert it.urls() == {"a": "http://10.0.0.1:8000", "b": "http://10.0.0.2:8000"}
            labels = it.found[0].labels
            assert labels["kubernetes.io/hostname"] == "node-of-a"
            assert labels["topology.kubernetes.io/zone"] == "z1"
            # a second slice; then the first loses one, and goes
            await api.set(SLICES, endpoint_slice("vllm-2", {"c": "10.0.0.3"}))
            await until(lambda: set(it.urls()) == {"a", "b", "c"})
            await api.set(SLICES, endpoint_slice("vllm-1", {"b": "10.0.0.2"}))
            await until(lambda: set(it.urls()) == {"b", "c"})
            await api.delete(SLICES, "vllm-1")
            await until(lambda: set(it.urls()) == {"c"})
            assert api.lists() == 1

    run(test)


def test_endpoints_that_are_being_ended_leave_and_unready_ones_stay(tmp_path):
    async def test():
        api = ApiServer()
        item = endpoint_slice("vllm-1", {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"})
        item["endpoints"][0]["conditions"] = {"ready": False, "serving": True, "terminating": True}
        item["endpoints"][1]["conditions"] = {"ready": False, "serving": False}
        await api.set(SLICES, item)
        async with followed(tmp_path, api, service="vllm") as it:
            await until(lambda: it.urls() is not None)
            assert set(it.urls()) == {"b", "c"}

    run(test)


def test_a_watch_that_breaks_off_goes_on_from_its_last_version(tmp_path):
    async def test():
        api = ApiServer()
        await api.set(SLICES, endpoint_slice("vllm-1", {"a": "10.0.0.1"}))
        async with followed(tmp_path, api, service="vllm") as it:
            await until(lambda: api.watches() == ["11"])
            await api.bookmark(SLICES)
            await asyncio.sleep(0.05)  # the bookmark is on its way
            api.cut()
            await until(lambda: len(api.watches()) == 2)
            assert api.watches() == ["11", "12"]
            assert api.lists() == 1
            assert it.num_told == 1
            await api.set(SLICES, endpoint_slice("vllm-1", {"b": "10.0.0.2"}))
            await until(lambda: set(it.urls()) == {"b"})

    run(test)


def test_a_version_that_the_server_has_forgotten_means_to_list_anew(tmp_path):
    async def test():
        api = ApiServer()
        await api.set(SLICES, endpoint_slice("vllm-1", {"a": "10.0.0.1"}))
        async with followed(tmp_path, api, service="vllm") as it:
            await until(lambda: len(api.watches()) == 1)
            await api.forget()  # within the watch
            await until(lambda: len(api.watches()) == 2)
            assert api.lists() == 2
            # at the beginning of a watch; what went meanwhile is found gone
            del api.objects[SLICES]["vllm-1"]
            api.version += 5
            api.oldest = api.version
            api.cut()
            await until(lambda: it.urls() == {})
            assert api.lists() == 3

    run(test)


def test_a_long_list_comes_in_pages(tmp_path):
    async def test():
        api = ApiServer()
        api.page = 2
        for i in range(5):
            await api.set(SLICES, endpoint_slice(f"vllm-{i}", {f"p{i}": f"10.0.0.{i}"}))
        async with followed(tmp_path, api, service="vllm") as it:
            await until(lambda: it.urls() is not None)
            assert set(it.urls()) == {f"p{i}" for i in range(5)}
            assert api.lists() == 3

    run(test)


def test_pods_of_an_inference_pool_are_followed_at_all_its_ports(tmp_path):
    async def test():
        api = ApiServer()
        spec = {
            "selector": {"matchLabels": {"app": "llama"}},
            "targetPorts": [{"number": 8000}],
        }
        api.documents[POOL] = {"spec": spec}
        await api.set(PODS, pod("a", "10.0.0.1", {"app": "llama", "gpu": "h100"}))
        await api.set(PODS, pod("b", "", {"app": "llama"}))  # has no address yet
        await api.set(PODS, pod("c", "10.0.0.3", {"app": "other"}))
        async with followed(tmp_path, api, pool="llama") as it:
            await until(lambda: it.urls() is not None)
            assert it.urls() == {"a": "http://10.0.0.1:8000"}
            assert it.found[0].labels == {
                "app": "llama",
                "gpu": "h100",
                "kubernetes.io/hostname": "node-1",
            }
            await api.set(PODS, pod("b", "10.0.0.2", {"app": "llama"}))
            await until(lambda: set(it.urls()) == {"a", "b"})
            gone = pod("a", "10.0.0.1", {"app": "llama"}, deletionTimestamp="2026-01-01T00:00:00Z")
            await api.set(PODS, gone)
            await until(lambda: set(it.urls()) == {"b"})
            # the pool is looked at again when a watch has ended
            spec["targetPorts"].append({"number": 8001})
            api.cut()
            await until(lambda: len(it.urls()) == 2)
            assert it.urls() == {"b:8000": "http://10.0.0.2:8000", "b:8001": "http://10.0.0.2:8001"}

    run(test)


def test_pods_may_be_named_by_their_labels(tmp_path):
    async def test():
        api = ApiServer()
        await api.set(PODS, pod("a", "fd00::1", {"app": "llama", "tier": "gpu"}))
        await api.set(PODS, pod("b", "10.0.0.2", {"app": "llama"}))
        what = {"selector": {"tier": "gpu", "app": "llama"}, "port": 8000, "scheme": "https"}
        async with followed(tmp_path, api, **what) as it:
            await until(lambda: it.urls() is not None)
            assert it.urls() == {"a": "https://[fd00::1]:8000"}

    run(test)


def test_what_the_server_refuses_is_said_once_and_tried_again(tmp_path, caplog):
    caplog.set_level(logging.ERROR)

    async def test():
        api = ApiServer()
        await api.set(SLICES, endpoint_slice("vllm-1", {"a": "10.0.0.1"}))
        async with followed(tmp_path, api, service="vllm") as it:
            await until(lambda: it.urls() is not None)
            api.token = "second-token"  # it expires
            api.cut()
            await until(lambda: sum("watch" in query for _, query in api.asked) >= 2)
            await until(lambda: "answers 401: Unauthorized; its replicas stay" in caplog.text)
            assert set(it.urls()) == {"a"}
            (tmp_path / "token").write_text("second-token")
            await api.set(SLICES, endpoint_slice("vllm-1", {"b": "10.0.0.2"}))
            await until(lambda: set(it.urls()) == {"b"})
            assert caplog.text.count("answers 401") == 1

    run(test)


def test_a_service_with_several_ports_needs_one_named(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    ports = [{"name": "http", "port": 8000}, {"name": "metrics", "port": 9000}]

    async def test(port, wanted):
        api = ApiServer()
        await api.set(SLICES, endpoint_slice("vllm-1", {"a": "10.0.0.1"}, ports=ports))
        async with followed(tmp_path, api, service="vllm", port=port) as it:
            if wanted is None:
                await until(lambda: "has the ports http:8000, metrics:9000: name" in caplog.text)
            else:
                await until(lambda: it.urls() == {"a": wanted})

    run(lambda: test(None, None))
    run(lambda: test("metrics", "http://10.0.0.1:9000"))
    run(lambda: test(8000, "http://10.0.0.1:8000"))


def test_the_api_server_is_trusted_by_its_authority_only(tmp_path, caplog):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not there")
    caplog.set_level(logging.ERROR)
    for name in ("server", "other"):
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
                *("-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.crt"),
                *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            ],
            check=True,
            capture_output=True,
        )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")

    async def test(authority, good):
        api = ApiServer()
        await api.set(SLICES, endpoint_slice("vllm-1", {"a": "10.0.0.1"}))
        what = {"service": "vllm", "ca_file": tmp_path / f"{authority}.crt"}
        async with followed(tmp_path, api, tls, **what) as it:
            if good:
                await until(lambda: it.urls() is not None)
                assert set(it.urls()) == {"a"}
            else:
                await until(lambda: "certificate verify failed" in caplog.text)
                assert it.urls() is None

    run(lambda: test("server", True))
    run(lambda: test("other", False))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "needs one of service, pool and selector"),
        ({"service": "a", "pool": "b"}, "needs one of service, pool and selector"),
        ({"selector": {"a": "b"}}, "selector needs a port, by number"),
        ({"pool": "a", "port": 8000}, "a pool names its ports itself"),
    ],
)
def test_a_wrong_configuration_is_refused(given, words):
    with pytest.raises(ValidationError, match=words):
        KubernetesConfig(**given)
