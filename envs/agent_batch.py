"""The agents of many fleets as one batch, for learners with shared parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from gymnasium.utils.seeding import np_random

from servegym.cluster.spec import Episode
from servegym.cluster.state import OBSERVED_UP
from servegym.envs.actions import as_integers
from servegym.envs.agent_views import AgentViews, Observation, Rewards, check_rewards
from servegym.envs.cluster_batch import ClusterBatch
from servegym.envs.kernels import first_invalid
from servegym.envs.settings import ClusterSettings, make_settings
from servegym.errors import ConfigError, InvalidAction, ResetNeeded
from servegym.typing import BoolArray, Float32Array, FloatArray, Int8Array, IntArray


class Asked(NamedTuple):
    """The decisions that are due of one class of agents, a row each.

    Attributes:
        fleet: Whose, `int64[n]`, ascending.
        agent: Places of the agents in `possible_agents`, `int64[n]`.
        observation: What they see, `float32[n, size]`.
        action_mask: 1 where allowed, `int8[n, actions]`, in the class's own actions.
        reward: What each has earned since its own last decision, `float64[n]`; 0 before its first.
        dt_s: Simulated seconds since that, `float64[n]`; 0 before its first.
        is_first: Whether it decides for the first time in this episode, `bool[n]`.
    """

    fleet: IntArray
    agent: IntArray
    observation: Float32Array
    action_mask: Int8Array
    reward: FloatArray
    dt_s: FloatArray
    is_first: BoolArray


class Ended(NamedTuple):
    """The episodes that ended in the last step, a row each; in their fleets others have begun.

    Attributes:
        fleet: Where, `int64[m]`.
        truncated: Whether the episode was cut off; else it terminated, `bool[m]`.
        is_present: Which possible agents took part, `bool[m, agents]`.
        has_decided: Which of them have decided at least once, `bool[m, agents]`.
        reward: What each has earned since its own last decision, `float64[m, agents]`.
        dt_s: Simulated seconds since that, `float64[m, agents]`.
        observations: Of each episode, what its agents see at its end, by name, without masks;
            nothing where it terminated, as nobody asks what would have come then.
        metrics: Results of the episodes by name, `float64[m]` each.
    """

    fleet: IntArray
    truncated: BoolArray
    is_present: BoolArray
    has_decided: BoolArray
    reward: FloatArray
    dt_s: FloatArray
    observations: list[dict[str, Float32Array]]
    metrics: dict[str, FloatArray]


class Turn(NamedTuple):
    """One decision in each fleet.

    Attributes:
        asked: Who is to decide, by class of agents: `dispatcher`, `scheduler`, `controller`. Each
            fleet has one row, in one of them.
        earned: What each agent earned in the step that led here, `float64[num_fleets, agents]`; 0
            of those that do not take part.
        dt_s: How long that took, simulated seconds, `float64[num_fleets]`.
        ended: The episodes that ended in it.
    """

    asked: dict[str, Asked]
    earned: FloatArray
    dt_s: FloatArray
    ended: Ended


class AgentBatch:
    """The agents of many fleets as one batch, stepped in one compiled call.

    Each step is one decision in each fleet, of whoever is asked there. Rows are sorted by class of
    agents, as agents of a class have the same spaces and may share a policy; what they see and do
    is what they see and do in `servegym.envs.cluster_v0`. What an agent earns while others decide
    is summed up until its own next decision or the end of its episode, so that
    `(observation, action, reward, dt_s)` of an agent are transitions of its own; where an episode
    ends the next begins in the same step.

    The scheduler of a replica that fails stays, earns, and is not asked until it is up again
    (`is_up`). Where fleets differ in size from episode to episode, `is_present` says who takes part
    in the present one.

    Args:
        num_fleets: Fleets.
        scenario: A name, a path or a `Scenario`; the default's if not given.
        rewards: Who earns what; see `envs.cluster_v0`.
        settings: See `envs.settings.ClusterSettings`, but for `flat`.

    Attributes:
        num_fleets: Fleets.
        batch: What is stepped.
        possible_agents: Names of the agents of the largest fleet.
        class_of: The class of each of them.
        classes: Names of all classes.
        spaces: Of what each possible agent sees, by name, a `Dict` of `observation` and
            `action_mask`.
        state_space: Space of a row of `states`.

    Raises:
        ConfigError: If a setting is not allowed.
    """

    def __init__(
        self,
        num_fleets: int,
        scenario: Any = None,
        *,
        rewards: Rewards = "shared",
        **settings: Any,
    ) -> None:
        if "flat" in settings:
            raise ConfigError("flat must be left out: agents observe one vector each anyway")
        given = make_settings(ClusterSettings, scenario, settings)
        check_rewards(rewards, given)
        self.num_fleets = num_fleets
        self.batch = ClusterBatch(num_fleets, given, by_replica=rewards == "class")
        self._rewards: Rewards = rewards
        self._views = AgentViews(self.batch, can_pass=False)
        self.possible_agents = self._views.possible_agents
        self.class_of, self.classes = self._views.class_of, self._views.classes
        self.spaces = self._views.observation_spaces
        self.state_space = self._views.state_space
        self._class_places = np.array([self.classes.index(kind) for kind in self.class_of])
        first = {kind: self._views.own_actions(self.class_of.index(kind)) for kind in self.classes}
        self._own_actions = first
        size = (num_fleets, len(self.possible_agents))
        self.is_present: BoolArray = np.zeros(size, np.bool_)
        self._since: FloatArray = np.zeros(size)
        self._decided_s: FloatArray = np.zeros(size)
        self._has_decided: BoolArray = np.zeros(size, np.bool_)
        self._everyone = np.ones(num_fleets, np.bool_)
        self._first_of_row = np.arange(num_fleets) * size[1]
        # views of one axis: these are indexed at each step
        self._flat = [x.reshape(-1) for x in (self._since, self._decided_s, self._has_decided)]
        self._now_s: FloatArray = np.zeros(num_fleets)
        self._asked: dict[str, Asked] = {}
        self._nothing_ended = _nothing_ended(size[1], self.batch.metric_names)

    def action_space(self, agent: str) -> spaces.Discrete:
        """Space of the actions of an agent, or of each one of a class."""
        return self._views.action_spaces[self._named(agent)]

    def _named(self, agent: str) -> str:
        if agent in self.classes:
            return self.possible_agents[self.class_of.index(agent)]
        if agent not in self.possible_agents:
            raise ConfigError(
                f"no agent or class of agents {agent!r}: choose one of "
                f"{', '.join([*self.classes, *self.possible_agents])}"
            )
        return agent

    @property
    def is_up(self) -> BoolArray:
        """Who can be asked, as replicas that are down ask nobody, `bool[num_fleets, agents]`."""
        width = self.batch.num_schedulers
        up = self.is_present.copy()
        up[:, 1 : 1 + width] &= self.batch.simulator.state.observation[:, OBSERVED_UP, :width] > 0.0
        return up

    def states(self) -> Float32Array:
        """Return what a centralised critic may see of each fleet; see `AgentViews.states`."""
        seen: Float32Array = self._views.states()
        return seen

    def reset(self, seed: int | None = None, episodes: Sequence[Episode] | None = None) -> Turn:
        """Begin an episode in every fleet.

        Args:
            seed: Restarts the sequences of episodes; those of `ClusterVectorEnv` with this seed.
            episodes: What is played, one for each fleet; drawn if not given.
        """
        if seed is not None or not self._asked:
            self.batch.seed(int(np_random(seed)[0].integers(1 << 62)))
        self._begin(np.arange(self.num_fleets), episodes)
        nothing = np.zeros_like(self._since)
        return self._turn(nothing, np.zeros(self.num_fleets), self._nothing_ended)

    def step(self, actions: Mapping[str, IntArray], active: BoolArray | None = None) -> Turn:
        """Take the decisions that are due, and run each fleet to its next.

        Args:
            actions: By class of agents, one for each row of `Turn.asked`, in the class's own
                actions.
            active: Fleets that go on, `bool[num_fleets]`; all if not given. The others wait: their
                actions are ignored, and their decisions are due again.

        Raises:
            InvalidAction: If one is missing, or, unless `invalid_action` says otherwise, not
                allowed; then nothing has happened.
        """
        if not self._asked:
            raise ResetNeeded("call reset before step")
        batch = self.batch
        active = self._everyone if active is None else active
        chosen = self._chosen(actions, active)
        agents = batch.agent.copy()
        batch.step(chosen, active)
        everywhere = active is self._everyone
        acted = self._first_of_row + agents
        since, decided_s, has_decided = self._flat
        if everywhere:
            decided_s[acted] = self._now_s
        else:
            acted = acted[active]
            decided_s[acted] = self._now_s[active]
        since[acted] = 0.0
        has_decided[acted] = True
        earned = self._views.earned(self._rewards, agents)
        earned *= self.is_present
        dt_s = batch.dt_s.copy()
        if not everywhere:
            earned[~active] = 0.0
            dt_s[~active] = 0.0
        self._since += earned
        over = (active & (batch.done | batch.truncated)).nonzero()[0]
        ended = self._nothing_ended
        if len(over):
            ended = self._ended(over)
            self._begin(over)
        return self._turn(earned, dt_s, ended)

    def close(self) -> None:
        """Release threads; the fleets cannot be stepped any more."""
        self.batch.close()

    def _begin(self, fleets: IntArray, episodes: Sequence[Episode] | None = None) -> None:
        """Begin episodes in some fleets."""
        self.batch.reset(fleets, episodes)
        self._since[fleets] = 0.0
        self._has_decided[fleets] = False
        last = len(self.possible_agents) - self._views.num_others
        self.is_present[fleets] = True
        for fleet in fleets.tolist():
            self.is_present[fleet, 1 + self._views.size(fleet) : last] = False

    def _chosen(self, actions: Mapping[str, IntArray], active: BoolArray) -> IntArray:
        """Bring actions of classes to where the batch has them."""
        unknown = [kind for kind in actions if kind not in self._own_actions]
        if unknown:
            raise InvalidAction(
                f"there are no agents of class {unknown[0]!r}: choose from {self.classes}"
            )
        chosen = np.full(self.num_fleets, -1, np.int64)
        for kind, asked in self._asked.items():
            if kind not in actions:
                if not len(asked.fleet):
                    continue
                raise InvalidAction(
                    f"actions of class {kind!r} are missing: {len(asked.fleet)} of it are asked"
                )
            own = as_integers(actions[kind], len(asked.fleet))
            first, count = self._own_actions[kind]
            # behind a class's own actions begin another's: those are as wrong as any out of range
            chosen[asked.fleet] = np.where((own >= 0) & (own < count), first + own, -1)
        if self.batch.settings.invalid_action == "raise":
            bad = first_invalid(self.batch.mask, chosen, active)
            if bad >= 0:
                self._refuse(actions, bad)
        return chosen

    def _refuse(self, actions: Mapping[str, IntArray], fleet: int) -> None:
        """Say which action is not allowed in a fleet, in the agent's own numbers."""
        agent = int(self.batch.agent[fleet])
        asked = self._asked[self.class_of[agent]]
        row = int(np.flatnonzero(asked.fleet == fleet)[0])
        raise InvalidAction(
            f"action {int(actions[self.class_of[agent]][row])} of {self.possible_agents[agent]} in "
            f"fleet {fleet} is not allowed: choose one of "
            f"{np.flatnonzero(asked.action_mask[row]).tolist()} (see action_mask)"
        )

    def _turn(self, earned: FloatArray, dt_s: FloatArray, ended: Ended) -> Turn:
        batch = self.batch
        at = self._first_of_row + batch.agent
        since, decided_s, has_decided = self._flat
        self._now_s = batch.now_s
        decided = has_decided[at]
        is_first = ~decided
        reward = since[at] * decided
        since_s = (self._now_s - decided_s[at]) * decided
        kinds = self._class_places[batch.agent]
        self._asked = {}
        for place, kind in enumerate(self.classes):
            fleet = (kinds == place).nonzero()[0]
            first, count = self._own_actions[kind]
            self._asked[kind] = Asked(
                fleet,
                batch.agent[fleet],
                self._views.asked(kind, fleet),
                batch.mask[:, first : first + count][fleet],
                reward[fleet],
                since_s[fleet],
                is_first[fleet],
            )
        return Turn(self._asked, earned, dt_s, ended)

    def _ended(self, fleets: IntArray) -> Ended:
        """Sum up the episodes of some fleets, which are over."""
        batch = self.batch
        decided = self._has_decided[fleets]
        elapsed_s = batch.now_s[fleets, None] - self._decided_s[fleets]
        truncated = batch.truncated[fleets]
        return Ended(
            fleets,
            truncated,
            self.is_present[fleets],
            decided,
            self._since[fleets],
            np.where(decided, elapsed_s, 0.0),
            [self._last_seen(e) if cut else {} for e, cut in zip(fleets, truncated, strict=True)],
            dict(zip(batch.metric_names, batch.metrics[:, fleets], strict=True)),
        )

    def _last_seen(self, fleet: int) -> Observation:
        views, names = self._views, self._views.present(fleet)
        seen = views.look(fleet, 0, 1 + views.size(fleet))
        for i in range(len(self.possible_agents) - views.num_others, len(self.possible_agents)):
            seen += views.look(fleet, i, i + 1)
        return dict(zip(names, seen, strict=True))


def _nothing_ended(num_agents: int, names: tuple[str, ...]) -> Ended:
    """Make what a step returns in which no episode ended."""
    nobody, nothing = np.zeros((0, num_agents), np.bool_), np.zeros((0, num_agents))
    fleet, truncated = np.zeros(0, np.int64), np.zeros(0, np.bool_)
    metrics = {name: np.zeros(0) for name in names}
    return Ended(fleet, truncated, nobody, nobody, nothing, nothing, [], metrics)
