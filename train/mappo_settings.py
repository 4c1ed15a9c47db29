"""Settings of a run that trains a fleet's agents by PPO, with a critic of the whole fleet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Fixed, Suppress, arg

from servegym.errors import ConfigError
from servegym.train.ranges import check_counts, check_load, check_minutes


@dataclass(frozen=True)
class MappoTraining:
    """Settings of a run."""

    scenario: Annotated[str, Fixed, Suppress] = "kv-starved-fleet"
    """Bundled name or YAML file, of several engines that go by priorities."""
    learner: Annotated[Literal["mappo"], Fixed, Suppress] = "mappo"
    """What `--learner` calls it."""
    start: str = "least-outstanding+footprint"
    """Pair as which the agents begin, DISPATCH+ORDER with their parameters: added-delay,
    least-outstanding or min-kv, with fcfs, footprint or srpt behind it."""
    critic: Literal["central", "own"] = "central"
    """Who says what a decision was worth: a critic that sees the whole fleet, from one decision of
    any agent to the next, or one for each class of agents that sees what they see, from an agent's
    decision to its own next. Neither is needed to act."""
    load: tuple[float, float] = (0.8, 1.25)
    """Range of the load factor, drawn per episode."""
    max_minutes: Annotated[float, arg(name="minutes")] = 10.0
    """Wall-clock time, from when all is compiled."""
    max_updates: int = 1_000_000
    """Updates, at most."""
    num_hidden: int = 8
    """Hidden units beside each linear score, the schedulers' and the dispatcher's."""
    num_episodes: int = 16
    """Of an update, played together to their ends."""
    num_requests: int = 512
    """Requests of each."""
    shaping: bool = True
    """Charge each decision what it adds to the cost of what is in the system."""
    temperature: float = 0.2
    """Of the draws: how far scores must be apart for one choice to be taken rather."""
    learning_rate: float = 3e-3
    """Adam's of the agents, falling linearly to 0."""
    critic_learning_rate: float = 1e-3
    """Adam's of the critic."""
    critic_hidden: int = 64
    """Units of each of the critic's two layers."""
    horizon_s: float = 60.0
    """Discount: a reward t seconds ahead counts exp(-t / horizon)."""
    credit_s: float = 10.0
    """Time constant of generalised advantage estimation: lambda is exp(-dt / credit_s)."""
    num_epochs: int = 4
    """Passes over each update's decisions."""
    num_minibatches: int = 8
    """Gradient steps of a pass."""
    clip: float = 0.2
    """PPO's ratio clip."""
    entropy: float = 0.002
    """Entropy bonus, falling linearly to 0."""
    target_kl: float = 0.02
    """An update ends early above this divergence."""
    warmup_updates: int = 3
    """First updates train the critic alone, so that it cannot spoil the start."""
    num_validation: int = 8
    """Episodes by which the best is chosen, as long as the scenario's own."""
    num_threads: int = 2
    """Threads that share validation."""
    seed: int = 0
    """Of everything."""

    def __post_init__(self) -> None:
        check_load(self.load)
        check_minutes(self.max_minutes)
        if not self.start:
            raise ConfigError(
                "start must be a pair of rules, DISPATCH+ORDER, as which agents begin"
            )
        if self.critic not in ("central", "own"):
            raise ConfigError(f"critic must be central or own, got {self.critic!r}")
        for name in (
            "temperature",
            "learning_rate",
            "critic_learning_rate",
            "horizon_s",
            "credit_s",
            "clip",
            "target_kl",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name):g}")
        if not self.entropy >= 0:
            raise ConfigError(f"entropy must be at least 0, got {self.entropy:g}")
        if self.warmup_updates < 0:
            raise ConfigError(f"warmup_updates must be at least 0, got {self.warmup_updates}")
        check_counts(
            self,
            "max_updates",
            "num_hidden",
            "num_episodes",
            "num_requests",
            "critic_hidden",
            "num_epochs",
            "num_minibatches",
            "num_validation",
            "num_threads",
        )
