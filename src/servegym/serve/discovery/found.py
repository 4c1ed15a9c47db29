"""What has been found of a replica, and the template that makes it one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import ValidationError

from servegym.serve.discovery.config import TemplateConfig
from servegym.serve.router.replica import ReplicaConfig


class Found(NamedTuple):
    """A server that should be a replica.

    Attributes:
        name: Of the replica.
        host: Its address.
        port: Of the server.
        scheme: `http` or `https`.
        labels: By which templates tell it.
    """

    name: str
    host: str
    port: int
    scheme: str = "http"
    labels: Mapping[str, str] = {}

    @property
    def url(self) -> str:
        """Of the server."""
        return f"{self.scheme}://{place(self.host, self.port)}"


def place(host: str, port: int) -> str:
    """Write an address and a port as a URL has them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def described(
    found: Sequence[Found], templates: Sequence[TemplateConfig]
) -> tuple[list[ReplicaConfig], list[str]]:
    """Make what was found replicas, each by the first template that fits.

    Returns:
        The replicas, and one sentence for each server that cannot be one.
    """
    replicas, complaints = [], []
    for server in found:
        fitting = next((t for t in templates if t.fits(server.name, server.labels)), None)
        if fitting is None:
            complaints.append(f"no template fits {server.name}: it is left out")
            continue
        try:
            replica = ReplicaConfig(
                name=server.name,
                url=server.url,
                hardware=fitting.hardware,
                rates=fitting.rates,
                metrics_url=server.url + fitting.metrics_path,
                role=fitting.role,
                bootstrap_port=fitting.bootstrap_port,
            )
        except ValidationError:
            complaints.append(f"{server.url} is no url: {server.name} is left out")
        else:
            replicas.append(replica)
    return replicas, complaints
