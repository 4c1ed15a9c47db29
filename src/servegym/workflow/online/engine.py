"""What happens on one device: data arrives, prompts are prefilled, stages run and end."""

from __future__ import annotations

import math

import numpy as np

from servegym.cluster.jit import inlined
from servegym.cluster.steptime import decode_span_s, dense_s, mixed_s, prefill_s
from servegym.workflow.online.heap import drop_first, push
from servegym.workflow.online.state import LLM, TASK, Params, State
from servegym.workflow.online.view import prefix_hit_tokens, view


@inlined
def prefill_end_s(s: State, e: int, d: int) -> float:
    """When the prefill in progress ends; inf if there is none."""
    v = s.device[e, d]
    if v.prefilling == 0:
        return math.inf
    return v.since_s + max(0.0, v.prefill_left_s) / v.speed


@inlined
def first_end_s(s: State, e: int, d: int) -> float:
    """When the first of the running stages ends at the present pace; inf if none runs."""
    v = s.device[e, d]
    if v.num_ends == 0:
        return math.inf
    return v.since_s + max(0.0, s.ends[e, d, 0].key - v.clock) * v.step_s / v.speed


@inlined
def first_fetch_s(s: State, e: int, d: int) -> float:
    """When the first of the stages that wait for their data has it; inf if none waits."""
    if s.device[e, d].num_fetches == 0:
        return math.inf
    return s.fetches[e, d, 0].key


@inlined
def settle(s: State, e: int, d: int, now_s: float) -> None:
    """Move the device's clock to the present."""
    v = s.device[e, d]
    passed_s = now_s - v.since_s
    if v.num_running > 0:
        v.busy_s += passed_s
        v.slot_s += passed_s * v.num_running
    if v.num_ends > 0 or v.prefilling > 0:
        done = passed_s * v.speed / v.step_s
        v.clock += done
        v.kv_tokens += v.num_decodes * done
        v.prefill_left_s -= passed_s * v.speed
    v.since_s = now_s


@inlined
def plan(p: Params, s: State, e: int, d: int) -> None:
    """Set the pace until the next event, and when that is; the clock must be settled.

    The decodes of an engine keep one pace until the next of them ends, that of the step in the
    middle of the way. A prefill sets its own.
    """
    v = s.device[e, d]
    if v.num_decodes > 0 and v.prefilling == 0:
        steps = max(0.0, s.ends[e, d, 0].key - v.clock)
        kv_tokens = v.kv_tokens + 0.5 * v.num_decodes * (steps + 1.0)
        t = p.engine_idx[v.type_idx]
        v.step_s = decode_span_s(p.engine, t, v.num_decodes, kv_tokens, 1)
    v.due_s = min(
        min(prefill_end_s(s, e, d), first_end_s(s, e, d)), min(first_fetch_s(s, e, d), v.wake_s)
    )


@inlined
def enter(p: Params, s: State, e: int, d: int, stage: int, now_s: float) -> None:
    """Begin a stage whose data is on the device; the clock must be settled."""
    v = s.device[e, d]
    if s.stage[e, stage].kind == TASK:
        work_s = s.expected_s[e, stage, v.type_idx]
        if s.env[e].oracle == 0:
            work_s *= s.truth[e, stage].noise
        _push_end(s, e, d, stage, v.clock + work_s)
    else:
        s.queue[e, d, (v.queue_first + v.queue_len) % s.queue.shape[2]] = stage
        v.queue_len += 1
        if v.prefilling == 0:
            # after all decisions of this moment, so that their prompts go together
            v.wake_s = np.nextafter(now_s, math.inf)


@inlined
def _push_end(s: State, e: int, d: int, stage: int, key: float) -> None:
    v = s.device[e, d]
    push(s.ends[e, d], v.num_ends, key, v.order, stage)
    v.num_ends += 1
    v.order += 1


@inlined
def form_prefill(p: Params, s: State, e: int, d: int) -> None:
    """Begin the prefill of the first prompts in the queue.

    The prompts are laid end to end and cut into steps of `max_num_batched_tokens` less one for
    each decode. The first prompt sets the number of steps; others follow while they fit. Each step
    also gives every decode a token. All of them end with the last step.
    """
    v = s.device[e, d]
    t = p.engine_idx[v.type_idx]
    size = s.queue.shape[2]
    batch = v.num_decodes
    room = p.engine.max_num_batched_tokens[t] - batch
    total, count, num_steps = 0, 0, 1
    cost_s = 0.0
    while count < v.queue_len:
        stage = s.queue[e, d, (v.queue_first + count) % size]
        done = s.stage[e, stage].hit
        left = s.stage[e, stage].prompt - done
        if count == 0:
            num_steps = (left + room - 1) // room
        elif total + left > num_steps * room:
            break
        while left > 0:
            chunk = min(left, room - total % room)
            cost_s += prefill_s(p.engine, t, chunk, done)
            total += chunk
            done += chunk
            left -= chunk
        count += 1
    last = total - (num_steps - 1) * room
    cost_s += (num_steps - 1) * dense_s(p.engine, t, room + batch)
    cost_s += dense_s(p.engine, t, last + batch)
    if batch > 0:
        kv_tokens = v.kv_tokens + 0.5 * batch * (num_steps + 1.0)
        cost_s += num_steps * mixed_s(p.engine, t, batch, kv_tokens)
    cost_s = max(cost_s, num_steps * p.engine.eager_s[t])
    v.prefilling = count
    v.prefill_left_s = cost_s
    v.prefill_clock = v.clock + num_steps
    v.step_s = cost_s / num_steps


@inlined
def end_prefill(s: State, e: int, d: int, now_s: float) -> int:
    """Take one stage out of a prefill that has ended; it begins to decode.

    Returns:
        The stage if its only token is out with that, else -1.
    """
    v = s.device[e, d]
    stage = s.queue[e, d, v.queue_first]
    v.queue_first = (v.queue_first + 1) % s.queue.shape[2]
    v.queue_len -= 1
    v.prefilling -= 1
    prompt = s.stage[e, stage].prompt
    v.waiting_tokens -= prompt - s.stage[e, stage].hit
    more = s.truth[e, stage].output - 1
    if more == 0:
        return stage
    v.num_decodes += 1
    v.kv_tokens += prompt
    _push_end(s, e, d, stage, v.clock + more)
    return -1


@inlined
def take_end(s: State, e: int, d: int) -> int:
    """Take the first running stage, whose end has come, off the device's clock."""
    v = s.device[e, d]
    stage = s.ends[e, d, 0].stage
    v.clock = s.ends[e, d, 0].key
    drop_first(s.ends[e, d], v.num_ends)
    v.num_ends -= 1
    if s.stage[e, stage].kind == LLM:
        v.num_decodes -= 1
        v.kv_tokens -= s.stage[e, stage].prompt + s.truth[e, stage].output - 1
        if v.num_decodes == 0:
            v.kv_tokens = 0.0  # without what rounding left
    return stage


@inlined
def give_slot(p: Params, s: State, e: int, d: int, stage: int) -> None:
    """Let a stage hold a slot, and reserve its KV tokens; the clock must be settled."""
    v, q = s.device[e, d], s.stage[e, stage]
    s.running[e, d, v.num_running] = stage
    s.running_due_s[e, d, v.num_running] = q.due_s
    v.num_running += 1
    if q.kind == LLM:
        q.hit = prefix_hit_tokens(view(p, s, e), stage, d)
        v.kv_reserved += s.stage[e, stage].kv
        v.evicted = max(v.evicted, v.released - (v.kv_capacity - v.kv_reserved))
        v.waiting_tokens += q.prompt - q.hit


@inlined
def free_slot(s: State, e: int, d: int, stage: int) -> None:
    """Take its slot from a stage that has ended; its KV tokens become the newest in the cache."""
    v = s.device[e, d]
    running = s.running[e, d]
    i = 0
    while running[i] != stage:
        i += 1
    due_s = s.running_due_s[e, d]
    for k in range(i, v.num_running - 1):
        running[k] = running[k + 1]
        due_s[k] = due_s[k + 1]
    v.num_running -= 1
    if s.stage[e, stage].kind == LLM:
        kv = s.stage[e, stage].kv
        v.kv_reserved -= kv
        s.stage[e, stage].cached_at = v.released
        v.released += kv


@inlined
def clear_device(s: State, e: int, d: int) -> None:
    """Forget all stages and the cache."""
    v = s.device[e, d]
    v.num_running = 0
    v.kv_reserved = 0
    v.waiting_tokens = 0
    v.last_job = -1
    v.last_template = -1
    v.step_s = 1.0
    v.num_decodes = 0
    v.kv_tokens = 0.0
    v.prefilling = 0
    v.prefill_left_s = 0.0
    v.wake_s = math.inf
    v.queue_first = 0
    v.queue_len = 0
    v.num_ends = 0
    v.num_fetches = 0
    v.evicted = v.released
    v.due_s = math.inf
