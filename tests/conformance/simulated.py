"""Play a workload on our simulators, told in the driver's form, and find the first difference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from servegym.cluster import state as st
from servegym.cluster.reference import ReferenceSimulator
from servegym.cluster.reference_engine import Request
from servegym.cluster.reference_pipeline import Batched
from servegym.cluster.reference_vllm import Vllm, VllmPriority
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import ALWAYS, DECISION, NEVER, Asks
from servegym.costs.grid import NUM_BATCH_KNOTS
from servegym.costs.speculation import Speculation

from .workloads import cluster_and_episode


class Recording(Vllm):
    """Mixed into an engine: notes each of its steps as the driver does; decides nothing."""

    def __init__(self, sim: ReferenceSimulator, r: int, early: bool) -> None:
        super().__init__(sim, r)
        self.early = early
        self.rows: list[dict[str, Any]] = []
        self.victims: list[int] = []
        self.num_waiting = self.num_free = 0

    def form_knowing(self, hidden: int) -> tuple[list[tuple[int, int]], list[Request], bool]:
        ended = len(self.ended)
        formed = super().form_knowing(hidden)
        # the engine has who ended, and was displaced, wait until it learns of the end
        self.num_waiting = len(self.waiting) - hidden + ended - len(self.ended)
        self.num_free = len(self.pool.free)
        return formed

    def displace(self, victim: Request) -> None:
        self.victims.append(victim.idx)
        if self.early and self.type.async_scheduling:
            # what the step in flight fills has no identity yet
            victim.computed = min(victim.computed, victim.named * self.sim.spec.block_size)
        super().displace(victim)

    def begin_step(self) -> None:
        before = list(self.running)
        super().begin_step()
        if not self.stepping:
            return
        scheduled = [q for q in self.running if q.scheduled]
        admitted = [q for q in scheduled if q not in before or q.idx in self.victims]
        self.rows.append(
            {
                "begin_s": self.sim.now_s,
                "step_s": self.due_s - self.sim.now_s,
                "scheduled": [[q.idx, q.scheduled] for q in scheduled],
                "admitted": [[q.idx, q.computed] for q in admitted],
                "preempted": self.victims,
                "num_waiting": self.num_waiting,
                "free_blocks": self.num_free,
                "finished": [],
            }
        )
        self.victims = []

    def give(self, q: Request, tokens: int) -> tuple[int, int]:
        chunk = super().give(q, tokens)
        if self.early:
            # with asynchronous scheduling, what the step in flight computes is not known yet
            ahead = tokens if q.prefilling or not self.type.async_scheduling else 0
            filled = (q.computed + ahead) // self.sim.spec.block_size
            for j in range(q.named, filled):
                self.pool.name(q.blocks[j], self.identity(q, j))
            q.named = max(q.named, filled)
        return chunk

    def end_step(self) -> None:
        before = list(self.running)
        super().end_step()
        gone = [q for q in before if q in self.ended or q not in self.running]
        self.rows[-1]["finished"] = [q.idx for q in gone]


class RecordingPriority(Recording, VllmPriority):
    """In priority mode."""


class RecordingBatched(Batched):
    """The same of an engine with explicit batches."""

    def __init__(self, sim: ReferenceSimulator, r: int) -> None:
        super().__init__(sim, r)
        self.rows: list[dict[str, Any]] = []
        self.victims: list[int] = []
        self.before: list[Request] = []

    def preempt(self, q: Request, *, to_front: bool = True) -> None:
        self.victims.append(q.idx)
        super().preempt(q, to_front=to_front)

    def begin_step(self) -> None:
        self.before = list(self.running)
        super().begin_step()

    def send_off(self, chunks: list[tuple[int, int]], decodes: list[Request]) -> float:
        scheduled = [q for q in self.running if q.scheduled]
        new = [q for q in scheduled if q not in self.before or q.idx in self.victims]
        landing_s = super().send_off(chunks, decodes)
        self.rows.append(
            {
                "begin_s": self.sim.now_s,
                "step_s": landing_s - self.sim.now_s,
                "scheduled": [[q.idx, q.scheduled] for q in scheduled],
                "admitted": [[q.idx, q.computed] for q in new],
                "preempted": self.victims,
                "num_waiting": len(self.waiting),
                "free_blocks": len(self.pool.free),
                "finished": [],
            }
        )
        self.victims = []
        return landing_s

    def end_step(self) -> None:
        before = list(self.running)
        super().end_step()
        self.rows[-1]["finished"] = [q.idx for q in before if q not in self.running]


def drawn_key(request: int, order: int) -> float:
    """Return the priority the driver gives a request in its n-th order."""
    mask = (1 << 64) - 1
    x = (request * 0x9E3779B97F4A7C15 + order * 0xD1B54A32D192ED03) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return float((x ^ (x >> 31)) >> 33)


def play_reference(
    workload: dict[str, Any],
    *,
    early: bool = False,
    priority: bool = False,
    overlap: bool = False,
    drafts: bool = False,
) -> dict[str, Any]:
    """Play on the plain simulator, step by step.

    Args:
        workload: See `workloads`.
        early: Name blocks filled while decoding at once, as the engine does, instead of when the
            request leaves.
        priority: In priority mode, with new priorities before every step.
        overlap: With asynchronous scheduling.
        drafts: With speculative decoding, where names are early anyway.
    """
    num_orders = 0

    def order(engine: VllmPriority) -> None:
        nonlocal num_orders
        for q in engine.waiting + engine.running:
            q.key = drawn_key(q.idx, num_orders)
        num_orders += 1

    spec, episode = _spec_and_episode(workload, overlap, drafts)
    sim = ReferenceSimulator(spec, episode, order=order, each_step=True)
    engine: RecordingBatched | Recording = RecordingBatched(sim, 0)
    if not drafts:
        engine = (RecordingPriority if priority else Recording)(sim, 0, early)
    sim.replicas = [engine]
    sim.run(lambda _, __: 0)
    events = sim.events()
    return {"steps": engine.rows} | _per_request(events, len(workload["requests"]))


def _spec_and_episode(
    workload: dict[str, Any], overlap: bool, drafts: bool
) -> tuple[ClusterSpec, Episode]:
    spec, episode = cluster_and_episode(workload)
    kind = replace(spec.types[0], async_scheduling=overlap)
    if drafts:
        rates = tuple(workload["acceptance"])
        kind = replace(kind, speculation=Speculation(rates, kind.grid, np.zeros(NUM_BATCH_KNOTS)))
    return replace(spec, types=(kind,)), episode


def play_pair(workload: dict[str, Any], *, early: bool = False) -> dict[str, Any]:
    """Play a pair on the plain simulator, step by step; see `play_reference`."""
    sim = ReferenceSimulator(*cluster_and_episode(workload))
    engines = [Recording(sim, r, early) for r in range(2)]
    sim.replicas = list(engines)
    sim.run(lambda _, __: 0)
    told = _per_request(sim.events(), len(workload["requests"]))
    return {"prefill": engines[0].rows, "decode": engines[1].rows} | told


def play_compiled_pair(workload: dict[str, Any]) -> dict[str, Any]:
    """Play a pair on the compiled simulator; see `play_compiled`."""
    spec, episode = cluster_and_episode(workload)
    sim = Simulator(spec, [episode], record=True, asks=Asks(dispatch=NEVER))
    sim.advance()
    told = _per_request(sim.events(), len(workload["requests"]))
    victims = sim.outcomes()["num_preemptions"].tolist()
    return told | {"num_steps": int(sim.state.env[0]["engine_steps"]), "preemptions": victims}


def play_compiled(
    workload: dict[str, Any],
    *,
    priority: bool = False,
    overlap: bool = False,
    drafts: bool = False,
) -> dict[str, Any]:
    """Play on the compiled simulator, which tells of each request and how many steps it took."""
    spec, episode = _spec_and_episode(workload, overlap, drafts)
    if priority:
        spec = replace(spec, types=(replace(spec.types[0], engine="vllm-priority"),))
    asks = Asks(dispatch=NEVER, order=ALWAYS if priority else NEVER)
    sim = Simulator(spec, [episode], record=True, asks=asks)
    num_orders = 0
    while sim.advance()[0] == DECISION:
        keys = sim.state.order["key"][0]
        keys[:] = [drawn_key(i, num_orders) for i in range(len(keys))]
        sim.apply(np.zeros(1, np.int64))
        num_orders += 1
    told = _per_request(sim.events(), len(workload["requests"]))
    victims = sim.outcomes()["num_preemptions"].tolist()
    return told | {"num_steps": int(sim.state.env[0]["engine_steps"]), "preemptions": victims}


def _per_request(events: np.ndarray, n: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, kind, column in (
        ("cached_tokens", st.EV_ADMIT, "value"),
        ("first_token_s", st.EV_FIRST_TOKEN, "time_s"),
        ("finish_s", st.EV_FINISH, "time_s"),
        ("landed_s", st.EV_LAND, "time_s"),
    ):
        values = np.full(n, np.nan)
        part = events[events["kind"] == kind]
        values[part["request"]] = part[column]
        told[name] = values.tolist()
    return told


def outcome_of(engine: dict[str, Any]) -> dict[str, Any]:
    """Sum up an engine's run, or that of a pair, as `play_compiled` does."""
    pair = "prefill" in engine
    steps = engine["prefill"] + engine["decode"] if pair else engine["steps"]
    victims = [0] * len(engine["finish_s"])
    for step in steps:
        for i in step["preempted"]:
            # who had ended, but was not known to have, computes nothing again
            victims[i] += step["begin_s"] < engine["finish_s"][i]
    told = {name: engine[name] for name in (PAIR_REQUEST if pair else REQUEST)}
    return told | {"num_steps": len(steps), "preemptions": victims}


#: What is compared of each request, of a replica by itself and of a pair.
REQUEST = ("cached_tokens", "first_token_s", "finish_s")
PAIR_REQUEST = (*REQUEST, "landed_s")


def first_difference(run: dict[str, Any], engine: dict[str, Any]) -> str | None:
    """Say where a step-by-step run first differs from the engine's; None if nowhere."""
    return _in_steps(run["steps"], engine["steps"]) or _in_requests(run, engine, REQUEST)


def first_difference_of_pairs(run: dict[str, Any], engine: dict[str, Any]) -> str | None:
    """Say where a run on two replicas first differs from the engines'; None if nowhere."""
    for role in ("prefill", "decode"):
        difference = _in_steps(run[role], engine[role])
        if difference is not None:
            return f"{role}, {difference}"
    return _in_requests(run, engine, PAIR_REQUEST)


def _in_steps(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str | None:
    for k, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        for name in b:
            if name != "step_s" and a[name] != b[name]:
                return f"step {k}, {name}: ours {a[name]}, the engine's {b[name]}"
    if len(ours) != len(theirs):
        return f"ours takes {len(ours)} steps, the engine {len(theirs)}"
    return None


def _in_requests(run: dict[str, Any], engine: dict[str, Any], names: tuple[str, ...]) -> str | None:
    for name in names:
        if run[name] != engine[name]:
            return f"{name}: ours {run[name]}, the engine's {engine[name]}"
    return None
