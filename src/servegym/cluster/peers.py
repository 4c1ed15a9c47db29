"""Fetching a prefix from the caches of another replica: docs/kv-tiers.md.

A peer has blocks in its prefix cache and in the memory of its host. What is fetched is a part of a
load (`loads`): from the beginning to the landing the peer holds the blocks that come from its GPU,
as the `source` of the request's `State.transfer`.
"""

from __future__ import annotations

import math

import numpy as np

from servegym.cluster.blocks import hold_matched
from servegym.cluster.identities import identity_of, segment_before, segment_of
from servegym.cluster.jit import helper, inlined
from servegym.cluster.pool import find_block
from servegym.cluster.remote import are_enough, release_source, sent_s
from servegym.cluster.state import DOWN, HOST, PEER, STEP, Params, State
from servegym.cluster.stretches import catch_up, cut_stretch
from servegym.cluster.tiers import tier_with, touch


@inlined
def _ended_by_s(r: int, peer: int, now_s: float) -> float:
    """Until when steps of a peer have ended for a replica whose turn it is.

    Engines that are due at the same instant have their turns in their order.
    """
    return now_s if peer < r else np.nextafter(now_s, -math.inf)


@helper
def _on_gpu(p: Params, s: State, e: int, peer: int, identity: int) -> int:
    """The block of a peer's GPU with some content, -1: it has none, or computes it right now.

    An engine gives blocks their identities when the step that fills them begins.
    """
    v, size = s.replica[e, peer], p.block_size
    block = find_block(s.prefix_cache[e, peer], s.block[e, peer], identity)
    request = v.first_prefill if block >= 0 and v.mode == STEP else -1
    while request >= 0:
        q = s.request[e, request]
        row = s.table[e, peer, q.seq_slot]
        for j in range(q.computed // size, (q.computed + q.chunk) // size):
            if row[j] == block:
                return -1
        request = q.next_request
    return block


@helper
def _num_there(
    p: Params, s: State, e: int, peer: int, request: int, first: int, stop: int, now_s: float
) -> int:
    """Count the blocks of a request from `first` to `stop` that a peer has without a gap."""
    seg = s.request[e, request].segment_first
    for j in range(first, stop):
        seg = segment_of(p, s, e, request, j, seg)
        identity = identity_of(s, e, request, j, seg)
        if _on_gpu(p, s, e, peer, identity) < 0 and (
            tier_with(p, s, e, peer, identity, now_s) != HOST
        ):
            return j - first
    return stop - first


@helper
def find_peer(
    p: Params, s: State, e: int, r: int, request: int, here: int, stop: int, now_s: float
) -> tuple[int, int]:
    """Look for the peer that has most of what a replica and its tiers lack of a request.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        r: Replica.
        request: The head of its queue.
        here: Leading blocks that the replica and its tiers have.
        stop: Blocks that may be found in all.
        now_s: Time, seconds.

    Returns:
        The first one that has the most, and the blocks that are to be fetched: 0 if what there
        would be is not as much longer as the threshold says.
    """
    best, most = -1, 0
    for peer in range(s.env[e].num_replicas):
        if peer == r or s.replica[e, peer].mode == DOWN or are_enough(p, s, e, peer):
            continue
        catch_up(p, s, e, peer, _ended_by_s(r, peer, now_s))
        blocks = _num_there(p, s, e, peer, request, here, stop, now_s)
        if blocks > most:
            best, most = peer, blocks
    if here + most <= p.balancing_threshold * here:
        return -1, 0
    return best, most


@inlined
def fetched_s(
    p: Params, s: State, e: int, r: int, peer: int, blocks: int, now_s: float
) -> tuple[float, float]:
    """When the links will be free of so many blocks, and when these land; the fetching one posts.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        r: Replica.
        peer: The one from which they come.
        blocks: How many.
        now_s: Time, seconds.
    """
    free_s = sent_s(p, s, e, peer, r, r, blocks, now_s)
    return free_s, free_s + p.link_latency_s[s.replica[e, r].type_idx]


@helper
def begin_fetch(
    p: Params, s: State, e: int, r: int, peer: int, request: int, first: int, now_s: float
) -> None:
    """Begin to fetch blocks of a request from `first` on; the peer holds those of its GPU."""
    q, t = s.request[e, request], s.transfer[e, request]
    v, count = s.replica[e, peer], s.load[e, request].blocks[PEER]
    free_s = fetched_s(p, s, e, r, peer, count, now_s)[0]
    s.link[e, peer].out_free_s = free_s
    s.link[e, r].in_free_s = free_s
    row = s.table[e, peer, s.free_slots[e, peer, v.num_free_slots - 1]]
    held, seg = 0, q.segment_first
    for j in range(first, first + count):
        seg = segment_of(p, s, e, request, j, seg)
        block = _on_gpu(p, s, e, peer, identity_of(s, e, request, j, seg))
        if block >= 0:
            row[held] = block
            held += 1
    seg = q.segment_stop
    for j in range(first + count - 1, first - 1, -1):
        seg = segment_before(p, s, e, request, j, seg)
        identity = identity_of(s, e, request, j, seg)
        if _on_gpu(p, s, e, peer, identity) < 0:
            touch(s, e, peer, HOST, identity)
    own_slot, own_blocks = q.seq_slot, q.table_len
    hold_matched(p, s, e, peer, request, held)
    t.source = peer
    t.source_slot = q.seq_slot
    t.source_blocks = held
    q.seq_slot = own_slot
    q.table_len = own_blocks
    s.link[e, peer].num_holding += 1
    # its free blocks last for fewer steps
    cut_stretch(p, s, e, peer, _ended_by_s(r, peer, now_s))


@inlined
def end_fetch(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> None:
    """What was fetched has come: the peer is free of it."""
    num_bytes = s.load[e, request].blocks[PEER] * p.kv_block_bytes
    s.link[e, s.transfer[e, request].source].out_bytes += num_bytes
    s.link[e, r].in_bytes += num_bytes
    release_source(p, s, e, request, now_s, now_s)


@helper
def lose_fetches(s: State, e: int, peer: int) -> None:
    """A peer fails: what is fetched from it will not come, which is noticed when it should have."""
    for request in range(s.env[e].num_requests):
        load, t = s.load[e, request], s.transfer[e, request]
        if load.hits >= 0 and load.blocks[PEER] > 0 and t.source == peer:
            t.source = -1
            load.blocks[PEER] = 0
