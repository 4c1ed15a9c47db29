"""The endpoint picker's YAML file."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from servegym.documents import checked, read_mapping
from servegym.errors import ConfigError
from servegym.serve.discovery.config import DiscoverConfig
from servegym.serve.discovery.found import place
from servegym.serve.dispatcher import DispatchConfig
from servegym.serve.gossip.config import PeersConfig
from servegym.serve.router.config import (
    DisaggregationConfig,
    HealthConfig,
    RequestConfig,
    RouterConfig,
    ScrapeConfig,
)
from servegym.serve.router.replica import ReplicaConfig, check_distinct
from servegym.serve.router.roles import PICKER_AND_ROLES, refuse_role, refuse_roles


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def endpoint_of(name: str, url: str) -> str:
    """Return a replica's `ip:port`, an IPv6 address in brackets, as gateways write it.

    Args:
        name: Of the replica, for the sentence.
        url: Of its server.

    Raises:
        ValueError: If the url has no IP address, or something behind the port.
    """
    parts = urlsplit(url)
    try:
        address = ipaddress.ip_address(parts.hostname or "")
    except ValueError:
        raise ValueError(
            f"replica {name} must have an IP address in its url: gateways know endpoints as "
            f"ip:port; got {url}"
        ) from None
    if parts.scheme != "http" or parts.path.strip("/"):
        raise ValueError(
            f"the url of replica {name} must be like http://10.0.0.1:8000: the gateway makes the "
            f"connection, and the path is the client's; got {url}"
        )
    return place(str(address), parts.port or 80)


def check_endpoint(replica: ReplicaConfig, *, response: str = "bodies") -> None:
    """Check that gateways can name a replica that comes from elsewhere than the picker's file.

    Args:
        replica: It.
        response: What gateways send of answers.

    Raises:
        ConfigError: If they cannot, or it does a part of a request and no answers are seen.
    """
    if response != "bodies":
        refuse_role(replica, PICKER_AND_ROLES)
    try:
        endpoint_of(replica.name, replica.url)
    except ValueError as error:
        raise ConfigError(str(error)) from error


class PickerListenConfig(_Config):
    """Where the picker listens.

    Attributes:
        host: Address for gateways.
        port: For gateways; 0 takes a free one. 9002 is what the inference extension's charts use.
        admin_port: For operators, on 127.0.0.1; 0 takes a free one.
        certificate: PEM file; with it, and a key, gateways must come by TLS.
        key: PEM file.
        max_streams: Requests at once; more are refused by gRPC and left to the gateway's failure
            mode. `None`: no limit.
    """

    host: str = "127.0.0.1"
    port: int = Field(9002, ge=0, le=65535)
    admin_port: int = Field(9003, ge=0, le=65535)
    certificate: Path | None = None
    key: Path | None = None
    max_streams: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _has_both_or_neither(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together: give both, or neither")
        return self


class PickRequestConfig(_Config):
    """What is read of a request, and how long it may wait.

    Attributes:
        max_body_bytes: Larger bodies are refused.
        max_held: Requests on hold at most.
        hold_s: How long a hold lasts.
        max_hold_s: How long a request is held in all, be it that the policy wants it or that no
            replica takes requests. The gateway's `message_timeout` must be longer, where it
            applies.
        retry_after_s: What clients are told who must come again.
        tenant_header: Header that names the tenant, whose answers' lengths are learned together.
        slo_header: Header that names the service level.
        slo_field: Field of the body that names it.
        session_header: Header that names the session, for the decision log; `None`: none does.
        session_field: Field of the body that names it.
    """

    max_body_bytes: int = Field(8_000_000, ge=1)
    max_held: int = Field(1000, ge=0)
    hold_s: float = Field(0.05, gt=0)
    max_hold_s: float = Field(10.0, ge=0)
    retry_after_s: float = Field(1.0, gt=0)
    tenant_header: str = "x-gateway-inference-fairness-id"
    slo_header: str = "x-slo-class"
    slo_field: str | None = None
    session_header: str | None = "x-session-id"
    session_field: str | None = None

    @field_validator("tenant_header", "slo_header", "session_header")
    @classmethod
    def _is_lower_case(cls, value: str | None) -> str | None:
        return value.lower() if value else value


class AssumedEndsConfig(_Config):
    """When a request counts as ended whose answer the picker is not sent.

    Attributes:
        look_s: Time between two comparisons with the engines' counts.
        settle_s: How long after its dispatch an engine must have counted a request.
        forget_after_s: After so long a request counts as ended, whatever engines say.
    """

    look_s: float = Field(0.25, gt=0)
    settle_s: float = Field(0.5, ge=0)
    forget_after_s: float = Field(600.0, gt=0)


class PickerConfig(_Config):
    """All that a picker's file says.

    Attributes:
        replicas: The fleet, or the part of it that stays; urls have IP addresses.
        replicas_file: YAML file with a list of more, read anew whenever it changes.
        discover: How more are found, by DNS or in Kubernetes.
        listen: Addresses.
        dispatch: Policy, service levels, prediction, prefixes and log.
        response: What the gateway sends of answers: `bodies` (its `response_body_mode`), `headers`
            alone, or `none`.
        request_body: How bodies of requests come from a gateway that does not say so: older than
            `protocol_config`.
        fallbacks: Endpoints named beside the chosen one, for the gateway's retries: of those that
            may be chosen, the ones with the fewest requests.
        request: What is read of a request, and how long it may wait.
        ends: When a request counts as ended whose answer is not seen.
        health: Of replicas.
        metrics: Of replicas.
        peers: Other pickers, or routers, before the same replicas.
        drain_s: How long a stopping picker waits for requests in progress.
    """

    replicas: tuple[ReplicaConfig, ...] = ()
    replicas_file: Path | None = None
    discover: DiscoverConfig | None = None
    listen: PickerListenConfig = PickerListenConfig()
    dispatch: DispatchConfig = DispatchConfig()
    response: Literal["bodies", "headers", "none"] = "bodies"
    request_body: Literal["full-duplex", "buffered", "none"] = "full-duplex"
    fallbacks: int = Field(0, ge=0)
    request: PickRequestConfig = PickRequestConfig()
    ends: AssumedEndsConfig = AssumedEndsConfig()
    health: HealthConfig = HealthConfig()
    metrics: ScrapeConfig = ScrapeConfig()
    peers: PeersConfig | None = None
    drain_s: float = Field(60.0, ge=0)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        places: dict[str, str] = {}
        for replica in self.replicas:
            other = places.setdefault(endpoint_of(replica.name, replica.url), replica.name)
            if other != replica.name:
                raise ValueError(f"replicas {other} and {replica.name} have the same endpoint")
        check_distinct(self.replicas)
        if self.response != "bodies":
            refuse_roles(self.replicas, self.discover, PICKER_AND_ROLES)
        if not self.replicas and self.replicas_file is None and self.discover is None:
            raise ValueError("there is no replica: give replicas, replicas_file or discover")
        if self.discover is not None:
            schemes = {source.scheme for source in self.discover.dns}
            schemes |= {source.scheme for source in self.discover.kubernetes}
            if "https" in schemes:
                raise ValueError(
                    "discover needs scheme: http, got https: the gateway makes the connection"
                )
        if self.response != "bodies" and self.dispatch.log is not None:
            raise ValueError(
                f"dispatch.log needs response: bodies, got response: {self.response}: without "
                "answers nobody knows when a request has ended and how long its answer was"
            )
        return self

    def as_router(self) -> RouterConfig:
        """Return what the router's desk and its checks of replicas go by."""
        request = self.request
        return RouterConfig(
            replicas=self.replicas,
            replicas_file=self.replicas_file,
            discover=self.discover,
            dispatch=self.dispatch,
            request=RequestConfig(
                max_held=request.max_held,
                hold_s=request.hold_s,
                max_hold_s=request.max_hold_s,
                retry_after_s=request.retry_after_s,
            ),
            disaggregation=DisaggregationConfig(protocol="sidecar"),
            health=self.health,
            metrics=self.metrics,
        )


def read_picker_config(path: Path) -> PickerConfig:
    """Read the picker's file.

    Raises:
        ConfigError: If it is not there, not YAML, or a key or value is not allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no configuration at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return checked(read_mapping(text, str(path), "replicas and dispatch"), str(path), PickerConfig)
