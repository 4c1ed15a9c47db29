"""What a router's file says about replicas that are found while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from servegym.cluster.spec import Role
from servegym.serve.facts import Hardware, Rates

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TemplateConfig(_Config):
    """What is known of found replicas that are alike.

    Attributes:
        names: Pattern of their names, such as `h100-*`.
        labels: That they have, all of them.
        hardware: What they run on, if servegym knows its costs.
        rates: Their numbers, instead.
        metrics_path: Of their Prometheus page.
        role: What they do of a request.
        bootstrap_port: Of SGLang servers that prefill.
    """

    names: str = Field("*", min_length=1)
    labels: Mapping[str, str] = {}
    hardware: Hardware | None = None
    rates: Rates | None = None
    metrics_path: str = Field("/metrics", pattern="^/")
    role: Role = "mixed"
    bootstrap_port: int = Field(8998, ge=1, le=65535)

    @model_validator(mode="after")
    def _has_facts(self) -> Self:
        if (self.hardware is None) == (self.rates is None):
            raise ValueError(f"the template for {self.names} needs either hardware or rates")
        return self

    def fits(self, name: str, labels: Mapping[str, str]) -> bool:
        """Whether it describes a replica."""
        has_labels = all(labels.get(key) == value for key, value in self.labels.items())
        return has_labels and fnmatchcase(name, self.names)


class DnsConfig(_Config):
    """Replicas behind one name of the DNS, such as that of a headless service.

    Attributes:
        name: Whose A and AAAA records are their addresses.
        port: Of their servers.
        scheme: Of their servers.
        every_s: Time between two look-ups.
    """

    name: str = Field(min_length=1)
    port: int = Field(ge=1, le=65535)
    scheme: Literal["http", "https"] = "http"
    every_s: float = Field(5.0, gt=0)


class KubernetesConfig(_Config):
    """Replicas that are pods: those of a service, of an InferencePool, or with some labels.

    Attributes:
        service: Service whose EndpointSlices name them.
        pool: InferencePool (`inference.networking.k8s.io/v1`) whose selector and ports are theirs.
        selector: Labels of the pods.
        namespace: Theirs; `None`: that of the router's own pod.
        port: Of their servers; of a service its name, number, or `None` if it has one only; of a
            pool `None`.
        scheme: Of their servers.
        server: The API server.
        token_file: Of the service account; read anew for each request, as it expires.
        ca_file: Certificate authority of the API server.
        namespace_file: Names the namespace of the router's own pod.
    """

    service: str | None = None
    pool: str | None = None
    selector: Mapping[str, str] = {}
    namespace: str | None = None
    port: int | str | None = None
    scheme: Literal["http", "https"] = "http"
    server: str = "https://kubernetes.default.svc"
    token_file: Path = _ACCOUNT / "token"
    ca_file: Path = _ACCOUNT / "ca.crt"
    namespace_file: Path = _ACCOUNT / "namespace"

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        given = [self.service is not None, self.pool is not None, bool(self.selector)]
        if sum(given) != 1:
            raise ValueError("needs one of service, pool and selector")
        if self.selector and not isinstance(self.port, int):
            raise ValueError("selector needs a port, by number")
        if self.pool is not None and self.port is not None:
            raise ValueError("a pool names its ports itself: leave port out")
        return self

    @property
    def title(self) -> str:
        """How it is called in the log."""
        labels = ",".join(f"{key}={value}" for key, value in self.selector.items())
        named = (self.service and f"service {self.service}") or (self.pool and f"pool {self.pool}")
        return named or f"pods {labels}"


class DiscoverConfig(_Config):
    """How replicas are found, and what is known of them.

    Attributes:
        dns: Names of the DNS.
        kubernetes: Services, pools and pods of Kubernetes.
        templates: What they run on: the first that fits a replica is its. One that none fits is
            left out, which is said.
    """

    dns: tuple[DnsConfig, ...] = ()
    kubernetes: tuple[KubernetesConfig, ...] = ()
    templates: tuple[TemplateConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _looks_somewhere(self) -> Self:
        if not self.dns and not self.kubernetes:
            raise ValueError("needs dns or kubernetes")
        return self
