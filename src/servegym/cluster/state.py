"""The simulator's arrays: constants shared by all environments, and state per environment."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.typing import BoolArray, FloatArray, Int32Array, IntArray

Records = NDArray[np.void]

# Request status; the last four are of requests that are prefilled in one place and decode in
# another: no place is chosen yet, blocks are set aside there before the prefill, the KV is on its
# way, the KV has landed
PENDING, QUEUED, RUNNING, FINISHED, REJECTED, HELD, RETURNED, ABORTED = range(8)
UNPLACED, RESERVED, TRANSFERRING, LANDED = range(8, 12)
# Roles of replicas: all of a request, its prefill alone, what comes behind the prefill alone
MIXED, PREFILL_ONLY, DECODE_ONLY = range(3)
# What a replica is doing; PREFILL is a step in which its decoding requests pause, FLYING means
# that batches are on the stages of its pipeline
IDLE, WAKING, STEP, DECODE, DOWN, PREFILL, FLYING = range(7)
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
    EV_PREFILLED,
    EV_PLACE,
    EV_TRANSFER,
    EV_LAND,
    EV_PAUSE,
    EV_MIGRATE,
    EV_STAY,
    EV_HOST,
    EV_DISK,
    EV_STORE,
    EV_STORED,
    EV_PEER,
) = range(21)
NUM_EVENTS = 21
# Why `advance` came back
DECISION, DONE, LOG_FULL = range(3)
# Kinds of decisions: which replica a request goes to; and of an engine that goes by priorities
# the order of its requests, whom to admit next, whom to preempt; where a request decodes that is
# prefilled elsewhere; who moves to another replica; what becomes of the KV of a turn that has ended
NO_DECISION, DISPATCH, ORDER, ADMIT, PREEMPT, PLACE, MIGRATE, RETAIN = range(8)
# What can become of it: its blocks are the next to be taken; they are free as any others; they are
# free, and copies of them are written to the tiers; copies are written, and the blocks are kept
DROP, LEAVE, OFFLOAD, KEEP = range(4)
NUM_RETENTIONS = 4
# Tiers behind the KV blocks of a replica: the memory of its host, its disk, the cluster's store
HOST, DISK, STORE = range(3)
NUM_TIERS = 3
# From where KV is loaded: from these, or from the caches of another replica
PEER = NUM_TIERS
NUM_SOURCES = NUM_TIERS + 1
# Whether a kind of decision is asked for: never (a compiled rule decides in its place), where there
# is a choice, or always
NEVER, WHERE_IT_MATTERS, ALWAYS = range(3)
# Kinds of timers, in the order in which those of one instant are due; engines have their turn after
# the faults. COPIED is about a replica from which a request moves; all behind TICK are about a
# request, which has one at a time
FAULT, SCRAPE, COPIED, TICK = range(4)
EXPIRY, RETAINING, LANDING, LEASE, JOINING, PLACING, RETURN, HOLD_OVER, ARRIVAL = range(4, 13)
# Rules that say who moves, and whom of a replica
STAY, BY_FREENESS, BY_QUEUES = range(3)
SHORTEST, LONGEST, LAST, FIRST_WAITING, FIRST_WAITING_OR_SHORTEST = range(5)
# Picks that are not a request: none yet, nobody
NOT_PICKED, NOBODY = -1, -2
# How far such an engine is with its next step
NOT_FORMING, FEEDING, ADMITTING = range(3)

#: Step durations are counted in log-spaced bins: `ITL_BINS_PER_DECADE` from `ITL_FIRST_S` on.
ITL_FIRST_S = 1e-4
ITL_BINS_PER_DECADE = 50
NUM_ITL_BINS = 8 * ITL_BINS_PER_DECADE


class Asks(NamedTuple):
    """Which decisions are asked for: `NEVER`, `WHERE_IT_MATTERS` or `ALWAYS`.

    Attributes:
        dispatch: `ALWAYS` is the same as `WHERE_IT_MATTERS`. If never, a request goes to the
            replica with the smallest sum of running and four times its waiting requests, as in the
            coordinator of vLLM's data-parallel ranks.
        order: `ALWAYS` is before every step.
        admit: `ALWAYS` is also where one request waits, and the answer may be `NOBODY`.
        preempt: `ALWAYS` is the same as `WHERE_IT_MATTERS`.
        place: `ALWAYS` is also where there is one replica to choose. If never, a request decodes on
            the replica with the smallest sum of running and four times its waiting requests, those
            whose KV is on its way included.
        migrate: `WHERE_IT_MATTERS`: at ticks at which a request could leave a replica that is
            short of memory by the measure of the rule, or that has preempted one since the last
            tick. `ALWAYS`: whenever a request could move. If never, the rule decides.
        retain: `WHERE_IT_MATTERS` is of turns whose end another request waits for, `ALWAYS` of all
            requests that have ended. If never, the KV of the former is kept for `retain_kv_s`; and
            what ends is offloaded where there are tiers.
    """

    dispatch: int = WHERE_IT_MATTERS
    order: int = NEVER
    admit: int = NEVER
    preempt: int = NEVER
    place: int = NEVER
    migrate: int = NEVER
    retain: int = NEVER


class Migration(NamedTuple):
    """How requests move to other replicas; docs/migration.md.

    Attributes:
        on: Whether they do.
        interval_s: From one tick to the next.
        rule: `STAY`, `BY_FREENESS` or `BY_QUEUES`; decides unless it is asked for.
        victim: Which request of a replica, `SHORTEST`, ...; of `BY_FREENESS`.
        source_below: A replica with less freeness gives requests away, blocks a request.
        target_above: One with more takes some.
        queue_gap: Of `BY_QUEUES`: requests that one queue must have more than the other.
        last_stage_blocks: With so many blocks left to copy a request pauses.
        max_stages: Copies after which that must be so.
    """

    on: bool
    interval_s: float
    rule: int
    victim: int
    source_below: float
    target_above: float
    queue_gap: int
    last_stage_blocks: int
    max_stages: int


#: What is asked for unless somebody says otherwise.
DISPATCH_ONLY = Asks()


class Params(NamedTuple):
    """What does not change during a run; axes: T replica types, knots of `costs.grid`.

    Behind the types the arrays of step costs have rows for the stages of pipelines, and for steps
    that verify drafts, as of pipelines of one stage.
    """

    cpu_s: FloatArray  # [T]
    dense_tokens: FloatArray  # [T, NUM_DENSE_KNOTS]
    dense_s: FloatArray
    prefill_chunk: FloatArray  # [T, NUM_CHUNK_KNOTS]
    prefill_context: FloatArray  # [T, NUM_CONTEXT_KNOTS]
    prefill_s: FloatArray  # [T, NUM_CHUNK_KNOTS, NUM_CONTEXT_KNOTS]
    decode_batch: FloatArray  # [T, NUM_BATCH_KNOTS]
    decode_kv: FloatArray  # [T, NUM_KV_KNOTS]
    decode_s: FloatArray  # [T, NUM_BATCH_KNOTS, NUM_KV_KNOTS]
    mixed_s: FloatArray  # the same in a step that also prefills
    empty_tiles_s: FloatArray  # [T]
    eager_s: FloatArray  # [T] least time of a step that prefills
    engine: IntArray  # [T] place in `engines.ENGINES`
    forms_ahead: IntArray  # [T] whether a step is formed when the one before begins
    num_blocks: IntArray  # [T] KV blocks of a replica
    longest_tokens: IntArray  # [T] KV tokens that one request can come to have
    max_num_batched_tokens: IntArray  # [T] token budget of a step
    max_num_seqs: IntArray  # [T]
    num_ranks: IntArray  # [T] replicas that step together, 0: each by itself
    timeout_steps: IntArray  # [T] after which ranks prefill that do so together, 0: none waits
    gather_steps: IntArray  # [T] that they wait for more prompts
    largest_graph: IntArray  # [T] most tokens of such a rank for which there is a CUDA graph
    shared_s: FloatArray  # [T, NUM_SHARED, NUM_SHARED_KNOTS] of `costs.shared`, see SHARED_*
    num_stages: IntArray  # [T] of its pipeline, 0: it steps as one, in stretches
    first_stage: IntArray  # [T] row of the first of them in all arrays of step costs, above
    handover_s: FloatArray  # [T, NUM_DENSE_KNOTS] between them, at `dense_tokens` of the first
    num_drafts: IntArray  # [T] tokens drafted for each request that decodes
    lookahead: IntArray  # [T] tokens behind those of a step that blocks are taken for
    acceptance: FloatArray  # [T, at least 1] how often a draft and all before it are accepted
    draft_s: FloatArray  # [T, NUM_BATCH_KNOTS] drafting, at `decode_batch` of the first stage
    role: IntArray  # [T] MIXED, PREFILL_ONLY or DECODE_ONLY
    link_bytes_per_s: FloatArray  # [T] KV in either direction
    link_latency_s: FloatArray  # [T]
    link_piece_s: FloatArray  # [T] to post one piece of KV
    nominal: FloatArray  # [T, NUM_NOMINAL] static facts for the observation, see policy.contract
    slo_s: FloatArray  # [num_classes, 2] TTFT and TPOT limits, seconds
    slo_weight: FloatArray  # [num_classes]
    block_size: int
    prefix_caching: bool
    chunked_prefill: bool
    allow_hold: bool
    allow_reject: bool
    hold_s: float
    retain_kv_s: float  # how long an ended turn keeps its blocks for the next one; 0: not at all
    retains: bool  # whether turns can keep blocks: for that time, or since somebody decides so
    tiered: bool  # whether KV is loaded: from tiers behind the KV blocks, or from other replicas
    tier_num_blocks: IntArray  # [T, NUM_TIERS] what each holds, 0: there is none
    tier_read_bytes_per_s: FloatArray  # [T, NUM_TIERS] from it; of the store: a replica's link
    tier_write_bytes_per_s: FloatArray  # [T, NUM_TIERS]
    tier_latency_s: FloatArray  # [T, NUM_TIERS]
    store_bytes_per_s: float  # of the store's own, to all replicas, and from them
    interference: float  # factor on steps that begin while KV moves between a GPU and its tiers
    loads_if_faster: bool  # KV is loaded where computing it anew takes longer, else always
    balancing_threshold: float  # a prefix so many times as long elsewhere is fetched; 0: none is
    moves_kv: bool  # whether KV moves between replicas: fetched, prefilled elsewhere, or migrating
    disaggregated: bool  # whether there are replicas that are not MIXED
    destination_first: bool  # blocks are set aside where a request decodes before its prefill
    kv_block_bytes: float  # of KV in a block
    kv_block_pieces: int  # pieces of memory that the KV of a block lies in
    lease_s: float  # how long prefilled KV is held for a replica to fetch it
    ahead_tokens: int  # kept free for each active request when blocks are set aside first
    max_num_held: int  # requests beside the running ones that can hold blocks of a replica
    metrics_interval_s: float  # 0: metrics are always fresh
    noise_sigma: float
    noise_period_steps: int
    migration: Migration
    asks: Asks
    record: bool  # write the event log, the step log and the ITL histogram
    entries: IntArray  # [NUM_ENTRIES] addresses of entry points, see cluster.entry


#: One request. Token counts of a decoding request are as of `join_iter`.
REQUEST_DTYPE = np.dtype(
    [
        # inputs
        ("arrival_s", "f8"),  # of one that waits for another: NaN until then
        ("after", "i8"),  # request whose end it waits for, BY_ITSELF or ANY_END
        ("delay_s", "f8"),  # from that end to its arrival
        ("first_after", "i8"),  # first of those that wait for it, -1: none does
        ("next_after", "i8"),  # the next that waits for the same
        ("predicted", "f8"),  # output tokens
        ("prompt", "i8"),  # tokens
        ("output", "i8"),  # tokens
        ("segment_first", "i8"),  # prefix segments, rows segment_first..segment_stop-1 of `segment`
        ("segment_stop", "i8"),
        ("slo_class", "i8"),
        # progress
        ("status", "i8"),
        ("replica", "i8"),  # -1 before the dispatch
        ("computed", "i8"),  # tokens in the KV cache
        ("generated", "i8"),  # output tokens
        # prompt tokens in the step in progress; of one that has ended and lingers, its tokens in
        # the KV cache when it began to decode, -1: it never did
        ("chunk", "i8"),
        (
            "join_iter",
            "i8",
        ),  # replica's step count when decoding began; -1 while prefilling
        ("dispatch_s", "f8"),
        ("scheduled_s", "f8"),  # first admission
        ("first_token_s", "f8"),
        ("finish_s", "f8"),  # end or rejection
        (
            "last_token_s",
            "f8",
        ),  # last token before decoding stopped; for the inter-token gap
        ("num_preemptions", "i8"),
        ("num_restarts", "i8"),
        ("num_holds", "i8"),
        ("cached", "i8"),  # prefix tokens found at the first admission; -1 before
        ("hit_hint", "i8"),  # tokens the router believed cached at dispatch
        (
            "landed_tokens",
            "i8",
        ),  # tokens that need not be computed after admission, without prefix caching
        ("next_request", "i8"),  # links of waiting queues, running lists and retained turns
        ("prev_request", "i8"),
        ("heap_pos", "i8"),  # place in the replica's end heap, -1: not in it
        ("timer_pos", "i8"),  # place of its timer, -1: it has none
        ("seq_slot", "i8"),  # row of the block table
        ("table_len", "i8"),  # blocks in that row; of a retained turn, those it keeps
    ],
    align=True,
)
#: One replica. "Settled" counts do not contain the decode stretch in progress.
REPLICA_DTYPE = np.dtype(
    [
        # inputs
        ("base_speed", "f8"),
        ("type_idx", "i8"),
        ("noise_stream", "i8"),  # its place in the scenario, for `rng.step_noise_z`
        ("num_ranks", "i8"),  # replicas whose steps begin and end with its own, 0: none do
        ("first_rank", "i8"),  # the first of them; they stand side by side
        # engine
        ("mode", "i8"),
        ("speed", "f8"),  # base_speed times the multiplier of a SLOW fault
        ("free_blocks", "i8"),  # that no request holds, settled
        ("kept_blocks", "i8"),  # those of them that retained turns keep
        ("wait_head", "i8"),
        ("wait_tail", "i8"),
        ("num_waiting", "i8"),
        ("run_head", "i8"),
        ("run_tail", "i8"),
        ("num_running", "i8"),
        ("first_retained", "i8"),  # retained turn that lets go first, -1: there is none
        ("last_expiring", "i8"),  # last of those whose time runs, -1: of none does
        ("slowed_until_s", "f8"),  # KV moves between it and its tiers until then
        ("first_prefill", "i8"),  # first running request that is not decoding, -1: none
        ("num_decodes", "i8"),
        ("kv_tokens", "i8"),  # sum of computed over decoding requests, settled
        ("emitted", "i8"),  # output tokens of its requests that have not ended, settled
        ("iteration", "i8"),  # steps ended in which its decoding requests took part, settled
        ("prefill_steps", "i8"),  # steps ended in which they paused; of a pipeline, batches formed
        ("num_flying", "i8"),  # batches on the stages of its pipeline
        ("num_joined", "i8"),  # requests that began to decode there; orders equal ends
        ("stretch_begin_s", "f8"),  # start of the step or decode stretch in progress
        ("stretch_steps", "i8"),  # steps in it
        ("stretch_factor", "f8"),  # noise / speed in it
        ("is_pure", "i8"),  # whether all that are there decode in it
        ("num_ends", "i8"),  # size of the end heap
        ("event_pos", "i8"),  # place in `due`
        ("num_reserve", "i8"),  # blocks taken by decodes and not yet given to one
        ("num_free_slots", "i8"),
        ("last_dispatch_s", "f8"),  # -inf before the first
        ("stalled", "i8"),  # its decoding requests wait since their `last_token_s`; if recorded
        # asynchronous scheduling
        (
            "num_seen",
            "i8",
        ),  # of its queue, so many were there when a step was last formed
        ("num_lingering", "i8"),  # running requests that have ended, see `cluster.lingering`
        # ranks that prefill together
        ("waits", "i8"),  # whether it leaves prefills out of its next step
        ("waited_steps", "i8"),  # steps since all could, or did; of the first rank of a group
        ("gathered_steps", "i8"),  # steps since all could
        # SGLang
        ("batch_full", "i8"),  # no prefill is tried before a request ends
        ("num_lagging", "i8"),  # ended in the last decode step, still counted as running
        ("ratio", "f8"),  # new_token_ratio after decode step `ratio_since`
        ("ratio_since", "i8"),
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
        ("num_arrived", "i8"),
        ("next_sent", "i8"),  # first that waits for any end and is not yet on its way
        ("decision", "i8"),  # kind of the decision that is due, NO_DECISION: none is
        ("deciding", "i8"),  # request it is about, -1: none or several
        ("looked_up", "i8"),  # request whose prefix hits are in `observation` now, -1: of none are
        ("asking", "i8"),  # replica whose engine asks, -1: none
        ("num_timers", "i8"),
        ("num_set", "i8"),  # timers of requests so far: the first set is due first
        ("keep_s", "f8"),  # for how long the answer KEEP keeps the blocks of a turn
        ("store_num_blocks", "i8"),  # in the cluster's store
        ("store_read_free_s", "f8"),  # when it will have sent what it was asked for
        ("store_write_free_s", "f8"),
        ("num_held", "i8"),
        ("last_scrape_s", "f8"),
        ("num_up", "i8"),
        ("num_allowed", "i8"),  # replicas in `allowed`, which holds for requests that need more
        ("allowed_above", "f8"),  # than so many KV tokens, and
        ("allowed_up_to", "f8"),  # not more than so many
        ("in_system", "i8"),
        ("area", "f8"),  # integral of in_system, request-seconds
        ("area_until_s", "f8"),
        ("num_ended", "i8"),  # finished or rejected
        ("good", "f8"),  # weight of requests that ended within their SLOs
        ("arrival_gap_s", "f8"),  # moving average of inter-arrival times
        ("last_arrival_s", "f8"),
        ("first_ended", "i8"),  # request that finished first, see `next_ended`
        ("last_ended", "i8"),  # and last, -1: none has
        ("last_learnt", "i8"),  # up to which the router has learnt lengths, -1: none
        ("looked_s", "f8"),  # when it last looked at the streams
        ("expected_spread", "f8"),  # of the output tokens it expects, over their mean
        ("engine_steps", "i8"),  # steps ended
        ("log_len", "i8"),
        ("step_len", "i8"),
    ],
    align=True,
)
#: What somebody who watches the token streams of a replica has seen of them, see cluster.watch.
STREAM_DTYPE = np.dtype(
    [
        # since the last look
        ("seen_s", "f8"),
        ("seen_steps", "i8"),
        ("pure_s", "f8"),
        ("pure_steps", "i8"),
        ("pure_others", "i8"),
        ("late_s", "f8"),
        ("late_expected_s", "f8"),
        # and before, less what has been forgotten since
        ("itl_s", "f8"),
        ("itl_steps", "f8"),
        ("observed_s", "f8"),
        ("expected_s", "f8"),
    ],
    align=True,
)
#: And what it has of the length of a request.
LENGTH_DTYPE = np.dtype(
    [
        ("expected", "f8"),  # output tokens that it expects, 0: nobody has asked
        ("next_ended", "i8"),  # the request that finished next, -1: none has
    ],
    align=True,
)
#: What an engine that goes by priorities has of one request.
ORDER_DTYPE = np.dtype(
    [
        ("key", "f8"),  # lowest admitted first, highest preempted first
        ("idle_since_s", "f8"),  # arrival or latest preemption
    ],
    align=True,
)
#: What it has of the step it forms, and of the steps so far.
FORMING_DTYPE = np.dtype(
    [
        ("step_s", "f8"),  # moving average of step times, 0 before the first
        ("stage", "i8"),  # NOT_FORMING, FEEDING, ADMITTING
        ("picked", "i8"),  # request picked for that
        ("keyed", "i8"),  # whether keys were written for this step
        ("feeding", "i8"),  # running request whose turn it is, -1: all had theirs
        ("chunk", "i8"),  # tokens its prefilling request is to get, -1: not known yet
        ("preempted", "i8"),  # whether anybody was, in this step
        ("blocked", "i8"),  # whether others would fit where the first in the queue does not
        ("budget", "i8"),  # tokens left
        ("attention_s", "f8"),
        ("skipped_from", "i8"),  # first decoding request that this step leaves out, -1: none
        ("num_skipped", "i8"),
        ("skipped_kv_tokens", "i8"),
    ],
    align=True,
)
#: The way of one request from where it is prefilled to where it decodes.
TRANSFER_DTYPE = np.dtype(
    [
        ("source", "i8"),  # replica that has prefilled it, or from which a prefix is fetched, and
        # that holds these blocks, -1: none
        ("source_slot", "i8"),  # row of the block table there
        ("source_blocks", "i8"),  # blocks in that row
        ("prefill_on", "i8"),  # replica that it goes to once blocks are set aside, -1: none
        ("target", "i8"),  # replica that has set blocks aside while it is elsewhere, -1: none
        ("target_slot", "i8"),
        ("target_blocks", "i8"),
        ("hits", "i8"),  # blocks found in the cache where it is to decode
        ("num_bytes", "f8"),  # of the transfer in progress or over
        ("lease_until_s", "f8"),
        ("prefilled_s", "f8"),  # of the last time, as all below
        ("begin_s", "f8"),  # both ends hold memory from then on
        ("landed_s", "f8"),
        ("prefill_replica", "i8"),  # -1 before
        ("moved_bytes", "f8"),  # of all transfers that have landed
        ("num_migrations", "i8"),  # to another replica, while it waited or decoded
        ("num_stays", "i8"),  # migrations given up
        ("paused_s", "f8"),  # how long it decoded nowhere, sum
    ],
    align=True,
)
#: The migration under way from a replica, and what its rule has seen of the replica.
MOVE_DTYPE = np.dtype(
    [
        ("request", "i8"),  # -1: none is under way
        ("target", "i8"),  # replica it goes to
        ("stage", "i8"),  # copies begun
        ("moved", "i8"),  # blocks there: found in the cache, or copied
        ("copying", "i8"),  # blocks on their way, -1: nothing is
        ("alive", "i8"),  # whether it has not been preempted meanwhile
        ("leaving", "i8"),  # whether it leaves when the step in progress ends
        ("pause_s", "f8"),  # when it left, NaN: it decodes
        ("preempted", "i8"),  # whether the replica has preempted a request since the last tick
        ("lately", "i8"),  # and between the two last ticks
        ("paired", "i8"),  # whether it has had its turn at this tick
    ],
    align=True,
)
#: What a replica has of transfers. The links of a replica are one in each direction.
LINK_DTYPE = np.dtype(
    [
        ("out_free_s", "f8"),  # when the transfers it sends will have left
        ("in_free_s", "f8"),
        ("out_bytes", "f8"),  # landed
        ("in_bytes", "f8"),
        ("num_holding", "i8"),  # requests beside the running ones that hold its blocks
        ("first_remote", "i8"),  # requests on their way to it or landed, as transfers began; -1
        ("last_remote", "i8"),
        ("num_remote", "i8"),
        ("num_landed", "i8"),
        ("budget", "i8"),  # tokens left of the step that forms
    ],
    align=True,
)
#: What a request has of loads from the tiers; what a peer holds of it is in its TRANSFER_DTYPE.
LOAD_DTYPE = np.dtype(
    [
        ("hits", "i8"),  # blocks in the prefix cache when the load began, -1: nothing is loaded
        ("blocks", "i8", (NUM_SOURCES,)),  # from each source, of the load in progress
        ("tokens", "i8", (NUM_SOURCES,)),  # of all that have landed
        ("begin_s", "f8"),  # of the last load
        ("landed_s", "f8"),
        ("moved_bytes", "f8"),  # of all that have landed
        ("stored_bytes", "f8"),  # written to tiers when it ended or was preempted
    ],
    align=True,
)
#: What a replica has of one tier: of the cluster's store, its link to that.
TIER_DTYPE = np.dtype(
    [
        ("num_blocks", "i8"),  # in it; of the store see ENV_DTYPE
        ("read_free_s", "f8"),  # when it will have sent what it was asked for
        ("write_free_s", "f8"),
        ("read_bytes", "f8"),  # landed
        ("written_bytes", "f8"),
    ],
    align=True,
)
#: A block in a tier, in a list by last use.
TIER_BLOCK_DTYPE = np.dtype(
    [
        ("identity", "i8"),
        ("ready_s", "f8"),
        ("after", "i4"),
        ("before", "i4"),
        ("behind", "i4"),  # next block of its place in the map
    ],
    align=True,
)
#: Place `i` of a pipeline: its stage, and of every `num_stages` batches the one in that place.
FLIGHT_DTYPE = np.dtype(
    [
        ("free_s", "f8"),  # when the stage will have done what it was given
        ("begin_s", "f8"),  # when the batch was formed
        ("landing_s", "f8"),  # when it leaves the last stage
        ("num_decodes", "i8"),  # in it
        ("decode_tokens", "i8"),  # of these, drafts included
        ("num_chunks", "i8"),
        ("kv_tokens", "i8"),  # that its decodes attend to
        ("prefill_tokens", "i8"),
        ("longest_chunk", "i8"),
        ("work_s", "f8"),  # attention of the chunks of the batch that forms, in the stage
    ],
    align=True,
)
#: What batches in flight do for a request, see `cluster.pipeline`.
BATCH_DTYPE = np.dtype(
    [
        ("number", "i8"),  # of the one that brings its next token
        ("drafts", "i4"),  # that it verifies
        ("num_named", "i4"),  # leading blocks with an identity
    ],
    align=True,
)
#: A part of a request's text; its block `j`, counted from the prompt's, is named `first_name + j`.
SEGMENT_DTYPE = np.dtype([("first_name", "i8"), ("end", "i8")], align=True)
END_DTYPE = np.dtype([("key", "i8"), ("request", "i8")], align=True)
DUE_DTYPE = np.dtype([("time_s", "f8"), ("replica", "i8")], align=True)
#: Something that happens at a time: a fault, a scrape, or what a request waits for.
TIMER_DTYPE = np.dtype(
    [("time_s", "f8"), ("kind", "i8"), ("order", "i8"), ("subject", "i8")], align=True
)
BLOCK_DTYPE = np.dtype(
    [
        ("identity", "i8"),  # 0: none, see cluster.identities
        ("holders", "i4"),  # requests
        ("keepers", "i4"),  # retained turns
        ("after", "i4"),
        ("before", "i4"),
        ("behind", "i4"),  # next block of its place in the map from identities, -1: none
    ],
    align=True,
)
FAULT_DTYPE = np.dtype(
    [("time_s", "f8"), ("value", "f8"), ("replica", "i8"), ("kind", "i8")], align=True
)


class State(NamedTuple):
    """What changes; axes: E environments, N requests, R replicas, and as noted.

    Records, not one array a field: a request's fields are used together, so they share cache
    lines, and a kernel handles 20 arrays instead of 130, which decides how long it compiles.
    """

    request: Records  # REQUEST_DTYPE[E, N]
    replica: Records  # REPLICA_DTYPE[E, R]
    env: Records  # ENV_DTYPE[E]
    segment: Records  # SEGMENT_DTYPE[E, S]
    phase: Int32Array  # [E, R, block_size] decodes that need a block at step count = index
    ends: Records  # END_DTYPE[E, R, max_num_seqs] heap; key: last step << 32 | order of joining
    due: Records  # DUE_DTYPE[E, R] heap of replicas by their next event
    block: Records  # BLOCK_DTYPE[E, R, B + 1]; who has them, free list with its end at index B
    prefix_cache: Int32Array  # [E, R, H] hash map from identities: first block of a place, or -1
    cached_on: IntArray  # [E, N, ceil(R / 64)] by shared block's number: bits of who has it cached
    reserve: Int32Array  # [E, R, B] blocks taken by decodes, not yet given to one
    table: Int32Array  # [E, R, max_num_seqs, W] block table; `max_num_held` more rows if KV moves
    free_slots: Int32Array  # [E, R, max_num_seqs] unused rows of it; as many as that has
    scraped: FloatArray  # [E, NUM_SCRAPED, R]
    observation: FloatArray  # [E, NUM_OBSERVED_ROWS, R] its replica rows, see OBSERVED_*
    transfer: Records  # TRANSFER_DTYPE[E, N]; [E, 1] if no KV moves between replicas
    link: Records  # LINK_DTYPE[E, R]
    move: Records  # MOVE_DTYPE[E, R]; [E, 1] if no request migrates
    load: Records  # LOAD_DTYPE[E, N]; [E, 1] if there are no tiers, as 1 for all other lengths here
    tier: Records  # TIER_DTYPE[E, R, NUM_TIERS]
    tier_block: Records  # TIER_BLOCK_DTYPE[E, R, 2, C + 1] of host and disk, list's end at index C
    tier_cache: Int32Array  # [E, R, 2, H] maps as `prefix_cache`
    store_block: Records  # TIER_BLOCK_DTYPE[E, C + 1] of the cluster's store
    store_cache: Int32Array  # [E, H]
    flight: Records  # FLIGHT_DTYPE[E, R, most stages of a type]; [E, 1, 1] if there are none
    batch: Records  # [E, N] of each request, where batches are explicit; or [E, 1]
    length_sums: FloatArray  # [E, NUM_LENGTH_SUMS] what the router has learnt, see policy.lengths
    stream: Records  # STREAM_DTYPE[E, R]
    length: Records  # LENGTH_DTYPE[E, N]
    order: Records  # ORDER_DTYPE[E, N]
    forming: Records  # FORMING_DTYPE[E, R]
    timer: Records  # TIMER_DTYPE[E, N + 2] heap: one a request, the next fault and scrape; if
    # requests migrate, the next tick and one a replica besides
    allowed: BoolArray  # [E, R + 2] actions of a dispatch: replicas, then hold, then reject
    fault: Records  # FAULT_DTYPE[E, F]
    itl_count: IntArray  # [E, NUM_ITL_BINS] inter-token times
    log: Records  # outcome.EVENT_DTYPE[E, L]
    steps: Records  # outcome.STEP_DTYPE[E, L]


#: Rows of `Params.shared_s`; the first has the knots.
SHARED_TOKENS, SHARED_EXPERTS, SHARED_SKEWED_EXPERTS, SHARED_EXCHANGE = range(4)
NUM_SHARED = 4

#: Rows of `State.scraped`.
SCRAPED_RUNNING, SCRAPED_WAITING, SCRAPED_KV_USAGE, SCRAPED_EMITTED = range(4)
NUM_SCRAPED = 4

#: Sums over ended requests from which output lengths are predicted.
NUM_LENGTH_SUMS = 6

#: Rows of `State.observation`, in the order of `policy.contract.REPLICA_FEATURES`. The core keeps
#: the router's rows up to date event by event; `policy.observe` fills the others when asked for.
(
    OBSERVED_UP,
    OBSERVED_OUTSTANDING,
    OBSERVED_OUTSTANDING_PROMPT,
    OBSERVED_PENDING_PREFILL,
    OBSERVED_OUTSTANDING_PREDICTED,
    OBSERVED_RECENT_TTFT,
    OBSERVED_RECENT_TPOT,
    OBSERVED_SINCE_DISPATCH,
    OBSERVED_RELATIVE_SPEED,
    OBSERVED_PREFILL_RATE,
    OBSERVED_DECODE_STEP,
    OBSERVED_DECODE_SEQ,
    OBSERVED_KV_CAPACITY,
    OBSERVED_MAX_NUM_SEQS,
    OBSERVED_MAX_NUM_BATCHED_TOKENS,
    OBSERVED_NUM_RUNNING,
    OBSERVED_NUM_WAITING,
    OBSERVED_KV_USAGE,
    OBSERVED_GENERATED,
    OBSERVED_METRICS_AGE,
    OBSERVED_PREFIX_HIT,
    OBSERVED_STEP_TIME_RATIO,
    OBSERVED_RECENT_ITL,
    OBSERVED_EXPECTED_LEFT,
    OBSERVED_AS_TIGHT,
    OBSERVED_PUSHED_OVER_40,
    OBSERVED_PUSHED_OVER_50,
    OBSERVED_PUSHED_OVER_60,
    OBSERVED_PUSHED_OVER_80,
    OBSERVED_PUSHED_OVER_100,
    OBSERVED_WHAT_IF_E2E,
    OBSERVED_WHAT_IF_ADDED,
    OBSERVED_PREFILLS,
    OBSERVED_DECODES,
    OBSERVED_KV_TOKENS_PER_S,
    OBSERVED_NUM_HOLDING,
    OBSERVED_ARRIVING_TOKENS,
    OBSERVED_LINK_BUSY_S,
    OBSERVED_HAS_PREFILL,
) = range(39)
NUM_OBSERVED_ROWS = 39
