"""A batch of workflow episodes over one simulator: what both environment classes share."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import numpy as np
from gymnasium import spaces

from servegym.envs.workflow_features import (
    DEVICE_COLUMNS,
    GLOBAL_COLUMNS,
    NODE_COLUMNS,
    PAIR_COLUMNS,
    STAGE_COLUMNS,
    Column,
)
from servegym.envs.workflow_kernels import (
    BY_ARRIVAL,
    BY_RANK,
    BY_SLACK,
    BY_WORK_LEFT,
    DEADLINE,
    JCT,
    MAKESPAN,
    Output,
    Settings,
    begin_episode,
    first_invalid,
    step_range,
)
from servegym.errors import ConfigError, InvalidAction, ResetNeeded
from servegym.typing import BoolArray, FloatArray, Int8Array, IntArray
from servegym.workflow.job import Job
from servegym.workflow.online.policy import WorkflowPolicy
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import Episode
from servegym.workflow.online.state import DECISION, WAIT
from servegym.workflow_scenario import WorkflowScenario, load_workflow_scenario

Objective = Literal["jct", "makespan", "deadline"]
Placement = Literal["agent", "eft"]
Shortlist = Literal["work-left", "arrival", "rank", "slack"]
_OBJECTIVES = {"jct": JCT, "makespan": MAKESPAN, "deadline": DEADLINE}
_SHORTLISTS = {
    "work-left": BY_WORK_LEFT,
    "arrival": BY_ARRIVAL,
    "rank": BY_RANK,
    "slack": BY_SLACK,
}


class WorkflowBatch:
    """`num_envs` environments that play episodes of one scenario of jobs.

    Attributes:
        scenario: What episodes are drawn from.
        num_envs: Environments.
        num_actions: Starts, then waiting.
        output: Observations, masks, rewards; see `envs.workflow_kernels.Output`.
        input_id: Which arrival sequence an environment plays, `int64[num_envs]`.
    """

    def __init__(
        self,
        scenario: WorkflowScenario | str,
        num_envs: int,
        *,
        load: float | tuple[float, float] = 1.0,
        num_jobs: int | tuple[int, int] | None = None,
        max_stages: int = 16,
        placement: Placement = "agent",
        shortlist: Shortlist = "work-left",
        graph: bool = False,
        max_nodes: int = 256,
        max_edges: int = 512,
        objective: Objective | None = None,
        reward_scale: float = 1.0,
        pool_size: int | None = 256,
        pool_seed: int = 0,
        group_size: int = 1,
        num_threads: int = 1,
    ) -> None:
        sizes = {
            "num_envs": num_envs,
            "max_stages": max_stages,
            "max_nodes": max_nodes,
            "max_edges": max_edges,
            "group_size": group_size,
            "num_threads": num_threads,
            "pool_size": 1 if pool_size is None else pool_size,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.scenario = load_workflow_scenario(scenario) if isinstance(scenario, str) else scenario
        self.objective = objective or self.scenario.objective
        for name, got, allowed in (
            ("objective", self.objective, get_args(Objective)),
            ("placement", placement, get_args(Placement)),
            ("shortlist", shortlist, get_args(Shortlist)),
        ):
            if got not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {got!r}")
        if not reward_scale > 0:
            raise ConfigError(f"reward_scale must be above 0, got {reward_scale}")
        self.num_envs, self.group_size, self._graph = num_envs, group_size, graph
        self._load, self._num_jobs = load, num_jobs
        self._pool_size, self._pool_seed = pool_size, pool_seed
        self._jobs: tuple[Job, ...] | None = None
        self._threads = ThreadPoolExecutor(num_threads) if num_threads > 1 else None
        self._num_threads = num_threads
        self._settings = Settings(
            objective=_OBJECTIVES[self.objective],
            shortlist=_SHORTLISTS[shortlist],
            eft=placement == "eft",
            graph=bool(graph),
            scale=float(reward_scale),
        )
        devices = self.scenario.max_devices
        starts = max_stages if placement == "eft" else max_stages * devices
        self.num_actions = starts + 1
        nodes, edges = (max_nodes, max_edges) if graph else (1, 1)
        self.output = Output(
            stages=np.zeros((num_envs, max_stages, len(STAGE_COLUMNS)), np.float32),
            pairs=np.zeros((num_envs, max_stages, devices, len(PAIR_COLUMNS)), np.float32),
            devices=np.zeros((num_envs, devices, len(DEVICE_COLUMNS)), np.float32),
            overall=np.zeros((num_envs, len(GLOBAL_COLUMNS)), np.float32),
            mask=np.zeros((num_envs, self.num_actions), np.int8),
            nodes=np.zeros((num_envs, nodes, len(NODE_COLUMNS)), np.float32),
            edges=np.zeros((num_envs, edges, 2), np.int32),
            node_mask=np.zeros((num_envs, nodes), np.int8),
            edge_mask=np.zeros((num_envs, edges), np.int8),
            stage_nodes=np.full((num_envs, max_stages), -1),
            shown=np.full((num_envs, max_stages), -1),
            keys=np.zeros((num_envs, max_stages)),
            placed=np.zeros((num_envs, max_stages), np.int64),
            node_of=np.zeros((num_envs, 1), np.int64),
            paid=np.zeros(num_envs),
            reward=np.zeros(num_envs),
            done=np.ones(num_envs, np.bool_),
            dt_s=np.zeros(num_envs),
        )
        self.input_id: IntArray = np.zeros(num_envs, np.int64)
        self._seed = 0
        self._count = np.zeros(num_envs, np.int64)
        self._simulator: Simulator | None = None

    @property
    def simulator(self) -> Simulator:
        """The simulator; there is one after the first reset."""
        if self._simulator is None:
            raise ResetNeeded("call reset before step")
        return self._simulator

    @property
    def mask(self) -> Int8Array:
        """Allowed actions, 1 is allowed, `int8[num_envs, num_actions]`."""
        return self.output.mask

    @property
    def reward(self) -> FloatArray:
        """Of the last step, `float64[num_envs]`."""
        return self.output.reward

    @property
    def done(self) -> BoolArray:
        """Whether the episode ended in the last step, `bool[num_envs]`."""
        return self.output.done

    @property
    def dt_s(self) -> FloatArray:
        """Simulated seconds between the last two decisions, `float64[num_envs]`."""
        return self.output.dt_s

    def observation_space(self) -> spaces.Dict:
        """Space of one environment's observation."""
        o = self.output
        found: dict[str, spaces.Space[Any]] = {
            "stages": _box(STAGE_COLUMNS, o.stages.shape[1:]),
            "pairs": _box(PAIR_COLUMNS, o.pairs.shape[1:]),
            "devices": _box(DEVICE_COLUMNS, o.devices.shape[1:]),
            "global": _box(GLOBAL_COLUMNS, o.overall.shape[1:]),
            "action_mask": spaces.MultiBinary(self.num_actions),
        }
        if self._graph:
            last = o.nodes.shape[1] - 1
            found |= {
                "nodes": _box(NODE_COLUMNS, o.nodes.shape[1:]),
                "edges": spaces.Box(0, last, o.edges.shape[1:], np.int32),
                "node_mask": spaces.MultiBinary(o.node_mask.shape[1]),
                "edge_mask": spaces.MultiBinary(o.edge_mask.shape[1]),
                "stage_nodes": spaces.Box(-1, last, o.stage_nodes.shape[1:], np.int64),
            }
        return spaces.Dict(found)

    def seed(self, seed: int) -> None:
        """Start the sequence of episodes anew."""
        self._seed = seed
        self._count[:] = 0

    def draw(self, env: int) -> Episode:
        """Draw the next episode of one environment; its group plays the same jobs."""
        group = env // self.group_size
        entropy = np.random.SeedSequence((self._seed, group, int(self._count[env])))
        seed, first, second = (int(x) for x in entropy.generate_state(3, np.uint64))
        load, num_jobs = self._load, self._num_jobs
        if not isinstance(load, float | int):
            load = load[0] + (load[1] - load[0]) * (first / 2.0**64)
        if isinstance(num_jobs, tuple):
            num_jobs = num_jobs[0] + second % (num_jobs[1] - num_jobs[0] + 1)
        self.input_id[env] = group
        self._count[env] += 1
        if self._pool_size is not None and self._jobs is None:
            self._jobs = self.scenario.draw_jobs(self._pool_seed, self._pool_size)
        return self.scenario.episode(seed, load=load, num_jobs=num_jobs, pool=self._jobs)

    def reset(self, envs: IntArray, episodes: list[Episode] | None = None) -> None:
        """Start new episodes in some environments and run them to their first decisions."""
        drawn = episodes or [self.draw(env) for env in envs.tolist()]
        if self._simulator is None:
            first = drawn if len(envs) == self.num_envs else drawn[:1] * self.num_envs
            self._simulator = Simulator(self.scenario.spec, first)
        for env, episode in zip(envs.tolist(), drawn, strict=True):
            if episode.num_devices > self.output.devices.shape[1]:
                raise ConfigError(
                    f"an episode of {self.scenario.name} has at most"
                    f" {self.output.devices.shape[1]} devices, got {episode.num_devices}"
                )
            self.simulator.load(env, episode)
            self._fit()
            reason = begin_episode(
                self.simulator.params, self.simulator.state, self._settings, self.output, env
            )
            if reason != DECISION:
                raise ConfigError("an episode needs at least one stage that runs on a device")

    def _fit(self) -> None:
        """Let the working memory of graphs grow with the simulator's arrays."""
        stages = self.simulator.state.stage.shape[1] if self._graph else 1
        if self.output.node_of.shape[1] < stages:
            self.output = self.output._replace(node_of=np.zeros((self.num_envs, stages), np.int64))

    def step(self, actions: IntArray, active: BoolArray) -> None:
        """Take a decision in every active environment.

        Raises:
            InvalidAction: If one is not allowed; then nothing has happened.
        """
        actions = np.ascontiguousarray(actions, np.int64)
        if actions.shape != (self.num_envs,):
            raise InvalidAction(
                f"there must be one action for each of {self.num_envs} environments, "
                f"got shape {actions.shape}"
            )
        bad = first_invalid(self.output, actions, active)
        if bad >= 0:
            raise InvalidAction(
                f"action {int(actions[bad])} is not allowed in environment {bad}: "
                f"choose one of {np.flatnonzero(self.mask[bad]).tolist()} (see action_mask)"
            )
        if self._threads is None:
            self._step_range(0, self.num_envs, actions, active)
            return
        limits = np.linspace(0, self.num_envs, self._num_threads + 1).astype(int).tolist()
        parts = [
            self._threads.submit(self._step_range, first, stop, actions, active)
            for first, stop in itertools.pairwise(limits)
        ]
        for part in parts:
            part.result()

    def _step_range(self, first: int, stop: int, actions: IntArray, active: BoolArray) -> None:
        p, s = self.simulator.params, self.simulator.state
        step_range(p, s, self._settings, self.output, first, stop, actions, active)

    def rule_actions(self, policy: WorkflowPolicy) -> IntArray:
        """Say what a policy of `workflow.online` would do, in the terms of the action space.

        For imitation: the policy must have been prepared by `workflow.online.run.begin`, and with
        placement `eft` only its choice of the stage counts.

        Returns:
            Actions, `int64[num_envs]`; -1 where an episode has ended or the stage is not shown.
        """
        found = np.full(self.num_envs, -1, np.int64)
        envs = np.flatnonzero(~self.done)
        chosen = policy.act(self.simulator, envs)
        for env, action in zip(envs.tolist(), chosen.tolist(), strict=True):
            if action == WAIT:
                found[env] = self.num_actions - 1
                continue
            stage, device = divmod(action, int(self.simulator.state.env[env]["num_devices"]))
            for k in np.flatnonzero(self.output.shown[env] == stage).tolist():
                width = self.output.pairs.shape[2]
                found[env] = k if self._settings.eft else k * width + device
        return found

    def observation(self) -> dict[str, Any]:
        """Copy the observations of all environments."""
        o = self.output
        found = {
            "stages": o.stages.copy(),
            "pairs": o.pairs.copy(),
            "devices": o.devices.copy(),
            "global": o.overall.copy(),
            "action_mask": o.mask.copy(),
        }
        if self._graph:
            for name in ("nodes", "edges", "node_mask", "edge_mask", "stage_nodes"):
                found[name] = getattr(o, name).copy()
        return found

    def summary(self, env: int) -> dict[str, float]:
        """Results of an episode that has ended."""
        jobs = self.simulator.jobs(env)
        jct_s = jobs["finish_s"] - jobs["arrival_s"]
        return {
            "jct_mean_s": float(jct_s.mean()),
            "makespan_s": float(jobs["finish_s"].max() - jobs["arrival_s"].min()),
            "deadline_attainment": float(
                np.average(jct_s <= jobs["deadline_s"], weights=jobs["weight"])
            ),
        }

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown()


def _box(columns: tuple[Column, ...], shape: tuple[int, ...]) -> spaces.Box:
    low = np.array([c.low for c in columns], np.float32)
    high = np.array([c.high for c in columns], np.float32)
    return spaces.Box(np.broadcast_to(low, shape), np.broadcast_to(high, shape), dtype=np.float32)
