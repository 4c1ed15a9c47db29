"""Settings of a run that trains a dispatcher on what all its choices would have done."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Fixed, OmitArgPrefixes, Suppress, arg

from servegym.agents.network_config import NetworkConfig
from servegym.errors import ConfigError
from servegym.policy.counterfactual import LIMITS, SECONDS
from servegym.train.ranges import check_counts, check_load


@dataclass(frozen=True)
class CounterfactualTraining:
    """Settings of a training run."""

    scenario: Annotated[str, Fixed, Suppress] = "mixed-chat"
    """Bundled scenario name or YAML file; or a mix of scenarios."""
    learner: Annotated[Literal["counterfactual"], Fixed, Suppress] = "counterfactual"
    """What `--learner` calls it."""
    total_labels: Annotated[int, arg(name="labels")] = 100_000
    """Decisions whose choices are all tried, to learn from."""
    max_minutes: Annotated[float, arg(name="minutes")] = math.inf
    """Stop earlier after this wall-clock time, which counts from when all is compiled."""
    num_envs: int = 32
    """Environments stepped together, of each scenario."""
    group_size: int = 1
    """Environments that play the same requests."""
    num_steps: int = 256
    """Decisions of each environment per update."""
    label_every: int = 4
    """Of the decisions of an environment one in so many is labelled."""
    num_samples: int = SECONDS.num_samples
    """Futures over which a choice is tried."""
    num_requests: int = 2048
    """Requests per episode."""
    load: tuple[float, float] = (0.6, 1.1)
    """Range of the load factor, drawn per episode; a mix has its own."""
    prefix_price: float = SECONDS.prefix_price
    """What a second of uncached prefill costs for each request there besides the time that it adds,
    in seconds; of requests with a prefix that others may share."""
    prefill_price: float = SECONDS.prefill_price
    """The same, whether a request has a prefix or not: who comes later is delayed, too."""
    memory_price: float = SECONDS.memory_price
    """What all of a replica's KV memory costs for each second that it is held and each request
    there, in seconds: who comes later will want it. Where memory is short, 1 is a good price.
    A mix can have prices of its own for each scenario."""
    second_price: float = LIMITS.second
    """Under the goodput objective: share of a request in time that a second of added time costs."""
    stretch: float = LIMITS.stretch
    """Under the goodput objective: how much longer than foreseen things take, as others arrive."""
    softness: float = LIMITS.softness
    """Under the goodput objective: share of a limit by which one must stay below it to be rather
    sure of it."""
    learning_rate: float = 5e-3
    """Adam's, falling linearly to 0."""
    memory: int = 65_536
    """Labelled decisions that are learned from, the latest; of a mix as many of each."""
    num_batches: int = 128
    """Gradient steps per update."""
    batch: int = 512
    """Labelled decisions per gradient step, drawn from the memory."""
    smoothing: float = 0.01
    """Weight of the mean logarithm of all allowed actions' probabilities, in standard deviations of
    the advantages, falling linearly to a tenth: what is bad in the first states, such as a
    rejection while nothing is to be done, must not become too rare to be learned later."""
    max_grad_norm: float = 0.5
    """Gradient clip."""
    validate_every: int = 5
    """Updates between validations; the network that did best there is the one exported."""
    patience: int = 0
    """Validations in a row without a better network after which training ends; 0: goes on."""
    validation_episodes: int = 8
    """Episodes of a validation, of each scenario."""
    validation_requests: int = 4096
    """Requests of each: as many as policies are judged on, as what is good in short ones need not
    be in long ones."""
    seed: int = 0
    """Of everything."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to learn."""
    torch_threads: int = 1
    """Of PyTorch on the CPU."""
    label_threads: int = 2
    """That label decisions together."""
    network: OmitArgPrefixes[NetworkConfig] = field(default_factory=lambda: NetworkConfig())
    """Network and base heuristic."""

    def __post_init__(self) -> None:
        check_counts(
            self,
            "num_envs",
            "num_steps",
            "label_every",
            "num_samples",
            "num_batches",
            "batch",
            "validation_episodes",
            "label_threads",
        )
        for name in ("prefix_price", "prefill_price", "memory_price", "patience"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name):g}")
        for name in ("max_minutes", "stretch", "softness"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name):g}")
        check_load(self.load)
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device must be cpu or cuda, got {self.device!r}")
        if self.num_steps % self.label_every:
            raise ConfigError(
                f"num_steps ({self.num_steps}) must be a multiple of label_every"
                f" ({self.label_every})"
            )
        if self.memory < self.labels_per_update:
            raise ConfigError(
                f"memory must hold the {self.labels_per_update} labels of an update, got"
                f" {self.memory}"
            )
        if self.total_labels < self.labels_per_update:
            raise ConfigError(
                f"total_labels must be at least those of an update, num_envs * num_steps /"
                f" label_every = {self.labels_per_update}, got {self.total_labels}"
            )
        if self.device == "cuda":
            import torch  # not for those who only read settings

            if not torch.cuda.is_available():
                raise ConfigError("device cuda was asked for, but PyTorch finds no GPU: use cpu")

    @property
    def labels_per_update(self) -> int:
        """Decisions of one scenario that an update labels."""
        return self.num_envs * self.num_steps // self.label_every
