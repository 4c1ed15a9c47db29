"""What the router counts of itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from servegym.serve.monitoring.prometheus import Exposition, Histogram

#: Upper bounds, seconds: fine enough to read a p99 of TTFT and of whole answers off.
_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
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
            it), `replicas` (there is no other).
        in_flight: Requests in the router.
        ttft: From arrival to first token, of streams, seconds.
        e2e: From arrival to end, seconds.
        overhead: From the end of the request's body to its first dispatch, holds not counted.
    """

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    upstream_failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    retries: Counter[str] = field(default_factory=Counter)
    retries_denied: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    ttft: Histogram = field(default_factory=lambda: Histogram(_LATENCY_S))
    e2e: Histogram = field(default_factory=lambda: Histogram(_LATENCY_S))
    overhead: Histogram = field(default_factory=lambda: Histogram(_OVERHEAD_S))

    def forget(self, replica: str) -> None:
        """A replica has gone: its name may never come back."""
        for key in [key for key in self.upstream_failures if key[0] == replica]:
            del self.upstream_failures[key]

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
        page.gauge("servegym_router_in_flight", "Requests in the router", self.in_flight)
        page.histogram("servegym_router_ttft_seconds", "To the first token of streams", self.ttft)
        page.histogram("servegym_router_e2e_seconds", "Arrival to end", self.e2e)
        page.histogram(
            "servegym_router_overhead_seconds", "Body read to first dispatch", self.overhead
        )
