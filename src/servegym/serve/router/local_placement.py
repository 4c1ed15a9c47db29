"""One request where the dispatcher is: its places, its retries, its entries in the books."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from servegym.serve.job import Job
from servegym.serve.monitoring.prometheus import Histogram, observe_all
from servegym.serve.router.books import Failures
from servegym.serve.router.ejection import Attempt
from servegym.serve.router.errors import RequestError
from servegym.serve.router.explanation import Explanation, decide_explained
from servegym.serve.router.latencies import Times
from servegym.serve.router.line import Waiting
from servegym.serve.router.pages import no_model, no_replica
from servegym.serve.router.placement import Arrival, Ending, Seat
from servegym.serve.router.timers import Timer
from servegym.serve.router.upstream import UpstreamError
from servegym.typing import BoolArray

if TYPE_CHECKING:
    from servegym.serve.router.desk import LocalDesk


class LocalPlacement:
    """One request; see `Placement`.

    Args:
        desk: That it is at.
        tenant: Who asks.
        key: Names it.

    Attributes:
        key: As given.
    """

    __slots__ = (
        "_attempt",
        "_desk",
        "_explained",
        "_failures",
        "_gone",
        "_itl",
        "_job",
        "_num_moves",
        "_prefill",
        "_read_s",
        "_stream",
        "_tenant",
        "_times",
        "_token_s",
        "_traced",
        "_tried",
        "_waiting",
        "_wants_room",
        "key",
    )

    def __init__(self, desk: LocalDesk, tenant: str, key: str) -> None:
        self._desk = desk
        self._tenant = tenant
        self.key = key
        self._job: Job | None = None
        self._attempt: Attempt | None = None  # at the replica where it is, or was last
        self._prefill: Timer | None = None
        self._failures: Failures = []
        self._tried: set[int] = set()
        self._stream = self._traced = False
        self._explained: list[Explanation] = []  # what its carrier has not been told
        self._times: tuple[Times, Times] | None = None  # of its replica and of its tenant
        self._itl: tuple[Histogram, ...] = ()  # of both
        self._token_s: float | None = None  # when its last token came, or its client took more
        self._read_s = 0.0
        self._waiting: Waiting | None = None
        self._wants_room = False  # it is held for want of a replica, not by the policy
        self._gone = False
        self._num_moves = 0

    @property
    def job(self) -> Job:
        """Its place in the dispatcher's books, once it has arrived."""
        assert self._job is not None
        return self._job

    @property
    def attempt(self) -> Attempt:
        """It at its replica, once it has been placed."""
        assert self._attempt is not None
        return self._attempt

    @property
    def times(self) -> tuple[Times, Times]:
        """Where its times are counted, once it has been placed."""
        assert self._times is not None
        return self._times

    @property
    def waiting(self) -> Waiting:
        """It in the line of those that no replica has room for, once it has arrived."""
        assert self._waiting is not None
        return self._waiting

    async def admitted(self) -> None:
        """See `Placement`: `enter` has said so."""

    def arrive(self, arrival: Arrival) -> None:
        """See `Placement`."""
        desk = self._desk
        model = self._model(arrival.model)
        named = arrival.slo_class or desk.limits.of(self._tenant).slo_class
        try:
            slo_class = desk.dispatcher.slo_class(named)
        except ValueError as error:
            raise RequestError(400, str(error), "unknown_slo_class") from error
        self._stream, self._traced = arrival.stream, arrival.traced
        self._read_s = arrival.read_s
        self._job = desk.dispatcher.arrive(
            arrival.prompt,
            key=self.key,
            tenant=self._tenant,
            slo_class=slo_class,
            max_tokens=arrival.max_tokens,
            model=model,
            session=arrival.session,
        )
        level = desk.dispatcher.config.slo_classes[slo_class]
        self._waiting = Waiting(level.priority, self._job.request.arrival_s, model)
        desk.budget.request()

    async def place(self) -> Seat:
        """See `Placement`."""
        found = self.try_place()
        return found if isinstance(found, Seat) else await self.hold(found)

    async def hold(self, pause_s: float) -> Seat:
        """Wait and decide again until it has a place.

        Args:
            pause_s: What `try_place` has said.

        Raises:
            RequestError: See `try_place`.
        """
        desk = self._desk
        while True:
            begin_s = desk.dispatcher.clock()
            if self._wants_room:
                await desk.line.wait(self.waiting, pause_s)
            else:
                await asyncio.sleep(pause_s)
            self.job.held_s += desk.dispatcher.clock() - begin_s
            found = self.try_place()
            if isinstance(found, Seat):
                return found
            pause_s = found

    def try_place(self) -> Seat | float:
        """Decide once; return where it goes, or for how many seconds it is held.

        Raises:
            RequestError: If it is rejected, or no replica takes it in time.
        """
        desk, job = self._desk, self.job
        config, dispatcher = desk.config.request, desk.dispatcher
        until_s = job.request.arrival_s + config.max_hold_s
        allowed = self._allowed()
        may_hold = (
            dispatcher.state.num_held - job.request.held < config.max_held
            and dispatcher.clock() + config.hold_s <= until_s
        )
        # what has been at a replica before need not stand in line again
        is_decided = bool(np.count_nonzero(allowed)) and (
            bool(self._tried) or desk.line.may_go(self.waiting)
        )
        self._wants_room = not is_decided
        if is_decided:
            if self._traced:
                self._explained.append(
                    decide_explained(
                        dispatcher,
                        job,
                        allowed=allowed,
                        may_hold=may_hold,
                        attempts=len(self._tried),
                    )
                )
            else:
                dispatcher.decide(job, allowed=allowed, may_hold=may_hold)
            if job.replica >= 0:
                return self._sit_down(job.replica)
            if not job.request.held:
                desk.books.rejected(job)
                message = "the fleet is too busy for this request: come again later"
                raise desk.come_again(429, message, "overloaded")
            desk.line.leave(self.waiting)
            return config.hold_s
        if may_hold:
            dispatcher.wait(job)
        elif self._candidates().any():
            message = "all replicas are full, and others wait: come again later"
            raise desk.come_again(429, message, "overloaded")
        else:
            raise no_replica(config.retry_after_s, self._missing())
        # many that wait for a replica to come up need not all look so often
        return min(1.0, config.hold_s * (1.0 + dispatcher.state.num_held / 20.0))

    def explained(self) -> list[Explanation]:
        """See `Placement`."""
        explained, self._explained = self._explained, []
        return explained

    async def failed(self, error: UpstreamError) -> bool:
        """See `Placement`."""
        return self.judge(error)

    def judge(self, error: UpstreamError) -> bool:
        """Note that the replica failed it; return whether to place it again.

        What a failure says of a replica is seen when another one answers the request.
        """
        desk, attempt, replica = self._desk, self.attempt, self.attempt.replica
        self._failures.append((attempt, error))
        desk.telemetry.upstream_failures[desk.dispatcher.names[replica], error.cause] += 1
        if error.cause == "refused":
            desk.health.refused(replica)
        elif error.is_full:
            desk.health.ejection.busy(replica, error.retry_after_s)
        elif attempt.is_trial and error.cause == "timeout" and not attempt.replica_has_moved:
            desk.health.ejection.failed(attempt, hung=True)
        self._stand_up()
        self._tried.add(replica)
        again = self._may_try_again(error)
        if again:
            desk.telemetry.retries[error.cause] += 1
        return again

    async def move_on(self) -> Seat | None:
        """See `MovingPlacement`."""
        return self.try_move()

    def try_move(self) -> Seat | None:
        """Place it elsewhere if that is better now; see `move_on`."""
        desk, job, here = self._desk, self.job, self.job.replica
        config, dispatcher = desk.config.request.requeue, desk.dispatcher
        if config is None or self._num_moves >= config.max_moves:
            return None
        allowed = self._allowed() & dispatcher.placing.transfers.decoding
        there = dispatcher.reconsider(job, allowed, config.margin_requests)
        if there is None or not desk.budget.take(desk.telemetry.in_flight):
            return None
        self._num_moves += 1
        desk.telemetry.requeues[dispatcher.names[here], dispatcher.names[there.action]] += 1
        self._stand_up()
        dispatcher.requeue(job, there)
        return self._sit_down(there.action)

    def begin(self) -> None:
        """See `Placement`."""
        self._desk.books.begin(self.job, self.attempt, self.times, self._failures)
        self.attempt.waits(self._desk.dispatcher.clock())

    def tokens(self, count: int, now_s: float) -> None:
        """See `Placement`."""
        job, attempt, last_s = self._job, self._attempt, self._token_s
        assert job is not None
        assert attempt is not None
        self._desk.dispatcher.tokens(job, count, now_s)
        attempt.standing.last_token_s = now_s
        if last_s is not None:
            observe_all(self._itl, now_s - last_s)
        if count > 1:  # they came at once
            observe_all(self._itl, 0.0, count - 1)
        self._token_s = now_s

    def paused(self, now_s: float) -> None:
        """See `Placement`: nothing is owed to who takes nothing."""
        self.attempt.has_got(now_s)

    def resumed(self, now_s: float) -> None:
        """See `Placement`."""
        self.attempt.waits(now_s)
        if self._token_s is not None:
            self._token_s = now_s  # what the client took is no engine's

    def answered(self) -> None:
        """See `Placement`."""
        self._desk.dispatcher.answered(self.job)

    def broke(self, cause: str, token_s: float, status: int) -> None:
        """See `Placement`."""
        self._desk.books.broke(self.attempt, cause, token_s, status)

    def close(self, ending: Ending) -> None:
        """See `Placement`."""
        self._desk.books.close(self.job, self.attempt, self.times, ending, self._failures)
        self._stand_up()

    def end(self, status: str) -> None:
        """See `Placement`."""
        self._stand_up()
        if self._job is not None:
            # an answer that is a refusal is closed: this one has got none
            self._desk.books.end(self._job, status, full=status == "refused")

    def leave(self) -> None:
        """See `Placement`."""
        if self._gone:
            return
        self._gone = True
        if self._waiting is not None:
            self._desk.line.leave(self._waiting)
        self.end("failed")
        self._desk.telemetry.in_flight -= 1
        self._desk.limits.leave(self._tenant)

    def _note_dispatch(self, replica: int) -> None:
        """It has to wait no longer."""
        desk, job = self._desk, self.job
        desk.line.leave(self.waiting)
        times = desk.books.times(job, replica)
        if self._attempt is None:
            passed_s = desk.dispatcher.clock() - self._read_s - job.held_s
            desk.telemetry.overhead.observe(passed_s)
            desk.books.dispatched(job, times)
        self._times, self._itl = times, (times[0].itl, times[1].itl)

    def _sit_down(self, replica: int) -> Seat:
        """A replica has been chosen."""
        desk, job = self._desk, self.job
        self._note_dispatch(replica)
        self._attempt = attempt = desk.health.ejection.begin(replica, stream=self._stream)
        if not self._stream:
            # no one will say when the prompt is computed: take the known rate for it
            left_s = desk.dispatcher.prefill_left_s(job)
            self._prefill = desk.timers.after(left_s, lambda: desk.dispatcher.end_prefill(job))
        return Seat(
            desk.dispatcher.names[replica],
            desk.urls[replica],
            attempt.dispatch_s,
            self._first_token_s(attempt),
            job.request.slo_class,
            job.request.predicted_output_tokens,
        )

    def _stand_up(self) -> None:
        """It is no longer at a replica; does nothing the second time."""
        attempt = self._attempt
        if attempt is not None and not attempt.ended:
            self._desk.health.ejection.end(attempt)
            self._desk.line.call()
        if self._prefill is not None:
            self._prefill.cancel()
            self._prefill = None

    def _model(self, asked: str) -> str:
        """Return the model a request is for; engines that serve one need not be told which."""
        models = self._desk.health.models()
        if not models or asked in models:
            return asked
        if not asked and len(models) == 1:
            return next(iter(models))
        raise no_model(asked, models)

    def _allowed(self) -> BoolArray:
        """Replicas that are up, have the model, and room; the others if there is no better one.

        Worse are those that say they are full, newcomers that have their share, and to an answer
        that is not streamed, those that have stopped talking: no one would notice that they still
        do not. Those that have failed the request are the last.
        """
        health, tried = self._desk.health, self._tried
        allowed = self._candidates()
        max_load = self._desk.config.request.max_load
        if max_load is not None:
            allowed &= self._desk.dispatcher.state.has_room(max_load)
        worse = health.ejection.passed_over(stream=self._stream)
        worse += health.slow_start.held_back(allowed)
        if not worse and not tried:
            return allowed
        for avoided in ({*tried, *worse}, tried) if worse else (tried,):
            left = allowed.copy()
            left[list(avoided)] = False
            if left.any():
                return left
        return allowed

    def _candidates(self) -> BoolArray:
        """Replicas that are up and have the model, `bool[W]`."""
        return self._desk.dispatcher.state.up & self._desk.health.serving(self.job.model)

    def _first_token_s(self, attempt: Attempt) -> float | None:
        """How long an answer may take to begin."""
        config = self._desk.config.request
        if not attempt.stream:
            return config.answer_timeout_s
        if attempt.is_trial:
            return min(self._desk.health.ejection.trial_s, config.first_byte_timeout_s)
        return config.first_byte_timeout_s

    def _missing(self) -> str:
        """What it waits for that takes no requests, in words."""
        return "replica"

    def _is_too_late(self, error: UpstreamError) -> bool:
        """Whether a failure has used up the time for a whole answer."""
        return error.cause == "timeout" and not self._stream

    def _has_another(self) -> bool:
        """Whether a replica may have it that has not failed it."""
        return not self._allowed()[list(self._tried)].any()

    def _may_try_again(self, error: UpstreamError) -> bool:
        desk, failures = self._desk, self._failures
        if len(failures) > desk.config.request.max_retries:
            return False
        if self._is_too_late(error):
            return False
        denied: str | None = None
        broken = {a.replica for a, e in failures if e.cause == "disconnected"}
        if len(broken) >= desk.config.request.max_broken:
            desk.telemetry.retries_denied["poison"] += 1
            return False
        if error.of_connection:
            return True
        if sum(e.refusal is not None and not e.is_full for _, e in failures) > 1:
            denied = "request"  # two replicas say so: it is the request
        elif not self._has_another():
            denied = "replicas"  # there is no other
        elif not desk.budget.take(desk.telemetry.in_flight):
            denied = "budget"
        if denied is not None:
            desk.telemetry.retries_denied[denied] += 1
        return denied is None
