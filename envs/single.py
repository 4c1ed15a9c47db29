"""One environment: a batch of one behind Gymnasium's `Env`."""

from __future__ import annotations

from typing import Any, Generic

import gymnasium
import numpy as np

from servegym.envs.vector import B, Batch
from servegym.errors import ConfigError, ResetNeeded
from servegym.typing import BoolArray, Int8Array


class AllowedActions(gymnasium.spaces.Discrete):
    """A `Discrete` space that draws from what is allowed now, unless it is given a mask itself."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch.num_actions)
        self._batch = batch

    def sample(
        self, mask: Int8Array | None = None, probability: Int8Array | None = None
    ) -> np.int64:
        """Draw an action."""
        if mask is None and probability is None:
            mask = self._batch.mask[0]
        return super().sample(mask, probability)


class BatchEnv(gymnasium.Env[dict[str, Any], int], Generic[B]):
    """Gymnasium's face of a batch of one.

    Args:
        batch: Of one environment.
        action_space: Over its actions.
        episode_type: What `reset(options={"episode": ...})` takes.
        render_mode: Must be `None`.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's convention

    def __init__(
        self,
        batch: B,
        action_space: gymnasium.spaces.Discrete,
        episode_type: type,
        render_mode: str | None,
    ) -> None:
        if render_mode is not None:
            raise ConfigError(f"render_mode must be None, got {render_mode!r}")
        self.batch = batch
        self.render_mode = render_mode
        self.observation_space = batch.observation_space()
        self.action_space: gymnasium.spaces.Space[Any] = action_space
        self._episode_type = episode_type
        self._ready = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Restarts the sequence of episodes.
            options: `{"episode": Episode}` to play that one.
        """
        super().reset(seed=seed)
        if seed is not None or not self._ready:
            self.batch.seed(int(self.np_random.integers(1 << 62)))
        episode = (options or {}).get("episode")
        given = [episode] if isinstance(episode, self._episode_type) else None
        self.batch.reset(np.zeros(1, np.int64), given)
        self._ready = True
        return self._observation(), self._info()

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Take the decision that is due and run to the next."""
        if not self._ready or self.batch.done[0]:
            raise ResetNeeded("the episode is over or none has begun: call reset")
        self.batch.step(np.array([action], np.int64), np.ones(1, np.bool_))
        info = self._info()
        done = bool(self.batch.done[0])
        if done:
            info["episode_metrics"] = self.batch.summary(0)
        return self._observation(), float(self.batch.reward[0]), done, False, info

    def action_masks(self) -> BoolArray:
        """Allowed actions, `bool[num_actions]`, as sb3-contrib asks for them."""
        return self.batch.mask[0].astype(np.bool_)

    def _observation(self) -> dict[str, Any]:
        return {name: value[0] for name, value in self.batch.observation().items()}

    def _info(self) -> dict[str, Any]:
        return {
            "action_mask": self.batch.mask[0].copy(),
            "dt_s": float(self.batch.dt_s[0]),
            "now_s": float(self.batch.simulator.state.env[0]["now_s"]),
        }

    def close(self) -> None:
        """Release threads."""
        self.batch.close()
