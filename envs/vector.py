"""Vector environments that step all their environments in one compiled call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Generic

import numpy as np
from gymnasium import spaces
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from servegym.envs.actions import AllowedActions, rebind
from servegym.envs.batch import Batch, make_batch
from servegym.envs.settings import face_signature
from servegym.envs.single import RENDER_MODES, B, check_options, check_render_mode, draw
from servegym.errors import ConfigError, ResetNeeded
from servegym.typing import BoolArray, FloatArray, IntArray

Seeds = int | Sequence[int | None] | None


class BatchVectorEnv(VectorEnv[Any, IntArray, Any], Generic[B]):
    """Gymnasium's face of a batch: spaces, autoreset, infos laid out as `SyncVectorEnv`'s.

    Episodes depend on the seed, the environment's number (its group's, with `group_size` above 1)
    and how many it has played, not on `num_envs`. With a list of seeds each environment plays what
    a single one plays with its seed.

    Args:
        num_envs: Environments.
        scenario: A name, a path or a scenario; the problem's default if not given.
        autoreset_mode: When an environment whose episode is over begins the next.
        max_episode_steps: Decisions after which an episode is truncated.
        render_mode: `rgb_array`, `ansi` or `None`; `render` gives a tuple.
        settings: The problem's; see `envs.settings`.
    """

    batch_type: ClassVar[type[Batch]]
    batch: B

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        last = {
            "autoreset_mode": AutoresetMode.NEXT_STEP,
            "max_episode_steps": None,
            "render_mode": None,
        }
        cls.__signature__ = face_signature(  # type: ignore[attr-defined]
            cls.batch_type.settings_type, {"num_envs": 1}, last
        )

    def __init__(
        self,
        num_envs: int = 1,
        scenario: Any = None,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ConfigError(f"max_episode_steps must be at least 1, got {max_episode_steps}")
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError:
            allowed = ", ".join(mode.value for mode in AutoresetMode)
            raise ConfigError(
                f"autoreset_mode must be one of {allowed}, got {autoreset_mode!r}"
            ) from None
        self.metadata = {
            "render_modes": [*RENDER_MODES],
            "render_fps": 10,
            "autoreset_mode": self.autoreset_mode,
        }
        self.render_mode = check_render_mode(render_mode)
        self.batch = make_batch(self.batch_type, num_envs, scenario, settings)
        self.batch.narrates = self.render_mode is not None
        self.num_envs = num_envs
        self.single_observation_space = self.batch.observer.space
        self.single_action_space = spaces.Discrete(self.batch.num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = AllowedActions(self.batch)
        self._most_steps = max_episode_steps
        self._steps = np.zeros(num_envs, np.int64)
        self._over = np.ones(num_envs, np.bool_)
        self._everywhere = np.ones(num_envs, np.bool_)
        self._ready = False

    def reset(
        self, *, seed: Seeds = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start episodes and run them to their first decisions.

        Args:
            seed: Restarts the sequences of episodes: of all environments, or, given as a list, of
                each the one that a single environment plays with that seed.
            options: `reset_mask` (`bool[num_envs]`) says where, if not everywhere; `episode` what
                is played: an episode, or one for each environment that begins.

        Raises:
            ConfigError: If an option is unknown or has another form.
        """
        given = check_options(options, ("reset_mask", "episode"))
        where = self._where(given.get("reset_mask"))
        envs = np.flatnonzero(where)
        episodes = self._episodes(given.get("episode"), len(envs))
        if seed is None or isinstance(seed, int | np.integer):
            super().reset(seed=None if seed is None else int(seed))
            if where.all() and (seed is not None or not self._ready):
                self.batch.seed(int(self.np_random.integers(1 << 62)))
            elif seed is not None:
                raise ConfigError("with a reset_mask give a list of seeds, one an environment")
        else:
            self._seed_each(seed, where)
        self.batch.reset(envs, episodes)
        self._ready = True
        self._over[envs] = False
        self._steps[envs] = 0
        return self.batch.observation(), _without(self.batch.info(where.copy()), ~where)

    def _where(self, mask: Any) -> BoolArray:
        if mask is None:
            return np.ones(self.num_envs, np.bool_)
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            raise ConfigError(f"reset_mask must be an array of bool, got {mask!r}")
        if mask.shape != (self.num_envs,) or not mask.any():
            raise ConfigError(
                f"reset_mask must name at least one of {self.num_envs} environments,"
                f" got {mask.tolist()}"
            )
        if not self._ready and not mask.all():
            raise ResetNeeded("reset all environments before some of them")
        return mask

    def _episodes(self, given: Any, count: int) -> list[Any] | None:
        if given is None:
            return None
        episodes = list(given) if isinstance(given, list | tuple) else [given] * count
        wrong = [e for e in episodes if not isinstance(e, self.batch.episode_type)]
        if wrong or len(episodes) != count:
            raise ConfigError(
                f"episode must be an Episode or a list of {count} of them,"
                f" got {type(wrong[0]).__name__ if wrong else len(episodes)}"
            )
        return episodes

    def _seed_each(self, seeds: Sequence[int | None], where: BoolArray) -> None:
        if len(seeds) != self.num_envs:
            raise ConfigError(
                f"there must be one seed for each of {self.num_envs} environments, got {len(seeds)}"
            )
        size = self.batch.settings.group_size
        for env, seed in enumerate(seeds):
            if seed != seeds[env - env % size]:
                raise ConfigError(
                    f"a group plays the same arrivals: environments {env - env % size} and {env}"
                    f" must have the same seed, got {seeds[env - env % size]} and {seed}"
                )
            if where[env] and (seed is not None or not self._ready):
                self.batch.seed_one(env, int(np_random(seed)[0].integers(1 << 62)))

    def step(
        self, actions: IntArray
    ) -> tuple[Any, FloatArray, BoolArray, BoolArray, dict[str, Any]]:
        """Take one decision in every environment."""
        batch, over = self.batch, self._over
        batch.check_open()
        if not self._ready:
            raise ResetNeeded("call reset before step")
        some_over = np.count_nonzero(over) > 0  # ten times as fast as `any` for few
        if some_over and self.autoreset_mode is AutoresetMode.DISABLED:
            raise ResetNeeded(
                f"environments {np.flatnonzero(over).tolist()} have ended: "
                'call reset(options={"reset_mask": mask})'
            )
        batch.step(actions, ~over)
        self._steps += 1
        if some_over:  # NEXT_STEP: their action is ignored, they begin anew
            batch.reset(np.flatnonzero(over))
            self._steps[over] = 0
        reward = batch.reward.copy()
        terminated, truncated = batch.done.copy(), batch.truncated.copy()
        if self._most_steps is not None:
            truncated |= self._steps >= self._most_steps
        self._over = terminated | truncated
        final: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP and np.count_nonzero(self._over):
            ended = np.flatnonzero(self._over)
            final["final_obs"], final["_final_obs"] = self._final(ended), self._over.copy()
            final["final_info"] = _without(batch.info(self._over.copy()), ~self._over)
            final["_final_info"] = self._over.copy()
            batch.reset(ended)
            self._steps[ended] = 0
            self._over = np.zeros(self.num_envs, np.bool_)
        info = batch.info(self._everywhere.copy())
        info.update(final)
        return batch.observation(), reward, terminated, truncated, info

    def _final(self, ended: IntArray) -> Any:
        """Last observations of environments, each by itself, `object[num_envs]`."""
        seen = self.batch.observation()
        final = np.full(self.num_envs, None, object)
        for env in ended.tolist():
            final[env] = (
                {name: value[env] for name, value in seen.items()}
                if isinstance(seen, dict)
                else seen[env]
            )
        return final

    def action_masks(self) -> BoolArray:
        """Allowed actions, `bool[num_envs, num_actions]`."""
        return self.batch.mask.astype(np.bool_)

    def render(self) -> Any:
        """Draw every environment, as `render_mode` says."""
        if self.render_mode is None:
            return None
        return tuple(draw(self.batch, env, self.render_mode) for env in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """Release threads; the environments cannot be used any more."""
        if hasattr(self, "batch"):
            self.batch.close()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.action_space = rebind(self.action_space, self.batch)


def _without(info: dict[str, Any], absent: BoolArray) -> dict[str, Any]:
    """Put 0 for what some environments did not give, in place."""
    for key, value in info.items():
        if isinstance(value, dict):
            _without(value, absent)
        elif not key.startswith("_"):
            value[absent] = 0
    return info
