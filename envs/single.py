"""One environment: a batch of one behind Gymnasium's `Env`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import gymnasium
import numpy as np

from servegym.envs.actions import AllowedAction, rebind
from servegym.envs.batch import Batch, make_batch
from servegym.envs.scene import as_image, as_text
from servegym.envs.settings import face_signature
from servegym.errors import ConfigError, ResetNeeded, unknown_name
from servegym.typing import BoolArray

B = TypeVar("B", bound=Batch)
RENDER_MODES = ("rgb_array", "ansi")
#: Options of `reset` that wrappers of others mean for themselves and hand on: Minari's collector.
_OF_WRAPPERS = ("minari_autoseed",)


def check_render_mode(render_mode: str | None, modes: Sequence[str] = RENDER_MODES) -> str | None:
    """Refuse what cannot be drawn."""
    if render_mode is not None and render_mode not in modes:
        allowed = " or ".join((", ".join(["None", *modes[:-1]]), modes[-1]))
        raise ConfigError(f"render_mode must be {allowed}, got {render_mode!r}")
    return render_mode


def check_options(options: dict[str, Any] | None, allowed: tuple[str, ...]) -> dict[str, Any]:
    """Refuse options of `reset` that nothing would be done with."""
    for name in options or {}:
        if name not in allowed and name not in _OF_WRAPPERS:
            raise ConfigError(unknown_name("option of reset", name, allowed))
    return options or {}


def draw(batch: Batch, env: int, render_mode: str | None) -> Any:
    """Draw one environment, or nothing if that was not asked for."""
    if render_mode is None:
        return None
    scene = batch.scene(env)._replace(last=batch.deeds[env])
    return (as_image if render_mode == "rgb_array" else as_text)(scene)


class BatchEnv(gymnasium.Env[Any, Any], Generic[B]):
    """Gymnasium's face of a batch of one.

    Args:
        scenario: A name, a path or a scenario; the problem's default if not given.
        render_mode: `rgb_array` (a picture, `uint8[height, 960, 3]`), `ansi` (text) or `None`.
        settings: The problem's; see `envs.settings`.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [*RENDER_MODES], "render_fps": 10}  # type: ignore[misc]
    batch_type: ClassVar[type[Batch]]
    batch: B

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = face_signature(cls.batch_type.settings_type, {}, {"render_mode": None})  # type: ignore[attr-defined]

    def __init__(
        self, scenario: Any = None, *, render_mode: str | None = None, **settings: Any
    ) -> None:
        self.render_mode = check_render_mode(render_mode)
        self.batch = make_batch(self.batch_type, 1, scenario, settings)
        self.batch.narrates = self.render_mode is not None
        self.observation_space = self.batch.observer.space
        self.action_space = AllowedAction(self.batch)
        self._active = np.ones(1, np.bool_)
        self._ready = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode and run it to its first decision.

        Args:
            seed: Restarts the sequence of episodes.
            options: `{"episode": Episode}` to play that one.

        Raises:
            ConfigError: If an option is unknown or the episode is none.
        """
        episode = check_options(options, ("episode",)).get("episode")
        if not isinstance(episode, self.batch.episode_type | None):
            raise ConfigError(f"episode must be an Episode, got {type(episode).__name__}")
        super().reset(seed=seed)
        if seed is not None or not self._ready:
            self.batch.seed(int(self.np_random.integers(1 << 62)))
        self.batch.reset(np.zeros(1, np.int64), None if episode is None else [episode])
        self._ready = True
        return self._observation(), self.batch.info_of(0)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take the decision that is due and run to the next."""
        self.batch.check_open()
        if not self._ready or self.batch.done[0] or self.batch.truncated[0]:
            raise ResetNeeded("the episode is over or none has begun: call reset")
        self.batch.step(np.asarray(action)[None], self._active)
        done, truncated = bool(self.batch.done[0]), bool(self.batch.truncated[0])
        return (
            self._observation(),
            float(self.batch.reward[0]),
            done,
            truncated,
            self.batch.info_of(0),
        )

    def action_masks(self) -> BoolArray:
        """Allowed actions, `bool[num_actions]`, as sb3-contrib asks for them."""
        return self.batch.mask[0].astype(np.bool_)

    def render(self) -> Any:
        """Draw what is to be seen now, as `render_mode` says."""
        return draw(self.batch, 0, self.render_mode)

    def _observation(self) -> Any:
        seen = self.batch.observation()
        if isinstance(seen, dict):
            return {name: value[0] for name, value in seen.items()}
        return seen[0]

    def close(self) -> None:
        """Release threads; the environment cannot be used any more."""
        self.batch.close()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.action_space = rebind(self.action_space, self.batch)
