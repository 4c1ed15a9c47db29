"""Ends of requests whose answers pass by unseen.

A gateway that sends no bodies of answers says neither when a request has ended nor how long its
answer was; the end of its stream means only that it has nothing more to ask. What is known is how
many requests each engine has. Where it has fewer than were sent there, those that should be over by
now have ended: by known rates and predicted lengths. Where the engine does not say, the same guess
stands alone, and in any case a request is forgotten after a time.
"""

from __future__ import annotations

import asyncio

from servegym.policy.contract import (
    DECODE_SEQ_S,
    DECODE_STEP_S,
    NUM_RUNNING,
    NUM_WAITING,
    PREFILL_TOKENS_PER_S,
)
from servegym.serve.dispatcher import Dispatcher
from servegym.serve.job import Job
from servegym.serve.picker.config import AssumedEndsConfig


class AssumedEnds:
    """Closes the books of requests by what engines count, or by time.

    Args:
        config: When.
        dispatcher: Its metrics are read, its jobs ended.

    Attributes:
        num_counted: Requests ended because an engine had fewer.
        num_timed: Requests ended because they should be over, or were there for too long.
    """

    def __init__(self, config: AssumedEndsConfig, dispatcher: Dispatcher) -> None:
        self.config = config
        self.num_counted = 0
        self.num_timed = 0
        self._dispatcher = dispatcher
        self._unseen: dict[Job, float] = {}  # and when each should be over; in order of dispatch

    def __len__(self) -> int:
        """How many requests are waited for."""
        return len(self._unseen)

    def expect(self, job: Job) -> None:
        """Nothing more will be heard of a request that is at a replica."""
        if not job.ended and job not in self._unseen:
            self._unseen[job] = self._dispatcher.clock() + self._duration_s(job)

    async def run(self) -> None:
        """Look again and again."""
        while True:
            await asyncio.sleep(self.config.look_s)
            self.look()

    def look(self) -> None:
        """End what must have ended."""
        state, now_s = self._dispatcher.state, self._dispatcher.clock()
        max_age_s = self._dispatcher.config.runtime.max_metrics_age_s
        at: dict[int, list[Job]] = {}
        for job in list(self._unseen):
            if job.ended or job.replica < 0:
                del self._unseen[job]
            elif now_s - job.request.dispatch_s >= self.config.forget_after_s:
                self.num_timed += self._end(job)
            else:
                at.setdefault(job.replica, []).append(job)
        for replica, jobs in at.items():
            age_s = state.metrics_age_s(replica, now_s)
            if age_s > max_age_s:
                for job in jobs:
                    if now_s >= self._unseen[job]:
                        self.num_timed += self._end(job)
                continue
            row = state.replicas[:, replica]
            there = int(row[NUM_RUNNING] + row[NUM_WAITING])
            counted_s = now_s - age_s - self.config.settle_s
            old = [job for job in jobs if job.request.dispatch_s <= counted_s]
            # of those that were there when it counted, at most so many are left
            old.sort(key=self._unseen.__getitem__)
            for job in old[: max(0, len(old) - there)]:
                self.num_counted += self._end(job)

    def _end(self, job: Job) -> int:
        del self._unseen[job]
        self._dispatcher.finish(job, 0)  # how long the answer was nobody knows
        return 1

    def _duration_s(self, job: Job) -> float:
        """Seconds that a request has left at known rates, with as many beside it as now."""
        state = self._dispatcher.state
        row = state.replicas[:, job.replica]
        beside = max(0, state.outstanding(job.replica) - 1)
        step_s = row[DECODE_STEP_S] + beside * row[DECODE_SEQ_S]
        prefill_s = job.prompt.tokens / max(row[PREFILL_TOKENS_PER_S], 1e-9)
        return float(prefill_s + job.request.predicted_output_tokens * step_s)
