"""`servegym schedule`."""

from __future__ import annotations

import json as jsonlib
import math
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

import servegym
from servegym.baselines.workflow.cp_sat import cp_sat
from servegym.baselines.workflow.registry import EXACT_RULES, WorkflowRule, workflow_rule
from servegym.commands.console import make_console, print_remarks, require_writable
from servegym.commands.schedule_benchmark import Benchmark, run_benchmark
from servegym.drawing import PALETTE, pyplot, save_figure
from servegym.errors import ConfigError
from servegym.whole_files import write_whole
from servegym.workflow.bounds import critical_path_s, lower_bound_s
from servegym.workflow.gantt_page import gantt_page
from servegym.workflow.graph import Workflow
from servegym.workflow.plot import draw_gantt
from servegym.workflow.reader import read_workflow
from servegym.workflow.schedule import Schedule
from servegym.workflow.shop_jobs import schedule_shop
from servegym.workflow.tardiness import due_date_scores
from servegym.workflow.wfformat import Fleet

#: A page, or what matplotlib writes; another one is refused before any work.
_PLOT_SUFFIXES = (".html", ".png", ".pdf", ".svg")
#: Options that say on which devices a file runs that names none.
_FLEET = ("speeds", "link_gb_per_s", "link_latency_s")


@dataclass(frozen=True)
class ScheduleDag:
    """Schedule a DAG of tasks on heterogeneous devices with HEFT and others, and compare."""

    dag: Path | None = None
    """File with the DAG: servegym-dag-1, WfFormat or a job shop; see docs/workflow.md."""
    benchmark: Benchmark | None = None
    """Instead of a file: gaps to the best known, on Taillard's job shops or single machines."""
    instances: str = "1-50"
    """Of the benchmark, numbers and ranges: taillard has 80, tardiness 75."""
    policies: tuple[str, ...] = ("heft", "cpop", "peft")
    """Rules, separated by commas or spaces, see docs/workflow.md; for job shops also exported
    schedulers (policy.onnx)."""
    speeds: tuple[float, ...] = (1.0, 1.0, 2.0, 4.0)
    """Devices for a WfFormat file: the speed of each against the machine of the record."""
    link_gb_per_s: float = 1.25
    """Bandwidth between those devices."""
    link_latency_s: float = 0.0
    """Latency between those devices."""
    time_limit_s: float = 10.0
    """Of cp-sat, for each schedule."""
    json: Path | None = None
    """Write assignment, start and finish of every task here; see docs/workflow.md."""
    plot: Path | None = None
    """Draw the Gantt charts here (html, png, pdf or svg)."""

    def run(self) -> None:
        """Schedule, print and write."""
        require_writable(self.json, self.plot)
        if self.plot and self.plot.suffix not in _PLOT_SUFFIXES:
            raise ConfigError(f"{self.plot} must end in {', '.join(_PLOT_SUFFIXES)}")
        if not 0.0 < self.time_limit_s < math.inf:
            raise ConfigError(f"time_limit_s must be above 0, got {self.time_limit_s:g}")
        if (self.dag is None) == (self.benchmark is None):
            raise ConfigError("give either --dag FILE or --benchmark taillard or tardiness")
        if self.benchmark:
            self._refuse(_FLEET, "for a WfFormat file")
            if self.plot:
                raise ConfigError("--plot draws the schedules of one DAG, not of a benchmark")
            rules = self._rules()
            run_benchmark(self.benchmark, self.instances, rules, self.time_limit_s, self.json)
            return
        assert self.dag is not None
        self._refuse(("instances",), "for a benchmark")
        fleet = None
        if self._given(_FLEET):
            fleet = Fleet(self.speeds, self.link_gb_per_s * 1e9, self.link_latency_s)
        rules = self._rules()
        workflow = read_workflow(self.dag, fleet)
        schedules = {name: rule(workflow) for name, rule in rules.items()}
        console = make_console()
        g = workflow.graph
        if g.over_link.any() and not g.data_bytes.any():
            remark = f"no edge of {workflow.name} carries data: its links make no difference"
            print_remarks(console, [remark])
        console.print(schedules_table(workflow, schedules))
        if self.json:
            document = schedule_document(self.dag, workflow, schedules)
            write_whole({self.json: (jsonlib.dumps(document, indent=1) + "\n").encode()})
            console.print(f"numbers: {self.json}")
        if self.plot:
            draw_schedules(schedules, self.plot)
            console.print(f"chart: {self.plot}")

    def _given(self, options: tuple[str, ...]) -> list[str]:
        usual = {f.name: f.default for f in fields(self)}
        return [option for option in options if getattr(self, option) != usual[option]]

    def _refuse(self, options: tuple[str, ...], what: str) -> None:
        for option in self._given(options):
            raise ConfigError(f"--{option.replace('_', '-')} is {what}: leave it out")

    def _rules(self) -> dict[str, WorkflowRule]:
        names = [name for text in self.policies for name in text.split(",") if name]
        if not names:
            raise ConfigError("give at least one policy")
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"policy {name} is given twice")
        return dict(self._rule(name) for name in names)

    def _rule(self, name: str) -> tuple[str, WorkflowRule]:
        if name.endswith(".onnx"):
            # compiled when it is imported: not for those who only compare rules
            from servegym.export.workflow import read_scheduler

            policy = read_scheduler(Path(name))
            return policy.name, partial(schedule_shop, policy=policy)
        if name in EXACT_RULES:
            return name, partial(cp_sat, time_limit_s=self.time_limit_s)
        return name, workflow_rule(name)


def schedules_table(workflow: Workflow, schedules: dict[str, Schedule]) -> Table:
    """Return one line a policy: how long, and how good."""
    table = Table(
        title=f"{workflow.name}: {workflow.num_tasks} tasks on {workflow.num_devices} devices;"
        f" no schedule takes less than {lower_bound_s(workflow):.6g} s"
    )
    table.add_column("policy")
    for header in ("makespan, s", "SLR", "speed-up", "efficiency", "mean flow, s"):
        table.add_column(header, justify="right")
    if workflow.due_s is not None:
        for header in ("tardiness, s", "late", "max lateness, s"):
            table.add_column(header, justify="right")
    table.add_column("status")
    for name, schedule in schedules.items():
        bound = "" if schedule.bound_s is None else f", bound {schedule.bound_s:.6g} s"
        table.add_row(
            name,
            f"{schedule.makespan_s:.6g}",
            *(
                f"{x:.4g}" if math.isfinite(x) else "-"
                for x in (schedule.slr, schedule.speedup, schedule.efficiency)
            ),
            f"{schedule.mean_flow_s:.6g}",
            *_due_date_cells(schedule),
            schedule.status + bound,
        )
    return table


def schedule_document(
    dag: Path, workflow: Workflow, schedules: dict[str, Schedule]
) -> dict[str, Any]:
    """Return the schedules as plain data; the schema is described in docs/workflow.md."""
    return {
        "schema": "servegym-schedule-1",
        "servegym_version": servegym.__version__,
        "command": " ".join(sys.argv[1:]),
        "dag": str(dag),
        "name": workflow.name,
        "devices": list(workflow.devices),
        "critical_path_s": critical_path_s(workflow),
        "lower_bound_s": lower_bound_s(workflow),
        "schedules": [
            {
                "policy": name,
                "status": schedule.status,
                "bound_s": schedule.bound_s,
                "makespan_s": schedule.makespan_s,
                "slr": _number(schedule.slr),
                "speedup": _number(schedule.speedup),
                "efficiency": _number(schedule.efficiency),
                "mean_flow_s": schedule.mean_flow_s,
                "due_dates": due_date_scores(schedule)._asdict()
                if workflow.due_s is not None
                else None,
                "tasks": [
                    {
                        "task": workflow.tasks[v],
                        "device": workflow.devices[schedule.device_idx[v]],
                        "start_s": float(schedule.start_s[v]),
                        "finish_s": float(schedule.finish_s[v]),
                    }
                    for v in range(workflow.num_tasks)
                ],
            }
            for name, schedule in schedules.items()
        ],
    }


def draw_schedules(schedules: dict[str, Schedule], path: Path) -> None:
    """Draw a Gantt chart of each schedule, one below the other, on the same time axis."""
    if path.suffix == ".html":
        write_whole({path: gantt_page(schedules, PALETTE[:7]).encode()})
        return
    plt = pyplot()
    rows = len(next(iter(schedules.values())).workflow.devices)
    height = 0.8 + 0.3 * rows
    figure, axes = plt.subplots(
        len(schedules), 1, figsize=(12, height * len(schedules)), squeeze=False
    )
    span_s = max(schedule.makespan_s for schedule in schedules.values()) or 1.0
    for axis, (name, schedule) in zip(axes[:, 0], schedules.items(), strict=True):
        draw_gantt(axis, schedule, PALETTE[:7], span_s)
        axis.set_title(f"{name}, {schedule.makespan_s:.6g} s", loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("s")
    figure.tight_layout()
    save_figure(figure, path)


def _due_date_cells(schedule: Schedule) -> list[str]:
    if schedule.workflow.due_s is None:
        return []
    scores = due_date_scores(schedule)
    return [f"{scores.tardiness_s:.6g}", str(scores.num_late), f"{scores.max_lateness_s:.6g}"]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
