"""Engines whose steps prefill or decode, never both: vLLM V0 and SGLang."""

from __future__ import annotations

import math

from numba import types

from servegym.cluster.blocks import take_for_chunk, take_for_decodes
from servegym.cluster.entry import FORM_PHASE, entry
from servegym.cluster.heap import set_event
from servegym.cluster.jit import helper, inlined
from servegym.cluster.running import (
    admit_head,
    at_hand,
    begin_decodes,
    block_residue,
    preempt,
    retract,
)
from servegym.cluster.spec import WATERMARK_BLOCKS
from servegym.cluster.state import IDLE, PREFILL, Params, State
from servegym.cluster.steptime import dense_s, prefill_s, step_factor
from servegym.engines import SGLANG

#: SGLang's `new_token_ratio`, the share of the tokens still to come that it keeps room for: at
#: first, at least, and what it loses in a decode step.
INITIAL_RATIO = 0.7
LEAST_RATIO = 0.14 * INITIAL_RATIO
RATIO_DECAY = (INITIAL_RATIO - LEAST_RATIO) / 600
#: Decode steps of each request that SGLang foresees when it estimates the ratio anew.
RETRACT_DECODE_STEPS = 20
#: Of one request SGLang foresees no more tokens than these.
CLIP_MAX_NEW_TOKENS = 4096


@entry(FORM_PHASE, types.void, types.int64, types.int64, types.float64)
def form_phase(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """Begin a step of prefills, else a stretch of decode steps, else be idle."""
    v = s.replica[e, r]
    t = v.type_idx
    sglang = p.engine[t] == SGLANG
    while True:
        if sglang:
            tokens, attention_s = _prefill_sglang(p, s, e, r, now_s)
        else:
            tokens, attention_s = _prefill_v0(p, s, e, r, now_s)
        if tokens > 0:
            _begin_prefill(p, s, e, r, now_s, tokens, attention_s)
            return
        if sglang:
            again = _feed_sglang(p, s, e, r, now_s)
        else:
            again = _feed_v0(p, s, e, r, now_s)
        if v.num_decodes > 0:
            spare = 0 if sglang else 1
            begin_decodes(p, s, e, r, now_s, again and v.num_waiting > 0, spare)
            return
        if not (again and v.num_waiting > 0):
            v.mode = IDLE
            set_event(s, e, r, math.inf)
            return


@inlined
def _begin_prefill(
    p: Params, s: State, e: int, r: int, now_s: float, tokens: int, attention_s: float
) -> None:
    v = s.replica[e, r]
    if p.record and v.stalled == 0 and v.num_decodes > 0:
        v.stalled = 1
        request = v.run_head
        while request >= 0:
            if s.request[e, request].join_iter >= 0:
                s.request[e, request].last_token_s = now_s
            request = s.request[e, request].next_request
    v.mode = PREFILL
    v.stretch_steps = 1
    v.stretch_begin_s = now_s
    v.stretch_factor = step_factor(p, s, e, r)
    duration = max(dense_s(p, v.type_idx, tokens) + attention_s, p.eager_s[v.type_idx])
    set_event(s, e, r, now_s + duration * v.stretch_factor)


@inlined
def _prefill_v0(p: Params, s: State, e: int, r: int, now_s: float) -> tuple[int, float]:
    """Admit waiting requests whole; return their tokens and attention seconds."""
    v = s.replica[e, r]
    t = v.type_idx
    size = p.block_size
    budget = p.max_num_batched_tokens[t]
    watermark = p.num_blocks[t] // WATERMARK_BLOCKS
    tokens, attention_s = 0, 0.0
    while v.num_waiting > 0 and v.num_running < p.max_num_seqs[t]:
        request = v.wait_head
        q = s.request[e, request]
        total = q.prompt + q.generated
        hits, _, computed = at_hand(p, s, e, r, request)
        take = total - computed
        if tokens + take > budget or (total + size - 1) // size + watermark > v.free_blocks:
            break
        admit_head(p, s, e, r, now_s, hits, computed, take)
        tokens += take
        attention_s += prefill_s(p, t, take, computed)
    return tokens, attention_s


@inlined
def _feed_v0(p: Params, s: State, e: int, r: int, now_s: float) -> bool:
    """Give decoding requests their blocks; return whether one was preempted.

    Each must find a free block at its turn, whether it needs one or not.
    """
    v = s.replica[e, r]
    residue = v.iteration % p.block_size
    need = s.phase[e, r, residue]
    if need < v.free_blocks:
        take_for_decodes(p, s, e, r, need)
        return False
    preempted = False
    request = v.run_head
    while request >= 0:
        q = s.request[e, request]
        following = q.next_request
        while v.free_blocks == 0:
            victim = v.run_tail
            preempt(p, s, e, r, victim, now_s)
            preempted = True
            if victim == request:
                return True
            if victim == following:
                following = -1
        if block_residue(p, q.computed, q.join_iter) == residue:
            take_for_decodes(p, s, e, r, 1)
        request = following
    return preempted


@inlined
def _new_token_ratio(s: State, e: int, r: int) -> float:
    v = s.replica[e, r]
    decays = v.iteration - v.ratio_since
    return v.ratio if decays <= 0 else max(v.ratio - decays * RATIO_DECAY, LEAST_RATIO)


@inlined
def forget_pressure(s: State, e: int, r: int) -> None:
    """Put SGLang's estimates into the state of an idle engine."""
    v = s.replica[e, r]
    v.batch_full = 0
    v.ratio = INITIAL_RATIO
    v.ratio_since = v.iteration


@inlined
def _prefill_sglang(p: Params, s: State, e: int, r: int, now_s: float) -> tuple[int, float]:
    """Go on with the chunked request and admit others; return tokens and attention seconds."""
    v = s.replica[e, r]
    t = v.type_idx
    size = p.block_size
    tokens, attention_s = 0, 0.0
    request = v.first_prefill
    if request < 0 and (v.batch_full > 0 or v.num_waiting == 0):
        return tokens, attention_s
    room = p.max_num_batched_tokens[t]
    if p.chunked_prefill:
        room = room // size * size
    ahead = _new_token_ratio(s, e, r) * _tokens_to_come(s, e, r)
    reserved = 0
    batch = 0
    if request >= 0:
        q = s.request[e, request]
        rest = q.prompt + q.generated - q.computed
        take = min(rest, room)
        attention_s += prefill_s(p, t, take, q.computed)
        take_for_chunk(p, s, e, r, request, q.computed, take)
        q.chunk = take
        tokens = take
        room -= (take + size - 1) // size * size
        reserved += size
        if take == rest:
            reserved += min(q.output, CLIP_MAX_NEW_TOKENS)
        batch = 1
    while v.num_waiting > 0:
        if v.num_decodes + v.num_lagging + batch >= p.max_num_seqs[t]:
            v.batch_full = 1
            break
        request = v.wait_head
        q = s.request[e, request]
        total = q.prompt + q.generated
        hits, unheld, computed = at_hand(p, s, e, r, request)
        new = min(q.output - q.generated, CLIP_MAX_NEW_TOKENS)
        left = (v.free_blocks - unheld) * size - reserved - ahead
        if total - hits * size + new + size >= left:
            v.batch_full = 1
            break
        take = total - computed
        padded = (take + size - 1) // size * size
        if p.chunked_prefill:
            if room <= 0:
                break
            if padded > room:
                take, padded = room, room
        elif batch > 0 and padded >= room:
            break
        admit_head(p, s, e, r, now_s, hits, computed, take)
        tokens += take
        attention_s += prefill_s(p, t, take, computed)
        room -= padded
        reserved += size
        if computed + take == total:
            reserved += min(q.output, CLIP_MAX_NEW_TOKENS)
        batch += 1
        if v.free_blocks * size - reserved - ahead <= 0:
            v.batch_full = 1
            break
        if room <= 0:
            break
    return tokens, attention_s


@helper
def _tokens_to_come(s: State, e: int, r: int) -> int:
    """Sum over the decoding requests of the tokens to come, of each as far as is foreseen."""
    v = s.replica[e, r]
    tokens = 0
    request = v.run_head
    while request >= 0:
        q = s.request[e, request]
        if q.join_iter >= 0:
            left = q.output - q.generated - (v.iteration - q.join_iter)
            tokens += min(left, CLIP_MAX_NEW_TOKENS)
        request = q.next_request
    return tokens


@inlined
def _feed_sglang(p: Params, s: State, e: int, r: int, now_s: float) -> bool:
    """Give decoding requests their blocks; return whether the next step may admit others."""
    v = s.replica[e, r]
    lagging = v.num_lagging
    v.num_lagging = 0
    if v.num_decodes == 0:
        again = v.batch_full > 0 or lagging > 0
        forget_pressure(s, e, r)
        return again
    residue = v.iteration % p.block_size
    if s.phase[e, r, residue] > v.free_blocks:
        _retract_decodes(p, s, e, r, now_s)
        v.batch_full = 0
    if lagging > 0:
        v.batch_full = 0
    take_for_decodes(p, s, e, r, s.phase[e, r, residue])
    return v.batch_full == 0


@helper
def _retract_decodes(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """Retract those with the fewest output tokens until the others can decode; estimate anew."""
    v = s.replica[e, r]
    residue = v.iteration % p.block_size
    while s.phase[e, r, residue] > v.free_blocks and v.num_decodes > 1:
        victim, fewest, longest = -1, 0, 0
        request = v.run_head
        while request >= 0:
            q = s.request[e, request]
            generated = q.generated + v.iteration - q.join_iter
            if victim < 0 or generated < fewest or (generated == fewest and q.prompt >= longest):
                victim, fewest, longest = request, generated, q.prompt
            request = q.next_request
        retract(p, s, e, r, victim, now_s)
    generated, output = 0, 0
    request = v.run_head
    while request >= 0:
        q = s.request[e, request]
        generated += q.generated + v.iteration - q.join_iter
        output += q.output
        request = q.next_request
    foreseen = generated + RETRACT_DECODE_STEPS * v.num_decodes
    v.ratio = min(1.0, foreseen / (output + 1))
    v.ratio_since = v.iteration + 1
