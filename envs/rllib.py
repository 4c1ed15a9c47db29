"""The agents of fleets as RLlib's (new API stack): one fleet, or many stepped in one compiled call.

An agent has an observation where it is asked, and only there, so nobody passes: RLlib keeps its
action until it is asked again, and its reward is what it has earned by then. Agents of a class have
the same spaces, so they can share a policy: `policy_of` says so. See `docs/env-cluster.md`. RLlib
is imported only for who asks for one of its classes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from gymnasium import spaces

from servegym.envs.agent_batch import AgentBatch, Ended, Turn
from servegym.errors import InvalidAction, ResetNeeded


def policy_of(agent_id: str, episode: Any = None, **kwargs: Any) -> str:
    """Map agents to policies: their class. RLlib's `policy_mapping_fn`."""
    return agent_id.rpartition("_")[0]


class FleetsByName:
    """The agents of many fleets, stepped in one compiled call, in dictionaries by their names.

    What RLlib's vector environments do, without RLlib. A fleet whose episode is over begins the
    next in the step after (`next_step`, as RLlib's own).

    Args:
        num_envs: Fleets.
        settings: Of `AgentBatch`, by name.

    Attributes:
        fleets: What is stepped.
        is_over: Fleets whose episode is over or has not begun, `bool[num_envs]`.
    """

    def __init__(self, num_envs: int, settings: dict[str, Any] | None = None) -> None:
        self.fleets = AgentBatch(num_envs, **(settings or {}))
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": "next_step"}
        self.single_observation_spaces = self.fleets.spaces
        self.single_action_spaces = {
            name: self.fleets.action_space(name) for name in self.fleets.possible_agents
        }
        self.single_observation_space = spaces.Dict({**self.single_observation_spaces})
        self.single_action_space = spaces.Dict({**self.single_action_spaces})
        self.is_over = np.ones(num_envs, np.bool_)
        self._turn: Turn | None = None

    def present(self, fleet: int) -> list[str]:
        """Return who takes part in the present episode of a fleet."""
        taking_part = self.fleets.is_present[fleet]
        return [name for name, p in zip(self.fleets.possible_agents, taking_part, strict=True) if p]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Begin an episode in every fleet.

        Args:
            seed: Restarts the sequences of episodes.
            options: RLlib's, of which none means anything here.
        """
        # where all are over the next episodes have begun already
        if seed is not None or self._turn is None or not self.is_over.all():
            self._turn = self.fleets.reset(seed=seed)
        self.is_over[:] = False
        return self._seen(self._turn), [{} for _ in range(self.num_envs)]

    def step(self, actions: list[dict[str, Any]]) -> tuple[list[Any], ...]:
        """Take the decisions that are due; where an episode is over, begin the next.

        Args:
            actions: Of each fleet that of the agent that is asked, by its name.
        """
        if self._turn is None:
            raise ResetNeeded("call reset before step")
        begins = self.is_over.copy()
        turn = self._turn = self.fleets.step(self._by_class(self._turn, actions), ~begins)
        self.is_over[:] = False
        self.is_over[turn.ended.fleet] = True
        seen, rewards, infos = self._seen(turn), self._rewards(turn), self._no_infos()
        terminated = [{"__all__": False} for _ in range(self.num_envs)]
        truncated = [{"__all__": False} for _ in range(self.num_envs)]
        for row, fleet in enumerate(turn.ended.fleet.tolist()):
            ends = truncated if turn.ended.truncated[row] else terminated
            ends[fleet]["__all__"] = True
            seen[fleet], rewards[fleet] = self._at_the_end(turn.ended, row)
            metrics = {name: float(x[row]) for name, x in turn.ended.metrics.items()}
            infos[fleet] = {"__common__": {"episode_metrics": metrics}}
        for fleet in np.flatnonzero(begins).tolist():
            rewards[fleet] = dict.fromkeys(seen[fleet], 0.0)
        return seen, rewards, terminated, truncated, infos

    def _no_infos(self) -> list[dict[str, Any]]:
        return [{} for _ in range(self.num_envs)]

    def _by_class(self, turn: Turn, actions: list[dict[str, Any]]) -> dict[str, Any]:
        """Sort actions by class; those of fleets that begin anew are not looked at."""
        names, chosen = self.fleets.possible_agents, {}
        for kind, asked in turn.asked.items():
            own = np.zeros(len(asked.fleet), np.int64)
            for row, (fleet, agent) in enumerate(
                zip(asked.fleet.tolist(), asked.agent.tolist(), strict=True)
            ):
                if self.is_over[fleet]:
                    continue
                if names[agent] not in actions[fleet]:
                    raise InvalidAction(
                        f"{names[agent]} is asked in fleet {fleet} and must act, got actions of "
                        f"{[*actions[fleet]]}"
                    )
                own[row] = actions[fleet][names[agent]]
            chosen[kind] = own
        return chosen

    def _seen(self, turn: Turn) -> list[dict[str, Any]]:
        """Return what is seen in each fleet, by the one agent that is asked there."""
        seen: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        names = self.fleets.possible_agents
        for asked in turn.asked.values():
            for row, (fleet, agent) in enumerate(
                zip(asked.fleet.tolist(), asked.agent.tolist(), strict=True)
            ):
                seen[fleet][names[agent]] = {
                    "observation": asked.observation[row],
                    "action_mask": asked.action_mask[row],
                }
        return seen

    def _rewards(self, turn: Turn) -> list[dict[str, float]]:
        """Return what those who are asked have earned since they decided last."""
        rewards: list[dict[str, float]] = [{} for _ in range(self.num_envs)]
        names = self.fleets.possible_agents
        for asked in turn.asked.values():
            for fleet, agent, reward in zip(
                asked.fleet.tolist(), asked.agent.tolist(), asked.reward.tolist(), strict=True
            ):
                rewards[fleet][names[agent]] = reward
        return rewards

    def _at_the_end(self, ended: Ended, row: int) -> tuple[dict[str, Any], dict[str, float]]:
        """Return what agents that have decided see at the end, and earn since they did last.

        Where an episode terminated RLlib needs no last observations: it keeps the ones before.
        """
        seen, rewards = {}, {}
        for place in np.flatnonzero(ended.has_decided[row]).tolist():
            name = self.fleets.possible_agents[place]
            rewards[name] = float(ended.reward[row, place])
            if ended.truncated[row]:
                mask = np.zeros(int(self.single_action_spaces[name].n), np.int8)
                mask[0] = 1  # nobody acts on it
                last = ended.observations[row][name]
                seen[name] = {"observation": last, "action_mask": mask}
        return seen, rewards


@cache
def cluster_env() -> type[Any]:
    """Return the class `ClusterMultiAgentEnv`, the agents of one fleet as RLlib's.

    It takes the settings of `AgentBatch` as a dictionary, RLlib's `env_config`.
    """
    from ray.rllib.env.multi_agent_env import MultiAgentEnv

    class ClusterMultiAgentEnv(MultiAgentEnv):  # type: ignore[misc]
        """The agents of one fleet."""

        def __init__(self, settings: dict[str, Any] | None = None) -> None:
            self._fleets = FleetsByName(1, settings)
            self.observation_spaces = self._fleets.single_observation_spaces
            self.action_spaces = self._fleets.single_action_spaces
            self.possible_agents = [*self._fleets.fleets.possible_agents]
            self.agents = [*self.possible_agents]
            super().__init__()

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[dict[str, Any], dict[str, Any]]:
            """Begin an episode; the agent that is asked first sees something."""
            seen, infos = self._fleets.reset(seed=seed, options=options)
            self.agents = self._fleets.present(0)
            return seen[0], infos[0]

        def step(self, action_dict: dict[str, Any]) -> tuple[Any, ...]:
            """Take the decision of the agent that is asked."""
            if self._fleets.is_over[0]:
                raise ResetNeeded("the episode is over or none has begun: call reset")
            return tuple(part[0] for part in self._fleets.step([action_dict]))

        def close(self) -> None:
            """End; the fleet cannot be used any more."""
            self._fleets.fleets.close()

    return ClusterMultiAgentEnv


@cache
def cluster_env_runner() -> type[Any]:
    """Return the class `ClusterEnvRunner`, RLlib's runner over fleets stepped in one compiled call.

    RLlib's own steps environments one after the other. Give it to `config.env_runners` as
    `env_runner_cls`; `config.environment` names any environment, `env_config` has the settings of
    `AgentBatch`.
    """
    from ray.rllib.callbacks.utils import make_callback
    from ray.rllib.env.env_context import EnvContext
    from ray.rllib.env.multi_agent_env_runner import MultiAgentEnvRunner
    from ray.rllib.env.vector.vector_multi_agent_env import VectorMultiAgentEnv

    class ClusterVectorMultiAgentEnv(FleetsByName, VectorMultiAgentEnv):  # type: ignore[misc]
        """The agents of many fleets."""

        def close_extras(self, **kwargs: Any) -> None:
            """Release threads."""
            self.fleets.close()

    class ClusterEnvRunner(MultiAgentEnvRunner):  # type: ignore[misc]
        """RLlib's runner of many agents."""

        env: Any

        def make_env(self) -> None:
            """Make the fleets."""
            if self.env is not None:
                self.env.close()
            context = self.config.env_config
            if not isinstance(context, EnvContext):
                workers = self.config.num_env_runners
                context = EnvContext(context, self.worker_index, num_workers=workers)
            self.num_envs = self.config.num_envs_per_env_runner
            self.env = ClusterVectorMultiAgentEnv(self.num_envs, dict(context))
            # RLlib asks each for its spaces, and for nothing else
            self.env.envs = [cluster_env()(dict(context))] * self.num_envs
            self._needs_initial_reset = True
            make_callback(
                "on_environment_created",
                callbacks_objects=self._callbacks,
                callbacks_functions=self.config.callbacks_on_environment_created,
                kwargs={
                    "env_runner": self,
                    "metrics_logger": self.metrics,
                    "env": self.env.unwrapped,
                    "env_context": context,
                },
            )

    return ClusterEnvRunner


def register(name: str = "servegym-cluster-agents") -> str:
    """Tell RLlib of `ClusterMultiAgentEnv` under a name; return it."""
    from ray.tune import register_env

    register_env(name, lambda context: cluster_env()(dict(context)))
    return name
