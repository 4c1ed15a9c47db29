"""A tiny Kubernetes API server: list and watch as the API's documentation describes them."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Mapping

from aiohttp import web

NAMESPACE = "serving"
SLICES = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
POOL = f"/apis/inference.networking.k8s.io/v1/namespaces/{NAMESPACE}/inferencepools/llama"


class ApiServer:
    """Collections and documents by path.

    Attributes:
        objects: By path of the collection, by name.
        documents: Other things to be read, by path.
        page: Objects of a list at most.
        version: Of all that is there.
        oldest: Oldest version that a watch may begin at.
        token: That clients must have.
        asked: `(path, query)` of each request.
    """

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, dict]] = {SLICES: {}, PODS: {}}
        self.documents: dict[str, dict] = {}
        self.page = 500
        self.version = 10
        self.oldest = 0
        self.token = "first-token"
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.url = ""
        self._events: list[tuple[int, str, dict]] = []
        self._watches: set[web.StreamResponse] = set()
        self._news = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._get)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def set(self, path: str, item: dict) -> None:
        """Make or change an object."""
        self.version += 1
        name = item["metadata"]["name"]
        kind = "MODIFIED" if name in self.objects[path] else "ADDED"
        item = {**item, "metadata": {**item["metadata"], "resourceVersion": str(self.version)}}
        self.objects[path][name] = item
        await self._tell(kind, path, item)

    async def delete(self, path: str, name: str) -> None:
        self.version += 1
        item = self.objects[path].pop(name)
        item["metadata"]["resourceVersion"] = str(self.version)
        await self._tell("DELETED", path, item)

    async def bookmark(self, path: str) -> None:
        """Say that nothing has changed up to a version that is new."""
        self.version += 1
        item = {"metadata": {"resourceVersion": str(self.version)}}
        await self._tell("BOOKMARK", path, item)

    async def forget(self) -> None:
        """Forget all history, as an API server does after minutes; watches are told."""
        self.version += 1
        self.oldest = self.version
        status = {"kind": "Status", "code": 410, "message": "too old resource version"}
        await self._tell("ERROR", "", status)

    def cut(self) -> None:
        """Break off all watches."""
        for response in self._watches:
            response._req.transport.abort()

    def lists(self) -> int:
        """Return how often a collection was listed."""
        return sum(path in self.objects and "watch" not in query for path, query in self.asked)

    def watches(self) -> list[str]:
        """Return the versions that watches began at."""
        return [query["resourceVersion"] for _, query in self.asked if "watch" in query]

    async def _tell(self, kind: str, path: str, item: dict) -> None:
        async with self._news:
            self._events.append((self.version, path, {"type": kind, "object": item}))
            self._news.notify_all()

    async def _get(self, request: web.Request) -> web.StreamResponse:
        path, query = request.path, dict(request.query)
        self.asked.append((path, query))
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return _status(401, "Unauthorized")
        if path in self.documents:
            return web.json_response(self.documents[path])
        if path not in self.objects:
            return _status(404, f"{path} not found")
        if "watch" in query:
            return await self._watch(request, path, query)
        there = [i for _, i in sorted(self.objects[path].items()) if _has(i, query)]
        first = int(query.get("continue") or 0)
        page = there[first : first + min(self.page, int(query["limit"]))]
        metadata = {"resourceVersion": str(self.version)}
        if first + len(page) < len(there):
            metadata["continue"] = str(first + len(page))
        return web.json_response({"metadata": metadata, "items": page})

    async def _watch(
        self, request: web.Request, path: str, query: dict[str, str]
    ) -> web.StreamResponse:
        since = int(query["resourceVersion"])
        if since < self.oldest:
            return _status(410, "too old resource version")
        assert query["allowWatchBookmarks"] == "true"
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        self._watches.add(response)
        try:
            while True:
                for version, where, event in [e for e in self._events if e[0] > since]:
                    since = version
                    if where == path and (
                        event["type"] == "BOOKMARK" or _has(event["object"], query)
                    ):
                        await response.write(json.dumps(event).encode() + b"\n")
                    elif event["type"] == "ERROR":
                        await response.write(json.dumps(event).encode() + b"\n")
                        return response
                async with self._news:
                    await self._news.wait_for(lambda: self.version > since)
        finally:
            self._watches.discard(response)


def _has(item: Mapping, query: Mapping[str, str]) -> bool:
    wanted = dict(pair.split("=", 1) for pair in query["labelSelector"].split(","))
    return wanted.items() <= item["metadata"].get("labels", {}).items()


def _status(code: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": message}, status=code)


def endpoint_slice(name: str, hosts: Mapping[str, str], service: str = "vllm", **more) -> dict:
    """Write an EndpointSlice; `hosts` are addresses by the names of their pods."""
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8000}],
        "endpoints": [
            {
                "addresses": [host],
                "conditions": {"ready": True},
                "targetRef": {"kind": "Pod", "name": pod},
                "nodeName": f"node-of-{pod}",
                "zone": "z1",
            }
            for pod, host in hosts.items()
        ],
        **more,
    }


def pod(name: str, host: str, labels: Mapping[str, str], **metadata) -> dict:
    """Write a pod that runs."""
    return {
        "metadata": {"name": name, "labels": dict(labels), **metadata},
        "spec": {"nodeName": "node-1"},
        "status": {"phase": "Running", "podIP": host},
    }
