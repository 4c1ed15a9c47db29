"""The plain online simulator: docs/workflow-online.md step by step, slow and obvious.

It shares nothing with the compiled core but the random numbers and the cost grids; tests hold
the two equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from servegym.cluster.rng import mix64, uniform
from servegym.cluster.state import FAULT_DOWN, FAULT_SLOW
from servegym.errors import InvalidAction
from servegym.workflow.job import StageKind
from servegym.workflow.online.outcome import JOB_OUTCOME_DTYPE, STAGE_OUTCOME_DTYPE
from servegym.workflow.online.reference_device import Device, JobRun, Stage
from servegym.workflow.online.spec import Episode, FleetSpec
from servegym.workflow.online.state import WAIT


class ReferenceSimulator:
    """One episode, played event by event.

    Args:
        spec: Device types and rules.
        episode: Jobs and devices.
        asks_when_ready: Whether a decision is also due when a stage became ready.
    """

    def __init__(self, spec: FleetSpec, episode: Episode, *, asks_when_ready: bool = False) -> None:
        episode.validate(spec)
        self.spec, self.episode = spec, episode
        self.asks_when_ready = asks_when_ready
        self.devices = [Device(self, d) for d in range(episode.num_devices)]
        self.stages: list[Stage] = []
        self.runs: list[JobRun] = []
        for i, arrival_s in enumerate(episode.arrival_s.tolist()):
            self._add_job(i, int(episode.order[i]), arrival_s)
        self.now_s = 0.0
        self.area = self.weighted_area = self.good = 0.0
        self.num_decisions = 0
        self.ready: list[Stage] = []
        self.fresh: list[Stage] = []
        self.tools: list[tuple[float, int, Stage]] = []
        self._tool_order = 0
        self._changed = False
        self.in_system: list[JobRun] = []

    def _add_job(self, idx: int, job_idx: int, arrival_s: float) -> None:
        job = self.episode.jobs[job_idx]
        run = JobRun(idx, job_idx, job, arrival_s)
        self.runs.append(run)
        sigma = self.episode.noise_sigma
        most = max(device.capacity for device in self.devices)
        for i in range(job.num_stages):
            number = len(self.stages)
            factor = 1.0
            if sigma > 0:
                z = _normal(self.episode.noise_seed, number)
                factor = math.exp(sigma * z - 0.5 * sigma * sigma)
            q = Stage(number, i, run, StageKind(job.kind[i]), factor, bool(job.hidden[i]))
            q.tool_s = float(job.tool_s[i]) * factor
            if q.kind == StageKind.LLM:
                q.prompt = int(job.prompt_tokens[i])
                longest = max(1, most - q.prompt)
                q.output = max(1, min(int(job.output_tokens[i] * factor + 0.5), longest))
                q.expected_output = float(job.expected_output_tokens[i])
            columns = iter(job.duration_s[i].tolist())
            for t, kind in enumerate(self.spec.types):
                own = math.inf if kind.engine else next(columns, math.inf)
                if q.kind != StageKind.TASK:
                    own = self._llm_time_s(t, q) if q.kind == StageKind.LLM else math.inf
                q.expected_s.append(own)
            self.stages.append(q)
            run.stages.append(q)
        for e in range(job.num_edges):
            u, v = run.stages[job.parent[e]], run.stages[job.child[e]]
            u.children.append((v, float(job.data_bytes[e])))
            v.parents.append((u, float(job.data_bytes[e]), int(job.shared_tokens[e])))
        for q in reversed(run.stages):
            q.mean_s = float(job.expected_tool_s[q.idx])
            if q.kind != StageKind.TOOL:
                able = [x for x in self.devices if math.isfinite(q.expected_s[x.type_idx])]
                times = [q.expected_s[x.type_idx] / x.base_speed for x in able]
                q.mean_s = sum(times) / len(times)
            ahead = [
                self._moving_s(q, v, size) + v.rank_s for v, size in q.children if not v.hidden
            ]
            q.rank_s = q.mean_s + max(ahead, default=0.0)

    def _moving_s(self, u: Stage, v: Stage, size: float) -> float:
        """Mean time to move data between two distinct devices."""
        if not size or StageKind.TOOL in (u.kind, v.kind) or self.episode.links is None:
            return 0.0
        pairs = max(1, len(self.devices) * (len(self.devices) - 1))
        off = ~np.eye(len(self.devices), dtype=bool)
        links = self.episode.links
        latency_s = sum(links.latency_s[off].tolist()) / pairs
        return latency_s + size * (sum(links.s_per_byte[off].tolist()) / pairs)

    def _llm_time_s(self, t: int, q: Stage) -> float:
        engine, capacity = self.spec.types[t].engine, self.spec.kv_tokens(t)
        if engine is None or q.kv > capacity:
            return math.inf
        grid, total_s = engine.grid, 0.0
        for done in range(0, q.prompt, engine.max_num_batched_tokens):
            chunk = min(engine.max_num_batched_tokens, q.prompt - done)
            total_s += grid.step_s([(chunk, done)])
        most = min(self.spec.types[t].typical_batch, engine.max_num_seqs)
        batch = max(1, min(most, int(capacity / (q.prompt + q.expected_output))))
        kv = int(batch * (q.prompt + 0.5 * q.expected_output))
        step_s = grid.cpu_s + grid.dense(batch) + grid.decode(batch, kv)
        return total_s + (q.expected_output - 1.0) * step_s

    def can_start(self, q: Stage, device: Device) -> bool:
        """Whether a ready stage could start on a device now."""
        return (
            device.up
            and len(device.running) < device.type.num_slots
            and math.isfinite(q.expected_s[device.type_idx])
            and (q.kind == StageKind.TASK or device.reserved + q.kv <= device.capacity)
        )

    def startable(self) -> list[int]:
        """All starts that are allowed, as actions."""
        ranked = sorted(self.ready, key=lambda q: (-q.rank_s, q.number))
        num = len(self.devices)
        return [q.number * num + x.d for q in ranked for x in self.devices if self.can_start(q, x)]

    def next_event_s(self) -> float:
        """When something happens next."""
        faults, ahead = self.episode.faults, [run.arrival_s for run in self.runs[self._next_job :]]
        return min(
            float(faults.time_s[self._next_fault]) if self._next_fault < len(faults) else math.inf,
            min(min(device.times()) for device in self.devices),
            min(self.tools)[0] if self.tools else math.inf,
            ahead[0] if ahead else math.inf,
        )

    def run(self, decide: Callable[[ReferenceSimulator], int]) -> None:
        """Play to the end; `decide` answers with an action."""
        self._next_job = self._next_fault = 0
        while any(math.isnan(run.finish_s) for run in self.runs):
            time_s = self.next_event_s()
            asked = self.asks_when_ready and self.fresh
            if time_s > self.now_s and self._changed and (asked or self.startable()):
                self._decide(decide(self), time_s)
                continue
            passed_s = time_s - self.now_s
            self.area += len(self.in_system) * passed_s
            self.weighted_area += sum(run.job.weight for run in self.in_system) * passed_s
            self.now_s = time_s
            self._handle()

    def _decide(self, action: int, time_s: float) -> None:
        self.num_decisions += 1
        self.fresh = []
        if action == WAIT:
            if math.isinf(time_s):
                raise InvalidAction("nothing is running and nothing will arrive")
            self._changed = False
            return
        if action not in self.startable():
            raise InvalidAction(f"action {action} is not allowed: choose from {self.startable()}")
        number, d = divmod(action, len(self.devices))
        q, device = self.stages[number], self.devices[d]
        first_s = self.now_s
        if q.kind == StageKind.TASK and self.spec.move_delay_s:
            last = device.last_job
            if last is None or (
                last.job.template != q.run.job.template
                if self.spec.move_on == "template"
                else last is not q.run
            ):
                first_s += self.spec.move_delay_s
        links = self.episode.links
        for u, size, _ in q.parents:
            if size and u.device is not None and u.device is not device:
                there_s = u.finish_s
                if links is not None:
                    there_s += float(links.latency_s[u.device.d, d])
                    there_s += size * float(links.s_per_byte[u.device.d, d])
                first_s = max(first_s, there_s)
        self.ready.remove(q)
        q.status, q.device, q.start_s, q.begin_s = "started", device, self.now_s, first_s
        device.last_job = q.run
        device.start(q)

    def _handle(self) -> None:
        faults = self.episode.faults
        if self._next_fault < len(faults) and faults.time_s[self._next_fault] == self.now_s:
            self._fault(self._next_fault)
            self._next_fault += 1
            return
        for device in self.devices:
            if self.now_s in device.times():
                device.event()
                return
        if self.tools and min(self.tools)[0] == self.now_s:
            entry = min(self.tools)
            self.tools.remove(entry)
            self.end(entry[2])
            return
        run = self.runs[self._next_job]
        self._next_job += 1
        self._changed = True
        self.in_system.append(run)
        for q in run.stages:
            q.status = "blocked"
        for q in run.stages:
            if not q.parents:
                self.become_ready(q)

    def become_ready(self, q: Stage) -> None:
        """All parents have ended."""
        q.ready_s = self.now_s
        if q.kind == StageKind.TOOL:
            q.status, q.start_s, q.begin_s = "started", self.now_s, self.now_s
            self.tools.append((self.now_s + q.tool_s, self._tool_order, q))
            self._tool_order += 1
            return
        q.status = "ready"
        self.ready.append(q)
        self.fresh.append(q)
        self._changed = True

    def end(self, q: Stage) -> None:
        """A stage has ended."""
        q.status, q.finish_s = "ended", self.now_s
        self._changed = True
        for v, _ in q.children:
            if v.status == "blocked" and all(u.status == "ended" for u, _, _ in v.parents):
                self.become_ready(v)
        run = q.run
        if all(x.status == "ended" for x in run.stages):
            run.finish_s = self.now_s
            self.in_system.remove(run)
            if self.now_s - run.arrival_s <= run.job.deadline_s * self.episode.deadline_scale:
                self.good += run.job.weight

    def _fault(self, i: int) -> None:
        faults = self.episode.faults
        device = self.devices[int(faults.replica[i])]
        kind = int(faults.kind[i])
        self._changed = True
        device.settle()
        if kind == FAULT_SLOW:
            device.speed = device.base_speed * float(faults.value[i])
            device.plan()
        elif kind == FAULT_DOWN:
            device.up = False
            lost = device.running
            device.clear()
            for q in lost:
                q.device, q.hit = None, 0
                q.restarts += 1
                self.become_ready(q)
        else:
            device.up = True

    def stage_outcomes(self) -> NDArray[np.void]:
        """Return what became of every stage, `STAGE_OUTCOME_DTYPE[num_stages]`."""
        return np.array(
            [
                (
                    q.run.idx,
                    q.idx,
                    int(q.kind),
                    q.run.job.label[q.idx],
                    -1 if q.device is None else q.device.d,
                    q.ready_s,
                    q.start_s,
                    q.begin_s,
                    q.finish_s,
                    q.prompt,
                    q.output,
                    q.hit,
                    q.restarts,
                )
                for q in self.stages
            ],
            STAGE_OUTCOME_DTYPE,
        )

    def job_outcomes(self) -> NDArray[np.void]:
        """Return what became of every job, `JOB_OUTCOME_DTYPE[num_jobs]`."""
        templates = sorted({job.template for job in self.episode.jobs})
        return np.array(
            [
                (
                    run.idx,
                    run.job_idx,
                    templates.index(run.job.template),
                    run.arrival_s,
                    run.finish_s,
                    run.job.deadline_s * self.episode.deadline_scale,
                    run.job.weight,
                    run.job.num_stages,
                )
                for run in self.runs
            ],
            JOB_OUTCOME_DTYPE,
        )


def _normal(noise_seed: int, stage: int) -> float:
    golden = 0x9E3779B97F4A7C15
    mask = (1 << 64) - 1
    base = int(mix64(np.uint64(noise_seed ^ int(mix64(np.uint64((stage + golden) & mask))))))
    u, w = uniform(np.uint64(base)), uniform(np.uint64((base + golden) & mask))
    return math.sqrt(-2.0 * math.log(u)) * math.cos(2.0 * math.pi * w)
