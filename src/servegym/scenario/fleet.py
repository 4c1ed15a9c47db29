"""The fleet of a scenario: replicas, their engines, and what their steps cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from servegym.assets.specs import gpu, model
from servegym.calibrate.calibration import calibrated_cost
from servegym.cluster.spec import (
    Link,
    MigrationRule,
    ReplicaType,
    Reservation,
    Role,
    Victim,
)
from servegym.cluster.tier_rules import KvTier, LoadRule
from servegym.costs.formats import ScenarioFormat, number_format
from servegym.costs.grid import scaled
from servegym.costs.pipeline import NetworkLink, PipelineCost
from servegym.costs.speculation import Speculation, check_acceptance, with_drafter
from servegym.costs.stages import StageGrids
from servegym.costs.step import StepCost
from servegym.costs.tables import TableSource
from servegym.costs.uncertainty import Uncertainty, World
from servegym.engines import MAX_NUM_BATCHED_TOKENS, EngineName, kernels_of
from servegym.errors import ConfigError
from servegym.scenario.config import Config, Count, Factor, ascending

#: GPUs of a node, in machines of the HGX kind: what is more needs a network.
GPUS_PER_NODE = 8


class EngineConfig(Config):
    """Engine settings, with vLLM's names; the defaults are vLLM's for a server.

    `max_num_batched_tokens` is each engine's own where it is not given, 2,048 for vLLM.
    `retain_kv_s` is not a setting of vLLM: for how long the KV blocks of a request that another
    waits for are kept for that one, seconds (0: not at all); docs/simulator.md.
    """

    block_size: int = Field(16, ge=1)
    max_num_batched_tokens: int | None = Field(None, ge=1)
    max_num_seqs: int = Field(256, ge=1)
    prefix_caching: bool = True
    chunked_prefill: bool = True
    kv_memory_fraction: float = Field(0.9, gt=0, le=1)
    retain_kv_s: float = Field(0.0, ge=0)


class Drawn(Protocol):
    """What a fleet is drawn from; a pair of numbers is a range."""

    @property
    def count(self) -> int | tuple[int, int]:
        """How many there are."""

    @property
    def speed(self) -> float | tuple[float, float]:
        """Factor on their speed."""


class LinkConfig(Config):
    """How KV gets from a replica and to it: each replica has one link in either direction.

    A transfer takes `latency_s`, `piece_s` for each piece of memory (K and V of every layer and
    block are one each), and its bytes over the lower `gb_per_s` of both ends.
    """

    gb_per_s: Factor
    latency_s: float = Field(0.0, ge=0)
    piece_s: float = Field(0.0, ge=0)


class TransferConfig(Config):
    """How prefilled KV gets to where a request decodes; docs/disaggregation.md.

    `reservation` says who holds memory first, the replica that prefills (`source`, vLLM) or the one
    where the request will decode (`destination`, SGLang, which keeps `ahead_tokens` free for each
    active request). Prefilled KV is held for `lease_s` until it is fetched.
    """

    reservation: Reservation = "source"
    lease_s: float = Field(480.0, gt=0)
    ahead_tokens: int = Field(512, ge=0)
    max_num_held: int = Field(256, ge=1)


class MigrationConfig(Config):
    """Which requests move to another replica while they wait or decode; docs/migration.md.

    Every `interval_s` the `rule` says who does: `freeness` (Llumnix) pairs replicas with fewer than
    `source_below` free blocks a request with those with more than `target_above`, and the `victim`
    of the first goes to the second; `queues` levels waiting queues that differ by `queue_gap`;
    `none` moves nobody. KV is copied in at most `max_stages` stages, until `last_stage_blocks` or
    less are left, for which the request pauses.
    """

    interval_s: float = Field(0.05, gt=0)
    rule: MigrationRule = "freeness"
    victim: Victim = "shortest"
    source_below: float = 3.0
    target_above: float = 3.0
    queue_gap: int = Field(2, ge=1)
    last_stage_blocks: int = Field(16, ge=1)
    max_stages: int = Field(3, ge=1)


class KvTierConfig(Config):
    """Memory of a replica's host, or its disk, that keeps copies of its KV blocks.

    `gb_per_s` is of what comes from it, and of what goes to it unless `write_gb_per_s` says else.
    """

    gib: Factor
    gb_per_s: Factor
    write_gb_per_s: Factor | None = None
    latency_s: float = Field(0.0, ge=0)


class KvStoreConfig(Config):
    """A store of KV blocks that all replicas share, with `gb_per_s` in either direction in all.

    Each replica has a link to it, of `link_gb_per_s` in either direction.
    """

    gib: Factor
    gb_per_s: Factor
    link_gb_per_s: Factor
    latency_s: float = Field(0.0, ge=0)


class KvTiersConfig(Config):
    """What replicas have in common of the tiers behind their KV blocks; docs/kv-tiers.md.

    `load` says whether KV that a tier has is always loaded, or only where computing it anew takes
    longer (`faster`). Steps that begin while KV moves between a GPU and its tiers last
    `interference` times as long. With a `balancing_threshold` prefixes are fetched from the caches
    of other replicas, over the `link` of each: what is more than so many times as long there.
    """

    load: LoadRule = "always"
    interference: float = Field(1.0, ge=1)
    balancing_threshold: float | None = Field(None, ge=1)


class StageLinkConfig(Config):
    """How each GPU of a stage is linked to its counterpart on the node of the next stage."""

    gb_per_s: Factor
    latency_s: float = Field(0.0, ge=0)


class SpeculativeConfig(Config):
    """Tokens that a layer of the model's own drafts (multi-token prediction, EAGLE).

    `acceptance_rates` says for each of `num_speculative_tokens` drafts how often it and all before
    it are accepted, as vLLM logs and takes in `synthetic_acceptance_rates`; one number: each is
    accepted so often where the one before it is.
    """

    num_speculative_tokens: int = Field(ge=1)
    acceptance_rates: tuple[float, ...] | float

    @model_validator(mode="after")
    def _check_rates(self) -> Self:
        given = self.acceptance_rates
        if isinstance(given, tuple) and len(given) != self.num_speculative_tokens:
            raise ValueError(
                f"acceptance_rates must be one number or {self.num_speculative_tokens}, as many as "
                f"num_speculative_tokens, got {len(given)}"
            )
        check_acceptance(self.rates)
        return self

    @property
    def rates(self) -> tuple[float, ...]:
        """One for each draft."""
        given = self.acceptance_rates
        if isinstance(given, tuple):
            return given
        return tuple(given ** (i + 1) for i in range(self.num_speculative_tokens))


class FleetEntry(Config):
    """Equal replicas; a pair of numbers is a range, drawn anew for every episode.

    `costs` says where kernel times come from: the `fits` of servegym, or the measured `tables` of
    the package aiconfigurator-core, which must be installed. `calibration` names a file of
    `servegym calibrate` instead, made for this GPU, model and tp. `engine` says whose rules form
    the steps; `max_num_batched_tokens` and `max_num_seqs` are those of the scenario's `engine`
    section unless given, and where that names no budget, the engine's own. `async_scheduling` lets
    them form a step when the one before begins (vllm, trtllm). `eager_prefill_s` is the least time
    of a step that prefills, where its kernels are launched one by one. `role` says whether the
    replicas do all of a request, or only prefill or only decode; where some do, requests migrate or
    prefixes are fetched, each entry needs a `link`. `pipeline_parallel_size` splits the layers over
    so many stages of `tp` GPUs, with as many batches in flight (vllm, trtllm); stages on nodes of
    their own need a `pp_link`. `speculative_config` has a layer draft tokens for what decodes,
    which are verified in its next step (vllm, trtllm). `host_kv` and `disk_kv` keep copies of each
    replica's KV blocks.
    """

    gpu: str
    count: Count | tuple[Count, Count] = 1
    tp: int = Field(1, ge=1)
    pipeline_parallel_size: int = Field(1, ge=1)
    pp_link: StageLinkConfig | None = None
    speed: Factor | tuple[Factor, Factor] = 1.0
    num_blocks: int | None = Field(None, ge=1)
    costs: Literal["fits", "tables"] = "fits"
    calibration: str | None = None
    engine: EngineName = "vllm"
    max_num_batched_tokens: int | None = Field(None, ge=1)
    max_num_seqs: int | None = Field(None, ge=1)
    async_scheduling: bool = False
    eager_prefill_s: float = Field(0.0, ge=0)
    role: Role = "mixed"
    link: LinkConfig | None = None
    speculative_config: SpeculativeConfig | None = None
    host_kv: KvTierConfig | None = None
    disk_kv: KvTierConfig | None = None

    _check_ranges = field_validator("count", "speed")(ascending)

    @property
    def num_gpus(self) -> int:
        """GPUs of one replica."""
        return self.tp * self.pipeline_parallel_size

    @model_validator(mode="after")
    def _check_drafts(self) -> Self:
        if self.speculative_config is None:
            return self
        if self.engine not in ("vllm", "trtllm"):
            raise ValueError(
                f"engine must be vllm or trtllm where there is a speculative_config, got "
                f"{self.engine}"
            )
        if self.calibration:
            raise ValueError(
                "a calibration is of whole steps without drafts: leave it out, or the "
                "speculative_config"
            )
        if self.pipeline_parallel_size > 1:
            raise ValueError(
                "speculative_config does not go with stages of a pipeline yet: set "
                "pipeline_parallel_size to 1, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if self.pipeline_parallel_size == 1:
            if self.pp_link is not None:
                raise ValueError(
                    "pp_link is of the link between stages, but there is one: set "
                    "pipeline_parallel_size, or leave it out"
                )
            return self
        if self.engine not in ("vllm", "trtllm"):
            raise ValueError(
                f"engine must be vllm or trtllm where pipeline_parallel_size is above 1, got "
                f"{self.engine}"
            )
        if self.calibration:
            raise ValueError(
                "a calibration is of whole steps on one stage: set pipeline_parallel_size to 1, or "
                "leave the calibration out"
            )
        if self.num_gpus > GPUS_PER_NODE and self.pp_link is None:
            raise ValueError(
                f"tp times pipeline_parallel_size is {self.num_gpus} GPUs, more than the "
                f"{GPUS_PER_NODE} of a node: say how stages on different nodes are linked, as in "
                "pp_link: {gb_per_s: 50}, or lower one of them"
            )
        return self


def step_cost(entry: FleetEntry, model_name: str, precision: ScenarioFormat) -> StepCost:
    """Return the step cost of a model on a fleet entry's replicas.

    Raises:
        ConfigError: If its calibration file is wrong, or made for others; or if there are no
            tables of its GPU, or they are not installed.
    """
    if entry.calibration:
        if entry.costs == "tables":
            raise ConfigError("a fleet entry takes costs: tables or a calibration file, not both")
        if precision not in ("bf16", "fp8"):
            raise ConfigError(
                f"a calibration file is for precision bf16 or fp8, not {precision}: leave one out"
            )
        path = Path(entry.calibration)
        return calibrated_cost(path, entry.gpu, model_name, entry.tp, precision)
    return _bundled_cost(
        entry.gpu, model_name, entry.tp, precision, entry.costs, kernels_of(entry.engine)
    )


@cache
def _bundled_cost(
    gpu_name: str,
    model_name: str,
    tp: int,
    precision: ScenarioFormat,
    costs: Literal["fits", "tables"],
    engine: EngineName,
) -> StepCost:
    """Return the step cost by the bundled fits or tables; many scenarios share what it compiles."""
    spec, weights = gpu(gpu_name), number_format(precision)
    source = TableSource(spec, weights.fp8) if costs == "tables" else None
    return StepCost(
        spec, model(model_name), tp, weights.fp8, source, engine=engine, scales=weights.scales
    )


def pipeline_cost(entry: FleetEntry, cost: StepCost) -> PipelineCost:
    """Split the layers of a fleet entry's model over its stages, of which there may be one.

    Raises:
        ConfigError: If there are more stages than layers, or the cost of a transfer between them
            is not known.
    """
    layers, pp = cost.model.layers, entry.pipeline_parallel_size
    if pp > layers:
        raise ConfigError(
            f"pipeline_parallel_size must be from 1 to the {layers} layers of the model, got {pp}"
        )
    link = entry.pp_link
    network = NetworkLink(1e9 * link.gb_per_s, link.latency_s) if link else None
    return PipelineCost(cost, pp, network)


def replica_type(
    entry: FleetEntry, model_name: str, precision: ScenarioFormat, engine: EngineConfig
) -> ReplicaType:
    """Compile a fleet entry."""
    cost = step_cost(entry, model_name, precision)
    stages = pipeline_cost(entry, cost)
    drafts = entry.speculative_config
    holds = with_drafter(cost) if drafts else stages
    blocks = entry.num_blocks or (
        holds.kv_capacity_tokens(engine.kv_memory_fraction) // engine.block_size
    )
    budget = entry.max_num_batched_tokens or engine.max_num_batched_tokens
    budget = budget or MAX_NUM_BATCHED_TOKENS[entry.engine]
    max_tokens = max(budget, 64)
    max_num_seqs = entry.max_num_seqs or engine.max_num_seqs
    pipeline, speculation = None, None
    if drafts:
        speculation = Speculation.of(cost, drafts.rates, max_tokens)
        speculation = speculation.changed(
            lambda steps: replace(steps, eager_s=entry.eager_prefill_s)
        )
        grid = speculation.per_token(max_num_seqs)
    elif stages.pp > 1:
        eager_s = entry.eager_prefill_s / stages.pp
        pipeline = StageGrids.of(stages, max_tokens)
        pipeline = pipeline.changed(lambda stage: replace(stage, eager_s=eager_s))
        grid = pipeline.shared_round
    else:
        grid = replace(cost.compile(max_tokens=max_tokens), eager_s=entry.eager_prefill_s)
    return ReplicaType(
        name=_name(entry),
        grid=grid,
        num_blocks=blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        price_usd_per_h=cost.gpu.price_usd_per_h * entry.num_gpus,
        num_gpus=entry.num_gpus,
        engine=entry.engine,
        async_scheduling=entry.async_scheduling,
        role=entry.role,
        link=_link(entry.link),
        host_kv=_tier(entry.host_kv, cost, engine.block_size),
        disk_kv=_tier(entry.disk_kv, cost, engine.block_size),
        pipeline=pipeline,
        speculation=speculation,
    )


def kv_store(store: KvStoreConfig, cost: StepCost, block_size: int) -> KvTier:
    """Return the store that all replicas share, with their links to it."""
    own = KvTierConfig(gib=store.gib, gb_per_s=store.link_gb_per_s, latency_s=store.latency_s)
    tier = _tier(own, cost, block_size)
    assert tier is not None
    return tier


def in_world(replica: ReplicaType, uncertainty: Uncertainty, world: World) -> ReplicaType:
    """Return a replica type with the kernels and the engine of a world."""
    factor = uncertainty.engine_factor(world, replica.engine)
    if replica.speculation is not None:
        speculation = uncertainty.speculation_in_world(replica.speculation, world)
        speculation = speculation.slower(factor)
        grid = speculation.per_token(replica.max_num_seqs)
        return replace(replica, grid=grid, speculation=speculation)
    if replica.pipeline is None:
        grid = uncertainty.in_world(replica.grid, world)
        return replace(replica, grid=scaled(grid, factor))
    pipeline = uncertainty.stages_in_world(replica.pipeline, world)
    pipeline = pipeline.changed(lambda stage: scaled(stage, factor))
    return replace(replica, grid=pipeline.shared_round, pipeline=pipeline)


def uncertainty_of(entry: FleetEntry, cost: StepCost, replica: ReplicaType) -> Uncertainty:
    """Say how far the steps of a fleet entry's replicas may be off."""
    grid = replica.parts[0] if replica.parts else replica.grid
    return Uncertainty.of(entry.gpu, cost, grid)


def draw_fleet(
    rng: np.random.Generator, entries: Iterable[tuple[int, Drawn]]
) -> tuple[list[int], list[float]]:
    """Draw a fleet; return the type and the speed factor of each of it.

    Args:
        rng: Draws.
        entries: Types, and how many there are of each and how fast.
    """
    types: list[int] = []
    speeds: list[float] = []
    for index, entry in entries:
        for _ in range(_count(rng, entry.count)):
            types.append(index)
            speeds.append(_speed(rng, entry.speed))
    return types, speeds


def _name(entry: FleetEntry) -> str:
    parts = [f"{entry.gpu} x{entry.tp}"]
    parts += [f"pp{entry.pipeline_parallel_size}"] if entry.pipeline_parallel_size > 1 else []
    drafts = entry.speculative_config
    parts += [f"{drafts.num_speculative_tokens} drafts"] if drafts else []
    parts += [entry.engine] if entry.engine != "vllm" else []
    parts += ["async"] if entry.async_scheduling else []
    parts += [entry.role] if entry.role != "mixed" else []
    return " ".join(parts)


def _link(link: LinkConfig | None) -> Link:
    return Link(1e9 * link.gb_per_s, link.latency_s, link.piece_s) if link else Link()


def _tier(tier: KvTierConfig | None, cost: StepCost, block_size: int) -> KvTier | None:
    if tier is None:
        return None
    return KvTier(
        num_blocks=int(tier.gib * 2**30 / (cost.kv_token_bytes * block_size)),
        read_bytes_per_s=1e9 * tier.gb_per_s,
        write_bytes_per_s=1e9 * (tier.write_gb_per_s or tier.gb_per_s),
        latency_s=tier.latency_s,
    )


def _count(rng: np.random.Generator, count: int | tuple[int, int]) -> int:
    """Draw a number of replicas from its range."""
    return count if isinstance(count, int) else int(rng.integers(count[0], count[1] + 1))


def _speed(rng: np.random.Generator, speed: float | tuple[float, float]) -> float:
    """Draw a speed factor from its range."""
    return speed if isinstance(speed, float | int) else float(rng.uniform(*speed))
