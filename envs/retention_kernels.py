"""What the scheduler of a replica sees when a turn has ended there, and what it may answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from numba import types

from servegym.cluster.entry import SEE_TIERS, SEE_TURN, entry
from servegym.cluster.identities import identity_of, segment_of
from servegym.cluster.jit import inlined
from servegym.cluster.loads import recompute_s
from servegym.cluster.pool import find_block
from servegym.cluster.running import blocks_for_steps
from servegym.cluster.state import (
    DECODE,
    KEEP,
    NUM_RETENTIONS,
    NUM_TIERS,
    STORE,
    Params,
    State,
)
from servegym.cluster.stretches import steps_ended_by
from servegym.cluster.turns import may_retain
from servegym.policy.contract import NO_BOUND, Feature, Group
from servegym.typing import Float32Array, FloatArray, Int8Array, IntArray

#: Of a turn that has ended, when it is to be decided what becomes of its KV.
TURN_FEATURES = (
    Feature("kept_tokens", 0, NO_BOUND, "tokens", Group.METRICS, "of its text, in full blocks"),
    Feature("kept_share", 0, 1, "-", Group.METRICS, "of the replica's blocks, that these are"),
    Feature("recompute_s", 0, NO_BOUND, "s", Group.METRICS, "of the steps that compute them alone"),
    Feature("in_host", 0, 1, "-", Group.METRICS, "share of them that the host has a copy of"),
    Feature("in_disk", 0, 1, "-", Group.METRICS, "share that the disk has a copy of"),
    Feature("in_store", 0, 1, "-", Group.METRICS, "share that the store has a copy of"),
    Feature("prompt_tokens", 0, NO_BOUND, "tokens", Group.METRICS, "of its prompt"),
    Feature("output_tokens", 0, NO_BOUND, "tokens", Group.METRICS, "of its answer"),
    Feature("cached_tokens", 0, NO_BOUND, "tokens", Group.METRICS, "found at its first admission"),
    Feature("latency_s", 0, NO_BOUND, "s", Group.METRICS, "from its arrival to its end"),
    Feature(
        "num_turns", 0, NO_BOUND, "requests", Group.METRICS, "of its session so far, with this one"
    ),
    Feature("session_s", 0, NO_BOUND, "s", Group.METRICS, "since the first of them arrived"),
    Feature(
        "tool", -1, NO_BOUND, "-", Group.METRICS, "number of what it waits for; -1: nobody says it"
    ),
    Feature(
        "num_gaps",
        0,
        NO_BOUND,
        "requests",
        Group.METRICS,
        "that have come back from this tool so far, of turns that were asked about",
    ),
    Feature(
        "typical_gap_s", 0, NO_BOUND, "s", Group.METRICS, "after which they did, geometric mean"
    ),
    Feature(
        "gap_spread",
        0,
        NO_BOUND,
        "-",
        Group.METRICS,
        "standard deviation of their logarithms",
    ),
)
(
    KEPT_TOKENS,
    KEPT_SHARE,
    RECOMPUTE_S,
    IN_HOST,
    _IN_DISK,
    _IN_STORE,
    TURN_PROMPT_TOKENS,
    TURN_OUTPUT_TOKENS,
    TURN_CACHED_TOKENS,
    TURN_LATENCY_S,
    NUM_TURNS,
    SESSION_S,
    TOOL,
    NUM_GAPS,
    TYPICAL_GAP_S,
    GAP_SPREAD,
) = range(len(TURN_FEATURES))
#: Of a replica: its GPU's blocks, its tiers and their links.
TIER_FEATURES = (
    Feature(
        "free_blocks",
        0,
        NO_BOUND,
        "blocks",
        Group.METRICS,
        "on the GPU, that neither requests nor retained turns hold",
    ),
    Feature(
        "retained_blocks", 0, NO_BOUND, "blocks", Group.METRICS, "that only retained turns hold"
    ),
    Feature("num_running", 0, NO_BOUND, "requests", Group.METRICS, "in the running list"),
    Feature("num_waiting", 0, NO_BOUND, "requests", Group.METRICS, "in the queue"),
    Feature("num_coming", 0, NO_BOUND, "requests", Group.METRICS, "whose KV comes or has landed"),
    Feature("host_fill", 0, 1, "-", Group.METRICS, "share of the host tier that is full"),
    Feature("disk_fill", 0, 1, "-", Group.METRICS, "share of the disk that is full"),
    Feature("store_fill", 0, 1, "-", Group.METRICS, "share of the store that is full"),
    Feature("host_read_s", 0, NO_BOUND, "s", Group.METRICS, "until the host will have sent all"),
    Feature("disk_read_s", 0, NO_BOUND, "s", Group.METRICS, "until the disk will have"),
    Feature("store_read_s", 0, NO_BOUND, "s", Group.METRICS, "until the store will have"),
    Feature("host_write_s", 0, NO_BOUND, "s", Group.METRICS, "until all is written to the host"),
    Feature("disk_write_s", 0, NO_BOUND, "s", Group.METRICS, "until all is written to the disk"),
    Feature("store_write_s", 0, NO_BOUND, "s", Group.METRICS, "until all is written to the store"),
    Feature(
        "slowed_s", 0, NO_BOUND, "s", Group.METRICS, "for which KV moves between GPU and tiers"
    ),
)
(
    FREE_BLOCKS,
    RETAINED_BLOCKS,
    TIERS_NUM_RUNNING,
    TIERS_NUM_WAITING,
    TIERS_NUM_COMING,
    HOST_FILL,
    _DISK_FILL,
    _STORE_FILL,
    HOST_READ_S,
    _DISK_READ_S,
    _STORE_READ_S,
    HOST_WRITE_S,
    _DISK_WRITE_S,
    _STORE_WRITE_S,
    SLOWED_S,
) = range(len(TIER_FEATURES))
#: Columns of `Turns.gaps`; behind them how many gaps were over within each time to keep KV for.
_COUNT, _LOG_SUM, _LOG_SQUARES = range(3)
_NUM_SUMS = 3
#: Shorter gaps count as this, for logarithms.
_SHORTEST_GAP_S = 1e-3


class Turns(NamedTuple):
    """How long KV may be kept, and what has been seen of turns; sizes are 0 where nobody is asked.

    Axes: E environments, N requests of the simulator, L tools, K times.
    """

    keep_s: FloatArray  # [K] ascending
    tool: IntArray  # [E, N] 1 + number of what runs before a request arrives; 0: nobody says it
    number: IntArray  # [E, N] of the turn in its session, from 1
    first: IntArray  # [E, N] first request of its session
    awaited: IntArray  # [E, N] the requests that turns wait for that were asked about
    num_awaited: IntArray  # [E]
    gaps: FloatArray  # [E, L, _NUM_SUMS + K] of those that have come: sums, and how many by when


def turn_features(keep_s: Sequence[float]) -> tuple[Feature, ...]:
    """Return the features of a turn, with one more for each time that KV may be kept for."""
    within = (
        Feature(
            f"back_within_{seconds:g}_s",
            0,
            1,
            "-",
            Group.METRICS,
            f"share of these gaps that were at most {seconds:g} s",
        )
        for seconds in keep_s
    )
    return (*TURN_FEATURES, *within)


def num_sums(keep_s: Sequence[float]) -> int:
    """Return the columns of `Turns.gaps`."""
    return _NUM_SUMS + len(keep_s)


def num_answers(keep_s: Sequence[float]) -> int:
    """Return the answers to what becomes of a turn: those without a time, then a time each."""
    return NUM_RETENTIONS - 1 + len(keep_s)


@inlined
def begin_turns(s: State, m: Turns, e: int) -> None:
    """An episode begins: number the turns of its sessions, and forget the gaps of the last one."""
    m.num_awaited[e] = 0
    for i in range(m.gaps.shape[1]):
        for j in range(m.gaps.shape[2]):
            m.gaps[e, i, j] = 0.0
    for i in range(s.env[e].num_requests):
        before = s.request[e, i].after
        m.number[e, i] = 1 + m.number[e, before] if before >= 0 else 1
        m.first[e, i] = m.first[e, before] if before >= 0 else i


@inlined
def note_turn(s: State, m: Turns, e: int) -> None:
    """A turn is asked about: learn the gaps of earlier ones that are over, and await its next."""
    now_s = s.env[e].now_s
    left = 0
    for i in range(m.num_awaited[e]):
        request = m.awaited[e, i]
        q = s.request[e, request]
        if not q.arrival_s <= now_s:  # NaN before it comes
            m.awaited[e, left] = request
            left += 1
            continue
        gap_s = q.arrival_s - s.request[e, q.after].finish_s
        log = math.log(max(gap_s, _SHORTEST_GAP_S))
        gaps = m.gaps[e, m.tool[e, request]]
        gaps[_COUNT] += 1.0
        gaps[_LOG_SUM] += log
        gaps[_LOG_SQUARES] += log * log
        for j in range(m.keep_s.shape[0]):
            gaps[_NUM_SUMS + j] += gap_s <= m.keep_s[j]
    m.awaited[e, left] = s.request[e, s.env[e].deciding].first_after
    m.num_awaited[e] = left + 1


@inlined
def allow_answers(p: Params, s: State, e: int, first: int, keeps: int, mask: Int8Array) -> None:
    """Allow what can become of the turn that is asked about, in a mask that is 0."""
    for answer in range(KEEP):
        mask[first + answer] = may_retain(p, s, e, s.env[e].asking, answer)
    for i in range(keeps):
        mask[first + KEEP + i] = 1


@inlined
def core_retention(s: State, m: Turns, e: int, choice: int) -> int:
    """Return the core's answer for one of `num_answers`, and note how long that keeps the KV."""
    if choice < KEEP:
        return choice
    s.env[e].keep_s = m.keep_s[choice - KEEP]
    return KEEP


@inlined
def _write_copies(p: Params, s: State, e: int, r: int, request: int, row: Float32Array) -> None:
    """Write the shares of a retained turn's blocks that the tiers have copies of."""
    q = s.request[e, request]
    for tier in range(NUM_TIERS):
        if p.tier_num_blocks[s.replica[e, r].type_idx, tier] == 0:
            continue
        blocks = s.store_block[e] if tier == STORE else s.tier_block[e, r, tier]
        cache = s.store_cache[e] if tier == STORE else s.tier_cache[e, r, tier]
        seg = q.segment_first
        found = 0
        for j in range(q.table_len):
            seg = segment_of(p, s, e, request, j, seg)
            found += find_block(cache, blocks, identity_of(s, e, request, j, seg)) >= 0
        row[IN_HOST + tier] = found / q.table_len


@entry(
    SEE_TURN,
    types.void,
    types.int64,
    types.int64,
    types.int64,
    types.int64,
    types.float64[::1],
    types.float32[::1],
)
def see_turn(
    p: Params,
    s: State,
    e: int,
    number: int,
    first: int,
    tool: int,
    gaps: FloatArray,
    row: Float32Array,
) -> None:
    """Write what the scheduler that is asked sees of the turn.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        number: Of the turn in its session, from 1.
        first: First request of that session.
        tool: Number of what it waits for, -1 if nobody says it.
        gaps: Of that tool, as in `Turns`.
        row: Is given the features, `float32[len(turn_features(keep_s))]`.
    """
    env = s.env[e]
    request, r, now_s = env.deciding, env.asking, env.now_s
    q, t = s.request[e, request], s.replica[e, env.asking].type_idx
    row[:] = 0.0
    row[KEPT_TOKENS] = q.table_len * p.block_size
    row[KEPT_SHARE] = q.table_len / p.num_blocks[t]
    row[RECOMPUTE_S] = recompute_s(p, s, e, r, 0, q.table_len * p.block_size)
    if p.tiered:
        _write_copies(p, s, e, r, request, row)
    row[TURN_PROMPT_TOKENS] = q.prompt
    row[TURN_OUTPUT_TOKENS] = q.generated
    row[TURN_CACHED_TOKENS] = q.cached
    row[TURN_LATENCY_S] = now_s - q.arrival_s
    row[NUM_TURNS] = number
    row[SESSION_S] = now_s - s.request[e, first].arrival_s
    row[TOOL] = tool
    count = gaps[_COUNT]
    row[NUM_GAPS] = count
    if count > 0.0:
        mean = gaps[_LOG_SUM] / count
        row[TYPICAL_GAP_S] = math.exp(mean)
        row[GAP_SPREAD] = math.sqrt(max(0.0, gaps[_LOG_SQUARES] / count - mean * mean))
        for i in range(_NUM_SUMS, gaps.shape[0]):
            row[GAP_SPREAD + 1 + i - _NUM_SUMS] = gaps[i] / count


@inlined
def write_turn(p: Params, s: State, m: Turns, e: int, row: Float32Array) -> None:
    """Write what `see_turn` shows, by what has been seen of turns."""
    request = s.env[e].deciding
    tool = m.tool[e, s.request[e, request].first_after]
    see_turn(
        p,
        s,
        e,
        m.number[e, request],
        m.first[e, request],
        tool - 1,
        m.gaps[e, tool],
        row,
    )


@entry(SEE_TIERS, types.void, types.int64, types.int64, types.float32[::1])
def see_tiers(p: Params, s: State, e: int, r: int, row: Float32Array) -> None:
    """Write what a scheduler sees of where its replica's KV is, `float32[len(TIER_FEATURES)]`."""
    env, v = s.env[e], s.replica[e, r]
    now_s, t = env.now_s, v.type_idx
    row[:] = 0.0
    taken = 0
    if v.mode == DECODE and v.stretch_steps > 1:
        taken = blocks_for_steps(p, s, e, r, v.iteration + 1, steps_ended_by(p, s, e, r, now_s))
    row[FREE_BLOCKS] = max(0, v.free_blocks - v.kept_blocks - taken)
    row[RETAINED_BLOCKS] = v.kept_blocks
    row[TIERS_NUM_RUNNING] = v.num_running
    row[TIERS_NUM_WAITING] = v.num_waiting
    if not p.tiered:
        return
    row[TIERS_NUM_COMING] = s.link[e, r].num_remote
    row[SLOWED_S] = max(0.0, v.slowed_until_s - now_s)
    for tier in range(NUM_TIERS):
        size = p.tier_num_blocks[t, tier]
        if size == 0:
            continue
        k = s.tier[e, r, tier]
        held, read_s, write_s = k.num_blocks, k.read_free_s, k.write_free_s
        if tier == STORE:
            held = env.store_num_blocks
            read_s = max(read_s, env.store_read_free_s)
            write_s = max(write_s, env.store_write_free_s)
        row[HOST_FILL + tier] = held / size
        row[HOST_READ_S + tier] = max(0.0, read_s - now_s)
        row[HOST_WRITE_S + tier] = max(0.0, write_s - now_s)
