"""Replicas whose steps begin and end together: data-parallel ranks, see `costs.shared`."""

from __future__ import annotations

from numba import types

from servegym.cluster.engine import end_step, form_step, promised_blocks
from servegym.cluster.entry import STEP_TOGETHER, entry
from servegym.cluster.heap import set_event
from servegym.cluster.jit import helper, inlined
from servegym.cluster.pipeline import blocks_to_last_batch, num_decoding, promised_to_batches
from servegym.cluster.running import at_hand, blocks_to_end
from servegym.cluster.state import (
    DECODE,
    FLYING,
    IDLE,
    PREFILL,
    SHARED_EXCHANGE,
    SHARED_EXPERTS,
    SHARED_SKEWED_EXPERTS,
    SHARED_TOKENS,
    WAKING,
    Params,
    State,
)
from servegym.cluster.steptime import decode_span_s, dense_s, locate


# not inlined: the main loop would be 2 % slower where no replicas step together
@entry(STEP_TOGETHER, types.void, types.int64, types.int64, types.float64)
def step_together(p: Params, s: State, e: int, first: int, now_s: float) -> None:
    """End the step of a group of ranks, and begin the next one.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        first: First replica of the group.
        now_s: Time, seconds.
    """
    stop = first + s.replica[e, first].num_ranks
    for r in range(first, stop):
        if s.replica[e, r].mode != IDLE and s.replica[e, r].mode != WAKING:
            end_step(p, s, e, r, now_s)
    if p.timeout_steps[s.replica[e, first].type_idx] > 0:
        _wait_for_each_other(p, s, e, first, stop)
    slowest_s, fullest, tokens, busy, prefills = 0.0, 1, 0, False, False
    for r in range(first, stop):
        form_step(p, s, e, r, now_s)
        v = s.replica[e, r]
        t = v.type_idx
        if v.mode == IDLE:  # it takes part with one dummy token
            row = p.first_stage[t] if p.num_stages[t] > 0 else t
            own_s, mine = dense_s(p, row, 1) / v.speed, 1
        elif v.mode == FLYING:
            batch = s.flight[e, r, 0]
            own_s = batch.landing_s - now_s
            mine = batch.decode_tokens + batch.prefill_tokens
            prefills = prefills or batch.prefill_tokens > 0
        elif v.mode == DECODE:
            v.stretch_steps = 1  # the others may have other work in the next step
            mine = v.num_decodes
            own_s = v.stretch_factor * decode_span_s(p, t, mine, v.kv_tokens + mine, 1)
        else:
            own_s = s.due[e, v.event_pos].time_s - now_s
            mine = _chunk_tokens(s, e, r)
            if v.mode != PREFILL:
                mine += v.num_decodes
            prefills = True
        busy = busy or v.mode != IDLE
        slowest_s = max(slowest_s, own_s)
        fullest = max(fullest, mine)
        tokens += mine
    if not busy:
        return
    t = s.replica[e, first].type_idx
    if fullest <= p.largest_graph[t]:
        fullest = graph_tokens(fullest)
        tokens = (stop - first) * fullest
    together_s = _shared_s(p, t, SHARED_EXCHANGE, fullest)
    together_s += _shared_s(p, t, SHARED_SKEWED_EXPERTS if prefills else SHARED_EXPERTS, tokens)
    end_s = now_s + slowest_s + together_s
    for r in range(first, stop):
        if s.replica[e, r].mode == FLYING:
            s.flight[e, r, 0].landing_s = end_s
        set_event(s, e, r, end_s)


@helper
def _wait_for_each_other(p: Params, s: State, e: int, first: int, stop: int) -> None:
    """Decide whether the ranks of a group may prefill in their next step, see `rank_rules`."""
    group = s.replica[e, first]
    all_can, all_decode = True, True
    for r in range(first, stop):
        all_can = all_can and _can_prefill(p, s, e, r)
        all_decode = all_decode and _num_decodes(p, s, e, r) > 0
    waits = 0
    if all_can:
        group.waited_steps = 0
        if all_decode:
            group.gathered_steps += 1
            if group.gathered_steps <= p.gather_steps[group.type_idx]:
                waits = 1
            else:
                group.gathered_steps = 0
    else:
        group.waited_steps += 1
        if all_decode and group.waited_steps < p.timeout_steps[group.type_idx]:
            waits = 1
        else:
            group.waited_steps = 0
    for r in range(first, stop):
        s.replica[e, r].waits = waits


@inlined
def _num_decodes(p: Params, s: State, e: int, r: int) -> int:
    v = s.replica[e, r]
    return num_decoding(s, e, r) if p.num_stages[v.type_idx] > 0 else v.num_decodes


@inlined
def _can_prefill(p: Params, s: State, e: int, r: int) -> bool:
    """Say whether the next prompt fits the next step, whose decodes have no block of it yet."""
    v = s.replica[e, r]
    t = v.type_idx
    if v.num_waiting == 0 or v.num_running >= p.max_num_seqs[t]:
        return False
    request = v.wait_head
    q = s.request[e, request]
    _, _, computed = at_hand(p, s, e, r, request)
    decodes = _num_decodes(p, s, e, r) * (1 + p.num_drafts[t])
    if q.prompt + q.generated - computed > p.max_num_batched_tokens[t] - decodes:
        return False
    if p.num_stages[t] > 0:
        free = v.free_blocks - promised_to_batches(p, s, e, r)
        return blocks_to_last_batch(p, s, e, request, t) <= free
    taken = s.phase[e, r, v.iteration % p.block_size] + promised_blocks(p, s, e, r)
    return blocks_to_end(p, s, e, request) <= v.free_blocks - taken


@inlined
def _chunk_tokens(s: State, e: int, r: int) -> int:
    tokens = 0
    request = s.replica[e, r].first_prefill
    while request >= 0:
        tokens += s.request[e, request].chunk
        request = s.request[e, request].next_request
    return tokens


@inlined
def graph_tokens(tokens: int) -> int:
    """Tokens of the smallest CUDA graph that holds so many, of the sizes that vLLM records."""
    if tokens <= 2:
        return tokens
    if tokens <= 4:
        return 4
    between = 8 if tokens <= 256 else 16
    return -(-tokens // between) * between


@inlined
def _shared_s(p: Params, t: int, row: int, tokens: int) -> float:
    knots, values_s = p.shared_s[t, SHARED_TOKENS], p.shared_s[t, row]
    i = locate(knots, tokens)
    share = (tokens - knots[i]) / (knots[i + 1] - knots[i])
    return values_s[i] + share * (values_s[i + 1] - values_s[i])
