"""Settings of environments: one object for each problem, built once and handed on whole."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from servegym.errors import ConfigError, UnknownSetting, unknown_name

InvalidActions = Literal["raise", "resample", "penalise"]
Shaping = Literal["none", "cost-to-go"]
EpisodeEnd = Literal["drained", "last-arrival"]
Features = Literal["contract", "extended", "costs"]
QueueOrder = Literal["shortest", "arrival"]
Placement = Literal["agent", "eft"]
Shortlist = Literal["work-left", "arrival", "rank", "slack"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all environments may be told.

    Attributes:
        scenario: What episodes are drawn from: a name, a path or a scenario.
        load: Factor on the arrival rate, or a range from which each episode draws one.
        objective: What is rewarded; the scenario's if not given (of `tail`, which is no sum of
            rewards, `latency`).
        reward_scale: Divides rewards; `auto`: by about what one decision is worth.
        shaping: `cost-to-go` charges each decision what it adds to the cost of what is in the
            system; see `envs.shaping`.
        episode_end: `drained`: when everything has ended; `last-arrival`: truncated at the first
            decision after it.
        warmup: Arrivals before the first decision that is the agent's; a rule decides till then.
        invalid_action: What a forbidden action does: `raise` refuses it, `resample` takes an
            allowed one drawn at random instead, `penalise` does so for `invalid_penalty`.
        invalid_penalty: Taken off the reward (as given out, after `reward_scale`) by `penalise`.
        normalise: Whether numbers are observed within -1 to 1; see `envs.observation.Table`.
        flat: Whether all but the mask is observed as one vector.
        group_size: Environments that play the same arrivals.
        num_threads: Threads over which environments are split, with equal results.

    Raises:
        ConfigError: If a value is not allowed.
    """

    scenario: Any
    load: float | tuple[float, float] = 1.0
    objective: str | None = None
    reward_scale: float | Literal["auto"] = 1.0
    shaping: Shaping = "none"
    episode_end: EpisodeEnd = "drained"
    warmup: int = 0
    invalid_action: InvalidActions = "raise"
    invalid_penalty: float = 1.0
    normalise: bool = False
    flat: bool = False
    group_size: int = 1
    num_threads: int = 1

    def __post_init__(self) -> None:
        at_least_one(group_size=self.group_size, num_threads=self.num_threads)
        one_of(
            invalid_action=(self.invalid_action, get_args(InvalidActions)),
            shaping=(self.shaping, get_args(Shaping)),
            episode_end=(self.episode_end, get_args(EpisodeEnd)),
        )
        scale = self.reward_scale
        if scale != "auto" and (isinstance(scale, str) or not scale > 0):
            raise ConfigError(f'reward_scale must be above 0 or "auto", got {scale!r}')
        if self.warmup < 0:
            raise ConfigError(f"warmup must be at least 0 arrivals, got {self.warmup}")
        if not self.invalid_penalty >= 0:
            raise ConfigError(f"invalid_penalty must be at least 0, got {self.invalid_penalty}")


@dataclass(frozen=True, kw_only=True)
class RequestSettings(Settings):
    """What environments that play requests may be told; see `Settings`.

    Attributes:
        num_requests: Requests of an episode; the scenario's if not given.
    """

    num_requests: int | None = None


@dataclass(frozen=True, kw_only=True)
class DispatchSettings(RequestSettings):
    """What environments that dispatch requests may be told; see `RequestSettings`.

    Attributes:
        scenario: A name, a path or a `Scenario`.
        r_max: Replica rows, if there are to be more than the scenario's largest fleet has.
        features: What is observed: the `contract`'s features, with what a router infers if
            `extended`, or in place of those of replicas the `costs` of choosing them, all within 0
            to 1; see `envs.costs`.
    """

    scenario: Any = "mixed-chat"
    r_max: int | None = None
    features: Features = "contract"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(features=(self.features, get_args(Features)))


@dataclass(frozen=True, kw_only=True)
class PreemptionSettings(RequestSettings):
    """What environments that admit and preempt may be told; see `RequestSettings`.

    Attributes:
        scenario: A name, a path or a `Scenario`, of one replica with `engine: vllm-priority`.
        max_waiting: Rows for waiting requests.
        queue_order: By what a longer queue is cut.
        allow_none: Whether nobody may be admitted.
    """

    scenario: Any = "kv-starved"
    max_waiting: int = 64
    queue_order: QueueOrder = "shortest"
    allow_none: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_waiting < 2:
            raise ConfigError(f"max_waiting must be at least 2, got {self.max_waiting}")
        one_of(queue_order=(self.queue_order, get_args(QueueOrder)))


@dataclass(frozen=True, kw_only=True)
class ClusterSettings(PreemptionSettings):
    """What environments of a fleet of engines may be told; see `PreemptionSettings`.

    Attributes:
        scenario: A name, a path or a `Scenario`, whose fleet has two replicas or more, and
            `engine: vllm-priority` in every entry, some that only prefill or decode, migration, or
            tiers of KV.
        retention: Whether schedulers are asked what becomes of the KV of ended turns; where there
            are tiers if not given.
        keep_s: How long that may be kept, seconds, ascending: an action each.
    """

    scenario: Any = "kv-starved-fleet"
    retention: bool | None = None
    keep_s: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        times = (0.0, *self.keep_s, math.inf)
        if len(times) < 3 or not all(a < b for a, b in itertools.pairwise(times)):
            raise ConfigError(
                "keep_s must be one or more times in seconds, above 0, finite and ascending, got "
                f"{self.keep_s!r}"
            )


@dataclass(frozen=True, kw_only=True)
class WorkflowSettings(Settings):
    """What environments that play jobs may be told; see `Settings`.

    Attributes:
        scenario: A name, a path or a `WorkflowScenario`.
        num_jobs: Jobs of an episode, or a range from which each draws; the scenario's if not given.
        max_stages: Rows for stages.
        placement: Who chooses the device.
        shortlist: By what stages are chosen if there are more than rows.
        graph: Whether the known stages of all jobs are observed too.
        max_nodes: Rows for them.
        max_edges: Rows for their edges.
        pool_size: Jobs of the pool that episodes draw theirs from; `None`: all are new.
        pool_seed: Makes the pool.
    """

    scenario: Any = "random-dags"
    num_jobs: int | tuple[int, int] | None = None
    max_stages: int = 16
    placement: Placement = "agent"
    shortlist: Shortlist = "work-left"
    graph: bool = False
    max_nodes: int = 256
    max_edges: int = 512
    pool_size: int | None = 256
    pool_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(
            max_stages=self.max_stages,
            max_nodes=self.max_nodes,
            max_edges=self.max_edges,
            pool_size=1 if self.pool_size is None else self.pool_size,
        )
        one_of(
            placement=(self.placement, get_args(Placement)),
            shortlist=(self.shortlist, get_args(Shortlist)),
        )


S = TypeVar("S", bound=Settings)


def make_settings(settings_type: type[S], scenario: Any, given: Mapping[str, Any]) -> S:
    """Make the settings of a problem; an unknown one is refused by name.

    Args:
        settings_type: The problem's.
        scenario: A name, a path or a scenario; the problem's default if `None`.
        given: The others by name.

    Raises:
        UnknownSetting: If there is no such setting.
        ConfigError: If a value is not allowed.
    """
    known = [field.name for field in fields(settings_type)]
    for name in given:
        if name not in known:
            # in Python's words first: some libraries try keywords and read what is said
            raise UnknownSetting(
                f"unexpected keyword argument {name!r}: {unknown_name('setting', name, known)}"
            )
    named = {} if scenario is None else {"scenario": scenario}
    return settings_type(**{**given, **named})


def face_signature(
    settings_type: type[Settings], first: dict[str, Any], last: dict[str, Any]
) -> inspect.Signature:
    """Say what a face of a problem takes: `first`, its settings, `last`, with defaults."""
    settings = {field.name: field.default for field in fields(settings_type)}
    positional = [*first, "scenario"]
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD
                if name in positional
                else inspect.Parameter.KEYWORD_ONLY,
                default=default,
            )
            for name, default in (first | settings | last).items()
        ]
    )


def at_least_one(**sizes: int) -> None:
    """Refuse sizes below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")


def one_of(**settings: tuple[str, tuple[str, ...]]) -> None:
    """Refuse values that are not among the allowed ones, given as `name=(value, allowed)`."""
    for name, (value, allowed) in settings.items():
        if value not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
