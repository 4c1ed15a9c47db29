"""The second decision about a request that is prefilled on its own: where it decodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from servegym.cluster.spec import Role
from servegym.policy.policy import Observations
from servegym.serve.runtime import Decision
from servegym.serve.transfers import Transfers
from servegym.typing import BoolArray

if TYPE_CHECKING:
    from servegym.serve.dispatcher import Dispatcher
    from servegym.serve.job import Job


class Prefill(NamedTuple):
    """A prefill that has come to its end, for the log.

    Attributes:
        replica: Name of the replica that computed it.
        after_s: When, seconds from the arrival.
    """

    replica: str
    after_s: float


class Placing:
    """Takes that decision and keeps its books.

    Args:
        dispatcher: That it is a part of.

    Attributes:
        transfers: What is on its way.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.transfers = Transfers(dispatcher.state)

    def set_role(self, slot: int, role: Role, kv_tokens_per_s: float) -> None:
        """Say what a replica does of a request; see `Transfers.set_role`."""
        self.transfers.set_role(slot, role, kv_tokens_per_s)

    def begin(self, job: Job, replica: int, now_s: float) -> None:
        """A request has been dispatched to a replica that only prefills."""
        job.moving = self.transfers.begin(job.request, replica, now_s)

    def prefilled(self, job: Job) -> None:
        """The prefill is over: its prefix is cached where that was, and its KV can be fetched."""
        moving, dispatcher = job.moving, self._dispatcher
        if moving is None or moving.leg is None:
            return
        dispatcher.index.add(moving.source, job.prompt.keys)
        self.transfers.prefilled(moving)
        name, now_s = dispatcher.names[moving.source], dispatcher.clock()
        job.prefill = Prefill(name, now_s - job.request.arrival_s)

    def decide(self, job: Job, allowed: BoolArray) -> Decision:
        """Decide where a request decodes, and book it.

        It may be prefilled already, or while it waits there.

        Args:
            job: It has been dispatched to a replica that only prefills.
            allowed: Replicas in question, by slot, `bool[W]`; one at least.

        Returns:
            Its action is a slot.
        """
        moving, dispatcher = job.moving, self._dispatcher
        assert moving is not None
        state, now_s = dispatcher.state, dispatcher.clock()
        self.transfers.see(moving, now_s)
        needs, by_prefix = dispatcher.needs()
        seen = state.observe(
            job.request,
            now_s,
            hit_tokens=dispatcher.hits(job) if by_prefix else None,
            allowed=allowed & self.transfers.decoding,
            may_hold=False,
            needs=needs,
        )
        mask = seen.mask.copy()
        mask[0, -2:] = False  # no placing is held or rejected
        seen = Observations(seen.replicas, seen.request, mask)
        decision = dispatcher.choose(seen, job.request.key, placing=True)
        if dispatcher.log is not None:
            job.placements.append(self._row(job, decision, now_s))
        self.transfers.place(moving, job.request, decision.action, now_s)
        return decision

    def landed(self, job: Job) -> None:
        """The first token has come from where it decodes, whose prefix cache has its prompt now."""
        if job.moving is not None and job.request.replica >= 0:
            self.prefilled(job)
            self._dispatcher.index.add(job.request.replica, job.prompt.keys)
            self.give_up(job)

    def give_up(self, job: Job) -> None:
        """Its KV is of no use any more, wherever it is."""
        if job.moving is not None:
            self.transfers.landed(job.moving, job.request)
            job.moving = None

    def _row(self, job: Job, decision: Decision, now_s: float) -> dict[str, Any]:
        dispatcher = self._dispatcher
        proposed = decision.proposed
        return {
            "after_s": now_s - job.request.arrival_s,
            "replica_name": dispatcher.names[decision.action],
            "by": decision.by,
            "reason": decision.reason.value,
            "duration_s": decision.duration_s,
            "proposed": None if proposed is None else dispatcher.names[proposed],
        }
