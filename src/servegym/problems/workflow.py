"""Workflow: which ready stage of which job starts where, and when."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from servegym.baselines.workflow.online.registry import RULES
from servegym.clairvoyant.jobs import best_starts
from servegym.costs.step import StepCost
from servegym.errors import ConfigError
from servegym.export.ordering import SUFFIXES
from servegym.export.resolve import load_policy
from servegym.problems.job_figures import JOB_FIGURES, plot_devices
from servegym.problems.job_gantt import JobTrail
from servegym.problems.job_metrics import alone_s, measure_jobs
from servegym.problems.keys import jobs_key
from servegym.problems.objective import Objective
from servegym.problems.problem import (
    Column,
    Episodes,
    Played,
    Plot,
    Problem,
    Saturation,
)
from servegym.problems.problem import Scenario as AnyScenario
from servegym.typing import FloatArray
from servegym.workflow.online.policy import WorkflowPolicy
from servegym.workflow.online.run import run, time_decisions
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import Episode
from servegym.workflow_scenario import (
    WorkflowScenario,
    is_workflow_scenario,
    load_workflow_scenario,
    workflow_scenario_names,
)

#: By the name in scenario files.
OBJECTIVES = {
    "jct": Objective("jct", "jct_mean_s", "mean JCT", loss_form="mean JCT {:.3f} s"),
    "makespan": Objective("makespan", "makespan_s", "makespan", loss_form="makespan {:.3f} s"),
    "deadline": Objective(
        "deadline",
        "deadline_attainment",
        "deadline attainment",
        more_is_better=True,
        is_share=True,
        loss_form="{:.1%} of jobs in time",
    ),
}


class JobEpisodes(Episodes[WorkflowPolicy]):
    """Episodes of jobs on a fleet of devices."""

    def __init__(self, scenario: WorkflowScenario, episodes: Sequence[Episode]) -> None:
        """Keep what is to be played; episodes are of the scenario's fleet."""
        self.scenario = scenario
        self.episodes = list(episodes)

    @cached_property
    def _alone_s(self) -> list[FloatArray]:
        """Time of each job alone, the same under every policy."""
        return alone_s(self.scenario.spec, self.episodes)

    def run(self, policy: WorkflowPolicy, *, seed: int = 0) -> Simulator:
        """Play all episodes and return the simulator that did."""
        simulator = Simulator(self.scenario.spec, self.episodes)
        run(simulator, policy, seed=seed)
        return simulator

    def _metrics(self, simulator: Simulator) -> list[dict[str, float]]:
        return [measure_jobs(simulator, env, alone) for env, alone in enumerate(self._alone_s)]

    def play(self, policy: WorkflowPolicy, seed: int = 0) -> Played:
        """See `Episodes.play`; the trail is a `JobTrail`."""
        simulator = self.run(policy, seed=seed)
        return Played(self._metrics(simulator), self._trail(simulator))

    def clairvoyant(
        self, starts: Sequence[WorkflowPolicy], *, budget: float, seed: int = 0
    ) -> Played:
        """See `Episodes.clairvoyant`: a search through the starts of stages."""
        played = best_starts(
            self.scenario.spec,
            self.episodes,
            [(policy, self.run(policy, seed=seed)) for policy in starts],
            OBJECTIVES[self.scenario.objective].metric,
            budget=budget,
            seed=seed,
        )
        metrics = [
            measure_jobs(simulator, 0, alone)
            for simulator, alone in zip(played, self._alone_s, strict=True)
        ]
        return Played(metrics, self._trail(played[0]))

    def _trail(self, simulator: Simulator) -> JobTrail:
        """What figures need of the first episode, from a simulator that has played it."""
        episode, spec = self.episodes[0], self.scenario.spec
        edge = simulator.state.edge[0, : int(simulator.state.env[0]["num_edges"])]
        return JobTrail(
            simulator.jobs(0),
            simulator.stages(0),
            np.stack([edge["parent"], edge["child"]], axis=1),
            tuple(episode.jobs[i].template for i in episode.order.tolist()),
            tuple(spec.types[t].name for t in episode.type_idx.tolist()),
        )

    def losses(self, policy: WorkflowPolicy) -> FloatArray:
        """See `Episodes.losses`: the objective's own metric, a share negated."""
        objective = OBJECTIVES[self.scenario.objective]
        found = [metrics[objective.metric] for metrics in self._metrics(self.run(policy))]
        return objective.sign * np.array(found)

    def time_decisions(self, policy: WorkflowPolicy) -> FloatArray:
        """Measure single decisions in the first episode, seconds, `float64[n]`."""
        return time_decisions(policy, Simulator(self.scenario.spec, self.episodes[:1]))


class Workflow(Problem[WorkflowScenario, WorkflowPolicy]):
    """Which ready stage of which job starts on which device, or that all wait."""

    name = "workflow"
    decides = "which ready stage of which job starts where"
    unit = "jobs"
    load = "the arrival rate"
    rules = RULES
    default_policies = (*RULES, "srpt-cp-oracle", "mct-oracle")
    default_policy = "srpt-cp"
    columns = (
        Column("JCT s", "jct_mean_s", 1, 2),
        Column("p95", "jct_p95_s", 1, 1, dispensable=5),
        Column("p99", "jct_p99_s", 1, 1, dispensable=3),
        Column("slowdown", "slowdown_mean", 1, 2, dispensable=4),
        Column("makespan s", "makespan_s", 1, 1, dispensable=2),
        Column("in time %", "deadline_attainment", 100, 1),
        Column("busy %", "utilisation", 100, 1, dispensable=1),
    )
    counted = "all of their jobs counted; slowdown is against the job alone on the fastest devices"
    truth = "true durations, output lengths and hidden stages"
    figures = JOB_FIGURES
    plot = Plot(plot_devices)
    saturation = Saturation("deadline_attainment", "jobs in time")

    def scenario_names(self) -> list[str]:
        """Names of the bundled scenarios."""
        return workflow_scenario_names()

    def find(self, name_or_path: str) -> WorkflowScenario | None:
        """Load a bundled scenario or a YAML file; `None` if it is of another problem."""
        if not is_workflow_scenario(name_or_path):
            return None
        return load_workflow_scenario(name_or_path)

    def owns(self, scenario: AnyScenario) -> bool:
        """Whether a scenario is of jobs."""
        return isinstance(scenario, WorkflowScenario)

    def objective(self, scenario: WorkflowScenario) -> Objective:
        """Mean completion time, makespan, or the share of jobs in time."""
        return OBJECTIVES[scenario.objective]

    def fleet(self, scenario: WorkflowScenario) -> str:
        """Engines by GPU, other devices by name."""
        entries = [f"{entry.count} {entry.gpu}" for entry in scenario.engines]
        entries += [f"{entry.count} {entry.name}" for entry in scenario.devices]
        return ", ".join(entries)

    def pace(self, scenario: WorkflowScenario) -> str:
        """Rate of arrivals."""
        rate = scenario.rate_jobs_per_s
        return "all at 0" if rate is None else f"{rate:g} jobs/s"

    def resolve(self, text: str) -> WorkflowPolicy:
        """Return a rule by name and parameters, or a learned scheduler by its file."""
        if text.endswith(SUFFIXES):
            return load_policy(Path(text), "workflow")
        return RULES.make(text)

    def episodes(
        self,
        scenario: WorkflowScenario,
        seeds: Sequence[int],
        *,
        load: float = 1.0,
        num_units: int | None = None,
    ) -> JobEpisodes:
        """Draw the episodes of seeds at a load."""
        drawn = [scenario.episode(seed, load=load, num_jobs=num_units) for seed in seeds]
        return JobEpisodes(scenario, drawn)

    def key(
        self, scenario: WorkflowScenario, seed: int, load: float, num_units: int | None
    ) -> bytes:
        """Name an episode: those with equal keys are the same."""
        return jobs_key(scenario.episode(seed, load=load, num_jobs=num_units))

    def require_saturation(self, scenario: WorkflowScenario) -> Saturation:
        """Refuse jobs that have no deadlines, or all arrive together."""
        jobs = scenario.draw_jobs(0, scenario.num_jobs)
        if scenario.rate_jobs_per_s is None or not any(np.isfinite(j.deadline_s) for j in jobs):
            raise ConfigError(
                f"jobs of {scenario.name} have no deadlines or no rate of arrival, so that there is"
                " no largest load: leave --saturation out"
            )
        return super().require_saturation(scenario)

    def step_costs(self, scenario: WorkflowScenario) -> dict[str, StepCost]:
        """What a step costs on each kind of engine, by its GPU."""
        return scenario.step_costs()
