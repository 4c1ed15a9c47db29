"""A batch of workflow episodes: which ready stage of the jobs in the system starts where."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from servegym.cluster.jit import fixed
from servegym.envs.batch import Batch
from servegym.envs.observation import Table
from servegym.envs.scene import Scene
from servegym.envs.settings import WorkflowSettings
from servegym.envs.shaping import Potentials
from servegym.envs.workflow_features import (
    DEVICE_COLUMNS,
    GLOBAL_COLUMNS,
    NODE_COLUMNS,
    PAIR_COLUMNS,
    STAGE_COLUMNS,
)
from servegym.envs.workflow_kernels import (
    BY_ARRIVAL,
    BY_RANK,
    BY_SLACK,
    BY_WORK_LEFT,
    DEADLINE,
    JCT,
    MAKESPAN,
    KernelSettings,
    Output,
    begin,
    step_range,
)
from servegym.envs.workflow_scene import workflow_scene
from servegym.envs.workflow_shaping import JobsToGo
from servegym.errors import ConfigError
from servegym.typing import BoolArray, IntArray
from servegym.workflow.job import Job
from servegym.workflow.online.policy import WorkflowPolicy
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import Episode
from servegym.workflow.online.state import WAIT
from servegym.workflow_scenario import WorkflowScenario, load_workflow_scenario

Objective = Literal["jct", "makespan", "deadline"]
_OBJECTIVES = {"jct": JCT, "makespan": MAKESPAN, "deadline": DEADLINE}
_DURATION, _MOVE = ([c.name for c in PAIR_COLUMNS].index(n) for n in ("duration_s", "delay_s"))
_SHORTLISTS = {
    "work-left": BY_WORK_LEFT,
    "arrival": BY_ARRIVAL,
    "rank": BY_RANK,
    "slack": BY_SLACK,
}


class WorkflowBatch(Batch):
    """`num_envs` environments that play episodes of jobs; see `Batch`.

    Args:
        num_envs: Environments.
        settings: What it was told.

    Attributes:
        num_actions: Starts, then waiting.
        output: Observations, masks, rewards; see `envs.workflow_kernels.Output`.
    """

    episode_type = Episode
    objectives = get_args(Objective)
    metric_names = ("jct_mean_s", "makespan_s", "deadline_attainment")

    settings_type = WorkflowSettings
    settings: WorkflowSettings

    def __init__(self, num_envs: int, settings: WorkflowSettings) -> None:
        super().__init__(num_envs, settings)
        self._jobs: tuple[Job, ...] | None = None
        self._kernel_settings = KernelSettings(
            objective=_OBJECTIVES[self.objective],
            shortlist=_SHORTLISTS[settings.shortlist],
            eft=settings.placement == "eft",
            graph=bool(settings.graph),
            scale=float(self.reward_scale),
        )
        devices = self.scenario.max_devices
        max_stages = settings.max_stages
        starts = max_stages if settings.placement == "eft" else max_stages * devices
        nodes, edges = (settings.max_nodes, settings.max_edges) if settings.graph else (1, 1)
        tables = {
            "stages": Table(STAGE_COLUMNS, (max_stages, len(STAGE_COLUMNS))),
            "pairs": Table(PAIR_COLUMNS, (max_stages, devices, len(PAIR_COLUMNS))),
            "devices": Table(DEVICE_COLUMNS, (devices, len(DEVICE_COLUMNS))),
            "global": Table(GLOBAL_COLUMNS, (len(GLOBAL_COLUMNS),)),
        }
        others: dict[str, spaces.Space[Any]] = {}
        if settings.graph:
            tables["nodes"] = Table(NODE_COLUMNS, (nodes, len(NODE_COLUMNS)))
            others = {
                "edges": spaces.Box(0, nodes - 1, (edges, 2), np.int32),
                "node_mask": spaces.MultiBinary(nodes),
                "edge_mask": spaces.MultiBinary(edges),
                "stage_nodes": spaces.Box(-1, nodes - 1, (max_stages,), np.int64),
            }
        self._allocate(starts + 1, tables, others)
        self.output = Output(
            stages=np.zeros((num_envs, max_stages, len(STAGE_COLUMNS)), np.float32),
            pairs=np.zeros((num_envs, max_stages, devices, len(PAIR_COLUMNS)), np.float32),
            devices=np.zeros((num_envs, devices, len(DEVICE_COLUMNS)), np.float32),
            overall=np.zeros((num_envs, len(GLOBAL_COLUMNS)), np.float32),
            mask=self.mask,
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
            reward=self.reward,
            done=self.done,
            dt_s=self.dt_s,
        )

    @staticmethod
    def _load_scenario(name: str) -> WorkflowScenario:
        return load_workflow_scenario(name)

    def _draw(self, seed: int, load: float, number: int) -> Episode:
        num_jobs, pool_size = self.settings.num_jobs, self.settings.pool_size
        if isinstance(num_jobs, tuple):
            num_jobs = num_jobs[0] + number % (num_jobs[1] - num_jobs[0] + 1)
        if pool_size is not None and self._jobs is None:
            self._jobs = self.scenario.draw_jobs(self.settings.pool_seed, pool_size)
        return self.scenario.episode(seed, load=load, num_jobs=num_jobs, pool=self._jobs)

    def _make_simulator(self, episodes: list[Episode]) -> Simulator:
        return Simulator(self.scenario.spec, episodes)

    def _begin(self, env: int, episode: Episode) -> bool:
        if episode.num_devices > self.output.devices.shape[1]:
            raise ConfigError(
                f"an episode of {self.scenario.name} has at most"
                f" {self.output.devices.shape[1]} devices, got {episode.num_devices}"
            )
        self.simulator.load(env, episode)
        self._fit()
        p, s = self.simulator.params, self.simulator.state
        return begin(p, s, self._kernel_settings, self.output, env)

    def _no_decision(self, drawn: bool) -> str:
        return "an episode needs at least one stage that runs on a device"

    def _typical_reward(self) -> float:
        """Weighted seconds of work of a mean job on a fleet as it is, or 1 a job for deadlines."""
        if self.objective == "deadline":
            return 1.0
        state = Simulator(self.scenario.spec, [self.scenario.episode(0)]).state
        num_jobs, num_devices = (int(state.env[0][k]) for k in ("num_jobs", "num_devices"))
        jobs = state.job[0, :num_jobs]
        if self.objective == "makespan":
            return float(jobs["work_s"].mean()) / num_devices
        return float(np.mean(jobs["weight"] * np.maximum(jobs["work_s"], 1e-9)))

    def _potentials(self) -> Potentials:
        return JobsToGo(
            self.num_envs, objective=_OBJECTIVES[self.objective], scale=float(self.reward_scale)
        )

    def _arrivals(self) -> tuple[IntArray, IntArray]:
        env = self.simulator.state.env
        return env["next_job"], env["num_jobs"]

    def _rule_action(self, env: int) -> int:
        """Start the first stage of the shortlist where it is expected to end first."""
        allowed = np.flatnonzero(self.mask[env])
        if self._kernel_settings.eft:
            return int(allowed[0])
        devices = self.output.pairs.shape[2]
        own = allowed[
            (allowed < devices * (1 + allowed[0] // devices)) & (allowed < self.num_actions - 1)
        ]
        if not len(own):
            return int(allowed[0])
        pairs = self.output.pairs[env, own // devices, own % devices]
        return int(own[(pairs[:, _DURATION] + pairs[:, _MOVE]).argmin()])

    def _fit(self) -> None:
        """Let the working memory of graphs grow with the simulator's arrays."""
        stages = self.simulator.state.stage.shape[1] if self.settings.graph else 1
        if self.output.node_of.shape[1] < stages:
            self.output = self.output._replace(node_of=np.zeros((self.num_envs, stages), np.int64))

    def _step_range(self, first: int, stop: int, actions: IntArray, active: BoolArray) -> None:
        p, s = self.simulator.params, self.simulator.state
        arguments = (p, s, self._kernel_settings, self.output, first, stop, actions, active)
        fixed(step_range, *arguments)(*arguments)

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
                found[env] = k if self._kernel_settings.eft else k * width + device
        return found

    def _parts(self) -> dict[str, NDArray[Any]]:
        o = self.output
        found: dict[str, NDArray[Any]] = {
            "stages": o.stages,
            "pairs": o.pairs,
            "devices": o.devices,
            "global": o.overall,
        }
        if self.settings.graph:
            for name in ("nodes", "edges", "node_mask", "edge_mask", "stage_nodes"):
                found[name] = getattr(o, name)
        return {**found, "action_mask": o.mask}

    def summary(self, env: int) -> tuple[float, ...]:
        """Completion times of an episode that has ended.

        Jobs of the warm-up do not count, nor those that had not ended at a truncation.
        """
        jobs = self.simulator.jobs(env)[self.settings.warmup :]
        jobs = jobs[np.isfinite(jobs["finish_s"])]
        if not len(jobs):
            return (0.0,) * 3
        jct_s = jobs["finish_s"] - jobs["arrival_s"]
        return (
            float(jct_s.mean()),
            float(jobs["finish_s"].max() - jobs["arrival_s"].min()),
            float(np.average(jct_s <= jobs["deadline_s"], weights=jobs["weight"])),
        )

    def _deed(self, env: int, action: int) -> str:
        if action == self.num_actions - 1:
            return "nothing started"
        o = self.output
        if self._kernel_settings.eft:
            number, device = o.shown[env, action], o.placed[env, action]
        else:
            row, device = divmod(action, o.pairs.shape[2])
            number = o.shown[env, row]
        job = int(self.simulator.state.stage[env, number]["job"])
        place = int(number) - int(self.simulator.state.job[env, job]["first_stage"])
        return f"stage {place} of job {job} started on device {device}"

    def scene(self, env: int) -> Scene:
        """Show the devices, what they run, and the jobs."""
        return workflow_scene(self.scenario, self.simulator, env)
