"""One engine: forming steps and ending them. Compiled form of docs/simulator.md."""

from __future__ import annotations

import math

from numba import types

from servegym.cluster.blocks import (
    reset_blocks,
    take_for_chunk,
    take_for_decodes,
)
from servegym.cluster.emission import emit, finish
from servegym.cluster.entry import END_STEP, FORM_STEP, entry
from servegym.cluster.heap import push_end, set_event
from servegym.cluster.jit import helper, inlined
from servegym.cluster.lingering import let_all_ended_go, let_go
from servegym.cluster.loads import admit_beside_loads, clear_loads, stop_loads
from servegym.cluster.log import log_steps
from servegym.cluster.migration import leave, note_preempted, stop_migrations
from servegym.cluster.phased import forget_pressure, form_phase
from servegym.cluster.pipeline import form_batches, land_batch
from servegym.cluster.priority import form_by_priority, hold_back, reset_forming
from servegym.cluster.remote import clear_links
from servegym.cluster.retention import let_all_go
from servegym.cluster.router import forget_outstanding, forget_prefill, take_back
from servegym.cluster.running import (
    admit_head,
    at_hand,
    begin_decodes,
    begin_mixed,
    block_residue,
    blocks_to_end,
    preempt,
)
from servegym.cluster.state import (
    DECODE,
    DOWN,
    FINISHED,
    FLYING,
    IDLE,
    PREFILL,
    PREFILL_ONLY,
    STEP,
    Params,
    State,
)
from servegym.cluster.steptime import (
    decode_span_s,
    prefill_s,
)
from servegym.cluster.stretches import note_durations, settle_decodes, steps_ended_by
from servegym.cluster.transfers import (
    admit_apart,
    hand_over,
    stop_transfers,
)
from servegym.cluster.watch import see_steps
from servegym.engines import SGLANG, TRTLLM, VLLM_PRIORITY, VLLM_V0

#: Of the requests that an idle engine sees: all.
NO_LIMIT = 1 << 62


@entry(FORM_STEP, types.void, types.int64, types.int64, types.float64)
def form_step(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """Begin the next step, or a stretch of decode steps up to where something changes."""
    v = s.replica[e, r]
    t = v.type_idx
    if p.migration.on and s.move[e, r].leaving > 0:
        leave(p, s, e, r, now_s)
    if p.num_stages[t] > 0:
        form_batches(p, s, e, r, now_s)
        return
    if p.engine[t] == SGLANG or p.engine[t] == VLLM_V0:
        form_phase(p, s, e, r, now_s)
        return
    if p.engine[t] == VLLM_PRIORITY:
        form_by_priority(p, s, e, r, now_s)
        return
    hidden = 0
    if p.forms_ahead[t] > 0:
        hidden = max(0, v.num_waiting - v.num_seen)
    elif v.waits > 0:
        hidden = v.num_waiting
    while True:
        preempted = _feed_decodes(p, s, e, r, now_s)
        batch = v.num_decodes
        budget = p.max_num_batched_tokens[t] - batch
        attention_s = 0.0
        request = v.first_prefill
        if request >= 0:
            q = s.request[e, request]
            computed = q.computed
            take = min(
                q.prompt + q.generated - computed,
                budget,
            )
            blocks = (computed + take + p.block_size - 1) // p.block_size
            if blocks - q.table_len > v.free_blocks:
                # it is the last of the running list, so it is its own victim
                preempt(p, s, e, r, request, now_s)
                if p.migration.on:
                    note_preempted(s, e, r, request)
                preempted = True
            else:
                take_for_chunk(p, s, e, r, request, computed, take)
                q.chunk = take
                budget -= take
                attention_s += prefill_s(p, t, take, computed)
        if p.tiered:
            if not preempted:
                attention_s = admit_beside_loads(p, s, e, r, now_s, budget, attention_s)
                budget = s.link[e, r].budget
        elif p.moves_kv:
            if not preempted:
                attention_s = admit_apart(p, s, e, r, now_s, budget, attention_s)
                budget = s.link[e, r].budget
        elif not preempted and v.num_waiting > 0:
            budget, attention_s = _admit(p, s, e, r, now_s, budget, attention_s, hidden)
        tokens = p.max_num_batched_tokens[t] - budget
        if tokens > 0:
            break
        if hidden > 0 or v.num_lingering > 0:
            # with nothing to run, the last step's results come first
            hidden = 0
            let_all_ended_go(p, s, e, r, now_s)
            continue
        if preempted and v.num_waiting > 0:
            continue
        v.mode = IDLE
        v.num_seen = NO_LIMIT
        set_event(s, e, r, math.inf)
        return
    if v.num_lingering > 0:
        let_all_ended_go(p, s, e, r, now_s)
    v.num_seen = v.num_waiting
    if v.first_prefill >= 0:
        begin_mixed(p, s, e, r, now_s, batch, tokens, attention_s)
        return
    # after a preemption admission is barred in this step alone
    single = v.num_waiting > 0 and (preempted or p.forms_ahead[t] > 0)
    begin_decodes(p, s, e, r, now_s, single, 0)


@inlined
def _feed_decodes(p: Params, s: State, e: int, r: int, now_s: float) -> bool:
    """Give every decoding request its block for this step; return whether one was preempted."""
    v = s.replica[e, r]
    residue = v.iteration % p.block_size
    need = s.phase[e, r, residue]
    if need <= v.free_blocks:
        if need > 0:
            take_for_decodes(p, s, e, r, need)
        return False
    request = v.run_head
    while request >= 0:
        q = s.request[e, request]
        following = q.next_request
        start = q.join_iter
        if start >= 0 and block_residue(p, q.computed, start) == residue:
            while v.free_blocks == 0:
                victim = v.run_tail
                if s.request[e, victim].status == FINISHED:
                    let_go(p, s, e, r, victim, now_s)
                else:
                    preempt(p, s, e, r, victim, now_s)
                    if p.migration.on:
                        note_preempted(s, e, r, victim)
                if victim == request:
                    return True
                if victim == following:
                    following = -1
            take_for_decodes(p, s, e, r, 1)
        request = following
    return True


@inlined
def _admit(
    p: Params, s: State, e: int, r: int, now_s: float, budget: int, attention_s: float, hidden: int
) -> tuple[int, float]:
    """Move waiting requests to the running list while sequence slots, budget and blocks last.

    The last `hidden` of the queue are not known yet.
    """
    v = s.replica[e, r]
    t = v.type_idx
    size = p.block_size
    no_evict = p.engine[t] == TRTLLM
    chunked = p.chunked_prefill and not no_evict
    promised = promised_blocks(p, s, e, r) if no_evict else 0
    seqs = p.max_num_seqs[t]
    while budget > 0 and v.num_waiting > hidden and v.num_running < seqs:
        request = v.wait_head
        q = s.request[e, request]
        total = q.prompt + q.generated
        hits, unheld, computed = at_hand(p, s, e, r, request)
        take = min(total - computed, budget)
        if not chunked and take < total - computed:
            break
        if no_evict:
            if blocks_to_end(p, s, e, request) > v.free_blocks - promised:
                break
        else:
            whole = (total + size - 1) // size - hits
            if whole + unheld > v.free_blocks:
                break
        admit_head(p, s, e, r, now_s, hits, computed, take)
        if no_evict:
            promised += blocks_to_end(p, s, e, request) - q.table_len
        budget -= take
        attention_s += prefill_s(p, t, take, computed)
    return budget, attention_s


@helper
def promised_blocks(p: Params, s: State, e: int, r: int) -> int:
    """Blocks that decoding requests, fed for the step to come, will still take to their ends."""
    v = s.replica[e, r]
    blocks = 0
    request = v.run_head
    while request >= 0:
        q = s.request[e, request]
        if q.join_iter >= 0:  # or it has ended
            tokens = q.computed + v.iteration - q.join_iter + 1
            held = (tokens + p.block_size - 1) // p.block_size
            blocks += blocks_to_end(p, s, e, request) - held
        request = q.next_request
    return blocks


@entry(END_STEP, types.void, types.int64, types.int64, types.float64)
def end_step(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """End the step or decode stretch in progress: tokens come out, requests end."""
    v = s.replica[e, r]
    if v.mode == FLYING:
        land_batch(p, s, e, r, now_s)
        return
    left_out = 0
    if p.engine[v.type_idx] == VLLM_PRIORITY:
        note_durations(p, s, e, r, v.stretch_steps, now_s)
        left_out = hold_back(p, s, e, r)
    if v.mode == DECODE:
        log_steps(p, s, e, r, now_s, v.stretch_steps, 0)
        see_steps(p, s, e, r, now_s, v.stretch_steps)
        settle_decodes(p, s, e, r, v.stretch_steps)
        running = v.num_running
        _end_decodes(p, s, e, r, now_s)
        v.num_lagging = running - v.num_running
        v.num_decodes += left_out
        return
    request = v.first_prefill
    if p.record:
        prefill = 0
        walk = request
        while walk >= 0:
            prefill += s.request[e, walk].chunk
            walk = s.request[e, walk].next_request
        log_steps(p, s, e, r, now_s, 1, prefill)
    paused = v.mode == PREFILL
    see_steps(p, s, e, r, now_s, 0 if paused else 1)
    alone = v.num_decodes + v.num_lagging == 0
    running = v.num_running
    if paused:
        v.prefill_steps += 1
        s.env[e].engine_steps += 1
    else:
        settle_decodes(p, s, e, r, 1)
        _end_decodes(p, s, e, r, now_s)
    while request >= 0:
        q = s.request[e, request]
        following = q.next_request
        q.computed += q.chunk
        q.chunk = 0
        if q.computed == q.prompt + q.generated:
            v.first_prefill = following
            _emit_after_prefill(p, s, e, r, request, now_s)
        request = following
    if paused and (alone or v.num_running < running or v.first_prefill >= 0):
        v.batch_full = 0


@inlined
def _end_decodes(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    while s.replica[e, r].num_ends > 0 and (s.ends[e, r, 0].key >> 32) == s.replica[e, r].iteration:
        finish(p, s, e, r, s.ends[e, r, 0].request, now_s)


@inlined
def _emit_after_prefill(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> None:
    """A prompt is computed: one token comes out, then the request ends or decodes."""
    v = s.replica[e, r]
    q = s.request[e, request]
    if p.disaggregated and p.role[v.type_idx] == PREFILL_ONLY:
        hand_over(p, s, e, r, request, now_s)
        return
    left = emit(p, s, e, r, request, now_s, 1)
    if left == 0:
        return
    computed = q.computed
    start = v.iteration
    q.join_iter = start
    v.num_decodes += 1
    v.kv_tokens += computed
    s.phase[e, r, block_residue(p, computed, start)] += 1
    v.num_joined += 1
    push_end(s, e, r, request, ((start + left) << 32) | v.num_joined)


@helper
def stop_replica(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """Fail-stop: ended steps count, the running one is lost, all requests go back."""
    v = s.replica[e, r]
    if v.mode == DECODE:
        steps = steps_ended_by(p, s, e, r, now_s)
        span = 0.0
        if steps > 0:
            batch = v.num_decodes
            kv = v.kv_tokens + batch
            span = decode_span_s(p, v.type_idx, batch, kv, steps)
        last_s = v.stretch_begin_s + v.stretch_factor * span
        log_steps(p, s, e, r, last_s, steps, 0)
        see_steps(p, s, e, r, last_s, steps)
        settle_decodes(p, s, e, r, steps)
        v.iteration += 1
    elif v.mode == STEP:
        last_s = v.stretch_begin_s
        v.iteration += 1
    else:
        last_s = now_s
        v.prefill_steps += v.mode == PREFILL
    aborted = 1 if v.mode == DECODE or v.mode == STEP else 0
    if p.tiered:
        stop_loads(p, s, e, r, now_s)
    if p.disaggregated:
        stop_transfers(p, s, e, r, now_s)
    if p.migration.on:
        stop_migrations(p, s, e, r, now_s)
    if p.moves_kv:
        clear_links(s, e, r)
    request = v.run_head
    while request >= 0:
        q = s.request[e, request]
        following = q.next_request
        start = q.join_iter
        if start >= 0:
            if v.stalled == 0:
                q.last_token_s = last_s
            steps = v.iteration - aborted - start
            q.generated += steps
        forget_outstanding(s, e, r, request)
        forget_prefill(s, e, r, request)
        take_back(p, s, e, r, request, now_s)
        request = following
    request = v.wait_head
    while request >= 0:
        q = s.request[e, request]
        following = q.next_request
        forget_outstanding(s, e, r, request)
        forget_prefill(s, e, r, request)
        take_back(p, s, e, r, request, now_s)
        request = following
    let_all_go(p, s, e, r)
    clear_replica(p, s, e, r)
    v.mode = DOWN
    set_event(s, e, r, math.inf)


@helper
def clear_replica(p: Params, s: State, e: int, r: int) -> None:
    """Empty the queues, lists and cache of a replica."""
    v = s.replica[e, r]
    v.wait_head = -1
    v.wait_tail = -1
    v.num_waiting = 0
    v.run_head = -1
    v.run_tail = -1
    v.num_running = 0
    v.first_retained = -1
    v.last_expiring = -1
    if p.tiered:
        clear_loads(s, e, r)
    v.first_prefill = -1
    v.num_decodes = 0
    v.kv_tokens = 0
    v.emitted = 0
    v.num_ends = 0
    v.stalled = 0
    v.waits = 0
    v.waited_steps = 0
    v.gathered_steps = 0
    v.num_lagging = 0
    v.num_seen = NO_LIMIT
    v.num_lingering = 0
    v.num_flying = 0
    for i in range(p.num_stages[v.type_idx]):
        s.flight[e, r, i].free_s = 0.0
    forget_pressure(s, e, r)
    reset_forming(s, e, r)
    s.phase[e, r, :] = 0
    reset_blocks(p, s, e, r)
