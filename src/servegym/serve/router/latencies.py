"""How long things took, by replica and by tenant.

A value is counted twice, for its replica and for its tenant, and not for each pair of them: a page
for a hundred replicas and a hundred tenants is made in milliseconds, while every stream waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from servegym.serve.monitoring.prometheus import Exposition, Histogram

#: Upper bounds, seconds: fine enough to read a p99 of TTFT and of whole answers off.
_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
#: Steps of engines take 5 to 100 ms; what is above are preemptions, long prefills and stalls.
_ITL_S = (0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
#: A decision takes less than a millisecond; what is above are holds.
_QUEUE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

#: Tenants without series of their own, all together.
OTHERS = "other"


def _latency() -> Histogram:
    return Histogram(_LATENCY_S)


@dataclass(slots=True, eq=False)
class Times:
    """Times of requests, seconds.

    Attributes:
        ttft: From arrival to first token, of streams.
        itl: Between two tokens of a stream, as they come to the router. Of tokens that come at
            once the first has the gap, the others none; what a client took to take more is none.
        e2e: From arrival to the end of a whole answer.
        queue: From arrival to the first dispatch: the decision and all holds.
    """

    ttft: Histogram = field(default_factory=_latency)
    itl: Histogram = field(default_factory=lambda: Histogram(_ITL_S))
    e2e: Histogram = field(default_factory=_latency)
    queue: Histogram = field(default_factory=lambda: Histogram(_QUEUE_S))


#: Takes one quantity out of times.
Quantity = Callable[[Times], Histogram]
_QUANTITIES: tuple[tuple[str, str, Quantity], ...] = (
    ("ttft", "From arrival to the first token, of streams", lambda times: times.ttft),
    ("itl", "Between two tokens of a stream", lambda times: times.itl),
    ("e2e", "From arrival to the end of a whole answer", lambda times: times.e2e),
    ("queue", "From arrival to the first dispatch: decision and holds", lambda times: times.queue),
)


class Latencies:
    """Times of all replicas and tenants.

    Args:
        tenants: Those that have series of their own, so that there are no more series than the
            configuration names; the others are `other`.
    """

    def __init__(self, tenants: Iterable[str] = ()) -> None:
        self._tenants = frozenset(tenants)
        self._by_tenant: dict[str, Times] = {}
        self._by_replica: dict[str, Times] = {}
        self._gone = Times()  # of replicas that are no longer of the fleet

    def label(self, tenant: str) -> str:
        """Return what a tenant is called on the page."""
        return tenant if tenant in self._tenants else OTHERS

    def of(self, replica: str, tenant: str) -> tuple[Times, Times]:
        """Return where times of a tenant's requests on a replica are counted: in both."""
        label = self.label(tenant)
        if (one := self._by_replica.get(replica)) is None:
            one = self._by_replica[replica] = Times()
        if (other := self._by_tenant.get(label)) is None:
            other = self._by_tenant[label] = Times()
        return one, other

    def total(self, quantity: Quantity) -> Histogram:
        """Add one quantity up over all requests."""
        total = Histogram(quantity(self._gone).bounds)
        for times in (self._gone, *self._by_replica.values()):
            total.add(quantity(times))
        return total

    def forget(self, replica: str) -> None:
        """A replica has gone: its series end, and what it did stays in the sums."""
        if (times := self._by_replica.pop(replica, None)) is not None:
            for _, _, quantity in _QUANTITIES:
                quantity(self._gone).add(quantity(times))

    def write(self, page: Exposition) -> None:
        """Write sums over all, by replica and by tenant."""
        for name, text, quantity in _QUANTITIES:
            page.histogram(f"servegym_router_{name}_seconds", text, self.total(quantity))
        for label, found in (("replica", self._by_replica), ("tenant", self._by_tenant)):
            for name, text, quantity in _QUANTITIES:
                page.histograms(
                    f"servegym_{label}_{name}_seconds",
                    f"{text}, by {label}",
                    [({label: key}, quantity(times)) for key, times in sorted(found.items())],
                )
