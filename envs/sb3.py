"""The vector environments as Stable-Baselines3 `VecEnv`s, without a Python loop over them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from servegym.envs.cluster import ClusterVectorEnv
from servegym.envs.dispatch import DispatchVectorEnv
from servegym.envs.preemption import PreemptionVectorEnv
from servegym.envs.vector import BatchVectorEnv
from servegym.envs.workflow import WorkflowVectorEnv
from servegym.errors import ConfigError, unknown_name
from servegym.typing import IntArray


class BatchVecEnv(VecEnv):
    """SB3's face of a batch; takes the arguments of `vector_type`.

    Seeds are SB3's: environment i plays what a single environment plays with seed + i (with
    `group_size` above 1, what its group's first plays). Returns and lengths of episodes are
    recorded as `Monitor` does.
    """

    vector_type: ClassVar[type[BatchVectorEnv[Any]]]

    def __init__(self, num_envs: int, scenario: Any = None, **settings: Any) -> None:
        self._env = self.vector_type(
            num_envs, scenario, autoreset_mode=AutoresetMode.SAME_STEP, **settings
        )
        self._returns = np.zeros(num_envs)
        self._lengths = np.zeros(num_envs, np.int64)
        self._begin_s = time.perf_counter()
        super().__init__(
            num_envs, self._env.single_observation_space, self._env.single_action_space
        )

    def reset(self) -> Any:
        """Start an episode in every environment."""
        size = self._env.batch.settings.group_size
        seeds = [self._seeds[env - env % size] for env in range(self.num_envs)]
        keys = {key for options in self._options for key in options}
        options = {key: [options.get(key) for options in self._options] for key in keys}
        seen, info = self._env.reset(
            seed=seeds if any(seed is not None for seed in seeds) else None, options=options
        )
        self.reset_infos = [{"now_s": float(now_s)} for now_s in info["now_s"]]
        self._reset_seeds()
        self._reset_options()
        self._returns[:] = 0
        self._lengths[:] = 0
        return seen

    def step_async(self, actions: IntArray) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> Any:
        """Step all environments by the actions kept."""
        observation, reward, terminated, truncated, info = self._env.step(self._actions)
        self._returns += reward
        self._lengths += 1
        over = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for env in np.flatnonzero(over).tolist():
            metrics = info["final_info"]["episode_metrics"]
            infos[env] = {
                "terminal_observation": info["final_obs"][env],
                "TimeLimit.truncated": bool(truncated[env] and not terminated[env]),
                "episode": {
                    "r": float(self._returns[env]),
                    "l": int(self._lengths[env]),
                    "t": round(time.perf_counter() - self._begin_s, 6),
                },
                "episode_metrics": {
                    name: float(metrics[name][env]) for name in self._env.batch.metric_names
                },
            }
        self._returns[over] = 0.0
        self._lengths[over] = 0
        return observation, reward.astype(np.float32), over, infos

    def close(self) -> None:
        """Release threads; the environments cannot be used any more."""
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
            raise AttributeError(f"{type(self).__name__} has no method {method_name}")
        return list(self._env.action_masks()[list(self._get_indices(indices))])

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute for each environment; all have the same."""
        value = getattr(self._env, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of all environments."""
        setattr(self._env, attr_name, value)

    def env_is_wrapped(
        self,
        wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]],
        indices: Any = None,
    ) -> list[bool]:
        """Whether environments do what a wrapper does: only `Monitor`'s work is done."""
        return [issubclass(Monitor, wrapper_class) for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[Any]:
        """Draw a picture of every environment."""
        return self._env.render() or []

    def _get_indices(self, indices: Any) -> Iterable[int]:
        return super()._get_indices(indices)


class DispatchVecEnv(BatchVecEnv):
    """`servegym/Dispatch-v1` for SB3 and sb3-contrib."""

    vector_type = DispatchVectorEnv


class PreemptionVecEnv(BatchVecEnv):
    """`servegym/Preemption-v0` for SB3 and sb3-contrib."""

    vector_type = PreemptionVectorEnv


class WorkflowVecEnv(BatchVecEnv):
    """`servegym/Workflow-v0` for SB3 and sb3-contrib."""

    vector_type = WorkflowVectorEnv


class ClusterVecEnv(BatchVecEnv):
    """`servegym/Cluster-v0` for SB3 and sb3-contrib: the agents of all fleets as one batch."""

    vector_type = ClusterVectorEnv


def make_vec(env_id: str, num_envs: int, **settings: Any) -> BatchVecEnv:
    """Make an environment by its id, as `gymnasium.make_vec`, for SB3.

    Args:
        env_id: A registered one of servegym, such as `servegym/DispatchShaped-v1`.
        num_envs: Environments.
        settings: In addition to those of the id, or in their place.

    Raises:
        ConfigError: If servegym has no such environment.
    """
    spec = gymnasium.registry.get(env_id)
    for adapter in (DispatchVecEnv, PreemptionVecEnv, WorkflowVecEnv, ClusterVecEnv):
        vector = adapter.vector_type
        if spec and spec.vector_entry_point == f"{vector.__module__}:{vector.__name__}":
            return adapter(num_envs, **{**spec.kwargs, **settings})
    known = [name for name in gymnasium.registry if name.startswith("servegym/")]
    raise ConfigError(unknown_name("environment", env_id, known))
