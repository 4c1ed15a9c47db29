"""What all runs have in common that train a dispatcher's network in environments."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import gymnasium
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from servegym.train.network_run import NetworkRun, NetworkSettings
from servegym.train.places import Places
from servegym.train.run_folder import StoredRun


class DispatcherSettings(NetworkSettings, Protocol):
    """What the settings of all of them have; frozen dataclasses."""

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


D = TypeVar("D", bound=DispatcherSettings)


class Stepped(NamedTuple):
    """What a step of all environments did."""

    action: Tensor  # int64[num_envs]
    reward: np.ndarray  # float64[num_envs]
    dt_s: np.ndarray  # float64[num_envs], simulated seconds since the step before
    ended: np.ndarray  # bool[num_envs], whether the episode ended: another one has begun


class DispatcherRun(NetworkRun[D]):
    """A run that trains a dispatcher in environments that are stepped together.

    Attributes:
        places: Where the environments are.
        observation: What they show.
    """

    def __init__(self, config: D, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        self.places = Places.at_the_beginning(config.num_envs)
        self.episode_returns = np.zeros(config.num_envs)
        self.observation: dict[str, np.ndarray] = {}
        self.steps_per_update = config.num_envs * config.num_steps

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

    def warm_up(self) -> None:
        """Compile, and bring the environments to their places."""
        _, info = self.env.reset(seed=self.config.seed)
        self.env.step(info["action_mask"].argmax(-1))  # compiles
        self.env.reset(seed=self.config.seed)
        self.places.go_to(self.env.batch)
        self.observation = self.env.batch.observation()

    @override
    def close_stage(self) -> None:
        self.env.close()

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
        return {
            **super().state(),
            "episodes": torch.from_numpy(self.places.episodes),
            "taken": [torch.from_numpy(x) for x in self.places.taken()],
            "episode_returns": torch.from_numpy(self.episode_returns.copy()),
        }

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        super().restore(content)
        taken = [x.numpy() for x in content["taken"]]
        self.places = Places(content["episodes"].numpy().copy(), taken)
        self.episode_returns = content["episode_returns"].numpy().copy()


def episode_stats(episodes: list[tuple[float, float]]) -> dict[str, float]:
    """What is logged of episodes that have just ended, if some have."""
    if not episodes:
        return {}
    returns, mean_e2e_s = np.mean(episodes, 0).tolist()
    return {"rollout/return": returns, "rollout/mean_e2e_s": mean_e2e_s}
