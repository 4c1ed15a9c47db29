"""Spans of requests, decisions and attempts, as an exporter gets them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import sys

import numpy as np
import pytest
from aiohttp import ClientError, web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from servegym.errors import ConfigError
from servegym.policy.policy import Observations
from servegym.serve.router import app, tracing
from servegym.serve.router.config import parse_config
from servegym.serve.router.logs import JsonLines

from .running import RATES, run, running, until

BODY = {"model": "m", "prompt": "hello there", "max_tokens": 5}
STREAM = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
ENDPOINT = {"endpoint": "http://127.0.0.1:1/v1/traces"}
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"


@contextlib.asynccontextmanager
async def traced(num_replicas: int = 2, sample: float = 1.0, num_workers: int = 0, **settings):
    """Run a router whose spans stay in memory; yield it, and what returns them in order."""
    exporter = InMemorySpanExporter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "OTLPSpanExporter", lambda *_, **__: exporter)
        config = {**ENDPOINT, "sample": sample}
        async with running(num_replicas, num_workers, tracing=config, **settings) as it:

            def spans() -> list:
                for carrier in it.workers or [it.router]:
                    carrier._api._tracing._provider.force_flush()
                return sorted(exporter.get_finished_spans(), key=lambda span: span.start_time)

            yield it, spans


def by_kind(spans):
    servers = [span for span in spans if span.kind is SpanKind.SERVER]
    decisions = [span for span in spans if span.kind is SpanKind.INTERNAL]
    attempts = [span for span in spans if span.kind is SpanKind.CLIENT]
    return servers, decisions, attempts


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_request_has_a_span_with_its_decision_and_its_replica_within(num_workers):
    async def test() -> None:
        async with traced(num_workers=num_workers) as (it, spans):
            await it.post(STREAM, "/v1/completions", headers={"X-Request-Id": "mine"})
            (server,), (decision,), (attempt,) = by_kind(spans())
            names = {f"r{i}": replica for i, replica in enumerate(it.replicas)}
            assert server.name == "POST /v1/completions"
            assert server.parent is None
            for name, value in {
                "http.request.method": "POST",
                "http.route": "/v1/completions",
                "http.response.status_code": 200,
                "gen_ai.operation.name": "text_completion",
                "gen_ai.request.model": "m",
                "gen_ai.request.max_tokens": 5,
                "servegym.request.id": "mine",
                "servegym.tenant": "default",
                "servegym.slo_class": "default",
                "servegym.prompt_tokens": 3,
            }.items():
                assert server.attributes[name] == value
            assert server.status.status_code is StatusCode.UNSET
            for child in (decision, attempt):
                assert child.parent.span_id == server.context.span_id
                assert child.context.trace_id == server.context.trace_id
                assert server.start_time <= child.start_time
                assert child.end_time <= server.end_time
            replica = attempt.attributes["servegym.replica"]
            assert decision.attributes["servegym.decision.action"] == replica
            assert decision.attributes["servegym.decision.by"] == "policy"
            assert decision.attributes["servegym.decision.reason"] == "policy"
            assert decision.attributes["servegym.decision.candidates"] == ("r0", "r1")
            assert decision.attributes["servegym.decision.outstanding"] == (0.0, 0.0)
            assert decision.end_time - decision.start_time > 1000  # it took more than 1 us
            assert attempt.name == "text_completion m"
            assert attempt.attributes["server.port"] == names[replica].port
            assert attempt.attributes["gen_ai.usage.input_tokens"] == 7
            assert attempt.attributes["gen_ai.usage.output_tokens"] == 5
            assert attempt.attributes["gen_ai.usage.cache_read.input_tokens"] == 3
            assert 0 < attempt.attributes["gen_ai.response.time_to_first_chunk"] < 5
            assert "hello" not in str([dict(span.attributes) for span in spans()])

    run(test)


def test_the_clients_trace_goes_on_to_the_replica():
    async def test() -> None:
        async with traced(1) as (it, spans):
            headers = {
                "traceparent": f"00-{TRACE}-{CALLER}-01",
                "tracestate": "vendor=1",
                "baggage": "user=7",
            }
            await it.post(STREAM, headers=headers)
            (server,), _, (attempt,) = by_kind(spans())
            assert f"{server.context.trace_id:032x}" == TRACE
            assert f"{server.parent.span_id:016x}" == CALLER
            seen = it.replicas[0].headers[0]
            assert seen.getall("traceparent") == [f"00-{TRACE}-{attempt.context.span_id:016x}-01"]
            assert seen.getall("tracestate") == ["vendor=1"]
            assert seen["baggage"] == "user=7"

    run(test)


@pytest.mark.parametrize(
    ("sample", "flag", "recorded"), [(1.0, "00", 0), (0.0, "01", 3), (0.0, None, 0), (1.0, None, 3)]
)
def test_what_the_caller_has_decided_is_kept_to_and_else_the_share(sample, flag, recorded):
    async def test() -> None:
        async with traced(1, sample) as (it, spans):
            headers = {"traceparent": f"00-{TRACE}-{CALLER}-{flag}"} if flag else {}
            await it.post(STREAM, headers=headers)
            assert len(spans()) == recorded
            version, trace, _, flags = it.replicas[0].headers[0]["traceparent"].split("-")
            assert version == "00"
            assert int(flags, 16) & 1 == (recorded > 0)  # the other bit: the id is random
            assert (trace == TRACE) == (flag is not None)

    run(test)


@pytest.mark.parametrize(
    "parent", ["nonsense", f"00-{'0' * 32}-{CALLER}-01", f"00-{TRACE}-{CALLER}-01\xff"]
)
def test_a_parent_that_is_none_begins_a_new_trace(parent):
    async def test() -> None:
        async with traced(1) as (it, spans):
            status, _, _ = await it.post(STREAM, headers={"traceparent": parent})
            assert status == 200
            (server,), _, _ = by_kind(spans())
            assert server.parent is None
            assert f"{server.context.trace_id:032x}" != TRACE

    run(test)


def test_lines_of_the_log_name_the_trace():
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("servegym.serve.router.logs")

    async def test() -> None:
        async with traced(1, log={"requests": True}) as (it, spans):
            await it.post(STREAM)
            (server,), _, _ = by_kind(spans())
            line = json.loads(written.getvalue())
            assert line["trace_id"] == f"{server.context.trace_id:032x}"

    logger.addHandler(handler)
    level = logger.level
    logger.setLevel("INFO")
    try:
        run(test)
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_retry_is_another_decision_and_another_attempt(num_workers):
    async def test() -> None:
        async with traced(num_workers=num_workers) as (it, spans):
            it.replicas[0].mode = 500
            for _ in range(4):  # until the first one is asked
                await it.post(STREAM)
                if it.replicas[0].bodies:
                    break
            (*_, server), decisions, attempts = by_kind(spans())
            first, second = (a for a in attempts if a.parent.span_id == server.context.span_id)
            assert first.attributes["servegym.replica"] == "r0"
            assert first.attributes["error.type"] == "status_500"
            assert first.attributes["http.response.status_code"] == 500
            assert first.status.status_code is StatusCode.ERROR
            assert "http.request.resend_count" not in first.attributes
            assert second.attributes["servegym.replica"] == "r1"
            assert second.attributes["http.request.resend_count"] == 1
            assert second.status.status_code is StatusCode.UNSET
            assert decisions[-1].attributes["servegym.decision.attempts_before"] == 1
            assert decisions[-1].attributes["servegym.decision.candidates"] == ("r1",)
            assert server.attributes["http.response.status_code"] == 200
            seen = [r.headers[-1]["traceparent"].split("-")[2] for r in it.replicas]
            assert seen == [f"{span.context.span_id:016x}" for span in (first, second)]

    run(test)


def test_a_stream_that_breaks_and_a_client_that_leaves_are_seen():
    async def test() -> None:
        async with traced(1) as (it, spans):
            it.replicas[0].mode = "die"
            with pytest.raises(ClientError):
                await it.post(STREAM)
            await until(it.idle)
            (server,), _, (attempt,) = by_kind(spans())
            for span in (server, attempt):
                assert span.attributes["error.type"] == "broken"
                assert span.attributes["http.response.status_code"] == 200  # it had begun
                assert span.status.status_code is StatusCode.ERROR
            it.replicas[0].mode = "hang"
            leaving = asyncio.create_task(it.post(STREAM))
            await until(lambda: it.replicas[0].running == 1)
            leaving.cancel()
            await until(it.idle)
            (_, server), _, (_, attempt) = by_kind(spans())
            assert attempt.attributes["error.type"] == "cancelled"
            assert server.attributes["http.response.status_code"] == 499
            assert server.status.status_code is StatusCode.UNSET

    run(test)


def test_what_never_reaches_a_replica_has_one_span():
    async def test() -> None:
        async with traced(1) as (it, spans):
            await it.post({"model": "m"})  # 400: no prompt
            await it.get("/health")
            await it.get("/metrics")
            (server,) = spans()
            assert server.attributes["http.response.status_code"] == 400
            assert server.status.status_code is StatusCode.UNSET

    run(test)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_holds_and_a_rejection_are_spans_of_their_request(monkeypatch, num_workers):
    async def test() -> None:
        dispatch = {"allow_hold": True, "allow_reject": True}
        settings = {"dispatch": dispatch, "request": {"hold_s": 0.02}}
        async with traced(1, num_workers=num_workers, **settings) as (it, spans):
            told = iter([1, 1, 2])  # of one replica: it holds twice, and rejects
            policy = it.router.dispatcher.runtime.loaded.policy
            monkeypatch.setattr(policy, "act", lambda *_: [next(told)])
            status, _, _ = await it.post(STREAM)
            assert status == 429
            (server,), decisions, attempts = by_kind(spans())
            assert [one.attributes["servegym.decision.action"] for one in decisions] == [
                "hold",
                "hold",
                "reject",
            ]
            assert {one.parent.span_id for one in decisions} == {server.context.span_id}
            assert decisions[2].start_time - decisions[0].start_time >= 0.04e9
            assert attempts == []
            assert server.attributes["http.response.status_code"] == 429
            assert server.attributes["gen_ai.request.model"] == "m"

    run(test)


@pytest.mark.parametrize(
    ("path", "body", "operation"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}]}, "chat"),
        ("/v1/embeddings", {"input": "hi"}, "embeddings"),
        ("/v1/rerank", {"query": "hi", "documents": ["ho"]}, "rerank"),
    ],
)
def test_a_span_says_what_its_route_is_for(path, body, operation):
    async def test() -> None:
        async with traced(1) as (it, spans):
            await it.post({"model": "m", **body}, path)
            (server,), (_,), (attempt,) = by_kind(spans())
            assert server.name == f"POST {path}"
            assert attempt.name == f"{operation} m"

    run(test)


class Fixed:
    """A policy that gives the second replica most."""

    def __init__(self, policy) -> None:
        self.needs, self.information, self.name = policy.needs, policy.information, "fixed"

    def reset(self, num_envs: int, seed: int) -> None: ...

    def scores(self, observations: Observations):
        names = observations.replicas[0, 0]
        return np.where(observations.mask[0], [0.0, np.log(3.0), 0.0, 0.0], -np.inf) + 0 * names[0]

    def act(self, observations: Observations, env_ids):
        return np.array([int(self.scores(observations).argmax())])


def test_what_a_network_gives_each_replica_is_in_the_span_of_its_decision():
    async def test() -> None:
        async with traced() as (it, spans):
            runtime = it.router.dispatcher.runtime
            loaded = runtime.loaded
            object.__setattr__(loaded, "policy", Fixed(loaded.policy))
            await it.post(STREAM)
            _, (decision,), (attempt,) = by_kind(spans())
            chosen = attempt.attributes["servegym.replica"]
            given = dict(
                zip(
                    decision.attributes["servegym.decision.candidates"],
                    decision.attributes["servegym.decision.probabilities"],
                    strict=True,
                )
            )
            # replicas are shown in an order that goes round: the scores must follow them back
            assert given.pop(chosen) == pytest.approx(0.75)
            assert list(given.values()) == pytest.approx([0.25])

    run(test)


def test_spans_reach_a_collector_by_http():
    got: list[ExportTraceServiceRequest] = []

    async def collect(request: web.Request) -> web.Response:
        got.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response(headers={"Content-Type": "application/x-protobuf"})

    async def test() -> None:
        collector = web.Application()
        collector.router.add_post("/v1/traces", collect)
        runner = web.AppRunner(collector)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        settings = {"endpoint": f"http://127.0.0.1:{port}/v1/traces", "service_name": "mine"}
        async with running(1, tracing=settings) as it:
            await it.post(STREAM)  # what is left is sent at the end
        await runner.cleanup()
        (request,) = got
        (resource,) = request.resource_spans
        service = {a.key: a.value.string_value for a in resource.resource.attributes}
        assert service["service.name"] == "mine"
        assert [len(scope.spans) for scope in resource.scope_spans] == [3]

    run(test)


def test_without_the_section_nothing_is_loaded_and_the_clients_context_passes_as_it_is():
    async def test() -> None:
        async with running(1) as it:
            parent = f"00-{TRACE}-{CALLER}-00"
            await it.post(STREAM, headers={"traceparent": parent})
            assert it.replicas[0].headers[0]["traceparent"] == parent
            assert it.router._api._tracing is None

    run(test)


def test_a_wrong_endpoint_and_a_missing_package_are_named(tmp_path, capsys, monkeypatch):
    data = {
        "replicas": [{"name": "a", "url": "http://127.0.0.1:1", "rates": RATES}],
        "tracing": {"endpoint": "collector:4317"},
    }
    with pytest.raises(ConfigError, match="endpoint: must be like http://host:4318/v1/traces"):
        parse_config(data, "router.yaml")
    monkeypatch.setitem(sys.modules, "servegym.serve.router.tracing", None)
    config = parse_config({**data, "tracing": ENDPOINT}, "router.yaml")
    with pytest.raises(ConfigError, match=r"tracing needs .*: pip install opentelemetry-sdk"):
        app.Router(config)
