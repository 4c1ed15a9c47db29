"""A scenario: cluster, workload, service levels, disturbances and objective in one YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from servegym.cluster.nominal import request_alone_s
from servegym.cluster.spec import (
    ClusterSpec,
    Episode,
    MigrationRules,
    SloClass,
    TransferRules,
)
from servegym.cluster.tier_rules import TierRules
from servegym.costs.formats import ScenarioFormat
from servegym.costs.step import StepCost
from servegym.costs.uncertainty import Uncertainty, World
from servegym.errors import ConfigError
from servegym.scenario.config import Config
from servegym.scenario.disturbances import DisturbanceConfig, draw_faults
from servegym.scenario.files import bundled_names, load, parse
from servegym.scenario.fleet import (
    EngineConfig,
    FleetEntry,
    KvStoreConfig,
    KvTiersConfig,
    MigrationConfig,
    TransferConfig,
    draw_fleet,
    in_world,
    kv_store,
    replica_type,
    step_cost,
    uncertainty_of,
)
from servegym.workloads.config import GeneratedConfig, TraceConfig, WorkloadConfig
from servegym.workloads.table import BY_ITSELF, RequestTable

_FOLDER = "scenarios"


class SloConfig(Config):
    """A service level and its share of the requests."""

    name: str
    ttft_s: float = Field(gt=0)
    tpot_s: float = Field(gt=0)
    share: float = Field(1.0, gt=0)
    weight: float = Field(1.0, ge=0)


class ActionConfig(Config):
    """What a router may do besides choosing a replica."""

    hold: bool = False
    hold_s: float = Field(0.05, gt=0)
    reject: bool = False


class Scenario(Config):
    """Everything an episode is drawn from."""

    name: str
    description: str = ""
    model: str = "Llama-3.1-8B"
    precision: ScenarioFormat = "bf16"
    engine: EngineConfig = EngineConfig()
    fleet: tuple[FleetEntry, ...] = Field(min_length=1)
    transfers: TransferConfig = TransferConfig()
    migration: MigrationConfig | None = None
    kv_tiers: KvTiersConfig = KvTiersConfig()
    kv_store: KvStoreConfig | None = None
    workload: WorkloadConfig
    slo_classes: tuple[SloConfig, ...] = Field(
        (SloConfig(name="default", ttft_s=2.0, tpot_s=0.1),), min_length=1
    )
    disturbances: DisturbanceConfig = DisturbanceConfig()
    objective: Literal["latency", "tail", "goodput"] = "latency"
    actions: ActionConfig = ActionConfig()
    num_requests: int = Field(512, ge=1)

    @model_validator(mode="after")
    def _check_roles(self) -> Self:
        roles = {entry.role for entry in self.fleet}
        if roles == {"mixed"}:
            # a scenario that was written out whole has the defaults in it
            for name, usual in TransferConfig():
                if name == "max_num_held" and (self.migration is not None or self._fetches):
                    continue  # it bounds who holds memory at both ends of these, too
                if getattr(self.transfers, name) != usual:
                    raise ValueError(
                        f"transfers.{name} is set, but all replicas have the role mixed, so that "
                        "nothing is transferred: give some the role prefill, or leave it out"
                    )
            return self
        if "prefill" not in roles or roles == {"prefill"}:
            raise ValueError(
                "where replicas only prefill or decode, some must have the role prefill and some "
                f"decode or mixed, got {', '.join(sorted(roles))}"
            )
        for i, entry in enumerate(self.fleet):
            if entry.engine != "vllm":
                raise ValueError(
                    f"fleet.{i}.engine must be vllm, as that of all replicas where some only "
                    f"prefill or decode, got {entry.engine}"
                )
            if entry.link is None:
                raise ValueError(
                    f"fleet.{i}.link is missing: where some replicas only prefill or decode, say "
                    "how KV gets to the others and back, as in link: {gb_per_s: 25}"
                )
        return self

    @model_validator(mode="after")
    def _check_migration(self) -> Self:
        if self.migration is None:
            return self
        if self.max_replicas < 2:
            raise ValueError("migration needs two replicas or more, got a fleet of one")
        for i, entry in enumerate(self.fleet):
            if entry.role != "mixed":
                raise ValueError(
                    f"fleet.{i}.role must be mixed, as that of all replicas where requests "
                    f"migrate, got {entry.role}"
                )
            if entry.engine not in ("vllm", "vllm-priority"):
                raise ValueError(
                    f"fleet.{i}.engine must be vllm or vllm-priority, as that of all replicas "
                    f"where requests migrate, got {entry.engine}"
                )
            if entry.link is None:
                raise ValueError(
                    f"fleet.{i}.link is missing: where requests migrate, say how KV gets to the "
                    "others and back, as in link: {gb_per_s: 25}"
                )
        return self

    @property
    def _fetches(self) -> bool:
        """Whether prefixes are fetched from the caches of other replicas."""
        return self.kv_tiers.balancing_threshold is not None

    @model_validator(mode="after")
    def _check_tiers(self) -> Self:
        own = any(entry.host_kv is not None or entry.disk_kv is not None for entry in self.fleet)
        if not own and self.kv_store is None:
            for name, usual in KvTiersConfig():
                if getattr(self.kv_tiers, name) == usual or (
                    self._fetches and name != "interference"
                ):
                    continue
                raise ValueError(
                    f"kv_tiers.{name} is set, but no KV is kept anywhere but on GPUs: give "
                    "fleet entries host_kv or disk_kv, or all a kv_store, or leave it out"
                )
            if not self._fetches:
                return self
        if not self.engine.prefix_caching:
            raise ValueError(
                "engine.prefix_caching is off, but tiers keep copies of what is in the prefix "
                "cache, and what is fetched comes from there: turn it on, or leave host_kv, "
                "disk_kv, kv_store and balancing_threshold out"
            )
        for i, entry in enumerate(self.fleet):
            if entry.engine != "vllm":
                raise ValueError(
                    f"fleet.{i}.engine must be vllm, as that of all replicas where KV is loaded "
                    f"from tiers or from others, got {entry.engine}"
                )
            if self._fetches and entry.link is None:
                raise ValueError(
                    f"fleet.{i}.link is missing: where prefixes are fetched from other replicas, "
                    "say how KV gets to them and back, as in link: {gb_per_s: 25}"
                )
        if self._fetches and self.max_replicas < 2:
            raise ValueError(
                "kv_tiers.balancing_threshold needs two replicas or more, got a fleet of one"
            )
        return self

    @cached_property
    def spec(self) -> ClusterSpec:
        """Replica types (one per fleet entry) and rules."""
        engine, trouble = self.engine, self.disturbances
        return ClusterSpec(
            types=tuple(
                replica_type(entry, self.model, self.precision, engine) for entry in self.fleet
            ),
            slo_classes=tuple(
                SloClass(c.name, c.ttft_s, c.tpot_s, c.weight) for c in self.slo_classes
            ),
            block_size=engine.block_size,
            prefix_caching=engine.prefix_caching,
            chunked_prefill=engine.chunked_prefill,
            retain_kv_s=engine.retain_kv_s,
            allow_hold=self.actions.hold,
            allow_reject=self.actions.reject,
            hold_s=self.actions.hold_s,
            metrics_interval_s=trouble.metrics_interval_s,
            noise_sigma=trouble.step_noise_sigma,
            noise_period_steps=trouble.noise_period_steps,
            transfers=self._transfer_rules,
            migration=(
                MigrationRules(**self.migration.model_dump())
                if self.migration is not None
                else MigrationRules()
            ),
            tiers=self._tier_rules,
        )

    @property
    def _tier_rules(self) -> TierRules:
        rules, store = TierRules(**self.kv_tiers.model_dump()), self.kv_store
        if store is None:
            return rules
        cost = self.step_cost(self.fleet[0])
        return replace(
            rules,
            store=kv_store(store, cost, self.engine.block_size),
            store_bytes_per_s=1e9 * store.gb_per_s,
        )

    @cached_property
    def _uncertainties(self) -> tuple[Uncertainty, ...]:
        """How far the steps of each type of replica may be off."""
        return tuple(
            uncertainty_of(entry, self.step_cost(entry), kind)
            for entry, kind in zip(self.fleet, self.spec.types, strict=True)
        )

    def in_world(self, world: World) -> Self:
        """Return the scenario with kernels and engines that are off as in a world."""
        types = zip(self.spec.types, self._uncertainties, strict=True)
        made = self.model_copy()
        # where the cached property keeps what it found
        made.__dict__["spec"] = replace(
            self.spec, types=tuple(in_world(kind, doubt, world) for kind, doubt in types)
        )
        return made

    @property
    def _transfer_rules(self) -> TransferRules:
        cost = self.step_cost(self.fleet[0])
        layers = cost.model.layers
        return TransferRules(
            kv_token_bytes=cost.kv_token_bytes,
            kv_block_pieces=layers if cost.model.latent_dim else 2 * layers,
            **self.transfers.model_dump(),
        )

    @property
    def played_workload(self) -> WorkloadConfig:
        """The workload; the longest context of a trace is at most what a replica here can take."""
        if not isinstance(self.workload, TraceConfig):
            return self.workload
        return self.workload.model_copy(
            update={"max_context_tokens": min(self.workload.max_context_tokens, self.longest)}
        )

    @property
    def longest(self) -> int:
        """Most tokens, prompt and output, of a request that the fleet can take."""
        types, engine = self.spec.types, self.engine
        most = max(t.capacity_tokens(engine.block_size) for t in types)
        whole = [t for t in types if t.needs_whole_prompts(engine.chunked_prefill)]
        return max(2, min([most, *(t.max_num_batched_tokens for t in whole)]))

    def step_cost(self, entry: FleetEntry) -> StepCost:
        """Return the step cost of a fleet entry's replicas.

        Raises:
            ConfigError: If its calibration file is wrong, or made for others.
        """
        return step_cost(entry, self.model, self.precision)

    @property
    def max_replicas(self) -> int:
        """Largest fleet an episode can have."""
        return sum(e.count if isinstance(e.count, int) else e.count[1] for e in self.fleet)

    @property
    def orders_requests(self) -> bool:
        """Whether there is one engine that goes by priorities: its order is what is decided."""
        entry = self.fleet[0]
        return len(self.fleet) == 1 and entry.count == 1 and entry.engine == "vllm-priority"

    @property
    def orders_fleet(self) -> bool:
        """Whether there are several engines that all go by priorities: then they take orders."""
        engines = {entry.engine for entry in self.fleet}
        return engines == {"vllm-priority"} and not self.orders_requests

    def _last_s(self, table: RequestTable, types: Sequence[int], speeds: Sequence[float]) -> float:
        """Until when there are faults: the last arrival.

        Where requests wait for others, nobody knows it beforehand: then later than under any
        policy, after each of them was alone on the slowest replica, one after the other.
        """
        last_s = float(table.arrival_s[-1])
        if (table.after == BY_ITSELF).all():
            return last_s
        prompt, output = float(table.prompt_tokens.mean()), float(table.output_tokens.mean())
        each_s = max(
            request_alone_s(self.spec.types[t], prompt, output) / speed
            for t, speed in zip(types, speeds, strict=True)
        )
        return last_s + float(table.delay_s.sum()) + len(table) * each_s

    @staticmethod
    def request_rng(seed: int) -> np.random.Generator:
        """Return the randomness that the requests of a seed are drawn with."""
        return np.random.default_rng(np.random.SeedSequence(seed).spawn(5)[0])

    def episode(self, seed: int, *, load: float = 1.0, num_requests: int | None = None) -> Episode:
        """Draw an episode; the requests of a seed are the same under every policy and fleet.

        Args:
            seed: Of all randomness of the episode.
            load: Multiplies the arrival rate.
            num_requests: Instead of the scenario's own.

        Raises:
            ConfigError: If the load or the number of requests is impossible.
        """
        if not 0 < load < np.inf:
            raise ConfigError(f"load must be above 0 and finite, got {load}")
        if num_requests is None:
            num_requests = self.num_requests
        elif num_requests < 1:
            raise ConfigError(f"num_requests must be at least 1, got {num_requests}")
        _, lengths, fleet, faults, noise = np.random.SeedSequence(seed).spawn(5)
        table = self.played_workload.table(
            self.request_rng(seed),
            num_requests=num_requests,
            load=load,
            class_shares=[c.share for c in self.slo_classes],
        )
        predicted = self.disturbances.predictor.predict(
            np.random.default_rng(lengths), table.output_tokens
        )
        trouble = self.disturbances
        fails = trouble.fail_slow.rate_per_replica_hour or trouble.fail_stop.rate_per_replica_hour
        types, speeds = draw_fleet(np.random.default_rng(fleet), enumerate(self.fleet))
        return Episode(
            table=replace(table, predicted_output_tokens=predicted),
            type_idx=np.array(types, np.int16),
            speed=np.array(speeds, np.float64),
            faults=draw_faults(
                trouble.fail_slow,
                trouble.fail_stop,
                np.random.default_rng(faults),
                len(types),
                self._last_s(table, types, speeds) if fails else 0.0,
            ),
            noise_seed=int(noise.generate_state(1, np.uint64)[0]),
        )


def open_loop(scenario: Scenario) -> Scenario:
    """Return a scenario whose sessions go on without waiting for their answers.

    Raises:
        ConfigError: If nobody in it waits, or there would be no times to come at.
    """
    workload = scenario.workload
    leave_out = "leave --no-wait-for-answers out"
    if isinstance(workload, TraceConfig):
        raise ConfigError(
            f"{scenario.name} plays a trace: write wait_for_answers: false beside its path and"
            f" {leave_out}"
        )
    if not isinstance(workload, GeneratedConfig):
        raise ConfigError(
            f"requests of {scenario.name} (workload kind {workload.kind}) have no times of their"
            f" own, they follow answers: {leave_out}"
        )
    if workload.sessions is None or not workload.sessions.wait_for_answers:
        raise ConfigError(f"no request of {scenario.name} waits for an answer: {leave_out}")
    sessions = workload.sessions.model_copy(update={"wait_for_answers": False})
    return scenario.model_copy(
        update={
            "name": f"{scenario.name}, open loop",
            "workload": workload.model_copy(update={"sessions": sessions}),
        }
    )


def scenario_names() -> list[str]:
    """Names of the bundled scenarios."""
    return bundled_names(_FOLDER)


def load_scenario(name_or_path: str | Path) -> Scenario:
    """Load a bundled scenario by name, or one of your own by the path of its YAML file.

    Raises:
        ConfigError: If there is none, or a key or value in it is not allowed.
    """
    return load(name_or_path, _FOLDER, "scenario", Scenario)


def parse_scenario(text: str, origin: str) -> Scenario:
    """Check a scenario's YAML text; `origin` names it in errors.

    Raises:
        ConfigError: If a key or value in it is not allowed.
    """
    return parse(text, origin, Scenario)
