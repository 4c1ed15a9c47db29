"""What becomes of the KV of a request that has ended: kept, offloaded, left or dropped.

Where somebody decides (`Asks.retain`), a turn keeps its blocks until the engines that are due have
had their turns, and then the decision is due. If they need the blocks at that very instant, it is
decided as where nobody does: what is let go is offloaded, if there are tiers.
"""

from __future__ import annotations

from numba import types

from servegym.cluster.entry import SETTLE_TURN, entry
from servegym.cluster.identities import identity_of, segment_of
from servegym.cluster.jit import helper, inlined
from servegym.cluster.pool import find_block, unlink
from servegym.cluster.retention import is_retained, keep_until, let_go, retain
from servegym.cluster.state import (
    ALWAYS,
    DROP,
    EXPIRY,
    KEEP,
    LEAVE,
    NEVER,
    NUM_TIERS,
    OFFLOAD,
    RETAIN,
    RETAINING,
    Params,
    State,
)
from servegym.cluster.stretches import cut_stretch
from servegym.cluster.tiers import store_text


@helper
def end_turn(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> None:
    """A request has ended and released its blocks: decide what becomes of them, or let it wait."""
    q = s.request[e, request]
    goes_on = q.first_after >= 0
    if p.asks.retain == ALWAYS or (p.asks.retain != NEVER and goes_on):
        retain(p, s, e, r, request, now_s, RETAINING)
        return
    if p.tiered:
        store_text(p, s, e, r, request, now_s)
    if p.retain_kv_s > 0.0 and goes_on:
        retain(p, s, e, r, request, now_s + p.retain_kv_s, EXPIRY)


@inlined
def ask_retention(s: State, e: int, request: int) -> None:
    """What becomes of the KV of a turn is to be decided, unless it has been let go meanwhile."""
    env, r = s.env[e], s.request[e, request].replica
    if is_retained(s, e, r, request):
        env.decision = RETAIN
        env.deciding = request
        env.asking = r


@inlined
def may_retain(p: Params, s: State, e: int, r: int, answer: int) -> bool:
    """Whether this can become of the KV of a turn."""
    if answer == OFFLOAD:
        num_blocks = 0
        for tier in range(NUM_TIERS):
            num_blocks += p.tier_num_blocks[s.replica[e, r].type_idx, tier]
        return num_blocks > 0
    return answer in (DROP, LEAVE, KEEP)


@entry(SETTLE_TURN, types.void, *[types.int64] * 4)
def settle_turn(p: Params, s: State, e: int, r: int, request: int, answer: int) -> None:
    """Do with the KV of a turn what was decided."""
    now_s = s.env[e].now_s
    if p.tiered and answer in (OFFLOAD, KEEP):
        store_text(p, s, e, r, request, now_s)
        if s.replica[e, r].slowed_until_s > now_s:
            cut_stretch(p, s, e, r, now_s)
    if answer == KEEP:
        keep_until(s, e, r, request, now_s + s.env[e].keep_s)
        return
    kept = s.request[e, request].table_len
    let_go(p, s, e, r, request)
    if answer == DROP:
        _put_first(p, s, e, r, request, kept)


@inlined
def _put_first(p: Params, s: State, e: int, r: int, request: int, count: int) -> None:
    """Let the first `count` blocks of a request be taken next, the last of them first."""
    q = s.request[e, request]
    blocks, prefix_cache = s.block[e, r], s.prefix_cache[e, r]
    end = blocks.shape[0] - 1
    seg = q.segment_first
    for j in range(count):
        seg = segment_of(p, s, e, request, j, seg)
        block = find_block(prefix_cache, blocks, identity_of(s, e, request, j, seg))
        if blocks[block].holders == 0 and blocks[block].keepers == 0:
            unlink(blocks, block)
            after = blocks[end].after
            blocks[block].before = end
            blocks[block].after = after
            blocks[after].before = block
            blocks[end].after = block
