"""The requests of a replica: its running list and its waiting queue, and stretches of decodes."""

from __future__ import annotations

from servegym.cluster.blocks import hold_matched, match, release, take_for_chunk
from servegym.cluster.heap import remove_end, set_event
from servegym.cluster.jit import helper, inlined
from servegym.cluster.log import log_event
from servegym.cluster.retention import is_retained, let_go
from servegym.cluster.state import (
    DECODE,
    EV_ADMIT,
    EV_PREEMPT,
    QUEUED,
    RUNNING,
    STEP,
    Params,
    State,
)
from servegym.cluster.steptime import (
    decode_span_s,
    decode_steps_past,
    dense_s,
    mixed_s,
    step_factor,
)
from servegym.cluster.tiers import store_text


@inlined
def at_hand(p: Params, s: State, e: int, r: int, request: int) -> tuple[int, int, int]:
    """What a waiting request would not have to compute if it were admitted now.

    Returns:
        Its leading blocks in the prefix cache, how many of them nobody holds, and the tokens whose
        KV is there: those of the blocks, or those that have landed.
    """
    q = s.request[e, request]
    most = q.prompt + q.generated - 1  # one token at least is computed
    if not p.prefix_caching:
        return 0, 0, min(q.landed_tokens, most)
    return at_hand_up_to(p, s, e, r, request, most // p.block_size)


@inlined
def at_hand_up_to(
    p: Params, s: State, e: int, r: int, request: int, blocks: int
) -> tuple[int, int, int]:
    """The same by at most so many blocks of the prefix cache."""
    hits, unheld = match(p, s, e, r, request, blocks)
    return hits, unheld, hits * p.block_size


@inlined
def admit_head(
    p: Params,
    s: State,
    e: int,
    r: int,
    now_s: float,
    hits: int,
    computed: int,
    take: int,
) -> None:
    """Move the head of the waiting queue to the running list and schedule its first chunk.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        r: Replica.
        now_s: Time, seconds.
        hits: Blocks of it in the prefix cache, as `blocks.match` has just found them.
        computed: Tokens of it that need not be computed.
        take: Tokens of the chunk.
    """
    v = s.replica[e, r]
    request = v.wait_head
    q = s.request[e, request]
    v.wait_head = q.next_request
    if v.wait_head < 0:
        v.wait_tail = -1
    v.num_waiting -= 1
    hold_matched(p, s, e, r, request, hits)
    if p.retains and is_retained(s, e, r, q.after):
        let_go(p, s, e, r, q.after)
    link_running(s, e, r, request)
    q.computed = computed
    if q.cached < 0:
        q.cached = computed
        q.scheduled_s = now_s
        log_event(p, s, e, now_s, EV_ADMIT, request, r, computed)
    take_for_chunk(p, s, e, r, request, computed, take)
    q.chunk = take


@inlined
def leave_waiting(s: State, e: int, r: int, request: int) -> None:
    """Take a request out of the waiting queue."""
    v = s.replica[e, r]
    q = s.request[e, request]
    before = -1
    other = v.wait_head
    while other != request:
        before = other
        other = s.request[e, other].next_request
    if before >= 0:
        s.request[e, before].next_request = q.next_request
    else:
        v.wait_head = q.next_request
    if v.wait_tail == request:
        v.wait_tail = before
    v.num_waiting -= 1
    q.next_request = -1


@inlined
def link_running(s: State, e: int, r: int, request: int) -> None:
    """Put a request that will compute something of its text at the end of the running list."""
    v = s.replica[e, r]
    q = s.request[e, request]
    tail = v.run_tail
    q.next_request = -1
    q.prev_request = tail
    if tail >= 0:
        s.request[e, tail].next_request = request
    else:
        v.run_head = request
    v.run_tail = request
    v.num_running += 1
    if v.first_prefill < 0:
        v.first_prefill = request
    q.status = RUNNING
    q.join_iter = -1


@inlined
def unlink_running(s: State, e: int, r: int, request: int) -> None:
    """Take a request out of the running list."""
    v = s.replica[e, r]
    q = s.request[e, request]
    before, after = q.prev_request, q.next_request
    if before >= 0:
        s.request[e, before].next_request = after
    else:
        v.run_head = after
    if after >= 0:
        s.request[e, after].prev_request = before
    else:
        v.run_tail = before
    v.num_running -= 1
    q.chunk = 0
    q.next_request = -1
    q.prev_request = -1


@inlined
def stop_decoding(p: Params, s: State, e: int, r: int, request: int) -> int:
    """Before a request leaves the running list: its token counts become current.

    Returns:
        Its tokens in the KV cache when it began to decode, -1 if it is still prefilling.
    """
    v = s.replica[e, r]
    q = s.request[e, request]
    joined = -1
    if q.join_iter >= 0:
        joined = q.computed
        steps = v.iteration - q.join_iter
        s.phase[e, r, block_residue(p, joined, q.join_iter)] -= 1
        q.computed = joined + steps
        q.generated += steps
        q.join_iter = -1
        v.num_decodes -= 1
        v.kv_tokens -= joined + steps
        if q.heap_pos >= 0:
            remove_end(s, e, r, request)
    elif v.first_prefill == request:
        v.first_prefill = q.next_request
    return joined


@inlined
def leave_running(p: Params, s: State, e: int, r: int, request: int) -> None:
    """Take a request off the running list, with its blocks; its token counts become current."""
    joined = stop_decoding(p, s, e, r, request)
    release(p, s, e, r, request, s.request[e, request].computed, joined)
    unlink_running(s, e, r, request)


@inlined
def _interrupt(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> None:
    """Take a request off the running list, to be computed anew."""
    q = s.request[e, request]
    if q.join_iter >= 0 and s.replica[e, r].stalled == 0:
        q.last_token_s = now_s
    leave_running(p, s, e, r, request)
    if p.tiered:
        store_text(p, s, e, r, request, now_s)
    q.computed = 0
    q.landed_tokens = 0
    q.num_preemptions += 1
    q.status = QUEUED
    log_event(p, s, e, now_s, EV_PREEMPT, request, r, 0.0)


@helper
def preempt(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> None:
    """Preempt by recompute: release everything, wait at the front of the queue."""
    v = s.replica[e, r]
    q = s.request[e, request]
    _interrupt(p, s, e, r, request, now_s)
    q.next_request = v.wait_head
    v.wait_head = request
    if v.wait_tail < 0:
        v.wait_tail = request
    v.num_waiting += 1


@helper
def retract(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> None:
    """Preempt by recompute as SGLang does: the request waits at the end of the queue."""
    v = s.replica[e, r]
    _interrupt(p, s, e, r, request, now_s)
    tail = v.wait_tail
    if tail >= 0:
        s.request[e, tail].next_request = request
    else:
        v.wait_head = request
    v.wait_tail = request
    v.num_waiting += 1


@inlined
def block_residue(p: Params, computed: int, join_iter: int) -> int:
    """Step count, modulo the block size, at which a request decoding since then needs a block."""
    return (join_iter - computed) % p.block_size


@inlined
def blocks_to_end(p: Params, s: State, e: int, request: int) -> int:
    """Blocks a request holds when its last token comes out."""
    q = s.request[e, request]
    return (q.prompt + q.output - 1 + p.block_size - 1) // p.block_size


@inlined
def blocks_for_steps(p: Params, s: State, e: int, r: int, first: int, count: int) -> int:
    """Blocks that the decoding requests take in `count` steps from step count `first` on."""
    size = p.block_size
    cycles = count // size
    blocks = cycles * s.replica[e, r].num_decodes
    i = first % size
    for _ in range(count - cycles * size):
        blocks += s.phase[e, r, i]
        i += 1
        if i == size:
            i = 0
    return blocks


@inlined
def _steps_with_blocks(p: Params, s: State, e: int, r: int, steps: int, spare: int) -> int:
    """Cut a stretch of decode steps where blocks run out; its first step has its blocks."""
    v = s.replica[e, r]
    free = v.free_blocks - spare
    batch = v.num_decodes
    size = p.block_size
    if free < 0:
        return 1
    if free >= batch * ((steps - 2) // size + 1):
        return steps
    cycles = free // batch
    left = free - cycles * batch
    done = 1 + cycles * size
    i = v.iteration + done
    while done < steps:
        left -= s.phase[e, r, i % size]
        if left < 0:
            break
        done += 1
        i += 1
    return min(done, steps)


@inlined
def begin_decodes(
    p: Params, s: State, e: int, r: int, now_s: float, single: bool, spare: int
) -> None:
    """Begin a stretch of decode steps up to where something changes.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        r: Replica; its decoding requests have the blocks of the first step.
        now_s: Time, seconds.
        single: One step only.
        spare: Blocks that must be free besides those a step takes.
    """
    v = s.replica[e, r]
    t = v.type_idx
    batch = v.num_decodes
    factor = step_factor(p, s, e, r)
    v.stretch_begin_s = now_s
    v.stretch_factor = factor
    v.mode = DECODE
    v.is_pure = v.num_waiting == 0
    steps = (s.ends[e, r, 0].key >> 32) - v.iteration
    if p.noise_sigma > 0.0:
        past = (v.iteration + v.prefill_steps) % p.noise_period_steps
        steps = min(steps, p.noise_period_steps - past)
    if single:
        steps = 1
    steps = _steps_with_blocks(p, s, e, r, steps, spare)
    if p.tiered and now_s < v.slowed_until_s:
        factor *= p.interference
        v.stretch_factor = factor
        slowed_s = (v.slowed_until_s - now_s) / factor
        steps = decode_steps_past(p, t, batch, v.kv_tokens + batch, slowed_s, steps)
    v.stretch_steps = steps
    span = decode_span_s(p, t, batch, v.kv_tokens + batch, steps)
    set_event(s, e, r, now_s + factor * span)


@inlined
def begin_mixed(
    p: Params,
    s: State,
    e: int,
    r: int,
    now_s: float,
    batch: int,
    tokens: int,
    attention_s: float,
) -> None:
    """Begin a step that prefills, beside `batch` decodes.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        r: Replica.
        now_s: Time, seconds.
        batch: Requests that decode.
        tokens: Of the step, theirs included.
        attention_s: Of its prefills.
    """
    v = s.replica[e, r]
    t = v.type_idx
    factor = step_factor(p, s, e, r)
    if p.tiered and now_s < v.slowed_until_s:
        factor *= p.interference
    v.stretch_begin_s = now_s
    v.stretch_factor = factor
    v.mode = STEP
    v.stretch_steps = 1
    if batch > 0:
        attention_s += mixed_s(p, t, batch, v.kv_tokens + batch)
        attention_s += p.empty_tiles_s[t] * batch * _longest_chunk(s, e, r)
    duration = max(dense_s(p, t, tokens) + attention_s, p.eager_s[t]) * factor
    set_event(s, e, r, now_s + duration)


@inlined
def _longest_chunk(s: State, e: int, r: int) -> int:
    longest = 0
    request = s.replica[e, r].first_prefill
    while request >= 0:
        longest = max(longest, s.request[e, request].chunk)
        request = s.request[e, request].next_request
    return longest
