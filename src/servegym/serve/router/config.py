"""The router's YAML file."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from servegym.documents import checked, read_mapping
from servegym.errors import ConfigError, unknown_name
from servegym.serve.discovery.config import DiscoverConfig
from servegym.serve.dispatcher import DispatchConfig
from servegym.serve.gossip.config import PeersConfig
from servegym.serve.router.headers import DEFAULT_FORWARDED, check_rules
from servegym.serve.router.replica import ReplicaConfig, check_distinct

#: One decider keeps no more busy.
MAX_WORKERS = 64


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ListenConfig(_Config):
    """Where the router listens.

    Attributes:
        host: Address for clients.
        port: For clients; 0 takes a free one.
        admin_host: Address for operators; must be a loopback address.
        admin_port: For operators; 0 takes a free one.
        workers: Processes that carry requests. One also decides; several have one more that
            decides for all.
        hang_s: One of several processes that has not moved for so long is killed, and another takes
            its place...
        start_s: ... and so is one that has not begun its work so long after its start. The kernels
            of a policy may have to be compiled in that time.
    """

    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535)
    admin_host: str = "127.0.0.1"
    admin_port: int = Field(8081, ge=0, le=65535)
    workers: int = Field(1, ge=1, le=MAX_WORKERS)
    hang_s: float = Field(10.0, ge=1.0)
    start_s: float = Field(300.0, ge=1.0)

    @field_validator("admin_host")
    @classmethod
    def _is_loopback(cls, value: str) -> str:
        try:
            loopback = value == "localhost" or ipaddress.ip_address(value).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise ValueError("must be a loopback address, such as 127.0.0.1")
        return value


class AuthConfig(_Config):
    """Who may use the router. Without this section everyone who can reach it may.

    Attributes:
        keys_file: YAML file with a key or a list of keys for each tenant.
        keys_env: Environment variable with `tenant=key` pairs, separated by commas.
    """

    keys_file: Path | None = None
    keys_env: str | None = None

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.keys_file is None and self.keys_env is None:
            raise ValueError("needs keys_file or keys_env")
        return self


class LimitConfig(_Config):
    """What one tenant may do.

    Attributes:
        max_concurrent: Requests in the router at once; `None`: no limit.
        requests_per_min: Sustained rate; a minute's worth may come at once. `None`: no limit.
        slo_class: Of requests that name none.
    """

    max_concurrent: int | None = Field(None, ge=1)
    requests_per_min: float | None = Field(None, gt=0)
    slo_class: str | None = None


class RequeueConfig(_Config):
    """When a stream of which no token has come is taken back and sent to another replica.

    Attributes:
        after_s: It is looked at when so long has passed since its dispatch, and again each time.
        margin_requests: The other replica, which the policy must choose now, must have so many
            requests fewer.
        max_moves: Times that a request is moved at most. The retry budget counts them, too.
    """

    after_s: float = Field(gt=0)
    margin_requests: int = Field(4, ge=1)
    max_moves: int = Field(1, ge=1)


class RequestConfig(_Config):
    """What is accepted, and how long things may take.

    Attributes:
        max_body_bytes: Larger bodies are refused.
        body_timeout_s: For a client to send its body.
        connect_timeout_s: To reach a replica.
        first_byte_timeout_s: From the dispatch of a stream to its first token. An answer that is
            not streamed has no first token: see `answer_timeout_s`.
        stall_timeout_s: Between two tokens of a stream; comments are none.
        answer_timeout_s: For a whole answer that is not streamed; `None`: as long as the client
            waits. When it is over the client gets a 504, and nothing is tried again.
        client_timeout_s: For a client to take a piece of the answer.
        max_retries: Other replicas tried before the first token.
        max_broken: Replicas whose connection broke before the first token of a request after which
            it is not tried again: it may be what takes them down.
        retry_share: Retries within 10 s, as a share of the requests within 10 s or in progress...
        retry_reserve: ... and so many more. Requests that a replica did not even take, or whose
            connection it broke, are tried again beyond this budget: it takes no more.
        requeue: Whether a stream that waits for its first token may be sent elsewhere; `None`: it
            stays where it is.
        forward_headers: Headers of clients that replicas see; `x-*` names all that begin so.
        forward_query: Whether replicas see the query string of a URL.
        max_load: Requests at a replica at most, as a multiple of its `max_num_seqs`. Others wait at
            the router, by priority of their SLO class, then by arrival. `None`: no limit.
        max_held: Requests on hold at most.
        hold_s: How long a hold lasts.
        max_hold_s: How long a request is held in all, be it that the policy wants it or that no
            replica takes requests.
        retry_after_s: What clients are told who must come again.
        slo_header: Header that names the SLO class.
        slo_field: Field of the body that names it, such as `service_tier`.
        session_header: Header that names the session, a conversation or an agent's run, for the
            decision log; `None`: none does.
        session_field: Field of the body that names it, such as `prompt_cache_key`.
        expose_replica: Tell clients which replica answered, in the header `x-servegym-replica`.
        engine_hints: Tell the engines the predicted output length and the limits of the service
            level, in the `vllm_xargs` that servegym's scheduler for vLLM reads. What clients say
            there, and their `priority`, is taken out: with it they could jump the queue.
    """

    max_body_bytes: int = Field(8_000_000, ge=1)
    body_timeout_s: float = Field(30.0, gt=0)
    connect_timeout_s: float = Field(2.0, gt=0)
    first_byte_timeout_s: float = Field(120.0, gt=0)
    stall_timeout_s: float = Field(60.0, gt=0)
    answer_timeout_s: float | None = Field(None, gt=0)
    client_timeout_s: float = Field(60.0, gt=0)
    max_retries: int = Field(2, ge=0)
    max_broken: int = Field(2, ge=1)
    retry_share: float = Field(0.2, ge=0)
    retry_reserve: int = Field(100, ge=0)
    requeue: RequeueConfig | None = None
    forward_headers: tuple[str, ...] = DEFAULT_FORWARDED
    forward_query: bool = True
    max_load: float | None = Field(None, gt=0)
    max_held: int = Field(1000, ge=0)
    hold_s: float = Field(0.05, gt=0)
    max_hold_s: float = Field(10.0, ge=0)
    retry_after_s: float = Field(1.0, gt=0)
    slo_header: str = "x-slo-class"
    slo_field: str | None = None
    session_header: str | None = "x-session-id"
    session_field: str | None = None
    expose_replica: bool = False
    engine_hints: bool = False

    @field_validator("forward_headers")
    @classmethod
    def _may_be_forwarded(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        check_rules(value)
        return value


class DisaggregationConfig(_Config):
    """How a replica that only prefills and one that decodes do a request together.

    Attributes:
        protocol: Of their servers: `nixl` (vLLM with its NIXL connector: one after the other),
            `sglang` (SGLang: both at once) or `sidecar` (llm-d: a sidecar in front of the replica
            that decodes asks the other); see `serve.router.disaggregation`.
        prefill_timeout_s: For a prefill to be done, from its dispatch.
    """

    protocol: Literal["nixl", "sglang", "sidecar"] = "nixl"
    prefill_timeout_s: float = Field(60.0, gt=0)

    @property
    def decoders_prefill(self) -> bool:
        """Whether a replica of role `decode` can do all of a request; SGLang's cannot."""
        return self.protocol != "sglang"


class HealthConfig(_Config):
    """When a replica counts as up.

    Attributes:
        path: Asked of every replica.
        interval_s: Time between two checks.
        timeout_s: Of one check.
        models_interval_s: Time between two looks at the list of models and adapters.
        down_after: Failed checks in a row that take a replica out.
        up_after: Good checks in a row that take it back.
        eject_after: A replica is ejected, whatever its checks say, if at least so many of its
            latest requests have failed there while another replica answered them well ...
        eject_rate: ... and if that is a share of them higher by so much than in the rest of the
            fleet (the median of the others).
        window_requests: How many requests of a replica are looked at, at least `eject_after`.
        window_s: How long.
        eject_s: How long it is out; doubled each time it fails again before it has given a whole
            answer, up to `max_eject_s`. Then one request at a time is sent there, until one
            succeeds.
        max_eject_s: The longest.
        max_ejected_share: Largest share of the replicas that are up and serve the same models
            that may be out by ejection; of two or more, one may be. 0: none is ever ejected.
        silent_after_s: A replica with streams in progress that has sent no token of any for so
            long gets no new requests until it does.
        slow_start_s: A replica that comes up while others serve may have their load only after so
            long; its share of it grows from 0 to 1. 0: it may at once.
        max_busy_s: A replica that says it is full (429, 503) is passed over, if another has room,
            for the seconds of its `Retry-After` (1 if it gives none), at most so many.
    """

    path: str = Field("/health", pattern="^/")
    interval_s: float = Field(2.0, gt=0)
    timeout_s: float = Field(2.0, gt=0)
    models_interval_s: float = Field(30.0, gt=0)
    down_after: int = Field(2, ge=1)
    up_after: int = Field(1, ge=1)
    eject_after: int = Field(3, ge=1)
    eject_rate: float = Field(0.5, gt=0, le=1)
    window_requests: int = Field(20, ge=1)
    window_s: float = Field(60.0, gt=0)
    eject_s: float = Field(5.0, gt=0)
    max_eject_s: float = Field(300.0, gt=0)
    max_ejected_share: float = Field(0.5, ge=0, le=1)
    silent_after_s: float = Field(10.0, gt=0)
    slow_start_s: float = Field(0.0, ge=0)
    max_busy_s: float = Field(10.0, ge=0)


class ScrapeConfig(_Config):
    """How engines' metrics are polled.

    Attributes:
        engine: `auto`, `vllm`, `sglang`, `tensorrt-llm`, or a YAML file with a mapping; see
            `serve.monitoring.metrics`.
        interval_s: Time between two polls of a replica.
        timeout_s: Of one poll.
    """

    engine: str = "auto"
    interval_s: float = Field(0.25, gt=0)
    timeout_s: float = Field(1.0, gt=0)


class LogConfig(_Config):
    """What the router says on standard error; the decision log is another (`dispatch.log`).

    Attributes:
        format: Lines for people (`text`), or a JSON object a line.
        level: Less important lines are left out.
        requests: Whether each answer to a client has a line, of level `info`; good ones to health
            checks and to Prometheus have none.
    """

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"
    requests: bool = False


class TracingConfig(_Config):
    """Where spans of requests and decisions go; without this section there are none.

    Attributes:
        endpoint: Of a collector that takes OTLP over HTTP, such as
            `http://collector:4318/v1/traces`. Headers that it wants are read from the environment
            variable `OTEL_EXPORTER_OTLP_HEADERS`, as by every program with OpenTelemetry.
        sample: Share of the traces that begin at the router. A request that is part of a trace is
            recorded if its client's `traceparent` says so.
        service_name: Of the router.
        timeout_s: For the collector to take a batch; spans that it does not take are lost, and a
            router that stops waits no longer for it.
    """

    endpoint: str
    sample: float = Field(1.0, ge=0, le=1)
    service_name: str = Field("servegym-router", min_length=1)
    timeout_s: float = Field(5.0, gt=0)

    @field_validator("endpoint")
    @classmethod
    def _is_http(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be like http://host:4318/v1/traces")
        return value


class RouterConfig(_Config):
    """All that a router's file says.

    Attributes:
        replicas: The fleet, or the part of it that stays.
        replicas_file: YAML file with a list of more, read anew whenever it changes.
        discover: How more are found, by DNS or in Kubernetes.
        listen: Addresses.
        dispatch: Policy, service levels, prediction, prefixes and log.
        auth: API keys.
        upstream_key_env: Environment variable with the API key that the replicas want.
        limits: Of every tenant that `tenants` does not name.
        tenants: Limits by tenant.
        request: What is accepted, and how long things may take.
        disaggregation: How replicas of roles `prefill` and `decode` do a request together.
        health: Of replicas.
        metrics: Of replicas.
        log: What is said on standard error.
        tracing: Of requests and decisions.
        peers: Other routers before the same replicas.
        drain_s: How long a router that is told to stop waits for requests in progress.
        unready_s: How much of that it takes connections as before, while `/health` says 503: for as
            long as whoever balances may not have looked.
    """

    replicas: tuple[ReplicaConfig, ...] = ()
    replicas_file: Path | None = None
    discover: DiscoverConfig | None = None
    listen: ListenConfig = ListenConfig()
    dispatch: DispatchConfig = DispatchConfig()
    auth: AuthConfig | None = None
    upstream_key_env: str | None = None
    limits: LimitConfig = LimitConfig()
    tenants: Mapping[str, LimitConfig] = {}
    request: RequestConfig = RequestConfig()
    disaggregation: DisaggregationConfig = DisaggregationConfig()
    health: HealthConfig = HealthConfig()
    metrics: ScrapeConfig = ScrapeConfig()
    log: LogConfig = LogConfig()
    tracing: TracingConfig | None = None
    peers: PeersConfig | None = None
    drain_s: float = Field(60.0, ge=0)
    unready_s: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        classes = [c.name for c in self.dispatch.slo_classes]
        double = sorted({name for name in classes if classes.count(name) > 1})
        if double:
            raise ValueError(f"names of SLO classes must differ, got {', '.join(double)} twice")
        check_distinct(self.replicas)
        if not self.replicas and self.replicas_file is None and self.discover is None:
            raise ValueError("there is no replica: give replicas, replicas_file or discover")
        if self.tenants and self.auth is None:
            raise ValueError(
                "tenants needs auth: without keys everyone is one tenant, whose limits are limits"
            )
        for limit in (self.limits, *self.tenants.values()):
            if limit.slo_class is not None and limit.slo_class not in classes:
                raise ValueError(unknown_name("SLO class", limit.slo_class, classes))
        if self.unready_s > self.drain_s:
            raise ValueError(
                f"unready_s is a part of drain_s, and must be at most {self.drain_s:g}, "
                f"got {self.unready_s:g}"
            )
        if self.replicas and self.replicas_file is None and self.discover is None:
            self._check_parts()
        return self

    def _check_parts(self) -> None:
        """Check that the replicas, to which no others will come, can do all of a request."""
        roles = {replica.role for replica in self.replicas}
        if roles == {"prefill"}:
            raise ValueError(
                "all replicas have the role prefill: what they prefill needs one of role decode "
                "or mixed to decode it"
            )
        if roles == {"decode"} and not self.disaggregation.decoders_prefill:
            raise ValueError(
                "all replicas have the role decode, and SGLang's cannot prefill: add one of role "
                "prefill, or take the role mixed"
            )


def read_config(path: Path) -> RouterConfig:
    """Read the router's file.

    Raises:
        ConfigError: If it is not there, not YAML, or a key or value is not allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no configuration at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return parse_config(read_mapping(text, str(path), "replicas and dispatch"), str(path))


def with_workers(config: RouterConfig, workers: int) -> RouterConfig:
    """Return a configuration with so many workers.

    Raises:
        ConfigError: If there cannot be so many.
    """
    if not 1 <= workers <= MAX_WORKERS:
        raise ConfigError(f"--workers must be from 1 to {MAX_WORKERS}, got {workers}")
    listen = config.listen.model_copy(update={"workers": workers})
    return config.model_copy(update={"listen": listen})


def parse_config(data: Mapping[str, object], origin: str) -> RouterConfig:
    """Check the contents of the router's file; `origin` names it in errors.

    Raises:
        ConfigError: If a key or value is not allowed.
    """
    return checked(data, origin, RouterConfig)
