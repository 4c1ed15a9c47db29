"""What runs that train a dispatcher in environments that are stepped together have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from typing_extensions import override

from servegym.train.arena import Arena, arenas_state, restore_arenas
from servegym.train.network_run import NetworkRun, NetworkSettings
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


class DispatcherRun(NetworkRun[D]):
    """A run that trains a dispatcher in environments that are stepped together.

    Attributes:
        arenas: Environments, of each scenario that is trained on.
    """

    def __init__(self, config: D, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
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
            )
            for part in self.parts
        ]
        self.steps_per_update = len(self.arenas) * config.num_envs * config.num_steps

    def warm_up(self) -> None:
        """Compile, and bring the environments to their places."""
        for arena in self.arenas:
            arena.open()

    @override
    def close_stage(self) -> None:
        for arena in self.arenas:
            arena.close()

    @override
    def state(self) -> dict[str, Any]:
        return {**super().state(), **arenas_state(self.arenas)}

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        super().restore(content)
        restore_arenas(self.arenas, content)


def episode_stats(episodes: list[tuple[float, float]]) -> dict[str, float]:
    """What is logged of episodes that have just ended, if some have."""
    if not episodes:
        return {}
    returns, mean_e2e_s = np.mean(episodes, 0).tolist()
    return {"rollout/return": returns, "rollout/mean_e2e_s": mean_e2e_s}
