"""What becomes of requests: in the dispatcher's books, in counters, in replicas' standing."""

from __future__ import annotations

from servegym.serve.dispatcher import Dispatcher, Job
from servegym.serve.router.ejection import Attempt
from servegym.serve.router.health import Health
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

    def begin(self, job: Job, attempt: Attempt, failures: Failures) -> None:
        """The first token of a stream has come; those who failed it before are judged."""
        self._answered(attempt, failures)
        self.dispatcher.first_token(job)
        self._telemetry.ttft.observe(self.dispatcher.clock() - job.request.arrival_s)

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

    def close(self, job: Job, attempt: Attempt, ending: Ending, failures: Failures) -> None:
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
        self._telemetry.e2e.observe(self.dispatcher.clock() - job.request.arrival_s)
        self._telemetry.outcomes["finished"] += 1
        self.dispatcher.finish(job, ending.output_tokens)

    def end(self, job: Job, status: str) -> None:
        """Close the books of a request that did not get its answer; does nothing the second time.

        Args:
            job: Of the request.
            status: For the counters; only the client's leaving is another matter to the log.
        """
        if not job.ended:
            self._telemetry.outcomes[status] += 1
            self.dispatcher.end(job, "cancelled" if status == "cancelled" else "failed")

    def _answered(self, attempt: Attempt, failures: Failures) -> None:
        """A request has its answer: now it is known that those who failed it were at fault."""
        self._ejection.first_token(attempt)
        for failed, error in failures:
            late = error.cause == "timeout"
            if error.is_full or error.cause == "refused" or (late and failed.replica_has_moved):
                continue  # full, down, or only slow
            self._ejection.failed(failed, hung=late)
        failures.clear()
