"""The plain simulator: docs/simulator.md step by step, slow and obvious.

It shares nothing with the compiled core but the random numbers and the cost grids; tests hold
the two equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from servegym.cluster import state as st
from servegym.cluster.outcome import EVENT_DTYPE
from servegym.cluster.reference_engines import RULES, Request, VllmPriority
from servegym.cluster.spec import ClusterSpec, Episode


class ReferenceSimulator:
    """One episode, played event by event.

    Args:
        spec: The cluster.
        episode: What is played.
        order: Called before a step of an engine that goes by priorities; sets the `key` of its
            requests.
        each_step: Call it before every step, not only where it matters who goes first.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        episode: Episode,
        *,
        order: Callable[[VllmPriority], None] | None = None,
        each_step: bool = False,
    ) -> None:
        episode.validate(spec)
        self.order, self.each_step = order, each_step
        self.spec, self.episode, table = spec, episode, episode.table
        self.requests = [
            Request(
                i,
                int(table.prompt_tokens[i]),
                int(table.output_tokens[i]),
                [
                    (int(table.prefix_keys[k]), int(table.prefix_ends[k]))
                    for k in range(table.prefix_offsets[i], table.prefix_offsets[i + 1])
                ],
                arrival_s=float(table.arrival_s[i]),
                key=float(table.slo_class[i]),
                idle_since_s=float(table.arrival_s[i]),
            )
            for i in range(len(table))
        ]
        types = [spec.types[t] for t in episode.type_idx.tolist()]
        self.replicas = [RULES[kind.engine](self, r) for r, kind in enumerate(types)]
        self.now_s = 0.0
        self.in_system = 0
        self.ended = 0
        self.area = 0.0
        self.engine_steps = 0
        self.scraped = [(0, 0, 0.0, 0)] * episode.num_replicas
        self._events: list[tuple[float, float, int, int, int]] = []

    def log(self, kind: int, request: int, replica: int, value: float = 0.0) -> None:
        """Append an event at the current time."""
        self._events.append((self.now_s, value, request, replica, kind))

    def events(self) -> NDArray[np.void]:
        """Return the event log, `EVENT_DTYPE[m]`."""
        return np.array(self._events, EVENT_DTYPE)

    def end(self, q: Request, kind: int, replica: int) -> None:
        """A request leaves the system."""
        self.log(kind, q.idx, replica)
        self.in_system -= 1
        self.ended += 1

    def allowed(self, request: int) -> list[bool]:
        """Which actions may be taken: replicas, hold, reject."""
        q = self.requests[request]
        need = q.prompt + q.output - 1
        size = self.spec.block_size
        fits = [e.up and need <= e.type.capacity_tokens(size) for e in self.replicas]
        return [*fits, self.spec.allow_hold, self.spec.allow_reject]

    def prefix_hit_tokens(self, request: int, replica: int) -> int:
        """Leading prompt tokens of a request in a replica's cache."""
        q, size = self.requests[request], self.spec.block_size
        return len(self.replicas[replica].hits(q, (q.prompt - 1) // size)) * size

    def run(self, dispatch: Callable[[ReferenceSimulator, int], int]) -> None:
        """Play to the end; `dispatch` answers with a replica, `HOLD` or `REJECT`."""
        faults, table = self.episode.faults, self.episode.table
        interval = self.spec.metrics_interval_s
        next_arrival = next_fault = 0
        scrape_s = 0.0 if interval > 0 else math.inf
        held: list[tuple[float, Request]] = []
        returned: list[Request] = []
        while self.ended < len(self.requests):
            fault_s = faults.time_s[next_fault] if next_fault < len(faults) else math.inf
            engine = min(self.replicas, key=lambda e: e.due_s)
            arrival_s = table.arrival_s[next_arrival] if next_arrival < len(table) else math.inf
            hold_s = held[0][0] if held else math.inf
            decision_s = self.now_s if returned else min(hold_s, arrival_s)
            now_s = float(min(fault_s, engine.due_s, scrape_s, decision_s))
            self.area += self.in_system * (now_s - self.now_s)
            self.now_s = now_s
            if fault_s == now_s:
                self._fault(next_fault, returned)
                next_fault += 1
            elif engine.due_s == now_s:
                if engine.stepping:
                    engine.end_step()
                engine.begin_step()
            elif scrape_s == now_s:
                self.scraped = [e.metrics() for e in self.replicas]
                scrape_s += interval
            else:
                if returned:
                    q = returned.pop(0)
                elif hold_s <= arrival_s:
                    q = held.pop(0)[1]
                else:
                    q = self.requests[next_arrival]
                    next_arrival += 1
                    self.in_system += 1
                    self.log(st.EV_ARRIVE, q.idx, -1)
                action = st.HOLD
                if any(self.allowed(q.idx)[:-2]):
                    action = dispatch(self, q.idx)
                if action == st.HOLD:
                    held.append((now_s + self.spec.hold_s, q))
                    self.log(st.EV_HOLD, q.idx, -1)
                elif action == st.REJECT:
                    self.end(q, st.EV_REJECT, -1)
                else:
                    self.log(st.EV_DISPATCH, q.idx, action)
                    chosen = self.replicas[action]
                    chosen.waiting.append(q)
                    if math.isinf(chosen.due_s):
                        chosen.due_s = math.nextafter(now_s, math.inf)

    def _fault(self, i: int, returned: list[Request]) -> None:
        engine = self.replicas[int(self.episode.faults.replica[i])]
        kind = int(self.episode.faults.kind[i])
        if kind == st.FAULT_SLOW:
            engine.speed = engine.base_speed * float(self.episode.faults.value[i])
        elif kind == st.FAULT_DOWN:
            if engine.stepping and engine.due_s == self.now_s:
                engine.end_step()
                engine.stepping = False
            returned += engine.stop()
        else:
            engine.up = True
