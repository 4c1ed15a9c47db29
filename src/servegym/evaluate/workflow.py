"""Online schedulers of jobs x loads x seeds, with the same jobs under every policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from servegym.errors import ConfigError
from servegym.evaluate.compare import with_interval
from servegym.evaluate.harness import FIRST_SEED, Evaluation, Run
from servegym.evaluate.repeats import jobs_key, plan
from servegym.typing import FloatArray, IntArray
from servegym.workflow.online.policy import Rule, WorkflowPolicy
from servegym.workflow.online.run import run, time_decisions
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import Episode, FleetSpec
from servegym.workflow_scenario import WorkflowScenario

#: Metric that an objective is judged by, its name in tables, and whether more is better.
OBJECTIVES = {
    "jct": ("jct_mean_s", "mean JCT", False),
    "makespan": ("makespan_s", "makespan", False),
    "deadline": ("deadline_attainment", "deadline attainment", True),
}
#: Column heading, metric, factor and digits.
COLUMNS = (
    ("JCT s", "jct_mean_s", 1, 2),
    ("p95", "jct_p95_s", 1, 1),
    ("p99", "jct_p99_s", 1, 1),
    ("slowdown", "slowdown_mean", 1, 2),
    ("makespan s", "makespan_s", 1, 1),
    ("in time %", "deadline_attainment", 100, 1),
    ("busy %", "utilisation", 100, 1),
)


@dataclass(frozen=True)
class JobTrail:
    """What plots need of one run.

    Attributes:
        jobs: `JOB_OUTCOME_DTYPE[num_jobs]`.
        stages: `STAGE_OUTCOME_DTYPE[num_stages]`.
        edge: Parent and child of each edge, numbers of stages, `int64[num_edges, 2]`.
        templates: Name of each job's template.
        devices: Name of each device's type.
    """

    jobs: NDArray[np.void]
    stages: NDArray[np.void]
    edge: IntArray
    templates: tuple[str, ...]
    devices: tuple[str, ...]


@dataclass
class WorkflowEvaluation(Evaluation):
    """All runs of a comparison of online schedulers; `scenario` is a `WorkflowScenario`.

    Attributes:
        job_trails: The first seed's run by (policy, load).
    """

    scenario: WorkflowScenario  # type: ignore[assignment]  # in place of one of requests
    job_trails: dict[tuple[str, float], JobTrail] = field(default_factory=dict)

    @property
    def trace(self) -> None:
        """Jobs come from no trace."""
        return None

    @property
    def judged_by(self) -> str:
        """The metric of the scenario's objective."""
        return OBJECTIVES[self.scenario.objective][0]

    @property
    def judged_name(self) -> str:
        """What tables call that metric."""
        return OBJECTIVES[self.scenario.objective][1]

    @property
    def judged_by_share(self) -> bool:
        """Whether that metric is a share, the more the better: compared by differences."""
        return OBJECTIVES[self.scenario.objective][2]

    def against(self, policy: str, reference: str, load: float) -> tuple[float, float, float]:
        """Paired comparison by the objective, with its 95 % interval.

        Returns:
            Percentage points above the reference if the objective is a share, else the ratio.
        """
        if self.judged_by_share:
            value, low, high, _ = self.difference(policy, reference, load)
            return 100 * value, 100 * low, 100 * high
        value, low, high, _ = self.ratio(policy, reference, load)
        return value, low, high

    @property
    def against_heading(self) -> str:
        """Heading of a column of such comparisons."""
        return "points" if self.judged_by_share else "ratio"

    def against_text(self, policy: str, reference: str, load: float) -> str:
        """Return such a comparison as tables show it."""
        if self.judged_by_share:
            return with_interval(self.difference(policy, reference, load), "+.1f", 100)
        return with_interval(self.ratio(policy, reference, load))

    def ranking(self, load: float) -> list[tuple[str, str]]:
        """Name and information class of all policies, the best by the objective first."""
        sign = -1 if self.judged_by_share else 1
        return sorted(self.policies, key=lambda p: sign * self.mean(p[0], load, self.judged_by))


def alone_s(spec: FleetSpec, episodes: Sequence[Episode]) -> list[FloatArray]:
    """Time of each job on the fastest devices, with no data to move and nobody else there.

    Args:
        spec: The fleet.
        episodes: What is played.

    Returns:
        Seconds, `float64[num_jobs]` an episode: the longest way through the true job.
    """
    simulator = Simulator(spec, episodes)
    simulator.tell_truth()
    found = []
    for env, episode in enumerate(episodes):
        rows = simulator.state.job[env, : episode.num_jobs]
        tail_s = simulator.state.stage["tail_s"][env]
        ends = rows["first_stage"] + rows["num_stages"]
        ways = zip(rows["first_stage"].tolist(), ends.tolist(), strict=True)
        found.append(np.array([tail_s[first:stop].max() for first, stop in ways]))
    return found


def measure_jobs(simulator: Simulator, env: int, alone_s: FloatArray) -> dict[str, float]:
    """Reduce a drained episode to numbers.

    Args:
        simulator: That played it.
        env: Its environment.
        alone_s: Time of each job alone, see `alone_s`.

    Returns:
        Metrics by name; see docs/workflow-online.md.
    """
    jobs, stages, devices = simulator.jobs(env), simulator.stages(env), simulator.devices(env)
    jct_s = jobs["finish_s"] - jobs["arrival_s"]
    late_s = np.maximum(0.0, jct_s - jobs["deadline_s"])
    span_s = float(jobs["finish_s"].max() - jobs["arrival_s"].min())
    prompts = float(stages["prompt_tokens"].sum())
    on_device = stages["device"] >= 0
    waits_s = (stages["start_s"] - stages["ready_s"])[on_device]
    out = {
        "jct_mean_s": float(jct_s.mean()),
        **{f"jct_p{q}_s": float(np.percentile(jct_s, q)) for q in (50, 90, 95, 99)},
        "weighted_jct_mean_s": float(np.average(jct_s, weights=jobs["weight"])),
        "slowdown_mean": float((jct_s / np.maximum(alone_s, 1e-12)).mean()),
        "makespan_s": span_s,
        "throughput_jobs_per_s": len(jobs) / span_s if span_s > 0 else float("nan"),
        "deadline_attainment": float(
            np.average(jct_s <= jobs["deadline_s"], weights=jobs["weight"])
        ),
        "tardiness_mean_s": float(late_s.mean()),
        "utilisation": float(devices["busy_s"].mean() / span_s) if span_s > 0 else float("nan"),
        "wait_mean_s": float(waits_s.mean()) if len(waits_s) else 0.0,
        "in_system_mean": float(jct_s.sum() / span_s) if span_s > 0 else float("nan"),
        "prefix_hit_rate": float(stages["cached_tokens"].sum()) / prompts
        if prompts
        else float("nan"),
        "restarts": float(stages["num_restarts"].sum()),
        "decisions": float(simulator.state.env[env]["num_decisions"]),
    }
    for t, kind in enumerate(simulator.spec.types):
        mine = devices["type_idx"] == t
        if mine.any() and span_s > 0:
            out[f"utilisation_{kind.name}"] = float(devices["busy_s"][mine].mean() / span_s)
    return out


def _trail(simulator: Simulator) -> JobTrail:
    """Keep what happened in the first environment."""
    episode, spec = simulator.episodes[0], simulator.spec
    edge = simulator.state.edge[0, : int(simulator.state.env[0]["num_edges"])]
    return JobTrail(
        simulator.jobs(0),
        simulator.stages(0),
        np.stack([edge["parent"], edge["child"]], axis=1),
        tuple(episode.jobs[i].template for i in episode.order.tolist()),
        tuple(spec.types[t].name for t in episode.type_idx.tolist()),
    )


def evaluate_workflows(
    scenario: WorkflowScenario,
    policies: Sequence[WorkflowPolicy],
    *,
    loads: Sequence[float] = (1.0,),
    num_seeds: int = 10,
    first_seed: int = FIRST_SEED,
    num_jobs: int | None = None,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> WorkflowEvaluation:
    """Play every policy on the same episodes.

    Args:
        scenario: What to play.
        policies: What to compare; names must differ.
        loads: Factors on the arrival rate.
        num_seeds: Episodes per load.
        first_seed: Their seeds count from here.
        num_jobs: Jobs per episode, else the scenario's own.
        progress: Called with what is done and the share of the work.
    """
    names = [p.name for p in policies]
    if not policies or len(set(names)) < len(names):
        raise ConfigError(f"there must be policies, each with its own name, got {names}")
    if not loads or len(set(loads)) < len(loads):
        raise ConfigError(f"loads must be given, each once, got {list(loads)}")
    if num_seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {num_seeds}")
    asked = [first_seed + i for i in range(num_seeds)]
    seeds, loads, notes = plan(
        lambda seed, load: scenario.episode(seed, load=load, num_jobs=num_jobs),
        jobs_key,
        asked,
        loads,
    )
    result = WorkflowEvaluation(
        scenario,
        [(p.name, p.information) for p in policies],
        loads,
        seeds,
        seeds_asked=num_seeds,
        notes=notes,
        learned=[p.name for p in policies if getattr(p, "learned", False)],
    )
    done = 0
    for load in loads:
        episodes = [scenario.episode(s, load=load, num_jobs=num_jobs) for s in seeds]
        alone = alone_s(scenario.spec, episodes)
        for policy in policies:
            progress(f"{policy.name} at load {load:g}", done / (len(loads) * len(policies)))
            simulator = Simulator(scenario.spec, episodes)
            run(simulator, policy, seed=first_seed)
            for env, seed in enumerate(seeds):
                metrics = measure_jobs(simulator, env, alone[env])
                result.runs.append(Run(policy.name, load, seed, metrics))
            result.job_trails[policy.name, load] = _trail(simulator)
            if policy.name not in result.decision_s:
                taken = time_decisions(policy, Simulator(scenario.spec, episodes[:1]))
                result.decision_s[policy.name] = (
                    float(np.median(taken)),
                    float(np.percentile(taken, 99)),
                )
            done += 1
    progress("done", 1.0)
    return result


def tuned_by_replay(
    scenario: WorkflowScenario,
    make: Callable[[str], Rule],
    name: str,
    ranges: dict[str, tuple[float, float, bool]],
    *,
    loads: Sequence[float] = (1.0,),
    num_seeds: int = 3,
    num_values: int = 10,
    num_jobs: int | None = None,
) -> str:
    """Try values of a rule's parameters on training episodes; return the best as a policy's text.

    Args:
        scenario: What to play; its objective judges.
        make: Makes a rule from its text.
        name: Of the rule.
        ranges: `(low, high, logarithmic)` of its parameters, which are tried one after the other.
        loads: Over which the objective is averaged.
        num_seeds: Training episodes per load; held-out ones have other seeds.
        num_values: Values of each parameter, evenly spaced.
        num_jobs: Jobs per episode, else the scenario's own.
    """
    found: dict[str, float] = {}
    more = OBJECTIVES[scenario.objective][2]
    for key, (low, high, logarithmic) in ranges.items():
        space = np.geomspace if logarithmic else np.linspace
        texts = {
            round(float(value), 6): _text(name, {**found, key: round(float(value), 6)})
            for value in space(low, high, num_values)
        }
        result = evaluate_workflows(
            scenario,
            [make(text) for text in texts.values()],
            loads=loads,
            num_seeds=num_seeds,
            first_seed=0,
            num_jobs=num_jobs,
        )

        def score(
            value: float, result: Evaluation = result, texts: dict[float, str] = texts
        ) -> float:
            of = [result.mean(texts[value], load, result.judged_by) for load in result.loads]
            return float(np.mean(of)) * (-1 if more else 1)

        found[key] = min(texts, key=score)
    return _text(name, found)


def _text(name: str, values: dict[str, float]) -> str:
    return f"{name}:" + ",".join(f"{key}={value:g}" for key, value in values.items())


def workflow_table(result: WorkflowEvaluation, load: float) -> Table:
    """Tabulate one load, best first by the scenario's objective."""
    best = result.best_heuristic(load)
    relation = "minus" if result.judged_by_share else "over"
    table = Table(
        title=f"{result.scenario.name}, load {load:g}: {result.averaged}",
        caption=f"{result.against_heading}: {result.judged_name} {relation} that of {best}"
        f" (best rule, no oracle){result.interval_suffix}",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    table.add_column("policy", overflow="fold", max_width=36)
    table.add_column("knows", no_wrap=True)
    for heading, *_ in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(result.against_heading, justify="right", no_wrap=True)
    for name, information in result.ranking(load):
        cells = [f"{k * result.mean(name, load, m):,.{d}f}" for _, m, k, d in COLUMNS]
        style = "bold" if name in result.learned else ("dim" if information == "oracle" else "")
        table.add_row(name, information, *cells, result.against_text(name, best, load), style=style)
    return table
