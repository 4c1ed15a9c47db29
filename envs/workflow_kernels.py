"""Stepping a batch of workflow environments in one compiled call."""

from __future__ import annotations

import math
from typing import NamedTuple

from servegym.cluster.jit import inlined, kernel
from servegym.policy.contract import NO_BOUND
from servegym.typing import BoolArray, Float32Array, FloatArray, Int8Array, Int32Array, IntArray
from servegym.workflow.online.kernels import advance, apply, settle_area
from servegym.workflow.online.state import (
    BLOCKED,
    DECISION,
    ENDED,
    LLM,
    NOWHERE,
    READY,
    STARTED,
    TOOL,
    WAIT,
    Params,
    State,
)
from servegym.workflow.online.view import (
    View,
    can_run,
    can_start,
    data_there_s,
    duration_s,
    free_s,
    is_visible,
    move_s,
    prefix_hit_tokens,
    view,
)

#: Objectives, and orders in which ready stages are shortlisted.
JCT, MAKESPAN, DEADLINE = range(3)
BY_WORK_LEFT, BY_ARRIVAL, BY_RANK, BY_SLACK = range(4)


class KernelSettings(NamedTuple):
    """What does not change during a run."""

    objective: int
    shortlist: int
    eft: bool  # the environment places
    graph: bool
    scale: float


class Output(NamedTuple):
    """What a step writes; axes: E environments, K stages shown, D devices, and as noted."""

    stages: Float32Array  # [E, K, STAGE_COLUMNS]
    pairs: Float32Array  # [E, K, D, PAIR_COLUMNS]
    devices: Float32Array  # [E, D, DEVICE_COLUMNS]
    overall: Float32Array  # [E, GLOBAL_COLUMNS]
    mask: Int8Array  # [E, num_actions]
    nodes: Float32Array  # [E, V, NODE_COLUMNS]
    edges: Int32Array  # [E, M, 2] parent and child, as places in nodes
    node_mask: Int8Array  # [E, V]
    edge_mask: Int8Array  # [E, M]
    stage_nodes: IntArray  # [E, K] place of each stage shown, -1: not among the nodes
    shown: IntArray  # [E, K] its number in the simulator, -1: empty row
    keys: FloatArray  # [E, K] what it was shortlisted by
    placed: IntArray  # [E, K] where the environment would place it
    node_of: IntArray  # [E, N] working memory: place of each stage
    paid: FloatArray  # [E] reward times scale so far
    reward: FloatArray  # [E]
    done: BoolArray  # [E]
    dt_s: FloatArray  # [E] simulated seconds since the last decision


@inlined
def _clip(x: float) -> float:
    return min(max(x, -NO_BOUND), NO_BOUND)


@inlined
def core_action(s: State, c: KernelSettings, o: Output, e: int, action: int) -> int:
    """Translate an index of the action space; the index must be allowed."""
    if action == o.mask.shape[1] - 1:
        return WAIT
    if c.eft:
        stage, d = o.shown[e, action], o.placed[e, action]
    else:
        width = o.pairs.shape[2]
        stage, d = o.shown[e, action // width], action % width
    return stage * s.env[e].num_devices + d


@kernel
def begin(p: Params, s: State, c: KernelSettings, o: Output, e: int) -> bool:
    """Run a new episode to its first decision and observe it; return False if it has none."""
    reason = advance(p, s, e)
    o.paid[e] = 0.0
    if c.objective == MAKESPAN:
        o.paid[e] = _earned(p, s, c, e)
    o.reward[e] = 0.0
    o.dt_s[e] = 0.0
    o.done[e] = reason != DECISION
    if reason == DECISION:
        _observe(p, s, c, o, e)
    return reason == DECISION


@kernel
def step_range(
    p: Params,
    s: State,
    c: KernelSettings,
    o: Output,
    first: int,
    stop: int,
    actions: IntArray,
    active: BoolArray,
) -> None:
    """Apply, advance, reward and observe environments `first..stop-1` that are active."""
    for e in range(first, stop):
        if not active[e]:
            continue
        before_s = s.env[e].now_s
        apply(p, s, e, core_action(s, c, o, e, actions[e]))
        reason = advance(p, s, e)
        o.dt_s[e] = s.env[e].now_s - before_s
        earned = _earned(p, s, c, e)
        o.reward[e] = (earned - o.paid[e]) / c.scale
        o.paid[e] = earned
        o.done[e] = reason != DECISION
        if reason == DECISION:
            _observe(p, s, c, o, e)
        else:
            _clear(c, o, e)


@inlined
def _earned(p: Params, s: State, c: KernelSettings, e: int) -> float:
    """Return that the rewards so far sum up to, but for the first lower bound."""
    env = s.env[e]
    if c.objective == JCT:
        settle_area(s, e)
        return -env.weighted_area
    if c.objective == DEADLINE:
        return env.good
    return -least_makespan_s(view(p, s, e), s, e)


@inlined
def least_makespan_s(w: View, s: State, e: int) -> float:
    """When the jobs that have arrived can end at best, on expected durations, seconds."""
    now_s = w.env[0].now_s
    latest_s = w.env[0].makespan_s
    for i in range(w.env[0].num_ready):
        latest_s = max(latest_s, now_s + w.stage[w.ready[i]].tail_s)
    for d in range(w.env[0].num_devices):
        for i in range(w.device[d].num_running):
            q = w.stage[w.running[d, i]]
            latest_s = max(latest_s, max(now_s, q.due_s) + q.tail_s - q.least_s)
    for i in range(w.env[0].num_tools):
        q = w.stage[s.tools[e, i].stage]
        latest_s = max(latest_s, max(now_s, q.due_s) + q.tail_s - q.least_s)
    return latest_s


@inlined
def _key(w: View, c: KernelSettings, v: int) -> float:
    job = w.job[w.stage[v].job]
    if c.shortlist == BY_ARRIVAL:
        return w.stage[v].job
    if c.shortlist == BY_RANK:
        return -w.stage[v].rank_s
    if c.shortlist == BY_SLACK:
        return job.arrival_s + job.deadline_s - w.stage[v].rank_s
    return job.work_left_s


@inlined
def _first_to_end(w: View, v: int) -> int:
    """Device on which a stage, started now, is expected to end first; -1 if it cannot start."""
    best, best_s = -1, math.inf
    for d in range(w.env[0].num_devices):
        if can_start(w, v, d):
            begin_s = max(w.env[0].now_s + move_s(w, v, d), data_there_s(w, v, d))
            finish_s = begin_s + duration_s(w, v, d)
            if best < 0 or finish_s < best_s:
                best, best_s = d, finish_s
    return best


@inlined
def _can_start_somewhere(w: View, v: int) -> bool:
    for d in range(w.env[0].num_devices):  # noqa: SIM110 - kernels know no generators
        if can_start(w, v, d):
            return True
    return False


@inlined
def _shortlist(w: View, c: KernelSettings, o: Output, e: int) -> int:
    """Write the stages with the least keys that can start; higher rank first of equals."""
    most, count = o.shown.shape[1], 0
    for i in range(w.env[0].num_ready):
        v = w.ready[i]
        key = _key(w, c, v)
        if count == most and key >= o.keys[e, most - 1]:
            continue
        if not _can_start_somewhere(w, v):
            continue
        k = min(count, most - 1)
        while k > 0 and o.keys[e, k - 1] > key:
            o.keys[e, k] = o.keys[e, k - 1]
            o.shown[e, k] = o.shown[e, k - 1]
            k -= 1
        o.keys[e, k] = key
        o.shown[e, k] = v
        count = min(count + 1, most)
    return count


@kernel
def _observe(p: Params, s: State, c: KernelSettings, o: Output, e: int) -> None:
    w = view(p, s, e)
    env = s.env[e]
    _clear(c, o, e)
    o.mask[e, 0] = 0
    count = _shortlist(w, c, o, e)
    for k in range(count):
        _write_stage(w, o, e, k)
        if c.eft:
            o.placed[e, k] = _first_to_end(w, o.shown[e, k])
            o.mask[e, k] = 1
    if not c.eft:
        width = o.pairs.shape[2]
        for k in range(count):
            for d in range(env.num_devices):
                o.mask[e, k * width + d] = o.pairs[e, k, d, 0] > 0.0
    o.mask[e, o.mask.shape[1] - 1] = env.num_started > 0
    for d in range(env.num_devices):
        v = w.device[d]
        row = o.devices[e, d]
        row[0] = 1.0
        row[1] = v.up
        row[2] = p.engine_idx[v.type_idx] >= 0
        row[3] = v.speed
        row[4] = v.slots
        row[5] = v.num_running
        row[6] = v.kv_reserved / max(1, v.kv_capacity)
        row[7] = v.waiting_tokens
        row[8] = free_s(w, d) - env.now_s
    o.overall[e, 0] = env.in_system
    o.overall[e, 1] = env.num_ready
    o.overall[e, 2] = env.num_started
    o.overall[e, 3] = env.now_s - s.job[e, max(0, env.next_job - 1)].arrival_s
    if c.graph:
        _write_graph(w, o, e)
        for k in range(count):
            o.stage_nodes[e, k] = o.node_of[e, o.shown[e, k]]


@inlined
def _write_stage(w: View, o: Output, e: int, k: int) -> None:
    v = o.shown[e, k]
    q, job = w.stage[v], w.job[w.stage[v].job]
    now_s = w.env[0].now_s
    row = o.stages[e, k]
    row[0] = 1.0
    row[1] = q.kind == LLM
    row[2] = q.mean_s
    row[3] = q.rank_s
    row[4] = q.tail_s
    row[5] = q.work_s
    row[6] = q.prompt
    row[7] = q.expected_output
    row[8] = now_s - q.ready_s
    row[9] = q.num_children
    row[10] = q.num_restarts
    row[11] = now_s - job.arrival_s
    row[12] = max(0.0, job.work_left_s)
    row[13] = job.num_ready
    row[14] = job.num_running
    row[15] = job.weight
    row[16] = _clip(job.arrival_s + job.deadline_s - now_s - q.rank_s)
    num_devices = w.env[0].num_devices
    pairs = o.pairs[e, k]
    for d in range(num_devices):
        if can_run(w, v, d):
            pairs[d, 0] = can_start(w, v, d)
            pairs[d, 1] = duration_s(w, v, d)
            pairs[d, 2] = move_s(w, v, d)
            if q.kind == LLM:
                pairs[d, 3] = prefix_hit_tokens(w, v, d)
    # `data_there_s` for all devices at once: a third of the time of a step otherwise
    for n in range(q.pred_first, q.pred_stop):
        i = w.pred[n]
        size = w.edge[i].data_bytes
        u = w.edge[i].parent
        at = w.stage[u].device
        if size <= 0.0 or at == NOWHERE:
            continue
        left_s = w.stage[u].finish_s - now_s
        for d in range(num_devices):
            if d != at and pairs[d, 1] > 0.0:
                there_s = left_s + w.latency_s[at, d] + size * w.s_per_byte[at, d]
                if there_s > pairs[d, 2]:
                    pairs[d, 2] = there_s


@inlined
def _write_graph(w: View, o: Output, e: int) -> None:
    """Write the known stages that have not ended, by job in order of arrival, and their edges.

    Jobs in the system are found from the stages that are ready or run, and from those before them:
    a job that has not ended has at least one such stage.
    """
    now_s = w.env[0].now_s
    count, most = 0, o.nodes.shape[1]
    edges, most_edges = 0, o.edges.shape[1]
    for j in range(w.env[0].next_job):
        job = w.job[j]
        if job.finish_s == job.finish_s:
            continue  # it has ended
        for v in range(job.first_stage, job.first_stage + job.num_stages):
            q = w.stage[v]
            o.node_of[e, v] = -1
            if q.status == ENDED or not is_visible(w, v) or count == most:
                continue
            o.node_of[e, v] = count
            o.node_mask[e, count] = 1
            row = o.nodes[e, count]
            row[0] = q.status == BLOCKED
            row[1] = q.status == READY
            row[2] = q.status == STARTED
            row[3] = q.kind == LLM
            row[4] = q.kind == TOOL
            row[5] = q.mean_s
            row[6] = q.work_s
            row[7] = q.rank_s
            row[8] = max(0.0, q.due_s - now_s) if q.status == STARTED else 0.0
            row[9] = now_s - job.arrival_s
            row[10] = max(0.0, job.work_left_s)
            count += 1
            for k in range(q.pred_first, q.pred_stop):
                u = w.edge[w.pred[k]].parent
                if edges < most_edges and o.node_of[e, u] >= 0:
                    o.edges[e, edges, 0] = o.node_of[e, u]
                    o.edges[e, edges, 1] = o.node_of[e, v]
                    o.edge_mask[e, edges] = 1
                    edges += 1


@inlined
def _clear(c: KernelSettings, o: Output, e: int) -> None:
    o.stages[e] = 0.0
    o.pairs[e] = 0.0
    o.devices[e] = 0.0
    o.overall[e] = 0.0
    o.mask[e] = 0
    o.mask[e, 0] = 1  # a mask without any action breaks samplers
    o.shown[e] = -1
    if c.graph:
        o.nodes[e] = 0.0
        o.edges[e] = 0
        o.node_mask[e] = 0
        o.edge_mask[e] = 0
        o.stage_nodes[e] = -1
