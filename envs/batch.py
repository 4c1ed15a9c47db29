"""A batch of episodes over one compiled simulator: what all environments share."""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from servegym.envs.actions import as_integers
from servegym.envs.kernels import first_invalid
from servegym.envs.observation import Observer, Table
from servegym.envs.scene import Scene
from servegym.envs.settings import Settings, at_least_one, make_settings, one_of
from servegym.envs.shaping import Potentials
from servegym.errors import ConfigError, EnvironmentClosed, InvalidAction, ResetNeeded
from servegym.typing import BoolArray, FloatArray, Int8Array, IntArray

#: Keys of `Batch.info`, and those that say which environments gave them.
_MASK_OF = {
    name: f"_{name}" for name in ("action_mask", "dt_s", "now_s", "input_id", "invalid_action")
}


class Batch(ABC):
    """`num_envs` environments that play episodes of one scenario.

    A subclass loads the scenario, calls `_allocate` and fills the arrays named here.

    Args:
        num_envs: Environments.
        settings: What it was told.

    Attributes:
        settings: What it was told.
        scenario: What episodes are drawn from.
        objective: What is rewarded.
        reward_scale: Divides rewards.
        num_actions: Actions of one environment.
        mask: Allowed actions, 1 is allowed, `int8[num_envs, num_actions]`.
        reward: Of the last step, `float64[num_envs]`.
        done: Whether the episode ended in the last step, `bool[num_envs]`.
        truncated: Whether it was cut off instead, `bool[num_envs]`.
        dt_s: Simulated seconds between the last two decisions, `float64[num_envs]`.
        input_id: Which arrival sequence an environment plays, `int64[num_envs]`.
        invalid: Whether the last action was forbidden, `bool[num_envs]`.
        metrics: Results of the episode that ended in the last step, 0 in any other,
            `float64[len(metric_names), num_envs]`.
        narrates: Whether `deeds` is kept up to date, for pictures.
        deeds: What was done last in each environment, in words; empty before the first step.
    """

    episode_type: ClassVar[type]
    settings_type: ClassVar[type[Settings]]
    objectives: ClassVar[tuple[str, ...]]
    #: What is rewarded where that by which a scenario is judged is no sum of rewards.
    rewarded: ClassVar[Mapping[str, str]] = MappingProxyType({})
    metric_names: ClassVar[tuple[str, ...]]
    #: Episodes that are drawn in place of one without a decision, at most.
    max_redraws: ClassVar[int] = 0
    num_actions: int
    mask: Int8Array
    observer: Observer
    settings: Settings

    def __init__(self, num_envs: int, settings: Settings) -> None:
        at_least_one(num_envs=num_envs)
        given = settings.scenario
        self.settings, self.num_envs = settings, num_envs
        self.scenario = self._load_scenario(given) if isinstance(given, str) else given
        judged: str = self.scenario.objective
        self.objective: str = settings.objective or self.rewarded.get(judged, judged)
        one_of(objective=(self.objective, self.objectives))
        scale = settings.reward_scale
        self.reward_scale = self._typical_reward() if scale == "auto" else float(scale)
        penalises = settings.invalid_action == "penalise"
        self._penalty = float(settings.invalid_penalty) if penalises else 0.0
        self._truncates = settings.episode_end == "last-arrival"
        self._pool: ThreadPoolExecutor | None = None
        self._pool_pid = 0
        self._closed = False
        self.reward: FloatArray = np.zeros(num_envs)
        self.done: BoolArray = np.ones(num_envs, np.bool_)
        self.truncated: BoolArray = np.zeros(num_envs, np.bool_)
        self.dt_s: FloatArray = np.zeros(num_envs)
        self.input_id: IntArray = np.zeros(num_envs, np.int64)
        self.invalid: BoolArray = np.zeros(num_envs, np.bool_)
        self.metrics: FloatArray = np.zeros((len(self.metric_names), num_envs))
        self.narrates = False
        self.deeds = [""] * num_envs
        self._metric_masks = tuple(f"_{name}" for name in self.metric_names)
        self._reported = False  # whether `metrics` holds any
        self._entropy = [(0, env // settings.group_size) for env in range(num_envs)]
        self._count = np.zeros(num_envs, np.int64)
        self._substitutes: dict[int, np.random.Generator] = {}
        self._shared: dict[tuple[int, ...], tuple[Any, int]] = {}
        self._simulator: Any = None
        self._shaping = None if settings.shaping == "none" else self._potentials()

    def _allocate(
        self, num_actions: int, tables: dict[str, Table], others: dict[str, spaces.Space[Any]]
    ) -> None:
        """Make the mask and the observer.

        Args:
            num_actions: Actions of one environment.
            tables: Numbers observed, by name.
            others: Spaces of what else is observed, by name.
        """
        self.num_actions = num_actions
        self.mask = np.zeros((self.num_envs, num_actions), np.int8)
        self.observer = Observer(
            tables,
            others,
            num_actions,
            normalise=self.settings.normalise,
            flat=self.settings.flat,
        )

    @staticmethod
    @abstractmethod
    def _load_scenario(name: str) -> Any:
        """Load a scenario by name or path."""

    @abstractmethod
    def _draw(self, seed: int, load: float, number: int) -> Any:
        """Draw an episode; `number` is random too."""

    @abstractmethod
    def _typical_reward(self) -> float:
        """About what one decision is worth, before it is scaled."""

    @abstractmethod
    def _potentials(self) -> Potentials:
        """Make what shapes rewards."""

    @abstractmethod
    def _arrivals(self) -> tuple[IntArray, IntArray]:
        """Arrivals so far and in all, `int64[num_envs]` each."""

    @abstractmethod
    def _rule_action(self, env: int) -> int:
        """What the rule of the warm-up does in one environment."""

    @abstractmethod
    def _make_simulator(self, episodes: list[Any]) -> Any:
        """Make the simulator, one episode for each environment."""

    @abstractmethod
    def _begin(self, env: int, episode: Any) -> bool:
        """Load an episode, run it to its first decision; return False if it has none."""

    @abstractmethod
    def _no_decision(self, drawn: bool) -> str:
        """Say that an episode has no decision, in the end also of those that were drawn."""

    @abstractmethod
    def _step_range(self, first: int, stop: int, actions: IntArray, active: BoolArray) -> None:
        """Take the decisions of environments `first..stop-1` that are active."""

    @abstractmethod
    def _parts(self) -> dict[str, NDArray[Any]]:
        """Observations by name, the mask last; not copied."""

    @abstractmethod
    def summary(self, env: int) -> tuple[float, ...]:
        """Results of an episode that has ended, in the order of `metric_names`."""

    @abstractmethod
    def _deed(self, env: int, action: int) -> str:
        """Say what an action does that is about to be taken."""

    @abstractmethod
    def scene(self, env: int) -> Scene:
        """Describe one environment to who draws it."""

    @property
    def simulator(self) -> Any:
        """The simulator; there is one after the first reset."""
        if self._simulator is None:
            raise ResetNeeded("call reset before step")
        return self._simulator

    @property
    def now_s(self) -> FloatArray:
        """Simulated time of each environment, `float64[num_envs]`."""
        return self.simulator.state.env["now_s"].copy()

    def seed(self, seed: int) -> None:
        """Start the sequences of episodes of all environments anew."""
        for env in range(self.num_envs):
            self._begin_sequence(env, (seed, env // self.settings.group_size))

    def seed_one(self, env: int, seed: int) -> None:
        """Let one environment play what a batch of one plays with this seed."""
        self._begin_sequence(env, (seed, 0))

    def skip_to(self, episodes: IntArray) -> None:
        """Let the next reset begin these episodes of the sequences, `int64[num_envs]` from 0."""
        self._count[:] = episodes

    def _begin_sequence(self, env: int, entropy: tuple[int, int]) -> None:
        self._entropy[env] = entropy
        self._shared.clear()
        self._count[env] = 0
        self._substitutes.pop(env, None)

    def draw(self, env: int) -> Any:
        """Draw the next episode of one environment; its group plays the same arrivals."""
        place = (*self._entropy[env], int(self._count[env]))
        self.input_id[env] = env // self.settings.group_size
        self._count[env] += 1
        episode, left = self._shared.pop(place, (None, self.settings.group_size))
        if episode is None:
            entropy = np.random.SeedSequence(place)
            seed, first, second = entropy.generate_state(3, np.uint64).tolist()
            load = self.settings.load
            if not isinstance(load, float | int):
                load = load[0] + (load[1] - load[0]) * (first / 2.0**64)
            episode = self._draw(seed, load, second)
        if left > 1:  # others of the group will play it, too, each in its time
            self._shared[place] = episode, left - 1
        return episode

    def reset(self, envs: IntArray, episodes: Sequence[Any] | None = None) -> None:
        """Start new episodes in some environments and run them to their first decisions.

        Args:
            envs: Which environments.
            episodes: What they play, one each; drawn if not given.
        """
        self.check_open()
        drawn = episodes is None
        played = [self.draw(env) for env in envs.tolist()] if episodes is None else list(episodes)
        if self._simulator is None:
            every = played if len(envs) == self.num_envs else [played[0]] * self.num_envs
            self._simulator = self._make_simulator(every)
        for env, episode in zip(envs.tolist(), played, strict=True):
            self._begin_one(env, episode, drawn=drawn)
        self.done[envs] = False
        for env in envs.tolist():
            self.deeds[env] = ""
            if self.settings.warmup:
                self._warm_up(env)
            if self._truncates:
                self._check_length(env)
            if self._shaping is not None:
                self._shaping.begin(self.simulator, env)
        for array in (self.truncated, self.invalid, self.reward, self.dt_s):
            array[envs] = 0
        self.metrics[:, envs] = 0.0

    def _begin_one(self, env: int, episode: Any, *, drawn: bool) -> None:
        """Begin an episode; where it was drawn, others are in search of one with a decision."""
        redraws = self.max_redraws if drawn else 0
        while not self._begin(env, episode):
            if redraws == 0:
                raise ConfigError(self._no_decision(drawn))
            redraws -= 1
            episode = self.draw(env)

    def _warm_up(self, env: int) -> None:
        """Let the rule decide in one environment until the arrivals of the warm-up are there."""
        alone = np.zeros(self.num_envs, np.bool_)
        alone[env] = True
        actions = np.zeros(self.num_envs, np.int64)
        while self._arrivals()[0][env] <= self.settings.warmup:
            actions[env] = self._rule_action(env)
            self._step_range(env, env + 1, actions, alone)
            if self.done[env]:
                self._refuse_length(env)

    def _check_length(self, env: int) -> None:
        arrived, in_all = self._arrivals()
        if arrived[env] == in_all[env]:
            self._refuse_length(env)

    def _refuse_length(self, env: int) -> None:
        end = " and an end at the last arrival" if self._truncates else ""
        raise ConfigError(
            f"an episode of {int(self._arrivals()[1][env])} arrivals leaves the agent no decision"
            f" with a warmup of {self.settings.warmup}{end}: let it be longer"
        )

    def step(self, actions: Any, active: BoolArray) -> None:
        """Take a decision in every active environment.

        Raises:
            InvalidAction: If one is not allowed and is to be refused; then nothing has happened.
        """
        self.check_open()
        chosen = as_integers(actions, self.num_envs)
        active = np.ascontiguousarray(active)
        bad = first_invalid(self.mask, chosen, active)
        if self.settings.invalid_action == "raise":
            if bad >= 0:
                raise InvalidAction(
                    f"action {int(chosen[bad])} is not allowed in environment {bad}: "
                    f"choose one of {np.flatnonzero(self.mask[bad]).tolist()} (see action_mask)"
                )
        elif bad >= 0:
            chosen = self._replaced(chosen, active)
        else:
            self.invalid.fill(False)
        if self.narrates:
            for env in np.flatnonzero(active).tolist():
                self.deeds[env] = self._deed(env, int(chosen[env]))
        if self.settings.num_threads == 1:
            self._step_part(0, self.num_envs, chosen, active)
        else:
            self._in_ranges(lambda first, stop: self._step_part(first, stop, chosen, active))
        if self._truncates:
            arrived, in_all = self._arrivals()
            self.truncated[:] = active & ~self.done & (arrived == in_all)
        if self._penalty:
            self.reward[self.invalid] -= self._penalty
        ended = active & (self.done | self.truncated)
        if self._reported:
            self.metrics[:] = 0.0
        self._reported = bool(np.count_nonzero(ended))
        if self._reported:
            for env in np.flatnonzero(ended).tolist():
                self.metrics[:, env] = self.summary(env)

    def _step_part(self, first: int, stop: int, actions: IntArray, active: BoolArray) -> None:
        self._step_range(first, stop, actions, active)
        if self._shaping is not None:
            self._shaping.add(self.simulator, first, stop, active, self.done, self.reward)

    def _replaced(self, actions: IntArray, active: BoolArray) -> IntArray:
        """Replace forbidden actions by random ones, each environment by draws of its own."""
        inside = (actions >= 0) & (actions < self.num_actions)
        allowed = self.mask[np.arange(self.num_envs), np.where(inside, actions, 0)] == 1
        self.invalid[:] = active & ~(inside & allowed)
        actions = actions.copy()
        for env in np.flatnonzero(self.invalid).tolist():
            if env not in self._substitutes:
                self._substitutes[env] = np.random.default_rng((*self._entropy[env], 1))
            actions[env] = self._substitutes[env].choice(np.flatnonzero(self.mask[env]))
        return actions

    def _in_ranges(self, step: Callable[[int, int], None]) -> None:
        """Call `step(first, stop)` for all environments, in as many ranges as there are threads."""
        if self._pool is None or self._pool_pid != os.getpid():
            # a forked process has the pool, but not its threads
            self._pool, self._pool_pid = ThreadPoolExecutor(self.settings.num_threads), os.getpid()
        edges = np.linspace(0, self.num_envs, self.settings.num_threads + 1).astype(int).tolist()
        for job in [self._pool.submit(step, *pair) for pair in itertools.pairwise(edges)]:
            job.result()

    def observation(self) -> Any:
        """Return fresh arrays with the observations of all environments."""
        return self.observer(self._parts())

    def info(self, given: BoolArray | None = None) -> dict[str, Any]:
        """Return fresh arrays with what else is known of all environments; keys never change.

        Args:
            given: With it, laid out as in Gymnasium's vector environments: each `key` has a `_key`
                (`bool[num_envs]`, this one array for all) that says which environments gave it.
        """
        info: dict[str, Any] = {}
        for name, value in self._facts().items():
            info[name] = value.copy()
            if given is not None:
                info[_MASK_OF[name]] = given
        metrics = dict(zip(self.metric_names, self.metrics.copy(), strict=True))
        info["episode_metrics"] = metrics
        if given is not None:
            metrics.update(dict.fromkeys(self._metric_masks, given))
            info["_episode_metrics"] = given
        return info

    def info_of(self, env: int) -> dict[str, Any]:
        """Return what `info` has for one environment, numbers as Python's."""
        info = {
            name: value.item(env) if value.ndim == 1 else value[env].copy()
            for name, value in self._facts().items()
        }
        metrics = self.metrics[:, env].tolist()
        info["episode_metrics"] = dict(zip(self.metric_names, metrics, strict=True))
        return info

    def _facts(self) -> dict[str, NDArray[Any]]:
        """What `info` has but for the metrics; not copied."""
        facts: dict[str, NDArray[Any]] = {
            "action_mask": self.mask,
            "dt_s": self.dt_s,
            "now_s": self.simulator.state.env["now_s"],
            "input_id": self.input_id,
        }
        if self.settings.invalid_action != "raise":
            facts["invalid_action"] = self.invalid
        return facts

    def close(self) -> None:
        """End the threads; the environments cannot be used any more."""
        self._closed = True
        if self._pool is not None and self._pool_pid == os.getpid():
            self._pool.shutdown()
        self._pool = None

    def check_open(self) -> None:
        """Raise `EnvironmentClosed` after `close`."""
        if self._closed:
            raise EnvironmentClosed("the environment was closed: make a new one")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}  # threads are made where they are needed


def make_batch(
    batch_type: type[Batch], num_envs: int, scenario: Any, given: Mapping[str, Any]
) -> Any:
    """Make a batch of environments of a problem; see `make_settings`."""
    return batch_type(num_envs, make_settings(batch_type.settings_type, scenario, given))
