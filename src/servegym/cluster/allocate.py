"""Making the simulator's arrays and filling them from episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from servegym.cluster.entry import (
    DISAGGREGATION,
    MIGRATION,
    NUM_ENTRIES,
    PIPELINE,
    SETTLE_TURN,
    TIERS,
)
from servegym.cluster.identities import number_texts
from servegym.cluster.kernels import reset_env
from servegym.cluster.nominal import nominal_facts
from servegym.cluster.outcome import EVENT_DTYPE, STEP_DTYPE
from servegym.cluster.spec import (
    MIGRATION_RULES,
    ROLES,
    VICTIMS,
    ClusterSpec,
    Episode,
    ReplicaType,
    first_ranks,
)
from servegym.cluster.state import (
    BATCH_DTYPE,
    BLOCK_DTYPE,
    DISPATCH_ONLY,
    DUE_DTYPE,
    END_DTYPE,
    ENV_DTYPE,
    FAULT_DTYPE,
    FLIGHT_DTYPE,
    FORMING_DTYPE,
    LENGTH_DTYPE,
    LINK_DTYPE,
    LOAD_DTYPE,
    MOVE_DTYPE,
    NEVER,
    NUM_ITL_BINS,
    NUM_LENGTH_SUMS,
    NUM_OBSERVED_ROWS,
    NUM_SCRAPED,
    NUM_SHARED,
    NUM_TIERS,
    ORDER_DTYPE,
    REPLICA_DTYPE,
    REQUEST_DTYPE,
    SEGMENT_DTYPE,
    STREAM_DTYPE,
    TIER_BLOCK_DTYPE,
    TIER_DTYPE,
    TIMER_DTYPE,
    TRANSFER_DTYPE,
    Asks,
    Migration,
    Params,
    Records,
    State,
)
from servegym.costs.grid import NUM_BATCH_KNOTS
from servegym.costs.shared import NUM_SHARED_KNOTS, SharedCost
from servegym.engines import ENGINES
from servegym.typing import FloatArray, Int32Array, IntArray
from servegym.workloads.table import RequestTable


class Capacity(NamedTuple):
    """Sizes of the state arrays."""

    num_envs: int
    requests: int
    segments: int
    names: int
    replicas: int
    faults: int
    longest_tokens: int
    log: int

    @classmethod
    def of(
        cls,
        spec: ClusterSpec,
        episodes: Sequence[Episode],
        *,
        max_replicas: int = 0,
        record: bool,
    ) -> Capacity:
        """Return the sizes that hold every one of `episodes` of a cluster."""
        requests = max(len(e.table) for e in episodes)
        return cls(
            num_envs=len(episodes),
            requests=requests,
            segments=max(1, *(len(e.table.prefix_keys) for e in episodes)),
            names=max(first_names(spec, e.table)[1] for e in episodes),
            replicas=max(max_replicas, *(e.num_replicas for e in episodes)),
            faults=max(1, *(len(e.faults) for e in episodes)),
            longest_tokens=max(_longest(e) for e in episodes),
            log=12 * requests + 64 if record else 1,
        )

    def grown_to(self, need: Capacity) -> Capacity:
        """Return sizes that hold both, with room where the next episodes will want some more.

        How many segments an episode has, how many blocks they name, and how long its longest
        request is, differ from one to the next: each new record would copy all arrays.
        """
        merged = dict(zip(self._fields, map(max, self, need), strict=True))
        for name in ("segments", "names", "longest_tokens"):
            if merged[name] > getattr(self, name):
                merged[name] += merged[name] // 4
        return Capacity(**merged | {"num_envs": self.num_envs})

    def covers(self, spec: ClusterSpec, episode: Episode) -> bool:
        """Whether an environment of these sizes can play `episode` of a cluster."""
        return (
            len(episode.table) <= self.requests
            and len(episode.table.prefix_keys) <= self.segments
            and first_names(spec, episode.table)[1] <= self.names
            and episode.num_replicas <= self.replicas
            and len(episode.faults) <= self.faults
            and _longest(episode) <= self.longest_tokens
        )


def first_names(rules: ClusterSpec | Params, table: RequestTable) -> tuple[IntArray, int]:
    """Number the blocks of a table's texts, if they are cached; see `cluster.identities`.

    Returns:
        `first_name` of each segment, `int64[m]`, and one more than the highest number.
    """
    found = np.zeros(len(table.prefix_keys), np.int64)
    if not rules.prefix_caching or not len(found):
        return found, 1
    known = np.full(_slots(len(found)), -1)
    ranges = np.zeros((len(found), 3), np.int64)
    tokens = table.prompt_tokens.astype(np.int64) + table.output_tokens
    columns = table.prefix_keys, table.prefix_ends, table.prefix_offsets
    num_blocks, size = tokens // rules.block_size, rules.block_size
    return found, number_texts(*columns, num_blocks, size, known, ranges, found)


def _longest(episode: Episode) -> int:
    return int((episode.table.prompt_tokens.astype(np.int64) + episode.table.output_tokens).max())


def _longest_request(kind: ReplicaType, spec: ClusterSpec) -> int:
    tokens = kind.capacity_tokens(spec.block_size)
    if kind.needs_whole_prompts(spec.chunked_prefill) and not kind.computes_once:
        return min(tokens, kind.max_num_batched_tokens)
    return tokens


def _shared_table(shared: SharedCost | None) -> FloatArray:
    if shared is None:
        return np.zeros((NUM_SHARED, NUM_SHARED_KNOTS))
    return np.stack((shared.tokens, shared.experts_s, shared.skewed_experts_s, shared.exchange_s))


def make_params(spec: ClusterSpec, *, record: bool, asks: Asks = DISPATCH_ONLY) -> Params:
    """Stack the replica types and rules of a cluster into arrays."""
    grids = [t.grid for t in spec.types]
    stages = [t.parts for t in spec.types]
    num_stages = np.array([len(own) for own in stages], np.int64)
    grids += [stage for own in stages for stage in own]

    def stack(name: str) -> np.ndarray:
        return np.ascontiguousarray([getattr(g, name) for g in grids], np.float64)

    def column(name: str) -> np.ndarray:
        return np.array([getattr(t, name) for t in spec.types], np.int64)

    tiers = [(t.host_kv, t.disk_kv, spec.tiers.store) for t in spec.types]

    def of_tiers(name: str) -> FloatArray:
        return np.array([[getattr(x, name) if x else 1.0 for x in y] for y in tiers], np.float64)

    return Params(
        cpu_s=stack("cpu_s"),
        dense_tokens=stack("dense_tokens"),
        dense_s=stack("dense_s"),
        prefill_chunk=stack("prefill_chunk"),
        prefill_context=stack("prefill_context"),
        prefill_s=stack("prefill_s"),
        decode_batch=stack("decode_batch"),
        decode_kv=stack("decode_kv"),
        decode_s=stack("decode_s"),
        mixed_s=stack("mixed_s"),
        empty_tiles_s=stack("empty_tiles_s"),
        eager_s=stack("eager_s"),
        engine=np.array([ENGINES.index(t.engine) for t in spec.types], np.int64),
        forms_ahead=column("async_scheduling"),
        num_blocks=column("num_blocks"),
        longest_tokens=np.array([_longest_request(t, spec) for t in spec.types], np.int64),
        max_num_batched_tokens=column("max_num_batched_tokens"),
        max_num_seqs=column("max_num_seqs"),
        num_ranks=column("num_ranks"),
        timeout_steps=np.array([t.together.timeout_steps if t.together else 0 for t in spec.types]),
        gather_steps=np.array([t.together.gather_steps if t.together else 0 for t in spec.types]),
        largest_graph=np.array([t.shared.largest_graph if t.shared else 0 for t in spec.types]),
        shared_s=np.stack([_shared_table(t.shared) for t in spec.types]),
        num_stages=num_stages,
        first_stage=len(stages) + np.cumsum(num_stages) - num_stages,
        handover_s=np.stack(
            [t.pipeline.handover_s if t.pipeline else 0.0 * t.grid.dense_s for t in spec.types]
        ),
        num_drafts=column("num_drafts"),
        lookahead=column("lookahead"),
        acceptance=_acceptance(spec),
        draft_s=np.stack([_draft_s(t) for t in spec.types]),
        role=np.array([ROLES.index(t.role) for t in spec.types], np.int64),
        link_bytes_per_s=np.array([t.link.bytes_per_s for t in spec.types], np.float64),
        link_latency_s=np.array([t.link.latency_s for t in spec.types], np.float64),
        link_piece_s=np.array([t.link.piece_s for t in spec.types], np.float64),
        nominal=np.ascontiguousarray(nominal_facts(spec), np.float64),
        slo_s=np.array([[c.ttft_s, c.tpot_s] for c in spec.slo_classes], np.float64),
        slo_weight=np.array([c.weight for c in spec.slo_classes], np.float64),
        block_size=int(spec.block_size),
        prefix_caching=bool(spec.prefix_caching),
        chunked_prefill=bool(spec.chunked_prefill),
        allow_hold=bool(spec.allow_hold),
        allow_reject=bool(spec.allow_reject),
        hold_s=float(spec.hold_s),
        retain_kv_s=float(spec.retain_kv_s),
        retains=spec.retain_kv_s > 0 or asks.retain != NEVER,
        tiered=spec.tiered,
        tier_num_blocks=np.array([[x.num_blocks if x else 0 for x in y] for y in tiers], np.int64),
        tier_read_bytes_per_s=of_tiers("read_bytes_per_s"),
        tier_write_bytes_per_s=of_tiers("write_bytes_per_s"),
        tier_latency_s=of_tiers("latency_s"),
        store_bytes_per_s=float(spec.tiers.store_bytes_per_s),
        interference=float(spec.tiers.interference),
        loads_if_faster=spec.tiers.load == "faster",
        balancing_threshold=float(spec.tiers.balancing_threshold or 0.0),
        moves_kv=spec.moves_kv,
        disaggregated=spec.disaggregated,
        destination_first=spec.transfers.reservation == "destination",
        kv_block_bytes=float(spec.transfers.kv_token_bytes * spec.block_size),
        kv_block_pieces=int(spec.transfers.kv_block_pieces),
        lease_s=float(spec.transfers.lease_s),
        ahead_tokens=int(spec.transfers.ahead_tokens),
        max_num_held=int(spec.transfers.max_num_held),
        metrics_interval_s=float(spec.metrics_interval_s),
        noise_sigma=float(spec.noise_sigma),
        noise_period_steps=int(spec.noise_period_steps),
        migration=_migration(spec),
        asks=Asks(*map(int, asks)),
        record=bool(record),
        entries=np.zeros(NUM_ENTRIES, np.int64),
    )


def _draft_s(kind: ReplicaType) -> FloatArray:
    return kind.speculation.draft_s if kind.speculation else np.zeros(NUM_BATCH_KNOTS)


def _acceptance(spec: ClusterSpec) -> FloatArray:
    found = np.zeros((len(spec.types), max(1, *(t.num_drafts for t in spec.types), 1)))
    for row, kind in zip(found, spec.types, strict=True):
        if kind.speculation:
            row[: kind.num_drafts] = kind.speculation.acceptance
    return found


def wanted_entries(spec: ClusterSpec, asks: Asks) -> frozenset[int]:
    """Return which entry points of `entry.ON_DEMAND` a cluster calls."""
    wanted: frozenset[int] = frozenset()
    if spec.disaggregated:
        wanted |= DISAGGREGATION
    if spec.migrates:
        wanted |= MIGRATION
    if spec.tiered:
        wanted |= TIERS
    if any(t.parts for t in spec.types):
        wanted |= PIPELINE
    if asks.retain != NEVER:
        wanted |= {SETTLE_TURN}
    return wanted


def _slots(blocks: int) -> int:
    """Places of a hash map that is at most half full."""
    return 1 << max(0, 2 * blocks - 1).bit_length()


def _migration(spec: ClusterSpec) -> Migration:
    rules = spec.migration
    return Migration(
        on=spec.migrates,
        interval_s=float(rules.interval_s),
        rule=MIGRATION_RULES.index(rules.rule),
        victim=VICTIMS.index(rules.victim),
        source_below=float(rules.source_below),
        target_above=float(rules.target_above),
        queue_gap=int(rules.queue_gap),
        last_stage_blocks=int(rules.last_stage_blocks),
        max_stages=int(rules.max_stages),
    )


#: Arrays of the state that have a row, or more, for every request.
PER_REQUEST = ("request", "length", "order", "timer", "log", "steps")


def make_state(spec: ClusterSpec, capacity: Capacity) -> State:
    """Make the arrays, all zero; every environment must be filled before use."""
    e, n, r = capacity.num_envs, capacity.requests, capacity.replicas
    seqs = max(t.max_num_running for t in spec.types)
    stages = max(t.num_stages for t in spec.types)
    blocks, slots, width, rows = 1, 1, 1, 1
    if spec.prefix_caching:
        blocks = max(t.num_blocks for t in spec.types)
        slots = _slots(blocks)
        ahead = max(t.tokens_ahead for t in spec.types)
        width = -(-(capacity.longest_tokens + ahead) // spec.block_size)
        rows = seqs + (spec.transfers.max_num_held if spec.moves_kv else 0)
        rows += seqs if spec.tiered else 0  # for as many whose KV is loaded
    own, store = 0, 0
    if spec.tiered:
        own = max([x.num_blocks for t in spec.types for x in (t.host_kv, t.disk_kv) if x] or [0])
        store = spec.tiers.store.num_blocks if spec.tiers.store else 0
    return State(
        request=np.zeros((e, n), REQUEST_DTYPE),
        replica=np.zeros((e, r), REPLICA_DTYPE),
        env=np.zeros(e, ENV_DTYPE),
        segment=np.zeros((e, capacity.segments), SEGMENT_DTYPE),
        phase=np.zeros((e, r, spec.block_size), np.int32),
        ends=np.zeros((e, r, seqs), END_DTYPE),
        due=np.zeros((e, r), DUE_DTYPE),
        block=np.zeros((e, r, blocks + 1), BLOCK_DTYPE),
        prefix_cache=np.zeros((e, r, slots), np.int32),
        cached_on=np.zeros((e, capacity.names, -(-r // 64)), np.int64),
        reserve=np.zeros((e, r, blocks), np.int32),
        table=np.zeros((e, r, rows, width), np.int32),
        free_slots=np.zeros((e, r, rows), np.int32),
        scraped=np.zeros((e, NUM_SCRAPED, r)),
        observation=np.zeros((e, NUM_OBSERVED_ROWS, r)),
        transfer=np.zeros((e, n if spec.moves_kv else 1), TRANSFER_DTYPE),
        link=np.zeros((e, r), LINK_DTYPE),
        move=np.zeros((e, r if spec.migrates else 1), MOVE_DTYPE),
        load=np.zeros((e, n if spec.tiered else 1), LOAD_DTYPE),
        tier=np.zeros((e, r, NUM_TIERS), TIER_DTYPE),
        tier_block=np.zeros((e, r, 2, own + 1), TIER_BLOCK_DTYPE),
        tier_cache=np.zeros((e, r, 2, _slots(own)), np.int32),
        store_block=np.zeros((e, store + 1), TIER_BLOCK_DTYPE),
        store_cache=np.zeros((e, _slots(store)), np.int32),
        flight=np.zeros((e, r if stages else 1, max(1, stages)), FLIGHT_DTYPE),
        batch=np.zeros((e, n if stages else 1), BATCH_DTYPE),
        length_sums=np.zeros((e, NUM_LENGTH_SUMS)),
        stream=np.zeros((e, r), STREAM_DTYPE),
        length=np.zeros((e, n), LENGTH_DTYPE),
        order=np.zeros((e, n), ORDER_DTYPE),
        forming=np.zeros((e, r), FORMING_DTYPE),
        timer=np.zeros((e, n + 2 + (r + 1 if spec.migrates else 0)), TIMER_DTYPE),
        allowed=np.zeros((e, r + 2), np.bool_),
        fault=np.zeros((e, capacity.faults), FAULT_DTYPE),
        itl_count=np.zeros((e, NUM_ITL_BINS), np.int64),
        log=np.zeros((e, capacity.log), EVENT_DTYPE),
        steps=np.zeros((e, capacity.log), STEP_DTYPE),
    )


def _link_followers(after: Int32Array, request: Records) -> None:
    """Chain the requests that wait for the same one, in order, behind that."""
    request["first_after"] = -1
    request["next_after"] = -1
    waits = np.flatnonzero(after >= 0)
    if not len(waits):
        return
    waits = waits[np.argsort(after[waits], kind="stable")]
    leader = after[waits]
    same = leader[1:] == leader[:-1]
    request["next_after"][waits[:-1][same]] = waits[1:][same]
    begins = np.concatenate(([True], ~same))
    request["first_after"][leader[begins]] = waits[begins]


def load_episode(params: Params, state: State, env: int, episode: Episode) -> None:
    """Write an episode into one environment and put that into its initial state."""
    table, faults = episode.table, episode.faults
    n, m, r, f = len(table), len(table.prefix_keys), episode.num_replicas, len(faults)
    request = state.request[env, :n]
    request["arrival_s"] = table.arrival_s
    request["predicted"] = table.predicted_output_tokens
    request["prompt"] = table.prompt_tokens
    request["output"] = table.output_tokens
    request["slo_class"] = table.slo_class
    request["after"] = table.after
    request["delay_s"] = table.delay_s
    _link_followers(table.after, request)
    request["segment_first"] = table.prefix_offsets[:-1]
    request["segment_stop"] = table.prefix_offsets[1:]
    state.segment["first_name"][env, :m] = first_names(params, table)[0]
    state.segment["end"][env, :m] = table.prefix_ends
    replica = state.replica[env, :r]
    replica["type_idx"] = episode.type_idx
    replica["noise_stream"] = np.arange(r)
    replica["num_ranks"] = params.num_ranks[episode.type_idx]
    replica["first_rank"] = first_ranks(replica["num_ranks"])
    replica["base_speed"] = episode.speed
    for column in ("time_s", "replica", "kind", "value"):
        state.fault[column][env, :f] = getattr(faults, column)
    constants = state.env[env]
    constants["num_requests"] = n
    constants["num_replicas"] = r
    constants["num_faults"] = f
    constants["noise_seed"] = np.uint64(episode.noise_seed)
    reset_env(params, state, env)
