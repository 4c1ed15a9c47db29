"""The plain simulator: docs/simulator.md step by step, slow and obvious.

It shares nothing with the compiled core but the random numbers and the cost grids; tests hold
the two equal.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from servegym.cluster import state as st
from servegym.cluster.outcome import EVENT_DTYPE
from servegym.cluster.rank_rules import PrefillTogether
from servegym.cluster.reference_engine import Engine, Request
from servegym.cluster.reference_engines import RULES
from servegym.cluster.reference_migration import Choose, Migrations
from servegym.cluster.reference_pipeline import BATCHED
from servegym.cluster.reference_tiers import Tiers
from servegym.cluster.reference_transfers import Transfers
from servegym.cluster.reference_vllm import VllmPriority
from servegym.cluster.spec import ClusterSpec, Episode, first_ranks
from servegym.workloads.table import ANY_END, BY_ITSELF

#: Says what becomes of the KV of a turn, and for how many seconds it is kept, if it is.
Retain = Callable[["ReferenceSimulator", int], tuple[int, float]]


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
                after=int(table.after[i]),
                delay_s=float(table.delay_s[i]),
                key=float(table.slo_class[i]),
            )
            for i in range(len(table))
        ]
        types = [spec.types[t] for t in episode.type_idx.tolist()]
        self.retain: Retain | None = None
        self.retain_all = False
        self.replicas = [
            (BATCHED if kind.parts else RULES)[kind.engine](self, r) for r, kind in enumerate(types)
        ]
        first = first_ranks(np.array([kind.num_ranks for kind in types])).tolist()
        self.groups = [[r for r, own in enumerate(first) if own == i] for i in first]
        self.unsent = [q for q in self.requests if q.after == ANY_END]
        self.now_s = 0.0
        self.in_system = 0
        self.ended = 0
        self.area = 0.0
        self.engine_steps = 0
        self.scraped = [(0, 0, 0.0, 0)] * episode.num_replicas
        self.timers: list[tuple[float, int, int, int]] = []  # time_s, kind, order, subject
        self._num_set = 0
        self.transfers = Transfers(self)
        self.migrations = Migrations(self)
        self.tiers = Tiers(self)
        self._events: list[tuple[float, float, int, int, int]] = []

    def log(self, kind: int, request: int, replica: int, value: float = 0.0) -> None:
        """Append an event at the current time."""
        self._events.append((self.now_s, value, request, replica, kind))

    def events(self) -> NDArray[np.void]:
        """Return the event log, `EVENT_DTYPE[m]`."""
        return np.array(self._events, EVENT_DTYPE)

    def end(self, q: Request, kind: int, replica: int) -> None:
        """A request leaves the system; those that wait for it arrive after their delays."""
        self.log(kind, q.idx, replica)
        self.in_system -= 1
        self.ended += 1
        released = self.followers(q) + self.unsent[:1]
        del self.unsent[:1]
        for other in released:
            self._set_arrival(other, self.now_s + other.delay_s)

    def followers(self, q: Request) -> list[Request]:
        """Those that wait for the end of this one."""
        return [other for other in self.requests if other.after == q.idx]

    def expiry_s(self, q: Request, keep_s: float) -> float:
        """Set and return when a turn that is kept from now on has been so for its time."""
        until_s = self.now_s + keep_s
        self.set_timer(until_s, st.EXPIRY, q.idx)
        return until_s

    def allowed(self, request: int) -> list[bool]:
        """Which actions may be taken: replicas, then hold, then reject."""
        q = self.requests[request]
        need = q.prompt + q.output - 1
        size = self.spec.block_size
        fits = [e.up and need <= e.type.capacity_tokens(size) for e in self.replicas]
        fits = [ok and e.type.role != "decode" for ok, e in zip(fits, self.replicas, strict=True)]
        return [*fits, self.spec.allow_hold, self.spec.allow_reject]

    def places(self, request: int) -> list[bool]:
        """Where a request may decode that is prefilled elsewhere; never hold, never reject."""
        q = self.requests[request]
        need, size = q.prompt + q.output - 1, self.spec.block_size
        fits = [e.up and need <= e.type.capacity_tokens(size) for e in self.replicas]
        fits = [ok and e.type.role != "prefill" for ok, e in zip(fits, self.replicas, strict=True)]
        return [*fits, False, False]

    def prefix_hit_tokens(self, request: int, replica: int) -> int:
        """Leading prompt tokens of a request in a replica's cache."""
        q, size = self.requests[request], self.spec.block_size
        return len(self.replicas[replica].hits(q, (q.prompt - 1) // size)) * size

    def run(
        self,
        dispatch: Callable[[ReferenceSimulator, int], int] | None = None,
        place: Callable[[ReferenceSimulator, int], int] | None = None,
        migrate: Choose | None = None,
        retain: Retain | None = None,
        *,
        retain_all: bool = False,
    ) -> None:
        """Play to the end.

        Args:
            dispatch: Answers with an index of `allowed`; None: the replica with the smallest sum
                of running and four times its waiting requests.
            place: Answers with an index of `places`, where there are several; None: as above, with
                requests whose KV is on its way among those that wait.
            migrate: Names a request that moves and where to, or nobody, again and again at every
                tick at which somebody could; None: the rule of the cluster decides.
            retain: Answers what becomes of the KV of a turn, and for how long it is kept, if it
                is; None: the rules of the cluster.
            retain_all: Whether it is asked of all ended requests, not only where others follow.
        """
        self.place = place
        self.migrate = migrate
        self.retain, self.retain_all = retain, retain_all
        self.dispatch = dispatch or _least_busy
        for q in self.requests:
            if q.after == BY_ITSELF:
                self._set_arrival(q, q.arrival_s)
        self._set_fault(0)
        if self.spec.metrics_interval_s > 0:
            self.set_timer(0.0, st.SCRAPE, 0)
        self.migrations.begin()
        while self.ended < len(self.requests):
            engine = min(self.replicas, key=lambda e: e.due_s)
            timer_s, kind = self.timers[0][:2] if self.timers else (math.inf, st.FAULT)
            now_s = min(timer_s, engine.due_s)
            self.area += self.in_system * (now_s - self.now_s)
            self.now_s = now_s
            if timer_s == now_s and (kind == st.FAULT or engine.due_s > now_s):
                self._go_off(*heapq.heappop(self.timers))
            else:
                self._step([self.replicas[r] for r in self.groups[engine.r]])
        for engine in self.replicas:
            engine.pool.let_all_go()

    def _step(self, ranks: list[Engine]) -> None:
        """Let replicas that step together, most often one alone, end a step and begin another."""
        for engine in ranks:
            if engine.stepping:
                engine.end_step()
        together = ranks[0].type.together
        if together is not None:
            waits = self._wait_for_each_other(ranks, together)
            for engine in ranks:
                engine.waits = waits
        for engine in ranks:
            engine.begin_step()
        shared = ranks[0].type.shared
        if shared is None or not any(engine.stepping for engine in ranks):
            return
        slowest_s = max(engine.own_step_s() for engine in ranks)
        tokens = [max(1, engine.step_tokens()) for engine in ranks]  # the idle have a dummy token
        prefills = any(engine.prefills() for engine in ranks)
        end_s = self.now_s + slowest_s + shared.step_s(tokens, prefills=prefills)
        for engine in ranks:
            engine.due_s = end_s

    def _wait_for_each_other(self, ranks: list[Engine], rule: PrefillTogether) -> bool:
        """Say whether ranks leave prefills out of their next step."""
        group = ranks[0]
        decoding = all(any(not q.prefilling for q in engine.running) for engine in ranks)
        if all(engine.can_prefill() for engine in ranks):
            group.waited_steps = 0
            if decoding and group.gathered_steps < rule.gather_steps:
                group.gathered_steps += 1
                return True
            if decoding:
                group.gathered_steps = 0
            return False
        group.waited_steps += 1
        if decoding and group.waited_steps < rule.timeout_steps:
            return True
        group.waited_steps = 0
        return False

    def cancel(self, subject: int) -> None:
        """Remove the timer of a request, if it has one."""
        self.timers = [x for x in self.timers if x[1] <= st.TICK or x[3] != subject]
        heapq.heapify(self.timers)

    def set_timer(self, time_s: float, kind: int, subject: int) -> None:
        """Let something happen; of equal times and kinds, what was set first goes first."""
        self._num_set += 1
        heapq.heappush(self.timers, (time_s, kind, self._num_set, subject))

    def _set_fault(self, i: int) -> None:
        if i < len(self.episode.faults):
            self.set_timer(float(self.episode.faults.time_s[i]), st.FAULT, i)

    def _set_arrival(self, q: Request, time_s: float) -> None:
        """Let a request arrive; at equal times those of the table go in its order."""
        heapq.heappush(self.timers, (time_s, st.ARRIVAL, q.idx, q.idx))

    def _go_off(self, time_s: float, kind: int, order: int, subject: int) -> None:
        """Do what a timer was set for."""
        if kind == st.FAULT:
            self._set_fault(subject + 1)
            self._fault(subject)
        elif kind == st.SCRAPE:
            self.scraped = [e.metrics() for e in self.replicas]
            self.set_timer(time_s + self.spec.metrics_interval_s, st.SCRAPE, 0)
        elif kind == st.COPIED:
            self.migrations.copied(self.replicas[subject])
        elif kind == st.TICK:
            self.migrations.tick(self.migrate)
        elif kind == st.RETAINING:
            for engine in [e for e in self.replicas if e.pool.undecided(subject)]:
                assert self.retain is not None
                engine.settle_turn(self.requests[subject], *self.retain(self, subject))
        elif st.LANDING <= kind <= st.PLACING:
            if subject in self.tiers.loads:
                self.tiers.land(self.requests[subject])
            else:
                self.transfers.go_off(kind, self.requests[subject])
        elif kind == st.EXPIRY:
            for engine in self.replicas:
                engine.pool.expire(subject)
        else:
            q = self.requests[subject]
            if kind == st.ARRIVAL:
                q.arrival_s = q.idle_since_s = time_s
                self.in_system += 1
                self.log(st.EV_ARRIVE, q.idx, -1)
            self._route(q)

    def _route(self, q: Request) -> None:
        """A request wants a replica."""
        action = hold = len(self.replicas)
        if any(self.allowed(q.idx)[:hold]):
            action = self.dispatch(self, q.idx)
        if action < hold:
            self.log(st.EV_DISPATCH, q.idx, action)
            if not self.transfers.dispatched(q, action):
                self.replicas[action].enqueue(q)
        elif action == hold:
            self.set_timer(self.now_s + self.spec.hold_s, st.HOLD_OVER, q.idx)
            self.log(st.EV_HOLD, q.idx, -1)
        else:
            self.end(q, st.EV_REJECT, -1)

    def _fault(self, i: int) -> None:
        engine = self.replicas[int(self.episode.faults.replica[i])]
        kind = int(self.episode.faults.kind[i])
        if kind == st.FAULT_SLOW:
            engine.speed = engine.base_speed * float(self.episode.faults.value[i])
        elif kind == st.FAULT_DOWN:
            if engine.stepping and engine.due_s == self.now_s:
                engine.end_step()
                engine.stepping = False
            if self.spec.tiered:
                self.tiers.fail(engine)
            (self.migrations if self.spec.migrates else self.transfers).fail(engine)
            for q in engine.stop():
                self.set_timer(self.now_s, st.RETURN, q.idx)
        else:
            engine.up = True


def _least_busy(sim: ReferenceSimulator, request: int) -> int:
    """The first allowed replica with the smallest sum of running and four times waiting."""
    allowed = [e for e, ok in zip(sim.replicas, sim.allowed(request), strict=False) if ok]
    return min(allowed, key=lambda e: len(e.running) + 4 * len(e.waiting)).r
