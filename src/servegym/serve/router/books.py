"""What becomes of requests: in the dispatcher's books, in counters, in replicas' standing."""

from __future__ import annotations

import math

from servegym.serve.dispatcher import Dispatcher, SloConfig
from servegym.serve.job import Job
from servegym.serve.monitoring.prometheus import observe_all
from servegym.serve.router.ejection import Attempt
from servegym.serve.router.health import Health
from servegym.serve.router.latencies import Times
from servegym.serve.router.placement import Ending
from servegym.serve.router.telemetry import Telemetry
from servegym.serve.router.upstream import UpstreamError

#: Failures of a request before its answer had begun, in order.
Failures = list[tuple[Attempt, UpstreamError]]


class Books:
    """Notes how requests begin and end.

    Args:
        dispatcher: Keeps the books.
        health: Told what becomes of requests.
        telemetry: Counts.
    """

    def __init__(self, dispatcher: Dispatcher, health: Health, telemetry: Telemetry) -> None:
        self.dispatcher = dispatcher
        self._ejection = health.ejection
        self._telemetry = telemetry
        for level in filter(_has_limits, dispatcher.config.slo_classes):
            # from the start: of a series that begins with its first miss Prometheus sees no rise
            telemetry.slo.update({(level.name, met): 0 for met in (False, True)})

    def times(self, job: Job, replica: int) -> tuple[Times, Times]:
        """Return where times of a request on a replica are counted."""
        return self._telemetry.latencies.of(self.dispatcher.names[replica], job.tenant)

    def dispatched(self, job: Job, times: tuple[Times, Times]) -> None:
        """A request is sent to a replica, whose times are given, for the first time."""
        queued_s = self.dispatcher.clock() - job.request.arrival_s
        observe_all([one.queue for one in times], queued_s)

    def prefilled(self, job: Job, attempt: Attempt) -> None:
        """A replica has prefilled a request that decodes elsewhere."""
        self._ejection.first_token(attempt)
        self._ejection.whole(attempt)
        name = self.dispatcher.names[attempt.replica]
        self._telemetry.prefills[name, "ok"] += 1
        self._telemetry.prefill.observe(self.dispatcher.clock() - attempt.dispatch_s)

    def begin(
        self, job: Job, attempt: Attempt, times: tuple[Times, Times], failures: Failures
    ) -> None:
        """The first token of a stream has come; those who failed it before are judged."""
        self._answered(attempt, failures)
        self.dispatcher.first_token(job)
        ttft_s = self.dispatcher.clock() - job.request.arrival_s
        observe_all([one.ttft for one in times], ttft_s)

    def broke(self, attempt: Attempt, cause: str, token_s: float, status: int) -> None:
        """An answer broke off: whose fault is it?

        Args:
            attempt: At the replica.
            cause: `broken`, `cut`, `stall` or `error_event`.
            token_s: When its last token came.
            status: That the replica's error names.
        """
        self._telemetry.upstream_failures[self.dispatcher.names[attempt.replica], cause] += 1
        moved = cause == "stall" and attempt.standing.last_token_s > token_s
        theirs = cause == "error_event" and status < 500
        if not moved and not theirs:
            self._ejection.failed(attempt, hung=cause == "stall")

    def close(
        self,
        job: Job,
        attempt: Attempt,
        times: tuple[Times, Times],
        ending: Ending,
        failures: Failures,
    ) -> None:
        """An answer has come to its end, good or not."""
        if (prompt_tokens := ending.prompt_tokens) is not None:
            cached_tokens = ending.cached_tokens
            self.dispatcher.usage(job, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)
        if ending.broken or (ending.status == 200 and ending.failed):
            self.end(job, "failed")
            return
        if ending.status != 200:
            self.end(job, "refused")  # says nothing about the replica
            return
        if not attempt.begun:
            self._answered(attempt, failures)
        self._ejection.whole(attempt)
        e2e_s = self.dispatcher.clock() - job.request.arrival_s
        observe_all([one.e2e for one in times], e2e_s)
        output_tokens = ending.output_tokens
        self._telemetry.outcome(job.tenant, "finished")
        self._telemetry.tokens(job.tenant, int(prompt_tokens or job.prompt.tokens), output_tokens)
        level = self._level(job)
        if _has_limits(level):
            self._telemetry.slo[level.name, _met_slo(job, level, e2e_s, output_tokens)] += 1
        self.dispatcher.finish(job, output_tokens)

    def end(self, job: Job, status: str, *, full: bool = False) -> None:
        """Close the books of a request that did not get its answer; does nothing the second time.

        Args:
            job: Of the request.
            status: For the counters; only the client's leaving is another matter to the log.
            full: Whether the fleet was too full for it.
        """
        if not job.ended:
            self._telemetry.outcome(job.tenant, status)
            if status in ("failed", "lost") or full:
                self._missed_slo(job)
            self.dispatcher.end(job, "cancelled" if status == "cancelled" else "failed")

    def rejected(self, job: Job) -> None:
        """The policy has rejected a request; its books are closed."""
        self._telemetry.outcome(job.tenant, "rejected")
        self._missed_slo(job)

    def _missed_slo(self, job: Job) -> None:
        """Count a request that got no answer, if its class has limits."""
        level = self._level(job)
        if _has_limits(level):
            self._telemetry.slo[level.name, False] += 1

    def _level(self, job: Job) -> SloConfig:
        return self.dispatcher.config.slo_classes[job.request.slo_class]

    def _answered(self, attempt: Attempt, failures: Failures) -> None:
        """A request has its answer: now it is known that those who failed it were at fault."""
        self._ejection.first_token(attempt)
        for failed, error in failures:
            late = error.cause == "timeout"
            if error.is_full or error.cause == "refused" or (late and failed.replica_has_moved):
                continue  # full, down, or only slow
            self._ejection.failed(failed, hung=late)
        failures.clear()


def _has_limits(level: SloConfig) -> bool:
    return level.ttft_s is not None or level.tpot_s is not None


def _met_slo(job: Job, level: SloConfig, e2e_s: float, output_tokens: int) -> bool:
    """Whether a whole answer met the limits of its class.

    Without a stream nobody sees the first token: then both limits are one for all of it.
    """
    ttft_limit_s = math.inf if level.ttft_s is None else level.ttft_s
    tpot_limit_s = math.inf if level.tpot_s is None else level.tpot_s
    later = max(0, output_tokens - 1)
    decode_limit_s = later * tpot_limit_s if later else 0.0
    ttft_s = job.request.first_token_s - job.request.arrival_s
    if math.isnan(ttft_s):
        return e2e_s <= ttft_limit_s + decode_limit_s
    return ttft_s <= ttft_limit_s and (not later or e2e_s - ttft_s <= decode_limit_s)
