"""vLLM V1 in its priority mode, as a scheduler that is asked drives it.

The waiting request with the lowest key is admitted first, the running one with the highest is
preempted first. Keys may be written anew, or the request be picked, whenever there is a choice:
the engine then stops where it is with its step (`State.forming`) until it is answered.
"""

from __future__ import annotations

import math

from numba import types

from servegym.cluster.blocks import (
    give_back_from_decodes,
    take_for_chunk,
    take_for_decodes,
)
from servegym.cluster.entry import FORM_BY_PRIORITY, entry
from servegym.cluster.heap import push_end, remove_end, set_event
from servegym.cluster.jit import helper, inlined
from servegym.cluster.migration import note_preempted
from servegym.cluster.remote import admit_landed, are_enough
from servegym.cluster.running import (
    admit_head,
    at_hand,
    begin_decodes,
    begin_mixed,
    block_residue,
    preempt,
)
from servegym.cluster.state import (
    ADMIT,
    ADMITTING,
    ALWAYS,
    DECODE,
    FEEDING,
    IDLE,
    NEVER,
    NOBODY,
    NOT_FORMING,
    NOT_PICKED,
    ORDER,
    PREEMPT,
    WAKING,
    Params,
    State,
)
from servegym.cluster.steptime import decode_span_s, prefill_s, step_factor


@helper
def reset_forming(s: State, e: int, r: int) -> None:
    """Forget steps, keys and picks of a replica."""
    f = s.forming[e, r]
    f.step_s = 0.0
    f.stage = NOT_FORMING
    f.picked = NOT_PICKED
    f.keyed = 0
    f.skipped_from = -1
    f.num_skipped = 0


@entry(FORM_BY_PRIORITY, types.void, types.int64, types.int64, types.float64)
def form_by_priority(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """Begin the next step, go on forming it, or stop to ask."""
    v = s.replica[e, r]
    f = s.forming[e, r]
    while True:
        if f.stage == NOT_FORMING:
            if p.asks.order != NEVER and f.keyed == 0 and _order_matters(p, s, e, r):
                _ask(s, e, r, ORDER)
                return
            _start(p, s, e, r)
        if f.stage == FEEDING:
            if not _feed(p, s, e, r, now_s):
                _ask(s, e, r, PREEMPT)
                return
            f.stage = ADMITTING
            if p.migration.on and f.preempted == 0 and s.link[e, r].num_landed > 0:
                running = v.num_running
                f.attention_s = admit_landed(p, s, e, r, f.budget, f.attention_s)
                f.budget -= v.num_running - running
        if f.preempted == 0 and not _admit(p, s, e, r, now_s):
            _ask(s, e, r, ADMIT)
            return
        f.stage = NOT_FORMING
        f.keyed = 0
        tokens = p.max_num_batched_tokens[v.type_idx] - f.budget
        if tokens > 0:
            break
        if not (f.preempted > 0 and v.num_waiting > 0):
            v.mode = IDLE
            set_event(s, e, r, math.inf)
            return
    if f.skipped_from >= 0:
        _begin_without_skipped(p, s, e, r, now_s)
    elif v.first_prefill >= 0:
        begin_mixed(p, s, e, r, now_s, v.num_decodes, tokens, f.attention_s)
    else:
        single = p.asks.order == ALWAYS or f.blocked > 0
        begin_decodes(p, s, e, r, now_s, single or (f.preempted > 0 and v.num_waiting > 0), 0)


@inlined
def _ask(s: State, e: int, r: int, kind: int) -> None:
    """Stop forming the step until a decision has been taken."""
    s.env[e].decision = kind
    s.env[e].asking = r
    s.replica[e, r].mode = WAKING


@inlined
def _order_matters(p: Params, s: State, e: int, r: int) -> bool:
    """Whether keys matter in the step to come, or are asked for in any case."""
    v = s.replica[e, r]
    t = v.type_idx
    size = p.block_size
    free = v.free_blocks - s.phase[e, r, v.iteration % size]
    budget = p.max_num_batched_tokens[t] - v.num_decodes
    request = v.first_prefill
    if free >= 0 and request >= 0:
        q = s.request[e, request]
        take = min(q.prompt + q.generated - q.computed, budget)
        free -= (q.computed + take + size - 1) // size - q.table_len
        budget -= take
    if free < 0:
        return v.num_running > 1 or p.asks.order == ALWAYS
    if p.asks.order == ALWAYS and v.num_running + v.num_waiting > 0:
        return True
    if v.num_waiting < 2 or v.num_running >= p.max_num_seqs[t] or budget <= 0:
        return False
    # the chunk of a prompt may bring blocks into the cache with which others fit
    return (p.prefix_caching and request >= 0) or _any_fits(p, s, e, r, free, budget)


@inlined
def _start(p: Params, s: State, e: int, r: int) -> None:
    """Start to form a step; if there are blocks for all decoding requests, they have them."""
    v = s.replica[e, r]
    f = s.forming[e, r]
    f.stage = FEEDING
    f.feeding = v.run_head
    f.chunk = -1
    f.preempted = 0
    f.blocked = 0
    f.attention_s = 0.0
    f.skipped_from = -1
    f.num_skipped = 0
    f.skipped_kv_tokens = 0
    need = s.phase[e, r, v.iteration % p.block_size]
    if need <= v.free_blocks:
        if need > 0:
            take_for_decodes(p, s, e, r, need)
        f.feeding = v.first_prefill


@inlined
def _feed(p: Params, s: State, e: int, r: int, now_s: float) -> bool:
    """Give the running requests their tokens and blocks; return False to ask for a victim."""
    v = s.replica[e, r]
    f = s.forming[e, r]
    size = p.block_size
    residue = v.iteration % size
    all_tokens = p.max_num_batched_tokens[v.type_idx]
    while f.feeding >= 0:
        request = f.feeding
        q = s.request[e, request]
        need = 0
        if q.join_iter >= 0:
            if block_residue(p, q.computed, q.join_iter) == residue:
                need = 1
        else:
            if f.chunk < 0:
                f.chunk = min(q.prompt + q.generated - q.computed, all_tokens - v.num_decodes)
            need = (q.computed + f.chunk + size - 1) // size - q.table_len
        following = q.next_request
        while need > v.free_blocks:
            victim = _victim(p, s, e, r)
            if victim < 0:
                return False
            _preempt_in_step(p, s, e, r, victim, request, now_s)
            if victim == request:
                f.chunk = -1
                _skip_from(s, e, r, following)
                f.budget = all_tokens - (v.num_decodes - f.num_skipped)
                return True
            following = q.next_request
        if q.join_iter >= 0:
            if need > 0:
                take_for_decodes(p, s, e, r, 1)
        else:
            take_for_chunk(p, s, e, r, request, q.computed, f.chunk)
            q.chunk = f.chunk
            f.attention_s += prefill_s(p, v.type_idx, f.chunk, q.computed)
        f.feeding = following
    f.budget = all_tokens - v.num_decodes - max(f.chunk, 0)
    return True


@inlined
def _victim(p: Params, s: State, e: int, r: int) -> int:
    """Return the running request to preempt, -1 if somebody else is to say."""
    v = s.replica[e, r]
    f = s.forming[e, r]
    if v.num_running == 1:
        return v.run_head
    if p.asks.preempt != NEVER:
        picked = f.picked
        f.picked = NOT_PICKED
        return picked
    found = v.run_head
    request = s.request[e, found].next_request
    while request >= 0:
        if _goes_before(s, e, found, request):
            found = request
        request = s.request[e, request].next_request
    return found


@inlined
def _goes_before(s: State, e: int, request: int, other: int) -> bool:
    """Whether a request is more urgent than another: by key, then arrival, then number."""
    key, other_key = s.order[e, request].key, s.order[e, other].key
    if key != other_key:
        return key < other_key
    arrival_s, other_s = s.request[e, request].arrival_s, s.request[e, other].arrival_s
    return arrival_s < other_s or (arrival_s == other_s and request < other)


@inlined
def _preempt_in_step(
    p: Params, s: State, e: int, r: int, victim: int, feeding: int, now_s: float
) -> None:
    """Preempt; a victim that has had its block for this step gives that back too."""
    v = s.replica[e, r]
    q = s.request[e, victim]
    if (
        q.join_iter >= 0
        and block_residue(p, q.computed, q.join_iter) == v.iteration % p.block_size
        and _stands_before(s, e, victim, feeding)
    ):
        give_back_from_decodes(p, s, e, r)
    preempt(p, s, e, r, victim, now_s)
    if p.migration.on:
        note_preempted(s, e, r, victim)
    s.order[e, victim].idle_since_s = now_s
    s.forming[e, r].preempted = 1


@inlined
def _stands_before(s: State, e: int, request: int, other: int) -> bool:
    """Whether a request stands before another in the running list."""
    request = s.request[e, request].next_request
    while request >= 0:
        if request == other:
            return True
        request = s.request[e, request].next_request
    return False


@inlined
def _skip_from(s: State, e: int, r: int, first: int) -> None:
    """Leave this running request and those behind it out of the step, as vLLM does."""
    v = s.replica[e, r]
    f = s.forming[e, r]
    f.skipped_from = first
    request = first
    while request >= 0 and s.request[e, request].join_iter >= 0:
        q = s.request[e, request]
        f.num_skipped += 1
        f.skipped_kv_tokens += q.computed + v.iteration - q.join_iter
        request = q.next_request


@inlined
def _begin_without_skipped(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """Begin one decode step of the requests that are not left out."""
    v = s.replica[e, r]
    f = s.forming[e, r]
    batch = v.num_decodes - f.num_skipped
    factor = step_factor(p, s, e, r)
    v.stretch_begin_s = now_s
    v.stretch_factor = factor
    v.mode = DECODE
    v.stretch_steps = 1
    kv_tokens = v.kv_tokens - f.skipped_kv_tokens + batch
    span = decode_span_s(p, v.type_idx, batch, kv_tokens, 1)
    set_event(s, e, r, now_s + factor * span)


@helper
def hold_back(p: Params, s: State, e: int, r: int) -> int:
    """Before a step is booked: those it left out stay where they are.

    Returns:
        How many there are; they are no longer among `num_decodes`, until the step is booked.
    """
    f = s.forming[e, r]
    held = f.num_skipped
    f.num_skipped = 0
    v = s.replica[e, r]
    request = f.skipped_from
    for _ in range(held):
        q = s.request[e, request]
        s.phase[e, r, block_residue(p, q.computed, q.join_iter)] -= 1
        q.join_iter += 1
        s.phase[e, r, block_residue(p, q.computed, q.join_iter)] += 1
        key = s.ends[e, r, q.heap_pos].key
        remove_end(s, e, r, request)
        push_end(s, e, r, request, key + (1 << 32))
        request = q.next_request
    f.skipped_from = -1
    v.num_decodes -= held
    return held


@inlined
def _admit(p: Params, s: State, e: int, r: int, now_s: float) -> bool:
    """Admit waiting requests, the first by key or as picked; return False to ask for a pick."""
    v = s.replica[e, r]
    f = s.forming[e, r]
    t = v.type_idx
    while f.budget > 0 and v.num_waiting > 0 and v.num_running < p.max_num_seqs[t]:
        if p.migration.on and are_enough(p, s, e, r):
            break
        if p.asks.admit != NEVER:
            request = f.picked
            f.picked = NOT_PICKED
            if request == NOBODY:
                f.blocked = 1
                break
            if request == NOT_PICKED:
                if v.num_waiting == 1 and (p.asks.admit != ALWAYS or v.num_running == 0):
                    request = v.wait_head
                elif _any_fits(p, s, e, r, v.free_blocks, f.budget):
                    return False
                else:
                    break
        else:
            request = _first_waiting(s, e, r)
        hits, unheld, computed = at_hand(p, s, e, r, request)
        q = s.request[e, request]
        total = q.prompt + q.generated
        take = min(total - computed, f.budget)
        if _needs(p, s, e, request, hits, unheld) > v.free_blocks or (
            not p.chunked_prefill and take < total - computed
        ):
            if (p.asks.order != NEVER or p.asks.admit != NEVER) and v.num_waiting > 1:
                f.blocked = 1 if _any_fits(p, s, e, r, v.free_blocks, f.budget) else 0
            break
        _bring_to_front(s, e, r, request)
        admit_head(p, s, e, r, now_s, hits, computed, take)
        f.budget -= take
        f.attention_s += prefill_s(p, t, take, computed)
    return True


@inlined
def _needs(p: Params, s: State, e: int, request: int, hits: int, unheld: int) -> int:
    """Free blocks that a waiting request needs to be admitted: its whole text must fit."""
    q = s.request[e, request]
    return (q.prompt + q.generated + p.block_size - 1) // p.block_size - hits + unheld


@helper
def _any_fits(p: Params, s: State, e: int, r: int, free: int, budget: int) -> bool:
    """Whether one of the waiting requests fits into so many blocks and tokens."""
    request = s.replica[e, r].wait_head
    while request >= 0:
        q = s.request[e, request]
        hits, unheld, computed = at_hand(p, s, e, r, request)
        whole = p.chunked_prefill or q.prompt + q.generated - computed <= budget
        if whole and _needs(p, s, e, request, hits, unheld) <= free:
            return True
        request = q.next_request
    return False


@inlined
def _first_waiting(s: State, e: int, r: int) -> int:
    """Return the waiting request that goes before all others."""
    found = s.replica[e, r].wait_head
    request = s.request[e, found].next_request
    while request >= 0:
        if _goes_before(s, e, request, found):
            found = request
        request = s.request[e, request].next_request
    return found


@inlined
def _bring_to_front(s: State, e: int, r: int, request: int) -> None:
    """Move a request to the front of the waiting queue."""
    v = s.replica[e, r]
    if v.wait_head == request:
        return
    before = v.wait_head
    while s.request[e, before].next_request != request:
        before = s.request[e, before].next_request
    q = s.request[e, request]
    s.request[e, before].next_request = q.next_request
    if v.wait_tail == request:
        v.wait_tail = before
    q.next_request = v.wait_head
    v.wait_head = request
