"""PettingZoo's two forms of a fleet: one agent at a time, and all in rounds."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pettingzoo import AECEnv, ParallelEnv
from typing_extensions import override

from servegym.envs.agent_views import Observation
from servegym.envs.cluster_agents import METADATA, ClusterAgents
from servegym.errors import InvalidAction, ResetNeeded


class ClusterAEC(ClusterAgents, AECEnv[str, Observation, int | None]):  # type: ignore[misc]
    """One agent at a time: `agent_selection` is who is asked; see `envs.cluster_v0`.

    With `max_cycles` an agent is truncated after so many decisions of its own; then the rule of the
    warm-up decides in its place until nobody is left.
    """

    metadata: ClassVar[dict[str, Any]] = {**METADATA, "is_parallelizable": False}

    def __init__(self, scenario: Any = None, **settings: Any) -> None:
        super().__init__(scenario, can_pass=False, **settings)
        self._turns: dict[str, int] = {}

    @override
    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> None:
        """Start an episode and run it to its first decision.

        Args:
            seed: Restarts the sequence of episodes.
            options: `{"episode": Episode}` to play that one.

        Raises:
            ConfigError: If an option is unknown or the episode is none.
        """
        self._begin(seed, options)
        self.rewards = dict.fromkeys(self.agents, 0.0)
        self._cumulative_rewards = dict.fromkeys(self.agents, 0.0)
        self.terminations = dict.fromkeys(self.agents, False)
        self.truncations = dict.fromkeys(self.agents, False)
        self.infos = self._infos(self.agents)
        self._turns = dict.fromkeys(self.agents, 0)
        self.agent_selection = self._asked
        self._skip_agent_selection = None
        self._show()

    @override
    def step(self, action: int | None) -> None:
        """Take the decision of `agent_selection`; of one whose episode is over, `None`."""
        if not self.agents:
            raise ResetNeeded("the episode is over or none has begun: call reset")
        agent = self.agent_selection
        if self.terminations[agent] or self.truncations[agent]:
            self._was_dead_step(action)
            return
        self._cumulative_rewards[agent] = 0.0
        earned = self._decide(action)
        self._turns[agent] += 1
        if self.max_cycles is not None and self._turns[agent] >= self.max_cycles:
            self.truncations[agent] = True
        self._stand_in(earned)
        batch = self.batch
        for name in self.agents:
            self.rewards[name] = earned[name]
            self.terminations[name] |= bool(batch.done[0])
            self.truncations[name] |= bool(batch.truncated[0])
        self._accumulate_rewards()
        self.infos = self._infos(self.agents)
        self.agent_selection = self._asked if self._asked in self.agents else self.agents[0]
        self._deads_step_first()
        self._show()

    def _stand_in(self, earned: dict[str, float]) -> None:
        """Let the rule decide for agents that were truncated; add what that earns."""
        batch = self.batch
        while not (batch.done[0] or batch.truncated[0]):
            if all(self.truncations.get(name, True) for name in self._turns):
                return
            if not self.truncations.get(self._asked, True):
                return
            asked = int(batch.agent[0])
            batch.step(np.array([batch.stand_in(0)]), self._everyone)
            for name, more in self._earned(asked).items():
                earned[name] += more

    @override
    def observe(self, agent: str) -> Observation:
        """Return what an agent sees now, whoever is asked."""
        i = self._place[agent]
        return {"observation": self._look(i, i + 1)[0], "action_mask": self._mask(i)}


class ClusterParallel(ClusterAgents, ParallelEnv[str, Observation, int]):  # type: ignore[misc]
    """Rounds: one agent is asked, the others can only pass; see `envs.cluster_v0`.

    With `max_cycles` all are truncated after so many rounds.
    """

    metadata: ClassVar[dict[str, Any]] = {**METADATA, "is_parallelizable": True}

    def __init__(self, scenario: Any = None, **settings: Any) -> None:
        super().__init__(scenario, can_pass=True, **settings)
        self._rounds = 0

    @override
    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Observation], dict[str, dict[str, Any]]]:
        """Start an episode and run it to its first decision.

        Args:
            seed: Restarts the sequence of episodes.
            options: `{"episode": Episode}` to play that one.

        Raises:
            ConfigError: If an option is unknown or the episode is none.
        """
        self._begin(seed, options)
        self._rounds = 0
        self._show()
        return self._observations(self.agents), self._infos(self.agents)

    @override
    def step(
        self, actions: dict[str, int]
    ) -> tuple[
        dict[str, Observation],
        dict[str, float],
        dict[str, bool],
        dict[str, bool],
        dict[str, dict[str, Any]],
    ]:
        """Take the decision of the agent that is asked and run to the next.

        Raises:
            InvalidAction: If it does not act, or, with `invalid_action="raise"`, its action is not
                allowed or another agent does more than pass; then nothing has happened.
        """
        if not self.agents:
            raise ResetNeeded("the episode is over or none has begun: call reset")
        names, asked = self.agents, self._asked
        if asked not in actions:
            raise InvalidAction(f"{asked} is asked and must act, got actions of {[*actions]}")
        if self.batch.settings.invalid_action == "raise":
            for name, action in actions.items():
                passing = int(self.action_space(name).n) - 1
                if name != asked and action != passing:
                    raise InvalidAction(
                        f"action {action} of {name} is not allowed: it is not asked and can only "
                        f"pass, which is {passing} (see action_mask)"
                    )
        earned = self._decide(actions[asked])
        self._rounds += 1
        done, cut = bool(self.batch.done[0]), bool(self.batch.truncated[0])
        if not done and self.max_cycles is not None:
            cut |= self._rounds >= self.max_cycles
        self._show()
        if done or cut:
            self.agents = []
        return (
            self._observations(names),
            {name: earned[name] for name in names},
            dict.fromkeys(names, done),
            dict.fromkeys(names, cut),
            self._infos(names),
        )
