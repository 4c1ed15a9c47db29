"""Replicas that do a part of a request: one keeps the KV it has computed, another fetches it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from servegym.cluster import state as st
from servegym.cluster.spec import ReplicaType, TransferRules
from servegym.serve.engine.core import Event
from servegym.serve.engine.replica import Replica
from servegym.serve.engine.request import EngineRequest, Observer, Status


@dataclass(slots=True, eq=False)
class Kept:
    """KV of a prefilled request that a replica keeps until it is fetched.

    Attributes:
        source: The replica, among those of the fleet.
        prompt_tokens: Of the request.
        release: Called with the time when it has been fetched, or is given up.
        is_taken: Whether somebody is fetching it.
    """

    source: int
    prompt_tokens: int
    release: Callable[[float], None]
    is_taken: bool = False


class Links:
    """When the links are free over which replicas send KV, for all replicas of a fleet.

    Attributes:
        free_s: By replica, seconds of the clock that all have.
    """

    def __init__(self) -> None:
        self.free_s: dict[int, float] = {}


class PrefillReplica(Replica):
    """An engine that keeps the KV of what it has prefilled; every answer is one token long.

    Args:
        transfers: How KV comes and goes.
        settings: See `Replica`.
    """

    def __init__(self, *args: Any, transfers: TransferRules, **settings: Any) -> None:
        self._kept: dict[EngineRequest, None] = {}
        super().__init__(*args, transfers=transfers, **settings)

    @property
    def num_kept(self) -> int:
        """Requests whose KV is kept."""
        return len(self._kept)

    def release(self, request: EngineRequest, now_s: float) -> None:
        """The KV of a request has been fetched, or is given up; does nothing the second time."""
        if request in self._kept:
            del self._kept[request]
            self._core.release_kept(request._place, self._while_in_step(now_s))
            self._foresee()

    def fail(self, now_s: float) -> list[EngineRequest]:
        """See `Replica`: what was kept is lost, too."""
        for request in self._kept:
            self._core.leave(request._place)
        self._kept.clear()
        return super().fail(now_s)

    def _emit_after_prefill(self, request: EngineRequest, now_s: float) -> None:
        request._generated = request.output_tokens
        self._observer.emitted(request, now_s)
        request.first_token_s = request.last_token_s = now_s
        self._kept[request] = None
        del self._inside[request._place]
        request.status = Status.FINISHED
        self.outbox[request] = None
        self._observer.finished(request, now_s)


class DecodeReplica(Replica):
    """An engine that fetches KV from replicas that prefill, and computes whole requests, too.

    Args:
        index: The replica, among those of the fleet.
        transfers: How KV comes and goes.
        other_ends: Types of the replicas that prefill.
        links: Of all replicas.
        settings: See `Replica`.
    """

    def __init__(
        self,
        *args: Any,
        transfers: TransferRules,
        other_ends: Sequence[ReplicaType],
        links: Links,
        **settings: Any,
    ) -> None:
        self._core_due_s = math.inf
        self._links = links
        # those whose transfer has not begun, in order: what they fetch, and of what kind it is from
        self._queued: dict[EngineRequest, tuple[Kept, int]] = {}
        self._coming: dict[EngineRequest, Kept] = {}
        super().__init__(*args, transfers=transfers, other_ends=tuple(other_ends), **settings)

    def fetch(self, request: EngineRequest, kept: Kept, kind: int, now_s: float) -> None:
        """Put a request into the waiting queue whose KV another replica keeps.

        Args:
            request: It.
            kept: Its KV.
            kind: Of the replica that keeps it, among `other_ends`.
            now_s: The time.

        Raises:
            ConfigError: If it can never fit.
        """
        self.submit(request, now_s)
        kept.is_taken = True
        self._queued[request] = kept, kind
        self._core.fetch(request._place)
        self._foresee()

    def step(self) -> None:
        """Do what is due at `due_s`; what lands at the end of a step lands before it."""
        if self._core.next_landing_s <= self._core_due_s:
            for event in self._core.land_due(self.due_s):
                if event.kind == st.EV_LAND:
                    self._coming.pop(self._inside[event.request]).release(self.due_s)
            self._foresee()
            return
        self.due_s = self._core_due_s
        super().step()
        self._look_ahead()

    def postpone(self, until_s: float) -> None:
        """See `Replica`; what is on its way lands when it would have."""
        self.due_s = self._core_due_s
        super().postpone(until_s)

    def abort(self, request: EngineRequest, now_s: float) -> None:
        """See `Replica`; KV that it was to fetch is given up."""
        kept = self._forget(request)
        if kept is None:
            super().abort(request, now_s)
        elif request.status in (Status.WAITING, Status.RUNNING):
            self._core.withdraw(request._place, self._while_in_step(now_s))
            self._leave(request, Status.ABORTED)
            self._foresee()
            kept.release(now_s)

    def fail(self, now_s: float) -> list[EngineRequest]:
        """See `Replica`."""
        lost = super().fail(now_s)
        for request in lost:
            if kept := self._forget(request):
                kept.release(now_s)
        return lost

    def _forget(self, request: EngineRequest) -> Kept | None:
        queued = self._queued.pop(request, None)
        return queued[0] if queued else self._coming.pop(request, None)

    def _foresee(self) -> None:
        super()._foresee()
        self._look_ahead()

    def _look_ahead(self) -> None:
        self._core_due_s = self.due_s
        self.due_s = min(self.due_s, self._core.next_landing_s)

    def _turn(self, now_s: float) -> None:
        for kept, kind in self._queued.values():  # the first: others wait behind it
            self._core.set_other_end(kind, self._links.free_s.get(kept.source, 0.0))
            break
        super()._turn(now_s)

    def _note(self, event: Event, request: EngineRequest) -> None:
        if event.kind == st.EV_TRANSFER:
            kept, _ = self._queued.pop(request)
            self._coming[request] = kept
            self._links.free_s[kept.source] = self._core.other_end_free_s()
        super()._note(event, request)

    def _emit_after_prefill(self, request: EngineRequest, now_s: float) -> None:
        if math.isnan(request.first_scheduled_s):  # admitted since its KV has landed
            request.first_scheduled_s = now_s
            request.cached_tokens = request.prompt_tokens - 1
            self._observer.admitted(request, now_s)
        super()._emit_after_prefill(request, now_s)


def make_replica(
    kind: ReplicaType,
    observer: Observer,
    *,
    transfers: TransferRules,
    other_ends: Sequence[ReplicaType],
    links: Links,
    **settings: Any,
) -> PrefillReplica | DecodeReplica:
    """Make a replica of a fleet in which some only prefill or decode.

    Args:
        kind: Its type, with its role; one that decodes computes whole requests, too.
        observer: Told what happens.
        transfers: How KV comes and goes.
        other_ends: Types of the replicas that prefill.
        links: Of all replicas.
        settings: See `Replica`.
    """
    if kind.role == "prefill":
        return PrefillReplica(kind, observer, transfers=transfers, **settings)
    mixed = replace(kind, role="mixed")
    return DecodeReplica(
        mixed, observer, transfers=transfers, other_ends=other_ends, links=links, **settings
    )


class _Nobody:
    """Is told what happens, and does nothing about it."""

    def admitted(self, request: EngineRequest, now_s: float) -> None:
        pass

    def preempted(self, request: EngineRequest, now_s: float) -> None:
        pass

    def emitted(self, request: EngineRequest, now_s: float) -> None:
        pass

    def finished(self, request: EngineRequest, now_s: float) -> None:
        pass

    def decoded(self, gap_s: float, count: int) -> None:
        pass


def rehearse_roles(kind: ReplicaType, transfers: TransferRules) -> None:
    """Call every kernel of transfers once; see `core.rehearse`."""
    ends = [replace(kind, role=role, num_blocks=64) for role in ("prefill", "decode")]
    source, target = [
        make_replica(end, _Nobody(), transfers=transfers, other_ends=ends[:1], links=Links())
        for end in ends
    ]
    assert isinstance(source, PrefillReplica)
    assert isinstance(target, DecodeReplica)
    leg = EngineRequest("rehearsed", 16, 1, lambda j: j)
    source.submit(leg, 0.0)
    while source.due_s < math.inf:
        source.step()
    kept = Kept(0, 16, lambda now_s: source.release(leg, now_s))
    for name in ("fetched", "withdrawn"):
        request = EngineRequest(name, 16, 2, lambda j: j)
        target.fetch(request, kept, 0, source._last_s)
        if name == "withdrawn":
            target.abort(request, target.due_s)
        while target.due_s < math.inf:
            target.step()
