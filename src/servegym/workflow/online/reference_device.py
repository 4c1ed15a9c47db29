"""Devices of the plain online simulator: what they run, and when that ends."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from servegym.workflow.job import Job, StageKind

if TYPE_CHECKING:
    from servegym.workflow.online.reference import ReferenceSimulator


@dataclass(eq=False)
class Stage:
    """One stage and how far it is."""

    number: int
    idx: int
    run: JobRun
    kind: StageKind
    factor: float
    hidden: bool
    prompt: int = 0
    output: int = 0
    expected_output: float = 0.0
    tool_s: float = 0.0
    expected_s: list[float] = field(default_factory=list)
    parents: list[tuple[Stage, float, int]] = field(default_factory=list)
    children: list[tuple[Stage, float]] = field(default_factory=list)
    mean_s: float = 0.0
    rank_s: float = 0.0
    status: str = "future"
    device: Device | None = None
    ready_s: float = math.nan
    start_s: float = math.nan
    begin_s: float = math.nan
    finish_s: float = math.nan
    hit: int = 0
    restarts: int = 0

    @property
    def kv(self) -> int:
        """KV tokens to reserve."""
        return self.prompt + self.output


@dataclass(eq=False)
class JobRun:
    """One arrival of a job."""

    idx: int
    job_idx: int
    job: Job
    arrival_s: float
    stages: list[Stage] = field(default_factory=list)
    finish_s: float = math.nan


class Device:
    """One device: what it runs, and what is in its cache."""

    def __init__(self, sim: ReferenceSimulator, d: int) -> None:
        self.sim, self.d = sim, d
        self.type_idx = int(sim.episode.type_idx[d])
        self.type = sim.spec.types[self.type_idx]
        self.base_speed = self.speed = float(sim.episode.speed[d])
        self.capacity = sim.spec.kv_tokens(self.type_idx)
        self.up = True
        self.since_s = self.clock = self.busy_s = self.slot_s = 0.0
        self.order = 0
        self.clear()

    def clear(self) -> None:
        """Forget all stages and the cache."""
        self.running: list[Stage] = []
        self.queue: list[Stage] = []
        self.batch: list[Stage] = []
        self.ends: list[tuple[float, int, Stage]] = []
        self.fetches: list[tuple[float, int, Stage]] = []
        self.cache: list[Stage] = []
        self.last_job: JobRun | None = None
        self.step_s = 1.0
        self.kv_tokens = self.prefill_left_s = self.prefill_clock = 0.0
        self.wake_s = math.inf

    @property
    def decodes(self) -> list[Stage]:
        """LLM stages whose sequences decode now."""
        return [q for _, _, q in self.ends if q.kind == StageKind.LLM]

    @property
    def reserved(self) -> int:
        """KV tokens of the stages that hold a slot."""
        return sum(q.kv for q in self.running)

    def times(self) -> tuple[float, float, float, float]:
        """When the prefill ends, a stage ends, data is there, and a prefill is put together."""
        prefill_s = end_s = math.inf
        if self.batch:
            prefill_s = self.since_s + max(0.0, self.prefill_left_s) / self.speed
        if self.ends:
            left = max(0.0, min(self.ends)[0] - self.clock)
            end_s = self.since_s + left * self.step_s / self.speed
        fetch_s = min(self.fetches)[0] if self.fetches else math.inf
        return prefill_s, end_s, fetch_s, self.wake_s

    def settle(self) -> None:
        """Move the clock to the present."""
        passed_s = self.sim.now_s - self.since_s
        if self.running:
            self.busy_s += passed_s
            self.slot_s += passed_s * len(self.running)
        if self.ends or self.batch:
            done = passed_s * self.speed / self.step_s
            self.clock += done
            self.kv_tokens += len(self.decodes) * done
            self.prefill_left_s -= passed_s * self.speed
        self.since_s = self.sim.now_s

    def plan(self) -> None:
        """Set the pace until the next event."""
        batch = len(self.decodes)
        if batch and not self.batch:
            assert self.type.engine
            steps = max(0.0, min(self.ends)[0] - self.clock)
            kv = self.kv_tokens + 0.5 * batch * (steps + 1.0)
            grid = self.type.engine.grid
            self.step_s = grid.cpu_s + grid.dense(batch) + grid.decode(batch, kv)

    def add(self, heap: list[tuple[float, int, Stage]], key: float, q: Stage) -> None:
        """Remember something to come."""
        heap.append((key, self.order, q))
        self.order += 1

    def enter(self, q: Stage) -> None:
        """Begin a stage whose data is there."""
        if q.kind == StageKind.TASK:
            work_s = q.expected_s[self.type_idx]
            self.add(self.ends, self.clock + work_s * q.factor, q)
            return
        self.queue.append(q)
        if not self.batch:
            self.wake_s = math.nextafter(self.sim.now_s, math.inf)

    def start(self, q: Stage) -> None:
        """Give a slot to a stage."""
        self.settle()
        self.running.append(q)
        if q.kind == StageKind.LLM:
            q.hit = self.hit(q)
            while sum(u.kv for u in self.cache) > self.capacity - self.reserved:
                self.cache.pop(0)
        if q.begin_s > self.sim.now_s:
            self.add(self.fetches, q.begin_s, q)
        else:
            self.enter(q)
        self.plan()

    def hit(self, q: Stage) -> int:
        """Prompt tokens that a parent has left in the cache."""
        found = [shared for u, _, shared in q.parents if u in self.cache]
        return min(max(found, default=0), q.prompt - 1)

    def event(self) -> None:
        """Let the next of `times` happen; it is due."""
        now_s = self.sim.now_s
        which = self.times().index(now_s)
        self.settle()
        if which == 0:
            self.clock = self.prefill_clock
            batch, self.batch = self.batch, []
            for q in batch:
                self.queue.remove(q)
                if q.output == 1:
                    self.leave(q)
                else:
                    self.kv_tokens += q.prompt
                    self.add(self.ends, self.clock + q.output - 1, q)
            if self.queue:
                self.wake_s = math.nextafter(now_s, math.inf)
        elif which == 1:
            entry = min(self.ends)
            self.clock, _, q = entry
            self.ends.remove(entry)
            if q.kind == StageKind.LLM:
                self.kv_tokens -= q.prompt + q.output - 1
                if not self.decodes:
                    self.kv_tokens = 0.0
            self.leave(q)
        elif which == 2:
            first = min(self.fetches)
            self.fetches.remove(first)
            self.enter(first[2])
        else:
            self.wake_s = math.inf
            self.form_prefill()
        self.plan()

    def leave(self, q: Stage) -> None:
        """Free the slot of a stage that has ended."""
        self.running.remove(q)
        if q.kind == StageKind.LLM:
            self.cache.append(q)
        self.sim.end(q)

    def form_prefill(self) -> None:
        """Begin the prefill of the first prompts in the queue, token by token."""
        assert self.type.engine
        grid, decodes = self.type.engine.grid, len(self.decodes)
        room = self.type.engine.max_num_batched_tokens - decodes
        first = self.queue[0].prompt - self.queue[0].hit
        num_steps = math.ceil(first / room)
        total = 0
        for q in self.queue:
            if total + q.prompt - q.hit > num_steps * room:
                break
            self.batch.append(q)
            total += q.prompt - q.hit
        tokens = [(q, i) for q in self.batch for i in range(q.hit, q.prompt)]
        cost_s = 0.0
        for k in range(num_steps):
            step = tokens[k * room : (k + 1) * room]
            cost_s += grid.cpu_s + grid.dense(len(step) + decodes)
            for q in self.batch:
                mine = [i for u, i in step if u is q]
                if mine:
                    cost_s += grid.prefill(len(mine), mine[0])
        if decodes:
            kv = self.kv_tokens + 0.5 * decodes * (num_steps + 1.0)
            cost_s += num_steps * grid.mixed(decodes, kv)
        cost_s = max(cost_s, num_steps * grid.eager_s)
        self.prefill_left_s = cost_s
        self.prefill_clock = self.clock + num_steps
        self.step_s = cost_s / num_steps
