"""A scheduler with vLLM's queue, budget, blocks and preemption, small enough to read."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass(eq=False)
class FakeRequest:
    """As much of vLLM's `Request` as its scheduler and the plug-in read."""

    request_id: str
    arrival_time: float = 0.0
    num_prompt_tokens: int = 8
    max_tokens: int = 4
    priority: int = 0
    extra_args: dict[str, Any] | None = None
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    sampling_params: Any = field(init=False)

    def __post_init__(self) -> None:
        self.sampling_params = SimpleNamespace(extra_args=self.extra_args)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens

    def __lt__(self, other: FakeRequest) -> bool:
        mine = (self.priority, self.arrival_time, self.request_id)
        return mine < (other.priority, other.arrival_time, other.request_id)


class FakeQueue:
    """vLLM's `PriorityRequestQueue`."""

    def __init__(self) -> None:
        self._heap: list[FakeRequest] = []

    def add_request(self, request: FakeRequest) -> None:
        heapq.heappush(self._heap, request)

    def pop_request(self) -> FakeRequest:
        return heapq.heappop(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self):
        return iter(sorted(self._heap))


class FakeScheduler:
    """vLLM's `Scheduler` in priority mode: running first, then the queue until something lacks."""

    def __init__(
        self,
        vllm_config: Any,
        *,
        num_blocks: int = 1000,
        block_size: int = 4,
        max_num_running_reqs: int = 4,
        max_num_scheduled_tokens: int = 16,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.max_num_running_reqs = max_num_running_reqs
        self.max_num_scheduled_tokens = max_num_scheduled_tokens
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=["all layers"])
        self.waiting = FakeQueue()
        self.running: list[FakeRequest] = []
        self.requests: dict[str, FakeRequest] = {}
        self.finished: list[str] = []
        self.closed = False

    @property
    def kv_cache_manager(self) -> Any:
        return SimpleNamespace(
            usage=self.used_blocks() / self.num_blocks,
            block_pool=SimpleNamespace(
                get_num_free_blocks=lambda: self.num_blocks - self.used_blocks()
            ),
        )

    def used_blocks(self) -> int:
        return sum(self._blocks(r.num_computed_tokens) for r in self.running)

    def _blocks(self, tokens: int) -> int:
        return math.ceil(tokens / self.block_size)

    def _lacking(self, request: FakeRequest, tokens: int) -> int:
        more = self._blocks(tokens) - self._blocks(request.num_computed_tokens)
        return more - (self.num_blocks - self.used_blocks())

    def add_request(self, request: FakeRequest) -> None:
        self.requests[request.request_id] = request
        self.waiting.add_request(request)

    def schedule(self) -> Any:
        budget = self.max_num_scheduled_tokens
        counts: dict[str, int] = {}
        before: dict[str, int] = {}
        preempted: list[FakeRequest] = []
        for request in list(self.running):
            if request not in self.running or not budget:
                continue
            count = min(request.num_tokens - request.num_computed_tokens, budget)
            while self._lacking(request, request.num_computed_tokens + count) > 0:
                victim = max(self.running, key=lambda r: (r.priority, r.arrival_time))
                self.running.remove(victim)
                victim.num_computed_tokens = 0
                victim.num_preemptions += 1
                budget += counts.pop(victim.request_id, 0)
                self.waiting.add_request(victim)
                preempted.append(victim)
                if victim is request:
                    break
            if request in self.running:
                before[request.request_id] = request.num_computed_tokens
                counts[request.request_id] = count
                budget -= count
        new, resumed = [], []
        while (
            not preempted
            and budget
            and self.waiting
            and len(self.running) < self.max_num_running_reqs
        ):
            request = self.waiting._heap[0]
            if self._lacking(request, request.num_tokens) > 0:
                break
            self.waiting.pop_request()
            self.running.append(request)
            counts[request.request_id] = count = min(request.num_tokens, budget)
            before[request.request_id] = 0
            budget -= count
            # its blocks are taken at once, as the next one must see
            request.num_computed_tokens = count
            (resumed if request.num_preemptions else new).append(request)
        for name, count in counts.items():
            self.requests[name].num_computed_tokens = before[name] + count
        cached = [name for name in counts if name not in {r.request_id for r in new}]
        return SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(req_id=r.request_id, num_computed_tokens=0) for r in new
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=cached,
                num_computed_tokens=[before[name] for name in cached],
                resumed_req_ids={r.request_id for r in resumed},
            ),
            num_scheduled_tokens=counts,
            total_num_scheduled_tokens=sum(counts.values()),
            preempted_req_ids={r.request_id for r in preempted},
        )

    def update_from_output(self, scheduler_output: Any) -> None:
        for name in scheduler_output.num_scheduled_tokens:
            request = self.requests[name]
            if request.num_computed_tokens == request.num_tokens:
                request.num_output_tokens += 1
            if request.num_output_tokens == request.max_tokens:
                self.running.remove(request)
                del self.requests[name]
                self.finished.append(name)

    def step(self) -> Any:
        """Schedule, compute, take in."""
        output = self.schedule()
        self.update_from_output(output)
        return output

    def shutdown(self) -> None:
        self.closed = True
