"""Settings of a run that trains a dispatcher by RLlib."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from tyro.conf import Fixed, OmitArgPrefixes, Suppress, arg

from servegym.agents.network_config import NetworkConfig
from servegym.errors import ConfigError
from servegym.train.ranges import check_counts, check_load, check_minutes

RllibAlgorithm = Literal["ppo", "appo", "impala"]


@dataclass(frozen=True)
class RllibTraining:
    """Settings of a training run."""

    scenario: Annotated[str, Fixed, Suppress] = "mixed-chat"
    """Bundled scenario name or YAML file."""
    learner: Annotated[Literal["rllib"], Fixed, Suppress] = "rllib"
    """What `--learner` calls it."""
    algorithm: RllibAlgorithm = "ppo"
    """RLlib's; `appo` and `impala` learn while their environments go on."""
    total_decisions: Annotated[int, arg(name="decisions")] = 4_000_000
    """Dispatch decisions to train on, about."""
    max_minutes: Annotated[float, arg(name="minutes")] = math.inf
    """Stop earlier after this wall-clock time, which counts from when all is started."""
    num_env_runners: int = 2
    """Processes that step environments, anywhere in the cluster; 0: this one (ppo)."""
    num_envs: int = 16
    """Environments of each, stepped together."""
    address: str = ""
    """Of a Ray cluster that is there; else one is started on this machine, or what RAY_ADDRESS
    names is used."""
    decisions_per_update: int = 8192
    """Decisions of an update, of all environments."""
    minibatch: int = 1024
    """Of ppo: decisions per gradient step."""
    epochs: int = 3
    """Of ppo: passes over each batch."""
    num_requests: int = 1024
    """Requests per episode."""
    load: tuple[float, float] = (0.6, 1.1)
    """Range of the load factor, drawn per episode."""
    learning_rate: float = 3e-4
    """Adam's."""
    gamma: float = 0.95
    """Discount a decision: rewards are shaped, so most of what it does is in its own."""
    gae_lambda: float = 0.9
    """Of ppo and appo."""
    clip: float = 0.2
    """Of ppo and appo: the ratio's clip."""
    entropy: float = 0.002
    """Entropy bonus."""
    max_grad_norm: float = 0.5
    """Gradient clip."""
    validate_every: int = 10
    """Updates between validations; the network that did best there is the one exported."""
    validation_episodes: int = 16
    """Episodes of a validation."""
    validation_requests: int = 1024
    """Requests of each."""
    seed: int = 0
    """Of everything that RLlib seeds."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to learn."""
    torch_threads: int = 1
    """Of PyTorch on the CPU."""
    network: OmitArgPrefixes[NetworkConfig] = field(default_factory=lambda: NetworkConfig())
    """Network and base heuristic."""

    def __post_init__(self) -> None:
        check_counts(
            self, "num_envs", "decisions_per_update", "minibatch", "epochs", "validate_every"
        )
        check_minutes(self.max_minutes)
        check_load(self.load)
        if self.algorithm not in get_args(RllibAlgorithm):
            allowed = ", ".join(get_args(RllibAlgorithm))
            raise ConfigError(f"algorithm must be one of {allowed}, got {self.algorithm!r}")
        if self.num_env_runners < (self.algorithm != "ppo"):
            raise ConfigError(
                f"num_env_runners must be at least {int(self.algorithm != 'ppo')} for"
                f" {self.algorithm}, got {self.num_env_runners}"
            )
        if self.minibatch > self.decisions_per_update:
            raise ConfigError(
                f"minibatch must be at most decisions_per_update ({self.decisions_per_update}), got"
                f" {self.minibatch}"
            )
        if self.total_decisions < self.decisions_per_update:
            raise ConfigError(
                f"total_decisions must be at least decisions_per_update"
                f" ({self.decisions_per_update}), got {self.total_decisions}"
            )
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device must be cpu or cuda, got {self.device!r}")
