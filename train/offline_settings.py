"""Settings of a run that trains a dispatcher on a data set alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from tyro.conf import Fixed, OmitArgPrefixes, Suppress, arg

from servegym.agents.network_config import NetworkConfig
from servegym.errors import ConfigError
from servegym.train.ranges import check_counts, check_load

Algorithm = Literal["bc", "cql", "iql"]


@dataclass(frozen=True)
class OfflineTraining:
    """Settings of a training run."""

    scenario: Annotated[str, Fixed, Suppress] = "mixed-chat"
    """Bundled scenario name or YAML file."""
    learner: Annotated[Literal["offline"], Fixed, Suppress] = "offline"
    """What `--learner` calls it."""
    dataset: str = ""
    """Folder of a data set that `servegym record` has written."""
    dataset_sha256: Annotated[str, Fixed, Suppress] = ""
    """Of its files; training takes it from them."""
    algorithm: Algorithm = "cql"
    """`bc` does what the data do; `cql` (conservative Q-learning) and `iql` (implicit Q-learning)
    may do better."""
    total_updates: Annotated[int, arg(name="updates")] = 40
    """Updates in all."""
    max_minutes: Annotated[float, arg(name="minutes")] = math.inf
    """Stop earlier after this wall-clock time, which counts from when all is compiled."""
    num_batches: int = 250
    """Gradient steps per update."""
    batch: int = 512
    """Decisions per gradient step, drawn from the data."""
    learning_rate: float = 1e-3
    """Adam's, falling linearly to 0."""
    horizon_s: float = 1.0
    """Discount: a reward t seconds ahead counts exp(-t / horizon). Rewards with `--shaping
    cost-to-go` have most of what a decision adds in them at once."""
    conservatism: float = 0.1
    """Of cql: weight of keeping to what the data do, against the error of the values."""
    expectile: float = 0.7
    """Of iql: which expectile of the values of the data's actions is that of a state."""
    temperature: float = 3.0
    """Of iql: how much more an action counts that is better by a standard deviation."""
    target_rate: float = 0.01
    """By what share the target network follows at each gradient step."""
    max_grad_norm: float = 10.0
    """Gradient clip."""
    load: tuple[float, float] = (0.6, 1.1)
    """Range of the load factor of validation episodes."""
    validate_every: int = 4
    """Updates between validations in the simulator; the network that did best there is the one
    exported."""
    validation_episodes: int = 16
    """Episodes of a validation."""
    validation_requests: int = 1024
    """Requests of each."""
    seed: int = 0
    """Of everything."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to learn."""
    torch_threads: int = 1
    """Of PyTorch on the CPU."""
    network: OmitArgPrefixes[NetworkConfig] = field(default_factory=lambda: NetworkConfig())
    """Network and base heuristic."""

    def __post_init__(self) -> None:
        check_counts(
            self,
            "total_updates",
            "num_batches",
            "batch",
            "validate_every",
            "validation_episodes",
            "validation_requests",
        )
        for name in ("max_minutes", "learning_rate", "horizon_s", "temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name):g}")
        for name in ("expectile", "target_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be within 0 to 1, got {getattr(self, name):g}")
        if not self.conservatism >= 0:
            raise ConfigError(f"conservatism must be at least 0, got {self.conservatism:g}")
        check_load(self.load)
        if self.algorithm not in get_args(Algorithm):
            raise ConfigError(
                f"algorithm must be one of {', '.join(get_args(Algorithm))}, got {self.algorithm!r}"
            )
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device must be cpu or cuda, got {self.device!r}")
        if self.device == "cuda":
            import torch  # not for those who only read settings

            if not torch.cuda.is_available():
                raise ConfigError("device cuda was asked for, but PyTorch finds no GPU: use cpu")
