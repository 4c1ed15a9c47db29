"""What a simulation is given: replica types, the rules they share, and one episode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from servegym.cluster.rank_rules import PrefillTogether
from servegym.cluster.state import FAULT_DOWN, FAULT_SLOW, FAULT_UP
from servegym.cluster.tier_rules import KvTier, TierRules
from servegym.costs.grid import CostGrid
from servegym.costs.shared import SharedCost
from servegym.costs.speculation import Speculation
from servegym.costs.stages import StageGrids
from servegym.engines import ENGINES, EngineName
from servegym.errors import ConfigError, unknown_name
from servegym.typing import FloatArray, Int8Array, Int16Array, IntArray
from servegym.workloads.table import RequestTable

#: What a replica does: all of a request, its prefill alone, or what comes behind the prefill alone.
Role = Literal["mixed", "prefill", "decode"]
#: By their numbers in `state`.
ROLES: tuple[Role, ...] = get_args(Role)
#: Who holds memory first: the replica that prefills a request, or the one where it will decode.
Reservation = Literal["source", "destination"]

#: vLLM V0 admits no request that would leave less than one in so many blocks free.
WATERMARK_BLOCKS = 100


@dataclass(frozen=True)
class Link:
    """How KV leaves a replica and comes to it; each direction is a link of its own.

    Attributes:
        bytes_per_s: Of KV, as an application sees it.
        latency_s: From the last byte sent to the landing, and all hand-shakes.
        piece_s: To post one piece of memory; see `TransferRules.kv_block_pieces`.
    """

    bytes_per_s: float = float("inf")
    latency_s: float = 0.0
    piece_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0:
            raise ConfigError(f"bytes_per_s of a link must be above 0, got {self.bytes_per_s}")
        for name in ("latency_s", "piece_s"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ConfigError(
                    f"{name} of a link must be at least 0 and finite, got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class TransferRules:
    """How prefilled KV gets to where a request decodes; docs/disaggregation.md.

    Attributes:
        kv_token_bytes: KV of one token, bytes.
        kv_block_pieces: Pieces of memory that the KV of one block lies in.
        reservation: `"source"`: a request is prefilled, and then fetched by whoever has memory for
            it (vLLM with NIXL); `"destination"`: it is prefilled once memory is set aside where it
            will decode, and pushed there (SGLang).
        lease_s: For how long prefilled KV is held until it is fetched, seconds.
        ahead_tokens: Tokens that stay free for each active request of a replica which sets
            memory aside before the prefill.
        max_num_held: Requests beside its running ones that can hold blocks of a replica at once.
            Engines have no such limit; here it bounds the block tables.
    """

    kv_token_bytes: float = 0.0
    kv_block_pieces: int = 1
    reservation: Reservation = "source"
    lease_s: float = 480.0
    ahead_tokens: int = 512
    max_num_held: int = 256

    def __post_init__(self) -> None:
        if self.reservation not in get_args(Reservation):
            raise ConfigError(
                unknown_name("reservation", self.reservation, list(get_args(Reservation)))
            )
        if not self.lease_s > 0:
            raise ConfigError(f"lease_s must be above 0, got {self.lease_s}")
        for name in ("kv_token_bytes", "kv_block_pieces", "ahead_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.max_num_held < 1:
            raise ConfigError(f"max_num_held must be at least 1, got {self.max_num_held}")


#: Who says which requests move: Llumnix's pairs by freeness, the lengths of queues, nobody.
MigrationRule = Literal["none", "freeness", "queues"]
MIGRATION_RULES: tuple[MigrationRule, ...] = get_args(MigrationRule)
#: Which request of a replica moves: the decoding one with the fewest tokens, with the most, the
#: last; or the first that waits, and no other or else the one with the fewest tokens.
Victim = Literal["shortest", "longest", "last", "first-waiting", "first-waiting-or-shortest"]
VICTIMS: tuple[Victim, ...] = get_args(Victim)


@dataclass(frozen=True)
class MigrationRules:
    """How requests that wait or decode move to other replicas; docs/migration.md.

    Attributes:
        interval_s: From one decision about all replicas to the next, seconds; 0: nothing moves.
        rule: Who decides, unless somebody is asked.
        victim: Of `"freeness"`: which request of a replica moves.
        source_below: Of `"freeness"`: a replica with fewer free blocks a request gives some away.
        target_above: And one with more takes some.
        queue_gap: Of `"queues"`: requests that one queue must have more than the other.
        last_stage_blocks: With at most so many blocks left to copy a request stops decoding, and
            goes on elsewhere when they have landed.
        max_stages: Copies after which that must be so, or it stays.
    """

    interval_s: float = 0.0
    rule: MigrationRule = "freeness"
    victim: Victim = "shortest"
    source_below: float = 3.0
    target_above: float = 3.0
    queue_gap: int = 2
    last_stage_blocks: int = 16
    max_stages: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.interval_s < np.inf:
            raise ConfigError(
                f"interval_s of migration must be at least 0 and finite, got {self.interval_s}"
            )
        if self.rule not in MIGRATION_RULES:
            raise ConfigError(unknown_name("migration rule", self.rule, list(MIGRATION_RULES)))
        if self.victim not in VICTIMS:
            raise ConfigError(unknown_name("victim", self.victim, list(VICTIMS)))
        for name in ("queue_gap", "last_stage_blocks", "max_stages"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} of migration must be at least 1, got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class ReplicaType:
    """One kind of engine instance: a GPU type, a tensor-parallel degree and a model.

    Attributes:
        name: For reports, e.g. `"H100-SXM-80GB x1"`.
        grid: Compiled step cost.
        num_blocks: KV blocks it holds.
        max_num_batched_tokens: Token budget of one step; of SGLang its chunked prefill size.
        max_num_seqs: Running requests at most.
        price_usd_per_h: Rent of the whole replica, dollars an hour.
        num_gpus: GPUs it occupies.
        engine: Whose rules form its steps.
        async_scheduling: Whether a step is formed when the one before begins; see
            docs/simulator.md.
        shared: What it does together with the other ranks of its group, whose steps begin and end
            when its own do; the grid holds the rest. None: it steps by itself.
        together: When such ranks prefill; None: each whenever it can.
        computes_once: Whether a prompt alone must fit one step of TensorRT-LLM, which preempts
            nothing, and not its output with it, as where replicas fail or planners compute anew
            what is there.
        role: What it does of a request.
        link: How KV gets from it and to it.
        host_kv: Memory of its host that keeps copies of its KV blocks; None: there is none.
        disk_kv: The same on its disk.
        pipeline: What the stages cost that its layers are split over, with as many batches in
            flight; `grid` is then `pipeline.shared_round`. None: it steps as one.
        speculation: Tokens that are drafted for what decodes; `grid` is then
            `speculation.per_token`. None: each decodes one token a step.
    """

    name: str
    grid: CostGrid
    num_blocks: int
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    price_usd_per_h: float = 0.0
    num_gpus: int = 1
    engine: EngineName = "vllm"
    async_scheduling: bool = False
    shared: SharedCost | None = None
    together: PrefillTogether | None = None
    computes_once: bool = False
    role: Role = "mixed"
    link: Link = Link()
    host_kv: KvTier | None = None
    disk_kv: KvTier | None = None
    pipeline: StageGrids | None = None
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(unknown_name("engine", self.engine, ENGINES))
        if self.num_blocks < 1:
            raise ConfigError(
                f"num_blocks must be at least 1, got {self.num_blocks} in {self.name}"
            )
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs must be at least 1, got {self.max_num_seqs}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}), or a decode could lack budget"
            )
        if self.role not in ROLES:
            raise ConfigError(unknown_name("role", self.role, list(ROLES)))
        if self.async_scheduling and (
            self.engine not in ("vllm", "trtllm") or self.shared is not None
        ):
            raise ConfigError(
                f"async_scheduling of {self.name} must be off: only engines vllm and trtllm that "
                "step by themselves form a step before the last one has ended"
            )
        if self.shared is not None and self.engine == "vllm-priority":
            raise ConfigError(
                f"engine of {self.name} must not be vllm-priority: ranks in lockstep form their "
                'steps without asking; take "vllm"'
            )
        if self.together is not None and (self.shared is None or self.engine != "trtllm"):
            raise ConfigError(
                f"together of {self.name} must be None: only ranks in lockstep of engine trtllm "
                "wait for each other with prefills"
            )
        if self.computes_once and self.engine != "trtllm":
            raise ConfigError(
                f"computes_once of {self.name} must be off: engine {self.engine} computes requests "
                "anew that it has preempted; only trtllm does not"
            )
        if self.pipeline is not None:
            self._check_explicit("stages of a pipeline", "set pipeline_parallel_size to 1")
        if self.speculation is not None:
            self._check_explicit("drafts", "leave speculative_config out")
            if self.pipeline is not None:
                raise ConfigError(
                    f"{self.name} has stages of a pipeline and drafts, which do not go together "
                    "yet: leave one of them out"
                )
            if self.max_num_batched_tokens <= self.num_drafts:
                raise ConfigError(
                    f"max_num_batched_tokens of {self.name} must be above the {self.num_drafts} "
                    f"drafts of a request, got {self.max_num_batched_tokens}"
                )

    def _check_explicit(self, what: str, instead: str) -> None:
        """Refuse what does not go together with batches that are formed one by one."""
        if self.engine not in ("vllm", "trtllm"):
            raise ConfigError(
                f"engine of {self.name} must be vllm or trtllm, as wherever there are {what}, got "
                f"{self.engine}: take one of these, or {instead}"
            )
        for name, is_set in (
            ("async_scheduling", self.async_scheduling),
            ("ranks in lockstep", self.shared is not None and self.pipeline is not None),
            (f"the role {self.role}", self.role != "mixed"),
            ("KV tiers", self.host_kv is not None or self.disk_kv is not None),
        ):
            if is_set:
                raise ConfigError(
                    f"{self.name} has {what} and {name}, which do not go together yet: leave one "
                    "of them out"
                )

    @property
    def parts(self) -> tuple[CostGrid, ...]:
        """Costs of the stages of its batches; none if it steps as one, in stretches of decodes."""
        if self.speculation is not None:
            return (self.speculation.steps,)
        return () if self.pipeline is None else self.pipeline.stages

    @property
    def num_stages(self) -> int:
        """Stages of its pipeline, 0 if it steps as one, in stretches of decodes."""
        return len(self.parts)

    @property
    def num_drafts(self) -> int:
        """Tokens that are drafted for each request that decodes."""
        return 0 if self.speculation is None else self.speculation.num_tokens

    @property
    def lookahead(self) -> int:
        """Tokens behind those of a step that blocks are taken for: the drafter writes there.

        vLLM's `num_lookahead_tokens`; `get_num_extra_kv_tokens` of TensorRT-LLM.
        """
        return self.num_drafts - (self.engine == "trtllm" and self.num_drafts > 0)

    @property
    def tokens_ahead(self) -> int:
        """Tokens behind the text of a request that its blocks must hold as well."""
        return self.num_drafts + self.lookahead

    @property
    def max_num_running(self) -> int:
        """Running requests at most, in all batches.

        TensorRT-LLM's limit is of each batch in flight (`max_batch_size * pp_size` sequences in
        `create_py_executor_instance`), vLLM's of all.
        """
        if self.engine == "trtllm":
            return self.max_num_seqs * max(1, self.num_stages)
        return self.max_num_seqs

    @property
    def num_ranks(self) -> int:
        """Replicas in a group of its like, 0 if it steps by itself."""
        return 0 if self.shared is None else self.shared.num_ranks

    def step_s(
        self, chunks: list[tuple[int, int]], num_decodes: int = 0, kv_tokens: int = 0
    ) -> float:
        """Return the seconds of one step, as `CostGrid.step_s`; all ranks of a group do the same.

        Args:
            chunks: `(chunk, context)` in tokens of every prefilling request in the step.
            num_decodes: Sequences that decode one token.
            kv_tokens: Tokens these attend to in all, their new ones included.
        """
        own_s = self.grid.step_s(chunks, num_decodes, kv_tokens)
        if self.shared is None:
            return own_s
        tokens = num_decodes + sum(chunk for chunk, _ in chunks)
        return own_s + self.shared.step_s([tokens] * self.num_ranks, prefills=bool(chunks))

    def capacity_tokens(self, block_size: int) -> int:
        """KV tokens that one request can come to have: less than all if the engine keeps some."""
        tokens = self.num_blocks * block_size - self.tokens_ahead
        if self.engine == "vllm-v0":
            return tokens - self.num_blocks // WATERMARK_BLOCKS * block_size
        if self.engine == "sglang":
            return max(0, tokens - block_size - 2)
        return tokens

    def needs_whole_prompts(self, chunked_prefill: bool) -> bool:
        """Whether a prompt must fit one step."""
        if self.engine in ("vllm-v0", "trtllm"):
            return True
        # without chunks SGLang computes a prompt beyond its limit in a step of its own
        return not chunked_prefill and self.engine != "sglang"


@dataclass(frozen=True)
class SloClass:
    """A service level: limits in seconds and what meeting them is worth."""

    name: str = "default"
    ttft_s: float = float("inf")
    tpot_s: float = float("inf")
    weight: float = 1.0


@dataclass(frozen=True)
class ClusterSpec:
    """Replica types and the rules all replicas and the router follow.

    Attributes:
        types: Replica types; replicas refer to them by index.
        slo_classes: Requests refer to them by index.
        block_size: Tokens in a KV block.
        prefix_caching: Whether engines reuse KV blocks of equal prefixes.
        chunked_prefill: Whether a prompt may be split over steps.
        allow_hold: Whether a router may hold a request for `hold_s`.
        allow_reject: Whether a router may reject a request.
        hold_s: How long a hold lasts, seconds.
        retain_kv_s: How long the KV blocks of a request that another waits for are kept for that
            one, seconds; 0 means not at all.
        metrics_interval_s: Time between scrapes of engine metrics; 0 means always fresh.
        noise_sigma: Standard deviation of the logarithm of step times; 0 means none.
        noise_period_steps: Steps that share one draw of that noise.
        transfers: How KV moves, if there are replicas that are not `"mixed"`, requests migrate or
            prefixes are fetched; and how large it is.
        migration: Which requests move to another replica while they wait or decode, and how.
        tiers: What lies behind the KV blocks of replicas, besides their own hosts and disks.
    """

    types: tuple[ReplicaType, ...]
    slo_classes: tuple[SloClass, ...] = (SloClass(),)
    block_size: int = 16
    prefix_caching: bool = False
    chunked_prefill: bool = True
    allow_hold: bool = False
    allow_reject: bool = False
    hold_s: float = 0.05
    retain_kv_s: float = 0.0
    metrics_interval_s: float = 0.0
    noise_sigma: float = 0.0
    noise_period_steps: int = 8
    transfers: TransferRules = TransferRules()
    migration: MigrationRules = MigrationRules()
    tiers: TierRules = field(default_factory=TierRules)

    @property
    def migrates(self) -> bool:
        """Whether requests can move from one replica to another."""
        return self.migration.interval_s > 0

    @property
    def moves_kv(self) -> bool:
        """Whether KV can move from one replica to another."""
        return self.disaggregated or self.migrates or self.fetches

    @property
    def fetches(self) -> bool:
        """Whether prefixes are fetched from the caches of other replicas."""
        return self.tiers.balancing_threshold is not None

    @property
    def tiered(self) -> bool:
        """Whether KV is loaded: copies are kept anywhere but on GPUs, or others' are fetched."""
        own = any(t.host_kv is not None or t.disk_kv is not None for t in self.types)
        return own or self.tiers.store is not None or self.fetches

    @property
    def disaggregated(self) -> bool:
        """Whether some requests are prefilled on one replica and decode on another."""
        return any(t.role != "mixed" for t in self.types)

    def __post_init__(self) -> None:
        if not self.types:
            raise ConfigError("a cluster needs at least one replica type, got none")
        for name in ("block_size", "noise_period_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("metrics_interval_s", "noise_sigma", "retain_kv_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.hold_s > 0:
            raise ConfigError(f"hold_s must be above 0, got {self.hold_s}")
        if self.retain_kv_s > 0 and not self.prefix_caching:
            raise ConfigError(
                f"retain_kv_s is {self.retain_kv_s}, but the prefix cache, where blocks are kept, "
                "is off: set prefix_caching, or retain_kv_s to 0"
            )
        if self.disaggregated and self.migrates:
            raise ConfigError(
                "requests migrate between replicas that do all of a request, but some here only "
                "prefill or decode: take the role mixed for all, or leave migration out"
            )
        for kind in self.types if self.migrates else ():
            if kind.engine not in ("vllm", "vllm-priority") or kind.shared is not None:
                raise ConfigError(
                    f"{kind.name} must have the engine vllm or vllm-priority and step by itself, as"
                    " all replicas where requests migrate: take one of these, or leave migration"
                    " out"
                )
        for kind in self.types if self.disaggregated else ():
            if kind.engine != "vllm":
                raise ConfigError(
                    f"{kind.name} must have the engine vllm, as all replicas where some only "
                    "prefill or decode: take engine vllm, or the role mixed for all"
                )
        if any(t.parts for t in self.types) and (self.migrates or self.tiered):
            raise ConfigError(
                "stages of a pipeline or drafts, and requests that migrate or KV in tiers, do not "
                "go together yet: set pipeline_parallel_size to 1 and leave speculative_config "
                "out, or leave migration and tiers out"
            )
        if any(t.async_scheduling for t in self.types) and (self.moves_kv or self.tiered):
            raise ConfigError(
                "async_scheduling and KV that moves between replicas or tiers do not go together "
                "yet: turn async_scheduling off, or leave roles, migration and tiers out"
            )
        if self.tiered:
            self._check_tiers()
        for kind in self.types:
            if kind.engine == "sglang" and kind.max_num_batched_tokens < self.block_size:
                raise ConfigError(
                    f"max_num_batched_tokens of sglang ({kind.max_num_batched_tokens}) must be at "
                    f"least block_size ({self.block_size}): it cuts prompts between blocks"
                )

    def _check_tiers(self) -> None:
        if not self.prefix_caching:
            raise ConfigError(
                "tiers keep copies of blocks of the prefix cache, which is off, and what is "
                "fetched comes from there: set prefix_caching, or leave the tiers and "
                "balancing_threshold out"
            )
        if not self.transfers.kv_token_bytes > 0:
            raise ConfigError(
                "kv_token_bytes must be above 0 where KV is loaded from tiers or peers, got "
                f"{self.transfers.kv_token_bytes}"
            )
        for kind in self.types:
            if kind.engine != "vllm" or kind.shared is not None:
                raise ConfigError(
                    f"{kind.name} must have the engine vllm and step by itself, as all replicas "
                    "where KV is loaded from tiers or peers: take engine vllm, or leave the tiers "
                    "and balancing_threshold out"
                )


@dataclass(frozen=True)
class Faults:
    """When replicas slow down, fail and recover, in order of time.

    Attributes:
        time_s: `float64[f]`, ascending.
        replica: `int16[f]`.
        kind: `FAULT_SLOW`, `FAULT_DOWN` or `FAULT_UP`, `int8[f]`.
        value: Speed multiplier of `FAULT_SLOW` (1 ends the episode), `float64[f]`.
    """

    time_s: FloatArray = field(default_factory=lambda: np.zeros(0))
    replica: Int16Array = field(default_factory=lambda: np.zeros(0, np.int16))
    kind: Int8Array = field(default_factory=lambda: np.zeros(0, np.int8))
    value: FloatArray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if (np.diff(self.time_s) < 0).any():
            raise ConfigError("faults must be in order of time")
        if not np.isin(self.kind, (FAULT_SLOW, FAULT_DOWN, FAULT_UP)).all():
            raise ConfigError("a fault kind must be FAULT_SLOW, FAULT_DOWN or FAULT_UP")
        if (self.value[self.kind == FAULT_SLOW] <= 0).any():
            raise ConfigError("the speed multiplier of a slow fault must be above 0")
        down: set[int] = set()
        for replica, kind in zip(self.replica.tolist(), self.kind.tolist(), strict=True):
            if (kind == FAULT_DOWN and replica in down) or (
                kind == FAULT_UP and replica not in down
            ):
                raise ConfigError(f"replica {replica} must go down and up by turns")
            if kind == FAULT_DOWN:
                down.add(replica)
            elif kind == FAULT_UP:
                down.discard(replica)
        if down:
            raise ConfigError(f"replicas {sorted(down)} fail and never recover: end with FAULT_UP")

    def __len__(self) -> int:
        return len(self.time_s)


@dataclass(frozen=True)
class Episode:
    """One draw of a scenario: requests, replicas, faults and noise.

    Attributes:
        table: The requests.
        type_idx: Replica type of each replica, `int16[num_replicas]`. Ranks in lockstep stand side
            by side: the first `num_ranks` in a row of such a type are one group, and so on.
        speed: Speed factor of each replica, 1 is nominal, `float64[num_replicas]`.
        faults: Slow-downs, failures and recoveries.
        noise_seed: Seed of the step-time noise.
    """

    table: RequestTable
    type_idx: Int16Array
    speed: FloatArray
    faults: Faults = field(default_factory=Faults)
    noise_seed: int = 0

    @property
    def num_replicas(self) -> int:
        """Number of replicas."""
        return len(self.type_idx)

    def validate(self, spec: ClusterSpec) -> None:
        """Refuse what cannot be simulated.

        Raises:
            ConfigError: If a replica, a fault or a request does not fit the cluster.
        """
        if self.num_replicas < 1 or len(self.speed) != self.num_replicas:
            raise ConfigError("an episode needs a type and a speed for each of its replicas")
        if (self.type_idx < 0).any() or (self.type_idx >= len(spec.types)).any():
            raise ConfigError(f"type_idx must be within 0..{len(spec.types) - 1}")
        if not (self.speed > 0).all():
            raise ConfigError("the speed of a replica must be above 0")
        if (
            len(self.faults)
            and not ((self.faults.replica >= 0) & (self.faults.replica < self.num_replicas)).all()
        ):
            raise ConfigError(f"faults must name replicas 0..{self.num_replicas - 1}")
        self._check_ranks(spec)
        if (self.table.slo_class >= len(spec.slo_classes)).any():
            raise ConfigError(
                f"the workload uses SLO class {int(self.table.slo_class.max())}, but only "
                f"{len(spec.slo_classes)} are defined"
            )
        need = self.table.prompt_tokens.astype(np.int64) + self.table.output_tokens - 1
        types = [spec.types[t] for t in sorted(set(self.type_idx.tolist()))]
        roles = {t.role for t in types}
        if roles == {"prefill"}:
            raise ConfigError(
                "all replicas have the role prefill: requests need some of role decode or mixed"
            )
        if "decode" in roles and "prefill" not in roles:
            raise ConfigError(
                "replicas of role decode get requests from those of role prefill, but there are "
                "none: add some, or take the role mixed"
            )
        _check_capacity(spec, need, [t for t in types if t.role != "decode"])
        _check_capacity(spec, need, [t for t in types if t.role != "prefill"])
        for kind in [t for t in types if t.needs_whole_prompts(spec.chunked_prefill)]:
            once = kind.computes_once and not (self.faults.kind == FAULT_DOWN).any()
            longest = int((self.table.prompt_tokens if once else need).max())
            if longest > kind.max_num_batched_tokens:
                raise ConfigError(
                    f"{kind.name} computes whole prompts: its max_num_batched_tokens "
                    f"({kind.max_num_batched_tokens}) must cover the longest "
                    f"{'prompt' if once else 'request'} ({longest} tokens); raise it, or cut the "
                    f"longest {'prompts' if once else 'requests'}"
                )

    def _check_ranks(self, spec: ClusterSpec) -> None:
        num_ranks = np.array([t.num_ranks for t in spec.types])[self.type_idx]
        for first in np.unique(first_ranks(num_ranks)).tolist():
            size = max(1, int(num_ranks[first]))
            group = self.type_idx[first : first + size]
            if len(group) < size or (group != group[0]).any():
                raise ConfigError(
                    f"replica {first} is the first of {size} ranks in lockstep, so that as many "
                    f"replicas of {spec.types[group[0]].name} must stand side by side"
                )
        stopping = self.faults.replica[self.faults.kind != FAULT_SLOW]
        stopping = stopping[num_ranks[stopping] > 0]
        if len(stopping):
            raise ConfigError(
                f"replica {stopping[0]} is one of several ranks in lockstep, which do not fail one "
                "by one: take only FAULT_SLOW for them"
            )


def _check_capacity(spec: ClusterSpec, need: IntArray, types: list[ReplicaType]) -> None:
    """Refuse requests that none of these could ever take."""
    capacity = max(t.capacity_tokens(spec.block_size) for t in types)
    if (need > capacity).any():
        i = int(np.argmax(need))
        raise ConfigError(
            f"request {i} needs {need[i]} KV tokens, but the largest replica holds {capacity}: "
            "give it more memory, or cut the longest requests"
        )


def first_ranks(num_ranks: IntArray) -> IntArray:
    """Return the first replica of each one's group.

    Args:
        num_ranks: Ranks in its group, 0 for a replica that steps by itself,
            `int64[num_replicas]`.

    Returns:
        A replica that steps by itself is its own first, `int64[num_replicas]`.
    """
    first = np.arange(len(num_ranks))
    i = 0
    while i < len(num_ranks):
        stop = i + max(1, int(num_ranks[i]))
        first[i:stop] = i
        i = stop
    return first
