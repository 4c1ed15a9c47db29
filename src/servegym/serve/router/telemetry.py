"""What the router counts of itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from servegym.serve.monitoring.prometheus import Exposition, Histogram
from servegym.serve.router.latencies import Latencies

_PREFILL_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_OVERHEAD_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)


@dataclass
class Telemetry:
    """Counters and histograms of the router.

    Attributes:
        requests: By endpoint and status.
        outcomes: By how requests ended.
        upstream_failures: By replica and cause.
        retries: By cause.
        retries_denied: By what spoke against them: `budget`, `request` (two replicas have failed
            it), `poison` (two have broken off), `replicas` (there is no other).
        requeues: Of streams without a token, by the replica that they left and that they went to.
        prefills: Of requests that decode elsewhere, by replica and `ok` or `failed`.
        slo: Of requests in SLO classes with limits, by class and whether they met them.
        tenant_outcomes: By tenant and how requests ended.
        tenant_tokens: By tenant, and `prompt` or `output`; of answers that came to their end.
        in_flight: Requests in the router.
        latencies: Times by replica and tenant; knows the tenants that are told apart.
        overhead: From the end of the request's body to its first dispatch, holds not counted.
        prefill: From the dispatch of such a prefill to its end.
    """

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    upstream_failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    retries: Counter[str] = field(default_factory=Counter)
    retries_denied: Counter[str] = field(default_factory=Counter)
    requeues: Counter[tuple[str, str]] = field(default_factory=Counter)
    prefills: Counter[tuple[str, str]] = field(default_factory=Counter)
    slo: Counter[tuple[str, bool]] = field(default_factory=Counter)
    tenant_outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    tenant_tokens: Counter[tuple[str, str]] = field(default_factory=Counter)
    in_flight: int = 0
    latencies: Latencies = field(default_factory=Latencies)
    overhead: Histogram = field(default_factory=lambda: Histogram(_OVERHEAD_S))
    prefill: Histogram = field(default_factory=lambda: Histogram(_PREFILL_S))

    def forget(self, replica: str) -> None:
        """A replica has gone: its name may never come back."""
        for counts in (self.upstream_failures, self.prefills):
            for key in [key for key in counts if key[0] == replica]:
                del counts[key]
        for pair in [pair for pair in self.requeues if replica in pair]:
            del self.requeues[pair]
        self.latencies.forget(replica)

    def outcome(self, tenant: str, how: str) -> None:
        """Count how a request has ended."""
        self.outcomes[how] += 1
        self.tenant_outcomes[self.latencies.label(tenant), how] += 1

    def tokens(self, tenant: str, prompt: int, output: int) -> None:
        """Count the tokens of an answer that has come to its end."""
        label = self.latencies.label(tenant)
        self.tenant_tokens[label, "prompt"] += prompt
        self.tenant_tokens[label, "output"] += output

    def write(self, page: Exposition) -> None:
        """Write everything onto a page."""
        page.counter(
            "servegym_router_requests",
            "Answers to clients",
            [
                ({"endpoint": endpoint, "status": str(status)}, count)
                for (endpoint, status), count in sorted(self.requests.items())
            ],
        )
        page.counter(
            "servegym_router_outcomes",
            "How requests ended",
            [({"outcome": name}, count) for name, count in sorted(self.outcomes.items())],
        )
        page.counter(
            "servegym_router_upstream_failures",
            "Requests that failed at a replica",
            [
                ({"replica": replica, "cause": cause}, count)
                for (replica, cause), count in sorted(self.upstream_failures.items())
            ],
        )
        page.counter(
            "servegym_router_retries",
            "Requests sent to another replica",
            [({"cause": cause}, count) for cause, count in sorted(self.retries.items())],
        )
        page.counter(
            "servegym_router_retries_denied",
            "Failed requests that were not sent to another replica",
            [({"reason": name}, count) for name, count in sorted(self.retries_denied.items())],
        )
        page.counter(
            "servegym_router_requeues",
            "Streams that waited for their first token and were sent to another replica",
            [
                ({"replica": replica, "to": other}, count)
                for (replica, other), count in sorted(self.requeues.items())
            ],
        )
        if self.prefills:  # of a fleet without roles there are none
            page.counter(
                "servegym_router_prefills",
                "Prefills of requests that decode elsewhere",
                [
                    ({"replica": replica, "result": result}, count)
                    for (replica, result), count in sorted(self.prefills.items())
                ],
            )
            page.histogram(
                "servegym_router_prefill_seconds",
                "From the dispatch of such a prefill to its end",
                self.prefill,
            )
        page.counter(
            "servegym_slo_requests",
            "Requests in SLO classes with limits, by whether they met them",
            [
                ({"slo_class": name, "met": "yes" if met else "no"}, count)
                for (name, met), count in sorted(self.slo.items())
            ],
        )
        page.counter(
            "servegym_tenant_outcomes",
            "How requests ended, by tenant",
            [
                ({"tenant": tenant, "outcome": how}, count)
                for (tenant, how), count in sorted(self.tenant_outcomes.items())
            ],
        )
        page.counter(
            "servegym_tenant_tokens",
            "Tokens of answers that came to their end, by tenant",
            [
                ({"tenant": tenant, "kind": kind}, count)
                for (tenant, kind), count in sorted(self.tenant_tokens.items())
            ],
        )
        page.gauge("servegym_router_in_flight", "Requests in the router", self.in_flight)
        page.histogram(
            "servegym_router_overhead_seconds", "Body read to first dispatch", self.overhead
        )
        self.latencies.write(page)
