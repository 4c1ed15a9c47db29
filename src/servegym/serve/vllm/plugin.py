"""What the plug-in does around each step of vLLM's scheduler.

In vLLM's priority mode both decisions hang on `request.priority`: the waiting queue is a heap by
(priority, arrival), and the running request with the largest (priority, arrival) is preempted. The
two sets are disjoint, so before each step the places the policy gives are written there; what the
client sent is kept as a feature. vLLM then schedules as ever.
"""

from __future__ import annotations

import heapq
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from servegym.baselines.ordering.registry import ordering_policy
from servegym.errors import ConfigError
from servegym.export.ordering import SUFFIXES, load_ordering
from servegym.policy.ordering import OrderingPolicy
from servegym.serve.guards import Circuit, CircuitBreaker
from servegym.serve.vllm.config import PluginConfig
from servegym.serve.vllm.orderer import Orderer, Ranking
from servegym.serve.vllm.overhead import Overhead

#: vLLM shows what is logged below its own name, and only that.
_log = logging.getLogger("vllm.servegym")


def load_policy(text: str) -> OrderingPolicy:
    """Return an order by its name, or a learned one by the path of its file.

    Raises:
        ConfigError: If there is no such order or parameter.
        ExportError: If the file is not a valid order.
    """
    return load_ordering(Path(text)) if text.endswith(SUFFIXES) else ordering_policy(text)


@dataclass
class Counts:
    """What happened since the start.

    Attributes:
        num_steps: Steps scheduled.
        num_asked: Steps in which somebody could have been admitted or preempted.
        num_policy_steps: Steps ordered by the policy.
        num_fallback_steps: Steps ordered by the fallback, because the policy failed.
        num_faults: Failures of the policy.
        num_admitted: Requests admitted in steps for which there was a policy's order.
        num_admitted_agreed: Those among as many of the policy's first. In shadow mode the rest is
            what the policy would have changed; else vLLM passed some over, for its own reasons.
        num_preempted: Requests preempted.
        num_preempted_agreed: Those among as many of the policy's first victims.
    """

    num_steps: int = 0
    num_asked: int = 0
    num_policy_steps: int = 0
    num_fallback_steps: int = 0
    num_faults: int = 0
    num_admitted: int = 0
    num_admitted_agreed: int = 0
    num_preempted: int = 0
    num_preempted_agreed: int = 0


class Plugin:
    """Orders the requests of one scheduler by a policy; never fails.

    Attributes:
        counts: What happened since the start.
        overhead: How long it took.
    """

    def __init__(
        self,
        config: PluginConfig,
        policy: OrderingPolicy,
        *,
        block_size: int,
        max_num_batched_tokens: int,
        priority_mode: bool,
    ) -> None:
        if not (priority_mode or config.shadow):
            raise ConfigError(
                "servegym's scheduler orders requests by their priority: start vLLM with "
                "--scheduling-policy priority, or set shadow to only watch"
            )
        self._config = config
        self._policy = policy
        self._priority_mode = priority_mode
        self._orderer = Orderer(
            policy, config, block_size=block_size, max_num_batched_tokens=max_num_batched_tokens
        )
        self._breaker = CircuitBreaker(config.breaker)
        self.counts = Counts()
        self.overhead = Overhead()
        self._circuit = Circuit.CLOSED
        self._ranked: Ranking | None = None
        self._begin_s = 0.0
        self._computing = False
        self._asked = False
        self._report_s = time.monotonic() + config.report_every_s

    def before(
        self,
        queue: Any,
        running: Sequence[Any],
        requests: Mapping[str, Any],
        kv_cache_usage: float,
        *,
        may_decide: bool = True,
    ) -> None:
        """Order the requests, before vLLM schedules a step.

        Args:
            queue: vLLM's waiting queue; its heap in priority mode is rewritten.
            running: The running list.
            requests: All requests by id.
            kv_cache_usage: Share of KV blocks held.
            may_decide: Whether anybody could be admitted or preempted in this step; if not, only
                a policy with a memory is asked.
        """
        now_s = time.monotonic()
        if self._computing and running:
            self._orderer.note_step(now_s - self._begin_s)
        self._begin_s = now_s
        self._ranked = None
        self._asked = may_decide or self._policy.memory_size > 0
        if not self._asked:
            return
        self.counts.num_asked += 1
        waiting = queue._heap if self._priority_mode else list(queue)
        self._ranked = self._rank(waiting, running, requests, kv_cache_usage)
        if not (self._apply(waiting, running) or self._config.shadow):
            self._fall_back(waiting, running)

    def _rank(
        self,
        waiting: Sequence[Any],
        running: Sequence[Any],
        requests: Mapping[str, Any],
        kv_cache_usage: float,
    ) -> Ranking | None:
        """Ask the policy; None if it is out of service or fails."""
        self._circuit = self._breaker.state(self._begin_s)
        if self._circuit is Circuit.OPEN:
            return None
        try:
            self._orderer.rows.forget_ended(requests)
            ranking = self._orderer.rank(waiting, running, time.time(), kv_cache_usage)
        except Exception:  # a policy's own have no common base; serving goes on whatever it does
            self._fault("the policy failed, the fallback orders this step")
            return None
        self._breaker.record(fault=False, now_s=self._begin_s)
        return ranking

    def _apply(self, waiting: list[Any], running: Sequence[Any]) -> bool:
        """Put the policy's order into force; return whether that was to be done."""
        if self._ranked is None or self._config.shadow or self._circuit is not Circuit.CLOSED:
            return False
        order, num_waiting = self._ranked.order.tolist(), self._ranked.num_waiting
        in_order = [waiting[i] for i in order[:num_waiting]]
        for place, request in enumerate(in_order):
            request.priority = place
        # a list sorted by its key is a heap
        waiting[:] = in_order
        for place, i in enumerate(order[num_waiting:]):
            running[i - num_waiting].priority = place
        self.counts.num_policy_steps += 1
        return True

    def _fall_back(self, waiting: list[Any], running: Sequence[Any]) -> None:
        """Order by arrival or by the client's priority."""
        self.counts.num_fallback_steps += 1
        by_client = self._config.fallback == "priority"
        for request in (*waiting, *running):
            request.priority = self._orderer.rows.client_priority(request) if by_client else 0
        heapq.heapify(waiting)

    def _fault(self, what: str) -> None:
        self.counts.num_faults += 1
        opened = self._breaker.num_opened
        self._breaker.record(fault=True, now_s=self._begin_s)
        if self.counts.num_faults == 1 or self._breaker.num_opened > opened:
            traceback = sys.exc_info()[0] is not None
            _log.error("servegym: %s (fault %d)", what, self.counts.num_faults, exc_info=traceback)

    def after(
        self,
        output: Any,
        requests: Mapping[str, Any],
        *,
        begin_ns: int,
        ordered_ns: int,
        scheduled_ns: int,
    ) -> None:
        """Compare what vLLM did with the policy's order, and note how long it took.

        Args:
            output: vLLM's `SchedulerOutput`.
            requests: All requests by id.
            begin_ns: When `before` was called, by `time.perf_counter_ns`.
            ordered_ns: When it returned.
            scheduled_ns: When vLLM had scheduled.
        """
        self.counts.num_steps += 1
        self._computing = output.total_num_scheduled_tokens > 0
        try:
            if self._ranked is not None:
                self._compare(self._ranked, output, requests)
            elif not self._asked:
                # there were blocks for all, so nobody should have been
                self.counts.num_preempted += len(output.preempted_req_ids or ())
        except Exception:  # whatever it is, the step is scheduled already
            self._fault("the step could not be compared with the policy's order")
        if self._begin_s >= self._report_s:
            self._report_s = self._begin_s + self._config.report_every_s
            self.report()
        if self._asked:
            own_ns = ordered_ns - begin_ns + time.perf_counter_ns() - scheduled_ns
            self.overhead.add(own_ns, scheduled_ns - ordered_ns)

    def _compare(self, ranked: Ranking, output: Any, requests: Mapping[str, Any]) -> None:
        new = [request.req_id for request in output.scheduled_new_reqs]
        resumed = output.scheduled_cached_reqs.resumed_req_ids
        gone = [name for name in output.preempted_req_ids or () if name in requests]
        if not (new or resumed or gone):
            return
        place_of = ranked.places()
        num_waiting, counts = ranked.num_waiting, self.counts

        def places(names: Iterable[str]) -> list[int]:
            slots = [self._orderer.rows.slot(requests[name]) for name in names]
            return [place_of[slot] for slot in slots if slot in place_of]

        admitted = [place for place in places((*new, *resumed)) if place < num_waiting]
        counts.num_admitted += len(admitted)
        counts.num_admitted_agreed += sum(place < len(admitted) for place in admitted)
        preempted = [place for place in places(gone) if place >= num_waiting]
        first = len(ranked.order) - len(preempted)
        agreed = sum(place >= first for place in preempted)
        counts.num_preempted += len(preempted)
        counts.num_preempted_agreed += agreed
        acted = self._circuit is Circuit.CLOSED and not self._config.shadow
        if acted and agreed < len(preempted):
            self._fault(
                "vLLM did not preempt the request with the largest (priority, arrival): "
                "this version decides in another way than is known"
            )

    def statistics(self) -> dict[str, Any]:
        """Return counts and overhead by name."""
        return {
            "policy": self._policy.name,
            "information": self._policy.information,
            "shadow": self._config.shadow,
            "circuit": self._breaker.state(time.monotonic()).name.lower(),
            "num_breaker_opened": self._breaker.num_opened,
            **asdict(self.counts),
            **self.overhead.percentiles_us(),
        }

    def report(self) -> None:
        """Log counts and overhead; write them to the statistics file if one is set."""
        statistics = self.statistics()
        _log.info("servegym: %s", " ".join(f"{k}={_short(v)}" for k, v in statistics.items()))
        path = self._config.stats_file
        if path is None:
            return
        part = path.with_name(f"{path.name}.part")
        try:
            part.write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            _log.warning("servegym: %s cannot be written: %s", path, error)


def _short(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
