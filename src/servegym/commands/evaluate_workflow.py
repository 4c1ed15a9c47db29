"""`servegym evaluate` for a scenario of jobs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from rich.progress import Progress, track

from servegym.baselines.workflow.online.registry import (
    ONLINE_RANGES,
    ONLINE_RULES,
    online_rule,
)
from servegym.commands.console import make_console, print_remarks
from servegym.errors import ConfigError
from servegym.evaluate.document import write_json
from servegym.evaluate.saturation import require_limits, saturation_load_of_jobs
from servegym.evaluate.table import saturation_table
from servegym.evaluate.workflow import (
    WorkflowEvaluation,
    evaluate_workflows,
    tuned_by_replay,
    workflow_table,
)
from servegym.workflow.online.policy import Rule, WorkflowPolicy
from servegym.workflow_scenario import WorkflowScenario, load_workflow_scenario

#: What is compared unless policies are named: all rules, and what the truth is worth to two.
DEFAULT_WORKFLOW_POLICIES = (*ONLINE_RULES, "srpt-cp-oracle", "mct-oracle")
_TUNED = ":tuned"


def evaluate_jobs(
    name_or_path: str,
    policies: Sequence[str],
    loads: tuple[float, ...],
    seeds: int,
    num_jobs: int | None,
    json: Path | None = None,
    report: Path | None = None,
    plot: Path | None = None,
    saturation: bool = False,
) -> WorkflowEvaluation:
    """Compare online schedulers on the same jobs: tables, and the files asked for."""
    scenario = load_workflow_scenario(name_or_path)
    if saturation:
        require_limits(scenario)
    chosen = [resolve_online(text, scenario, loads, num_jobs) for text in policies]
    console = make_console()
    with Progress(transient=True) as bar:
        task = bar.add_task("evaluate", total=1.0)
        result = evaluate_workflows(
            scenario,
            chosen,
            loads=loads,
            num_seeds=seeds,
            num_jobs=num_jobs,
            progress=lambda text, share: bar.update(task, description=text, completed=share),
        )
    if saturation:
        for policy in track(chosen, "saturation", transient=True):
            result.saturation[policy.name] = {
                share: saturation_load_of_jobs(scenario, policy, share, num_jobs=num_jobs)
                for share in (0.9, 0.99)
            }
    print_remarks(console, result.notes)
    for load in result.loads:
        console.print(workflow_table(result, load))
    if saturation:
        console.print(saturation_table(result, "jobs"))
    if json:
        write_json(result, json)
        console.print(f"numbers: {json}")
    if report:
        from servegym.evaluate.workflow_report import write_workflow_report

        write_workflow_report(result, report)
        console.print(f"report: {report}")
    if plot:
        _draw(result, plot)
        console.print(f"chart: {plot}")
    return result


def _draw(result: WorkflowEvaluation, path: Path) -> None:
    """Draw what the devices do under a learned policy, the best rule and the worst policy."""
    from servegym.evaluate.plots import save_figure
    from servegym.evaluate.workflow_gantt import draw_episodes

    top = result.loads[-1]
    worst = result.ranking(top)[-1][0]
    names = dict.fromkeys([*result.learned[:1], result.best_heuristic(top), worst])
    figure = draw_episodes(result, top, list(names))
    save_figure(figure, path)


def resolve_online(
    text: str, scenario: WorkflowScenario, loads: tuple[float, ...], num_jobs: int | None
) -> WorkflowPolicy:
    """Make an online rule; `NAME:tuned` replays training episodes to find its parameters.

    Raises:
        ConfigError: If there is no such rule, or it has nothing to tune.
        ExportError: If a file `*.onnx` is no exported scheduler of jobs.
    """
    if text.endswith(".onnx"):
        # compiled when it is imported: not for those who only compare rules
        from servegym.export.workflow import read_scheduler

        return read_scheduler(Path(text))
    if not text.endswith(_TUNED):
        return online_rule(text)
    name = text.removesuffix(_TUNED)
    if name not in ONLINE_RANGES:
        raise ConfigError(f"{name} cannot be tuned: choose one of {', '.join(ONLINE_RANGES)}")
    found = tuned_by_replay(
        scenario,
        lambda given: cast("Rule", online_rule(given)),
        name,
        ONLINE_RANGES[name],
        loads=loads,
        num_jobs=num_jobs,
    )
    return online_rule(found)
