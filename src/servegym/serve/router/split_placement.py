"""One request of a fleet with roles: whether it is prefilled apart, where, and where it decodes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

import numpy as np

from servegym.serve.router.config import DisaggregationConfig
from servegym.serve.router.disaggregation import PrefillError
from servegym.serve.router.ejection import Attempt
from servegym.serve.router.explanation import decide_explained
from servegym.serve.router.local_placement import LocalPlacement
from servegym.serve.router.pages import no_replica
from servegym.serve.router.placement import Apart, Arrival, Ending, Seat
from servegym.serve.router.roles import Candidates, candidates
from servegym.serve.router.upstream import UpstreamError
from servegym.typing import BoolArray

if TYPE_CHECKING:
    from servegym.serve.router.desk import LocalDesk

_Step = Literal["prefill", "decode", "both"]


class SplitPlacement(LocalPlacement):
    """See `LocalPlacement` and `DividedPlacement`.

    What a replica gets that only prefills is dispatched there, and then placed: with `nixl` when
    the prefill is over, else at once. If either replica fails it, it is dispatched anew.
    """

    __slots__ = ("_beside", "_decode_by_s", "_divisible", "_is_prefill", "_over")

    def __init__(self, desk: LocalDesk, tenant: str, key: str) -> None:
        super().__init__(desk, tenant, key)
        self._divisible = self._is_prefill = False  # whether it is seated to be prefilled
        self._decode_by_s = 0.0
        # at the replica that prefills, while it is seated where it decodes
        self._beside: Attempt | None = None
        self._over: asyncio.TimerHandle | None = None  # when that prefill should be over

    def arrive(self, arrival: Arrival) -> None:
        """See `Placement`."""
        self._divisible = arrival.divisible
        super().arrive(arrival)

    async def prefilled(self, cached_tokens: int | None) -> Seat:
        """See `DividedPlacement`."""
        self.end_prefill(cached_tokens)
        seat = self.try_decode()
        return await self.hold_decode() if seat is None else seat

    def end_prefill(self, cached_tokens: int | None) -> None:
        """The replica has prefilled it, where it is seated for that; `try_decode` follows.

        Args:
            cached_tokens: See `prefilled`.
        """
        desk, job = self._desk, self.job
        assert job.moving is not None
        desk.books.prefilled(job, self.attempt)
        self._stand_up()
        self._is_prefill = False
        desk.dispatcher.placing.prefilled(job)
        job.cached_tokens = cached_tokens
        self._decode_by_s = desk.dispatcher.clock() + desk.config.request.max_hold_s

    def try_decode(self) -> Seat | None:
        """Decide where it decodes; `None`: no replica takes it now.

        Raises:
            RequestError: If that has been so for too long.
        """
        config = self._desk.config.request
        allowed = self._places()
        if allowed.any():
            return self._decode(allowed, "decode")
        if self._desk.dispatcher.clock() + config.hold_s > self._decode_by_s:
            raise no_replica(config.retry_after_s, "replica that decodes")
        return None

    async def hold_decode(self) -> Seat:
        """Wait until a replica decodes it.

        Raises:
            RequestError: See `try_decode`.
        """
        while True:
            await asyncio.sleep(self._desk.config.request.hold_s)
            if (seat := self.try_decode()) is not None:
                return seat

    def prefilled_beside(self) -> None:
        """See `DividedPlacement`."""
        if self._beside is not None:
            self._desk.books.prefilled(self.job, self._beside)
            self._end_beside()
            self._desk.dispatcher.placing.prefilled(self.job)

    def judge(self, error: UpstreamError) -> bool:
        """See `LocalPlacement`."""
        beside = self._beside
        self._is_prefill |= isinstance(error, PrefillError)
        if isinstance(error, PrefillError) and beside is not None:
            self._desk.health.ejection.end(self.attempt)
            self._attempt, self._beside = beside, None
        elif beside is not None and self._split.protocol == "sidecar":
            self._tried.add(beside.replica)  # the sidecar does not say who has failed
        if self._is_prefill:
            name = self._desk.dispatcher.names[self.attempt.replica]
            self._desk.telemetry.prefills[name, "failed"] += 1
        again = super().judge(error)
        self._is_prefill = False
        return again

    def begin(self) -> None:
        """See `Placement`."""
        super().begin()
        self._end_beside()

    def close(self, ending: Ending) -> None:
        """See `Placement`."""
        if self._is_prefill or self.job.prefill is not None:
            # the replica that decodes calls cached what the other has computed
            ending = ending._replace(cached_tokens=self.job.cached_tokens)
        super().close(ending)

    @property
    def _split(self) -> DisaggregationConfig:
        return self._desk.config.disaggregation

    def _sit_down(self, replica: int) -> Seat:
        dispatcher = self._desk.dispatcher
        if not dispatcher.placing.transfers.only_prefills(replica):
            return super()._sit_down(replica)
        if self._split.protocol != "nixl":
            self._note_dispatch(replica)
            self._beside = self._desk.health.ejection.begin(replica, stream=False)
            return self._decode(self._places(), "both")
        self._note_dispatch(replica)
        self._is_prefill = True
        self._attempt = attempt = self._desk.health.ejection.begin(replica, stream=False)
        return Seat(
            dispatcher.names[replica],
            self._desk.urls[replica],
            attempt.dispatch_s,
            self._split.prefill_timeout_s,
            self.job.request.slo_class,
            self.job.request.predicted_output_tokens,
            self._apart("prefill", replica),
        )

    def _decode(self, allowed: BoolArray, step: _Step) -> Seat:
        """Decide where it decodes."""
        dispatcher, job = self._desk.dispatcher, self.job
        assert job.moving is not None
        source = job.moving.source
        if self._traced:
            self._explained.append(
                decide_explained(
                    dispatcher,
                    job,
                    allowed=allowed,
                    may_hold=False,
                    attempts=len(self._tried),
                    placing=True,
                )
            )
        else:
            dispatcher.placing.decide(job, allowed)
        if step == "both" and self._split.protocol == "sidecar":
            # nobody will say when the prompt is computed: take the known rate for it
            left_s = dispatcher.state.prefill_left_s(source)
            loop = asyncio.get_running_loop()
            self._over = loop.call_later(left_s, dispatcher.placing.prefilled, job)
        seat = super()._sit_down(job.request.replica)
        return seat._replace(apart=self._apart(step, source))

    def _apart(self, step: _Step, source: int) -> Apart:
        desk = self._desk
        port = desk.bootstrap_ports[source]
        return Apart(step, desk.dispatcher.names[source], desk.urls[source], port)

    def _stand_up(self) -> None:
        super()._stand_up()
        self._end_beside()

    def _end_beside(self) -> None:
        if self._over is not None:
            self._over.cancel()
            self._over = None
        if self._beside is not None:
            self._desk.health.ejection.end(self._beside)
            self._beside = None

    def _up(self) -> BoolArray:
        """Replicas that are up and have the model, whatever their roles, `bool[W]`."""
        return super()._candidates()

    def _found(self) -> Candidates:
        transfers = self._desk.dispatcher.placing.transfers
        if not transfers.are_possible:
            return Candidates(self._up(), "replica")
        return candidates(
            self._up(),
            transfers,
            divisible=self._divisible,
            decoders_prefill=self._split.decoders_prefill,
            tried=self._tried,
        )

    def _candidates(self) -> BoolArray:
        return self._found().slots

    def _missing(self) -> str:
        return self._found().missing

    def _places(self) -> BoolArray:
        """Replicas where it may decode: those that have not failed it and have room, if any."""
        desk = self._desk
        found = self._up() & desk.dispatcher.placing.transfers.decoding
        avoided = list(self._tried | set(desk.health.ejection.passed_over(stream=self._stream)))
        better = found.copy()
        better[avoided] = False
        max_load = desk.config.request.max_load
        if max_load is not None:
            room = better & desk.dispatcher.state.has_room(max_load)
            better = room if room.any() else better
        for left in (better, _without(found, self._tried)):
            if left.any():
                return left
        return found

    def _is_too_late(self, error: UpstreamError) -> bool:
        return super()._is_too_late(error) and not self._is_prefill

    def _may_try_again(self, error: UpstreamError) -> bool:
        if super()._may_try_again(error):
            return True
        tried_enough = len(self._failures) > self._desk.config.request.max_retries
        refusals = sum(e.refusal is not None and not e.is_full for _, e in self._failures)
        whole = self._is_prefill and tried_enough and refusals < 2 and self._split.decoders_prefill
        if whole:  # the last resort: who decodes does all of it
            self._divisible = False
        return whole and self._has_another()

    def _has_another(self) -> bool:
        found = self._up() & self._desk.dispatcher.placing.transfers.decoding
        return super()._has_another() and bool(_without(found, self._tried).any())


def _without(slots: BoolArray, left_out: set[int]) -> BoolArray:
    left = np.array(slots)
    left[list(left_out)] = False
    return left
