"""Settings of a run that trains a dispatcher."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Fixed, OmitArgPrefixes, Suppress, arg

from servegym.agents.network_config import NetworkConfig
from servegym.baselines.registry import policy
from servegym.errors import ConfigError
from servegym.train.ranges import check_load, check_minutes


@dataclass(frozen=True)
class PPOConfig:
    """Settings of a training run."""

    scenario: Annotated[str, Fixed, Suppress] = "mixed-chat"
    """Bundled scenario name or YAML file."""
    total_decisions: Annotated[int, arg(name="decisions")] = 4_000_000
    """Dispatch decisions to train on."""
    max_minutes: Annotated[float, arg(name="minutes")] = math.inf
    """Stop earlier after this wall-clock time, which counts from when all is compiled."""
    num_envs: int = 32
    """Environments stepped together."""
    group_size: int = 4
    """Environments that play the same requests; the group is the baseline of its members."""
    num_steps: int = 256
    """Decisions of each environment per update."""
    num_requests: int = 2048
    """Requests per episode."""
    load: tuple[float, float] = (0.6, 1.1)
    """Range of the load factor, drawn per episode."""
    learning_rate: float = 1e-3
    """Adam's, falling linearly to 0."""
    horizon_s: float = 20.0
    """Discount: a reward t seconds ahead counts exp(-t / horizon)."""
    credit_s: float = 5.0
    """Time constant of generalised advantage estimation: lambda is exp(-dt / credit_s)."""
    advantage: Literal["gae", "counterfactual"] = "gae"
    """What a choice is judged by: the rewards after it, or what all choices would have done, tried
    on the state as it is, which is told from fewer decisions but looks no further than what is
    there."""
    label_every: int = 4
    """Of the decisions of an environment one in so many is tried and learned from, under
    --advantage counterfactual."""
    epochs: int = 3
    """Passes over each batch."""
    minibatch: int = 1024
    """Decisions per gradient step."""
    clip: float = 0.2
    """PPO's ratio clip."""
    entropy: float = 0.002
    """Entropy bonus, falling linearly to a tenth."""
    value_weight: float = 0.5
    """Weight of the critic's loss."""
    max_grad_norm: float = 0.5
    """Gradient clip."""
    target_kl: float = 0.03
    """An update ends early above this divergence."""
    warmup_updates: int = 5
    """First updates train the critic alone, so that it cannot spoil the heuristic start."""
    validate_every: int = 10
    """Updates between validations; the network that did best there is the one exported."""
    imitate: str = ""
    """Policy to imitate first, such as what-if-added; none: start as the base rule."""
    imitate_decisions: int = 50_000
    """Decisions of it to learn from."""
    seed: int = 0
    """Of everything."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to learn."""
    torch_threads: int = 1
    """Of PyTorch on the CPU: the matrices are small, and threads that wait for each other on a
    busy machine cost more than they bring."""
    network: OmitArgPrefixes[NetworkConfig] = field(default_factory=lambda: NetworkConfig())
    """Network and base heuristic."""

    def __post_init__(self) -> None:
        if self.num_envs < 1 or self.group_size < 1:
            raise ConfigError(
                f"num_envs and group_size must be at least 1, got {self.num_envs} and "
                f"{self.group_size}"
            )
        check_load(self.load)
        check_minutes(self.max_minutes)
        labels = self.advantage == "counterfactual"
        if self.label_every < 1 or (labels and self.num_steps % self.label_every):
            raise ConfigError(
                f"num_steps ({self.num_steps}) must be a multiple of label_every"
                f" ({self.label_every})"
            )
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device must be cpu or cuda, got {self.device!r}")
        if self.imitate and policy(self.imitate).information == "oracle":
            raise ConfigError(
                f"cannot imitate {self.imitate}, an oracle: it decides by what no policy can see"
            )
        if self.num_envs % self.group_size:
            raise ConfigError(
                f"num_envs ({self.num_envs}) must be a multiple of group_size ({self.group_size})"
            )
        if self.total_decisions < self.num_envs * self.num_steps:
            raise ConfigError(
                f"total_decisions must be at least num_envs * num_steps = "
                f"{self.num_envs * self.num_steps}, got {self.total_decisions}"
            )
        if self.device == "cuda":
            import torch  # not for those who only read settings

            if not torch.cuda.is_available():
                raise ConfigError("device cuda was asked for, but PyTorch finds no GPU: use cpu")
