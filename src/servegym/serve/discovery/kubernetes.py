"""Replicas that are pods of Kubernetes: of a service, of an InferencePool, or with some labels.

Pods that are being ended are no replicas any more: they leave, and finish what they have. All
others are, ready or not: whether one takes requests the router's own checks find out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import aiohttp

from servegym.serve.discovery.collection import (
    MAX_OBJECT_BYTES,
    Api,
    ApiError,
    Collection,
    Object,
    Patience,
)
from servegym.serve.discovery.config import KubernetesConfig
from servegym.serve.discovery.found import Found, place

_SLICES = "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices"
_POOLS = "/apis/inference.networking.k8s.io/v1/namespaces/{}/inferencepools/{}"
_PODS = "/api/v1/namespaces/{}/pods"
#: The label by which slices name their service.
_SERVICE_LABEL = "kubernetes.io/service-name"
_HOST_LABEL = "kubernetes.io/hostname"
_ZONE_LABEL = "topology.kubernetes.io/zone"
#: A watch that ends sooner has not been one, seconds.
_SHORT_S = 1.0


class KubernetesPods:
    """Follows the pods that a configuration means.

    Args:
        config: Which.
    """

    def __init__(self, config: KubernetesConfig) -> None:
        self.config = config
        self.title = f"kubernetes {config.title}"

    async def watch(self) -> AsyncGenerator[list[Found]]:
        """Yield the servers that are there, now and whenever that changes."""
        patience, loop = Patience(self.title), asyncio.get_running_loop()
        followed: tuple[Mapping[str, str], Sequence[int], Collection] | None = None
        async with aiohttp.ClientSession(read_bufsize=MAX_OBJECT_BYTES) as session:
            api = Api(self.config, session)
            while True:
                begin_s = loop.time()
                try:
                    labels, ports = await self._meant(api)
                    if followed is None or followed[:2] != (labels, ports):
                        followed = labels, ports, await self._collection(api, labels)
                    async with aclosing(followed[2].once()) as changes:
                        async for objects in changes:
                            patience.good()
                            yield self._found(objects, ports)
                    if loop.time() - begin_s < _SHORT_S:
                        await asyncio.sleep(_SHORT_S)
                except ApiError as error:
                    if error.status != 410:
                        await patience.failed(error)
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    await patience.failed(error)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    followed = None
                    what = f"an answer is not what it should be ({type(error).__name__}: {error})"
                    await patience.failed(ApiError(0, what))

    async def _meant(self, api: Api) -> tuple[Mapping[str, str], Sequence[int]]:
        """Return the labels of what is to be followed, and the ports where that says them."""
        config = self.config
        if config.pool is None:
            labels = {_SERVICE_LABEL: config.service} if config.service else config.selector
            return labels, [config.port] if isinstance(config.port, int) else []
        spec = (await api.get(_POOLS.format(await api.namespace(), config.pool)))["spec"]
        ports = [int(port["number"]) for port in spec["targetPorts"]]
        return dict(spec["selector"]["matchLabels"]), ports

    async def _collection(self, api: Api, labels: Mapping[str, str]) -> Collection:
        path = _SLICES if self.config.service is not None else _PODS
        selector = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
        return Collection(api, path.format(await api.namespace()), selector)

    def _found(self, objects: Sequence[Object], ports: Sequence[int]) -> list[Found]:
        found: dict[str, Found] = {}  # an endpoint may be in two slices for a moment
        for item in objects:
            if self.config.service is not None:
                servers = _of_slice(item, self.config.port, self.config.scheme)
            else:
                servers = _of_pod(item, ports, self.config.scheme)
            found |= {server.name: server for server in servers}
        return [found[name] for name in sorted(found)]


def _of_slice(item: Object, port: int | str | None, scheme: str) -> Iterator[Found]:
    """Go through the endpoints of an EndpointSlice."""
    if item.get("addressType") == "FQDN":
        return
    listed: list[Mapping[str, Any]] = list(item.get("ports") or ())
    if port is not None:
        listed = [p for p in listed if port in (p.get("name"), p.get("port"))]
    if len(listed) != 1 or listed[0].get("port") is None:
        if item.get("endpoints"):
            names = ", ".join(f"{p.get('name') or ''}:{p.get('port')}" for p in item["ports"] or ())
            raise ApiError(0, f"the service has the ports {names or 'none'}: name one in port")
        return
    number = int(listed[0]["port"])
    of_slice = dict(item["metadata"].get("labels") or {})
    for endpoint in item.get("endpoints") or ():
        if (endpoint.get("conditions") or {}).get("terminating"):
            continue
        host = str(endpoint["addresses"][0])
        pod = (endpoint.get("targetRef") or {}).get("name")
        labels = dict(of_slice)
        for key, name in ((_HOST_LABEL, "nodeName"), (_ZONE_LABEL, "zone")):
            if endpoint.get(name):
                labels[key] = str(endpoint[name])
        yield Found(str(pod or place(host, number)), host, number, scheme, labels)


def _of_pod(item: Object, ports: Sequence[int], scheme: str) -> Iterator[Found]:
    """Go through the servers of a pod."""
    status, metadata = item.get("status") or {}, item["metadata"]
    host = status.get("podIP")
    ended = status.get("phase") in ("Succeeded", "Failed")
    if not host or ended or metadata.get("deletionTimestamp"):
        return
    labels = dict(metadata.get("labels") or {})
    if node := (item.get("spec") or {}).get("nodeName"):
        labels[_HOST_LABEL] = str(node)
    for port in ports:
        name = metadata["name"] if len(ports) == 1 else f"{metadata['name']}:{port}"
        yield Found(name, str(host), port, scheme, labels)
