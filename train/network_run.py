"""What all runs that train a dispatcher's network have in common, wherever its data come from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from servegym.agents.network import DispatchNetwork
from servegym.agents.network_config import NetworkConfig
from servegym.agents.torch_policy import TorchPolicy
from servegym.baselines.registry import policy
from servegym.errors import ConfigError
from servegym.export.from_torch import export_policy
from servegym.export.sample import sample_observations, together
from servegym.policy.policy import Policy
from servegym.scenario import Scenario
from servegym.train.card import NAME as CARD
from servegym.train.card import card, changed
from servegym.train.mix import Mix, parts_of
from servegym.train.run_folder import StoredRun
from servegym.train.training_run import TrainingRun, copied
from servegym.train.validation import Validated, Validation
from servegym.whole_files import write_whole


class NetworkSettings(Protocol):
    """What the settings of all of them have; frozen dataclasses."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def scenario(self) -> str:
        """Name or path of what is played."""
        ...

    @property
    def max_minutes(self) -> float:
        """Wall-clock minutes after which training ends."""
        ...

    @property
    def load(self) -> tuple[float, float]:
        """Range of the load factor."""
        ...

    @property
    def learning_rate(self) -> float:
        """Adam's, at the beginning."""
        ...

    @property
    def validate_every(self) -> int:
        """Updates between validations."""
        ...

    @property
    def seed(self) -> int:
        """Of everything."""
        ...

    @property
    def device(self) -> str:
        """Where to learn."""
        ...

    @property
    def torch_threads(self) -> int:
        """Of PyTorch on the CPU."""
        ...

    @property
    def network(self) -> NetworkConfig:
        """Network and base heuristic."""
        ...


N = TypeVar("N", bound=NetworkSettings)


class NetworkRun(TrainingRun[N, Scenario | Mix, DispatchNetwork]):
    """A run that trains a dispatcher's network; `found` is the network.

    Attributes:
        network: The present policy.
        optimizer: Of its weights.
        parts: Scenarios that are trained on, with the ranges of their loads.
    """

    problem = "dispatch"
    references = ("added-delay", "prefix-load", "mct")
    #: What manifests call the learner.
    algorithm: ClassVar[str]

    def __init__(self, config: N, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        torch.manual_seed(config.seed)
        torch.set_num_threads(config.torch_threads)
        self.device = torch.device(config.device)
        self.network = DispatchNetwork(self.config.network).to(self.device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.learning_rate, eps=1e-5, fused=True
        )
        self.parts = parts_of(self.scenario, config.load)

    @classmethod
    @override
    def stored_scenario(cls, contents: Mapping[str, Any]) -> Scenario | Mix:
        return (Mix if "parts" in contents else Scenario).model_validate(contents)

    @staticmethod
    def completed(config: N, scenario: Scenario | Mix) -> N:
        """Give the network an action for all that the scenario allows."""
        if config.network.holds:
            raise ConfigError(
                f"base {config.network.base} is not learned from by gradients: take --learner "
                "cross-entropy, or another base"
            )
        num_extra = scenario.actions.hold + scenario.actions.reject
        network = config.network.model_copy(update={"num_extra": num_extra})
        return replace(config, network=network)

    @property
    @abstractmethod
    def validation_size(self) -> tuple[int, int]:
        """Validation episodes of each scenario, and requests of each episode."""

    @cached_property
    def validations(self) -> list[Validation]:
        """Validation episodes of each scenario, over the range of its loads."""
        num_episodes, num_requests = self.validation_size
        return [
            Validation(
                part.scenario,
                loads=np.linspace(*part.load, 4).tolist(),
                num_episodes=num_episodes,
                num_requests=num_requests,
            )
            for part in self.parts
        ]

    def validate_policy(self, policy: Policy) -> Validated:
        """Play the validation episodes under any policy."""
        found = [validation.play(policy) for validation in self.validations]
        return Validated.joined(found, in_time=self.scenario.objective == "goodput")

    @property
    def update(self) -> int:
        """Updates up to now."""
        return self.updates[0]

    @property
    @abstractmethod
    def num_updates(self) -> int:
        """Updates of the whole run."""

    @property
    def num_decisions(self) -> int:
        """Decisions that were learned from up to now."""
        return self.update * self.steps_per_update

    @property
    @override
    def validate_every(self) -> int:
        return self.config.validate_every

    @override
    def share_of_updates(self) -> float:
        return self.update / self.num_updates

    @override
    def goes_on(self) -> bool:
        if self.update == 0:
            return True
        has_time = self.budget.fits(self.update_s + self.validate_s)
        return self.update < self.num_updates and has_time

    def validate(self) -> Validated:
        """Play the validation episodes greedily."""
        found = self.validate_policy(TorchPolicy(self.network.cpu()))
        self.network.to(self.device)
        return found

    @override
    def validate_rule(self, name: str) -> Validated:
        return self.validate_policy(policy(name))

    @override
    def parameters(self) -> dict[str, Tensor]:
        return copied(self.network)

    @override
    def take_best(self) -> None:
        self.network.load_state_dict(self.best)

    @override
    def found(self) -> DispatchNetwork:
        return self.network

    def export(self, folder: Path | None = None) -> Path:
        """Export, with a card, and with observations from training to check against."""
        self.take_best()
        self.network.cpu()
        samples = [
            sample_observations(self.network, part.scenario, load=part.load) for part in self.parts
        ]
        folder = folder or self.folder.path / "policy"
        path = export_policy(
            self.network,
            folder,
            together(samples),
            scenario=self.config.scenario,
            objective=self.scenario.objective,
            training={
                "algorithm": self.algorithm,
                "decisions": self.num_decisions,
                "seed": self.config.seed,
                "base": self.config.network.base,
                "mean_e2e_s": self.last.get("rollout/mean_e2e_s", 0.0),
                **self.provenance(),
            },
        )
        text = card(
            name=self.scenario.name,
            learner=self.algorithm,
            settings=changed(self.config),
            parts=self.parts,
            first_scores=self.first_scores,
            best_scores=self.best_scores,
            updates=self.update,
            minutes=self.spent_s / 60.0,
        )
        write_whole({folder / CARD: text.encode()})
        return path

    def provenance(self) -> dict[str, float | int | str]:
        """Return what else a manifest says of the training; nothing unless overridden."""
        return {}

    def on_device(self, array: np.ndarray) -> Tensor:
        """Bring numbers to where the network is, `float32`."""
        return torch.from_numpy(array).to(self.device, torch.float32)

    @override
    def state(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state() if cuda else torch.empty(0),
        }

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        self.take_best()
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["rng"])
        if len(content["device_rng"]) and self.device.type == "cuda":
            torch.cuda.set_rng_state(content["device_rng"])
