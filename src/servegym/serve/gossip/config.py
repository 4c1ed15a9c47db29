"""The section `peers` of the router's and the picker's files."""

from __future__ import annotations

import ipaddress
import os
from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from servegym.errors import ConfigError

#: Shorter secrets could be guessed from one datagram.
MIN_SECRET_CHARACTERS = 16


class PeersConfig(BaseModel):
    """Other routers before the same replicas, which name them alike.

    Attributes:
        addresses: Of the others, `host:port`. A name that stands for many addresses, such as that
            of a headless service, stands for all of them; one's own may be among them. Whoever is
            to be heard must be named: routers name each other.
        host: Address that is listened on, and sent from.
        port: For UDP.
        secret_env: Environment variable with the secret that all of them share, at least 16
            characters. May be left out where everything is on loopback addresses.
        interval_s: Time between two rounds of datagrams.
        forget_after_s: What a router has said counts for so long; then it has no requests.
        resolve_s: Time between two look-ups of names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    addresses: tuple[str, ...] = Field(min_length=1)
    host: str = "127.0.0.1"
    port: int = Field(8082, ge=0, le=65535)
    secret_env: str | None = None
    interval_s: float = Field(0.05, ge=0.01)
    forget_after_s: float = Field(2.0, gt=0)
    resolve_s: float = Field(5.0, gt=0)

    @field_validator("addresses")
    @classmethod
    def _have_ports(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            split(address)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        hosts = [self.host, *(split(address)[0] for address in self.addresses)]
        open_hosts = [host for host in hosts if not _is_loopback(host)]
        if open_hosts and self.secret_env is None:
            raise ValueError(
                f"needs secret_env, as {open_hosts[0]} is no loopback address: without a secret "
                "anyone could say what replicas have to do"
            )
        if self.forget_after_s < 4.0 * self.interval_s:
            raise ValueError(
                f"forget_after_s must be at least four times interval_s ({self.interval_s:g}), got "
                f"{self.forget_after_s:g}: a lost datagram or two would count as silence"
            )
        return self


def split(address: str) -> tuple[str, int]:
    """Return host and port of `host:port`; an IPv6 address stands in brackets.

    Raises:
        ValueError: If it is none.
    """
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.path or parts.query or parts.username:
        raise ValueError("the address of a peer must be like 10.0.0.2:8082")
    return host, port


def read_secret(config: PeersConfig) -> bytes:
    """Return the shared secret, empty where none is needed.

    Raises:
        ConfigError: If it is not set or too short.
    """
    if config.secret_env is None:
        return b""
    secret = os.environ.get(config.secret_env, "")
    if len(secret) < MIN_SECRET_CHARACTERS:
        raise ConfigError(
            f"the environment variable {config.secret_env} must hold the secret of peers, at least "
            f"{MIN_SECRET_CHARACTERS} characters; it has {len(secret)}"
        )
    return secret.encode()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
