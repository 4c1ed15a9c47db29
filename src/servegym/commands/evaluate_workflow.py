"""`servegym evaluate` for a scenario of jobs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from rich.progress import Progress

from servegym.baselines.workflow.online.registry import (
    ONLINE_RANGES,
    ONLINE_RULES,
    online_rule,
)
from servegym.commands.console import make_console
from servegym.errors import ConfigError
from servegym.evaluate.document import write_json
from servegym.evaluate.workflow import (
    WorkflowEvaluation,
    evaluate_workflows,
    tuned_by_replay,
    workflow_table,
)
from servegym.export.workflow import read_scheduler
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
    json: Path | None,
) -> WorkflowEvaluation:
    """Compare online schedulers on the same jobs: tables, and JSON if asked for."""
    scenario = load_workflow_scenario(name_or_path)
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
    for load in result.loads:
        console.print(workflow_table(result, load))
    if json:
        write_json(result, json)
        console.print(f"numbers: {json}")
    return result


def resolve_online(
    text: str, scenario: WorkflowScenario, loads: tuple[float, ...], num_jobs: int | None
) -> WorkflowPolicy:
    """Make an online rule; `NAME:tuned` replays training episodes to find its parameters.

    Raises:
        ConfigError: If there is no such rule, or it has nothing to tune.
        ExportError: If a file `*.onnx` is no exported scheduler of jobs.
    """
    if text.endswith(".onnx"):
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
