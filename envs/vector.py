"""Vector environments that step all their environments in one compiled call."""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from servegym.envs.batch import EpisodeBatch
from servegym.errors import ResetNeeded
from servegym.scenario import Scenario
from servegym.typing import BoolArray, FloatArray, Int8Array, IntArray


class Batch(Protocol):
    """What a vector environment steps: `envs.batch.EpisodeBatch`, `envs.workflow_batch`."""

    num_envs: int
    num_actions: int
    input_id: IntArray

    @property
    def mask(self) -> Int8Array: ...
    @property
    def reward(self) -> NDArray[np.floating[Any]]: ...
    @property
    def done(self) -> BoolArray: ...
    @property
    def dt_s(self) -> FloatArray: ...
    def observation_space(self) -> spaces.Dict: ...
    def seed(self, seed: int) -> None: ...
    @property
    def simulator(self) -> Any: ...
    def reset(self, envs: IntArray, episodes: Any = None) -> None: ...
    def step(self, actions: IntArray, active: BoolArray) -> None: ...
    def observation(self) -> dict[str, Any]: ...
    def summary(self, env: int) -> dict[str, float]: ...
    def close(self) -> None: ...


B = TypeVar("B", bound=Batch)


class BatchVectorEnv(VectorEnv[dict[str, Any], IntArray, Any], Generic[B]):
    """Gymnasium's face of a batch: spaces, autoreset, infos."""

    def __init__(
        self, batch: B, autoreset_mode: AutoresetMode | str, render_mode: str | None
    ) -> None:
        self._mode = AutoresetMode(autoreset_mode)
        self.metadata = {"render_modes": [], "autoreset_mode": self._mode}
        self.render_mode = render_mode
        self.num_envs = batch.num_envs
        self.batch = batch
        self.single_observation_space = batch.observation_space()
        self.single_action_space = spaces.Discrete(batch.num_actions)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._ready = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start episodes everywhere, or where `options["reset_mask"]` (`bool[num_envs]`) says."""
        super().reset(seed=seed)
        which = (options or {}).get("reset_mask")
        envs = np.arange(self.num_envs) if which is None else np.flatnonzero(which)
        if which is None and (seed is not None or not self._ready):
            self.batch.seed(int(self.np_random.integers(1 << 62)))
        self.batch.reset(envs)
        self._ready = True
        return self.batch.observation(), self._info()

    def step(
        self, actions: IntArray
    ) -> tuple[dict[str, Any], NDArray[np.floating[Any]], BoolArray, BoolArray, dict[str, Any]]:
        """Take one decision in every environment."""
        if not self._ready:
            raise ResetNeeded("call reset before step")
        batch = self.batch
        over = batch.done.copy()
        if over.any() and self._mode is AutoresetMode.DISABLED:
            raise ResetNeeded(
                f"environments {np.flatnonzero(over).tolist()} have ended: "
                'call reset(options={"reset_mask": mask})'
            )
        batch.step(actions, ~over)
        if over.any():  # NEXT_STEP: their action is ignored, they begin anew
            batch.reset(np.flatnonzero(over))
        reward, terminated = batch.reward.copy(), batch.done.copy()
        ended = terminated & ~over
        info: dict[str, Any] = {}
        dt_s = batch.dt_s.copy()
        if ended.any():
            metrics = np.empty(self.num_envs, object)
            for env in np.flatnonzero(ended).tolist():
                metrics[env] = batch.summary(env)
            info["episode_metrics"], info["_episode_metrics"] = metrics, ended.copy()
            if self._mode is AutoresetMode.SAME_STEP:
                info["final_obs"], info["_final_obs"] = batch.observation(), ended.copy()
                info["final_info"], info["_final_info"] = {"dt_s": dt_s}, ended.copy()
                batch.reset(np.flatnonzero(ended))
        info |= self._info()
        info["dt_s"] = dt_s
        return batch.observation(), reward, terminated, np.zeros(self.num_envs, np.bool_), info

    def action_masks(self) -> BoolArray:
        """Allowed actions, `bool[num_envs, num_actions]`."""
        return self.batch.mask.astype(np.bool_)

    def _info(self) -> dict[str, Any]:
        return {
            "action_mask": self.batch.mask.copy(),
            "dt_s": self.batch.dt_s.copy(),
            "input_id": self.batch.input_id.copy(),
        }

    def close_extras(self, **kwargs: Any) -> None:
        """Release threads."""
        self.batch.close()


class DispatchVectorEnv(BatchVectorEnv[EpisodeBatch]):
    """`num_envs` dispatch environments; see `DispatchEnv` for spaces and rewards.

    Episodes depend on the seed, the environment's number (its group's, with `group_size` above 1)
    and how many it has played, not on `num_envs`. `info` holds `action_mask`, `dt_s` (simulated
    seconds since the last decision) and `input_id` (which arrival sequence is played; equal within
    a group). `num_threads` splits the environments over threads, with equal results.
    """

    def __init__(
        self,
        num_envs: int = 1,
        scenario: Scenario | str = "mixed-chat",
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        load: float | tuple[float, float] = 1.0,
        num_requests: int | None = None,
        r_max: int | None = None,
        objective: str | None = None,
        reward_scale: float = 1.0,
        group_size: int = 1,
        num_threads: int = 1,
        render_mode: str | None = None,
    ) -> None:
        batch = EpisodeBatch(
            scenario,
            num_envs,
            load=load,
            num_requests=num_requests,
            r_max=r_max,
            objective=objective,
            reward_scale=reward_scale,
            group_size=group_size,
            num_threads=num_threads,
        )
        super().__init__(batch, autoreset_mode, render_mode)
