"""Forward simulation of each choice, with predicted lengths: the planner's features.

For every replica that may take the pending request, its engine is copied twice into scratch
environments with nothing else in them: once as it is, once with the request added. Both start at
the end of the step in progress and run until all their requests have ended; arrivals after now do
not exist there (Block, arXiv 2508.03611). The planner looks at the engines themselves, so it is
not held back by stale metrics as other policies are.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from servegym.cluster.allocate import Capacity, make_state
from servegym.cluster.engine import form_step, prefix_hit_tokens
from servegym.cluster.jit import kernel
from servegym.cluster.kernels import advance, reset_env
from servegym.cluster.simulator import Simulator
from servegym.cluster.state import (
    DECODE,
    PREFILL,
    QUEUED,
    STEP,
    VIEW_WHAT_IF_ADDED,
    VIEW_WHAT_IF_E2E,
    Params,
    State,
)
from servegym.cluster.steptime import decode_span_s
from servegym.cluster.stretches import steps_ended_by
from servegym.workloads.table import BY_ITSELF


@kernel
def _copy_request(
    p: Params, s: State, e: int, i: int, generated: int, cached: int, scratch: State, slot: int
) -> None:
    """Put request `i` at the end of the scratch engine's queue, its length as predicted."""
    capacity_tokens = p.longest_tokens[scratch.replica[0, 0].type_idx]
    source = s.request[e, i]
    q = scratch.request[0, slot]
    q.arrival_s = 0.0
    q.after = BY_ITSELF
    q.first_after = -1
    q.prompt = source.prompt + generated
    room = capacity_tokens - q.prompt + 1  # a longer answer would never end
    q.output = max(1, min(int(np.round(source.predicted)) - generated, room))
    q.predicted = q.output
    q.slo_class = source.slo_class
    q.landed_tokens = cached
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
def _copy_engine(
    p: Params, quiet: Params, s: State, e: int, r: int, scratch: State, added: int
) -> int:
    """Rebuild replica `r` in the scratch environment; return how many requests it has.

    Running requests enter first and in order, with what they have computed as given; so they are
    admitted at once, as far as the predicted lengths and the blocks allow.
    """
    v = s.replica[e, r]
    ended = 0  # steps of the stretch in progress that count as done, the running one included
    if v.mode == STEP:
        ended = 1
    elif v.mode == DECODE:
        ended = steps_ended_by(p, s, e, r, s.env[e].now_s) + 1
    scratch.env[0].num_replicas = 1
    scratch.env[0].num_faults = 0
    scratch.replica[0, 0].type_idx = v.type_idx
    scratch.replica[0, 0].base_speed = v.base_speed
    count = v.num_running + v.num_waiting + (1 if added >= 0 else 0)
    scratch.env[0].num_requests = count
    reset_env(quiet, scratch, 0)
    slot = 0
    i = v.run_head
    while i >= 0:
        q = s.request[e, i]
        generated, cached = q.generated, q.computed
        if q.join_iter >= 0:
            steps = v.iteration + ended - q.join_iter
            generated += steps
            cached += steps
        elif v.mode == STEP or v.mode == PREFILL:
            cached += q.chunk
            if cached == q.prompt + generated:
                generated += 1
        _copy_request(p, s, e, i, generated, cached, scratch, slot)
        slot += 1
        i = q.next_request
    i = v.wait_head
    while i >= 0:
        q = s.request[e, i]
        _copy_request(p, s, e, i, q.generated, 0 if q.generated else q.hit_hint, scratch, slot)
        slot += 1
        i = q.next_request
    if added >= 0:
        hit = prefix_hit_tokens(p, s, e, r, added, s.env[e].now_s)
        _copy_request(p, s, e, added, s.request[e, added].generated, hit, scratch, slot)
        slot += 1
    env = scratch.env[0]
    env.next_arrival = slot
    env.in_system = slot
    env.num_ended = 0
    return slot


@kernel
def _run_engine(p: Params, scratch: State, count: int) -> float:
    """Run the scratch engine dry; return the sum of the times its requests take, seconds."""
    if count == 0:
        return 0.0
    form_step(p, scratch, 0, 0, 0.0)
    advance(p, scratch, 0)
    return scratch.env[0].area


@kernel
def _step_left_s(p: Params, s: State, e: int, r: int) -> float:
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


@kernel
def _fill(p: Params, quiet: Params, s: State, e: int, scratch: State) -> None:
    i = s.env[e].deciding
    view = s.shown[e]
    for r in range(s.env[e].num_replicas):
        view[VIEW_WHAT_IF_E2E, r] = 0.0
        view[VIEW_WHAT_IF_ADDED, r] = 0.0
        if not s.allowed[e, r]:
            continue
        delay = _step_left_s(p, s, e, r)
        count = _copy_engine(p, quiet, s, e, r, scratch, -1)
        before = _run_engine(quiet, scratch, count)
        count = _copy_engine(p, quiet, s, e, r, scratch, i)
        after = _run_engine(quiet, scratch, count)
        view[VIEW_WHAT_IF_E2E, r] = delay + scratch.request[0, count - 1].finish_s
        view[VIEW_WHAT_IF_ADDED, r] = delay + after - before


class _Scratch:
    """A one-replica state without prefix cache, large enough for any engine of a simulator."""

    def __init__(self, simulator: Simulator) -> None:
        spec = replace(simulator.spec, prefix_caching=False, retain_kv_s=0.0)
        capacity = Capacity(
            num_envs=1,
            requests=simulator.state.request.shape[1] + 1,
            segments=1,
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
        )


def fill_what_if(simulator: Simulator, env: int) -> None:
    """Fill the planner's rows of one environment's view for the decision that is due."""
    scratch = simulator.scratch
    if not isinstance(scratch, _Scratch) or (
        scratch.state.request.shape[1] <= simulator.state.request.shape[1]
    ):
        scratch = simulator.scratch = _Scratch(simulator)
    _fill(simulator.params, scratch.quiet, simulator.state, env, scratch.state)
