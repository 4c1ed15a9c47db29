"""The router's desk where a gateway carries the bytes: requests are placed among its endpoints."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from servegym.policy.contract import OUTSTANDING_REQUESTS
from servegym.serve.dispatcher import Dispatcher
from servegym.serve.job import Job
from servegym.serve.picker.config import PickerConfig, endpoint_of
from servegym.serve.router.desk import LocalDesk
from servegym.serve.router.health import Health
from servegym.serve.router.pages import Pages, no_replica
from servegym.serve.router.split_placement import SplitPlacement
from servegym.serve.router.telemetry import Telemetry
from servegym.serve.router.upstream import UpstreamError
from servegym.typing import BoolArray


class PickerDesk(LocalDesk):
    """A desk that knows replicas by their endpoints, too.

    Args:
        config: Of the picker.
        dispatcher: See `LocalDesk`, as of all others.
        health: Knows who is up.
        telemetry: Counts.
        pages: What operators' load balancers may see.

    Attributes:
        endpoints: Of the replicas, by slot: `ip:port`, the newest last.
    """

    def __init__(
        self,
        config: PickerConfig,
        dispatcher: Dispatcher,
        health: Health,
        telemetry: Telemetry,
        pages: Pages,
    ) -> None:
        super().__init__(config.as_router(), dispatcher, health, telemetry, pages)
        self.endpoints: dict[int, str] = {}
        self._fallbacks = config.fallbacks
        self._turn = 0

    def add(self, replica: int, url: str) -> None:
        """A replica has joined; see `LocalDesk`."""
        super().add(replica, url)
        self.endpoints[replica] = endpoint_of(self.dispatcher.names[replica], url)

    def remove(self, replica: int) -> None:
        """A replica has gone, after its last request."""
        super().remove(replica)
        del self.endpoints[replica]

    def enter(self, tenant: str, key: str) -> PickerPlacement:
        """Begin with a request; one that comes while the picker stops is served, too.

        Gateways are told by the health service to go elsewhere, and until they do there is nobody
        else to ask.
        """
        self.limits.enter(tenant, self.dispatcher.clock())  # there are none: it only counts
        self.telemetry.in_flight += 1
        return PickerPlacement(self, tenant, key)

    def at(self, endpoint: str) -> int | None:
        """Return the slot of an endpoint; of two, one of which leaves, that of the newer."""
        slots = (slot for slot, known in reversed(self.endpoints.items()) if known == endpoint)
        return next(slots, None)

    def among(self, subset: Collection[str] | None) -> BoolArray:
        """Return the replicas that a gateway leaves to choose from, `bool[W]`; `None`: all."""
        found = np.zeros(self.dispatcher.state.num_slots, np.bool_)
        for replica, known in self.endpoints.items():
            found[replica] = subset is None or known in subset
        return found

    def in_turn(self, subset: Collection[str] | None) -> list[str]:
        """Return the endpoints for a request that is no inference: replicas go in turn.

        Raises:
            RequestError: If no replica takes requests.
        """
        allowed = self.among(subset) & self.dispatcher.state.up
        slots = np.flatnonzero(allowed)
        if not len(slots):
            raise no_replica(self.config.request.retry_after_s)
        self._turn += 1
        return self.with_fallbacks(int(slots[self._turn % len(slots)]), allowed)

    def with_fallbacks(self, replica: int, allowed: BoolArray) -> list[str]:
        """Return a replica's endpoint, then of the other allowed those with the fewest requests."""
        load = self.dispatcher.state.replicas[OUTSTANDING_REQUESTS]
        others = [r for r in np.flatnonzero(allowed).tolist() if r != replica]
        others.sort(key=load.__getitem__)
        return [self.endpoints[r] for r in (replica, *others[: self._fallbacks])]


class PickerPlacement(SplitPlacement):
    """One request of a gateway; see `LocalPlacement`.

    Attributes:
        subset: Endpoints among which to choose; `None`: the gateway does not say.
    """

    __slots__ = ("_unseen", "subset")
    _desk: PickerDesk

    def __init__(self, desk: PickerDesk, tenant: str, key: str) -> None:
        super().__init__(desk, tenant, key)
        self.subset: Collection[str] | None = None
        self._unseen = False

    def endpoints(self) -> list[str]:
        """Return where it goes, now that it has been placed, and where it may go instead."""
        job, transfers = self.job, self._desk.dispatcher.placing.transfers
        allowed = self._allowed() & transfers.decoding if job.moving is None else self._places()
        return self._desk.with_fallbacks(job.replica, allowed)

    def prefiller(self) -> str:
        """Return the endpoint of the replica that prefills it for another; empty: none does."""
        moving = self.job.moving
        return "" if moving is None else self._desk.endpoints[moving.source]

    def served(self, endpoint: str) -> None:
        """Tell who has answered; another than the chosen one: the gateway has tried again."""
        replica = self._desk.at(endpoint)
        if replica is None or self.job.ended or endpoint == self._desk.endpoints[self.job.replica]:
            return
        self.judge(UpstreamError("disconnected"))
        self._desk.dispatcher.moved(self.job, replica)
        self._sit_down(replica)

    def busy(self, retry_after_s: float | None) -> None:
        """The replica has said that it is full."""
        self._desk.health.ejection.busy(self.job.replica, retry_after_s)

    def unseen(self) -> Job:
        """Nothing more will be heard of it: `leave` does not end it; return it for who does."""
        self._unseen = True
        return self.job

    def end(self, status: str) -> None:
        """See `Placement`; one that goes on unseen keeps its place in the books."""
        if self._unseen:  # and the time at which its prompt counts as computed
            self._desk.health.ejection.end(self.attempt)
        else:
            super().end(status)

    def _up(self) -> BoolArray:
        return super()._up() & self._desk.among(self.subset)

    def _model(self, asked: str) -> str:
        """Return the model; without the body it is not known which one is asked for."""
        return super()._model(asked) if asked else ""
