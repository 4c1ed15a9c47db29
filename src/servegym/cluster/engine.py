"""One engine: forming steps, ending them, preempting. Compiled form of docs/simulator.md."""

from __future__ import annotations

import math

from numba import njit

from servegym.cluster.blocks import (
    count_hits,
    hold_matched,
    match,
    release,
    reset_blocks,
    take_for_chunk,
    take_for_decodes,
)
from servegym.cluster.heap import push_end, remove_end, set_event
from servegym.cluster.log import count_itl, log_event, log_steps
from servegym.cluster.state import (
    DECODE,
    DOWN,
    EV_ADMIT,
    EV_FINISH,
    EV_FIRST_TOKEN,
    EV_PREEMPT,
    EV_RETURN,
    FINISHED,
    IDLE,
    QUEUED,
    RETURNED,
    RUNNING,
    STEP,
    Params,
    State,
)
from servegym.cluster.steptime import (
    decode_s,
    decode_span_s,
    decode_steps_past,
    dense_s,
    prefill_s,
    step_factor,
)


@njit(cache=True, nogil=True)
def form_step(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """Begin the next step, or a stretch of decode steps up to where something changes."""
    t = s.replica[e, r].type_idx
    while True:
        preempted = _feed_decodes(p, s, e, r, now_s)
        batch = s.replica[e, r].num_decodes
        budget = p.max_num_batched_tokens[t] - batch
        attention_s = 0.0
        request = s.replica[e, r].first_prefill
        if request >= 0:
            computed = s.request[e, request].computed
            take = min(s.request[e, request].prompt + s.request[e, request].generated - computed, budget)
            blocks = (computed + take + p.block_size - 1) // p.block_size
            if blocks - s.request[e, request].table_len > s.replica[e, r].free_blocks:
                # it is the last of the running list, so it is its own victim
                _preempt(p, s, e, r, request, now_s)
                preempted = True
            else:
                take_for_chunk(p, s, e, r, request, computed, take)
                s.request[e, request].chunk = take
                budget -= take
                attention_s += prefill_s(p, t, take, computed)
        if not preempted and s.replica[e, r].num_waiting > 0:
            budget, attention_s = _admit(p, s, e, r, now_s, budget, attention_s)
        tokens = p.max_num_batched_tokens[t] - budget
        if tokens > 0:
            break
        if not (preempted and s.replica[e, r].num_waiting > 0):
            s.replica[e, r].mode = IDLE
            set_event(s, e, r, math.inf)
            return
    factor = step_factor(p, s, e, r)
    s.replica[e, r].seg_begin_s = now_s
    s.replica[e, r].seg_factor = factor
    if s.replica[e, r].first_prefill >= 0:
        s.replica[e, r].mode = STEP
        s.replica[e, r].seg_steps = 1
        if batch > 0:
            attention_s += decode_s(p, t, batch, s.replica[e, r].kv_tokens + batch)
        duration = (dense_s(p, t, tokens) + attention_s) * factor
        set_event(s, e, r, now_s + duration)
        return
    s.replica[e, r].mode = DECODE
    steps = (s.ends[e, r, 0].key >> 32) - s.replica[e, r].iteration
    if p.noise_sigma > 0.0:
        steps = min(steps, p.noise_period_steps - s.replica[e, r].iteration % p.noise_period_steps)
    if preempted and s.replica[e, r].num_waiting > 0:
        steps = 1  # admission was barred in this step alone
    steps = _steps_with_blocks(p, s, e, r, steps)
    s.replica[e, r].seg_steps = steps
    span = decode_span_s(p, t, batch, s.replica[e, r].kv_tokens + batch, steps)
    set_event(s, e, r, now_s + factor * span)


@njit(cache=True, nogil=True)
def _feed_decodes(p: Params, s: State, e: int, r: int, now_s: float) -> bool:
    """Give every decoding request its block for this step; return whether one was preempted."""
    residue = s.replica[e, r].iteration % p.block_size
    need = s.phase[e, r, residue]
    if need <= s.replica[e, r].free_blocks:
        if need > 0:
            take_for_decodes(p, s, e, r, need)
        return False
    request = s.replica[e, r].run_head
    while request >= 0:
        following = s.request[e, request].next_request
        start = s.request[e, request].join_iter
        if start >= 0 and _residue(p, s.request[e, request].computed, start) == residue:
            while s.replica[e, r].free_blocks == 0:
                victim = s.replica[e, r].run_tail
                _preempt(p, s, e, r, victim, now_s)
                if victim == request:
                    return True
                if victim == following:
                    following = -1
            take_for_decodes(p, s, e, r, 1)
        request = following
    return True


@njit(cache=True, nogil=True, inline="always")
def _residue(p: Params, computed: int, join_iter: int) -> int:
    """Step count, modulo the block size, at which a request decoding since then needs a block."""
    return (join_iter - computed) % p.block_size


@njit(cache=True, nogil=True)
def _steps_with_blocks(p: Params, s: State, e: int, r: int, steps: int) -> int:
    """Cut a stretch of decode steps where blocks run out; its first step has its blocks."""
    free = s.replica[e, r].free_blocks
    batch = s.replica[e, r].num_decodes
    size = p.block_size
    if free >= batch * ((steps - 2) // size + 1):
        return steps
    cycles = free // batch
    left = free - cycles * batch
    done = 1 + cycles * size
    i = s.replica[e, r].iteration + done
    while done < steps:
        left -= s.phase[e, r, i % size]
        if left < 0:
            break
        done += 1
        i += 1
    return min(done, steps)


@njit(cache=True, nogil=True)
def blocks_for_steps(p: Params, s: State, e: int, r: int, first: int, count: int) -> int:
    """Blocks that the decoding requests take in `count` steps from step count `first` on."""
    size = p.block_size
    cycles = count // size
    blocks = cycles * s.replica[e, r].num_decodes
    for i in range(first, first + count - cycles * size):
        blocks += s.phase[e, r, i % size]
    return blocks


@njit(cache=True, nogil=True)
def _admit(
    p: Params, s: State, e: int, r: int, now_s: float, budget: int, attention_s: float
) -> tuple[int, float]:
    """Move waiting requests to the running list while sequence slots, budget and blocks last."""
    t = s.replica[e, r].type_idx
    size = p.block_size
    while budget > 0 and s.replica[e, r].num_waiting > 0 and s.replica[e, r].num_running < p.max_num_seqs[t]:
        request = s.replica[e, r].wait_head
        total = s.request[e, request].prompt + s.request[e, request].generated
        hits, unheld = 0, 0
        computed = min(s.request[e, request].preset_hit, total - 1)
        if p.prefix_caching:
            hits, unheld = match(p, s, e, r, request, (total - 1) // size)
            computed = hits * size
        take = min(total - computed, budget)
        if not p.chunked_prefill and take < total - computed:
            break
        need = (computed + take + size - 1) // size - hits
        if need + unheld > s.replica[e, r].free_blocks:
            break
        s.replica[e, r].wait_head = s.request[e, request].next_request
        if s.replica[e, r].wait_head < 0:
            s.replica[e, r].wait_tail = -1
        s.replica[e, r].num_waiting -= 1
        hold_matched(p, s, e, r, request, hits)
        tail = s.replica[e, r].run_tail
        s.request[e, request].next_request = -1
        s.request[e, request].prev_request = tail
        if tail >= 0:
            s.request[e, tail].next_request = request
        else:
            s.replica[e, r].run_head = request
        s.replica[e, r].run_tail = request
        s.replica[e, r].num_running += 1
        if s.replica[e, r].first_prefill < 0:
            s.replica[e, r].first_prefill = request
        s.request[e, request].status = RUNNING
        s.request[e, request].computed = computed
        s.request[e, request].join_iter = -1
        if s.request[e, request].cached < 0:
            s.request[e, request].cached = computed
            s.request[e, request].scheduled_s = now_s
            log_event(p, s, e, now_s, EV_ADMIT, request, r, computed)
        take_for_chunk(p, s, e, r, request, computed, take)
        s.request[e, request].chunk = take
        budget -= take
        attention_s += prefill_s(p, t, take, computed)
    return budget, attention_s


@njit(cache=True, nogil=True)
def _leave_running(p: Params, s: State, e: int, r: int, request: int) -> None:
    """Take a request off the running list, with its blocks; its token counts become current."""
    joined = -1
    if s.request[e, request].join_iter >= 0:
        joined = s.request[e, request].computed
        steps = s.replica[e, r].iteration - s.request[e, request].join_iter
        s.phase[e, r, _residue(p, joined, s.request[e, request].join_iter)] -= 1
        s.request[e, request].computed = joined + steps
        s.request[e, request].generated += steps
        s.request[e, request].join_iter = -1
        s.replica[e, r].num_decodes -= 1
        s.replica[e, r].kv_tokens -= joined + steps
        if s.request[e, request].heap_pos >= 0:
            remove_end(s, e, r, request)
    elif s.replica[e, r].first_prefill == request:
        s.replica[e, r].first_prefill = s.request[e, request].next_request
    release(p, s, e, r, request, s.request[e, request].computed, joined)
    before, after = s.request[e, request].prev_request, s.request[e, request].next_request
    if before >= 0:
        s.request[e, before].next_request = after
    else:
        s.replica[e, r].run_head = after
    if after >= 0:
        s.request[e, after].prev_request = before
    else:
        s.replica[e, r].run_tail = before
    s.replica[e, r].num_running -= 1
    s.request[e, request].chunk = 0
    s.request[e, request].next_request = -1
    s.request[e, request].prev_request = -1


@njit(cache=True, nogil=True)
def _preempt(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> None:
    """Preempt by recompute: release everything, wait at the front of the queue."""
    if s.request[e, request].join_iter >= 0:
        s.request[e, request].last_token_s = now_s
    _leave_running(p, s, e, r, request)
    s.request[e, request].computed = 0
    s.request[e, request].preset_hit = 0
    s.request[e, request].num_preemptions += 1
    s.request[e, request].status = QUEUED
    s.request[e, request].next_request = s.replica[e, r].wait_head
    s.replica[e, r].wait_head = request
    if s.replica[e, r].wait_tail < 0:
        s.replica[e, r].wait_tail = request
    s.replica[e, r].num_waiting += 1
    log_event(p, s, e, now_s, EV_PREEMPT, request, r, 0.0)


@njit(cache=True, nogil=True)
def settle_decodes(p: Params, s: State, e: int, r: int, steps: int) -> None:
    """Book `steps` ended steps of the decode stretch in progress."""
    if steps == 0:
        return
    if steps > 1:
        blocks = blocks_for_steps(p, s, e, r, s.replica[e, r].iteration + 1, steps - 1)
        take_for_decodes(p, s, e, r, blocks)
    s.replica[e, r].iteration += steps
    tokens = s.replica[e, r].num_decodes * steps
    s.replica[e, r].kv_tokens += tokens
    s.replica[e, r].emitted += tokens
    s.env[e].engine_steps += steps


@njit(cache=True, nogil=True)
def end_step(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """End the step or decode stretch in progress: tokens come out, requests end."""
    if s.replica[e, r].mode == DECODE:
        log_steps(p, s, e, r, now_s, s.replica[e, r].seg_steps, 0)
        settle_decodes(p, s, e, r, s.replica[e, r].seg_steps)
        _end_decodes(p, s, e, r, now_s)
        return
    request = s.replica[e, r].first_prefill
    if p.record:
        prefill = 0
        walk = request
        while walk >= 0:
            prefill += s.request[e, walk].chunk
            walk = s.request[e, walk].next_request
        log_steps(p, s, e, r, now_s, 1, prefill)
    settle_decodes(p, s, e, r, 1)
    _end_decodes(p, s, e, r, now_s)
    while request >= 0:
        following = s.request[e, request].next_request
        s.request[e, request].computed += s.request[e, request].chunk
        s.request[e, request].chunk = 0
        if s.request[e, request].computed == s.request[e, request].prompt + s.request[e, request].generated:
            s.replica[e, r].first_prefill = following
            _emit_after_prefill(p, s, e, r, request, now_s)
        request = following


@njit(cache=True, nogil=True)
def _end_decodes(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    while s.replica[e, r].num_ends > 0 and (s.ends[e, r, 0].key >> 32) == s.replica[e, r].iteration:
        _finish(p, s, e, r, s.ends[e, r, 0].request, now_s)


@njit(cache=True, nogil=True)
def _emit_after_prefill(
    p: Params, s: State, e: int, r: int, request: int, now_s: float
) -> None:
    """A prompt is computed: one token comes out, then the request ends or decodes."""
    s.request[e, request].generated += 1
    s.replica[e, r].emitted += 1
    if math.isnan(s.request[e, request].first_token_s):
        s.request[e, request].first_token_s = now_s
        log_event(p, s, e, now_s, EV_FIRST_TOKEN, request, r, 0.0)
        s.replica[e, r].pending_prefill -= s.request[e, request].prompt - s.request[e, request].hit_hint
        ttft = now_s - s.request[e, request].arrival_s
        old = s.replica[e, r].recent_ttft_s
        s.replica[e, r].recent_ttft_s = ttft if old == 0.0 else old + 0.1 * (ttft - old)
    else:
        count_itl(p, s, e, now_s - s.request[e, request].last_token_s, 1)
    s.request[e, request].last_token_s = now_s
    left = s.request[e, request].output - s.request[e, request].generated
    if left == 0:
        _finish(p, s, e, r, request, now_s)
        return
    computed = s.request[e, request].computed
    start = s.replica[e, r].iteration
    s.request[e, request].join_iter = start
    s.replica[e, r].num_decodes += 1
    s.replica[e, r].kv_tokens += computed
    s.phase[e, r, _residue(p, computed, start)] += 1
    s.replica[e, r].num_joined += 1
    push_end(s, e, r, request, ((start + left) << 32) | s.replica[e, r].num_joined)


@njit(cache=True, nogil=True)
def _finish(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> None:
    """A request has all its tokens."""
    _leave_running(p, s, e, r, request)
    s.request[e, request].status = FINISHED
    s.request[e, request].finish_s = now_s
    s.replica[e, r].emitted -= s.request[e, request].generated
    log_event(p, s, e, now_s, EV_FINISH, request, r, 0.0)
    leave_system(s, e, now_s)
    forget_outstanding(s, e, r, request)
    output = s.request[e, request].output
    tpot = 0.0
    if output > 1:
        tpot = (now_s - s.request[e, request].first_token_s) / (output - 1)
        old = s.replica[e, r].recent_tpot_s
        s.replica[e, r].recent_tpot_s = tpot if old == 0.0 else old + 0.1 * (tpot - old)
    c = s.request[e, request].slo_class
    ttft = s.request[e, request].first_token_s - s.request[e, request].arrival_s
    if ttft <= p.slo_s[c, 0] and tpot <= p.slo_s[c, 1]:
        s.env[e].good += p.slo_weight[c]


@njit(cache=True, nogil=True)
def forget_outstanding(s: State, e: int, r: int, request: int) -> None:
    """Take a request out of the router's counters of a replica."""
    s.replica[e, r].outstanding -= 1
    s.replica[e, r].outstanding_prompt -= s.request[e, request].prompt
    s.replica[e, r].outstanding_predicted -= s.request[e, request].predicted
    if s.replica[e, r].outstanding == 0:
        s.replica[e, r].outstanding_predicted = 0.0  # no rounding left behind


@njit(cache=True, nogil=True)
def leave_system(s: State, e: int, now_s: float) -> None:
    """Count one request less in the system from now on."""
    s.env[e].area += s.env[e].in_system * (now_s - s.env[e].area_until_s)
    s.env[e].area_until_s = now_s
    s.env[e].in_system -= 1
    s.env[e].num_ended += 1


@njit(cache=True, nogil=True)
def steps_ended_by(p: Params, s: State, e: int, r: int, time_s: float) -> int:
    """How many steps of the decode stretch in progress have ended by `time_s`."""
    batch = s.replica[e, r].num_decodes
    target = (time_s - s.replica[e, r].seg_begin_s) / s.replica[e, r].seg_factor
    kv = s.replica[e, r].kv_tokens + batch
    return decode_steps_past(p, s.replica[e, r].type_idx, batch, kv, target, s.replica[e, r].seg_steps) - 1


@njit(cache=True, nogil=True)
def cut_stretch(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """Let the decode stretch in progress stop at the end of the step that is running now."""
    if s.replica[e, r].mode != DECODE or s.replica[e, r].seg_steps == 1:
        return
    steps = steps_ended_by(p, s, e, r, now_s) + 1
    if steps < s.replica[e, r].seg_steps:
        s.replica[e, r].seg_steps = steps
        batch = s.replica[e, r].num_decodes
        kv = s.replica[e, r].kv_tokens + batch
        span = decode_span_s(p, s.replica[e, r].type_idx, batch, kv, steps)
        set_event(s, e, r, s.replica[e, r].seg_begin_s + s.replica[e, r].seg_factor * span)


@njit(cache=True, nogil=True)
def stop_replica(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """Fail-stop: ended steps count, the running one is lost, all requests go back."""
    if s.replica[e, r].mode == DECODE:
        steps = steps_ended_by(p, s, e, r, now_s)
        span = 0.0
        if steps > 0:
            batch = s.replica[e, r].num_decodes
            kv = s.replica[e, r].kv_tokens + batch
            span = decode_span_s(p, s.replica[e, r].type_idx, batch, kv, steps)
        last_s = s.replica[e, r].seg_begin_s + s.replica[e, r].seg_factor * span
        log_steps(p, s, e, r, last_s, steps, 0)
        settle_decodes(p, s, e, r, steps)
        s.replica[e, r].iteration += 1
    elif s.replica[e, r].mode == STEP:
        last_s = s.replica[e, r].seg_begin_s
        s.replica[e, r].iteration += 1
    else:
        last_s = now_s
    aborted = 1 if s.replica[e, r].mode == DECODE or s.replica[e, r].mode == STEP else 0
    request = s.replica[e, r].run_head
    while request >= 0:
        following = s.request[e, request].next_request
        start = s.request[e, request].join_iter
        if start >= 0:
            s.request[e, request].last_token_s = last_s
            steps = s.replica[e, r].iteration - aborted - start
            s.request[e, request].generated += steps
        _return(p, s, e, r, request, now_s)
        request = following
    request = s.replica[e, r].wait_head
    while request >= 0:
        following = s.request[e, request].next_request
        _return(p, s, e, r, request, now_s)
        request = following
    clear_replica(p, s, e, r)
    s.replica[e, r].mode = DOWN
    set_event(s, e, r, math.inf)


@njit(cache=True, nogil=True)
def _return(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> None:
    """Hand a request back to the router for a new decision."""
    forget_outstanding(s, e, r, request)
    if math.isnan(s.request[e, request].first_token_s):
        s.replica[e, r].pending_prefill -= s.request[e, request].prompt - s.request[e, request].hit_hint
    s.request[e, request].status = RETURNED
    s.request[e, request].computed = 0
    s.request[e, request].chunk = 0
    s.request[e, request].join_iter = -1
    s.request[e, request].heap_pos = -1
    s.request[e, request].table_len = 0
    s.request[e, request].preset_hit = 0
    s.request[e, request].next_request = -1
    s.request[e, request].prev_request = -1
    s.request[e, request].num_restarts += 1
    size = s.returned.shape[1]
    s.returned[e, (s.env[e].return_first + s.env[e].return_count) % size] = request
    s.env[e].return_count += 1
    log_event(p, s, e, now_s, EV_RETURN, request, r, 0.0)


@njit(cache=True, nogil=True)
def clear_replica(p: Params, s: State, e: int, r: int) -> None:
    """Empty the queues, lists and cache of a replica."""
    s.replica[e, r].wait_head = -1
    s.replica[e, r].wait_tail = -1
    s.replica[e, r].num_waiting = 0
    s.replica[e, r].run_head = -1
    s.replica[e, r].run_tail = -1
    s.replica[e, r].num_running = 0
    s.replica[e, r].first_prefill = -1
    s.replica[e, r].num_decodes = 0
    s.replica[e, r].kv_tokens = 0
    s.replica[e, r].emitted = 0
    s.replica[e, r].num_ends = 0
    s.phase[e, r, :] = 0
    reset_blocks(p, s, e, r)


@njit(cache=True, nogil=True)
def prefix_hit_tokens(p: Params, s: State, e: int, r: int, request: int) -> int:
    """Leading prompt tokens of a request in a replica's cache; its last token never counts."""
    if not p.prefix_caching:
        return 0
    size = p.block_size
    return size * count_hits(p, s, e, r, request, (s.request[e, request].prompt - 1) // size)
