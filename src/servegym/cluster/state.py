"""The simulator's arrays: constants shared by all environments, and state per environment."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.typing import FloatArray, Int32Array, IntArray

Records = NDArray[np.void]

# Request status
PENDING, QUEUED, RUNNING, FINISHED, REJECTED, HELD, RETURNED = range(7)
# What a replica is doing
IDLE, WAKING, STEP, DECODE, DOWN = range(5)
# Fault kinds
FAULT_SLOW, FAULT_DOWN, FAULT_UP = range(3)
# Event-log kinds
(
    EV_ARRIVE,
    EV_DISPATCH,
    EV_ADMIT,
    EV_FIRST_TOKEN,
    EV_PREEMPT,
    EV_FINISH,
    EV_REJECT,
    EV_HOLD,
    EV_RETURN,
) = range(9)
# Why `advance` came back
DECISION, DONE, LOG_FULL = range(3)
# Actions that are not a replica
HOLD, REJECT = -1, -2

#: Step durations are counted in log-spaced bins: `ITL_BINS_PER_DECADE` from `ITL_FIRST_S` on.
ITL_FIRST_S = 1e-4
ITL_BINS_PER_DECADE = 50
NUM_ITL_BINS = 8 * ITL_BINS_PER_DECADE


class Params(NamedTuple):
    """What does not change during a run; axes: T replica types, knots of `costs.grid`."""

    cpu_s: FloatArray  # [T]
    dense_tokens: FloatArray  # [T, NUM_DENSE_KNOTS]
    dense_s: FloatArray
    prefill_chunk: FloatArray  # [T, NUM_CHUNK_KNOTS]
    prefill_context: FloatArray  # [T, NUM_CONTEXT_KNOTS]
    prefill_s: FloatArray  # [T, NUM_CHUNK_KNOTS, NUM_CONTEXT_KNOTS]
    decode_batch: FloatArray  # [T, NUM_BATCH_KNOTS]
    decode_kv: FloatArray  # [T, NUM_KV_KNOTS]
    decode_s: FloatArray  # [T, NUM_BATCH_KNOTS, NUM_KV_KNOTS]
    num_blocks: IntArray  # [T] KV blocks of a replica
    max_num_batched_tokens: IntArray  # [T] token budget of a step
    max_num_seqs: IntArray  # [T]
    nominal: FloatArray  # [T, NUM_NOMINAL] static facts for the observation, see policy.contract
    slo_s: FloatArray  # [num_classes, 2] TTFT and TPOT limits, seconds
    slo_weight: FloatArray  # [num_classes]
    block_size: int
    prefix_caching: bool
    chunked_prefill: bool
    allow_hold: bool
    allow_reject: bool
    hold_s: float
    metrics_interval_s: float  # 0: metrics are always fresh
    noise_sigma: float
    noise_period_steps: int
    record: bool  # write the event log, the step log and the ITL histogram


#: One request. Token counts of a decoding request are as of `join_iter`.
REQUEST_DTYPE = np.dtype(
    [
        # inputs
        ("arrival_s", "f8"),
        ("predicted", "f8"),  # output tokens
        ("prompt", "i4"),  # tokens
        ("output", "i4"),  # tokens
        ("seg_first", "i4"),  # prefix segments, rows seg_first..seg_stop-1 of `segment`
        ("seg_stop", "i4"),
        ("slo_class", "i2"),
        # progress
        ("status", "i1"),
        ("replica", "i2"),  # -1 before the dispatch
        ("computed", "i4"),  # tokens in the KV cache
        ("generated", "i4"),  # output tokens
        ("chunk", "i4"),  # prompt tokens in the step in progress
        ("join_iter", "i8"),  # replica's step count when decoding began; -1 while prefilling
        ("dispatch_s", "f8"),
        ("scheduled_s", "f8"),  # first admission
        ("first_token_s", "f8"),
        ("finish_s", "f8"),  # end or rejection
        ("last_token_s", "f8"),  # last token before decoding stopped; for the inter-token gap
        ("num_preemptions", "i2"),
        ("num_restarts", "i2"),
        ("num_holds", "i2"),
        ("cached", "i4"),  # prefix tokens found at the first admission; -1 before
        ("hit_hint", "i4"),  # tokens the router believed cached at dispatch
        ("preset_hit", "i4"),  # tokens taken as cached at admission, without prefix caching
        ("next_request", "i4"),  # links of waiting queues and running lists
        ("prev_request", "i4"),
        ("heap_pos", "i4"),  # place in the replica's end heap, -1: not in it
        ("seq_slot", "i4"),  # row of the block table
        ("table_len", "i4"),  # blocks in that row
    ],
    align=True,
)
#: One replica. "Settled" counts do not contain the decode stretch in progress.
REPLICA_DTYPE = np.dtype(
    [
        # inputs
        ("base_speed", "f8"),
        ("type_idx", "i2"),
        # engine
        ("mode", "i1"),
        ("speed", "f8"),  # base_speed times the multiplier of a SLOW fault
        ("free_blocks", "i8"),  # settled
        ("wait_head", "i4"),
        ("wait_tail", "i4"),
        ("num_waiting", "i4"),
        ("run_head", "i4"),
        ("run_tail", "i4"),
        ("num_running", "i4"),
        ("first_prefill", "i4"),  # first running request that is not decoding, -1: none
        ("num_decodes", "i4"),
        ("kv_tokens", "i8"),  # sum of computed over decoding requests, settled
        ("emitted", "i8"),  # output tokens of its requests that have not ended, settled
        ("iteration", "i8"),  # steps ended, settled
        ("num_joined", "i8"),  # requests that began to decode there; orders equal ends
        ("seg_begin_s", "f8"),  # start of the step or decode stretch in progress
        ("seg_steps", "i8"),  # steps in it
        ("seg_factor", "f8"),  # noise / speed in it
        ("num_ends", "i4"),  # size of the end heap
        ("event_pos", "i4"),  # place in `due`
        ("num_reserve", "i4"),  # blocks taken by decodes and not yet given to one
        ("num_free_slots", "i4"),
        # router's book-keeping
        ("outstanding", "i4"),  # requests
        ("outstanding_prompt", "i8"),  # tokens
        ("pending_prefill", "i8"),  # prompt tokens less the believed hit, before the 1st token
        ("outstanding_predicted", "f8"),  # tokens
        ("recent_ttft_s", "f8"),  # moving averages, 0 before the first
        ("recent_tpot_s", "f8"),
        ("last_dispatch_s", "f8"),  # -inf before the first
    ],
    align=True,
)
#: One environment.
ENV_DTYPE = np.dtype(
    [
        ("num_requests", "i8"),
        ("num_replicas", "i8"),
        ("num_faults", "i8"),
        ("noise_seed", "u8"),
        ("now_s", "f8"),
        ("next_arrival", "i8"),
        ("deciding", "i8"),  # request that waits for a decision, -1: none
        ("next_fault", "i8"),
        ("next_scrape_s", "f8"),
        ("last_scrape_s", "f8"),
        ("hold_first", "i8"),  # rings of held and returned requests
        ("hold_count", "i8"),
        ("return_first", "i8"),
        ("return_count", "i8"),
        ("in_system", "i8"),
        ("area", "f8"),  # integral of in_system, request-seconds
        ("area_until_s", "f8"),
        ("num_ended", "i8"),  # finished or rejected
        ("good", "f8"),  # weight of requests that ended within their SLOs
        ("arrival_gap_s", "f8"),  # moving average of inter-arrival times
        ("last_arrival_s", "f8"),
        ("engine_steps", "i8"),  # steps ended
        ("log_len", "i8"),
        ("step_len", "i8"),
    ],
    align=True,
)
SEGMENT_DTYPE = np.dtype([("key", "i8"), ("end", "i4")], align=True)
END_DTYPE = np.dtype([("key", "i8"), ("request", "i4")], align=True)
DUE_DTYPE = np.dtype([("time_s", "f8"), ("replica", "i4")], align=True)
BLOCK_DTYPE = np.dtype(
    [("identity", "i8"), ("holders", "i4"), ("after", "i4"), ("before", "i4")], align=True
)
KNOWN_DTYPE = np.dtype([("identity", "i8"), ("block", "i4")], align=True)
HELD_DTYPE = np.dtype([("until_s", "f8"), ("request", "i4")], align=True)
FAULT_DTYPE = np.dtype(
    [("time_s", "f8"), ("value", "f8"), ("replica", "i2"), ("kind", "i1")], align=True
)


class State(NamedTuple):
    """What changes; axes: E environments, N requests, R replicas, and as noted.

    Records, not one array a field: a request's fields are used together, so they share cache
    lines, and a kernel takes 19 arguments instead of 130, which decides how long it compiles.
    """

    request: Records  # REQUEST_DTYPE[E, N]
    replica: Records  # REPLICA_DTYPE[E, R]
    env: Records  # ENV_DTYPE[E]
    segment: Records  # SEGMENT_DTYPE[E, S]
    phase: Int32Array  # [E, R, block_size] decodes that need a block at step count = index
    ends: Records  # END_DTYPE[E, R, max_num_seqs] heap; key: last step << 32 | order of joining
    due: Records  # DUE_DTYPE[E, R] heap of replicas by their next event
    block: Records  # BLOCK_DTYPE[E, R, B + 1]; holders, free list with its end at index B
    known: Records  # KNOWN_DTYPE[E, R, H] hash map from identity to block; 0: empty
    reserve: Int32Array  # [E, R, B] blocks taken by decodes, not yet given to one
    table: Int32Array  # [E, R, max_num_seqs, W] block table
    free_slots: Int32Array  # [E, R, max_num_seqs] unused rows of it
    scraped: FloatArray  # [E, NUM_SCRAPED, R]
    held: Records  # HELD_DTYPE[E, N] ring
    returned: Int32Array  # [E, N] ring of requests returned by failed replicas
    fault: Records  # FAULT_DTYPE[E, F]
    itl_count: IntArray  # [E, NUM_ITL_BINS] inter-token times
    log: Records  # outcome.EVENT_DTYPE[E, L]
    steps: Records  # outcome.STEP_DTYPE[E, L]


#: Rows of `State.scraped`.
SCRAPED_RUNNING, SCRAPED_WAITING, SCRAPED_KV_USAGE, SCRAPED_EMITTED = range(4)
NUM_SCRAPED = 4
