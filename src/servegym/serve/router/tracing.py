"""Spans for OpenTelemetry: of each request, each decision about it and each replica asked.

Names are those of the semantic conventions for HTTP and generative AI (package
`opentelemetry-semantic-conventions` 0.66b2, where those for AI are still in development); what
they have no name for begins with `servegym.`. Prompts and answers are never part of a span.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from servegym import __version__
from servegym.serve.router.client import Request
from servegym.serve.router.config import RouterConfig
from servegym.serve.router.explanation import Explanation
from servegym.serve.router.headers import CONTEXT_HEADERS
from servegym.serve.router.logs import TRACE_ID
from servegym.serve.router.stream import Reader

#: What the conventions have a name for; other routes are operations of their own.
_OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/embeddings": "embeddings",
}
#: Engines by the name that `metrics.engine` has for them; others speak OpenAI's protocol.
_PROVIDERS = ("vllm", "sglang", "tensorrt-llm")
_LEFT = 499
_W3C = TraceContextTextMapPropagator()
_Value = str | int | float | bool | Sequence[str] | Sequence[float]


class Tracing:
    """Makes the spans of all requests and sends them, in a thread, where they are collected.

    Args:
        config: Of the router; its `tracing` says where to, and of how many requests.
    """

    def __init__(self, config: RouterConfig) -> None:
        section, engine = config.tracing, config.metrics.engine
        assert section is not None
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(section.sample)),
            resource=Resource.create(
                {"service.name": section.service_name, "service.version": __version__}
            ),
            span_limits=SpanLimits(max_span_attributes=64),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(section.endpoint, timeout=section.timeout_s)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("servegym.serve.router", __version__)
        self._gen_ai = {
            "gen_ai.provider.name": engine if engine in _PROVIDERS else "openai",
        }

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def begin(self, request: Request, route: str) -> Trace:
        """Begin a request's span, as part of the trace that its client names, if it names one.

        Args:
            request: The client's.
            route: Of the endpoint.
        """
        carrier: dict[str, str] = {}
        for name, value in request.fields.pairs:
            if (lower := name.lower()) in CONTEXT_HEADERS:
                # several lines of one list; two parents are none
                carrier[lower] = f"{carrier[lower]},{value}" if lower in carrier else value
        attributes: dict[str, _Value] = {
            "http.request.method": request.head.method,
            "http.route": route,
            "url.path": route,
            "url.scheme": "http",
            "gen_ai.operation.name": _OPERATIONS.get(route, route.rpartition("/")[2]),
            "servegym.request.id": request.key,
            **self._gen_ai,
        }
        span = self._tracer.start_span(
            f"{request.head.method} {route}",
            context=_W3C.extract(carrier, Context()),
            kind=SpanKind.SERVER,
            attributes=attributes,
        )
        TRACE_ID.set(f"{span.get_span_context().trace_id:032x}")
        return Trace(self._tracer, span, attributes)


class Trace:
    """The spans of one request.

    Args:
        tracer: Makes them.
        span: Of the whole request.
        attributes: That it began with.

    Attributes:
        sampled: Whether anything is recorded.
        broken: Status of an answer that has begun and broken off, and the cause.
    """

    __slots__ = ("_context", "_shared", "_span", "_tracer", "broken", "sampled")

    def __init__(self, tracer: Tracer, span: Span, attributes: Mapping[str, _Value]) -> None:
        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span, Context())
        self._shared = {k: v for k, v in attributes.items() if k.startswith("gen_ai.")}
        self.sampled = span.is_recording()
        self.broken: tuple[int, str] | None = None

    def asked(self, tenant: str, max_tokens: int | None, *, stream: bool) -> None:
        """Note what is asked for.

        Args:
            tenant: Who asks.
            max_tokens: What the client allows, `None` if it does not say.
            stream: Whether it wants a stream.
        """
        if not self.sampled:
            return
        self._shared["gen_ai.request.stream"] = stream
        if max_tokens is not None:
            self._shared["gen_ai.request.max_tokens"] = max_tokens
        self._span.set_attributes({**self._shared, "servegym.tenant": tenant})

    def decided(self, explanations: Iterable[Explanation]) -> None:
        """Make the spans of decisions that have been taken, and note what they were about."""
        for one in explanations:
            if one.model:
                self._shared["gen_ai.request.model"] = one.model
            self._span.set_attributes(
                {
                    **self._shared,
                    "servegym.slo_class": one.slo_class,
                    "servegym.prompt_tokens": one.prompt_tokens,
                    "servegym.predicted_output_tokens": one.predicted_output_tokens,
                }
            )
            values: dict[str, _Value | None] = {
                "action": one.action,
                "by": one.by,
                "reason": one.reason,
                "proposed": one.proposed,
                "propensity": one.propensity,
                "policy": one.policy,
                "candidates": one.candidates,
                "outstanding": one.outstanding,
                "scores": one.scores,
                "probabilities": one.probabilities,
                "attempts_before": one.attempts_before,
                "about": one.about,
            }
            begin_ns = one.end_ns - round(one.duration_s * 1e9)
            span = self._tracer.start_span(
                "decide",
                context=self._context,
                attributes={
                    f"servegym.decision.{name}": value
                    for name, value in values.items()
                    if value is not None
                },
                start_time=begin_ns,
            )
            span.end(one.end_ns)

    def attempt(self, replica: str, place: tuple[str, int], resends: int) -> AttemptTrace:
        """Begin the span of a request to a replica.

        Args:
            replica: Its name.
            place: Its host and port.
            resends: How often the request was sent to another before.
        """
        attributes: dict[str, _Value] = {}
        name = "request"
        if self.sampled:
            attributes = {
                **self._shared,
                "server.address": place[0],
                "server.port": place[1],
                "http.request.method": "POST",
                "servegym.replica": replica,
            }
            if resends:
                attributes["http.request.resend_count"] = resends
            model = self._shared.get("gen_ai.request.model", "")
            name = f"{self._shared['gen_ai.operation.name']} {model}".rstrip()
        span = self._tracer.start_span(
            name, context=self._context, kind=SpanKind.CLIENT, attributes=attributes
        )
        return AttemptTrace(span, self)

    def end(self, status: int) -> None:
        """The client has been answered, or has left.

        Args:
            status: Of the answer; 499 if the client has left before its end.
        """
        if self.sampled:
            status, error = self.broken or (status, str(status))
            self._span.set_attribute("http.response.status_code", status)
            if self.broken or status >= 500 or status == _LEFT:
                self._span.set_attribute("error.type", error)
            if self.broken or status >= 500:  # what clients do wrong is no error of a server
                self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class AttemptTrace:
    """The span of a request to one replica.

    Args:
        span: It.
        trace: Of the request.

    Attributes:
        head: Lines that the replica gets, so that its own spans are part of the trace.
    """

    __slots__ = ("_ended", "_span", "_trace", "head")

    def __init__(self, span: Span, trace: Trace) -> None:
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, set_span_in_context(span, Context()))
        lines = "".join([f"{name}: {value}\r\n" for name, value in carrier.items()])
        self.head = lines.encode("utf-8", "surrogateescape")
        self._span = span
        self._trace = trace
        self._ended = False

    def answered(self, status: int, cause: str, reader: Reader, first_token_s: float) -> None:
        """An answer has been passed on, to its end or not.

        Args:
            status: Of the replica's answer.
            cause: Why it is not whole, empty if it is.
            reader: Has read it.
            first_token_s: From the dispatch to the first token; NaN if it was not seen.
        """
        span = self._span
        if span.is_recording():
            prompt_tokens, _, cached_tokens = reader.usage()
            for name, value in (
                ("gen_ai.usage.input_tokens", prompt_tokens),
                ("gen_ai.usage.output_tokens", reader.output_tokens() if status == 200 else None),
                ("gen_ai.usage.cache_read.input_tokens", cached_tokens),
                ("gen_ai.response.time_to_first_chunk", first_token_s),
            ):
                if value is not None and value == value:
                    span.set_attribute(name, value)
        if cause and cause != "cancelled":
            self._trace.broken = status, cause
        self.end(cause or (str(status) if status >= 400 else ""), status)

    def end(self, error: str, status: int | None = None) -> None:
        """End the span, once.

        Args:
            error: What went wrong, empty if nothing has.
            status: Of the replica's answer, if there was one.
        """
        if self._ended:
            return
        self._ended = True
        if status is not None:
            self._span.set_attribute("http.response.status_code", status)
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()
