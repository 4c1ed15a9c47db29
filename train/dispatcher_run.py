"""What all runs that train a dispatcher's network have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
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
from servegym.export.from_torch import export_policy
from servegym.export.sample import sample_observations, together
from servegym.policy.policy import Policy
from servegym.scenario import Scenario
from servegym.train.arena import Arena, arenas_state, restore_arenas
from servegym.train.card import NAME as CARD
from servegym.train.card import card, changed
from servegym.train.mix import Mix, parts_of
from servegym.train.run_folder import StoredRun
from servegym.train.training_run import TrainingRun, copied
from servegym.train.validation import Validated
from servegym.whole_files import write_whole


class DispatcherSettings(Protocol):
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
    def num_envs(self) -> int:
        """Environments stepped together."""
        ...

    @property
    def group_size(self) -> int:
        """Environments that play the same requests."""
        ...

    @property
    def num_steps(self) -> int:
        """Decisions of each environment per update."""
        ...

    @property
    def num_requests(self) -> int:
        """Requests per episode."""
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


D = TypeVar("D", bound=DispatcherSettings)


class DispatcherRun(TrainingRun[D, Scenario | Mix, DispatchNetwork]):
    """A run that trains a dispatcher in environments that are stepped together.

    `found` is its network.

    Attributes:
        network: The present policy.
        parts: Scenarios that are trained on, with the ranges of their loads.
        arenas: Environments, of each scenario that is trained on.
    """

    problem = "dispatch"
    references = ("added-delay", "prefix-load", "mct")
    #: What manifests call the learner.
    algorithm: ClassVar[str]

    def __init__(self, config: D, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        torch.manual_seed(config.seed)
        torch.set_num_threads(config.torch_threads)
        self.device = torch.device(config.device)
        self.network = DispatchNetwork(self.config.network).to(self.device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.learning_rate, eps=1e-5
        )
        self.parts = parts_of(self.scenario, config.load)
        c = self.config
        self.arenas = [
            Arena(
                part.scenario,
                num_envs=c.num_envs,
                num_requests=c.num_requests,
                load=part.load,
                group_size=c.group_size,
                extended=c.network.extended,
                seed=c.seed,
                device=self.device,
            )
            for part in self.parts
        ]
        self.steps_per_update = len(self.arenas) * config.num_envs * config.num_steps

    @classmethod
    @override
    def stored_scenario(cls, contents: Mapping[str, Any]) -> Scenario | Mix:
        return (Mix if "parts" in contents else Scenario).model_validate(contents)

    @staticmethod
    def completed(config: D, scenario: Scenario | Mix) -> D:
        """Give the network an action for all that the scenario allows."""
        num_extra = scenario.actions.hold + scenario.actions.reject
        network = config.network.model_copy(update={"num_extra": num_extra})
        return replace(config, network=network)

    @abstractmethod
    def validate_policy(self, policy: Policy) -> Validated:
        """Play the validation episodes under any policy."""

    @property
    def update(self) -> int:
        """Updates up to now."""
        return self.updates[0]

    @property
    @abstractmethod
    def num_updates(self) -> int:
        """Updates of the whole run."""

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

    def warm_up(self) -> None:
        """Compile, and bring the environments to their places."""
        for arena in self.arenas:
            arena.open()

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

    @override
    def close_stage(self) -> None:
        for arena in self.arenas:
            arena.close()

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
                "decisions": self.update * self.steps_per_update,
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
            **arenas_state(self.arenas),
        }

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        self.take_best()
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        restore_arenas(self.arenas, content)
        torch.set_rng_state(content["rng"])
        if len(content["device_rng"]) and self.device.type == "cuda":
            torch.cuda.set_rng_state(content["device_rng"])


def episode_stats(episodes: list[tuple[float, float]]) -> dict[str, float]:
    """What is logged of episodes that have just ended, if some have."""
    if not episodes:
        return {}
    returns, mean_e2e_s = np.mean(episodes, 0).tolist()
    return {"rollout/return": returns, "rollout/mean_e2e_s": mean_e2e_s}
