"""The agents of one fleet, as both of PettingZoo's forms have them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.utils.seeding import np_random

from servegym.cluster.state import OBSERVED_UP
from servegym.envs.agent_views import AgentViews, Observation, Rewards, check_rewards
from servegym.envs.cluster_batch import ClusterBatch
from servegym.envs.settings import ClusterSettings, make_settings
from servegym.envs.single import RENDER_MODES, check_options, check_render_mode, draw
from servegym.errors import ConfigError, InvalidAction, ResetNeeded
from servegym.typing import Float32Array, Int8Array

METADATA: dict[str, Any] = {
    "render_modes": [*RENDER_MODES, "human"],
    "render_fps": 10,
    "name": "cluster_v0",
}


class ClusterAgents:
    """What both of PettingZoo's forms of a fleet have in common.

    Args:
        scenario: A name, a path or a `Scenario`; the default's if not given.
        rewards: Who earns what; see `envs.cluster_v0`.
        max_cycles: After how many an agent is truncated; see the two forms.
        render_mode: `rgb_array`, `ansi`, `human` (text on standard output at each step) or `None`.
        invalid_action: As in `Settings`; PettingZoo's own tools sample without masks.
        can_pass: Whether agents have an action more, the last, for when they are not asked.
        settings: See `envs.settings.ClusterSettings`; `flat`, `group_size` and `num_threads` mean
            nothing here and are refused.

    Attributes:
        batch: The batch of one that is played.
        possible_agents: The dispatcher, then, if engines ask anybody, the scheduler of each
            replica of the largest fleet, then the controller if requests migrate.
        agents: Those who take part now.
        state_space: Of `state`.
    """

    def __init__(
        self,
        scenario: Any = None,
        *,
        rewards: Rewards = "shared",
        max_cycles: int | None = None,
        render_mode: str | None = None,
        invalid_action: str = "resample",
        can_pass: bool,
        **settings: Any,
    ) -> None:
        if max_cycles is not None and max_cycles < 1:
            raise ConfigError(f"max_cycles must be at least 1, got {max_cycles}")
        for name in ("flat", "group_size", "num_threads"):
            if name in settings:
                raise ConfigError(
                    f"{name} is for batches of environments, leave it out: agents observe one "
                    "vector each"
                )
        given = make_settings(
            ClusterSettings, scenario, {**settings, "invalid_action": invalid_action}
        )
        check_rewards(rewards, given)
        self.render_mode = check_render_mode(render_mode, METADATA["render_modes"])
        self.max_cycles = max_cycles
        self.batch = ClusterBatch(1, given, by_replica=rewards == "class")
        self.batch.narrates = self.render_mode is not None
        self._rewards: Rewards = rewards
        self._views = AgentViews(self.batch, can_pass=can_pass)
        self.possible_agents = self._views.possible_agents
        self._place = self._views.place
        self.state_space = self._views.state_space
        self.agents: list[str] = []
        self._idle_masks = [np.zeros(n, np.int8) for n in self._views.num_actions]
        for mask in self._idle_masks:
            mask[-1 if can_pass else 0] = 1
        self._everyone = np.ones(1, np.bool_)
        self._ready = False

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        """Space of an agent's observation: a `Dict` of `observation` and `action_mask`."""
        return self._views.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Discrete:
        """Space of an agent's action, a `Discrete`."""
        return self._views.action_spaces[agent]

    def render(self) -> Any:
        """Draw what is to be seen now, as `render_mode` says."""
        if self.render_mode != "human":
            return draw(self.batch, 0, self.render_mode)
        sys.stdout.write(draw(self.batch, 0, "ansi"))
        return None

    def state(self) -> Float32Array:
        """What a centralised critic may see, `float32[n]`; see `AgentViews.states`."""
        seen: Float32Array = self._views.states()[0]
        return seen

    def _show(self) -> None:
        if self.render_mode == "human":
            self.render()

    def close(self) -> None:
        """End; the environment cannot be used any more."""
        self.batch.close()

    def _begin(self, seed: int | None, options: dict[str, Any] | None) -> None:
        """Start an episode."""
        # PettingZoo's tests give an option named "options"
        episode = check_options(options, ("episode", "options")).get("episode")
        if not isinstance(episode, self.batch.episode_type | None):
            raise ConfigError(f"episode must be an Episode, got {type(episode).__name__}")
        if seed is not None or not self._ready:
            self.batch.seed(int(np_random(seed)[0].integers(1 << 62)))
        self.batch.reset(np.zeros(1, np.int64), None if episode is None else [episode])
        self._ready = True
        self.agents = self._views.present(0)

    @property
    def _asked(self) -> str:
        """Who is asked."""
        return self.possible_agents[self.batch.agent[0]]

    def _decide(self, action: Any) -> dict[str, float]:
        """Take the decision that is due; return what each possible agent earns."""
        if not self._ready or self.batch.done[0] or self.batch.truncated[0]:
            raise ResetNeeded("the episode is over or none has begun: call reset")
        batch, asked = self.batch, int(self.batch.agent[0])
        first, count = self._views.own_actions(asked)
        try:
            chosen = int(action)
        except (TypeError, ValueError):
            raise InvalidAction(
                f"the action of {self._asked} must be a whole number, got {action!r}"
            ) from None
        # behind its own actions begin another agent's: those are as wrong as any out of range
        inside = 0 <= chosen < count
        if batch.settings.invalid_action == "raise":
            own = batch.mask[0, first : first + count]
            if not (inside and own[chosen]):
                raise InvalidAction(
                    f"action {chosen} of {self._asked} is not allowed: choose one of "
                    f"{np.flatnonzero(own).tolist()} (see action_mask)"
                )
        batch.step(np.array([first + chosen if inside else -1]), self._everyone)
        return self._earned(asked)

    def _earned(self, asked: int) -> dict[str, float]:
        each = self._views.earned(self._rewards, np.array([asked]))[0]
        return dict(zip(self.possible_agents, each.tolist(), strict=True))

    def _look(self, first: int, stop: int) -> list[Float32Array]:
        """Return what agents `first..stop-1` see, fresh arrays."""
        return self._views.look(0, first, stop)

    def _mask(self, i: int) -> Int8Array:
        """Return the mask of an agent; of one that is not asked one action: samplers need it."""
        batch = self.batch
        if i != batch.agent[0] or batch.done[0]:
            return self._idle_masks[i].copy()
        mask = np.zeros(self._views.num_actions[i], np.int8)
        first, count = self._views.own_actions(i)
        mask[:count] = batch.mask[0, first : first + count]
        return mask

    def _observations(self, names: list[str]) -> dict[str, Observation]:
        """Return the observations of agents, the first ones or all of the episode."""
        others = self._views.num_others
        seen = self._look(0, len(names) - others)
        for name in names[len(names) - others :]:
            seen += self._look(self._place[name], self._place[name] + 1)
        return {
            name: {"observation": part, "action_mask": self._mask(self._place[name])}
            for name, part in zip(names, seen, strict=True)
        }

    def _infos(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """Return the infos of agents."""
        batch = self.batch
        state = batch.simulator.state
        up = [True, *(state.observation[0, OBSERVED_UP] > 0.0).tolist()]
        up[1 + batch.num_schedulers :] = [True] * self._views.num_others
        asked = -1 if batch.done[0] else int(batch.agent[0])
        metrics = dict(zip(batch.metric_names, batch.metrics[:, 0].tolist(), strict=True))
        common = {
            "now_s": float(state.env["now_s"][0]),
            "dt_s": float(batch.dt_s[0]),
            "input_id": int(batch.input_id[0]),
            "invalid_action": bool(batch.invalid[0]),
        }
        place = self._place
        return {
            name: {
                "is_asked": place[name] == asked,
                "is_up": up[place[name]],
                **common,
                "episode_metrics": metrics.copy(),
            }
            for name in names
        }
