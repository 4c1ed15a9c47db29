"""Fleets tried on a trace: the busiest stretches of it first, and in the end all of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from servegym.baselines.registry import policy
from servegym.cluster.outcome import latencies
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, ReplicaType, SloClass
from servegym.plan.options import Fleet
from servegym.plan.question import Question
from servegym.policy.run import run
from servegym.typing import BoolArray, FloatArray, IntArray
from servegym.workloads.table import RequestTable

#: Shares of the trace that are played before all of it.
_SHARES = (1 / 16, 1 / 4)


class Trial(NamedTuple):
    """What became of a stretch of the trace on a fleet.

    Attributes:
        fleet: Replicas of each option.
        rule: Which dispatched.
        num_requests: Of the stretch.
        late_first: Requests over the limit of TTFT.
        slow: Requests over the limit of TPOT.
        late: Requests over one of them.
        pressure: The largest share of a limit that must be kept: at most 1 if enough are in time.
        ttft_s: TTFT that the share asked for stays below.
        tpot_s: The same of TPOT.
    """

    fleet: Fleet
    rule: str
    num_requests: int
    late_first: int
    slow: int
    late: int
    pressure: float
    ttft_s: float
    tpot_s: float

    @property
    def attainment(self) -> float:
        """Share of the requests within both limits."""
        return 1.0 - self.late / self.num_requests


@dataclass
class Course:
    """The trace, in stretches, and how fleets are tried on it.

    Attributes:
        question: Limits and engine settings.
        types: Replica types, in the order of options.
        stretches: The busiest parts, the shortest first, and the whole trace at the end.
        ttft_factor: On TTFT, for what lies between simulator and clients.
        num_trials: How many simulations there were.
    """

    question: Question
    types: Sequence[ReplicaType]
    stretches: Sequence[RequestTable]
    ttft_factor: float = 1.0
    num_trials: int = 0
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(os.cpu_count()), repr=False
    )

    @classmethod
    def over(
        cls,
        question: Question,
        types: Sequence[ReplicaType],
        table: RequestTable,
        *,
        least: int = 200,
    ) -> Course:
        """Cut a trace into stretches of at least so many requests; all have the same limits."""
        table = replace(table, slo_class=np.zeros(len(table), np.int16))
        lengths = [round(share * len(table)) for share in _SHARES]
        parts = [busiest(table, length) for length in lengths if length >= least]
        return cls(question, types, [*parts, table])

    def spec(self, fleet: Fleet) -> tuple[ClusterSpec, Episode]:
        """Return the cluster of a fleet, and its replicas with the whole trace before them.

        The cluster knows the types of this fleet alone: rules that compare a replica with the
        fastest see what they would see if it were deployed.
        """
        used = [i for i, count in enumerate(fleet) if count]
        engine = self.question.engine
        spec = ClusterSpec(
            types=tuple(self.types[i] for i in used),
            slo_classes=(SloClass("limits", self.question.ttft_s, self.question.tpot_s),),
            block_size=engine.block_size,
            prefix_caching=engine.prefix_caching,
            chunked_prefill=engine.chunked_prefill,
            retain_kv_s=engine.retain_kv_s,
        )
        type_idx = np.repeat(np.arange(len(used)), [fleet[i] for i in used]).astype(np.int16)
        return spec, Episode(self.stretches[-1], type_idx, np.ones(len(type_idx)))

    def try_all(self, jobs: Sequence[tuple[Fleet, str, int]]) -> list[Trial]:
        """Try fleets under rules on stretches, several at a time; the order changes nothing."""
        self.num_trials += len(jobs)
        if len(jobs) == 1:
            return [self._play(*jobs[0])]
        return list(self._threads.map(lambda job: self._play(*job), jobs))

    def late(self, fleet: Fleet, rule: str) -> BoolArray:
        """Say which requests of the whole trace are late, `bool[n]`."""
        ttft_s, tpot_s = self._latencies(fleet, rule, len(self.stretches) - 1)
        return np.asarray((ttft_s > self.question.ttft_s) | (tpot_s > self.question.tpot_s))

    def _play(self, fleet: Fleet, rule: str, stretch: int) -> Trial:
        question = self.question
        ttft_s, tpot_s = self._latencies(fleet, rule, stretch)
        late_first, slow = ttft_s > question.ttft_s, tpot_s > question.tpot_s
        share = np.maximum(ttft_s / question.ttft_s, tpot_s / question.tpot_s)
        at = max(0, len(share) - 1 - question.allowed_late(len(share)))
        return Trial(
            fleet,
            rule,
            len(share),
            int(late_first.sum()),
            int(slow.sum()),
            int((late_first | slow).sum()),
            *(float(np.partition(values, at)[at]) for values in (share, ttft_s, tpot_s)),
        )

    def _latencies(self, fleet: Fleet, rule: str, stretch: int) -> tuple[FloatArray, FloatArray]:
        """Return TTFT and TPOT of every request; that of a single token is no wait, 0 s."""
        spec, episode = self.spec(fleet)
        simulator = Simulator(spec, [replace(episode, table=self.stretches[stretch])])
        run(simulator, policy(rule))
        ttft_s, tpot_s, _ = latencies(simulator.outcomes())
        return self.ttft_factor * ttft_s, np.nan_to_num(tpot_s, nan=0.0)


def busiest(table: RequestTable, length: int) -> RequestTable:
    """Take the requests in a row whose tokens come fastest."""
    tokens = np.concatenate(([0], np.cumsum(table.prompt_tokens + table.output_tokens)))
    work = tokens[length:] - tokens[:-length]
    span_s = table.arrival_s[length - 1 :] - table.arrival_s[: len(table) - length + 1]
    first = int(np.argmax(work / np.maximum(span_s, 1e-9)))
    rows: IntArray = np.arange(first, first + length)
    part = table.take(rows)
    return replace(part, arrival_s=part.arrival_s - part.arrival_s[0])
