"""The vector environment as a Stable-Baselines3 `VecEnv`, without a Python loop over it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv

from servegym.envs.vector import DispatchVectorEnv
from servegym.typing import IntArray


class DispatchVecEnv(VecEnv):
    """`DispatchVectorEnv` for SB3 and sb3-contrib; takes its arguments."""

    def __init__(self, num_envs: int, scenario: str = "mixed-chat", **settings: Any) -> None:
        self._env = DispatchVectorEnv(
            num_envs, scenario, autoreset_mode=AutoresetMode.SAME_STEP, **settings
        )
        self.render_mode = None
        self._returns = np.zeros(num_envs)
        self._lengths = np.zeros(num_envs, np.int64)
        super().__init__(
            num_envs, self._env.single_observation_space, self._env.single_action_space
        )

    def reset(self) -> dict[str, Any]:
        """Start all episodes."""
        seed = next((s for s in self._seeds if s is not None), None)
        self._reset_seeds()
        self._reset_options()
        self._returns[:] = 0
        self._lengths[:] = 0
        return self._env.reset(seed=seed)[0]

    def step_async(self, actions: IntArray) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> Any:
        """Step all environments."""
        observation, reward, terminated, _, info = self._env.step(self._actions)
        self._returns += reward
        self._lengths += 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for env in np.flatnonzero(terminated).tolist():
            infos[env] = {
                "terminal_observation": {k: v[env] for k, v in info["final_obs"].items()},
                "TimeLimit.truncated": False,
                "episode": {"r": float(self._returns[env]), "l": int(self._lengths[env]), "t": 0.0},
                "episode_metrics": info["episode_metrics"][env],
            }
            self._returns[env] = 0.0
            self._lengths[env] = 0
        return observation, reward, terminated, infos

    def close(self) -> None:
        """Release threads."""
        self._env.close()

    def env_method(
        self,
        method_name: str,
        *args: Any,
        indices: Any = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Answer `action_masks`, the one method algorithms call."""
        if method_name != "action_masks":
            raise AttributeError(f"DispatchVecEnv has no method {method_name}")
        return list(self._env.action_masks()[list(self._get_indices(indices))])

    def has_attr(self, attr_name: str) -> bool:
        """Whether environments have an attribute."""
        return attr_name == "action_masks" or hasattr(self._env, attr_name)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute for each environment."""
        return [getattr(self._env, attr_name, None) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of all environments."""
        setattr(self._env, attr_name, value)

    def env_is_wrapped(
        self,
        wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]],
        indices: Any = None,
    ) -> list[bool]:
        """No environment is wrapped."""
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[Any]:
        """Nothing is drawn."""
        return []

    def _get_indices(self, indices: Any) -> Iterable[int]:
        return super()._get_indices(indices)
