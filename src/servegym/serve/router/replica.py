"""A replica as configurations describe it, alone or in a list."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from servegym.cluster.spec import Role
from servegym.documents import checked, load_yaml
from servegym.errors import ConfigError
from servegym.serve.facts import Hardware, Rates


class ReplicaConfig(BaseModel):
    """One engine that requests are sent to.

    Attributes:
        name: In logs, metrics and admin commands.
        url: Of its OpenAI-compatible server, without `/v1`.
        hardware: What it runs on, if servegym knows its costs.
        rates: Its numbers, instead.
        metrics_url: Of its Prometheus page; by default `/metrics` at `url`.
        role: `mixed` does all of a request, `prefill` only its prefill, `decode` what comes behind.
        bootstrap_port: Of an SGLang server that prefills, as its flag
            `--disaggregation-bootstrap-port` says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1)
    url: str
    hardware: Hardware | None = None
    rates: Rates | None = None
    metrics_url: str | None = None
    role: Role = "mixed"
    bootstrap_port: int = Field(8998, ge=1, le=65535)

    @field_validator("url", "metrics_url")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parts = urlsplit(value)
                good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            except ValueError:  # a port beyond 65535
                good = False
            if not good or parts.query or parts.fragment:
                raise ValueError("must be like http://host:port")
        return value.rstrip("/") if value else value

    @field_validator("url")
    @classmethod
    def _is_without_version(cls, value: str) -> str:
        if value.endswith("/v1"):
            raise ValueError("must be without /v1: the router adds the path that a client asks for")
        return value

    @model_validator(mode="after")
    def _has_facts(self) -> Self:
        if (self.hardware is None) == (self.rates is None):
            raise ValueError(f"{self.name} needs either hardware or rates")
        return self

    @property
    def facts(self) -> Hardware | Rates:
        """What is known of it."""
        found = self.hardware or self.rates
        assert found is not None
        return found

    @property
    def metrics_page(self) -> str:
        """Where its metrics are."""
        return self.metrics_url or f"{self.url}/metrics"

    @property
    def shown_url(self) -> str:
        """Its url as logs and errors may have it; see `shown`."""
        return shown(self.url)

    @property
    def place(self) -> tuple[str, str, int, str]:
        """Its url, so that equal places are equal however they are written."""
        parts = urlsplit(self.url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        return parts.scheme, parts.hostname or "", port, parts.path


class _Listed(BaseModel):
    """A file of replicas, in the form in which it is checked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: tuple[ReplicaConfig, ...]

    @model_validator(mode="after")
    def _differ(self) -> Self:
        check_distinct(self.replicas)
        return self


def shown(url: str) -> str:
    """Return a url without the user and password that it may hold."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def check_distinct(replicas: Iterable[ReplicaConfig]) -> None:
    """Check that no two replicas have one name or one url.

    Raises:
        ValueError: If two have.
    """
    names: set[str] = set()
    places: dict[tuple[str, str, int, str], ReplicaConfig] = {}
    for replica in replicas:
        if replica.name in names:
            raise ValueError(f"replica names must differ, got {replica.name} twice")
        names.add(replica.name)
        other = places.setdefault(replica.place, replica)
        if other is not replica:
            raise ValueError(
                f"replicas {other.name} and {replica.name} have the same url, "
                f"{replica.shown_url}: its load would be counted as that of two"
            )


def read_replicas(path: Path) -> tuple[ReplicaConfig, ...]:
    """Read a YAML file that is a list of replicas; an empty list is an empty fleet.

    Raises:
        ConfigError: If it is not there, not YAML, or an entry is not allowed.
    """
    try:
        data = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file of replicas at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, list):
        raise ConfigError(
            f"{path} must be a list of replicas, each with name, url and hardware or rates; "
            "[] is an empty fleet"
        )
    return checked({"replicas": data}, str(path), _Listed).replicas
