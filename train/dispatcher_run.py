"""What all runs that train a dispatcher's network have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import gymnasium
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from servegym.agents.network import DispatchNetwork, Prepared
from servegym.agents.network_config import NetworkConfig
from servegym.agents.torch_policy import TorchPolicy
from servegym.baselines.registry import policy
from servegym.export.from_torch import export_policy
from servegym.export.sample import sample_observations
from servegym.scenario import Scenario, load_scenario
from servegym.train.places import Places
from servegym.train.run_folder import StoredRun
from servegym.train.training_run import TrainingRun, copied
from servegym.train.validation import Validated, Validation


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


class Stepped(NamedTuple):
    """What a step of all environments did."""

    action: Tensor  # int64[num_envs]
    reward: np.ndarray  # float64[num_envs]
    dt_s: np.ndarray  # float64[num_envs], simulated seconds since the step before
    ended: np.ndarray  # bool[num_envs], whether the episode ended: another one has begun


class DispatcherRun(TrainingRun[D, Scenario, DispatchNetwork]):
    """A run that trains a dispatcher in environments that are stepped together.

    `found` is its network.

    Attributes:
        network: The present policy.
        places: Where the environments are.
        observation: What they show.
    """

    problem = "dispatch"
    references = ("added-delay", "prefix-load", "mct")
    #: What manifests call the learner.
    algorithm: ClassVar[str]
    load_scenario = staticmethod(load_scenario)

    def __init__(self, config: D, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        torch.manual_seed(config.seed)
        torch.set_num_threads(config.torch_threads)
        self.device = torch.device(config.device)
        self.network = DispatchNetwork(self.config.network).to(self.device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.learning_rate, eps=1e-5
        )
        self.places = Places.at_the_beginning(config.num_envs)
        self.episode_returns = np.zeros(config.num_envs)
        self.observation: dict[str, np.ndarray] = {}
        self.steps_per_update = config.num_envs * config.num_steps

    @classmethod
    @override
    def stored_scenario(cls, contents: Mapping[str, Any]) -> Scenario:
        return Scenario.model_validate(contents)

    @staticmethod
    def completed(config: D, scenario: Scenario) -> D:
        """Give the network an action for all that the scenario allows."""
        num_extra = scenario.actions.hold + scenario.actions.reject
        network = config.network.model_copy(update={"num_extra": num_extra})
        return replace(config, network=network)

    @property
    @abstractmethod
    def validation(self) -> Validation:
        """Validation episodes, over the range of loads."""

    @cached_property
    def env(self) -> Any:
        """Environments that are stepped together."""
        return gymnasium.make_vec(
            "servegym/Dispatch-v1",
            num_envs=self.config.num_envs,
            scenario=self.scenario,
            autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
            num_requests=self.config.num_requests,
            load=self.config.load,
            group_size=self.config.group_size,
            features="extended" if self.config.network.extended else "contract",
        )

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
        _, info = self.env.reset(seed=self.config.seed)
        self.env.step(info["action_mask"].argmax(-1))  # compiles
        self.env.reset(seed=self.config.seed)
        self.places.go_to(self.env.batch)
        self.observation = self.env.batch.observation()

    def validate(self) -> Validated:
        """Play the validation episodes greedily."""
        found = self.validation.play(TorchPolicy(self.network.cpu()))
        self.network.to(self.device)
        return found

    @override
    def validate_rule(self, name: str) -> Validated:
        return self.validation.play(policy(name))

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
        self.env.close()

    def export(self, folder: Path | None = None) -> Path:
        """Export with observations from the training scenario to check against."""
        self.take_best()
        self.network.cpu()
        samples = sample_observations(self.network, self.scenario, load=self.config.load)
        return export_policy(
            self.network,
            folder or self.folder.path / "policy",
            samples,
            scenario=self.config.scenario,
            objective=self.scenario.objective,
            training={
                "algorithm": self.algorithm,
                "decisions": self.update * self.steps_per_update,
                "seed": self.config.seed,
                "base": self.config.network.base,
                "mean_e2e_s": self.last.get("rollout/mean_e2e_s", 0.0),
            },
        )

    def prepared(self, observation: Mapping[str, np.ndarray]) -> Prepared:
        """Turn what the environments show into what the network reads."""
        return self.network.prepare(
            torch.from_numpy(observation["replicas"]).to(self.device),
            torch.from_numpy(observation["request"]).to(self.device),
            torch.from_numpy(observation["action_mask"]).to(self.device, torch.float32),
        )

    def on_device(self, array: np.ndarray) -> Tensor:
        """Bring numbers to where the network is, `float32`."""
        return torch.from_numpy(array).to(self.device, torch.float32)

    def step(self, scores: Tensor, episodes: list[tuple[float, float]]) -> Stepped:
        """Take actions drawn from the policy in all environments; `observation` moves on.

        Args:
            scores: Logits of all actions, `float32[num_envs, A]`.
            episodes: Return and mean E2E latency, seconds, of those that end are appended.
        """
        # the Gumbel trick: one exponential draw per action instead of a distribution object
        noise = torch.empty_like(scores).exponential_().log_()
        action = (scores - noise).argmax(-1)
        taken = action.cpu().numpy()
        self.observation, reward, terminated, _, info = self.env.step(taken)
        self.places.note(taken, terminated)
        dt_s = info["dt_s"].copy()
        self.episode_returns += reward
        if terminated.any():  # `info` is of the next episode there
            final = info["final_info"]
            dt_s[terminated] = final["dt_s"][terminated]
            mean_e2e_s = final["episode_metrics"]["mean_e2e_s"][terminated]
            ended = self.episode_returns[terminated].tolist()
            episodes += zip(ended, mean_e2e_s.tolist(), strict=True)
            self.episode_returns[terminated] = 0.0
        return Stepped(action, reward, dt_s, terminated)

    @override
    def state(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state() if cuda else torch.empty(0),
            "episodes": torch.from_numpy(self.places.episodes),
            "taken": [torch.from_numpy(x) for x in self.places.taken()],
            "episode_returns": torch.from_numpy(self.episode_returns.copy()),
        }

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        self.take_best()
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        taken = [x.numpy() for x in content["taken"]]
        self.places = Places(content["episodes"].numpy().copy(), taken)
        self.episode_returns = content["episode_returns"].numpy().copy()
        torch.set_rng_state(content["rng"])
        if len(content["device_rng"]) and self.device.type == "cuda":
            torch.cuda.set_rng_state(content["device_rng"])


def episode_stats(episodes: list[tuple[float, float]]) -> dict[str, float]:
    """What is logged of episodes that have just ended, if some have."""
    if not episodes:
        return {}
    returns, mean_e2e_s = np.mean(episodes, 0).tolist()
    return {"rollout/return": returns, "rollout/mean_e2e_s": mean_e2e_s}
