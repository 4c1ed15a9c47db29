"""Environments of one scenario in which a dispatcher is trained, and where they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor

from servegym.agents.acting import Acting
from servegym.agents.network import Prepared
from servegym.scenario import Scenario
from servegym.train.places import Places


class Stepped(NamedTuple):
    """What a step of all environments did."""

    action: Tensor  # int64[num_envs]
    reward: np.ndarray  # float64[num_envs]
    dt_s: np.ndarray  # float64[num_envs], simulated seconds since the step before
    ended: np.ndarray  # bool[num_envs], whether the episode ended: another one has begun


class Arena:
    """Environments that are stepped together.

    Args:
        scenario: What is played.
        num_envs: Environments.
        num_requests: Of each episode.
        load: Range of the load factor, drawn for every episode.
        group_size: Environments that play the same requests.
        extended: Whether they show what a router infers, too.
        seed: Of the episodes.

    Attributes:
        scenario: What is played.
        load: Range of the load factor.
        places: Where the environments are.
        observation: What they show.
        episode_returns: Sums of the rewards of the episodes that are played.
    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        num_envs: int,
        num_requests: int,
        load: tuple[float, float],
        group_size: int,
        extended: bool,
        seed: int,
    ) -> None:
        self.scenario, self.load = scenario, load
        self.places = Places.at_the_beginning(num_envs)
        self.observation: dict[str, np.ndarray] = {}
        self.episode_returns = np.zeros(num_envs)
        self._seed, self._everywhere = seed, np.ones(num_envs, np.bool_)
        self._made_with: dict[str, Any] = {
            "num_envs": num_envs,
            "num_requests": num_requests,
            "load": load,
            "group_size": group_size,
            "features": "extended" if extended else "contract",
        }

    @cached_property
    def env(self) -> Any:
        """The environments."""
        return gymnasium.make_vec(
            "servegym/Dispatch-v1",
            scenario=self.scenario,
            autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
            **self._made_with,
        )

    def open(self) -> None:
        """Compile, and bring the environments to their places."""
        _, info = self.env.reset(seed=self._seed)
        self.env.step(info["action_mask"].argmax(-1))  # compiles
        self.env.reset(seed=self._seed)
        self.places.go_to(self.env.batch)
        self.observation = self.env.batch.observation()

    def close(self) -> None:
        """Release the environments."""
        self.env.close()

    def prepared(self, acting: Acting) -> Prepared:
        """Turn what the environments show into what a network reads."""
        shown = self.observation
        return acting.prepared(shown["replicas"], shown["request"], shown["action_mask"])

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
        batch = self.env.batch  # without what Gymnasium's face of it tells of each step
        batch.step(taken, self._everywhere)
        stepped = Stepped(action, batch.reward.copy(), batch.dt_s.copy(), batch.done.copy())
        self.places.note(taken, stepped.ended)
        self.episode_returns += stepped.reward
        over = np.flatnonzero(stepped.ended)
        if len(over):
            mean_e2e_s = batch.metrics[batch.metric_names.index("mean_e2e_s"), over]
            returns = self.episode_returns[over]
            episodes += zip(returns.tolist(), mean_e2e_s.tolist(), strict=True)
            self.episode_returns[over] = 0.0
            batch.reset(over)
        self.observation = batch.observation()
        return stepped


def arenas_state(arenas: list[Arena]) -> dict[str, Any]:
    """Return what `restore_arenas` takes."""
    return {
        "episodes": torch.from_numpy(np.concatenate([a.places.episodes for a in arenas])),
        "taken": [torch.from_numpy(x) for a in arenas for x in a.places.taken()],
        "episode_returns": torch.from_numpy(np.concatenate([a.episode_returns for a in arenas])),
    }


def restore_arenas(arenas: list[Arena], content: Mapping[str, Any]) -> None:
    """Take up where environments were."""
    first = 0
    for arena in arenas:
        part = slice(first, first + len(arena.episode_returns))
        taken = [x.numpy() for x in content["taken"][part]]
        arena.places = Places(content["episodes"][part].numpy().copy(), taken)
        arena.episode_returns = content["episode_returns"][part].numpy().copy()
        first = part.stop
