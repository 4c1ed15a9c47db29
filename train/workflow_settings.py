"""Settings of a run that trains a scheduler of jobs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Fixed, OmitArgPrefixes, Suppress, arg

from servegym.agents.workflow_network_config import WorkflowNetworkConfig
from servegym.errors import ConfigError
from servegym.train.ranges import check_counts, check_minutes

#: What a scheduler may be trained for.
OBJECTIVES = ("jct", "makespan", "deadline")


@dataclass(frozen=True)
class WorkflowTraining:
    """Settings of a training run."""

    scenario: Annotated[str, Fixed, Suppress] = "text-to-sql"
    """Bundled scenario name or YAML file, or `job-shop`: small random job shops."""
    objective: Literal["", "jct", "makespan", "deadline"] = ""
    """What counts, instead of the scenario's own."""
    load: tuple[float, float] = (0.6, 1.1)
    """Range of the load factor, drawn per episode."""
    num_jobs: tuple[int, int] = (20, 80)
    """Range of the number of jobs of an episode, drawn anew: no policy can learn when it ends."""
    pool_size: int = 1000
    """Different jobs to train on."""
    max_minutes: Annotated[float, arg(name="minutes")] = 10.0
    """Wall-clock time of both parts, from when all is compiled."""
    search_share: float = 0.8
    """Share of it for the search, which brings nearly all of the gain."""
    search_episodes: int = 6
    """Of a generation, spread over the loads."""
    max_generations: int = 100_000
    """Of the search, at most."""
    max_updates: int = 100_000
    """Of PPO, at most."""
    groups: int = 4
    """Arrival sequences of an update."""
    group_size: int = 4
    """Episodes with the same arrivals; the group is the baseline of its members."""
    learning_rate: float = 3e-4
    """Adam's, falling linearly to 0."""
    horizon: float = 40.0
    """Discount: a reward t ahead counts exp(-t / horizon), in mean durations of a stage."""
    credit: float = 10.0
    """Time constant of generalised advantage estimation, in the same unit."""
    epochs: int = 3
    """Passes over an update's episodes."""
    minibatches: int = 4
    """Gradient steps of a pass; each takes whole episodes, so their graphs are embedded once."""
    clip: float = 0.2
    """PPO's ratio clip."""
    entropy: float = 0.001
    """Entropy bonus."""
    target_kl: float = 0.03
    """An update ends early above this divergence."""
    warmup_updates: int = 5
    """First updates train the critic alone."""
    sharpness: float = 0.02
    """How much worse draws from the first policy may be than from sharper ones: by that the factor
    on the scores of the search is chosen."""
    validate_every: int = 5
    """Updates between validations; the best network is kept."""
    validation_episodes: int = 18
    """Which are neither trained nor judged on."""
    seed: int = 0
    """Of everything."""
    network: OmitArgPrefixes[WorkflowNetworkConfig] = field(
        default_factory=lambda: WorkflowNetworkConfig()
    )
    """Network and base rule; the time unit is measured."""

    def __post_init__(self) -> None:
        if self.objective and self.objective not in OBJECTIVES:
            raise ConfigError(
                f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}"
            )
        for name in ("load", "num_jobs"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(f"{name} must be two ascending numbers above 0, got {low, high}")
        check_minutes(self.max_minutes)
        if not 0 <= self.search_share <= 1:
            raise ConfigError(f"search_share must be within 0..1, got {self.search_share:g}")
        check_counts(self, "groups", "minibatches", "validation_episodes", "search_episodes")
        if self.group_size < 2:
            raise ConfigError(
                f"group_size must be at least 2, so that there are others to compare with, got"
                f" {self.group_size}"
            )
