"""A scenario: cluster, workload, service levels, disturbances and objective in one YAML file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from servegym.assets.specs import gpu, model
from servegym.calibrate.calibration import calibrated_cost
from servegym.cluster.nominal import request_alone_s
from servegym.cluster.spec import ClusterSpec, Episode, Faults, ReplicaType, SloClass
from servegym.cluster.state import FAULT_DOWN, FAULT_SLOW, FAULT_UP
from servegym.costs.formats import ScenarioFormat, number_format
from servegym.costs.step import StepCost
from servegym.costs.tables import TableSource
from servegym.documents import load_yaml
from servegym.engines import MAX_NUM_BATCHED_TOKENS, EngineName, kernels_of
from servegym.errors import ConfigError, unknown_name
from servegym.workloads.config import GeneratedConfig, TraceConfig, WorkloadConfig
from servegym.workloads.prediction import PredictorConfig
from servegym.workloads.table import BY_ITSELF, RequestTable


class Config(BaseModel):
    """What is read from a scenario file: checked, and not to be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


_Count = Annotated[int, Field(ge=1)]
_Factor = Annotated[float, Field(gt=0)]
_T = TypeVar("_T")


def ascending(value: _T) -> _T:
    """Refuse a pair that is no range."""
    if isinstance(value, tuple) and value[0] > value[1]:
        raise ValueError("a range must go from low to high")
    return value


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


class FleetEntry(Config):
    """Equal replicas; a pair of numbers is a range, drawn anew for every episode.

    `costs` says where kernel times come from: the `fits` of servegym, or the measured `tables` of
    the package aiconfigurator-core, which must be installed. `calibration` names a file of
    `servegym calibrate` instead, made for this GPU, model and tp. `engine` says whose rules form
    the steps; `max_num_batched_tokens` and `max_num_seqs` are those of the scenario's `engine`
    section unless given, and where that names no budget, the engine's own.
    """

    gpu: str
    count: _Count | tuple[_Count, _Count] = 1
    tp: int = Field(1, ge=1)
    speed: _Factor | tuple[_Factor, _Factor] = 1.0
    num_blocks: int | None = Field(None, ge=1)
    costs: Literal["fits", "tables"] = "fits"
    calibration: str | None = None
    engine: EngineName = "vllm"
    max_num_batched_tokens: int | None = Field(None, ge=1)
    max_num_seqs: int | None = Field(None, ge=1)

    _check_ranges = field_validator("count", "speed")(ascending)


class SloConfig(Config):
    """A service level and its share of the requests."""

    name: str
    ttft_s: float = Field(gt=0)
    tpot_s: float = Field(gt=0)
    share: float = Field(1.0, gt=0)
    weight: float = Field(1.0, ge=0)


class FailSlowConfig(Config):
    """Episodes in which a replica runs at a fraction of its speed."""

    rate_per_replica_hour: float = Field(0.0, ge=0)
    duration_s: float = Field(30.0, gt=0)
    multiplier: tuple[_Factor, _Factor] = (0.2, 0.6)

    _check_range = field_validator("multiplier")(ascending)


class FailStopConfig(Config):
    """Crashes; a replica is back, empty, after `recovery_s`."""

    rate_per_replica_hour: float = Field(0.0, ge=0)
    recovery_s: float = Field(60.0, gt=0)


class DisturbanceConfig(Config):
    """What makes life hard; everything is off by default."""

    metrics_interval_s: float = Field(0.0, ge=0)
    predictor: PredictorConfig = PredictorConfig(kind="lognormal", sigma=0.5)
    step_noise_sigma: float = Field(0.0, ge=0)
    noise_period_steps: int = Field(8, ge=1)
    fail_slow: FailSlowConfig = FailSlowConfig()
    fail_stop: FailStopConfig = FailStopConfig()


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
    workload: WorkloadConfig
    slo_classes: tuple[SloConfig, ...] = Field(
        (SloConfig(name="default", ttft_s=2.0, tpot_s=0.1),), min_length=1
    )
    disturbances: DisturbanceConfig = DisturbanceConfig()
    objective: Literal["latency", "goodput"] = "latency"
    actions: ActionConfig = ActionConfig()
    num_requests: int = Field(512, ge=1)

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
        rng = np.random.default_rng(fleet)
        types: list[int] = []
        speeds: list[float] = []
        for index, entry in enumerate(self.fleet):
            for _ in range(draw_count(rng, entry.count)):
                speeds.append(draw_speed(rng, entry.speed))
                types.append(index)
        return Episode(
            table=replace(table, predicted_output_tokens=predicted),
            type_idx=np.array(types, np.int16),
            speed=np.array(speeds, np.float64),
            faults=draw_faults(
                self.disturbances.fail_slow,
                self.disturbances.fail_stop,
                np.random.default_rng(faults),
                len(types),
                self._last_s(table, types, speeds),
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
    spec, weights = gpu(entry.gpu), number_format(precision)
    source = TableSource(spec, weights.fp8) if entry.costs == "tables" else None
    return StepCost(
        spec,
        model(model_name),
        entry.tp,
        weights.fp8,
        source,
        engine=kernels_of(entry.engine),
        scales=weights.scales,
    )


def replica_type(
    entry: FleetEntry, model_name: str, precision: ScenarioFormat, engine: EngineConfig
) -> ReplicaType:
    """Compile a fleet entry."""
    cost = step_cost(entry, model_name, precision)
    blocks = entry.num_blocks or (
        cost.kv_capacity_tokens(engine.kv_memory_fraction) // engine.block_size
    )
    budget = entry.max_num_batched_tokens or engine.max_num_batched_tokens
    budget = budget or MAX_NUM_BATCHED_TOKENS[entry.engine]
    return ReplicaType(
        name=f"{entry.gpu} x{entry.tp}" + ("" if entry.engine == "vllm" else f" {entry.engine}"),
        grid=cost.compile(max_tokens=max(budget, 64)),
        num_blocks=blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=entry.max_num_seqs or engine.max_num_seqs,
        price_usd_per_h=cost.gpu.price_usd_per_h * entry.tp,
        num_gpus=entry.tp,
        engine=entry.engine,
    )


def draw_count(rng: np.random.Generator, count: int | tuple[int, int]) -> int:
    """Draw a number of replicas from its range."""
    return count if isinstance(count, int) else int(rng.integers(count[0], count[1] + 1))


def draw_speed(rng: np.random.Generator, speed: float | tuple[float, float]) -> float:
    """Draw a speed factor from its range."""
    return speed if isinstance(speed, float | int) else float(rng.uniform(*speed))


def draw_faults(
    slow: FailSlowConfig,
    stop: FailStopConfig,
    rng: np.random.Generator,
    num_replicas: int,
    end_s: float,
) -> Faults:
    """Draw when replicas slow down, crash and come back, for faults that begin by `end_s`."""
    rows: list[tuple[float, int, int, float]] = []
    for r in range(num_replicas):
        t = 0.0
        while slow.rate_per_replica_hour:
            t += rng.exponential(3600.0 / slow.rate_per_replica_hour)
            if t > end_s:
                break
            rows.append((t, r, FAULT_SLOW, rng.uniform(*slow.multiplier)))
            t += slow.duration_s
            rows.append((t, r, FAULT_SLOW, 1.0))
        t = 0.0
        while stop.rate_per_replica_hour:
            t += rng.exponential(3600.0 / stop.rate_per_replica_hour)
            if t > end_s:
                break
            rows.append((t, r, FAULT_DOWN, 0.0))
            t += stop.recovery_s
            rows.append((t, r, FAULT_UP, 0.0))
    rows.sort()
    return Faults(
        np.array([x[0] for x in rows], np.float64),
        np.array([x[1] for x in rows], np.int16),
        np.array([x[2] for x in rows], np.int8),
        np.array([x[3] for x in rows], np.float64),
    )


def scenario_names() -> list[str]:
    """Names of the bundled scenarios."""
    folder = resources.files("servegym.assets").joinpath("scenarios")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith("yaml"))


def load_scenario(name_or_path: str | Path) -> Scenario:
    """Load a bundled scenario by name, or one of your own by the path of its YAML file.

    Raises:
        ConfigError: If there is none, or a key or value in it is not allowed.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
        if not path.is_file():
            raise ConfigError(f"no scenario file at {text}")
        try:
            return parse_scenario(path.read_text(encoding="utf-8"), text)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{text} is not UTF-8 text") from error
    if text not in scenario_names():
        message = unknown_name("scenario", text, scenario_names())
        also = " Or" if message.endswith("?") else ", or"
        raise ConfigError(f"{message}{also} give a .yaml file")
    file = resources.files("servegym.assets").joinpath("scenarios", f"{text}.yaml")
    return parse_scenario(file.read_text(encoding="utf-8"), text)


def read_yaml(text: str, origin: str) -> Mapping[str, Any]:
    """Read the keys and values of a scenario; `origin` names it in errors."""
    try:
        data = load_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{origin}{line}: not YAML ({error.problem})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{origin} must hold keys and values, such as name, fleet and workload")
    return data


def parse_scenario(text: str, origin: str) -> Scenario:
    """Check a scenario's YAML text; `origin` names it in errors."""
    data = read_yaml(text, origin)
    try:
        return Scenario.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {one_sentence(error, data, Scenario)}") from error


def one_sentence(error: ValidationError, data: Any, root: type[BaseModel]) -> str:
    """Say what is wrong with the data of a model: where, what was got, and what is allowed."""
    # an unknown key explains a missing one; of the choices of a union, the one that got furthest
    first = max(error.errors(), key=lambda e: (e["type"] == "extra_forbidden", len(e["loc"])))
    place = _place(first, data)
    models = _models_at(first["loc"], root)
    if first["type"].startswith("union_tag"):
        kinds = [m.model_fields["kind"].default for m in models]
        if "tag" in first["ctx"]:
            return f"{place}: {unknown_name('kind', first['ctx']['tag'], kinds)}"
        return f"{place}.kind is missing: choose one of {', '.join(kinds)}"
    if first["type"] == "extra_forbidden":
        keys = sorted({key for m in models for key in m.model_fields})
        near = difflib.get_close_matches(str(first["loc"][-1]), keys, n=1)
        hint = f"; did you mean {near[0]}?" if near else f": choose one of {', '.join(keys)}"
        return f"unknown key {place}{hint}"
    message = str(first.get("ctx", {}).get("error", first["msg"]))
    got = "" if isinstance(first["input"], Mapping) else f", got {first['input']!r}"
    return f"{place}: {message[0].lower()}{message[1:]}{got}"


def _place(error: ErrorDetails, data: Any) -> str:
    """Join the keys to an error's place, without pydantic's names for the choices of a union."""
    keys: list[str] = []
    for key in error["loc"]:
        known = key in data if isinstance(data, Mapping) else isinstance(key, int)
        if known:
            data = data[key]
        if known or (error["type"] == "missing" and key == error["loc"][-1]):
            keys.append(str(key))
    return ".".join(keys)


def _models_at(loc: tuple[int | str, ...], root: type[BaseModel]) -> list[type[BaseModel]]:
    """Models that the innermost mapping on the way to a place can be."""
    models: list[type[BaseModel]] = [root]
    for key in loc:
        fields = [m.model_fields[key] for m in models if key in m.model_fields]
        inner = [found for field in fields for found in _models_in(field.annotation)]
        kinds = {m.model_fields["kind"].default: m for m in models if "kind" in m.model_fields}
        models = inner or ([kinds[key]] if key in kinds else models)
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]
