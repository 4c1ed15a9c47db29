"""Forward simulation of one engine by itself: what planners and teachers foresee.

The requests of a replica are put into a scratch environment with nothing else in it, as they will
be at the end of the step in progress, and run until all of them have ended; arrivals after now do
not exist there (Block, arXiv 2508.03611). How long their outputs are is the caller's to say.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from servegym.cluster.allocate import Capacity, make_state
from servegym.cluster.engine import form_step
from servegym.cluster.jit import inlined, kernel
from servegym.cluster.kernels import advance, reset_env
from servegym.cluster.router import prefix_hit_tokens
from servegym.cluster.simulator import Simulator
from servegym.cluster.state import DECODE, DISPATCH_ONLY, PREFILL, QUEUED, STEP, Params, State
from servegym.cluster.steptime import decode_span_s
from servegym.cluster.stretches import steps_ended_by
from servegym.cluster.tier_rules import TierRules
from servegym.typing import IntArray
from servegym.workloads.table import BY_ITSELF


class Copied(NamedTuple):
    """The requests of an engine, in the order in which it takes them; N of them at most."""

    source: IntArray  # [N] which of its environment's requests each one is
    generated: IntArray  # [N] output tokens at the end of the step in progress
    computed: IntArray  # [N] tokens that need not be computed
    output: IntArray  # [N] output tokens in all, as foreseen


@inlined
def _note(c: Copied, slot: int, i: int, generated: int, computed: int) -> None:
    c.source[slot] = i
    c.generated[slot] = generated
    c.computed[slot] = computed


@kernel
def list_requests(p: Params, s: State, e: int, r: int, added: int, c: Copied) -> int:
    """Note what replica `r` has to do: running requests, waiting ones, and request `added`.

    Running requests stand first and in order, with what they have computed as given; so they are
    admitted at once, as far as the foreseen lengths and the blocks allow.

    Returns:
        How many there are, the added one included, which is the last.
    """
    v = s.replica[e, r]
    ended = 0  # steps of the stretch in progress that count as done, the running one included
    if v.mode == STEP:
        ended = 1
    elif v.mode == DECODE:
        ended = steps_ended_by(p, s, e, r, s.env[e].now_s) + 1
    slot = 0
    i = v.run_head
    while i >= 0:
        q = s.request[e, i]
        generated, computed = q.generated, q.computed
        if q.join_iter >= 0:
            steps = v.iteration + ended - q.join_iter
            generated += steps
            computed += steps
        elif v.mode == STEP or v.mode == PREFILL:
            computed += q.chunk
            if computed == q.prompt + generated:
                generated += 1
        _note(c, slot, i, generated, computed)
        slot += 1
        i = q.next_request
    i = v.wait_head
    while i >= 0:
        q = s.request[e, i]
        _note(c, slot, i, q.generated, 0 if q.generated else q.hit_hint)
        slot += 1
        i = q.next_request
    hit = prefix_hit_tokens(p, s, e, r, added, s.env[e].now_s)
    _note(c, slot, added, s.request[e, added].generated, hit)
    return slot + 1


@inlined
def _copy_request(p: Params, s: State, e: int, c: Copied, slot: int, scratch: State) -> None:
    """Put a request at the end of the scratch engine's queue."""
    capacity_tokens = p.longest_tokens[scratch.replica[0, 0].type_idx]
    source = s.request[e, c.source[slot]]
    q = scratch.request[0, slot]
    q.arrival_s = 0.0
    q.after = BY_ITSELF
    q.first_after = -1
    q.prompt = source.prompt + c.generated[slot]
    room = capacity_tokens - q.prompt + 1  # a longer answer would never end
    q.output = max(1, min(c.output[slot] - c.generated[slot], room))
    q.predicted = q.output
    q.slo_class = source.slo_class
    q.landed_tokens = c.computed[slot]
    q.status = QUEUED
    q.replica = 0
    q.next_request = -1
    tail = scratch.replica[0, 0].wait_tail
    if tail >= 0:
        scratch.request[0, tail].next_request = slot
    else:
        scratch.replica[0, 0].wait_head = slot
    scratch.replica[0, 0].wait_tail = slot
    scratch.replica[0, 0].num_waiting += 1


@kernel
def run_dry(
    p: Params,
    quiet: Params,
    s: State,
    e: int,
    r: int,
    speed: float,
    c: Copied,
    count: int,
    scratch: State,
) -> float:
    """Run the first `count` requests that were noted of replica `r` to their ends.

    Args:
        p: Constants.
        quiet: The same for a scratch environment, see `Scratch`.
        s: State.
        e: Environment.
        r: Replica.
        speed: Of its steps, 1 being nominal.
        c: Its requests, by `list_requests`, and the lengths of their outputs.
        count: How many of them are there.
        scratch: Holds afterwards when each one ended, in seconds since the end of the step in
            progress: `scratch.request[0, slot].finish_s`.

    Returns:
        Sum of the times that they take from there on, seconds.
    """
    if count == 0:
        return 0.0
    scratch.env[0].num_replicas = 1
    scratch.env[0].num_faults = 0
    scratch.replica[0, 0].type_idx = s.replica[e, r].type_idx
    scratch.replica[0, 0].base_speed = speed
    scratch.env[0].num_requests = count
    reset_env(quiet, scratch, 0)
    for slot in range(count):
        _copy_request(p, s, e, c, slot, scratch)
    env = scratch.env[0]
    env.next_arrival = count
    env.in_system = count
    env.num_ended = 0
    form_step(quiet, scratch, 0, 0, 0.0)
    advance(quiet, scratch, 0)
    return env.area


@kernel
def step_left_s(p: Params, s: State, e: int, r: int) -> float:
    """Time until the step in progress ends, 0 if there is none."""
    v = s.replica[e, r]
    now_s = s.env[e].now_s
    if v.num_ranks > 0:  # it waits for the step of all, even if it is idle
        due_s = s.due[e, v.event_pos].time_s
        return due_s - now_s if due_s < np.inf else 0.0
    if v.mode == STEP or v.mode == PREFILL:
        return s.due[e, v.event_pos].time_s - now_s
    if v.mode == DECODE:
        steps = steps_ended_by(p, s, e, r, now_s) + 1
        kv = v.kv_tokens + v.num_decodes
        span = decode_span_s(p, v.type_idx, v.num_decodes, kv, steps)
        return v.stretch_begin_s + v.stretch_factor * span - now_s
    return 0.0


class Scratch:
    """A one-replica environment without prefix cache, large enough for any engine of a simulator.

    Attributes:
        state: The environment.
        quiet: Constants for it: nothing recorded, no noise, no scrapes.
        copied: Room for the requests of an engine.
    """

    def __init__(self, simulator: Simulator) -> None:
        spec = replace(
            simulator.spec,
            types=tuple(replace(t, host_kv=None, disk_kv=None) for t in simulator.spec.types),
            prefix_caching=False,
            retain_kv_s=0.0,
            tiers=TierRules(),
        )
        self._size = simulator.state.request.shape[1]
        capacity = Capacity(
            num_envs=1,
            requests=self._size + 1,
            segments=1,
            names=1,
            replicas=1,
            faults=1,
            longest_tokens=1,
            log=1,
        )
        self.state = make_state(spec, capacity)
        self.quiet = simulator.params._replace(
            prefix_caching=False,
            retain_kv_s=0.0,
            record=False,
            noise_sigma=0.0,
            metrics_interval_s=0.0,
            asks=DISPATCH_ONLY,
            moves_kv=False,
            disaggregated=False,
            migration=simulator.params.migration._replace(on=False),
            retains=False,
            tiered=False,
            role=np.zeros_like(simulator.params.role),
        )
        self.copied = Copied(*(np.zeros(self._size + 1, np.int64) for _ in Copied._fields))

    def covers(self, simulator: Simulator) -> bool:
        """Whether it has room for the engines of a simulator, which may have grown."""
        return self._size >= simulator.state.request.shape[1]
