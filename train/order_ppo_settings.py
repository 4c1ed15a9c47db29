"""Settings of a run that trains an order by PPO on what every pick would have brought."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Fixed, Suppress, arg

from servegym.errors import ConfigError
from servegym.train.ranges import check_counts, check_load


@dataclass(frozen=True)
class OrderPPOTraining:
    """Settings of a run."""

    scenario: Annotated[str, Fixed, Suppress] = "kv-starved"
    """Bundled name or YAML file, of one engine that goes by priorities."""
    learner: Annotated[Literal["ppo"], Fixed, Suppress] = "ppo"
    """What `--learner` calls it."""
    load: tuple[float, float] = (0.6, 1.1)
    """Range of the load factor, drawn per episode."""
    max_minutes: Annotated[float, arg(name="minutes")] = 10.0
    """Wall-clock time, from when all is compiled."""
    max_updates: int = 1_000_000
    """Updates, at most."""
    num_hidden: int = 8
    """Hidden units beside the linear score."""
    num_episodes: int = 12
    """Of an update."""
    num_requests: int | None = None
    """Requests per episode, else the scenario's own."""
    label_every: int = 8
    """One choice in so many is tried."""
    num_choices: int = 8
    """Requests that are tried at a choice, at most, as the policy draws them."""
    horizon_s: float = 20.0
    """For so long requests go on to arrive where choices are tried; then all is run to its end."""
    temperature: float = 0.2
    """Of the draws: how far scores must be apart for one request to be picked rather."""
    learning_rate: float = 1e-2
    """Adam's."""
    num_epochs: int = 8
    """How often an update's choices are learned from."""
    clip: float = 0.2
    """How far an update changes a pick's probability before its gradient is cut off."""
    num_validation: int = 32
    """Episodes by which the best is chosen."""
    num_threads: int = 2
    """Threads that share the work."""
    seed: int = 0
    """Of everything."""

    def __post_init__(self) -> None:
        check_load(self.load)
        for name in ("max_minutes", "temperature", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name):g}")
        if not self.horizon_s >= 0:
            raise ConfigError(f"horizon_s must be at least 0, got {self.horizon_s:g}")
        check_counts(
            self, "max_updates", "num_episodes", "label_every", "num_epochs", "num_validation"
        )
        if self.num_choices < 2:
            raise ConfigError(f"num_choices must be at least 2, got {self.num_choices}")
