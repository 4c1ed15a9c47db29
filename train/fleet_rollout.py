"""Episodes of fleets whose agents draw their decisions, and who decided what after whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from servegym.cluster.spec import Episode
from servegym.envs.agent_batch import AgentBatch, Asked, Turn
from servegym.typing import BoolArray, Float32Array, FloatArray, IntArray

T = TypeVar("T")


class Drawn(NamedTuple, Generic[T]):
    """What agents of one class have drawn.

    Attributes:
        action: In the class's own actions, `int64[n]`.
        kept: What is kept of it, a row each.
    """

    action: IntArray
    kept: T


class Links(NamedTuple):
    """From each decision to what follows it; axes: T steps of all fleets together, N fleets.

    Attributes:
        reward: Earned in between, `float64[T, N]`.
        dt_s: Simulated seconds in between, `float64[T, N]`.
        following: Step of what follows, `int64[T, N]`.
        ends: Whether nothing follows: the episode has ended, `bool[T, N]`.
    """

    reward: FloatArray
    dt_s: FloatArray
    following: IntArray
    ends: BoolArray

    @classmethod
    def zeros(cls, num_steps: int, num_fleets: int) -> Links:
        """Make those of nobody, which end at once."""
        shape = (num_steps, num_fleets)
        nowhere, over = np.zeros(shape, np.int64), np.ones(shape, np.bool_)
        return cls(np.zeros(shape), np.zeros(shape), nowhere, over)


class Rollout(NamedTuple, Generic[T]):
    """Whole episodes, one in each fleet.

    Attributes:
        step: When decisions were taken, by class of agents, `int64[n]`.
        fleet: Where, the same.
        kept: What was kept of them, by class, a list of parts in this order.
        states: What a centralised critic saw, `float32[n, K]`, by class.
        of_fleet: From each decision to the next one of anybody in its fleet.
        of_agent: To the next one of the same agent.
        returns: Sum of the rewards of each episode, `float64[N]`.
    """

    step: dict[str, IntArray]
    fleet: dict[str, IntArray]
    kept: dict[str, list[T]]
    states: dict[str, Float32Array]
    of_fleet: Links
    of_agent: Links
    returns: FloatArray


def roll_out(
    fleets: AgentBatch, episodes: Sequence[Episode], draw: Callable[[str, Asked], Drawn[T]]
) -> Rollout[T]:
    """Play an episode in each fleet to its end.

    Args:
        fleets: Where; all agents earn what their fleet does.
        episodes: What is played, one for each fleet.
        draw: Decides for the agents of a class, and says what is to be kept of it.
    """
    num_fleets, num_agents = fleets.is_present.shape
    turn = fleets.reset(episodes=episodes)
    goes_on = np.ones(num_fleets, np.bool_)
    steps: list[_Step[T]] = []
    while goes_on.any():
        states = fleets.states()
        asked = {kind: _only(a, goes_on[a.fleet]) for kind, a in turn.asked.items()}
        drawn = {kind: draw(kind, a) for kind, a in asked.items() if len(a.fleet)}
        actions = {kind: np.zeros(len(a.fleet), np.int64) for kind, a in turn.asked.items()}
        for kind, what in drawn.items():
            actions[kind][goes_on[turn.asked[kind].fleet]] = what.action
        turn = fleets.step(actions, goes_on)
        steps.append(_Step(asked, drawn, states, turn))
        goes_on[turn.ended.fleet] = False
    return _linked(steps, num_fleets, num_agents)


class _Step(NamedTuple, Generic[T]):
    """A decision in each fleet that goes on, and what it led to."""

    asked: dict[str, Asked]
    drawn: dict[str, Drawn[T]]
    states: Float32Array
    turn: Turn


def _only(asked: Asked, those: BoolArray) -> Asked:
    return Asked._make(values[those] for values in asked)


def _linked(steps: list[_Step[T]], num_fleets: int, num_agents: int) -> Rollout[T]:
    """Say what follows what."""
    fleet_links, agent_links = (Links.zeros(len(steps), num_fleets) for _ in range(2))
    kinds = list(steps[0].asked)
    when: dict[str, list[IntArray]] = {kind: [] for kind in kinds}
    where: dict[str, list[IntArray]] = {kind: [] for kind in kinds}
    kept: dict[str, list[T]] = {kind: [] for kind in kinds}
    states: dict[str, list[Float32Array]] = {kind: [] for kind in kinds}
    last = np.zeros((num_fleets, num_agents), np.int64)  # step of an agent's last decision
    returns = np.zeros(num_fleets)
    for t, step in enumerate(steps):
        for kind, asked in step.asked.items():
            fleet = asked.fleet
            again = ~asked.is_first
            at = last[fleet[again], asked.agent[again]], fleet[again]
            agent_links.reward[at], agent_links.dt_s[at] = asked.reward[again], asked.dt_s[again]
            agent_links.following[at], agent_links.ends[at] = t, False
            last[fleet, asked.agent] = t
            fleet_links.reward[t, fleet] = step.turn.earned[fleet, asked.agent]
            fleet_links.dt_s[t, fleet] = step.turn.dt_s[fleet]
            fleet_links.following[t, fleet] = t + 1
            fleet_links.ends[t, fleet] = False
            when[kind].append(np.full(len(fleet), t))
            where[kind].append(fleet)
            states[kind].append(step.states[fleet])
            if kind in step.drawn:
                kept[kind].append(step.drawn[kind].kept)
        returns += step.turn.earned[:, 0]
        over = step.turn.ended
        fleet_links.following[t, over.fleet], fleet_links.ends[t, over.fleet] = 0, True
        row, agent = np.nonzero(over.has_decided)
        at = last[over.fleet[row], agent], over.fleet[row]
        agent_links.reward[at], agent_links.dt_s[at] = (
            over.reward[row, agent],
            over.dt_s[row, agent],
        )
    return Rollout(
        {kind: np.concatenate(parts) for kind, parts in when.items()},
        {kind: np.concatenate(parts) for kind, parts in where.items()},
        kept,
        {kind: np.concatenate(parts) for kind, parts in states.items()},
        fleet_links,
        agent_links,
        returns,
    )
