"""The replicas that a log is about, as the simulator takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from servegym.cluster.spec import ClusterSpec, ReplicaType, SloClass
from servegym.costs.grid import (
    NUM_BATCH_KNOTS,
    NUM_CHUNK_KNOTS,
    NUM_CONTEXT_KNOTS,
    NUM_DENSE_KNOTS,
    NUM_KV_KNOTS,
    CostGrid,
)
from servegym.errors import ConfigError
from servegym.scenario import Scenario
from servegym.scenario.fleet import FleetEntry
from servegym.serve.facts import Hardware, Rates
from servegym.serve.router.config import RouterConfig
from servegym.typing import FloatArray

#: vLLM's, where the router's file does not say.
_BLOCK_TOKENS = 16
#: KV tokens of a replica that is described by rates without its KV cache: as good as no limit.
_AMPLE_TOKENS = 16_000_000
#: Context length that `Rates` states the cost of a further sequence for.
_SEQ_TOKENS = 1024.0


@dataclass(frozen=True)
class Fleet:
    """Replicas in the router's order.

    Attributes:
        names: Of the replicas.
        types: One each, as its cost model has it.
        speed: Factor on each one's speed, `float64[R]`.
        spec: Rules and service levels; its replica types are `types`.
        origin: Scenario or router configuration it was made from.
        notes: What had to be assumed.
    """

    names: tuple[str, ...]
    types: tuple[ReplicaType, ...]
    speed: FloatArray
    spec: ClusterSpec
    origin: Scenario | RouterConfig
    notes: tuple[str, ...] = ()

    def index(self, name: str | None, position: int) -> int:
        """Return the place of a replica that a log names, or else counts.

        Raises:
            ConfigError: If the fleet does not have it.
        """
        if isinstance(self.origin, RouterConfig) and name is not None:
            if name not in self.names:
                raise ConfigError(
                    f"the log has a replica {name}, the configuration only "
                    f"{', '.join(self.names)}: give the configuration the router ran with"
                )
            return self.names.index(name)
        if position >= len(self.names):
            raise ConfigError(
                f"the log has a replica {position}, the fleet given only {len(self.names)}: "
                "give the scenario or configuration the router ran with"
            )
        return position

    def named(self, names: Sequence[str | None]) -> Fleet:
        """Return the fleet with names from a log where it has some."""
        merged = (new or old for new, old in zip(names, self.names, strict=True))
        return replace(self, names=tuple(merged))


def scenario_fleet(scenario: Scenario) -> Fleet:
    """Take the replicas of a scenario, in order.

    Raises:
        ConfigError: If the scenario draws its fleet: a log is about one fleet.
    """
    places = []
    for index, entry in enumerate(scenario.fleet):
        if not (isinstance(entry.count, int) and isinstance(entry.speed, int | float)):
            raise ConfigError(
                f"scenario {scenario.name} draws count or speed of {entry.gpu} from a range: "
                "give one with the counts and speeds of the fleet that was logged"
            )
        places += [index] * entry.count
    spec = scenario.spec
    speeds = np.array([_speed(scenario.fleet[i]) for i in places])
    types = tuple(spec.types[i] for i in places)
    return Fleet(
        names=tuple(f"{scenario.fleet[i].gpu}-{k}" for k, i in enumerate(places)),
        types=types,
        speed=speeds,
        # a replay forces what was decided, and its counterfactuals must be able to do the same
        spec=replace(spec, types=types, metrics_interval_s=0.0, noise_sigma=0.0),
        origin=scenario,
    )


def _speed(entry: FleetEntry) -> float:
    assert isinstance(entry.speed, int | float)
    return float(entry.speed)


def router_fleet(config: RouterConfig) -> Fleet:
    """Take the replicas of a router's configuration.

    Raises:
        ConfigError: If it lists no replicas, a name is unknown, or a calibration was made for
            another replica.
    """
    if not config.replicas:
        raise ConfigError(
            "the router's configuration finds its replicas while it runs: give one that lists, "
            "under replicas, all that the log names"
        )
    made: dict[Hardware | Rates, ReplicaType] = {}
    notes = []
    for entry in config.replicas:
        facts = entry.facts
        if facts not in made:
            made[facts] = _from_rates(facts) if isinstance(facts, Rates) else _from_hardware(facts)
        if isinstance(facts, Rates) and not facts.kv_capacity_tokens:
            notes.append(f"the KV cache of {entry.name} is taken for unlimited")
    types = tuple(replace(made[entry.facts], name=entry.name) for entry in config.replicas)
    speeds = [e.facts.speed if isinstance(e.facts, Hardware) else 1.0 for e in config.replicas]
    dispatch = config.dispatch
    classes = tuple(
        SloClass(c.name, c.ttft_s or np.inf, c.tpot_s or np.inf, c.weight)
        for c in dispatch.slo_classes
    )
    spec = ClusterSpec(
        types=types,
        slo_classes=classes,
        block_size=_BLOCK_TOKENS,
        prefix_caching=True,
        allow_hold=dispatch.allow_hold,
        allow_reject=dispatch.allow_reject,
        hold_s=config.request.hold_s,
    )
    names = tuple(entry.name for entry in config.replicas)
    return Fleet(names, types, np.array(speeds), spec, config, tuple(notes))


def _from_hardware(facts: Hardware) -> ReplicaType:
    found = facts.replica_type()  # counts its KV cache in tokens
    return replace(found, num_blocks=max(1, found.num_blocks // _BLOCK_TOKENS))


def _from_rates(facts: Rates) -> ReplicaType:
    tokens = facts.kv_capacity_tokens or _AMPLE_TOKENS
    return ReplicaType(
        name="rates",
        grid=rates_grid(facts),
        num_blocks=max(1, tokens // _BLOCK_TOKENS),
        max_num_batched_tokens=facts.max_num_batched_tokens,
        max_num_seqs=facts.max_num_seqs,
    )


def rates_grid(facts: Rates) -> CostGrid:
    """Return the linear costs that have these rates; attention of a prompt is in its tokens."""
    budget = float(facts.max_num_batched_tokens)
    kv_s = facts.decode_seq_s / _SEQ_TOKENS
    step_s = max(0.0, facts.decode_step_s - facts.decode_seq_s)
    per_token_s = max(0.0, (budget / facts.prefill_tokens_per_s - step_s) / budget)
    # a decoding sequence is a token as well
    kv_s = max(0.0, kv_s - per_token_s / _SEQ_TOKENS)
    tokens = np.geomspace(1.0, max(budget, 2.0 * NUM_DENSE_KNOTS), NUM_DENSE_KNOTS)
    chunk = np.geomspace(1.0, max(budget, 2.0), NUM_CHUNK_KNOTS)
    batch = np.geomspace(1.0, 1024.0, NUM_BATCH_KNOTS)
    kv = np.geomspace(1.0, 4e6, NUM_KV_KNOTS)
    return CostGrid(
        cpu_s=step_s,
        dense_tokens=tokens,
        dense_s=per_token_s * tokens,
        prefill_chunk=chunk,
        prefill_context=np.linspace(0.0, 131072.0, NUM_CONTEXT_KNOTS),
        prefill_s=np.zeros((NUM_CHUNK_KNOTS, NUM_CONTEXT_KNOTS)),
        decode_batch=batch,
        decode_kv=kv,
        decode_s=np.tile(kv_s * kv, (NUM_BATCH_KNOTS, 1)),
    )


def calibration_of(fleet: Fleet, replica: int) -> Path | None:
    """Return the calibration file that a replica's costs come from."""
    if isinstance(fleet.origin, RouterConfig):
        facts = fleet.origin.replicas[replica].facts
        return facts.calibration if isinstance(facts, Hardware) else None
    found = scenario_entry(fleet.origin, replica).calibration
    return Path(found) if found else None


def scenario_entry(scenario: Scenario, replica: int) -> FleetEntry:
    """Return the fleet entry that a replica belongs to."""
    first = 0
    for entry in scenario.fleet:
        assert isinstance(entry.count, int)
        if replica < first + entry.count:
            return entry
        first += entry.count
    raise ConfigError(f"the scenario has replicas 0 to {first - 1}, got {replica}")
