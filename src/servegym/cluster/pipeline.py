"""Engines with explicit batches: in flight over the stages of a pipeline, or verifying drafts.

vLLM V1 (`EngineCore.step_with_batch_queue`) keeps up to as many batches in flight as there are
stages. While there is room it forms another one of whoever can be scheduled; then it waits for the
oldest. A request's tokens count as computed when they are scheduled, so that it has none left to
schedule until its batch has brought the next one; of a prompt the next chunk may follow in the next
batch. TensorRT-LLM's `_executor_loop_pp` does the same with its own admission.

With speculative decoding there is one stage, and a request that decodes has its next token and its
drafts in a batch. Those that are rejected count as computed until it lands; blocks are taken for
them and for what the drafter writes behind them. A head that reads hidden states has none of a
block in the prefix cache, so that vLLM computes the last one of a hit again
(`use_eagle_block_drop`).

All that is in stretches elsewhere is explicit here: no request counts as decoding (`join_iter`),
`computed` and `generated` are always current, and every block is in its request's table.
"""

from __future__ import annotations

import math

from numba import types

from servegym.cluster.blocks import name_blocks, take_blocks
from servegym.cluster.drafts import count_accepted
from servegym.cluster.emission import emit
from servegym.cluster.entry import FORM_BATCHES, LAND_BATCH, entry
from servegym.cluster.heap import set_event
from servegym.cluster.jit import helper, inlined
from servegym.cluster.running import admit_head, at_hand, at_hand_up_to, preempt
from servegym.cluster.state import FLYING, IDLE, Params, State
from servegym.cluster.steptime import (
    decode_s,
    decode_span_s,
    dense_s,
    locate,
    mixed_s,
    prefill_s,
    step_factor,
)
from servegym.engines import TRTLLM

#: Of `State.batch`: the request computes its text, or decodes, and no batch in flight brings its
#: next token.
PREFILLS, DECODES = -1, -2


@entry(FORM_BATCHES, types.void, types.int64, types.int64, types.float64)
def form_batches(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """Form batches until the pipeline is full or nobody can be scheduled, else be idle."""
    v = s.replica[e, r]
    stages = p.num_stages[v.type_idx]
    while v.num_flying < stages and _form_batch(p, s, e, r, now_s):
        pass
    if v.num_flying == 0:
        v.mode = IDLE
        set_event(s, e, r, math.inf)
        return
    v.mode = FLYING
    oldest = (v.prefill_steps - v.num_flying) % stages
    set_event(s, e, r, s.flight[e, r, oldest].landing_s)


@helper
def _form_batch(p: Params, s: State, e: int, r: int, now_s: float) -> bool:
    """Form one batch and send it off; return whether there is anything in it."""
    v = s.replica[e, r]
    t = v.type_idx
    waits = v.waits > 0
    while True:
        for i in range(p.num_stages[t]):
            s.flight[e, r, i].work_s = 0.0
        place = s.flight[e, r, v.prefill_steps % p.num_stages[t]]
        place.num_decodes = 0
        place.decode_tokens = 0
        place.num_chunks = 0
        place.prefill_tokens = 0
        place.longest_chunk = 0
        place.kv_tokens = 0
        preempted = _feed_running(p, s, e, r, now_s)
        if not preempted and not waits:
            _admit(p, s, e, r, now_s)
        if place.num_decodes + place.prefill_tokens > 0:
            _send_off(p, s, e, r, now_s)
            return True
        if waits:  # a rank with nothing to decode prefills
            waits = False
            continue
        if not (preempted and v.num_waiting > 0 and v.num_flying == 0):
            return False


@inlined
def _feed_running(p: Params, s: State, e: int, r: int, now_s: float) -> bool:
    """Schedule running requests that have tokens left to; return whether one was preempted."""
    v = s.replica[e, r]
    t = v.type_idx
    place = s.flight[e, r, v.prefill_steps % p.num_stages[t]]
    budget = p.max_num_batched_tokens[t]
    room = p.max_num_seqs[t]
    preempted = False
    request = v.run_head
    while request >= 0 and budget > 0 and room > 0:
        q = s.request[e, request]
        following = q.next_request
        computed = q.computed
        text = q.prompt + q.generated
        decodes = s.batch[e, request].number == DECODES
        take = min(text - computed + (p.num_drafts[t] if decodes else 0), budget)
        if take > 0:
            blocks = (computed + take + p.lookahead[t] + p.block_size - 1) // p.block_size
            while blocks - q.table_len > v.free_blocks:
                victim = v.run_tail
                preempt(p, s, e, r, victim, now_s)
                preempted = True
                if victim == request:
                    return True
                if victim == following:
                    following = -1
            _take_blocks(p, s, e, r, request, take)
            if decodes:
                place.num_decodes += 1
                place.decode_tokens += take
                place.kv_tokens += computed + take
            else:
                _note_chunk(p, s, e, r, take, computed)
            _schedule(p, s, e, r, request, take, take - 1 if decodes else 0)
            budget -= take
            room -= 1
        request = following
    return preempted


@inlined
def _admit(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """Move waiting requests to the running list while slots, budget and blocks last."""
    v = s.replica[e, r]
    t = v.type_idx
    place = s.flight[e, r, v.prefill_steps % p.num_stages[t]]
    no_evict = p.engine[t] == TRTLLM
    seqs = p.max_num_seqs[t] * (p.num_stages[t] if no_evict else 1)
    budget = p.max_num_batched_tokens[t] - place.decode_tokens - place.prefill_tokens
    room = p.max_num_seqs[t] - place.num_decodes  # of whole prompts none is left over to count
    size, ahead = p.block_size, p.lookahead[t]
    uniform = place.num_chunks == 0 and not no_evict
    promised = promised_to_batches(p, s, e, r) if no_evict else 0
    while budget > 0 and v.num_waiting > 0 and v.num_running < seqs and room > 0:
        request = v.wait_head
        q = s.request[e, request]
        total = q.prompt + q.generated
        hits, unheld, computed = at_hand(p, s, e, r, request)
        if hits > 0 and p.num_drafts[t] > 0 and not no_evict:
            hits, unheld, computed = at_hand_up_to(p, s, e, r, request, hits - 1)
        take = min(total - computed, budget)
        if take < total - computed and (no_evict or not p.chunked_prefill):
            return
        padded = uniform and total - computed == 1 and p.num_drafts[t] > 0
        padded &= place.num_decodes > 0 or computed > 0
        if padded:
            # a batch that only decodes has a CUDA graph if each has as many tokens
            take = 1 + p.num_drafts[t]
            if take > budget:
                return
        if no_evict:
            to_end = blocks_to_last_batch(p, s, e, request, t)
            if to_end > v.free_blocks - promised:
                return
        else:
            blocks = max(total, computed + take + ahead)
            if (blocks + size - 1) // size - hits + unheld > v.free_blocks:
                return
        admit_head(p, s, e, r, now_s, hits, computed, 0)
        s.batch[e, request].number = PREFILLS
        s.batch[e, request].num_named = hits
        _take_blocks(p, s, e, r, request, take)
        if no_evict:
            promised += to_end - q.table_len
        _note_chunk(p, s, e, r, take, computed)
        _schedule(p, s, e, r, request, take, 0)
        budget -= take
        room -= 1


@helper
def num_decoding(s: State, e: int, r: int) -> int:
    """Requests that decode and that no batch in flight brings the next token of."""
    count = 0
    request = s.replica[e, r].run_head
    while request >= 0:
        count += s.batch[e, request].number == DECODES
        request = s.request[e, request].next_request
    return count


@helper
def promised_to_batches(p: Params, s: State, e: int, r: int) -> int:
    """Blocks that running requests will still take to their ends."""
    blocks = 0
    t = s.replica[e, r].type_idx
    request = s.replica[e, r].run_head
    while request >= 0:
        q = s.request[e, request]
        blocks += blocks_to_last_batch(p, s, e, request, t) - q.table_len
        request = q.next_request
    return blocks


@inlined
def blocks_to_last_batch(p: Params, s: State, e: int, request: int, t: int) -> int:
    """Blocks that a request holds when its last token comes out, drafted in vain or not."""
    q = s.request[e, request]
    tokens = q.prompt + q.output - 1 + p.num_drafts[t] + p.lookahead[t]
    return (tokens + p.block_size - 1) // p.block_size


@inlined
def _take_blocks(p: Params, s: State, e: int, r: int, request: int, take: int) -> None:
    """Give a request the blocks of its next tokens; name those that its text fills."""
    q, own = s.request[e, request], s.batch[e, request]
    computed = q.computed
    ahead = p.lookahead[s.replica[e, r].type_idx]
    take_blocks(p, s, e, r, request, computed + take + ahead)
    filled = min(computed + take, q.prompt + q.generated) // p.block_size
    if p.prefix_caching and filled > own.num_named:
        name_blocks(p, s, e, r, request, own.num_named, filled)
    own.num_named = max(own.num_named, filled)


@inlined
def _note_chunk(p: Params, s: State, e: int, r: int, take: int, computed: int) -> None:
    """Take a chunk over so many computed tokens into the batch that forms."""
    v = s.replica[e, r]
    t = v.type_idx
    place = s.flight[e, r, v.prefill_steps % p.num_stages[t]]
    place.num_chunks += 1
    place.prefill_tokens += take
    place.longest_chunk = max(place.longest_chunk, take)
    for i in range(p.num_stages[t]):
        s.flight[e, r, i].work_s += prefill_s(p, p.first_stage[t] + i, take, computed)


@inlined
def _schedule(p: Params, s: State, e: int, r: int, request: int, take: int, drafts: int) -> None:
    """Count scheduled tokens as computed; the last of its text bring the next one."""
    q = s.request[e, request]
    q.computed += take
    if q.computed >= q.prompt + q.generated:
        s.batch[e, request].number = s.replica[e, r].prefill_steps
        s.batch[e, request].drafts = drafts


@inlined
def _send_off(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """Say when the batch just formed will leave each stage; they take batches one by one."""
    v = s.replica[e, r]
    t = v.type_idx
    first = p.first_stage[t]
    place = s.flight[e, r, v.prefill_steps % p.num_stages[t]]
    decodes, kv = place.num_decodes, place.kv_tokens
    tokens = place.decode_tokens + place.prefill_tokens
    factor = step_factor(p, s, e, r)
    handover_s = factor * _handover_s(p, t, tokens)
    ready_s = now_s
    for i in range(p.num_stages[t]):
        stage = s.flight[e, r, i]
        if place.prefill_tokens == 0 and p.num_drafts[t] == 0:
            work_s = decode_span_s(p, first + i, decodes, kv, 1)
        elif place.prefill_tokens == 0:
            work_s = dense_s(p, first, tokens) + decode_s(p, first, decodes, kv)
            work_s += _drafting_s(p, t, decodes)
        else:
            work_s = stage.work_s + dense_s(p, first + i, tokens)
            if decodes > 0:
                work_s += mixed_s(p, first + i, decodes, kv)
                work_s += p.empty_tiles_s[first + i] * decodes * place.longest_chunk
            if p.num_drafts[t] > 0:
                work_s += _drafting_s(p, t, decodes + place.num_chunks)
            work_s = max(work_s, p.eager_s[first + i])
        stage.free_s = max(ready_s, stage.free_s) + factor * work_s
        ready_s = stage.free_s + handover_s
    place.begin_s = now_s
    place.landing_s = s.flight[e, r, p.num_stages[t] - 1].free_s
    v.prefill_steps += 1
    v.num_flying += 1


@inlined
def _handover_s(p: Params, t: int, tokens: int) -> float:
    knots, values_s = p.dense_tokens[p.first_stage[t]], p.handover_s[t]
    i = locate(knots, tokens)
    share = (tokens - knots[i]) / (knots[i + 1] - knots[i])
    return values_s[i] + share * (values_s[i + 1] - values_s[i])


@inlined
def _drafting_s(p: Params, t: int, sequences: int) -> float:
    """Seconds of drafting beside the layers of a step of so many sequences."""
    knots, values_s = p.decode_batch[p.first_stage[t]], p.draft_s[t]
    i = locate(knots, sequences)
    share = (sequences - knots[i]) / (knots[i + 1] - knots[i])
    return values_s[i] + share * (values_s[i + 1] - values_s[i])


@entry(LAND_BATCH, types.void, types.int64, types.int64, types.float64)
def land_batch(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """Let the oldest batch leave the last stage: tokens come out, requests end."""
    v = s.replica[e, r]
    number = v.prefill_steps - v.num_flying
    v.num_flying -= 1
    s.env[e].engine_steps += 1
    if p.record:
        _log_batch(p, s, e, r, number % p.num_stages[v.type_idx])
    request = v.run_head
    while request >= 0:
        q, own = s.request[e, request], s.batch[e, request]
        following = q.next_request
        if own.number == number:
            own.number = DECODES
            accepted = 0
            if own.drafts > 0:
                seed, rates = s.env[e].noise_seed, p.acceptance[v.type_idx]
                accepted = count_accepted(seed, request, q.generated, own.drafts, rates)
            left = q.output - q.generated
            # what is rejected is not there; what comes with the last tokens has no identity
            q.computed = min(q.computed, q.prompt + q.generated + accepted)
            if 1 + accepted >= left:
                q.computed = min(q.computed, own.num_named * p.block_size)
            emit(p, s, e, r, request, now_s, min(1 + accepted, left))
        request = following


@inlined
def _log_batch(p: Params, s: State, e: int, r: int, place: int) -> None:
    """Append a batch that has left the last stage to the step log."""
    v, batch = s.replica[e, r], s.flight[e, r, place]
    i = s.env[e].step_len
    s.steps[e, i].begin_s = batch.begin_s
    s.steps[e, i].end_s = batch.landing_s
    s.steps[e, i].replica = r
    s.steps[e, i].num_steps = 1
    s.steps[e, i].num_decodes = batch.num_decodes
    s.steps[e, i].prefill_tokens = batch.prefill_tokens
    s.steps[e, i].num_waiting = v.num_waiting
    s.steps[e, i].used_blocks = p.num_blocks[v.type_idx] - v.free_blocks
    s.env[e].step_len = i + 1
