"""`servegym evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress, track

from servegym.baselines.ordering.registry import ordering_names
from servegym.commands.console import make_console, print_remarks, require_writable
from servegym.commands.evaluate_workflow import DEFAULT_WORKFLOW_POLICIES, evaluate_jobs
from servegym.commands.schedule import ScheduleDag
from servegym.commands.workload import TRACE_OPTIONS, Played
from servegym.errors import ConfigError
from servegym.evaluate.document import write_json
from servegym.evaluate.harness import Evaluation, evaluate
from servegym.evaluate.ordering import tuned_order
from servegym.evaluate.saturation import require_rate, saturation_load
from servegym.evaluate.table import comparison_table, saturation_table
from servegym.export.resolve import resolve_order, resolve_policy
from servegym.policy.ordering import OrderingPolicy
from servegym.policy.policy import Policy
from servegym.scenario import Scenario
from servegym.workflow_scenario import is_workflow_scenario

DEFAULT_POLICIES = (
    "random",
    "round-robin",
    "least-outstanding",
    "power-of-two",
    "speed-family",
    "token-least-load",
    "least-work-left",
    "sglang",
    "llm-d",
    "dynamo",
    "prefix-load",
    "added-delay",
    "hexgen",
    "mct",
    "mct-oracle",
)

#: Where what is decided is the order inside one engine.
DEFAULT_ORDERS = (*ordering_names(), "srpt-oracle")
_TUNED = ":tuned"

#: Instead of a scenario: Taillard's first 50, as `servegym schedule --benchmark` has them.
_JOB_SHOPS = "taillard"
_JOB_SHOP_RULES = ("spt", "lpt", "fifo", "mwkr", "lwkr", "mopnr", "lopnr", "heft")
#: What matplotlib writes.
_PLOT_SUFFIXES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Evaluate(Played):
    """Compare policies on the same requests: a table, JSON and a report page."""

    scenario: str = "mixed-chat"
    """Bundled scenario name or YAML file; gives the fleet. Also `taillard`: gaps of schedulers to
    the best known on 50 job shops."""
    policies: tuple[str, ...] = DEFAULT_POLICIES
    """Rules (see `servegym policies`) and exported policy.onnx files; for jobs those of
    docs/workflow-online.md, for one engine those of docs/preemption.md and ordering.npz files.
    `NAME:tuned` is tuned by replay, for jobs and engines."""
    loads: tuple[float, ...] = (0.6, 0.8, 1.0)
    """Factors on the arrival rate, or on the number of clients."""
    seeds: int = 10
    """Episodes per load, the same for every policy."""
    num_requests: int | None = None
    """Requests per episode (jobs, in a scenario of jobs), instead of the scenario's own number."""
    json: Path | None = None
    """Write all numbers here; see docs/evaluation.md."""
    report: Path | None = None
    """Write a self-contained HTML page here."""
    plot: Path | None = None
    """Draw what the devices do in a stretch of a scenario of jobs (png, pdf or svg)."""
    saturation: bool = False
    """Also find the largest load at which 90 % and 99 % of requests meet their limits (of jobs,
    their deadlines)."""

    def run(self) -> None:
        """Evaluate, print and write."""
        require_writable(self.json, self.report, self.plot)
        if self.scenario == _JOB_SHOPS:
            self._run_job_shops()
            return
        if is_workflow_scenario(self.scenario):
            self._run_jobs()
            return
        if self.plot:
            raise ConfigError("--plot is for scenarios of jobs: take --report")
        scenario = self.chosen()
        if self.saturation:
            require_rate(scenario)
        policies: list[Policy | OrderingPolicy]
        if scenario.orders_requests:
            policies = self._orders(scenario)
        else:
            policies = [resolve_policy(text) for text in self.policies]
        result = evaluated(
            scenario, policies, self.loads, self.seeds, num_requests=self.num_requests
        )
        if self.saturation:
            for policy in track(policies, "saturation", transient=True):
                result.saturation[policy.name] = {
                    share: saturation_load(scenario, policy, share, num_requests=self.num_requests)
                    for share in (0.9, 0.99)
                }
        publish(result, self.json, self.report)

    def _orders(self, scenario: Scenario) -> list[Policy | OrderingPolicy]:
        """Orders inside the one engine there is."""
        texts = self.policies
        if texts == DEFAULT_POLICIES:
            texts = DEFAULT_ORDERS
        return [
            resolve_order(
                tuned_order(
                    scenario,
                    text.removesuffix(_TUNED),
                    self.loads,
                    num_requests=self.num_requests,
                )
                if text.endswith(_TUNED)
                else text
            )
            for text in texts
        ]

    def _run_job_shops(self) -> None:
        """Nothing is drawn there: no loads, no seeds, and the answer is a gap to the best known."""
        others = ("trace", "num_requests", "report", "plot", "saturation", "loads", "seeds")
        self.refuse((*others, *TRACE_OPTIONS), "has no meaning for job shops")
        policies = self.policies
        if policies == DEFAULT_POLICIES:
            policies = _JOB_SHOP_RULES
        ScheduleDag(benchmark="taillard", policies=policies, json=self.json).run()

    def _run_jobs(self) -> None:
        if self.plot and self.plot.suffix not in _PLOT_SUFFIXES:
            raise ConfigError(f"{self.plot} must end in {', '.join(_PLOT_SUFFIXES)}")
        why = f"is for scenarios of requests, and {self.scenario} is one of jobs"
        self.refuse(("trace", *TRACE_OPTIONS), why)
        policies = self.policies
        if policies == DEFAULT_POLICIES:
            policies = DEFAULT_WORKFLOW_POLICIES
        evaluate_jobs(
            self.scenario,
            policies,
            self.loads,
            self.seeds,
            self.num_requests,
            json=self.json,
            report=self.report,
            plot=self.plot,
            saturation=self.saturation,
        )


def evaluated(
    scenario: Scenario,
    policies: Sequence[Policy | OrderingPolicy],
    loads: tuple[float, ...],
    seeds: int,
    *,
    num_requests: int | None = None,
) -> Evaluation:
    """Evaluate with a progress bar."""
    with Progress(transient=True) as bar:
        task = bar.add_task("evaluate", total=1.0)
        return evaluate(
            scenario,
            policies,
            loads=loads,
            num_seeds=seeds,
            num_requests=num_requests,
            progress=lambda text, share: bar.update(task, description=text, completed=share),
        )


def publish(result: Evaluation, json: Path | None, report: Path | None) -> None:
    """Print the tables and write the files asked for."""
    console = make_console()
    print_remarks(console, result.notes)
    for load in result.loads:
        console.print(comparison_table(result, load, console.width))
    if result.saturation:
        console.print(saturation_table(result))
    if json:
        write_json(result, json)
        console.print(f"numbers: {json}")
    if report:
        from servegym.evaluate.report import write_report

        write_report(result, report)
        console.print(f"report: {report}")
