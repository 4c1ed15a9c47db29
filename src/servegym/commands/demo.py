"""`servegym demo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from servegym.agents.network_config import NetworkConfig
from servegym.commands.console import make_console, print_remarks
from servegym.commands.evaluate import differences, evaluated, publish
from servegym.commands.sitting import trained
from servegym.commands.train import require_torch
from servegym.commands.workload import TRACE_OPTIONS, Played
from servegym.evaluate.document import write_json
from servegym.evaluate.harness import Evaluation
from servegym.evaluate.report import write_report
from servegym.evaluate.table import comparison_table
from servegym.problems.problem import AnyProblem
from servegym.problems.registry import load_problem
from servegym.scenario import Scenario
from servegym.train.registry import Entry, find_trainer

#: Rules tuned for the bundled scenario of the demonstration (EXPERIMENTS.md has the commands); the
#: network starts from the first.
_TUNED = {
    "azure-conv-fit": (
        "added-delay:prefill=1.263,decode=0.07108",
        "added-delay-inferred:prefill=1.263,decode=0.07108",
        "speed-family:eta=1.069",
        "hexgen:alpha=0.2685",
        "prefix-load:weight=0.2615,eta=0.9778",
        "dynamo:overlap=0.6338,prefill_scale=6.539,per_request=8.667",
        "llm-d:queue=0.711,kv=6.539,prefix=4.896",
        "sglang:cache_threshold=0.3213,balance_abs=2.198,balance_rel=1.071",
    ),
}


class _Plan(NamedTuple):
    """How a demonstration goes.

    Attributes:
        learner: What trains.
        load: Range of the loads that are trained on.
        loads: Those of the comparison.
        network: Settings of the network that differ from the trainer's own.
    """

    learner: str | None
    load: tuple[float, float]
    loads: tuple[float, ...]
    network: dict[str, NetworkConfig]


@dataclass(frozen=True)
class Demo(Played):
    """Train a policy briefly, export and reload it, compare it with the rules on held-out seeds."""

    scenario: str = "azure-conv-fit"
    """Bundled scenario name or YAML file, of any problem."""
    trace: str | None = None
    """Evaluate a dispatcher on this trace too."""
    minutes: float = 1.5
    """Training time, at most."""
    seeds: int = 8
    """Held-out episodes per load."""
    out: Path = field(default_factory=lambda: Path("runs/demo"))
    """Folder for everything."""

    def run(self) -> None:
        """Do it all."""
        require_torch()
        console = make_console()
        problem, scenario = load_problem(self.scenario)
        traced = self._traced()  # what is wrong with it is said before minutes are spent
        tuned = _TUNED.get(self.scenario, ())
        plan = _plan(problem, scenario, tuned)
        entry = find_trainer(problem.name, plan.learner, scenario)
        console.rule("1. train")
        console.print(f"{problem.name} on {self.scenario} for {self.minutes:g} minutes")
        run_folder, path = self._train(entry, plan)
        console.rule("2. export and reload")
        texts = (*problem.compared(scenario), *tuned, str(path))
        policies = [problem.resolve(text) for text in texts]
        console.print(f"exported to {path}, verified, and reloaded as `servegym evaluate` does")
        console.rule("3. evaluate on held-out seeds")
        result = evaluated(scenario, policies, plan.loads, self.seeds)
        sections = differences(result, policies)
        publish(result, self.out / "results.json", self.out / "report.html", sections)
        for text in (*_verdicts(result), *(x for s in sections for x in s.sentences)):
            console.print(text)
        written = ["report.html", "results.json"]
        if traced is not None:
            console.rule(f"4. evaluate on {self.trace}")
            on_trace = evaluated(traced, policies, (1.0,), self.seeds)
            print_remarks(console, on_trace.notes)
            console.print(comparison_table(on_trace, 1.0, console.width))
            write_json(on_trace, self.out / "results-trace.json")
            write_report(on_trace, self.out / "report-trace.html")
            written += ["report-trace.html", "results-trace.json"]
        console.rule("where everything is")
        for what in written:
            console.print(f"  {self.out / what}")
        console.print(f"  {path} and manifest.json: use it with --policies {path}")
        console.print(f"  tensorboard --logdir {run_folder}")

    def _train(self, entry: Entry, plan: _Plan) -> tuple[Path, Path]:
        """Train and export; return the run's folder and the policy's file."""
        settings = entry.settings(
            scenario=self.scenario, max_minutes=self.minutes, load=plan.load, **plan.network
        )
        run_folder = self.out / entry.folder
        return run_folder, trained(entry.trainer(settings, run_folder))

    def _traced(self) -> Scenario | None:
        """Load what is evaluated besides the scenario, if anything is."""
        if self.trace is None:
            self.refuse(TRACE_OPTIONS, "is for a trace, and none is given with --trace")
            return None
        _, traced = self.posed()
        found: Scenario = traced
        return found


def _plan(problem: AnyProblem, scenario: Any, tuned: Sequence[str]) -> _Plan:
    if problem.name != "dispatch":
        return _Plan(None, (0.8, 1.6), (1.0, 1.3, 1.6), {})
    if scenario.orders_fleet or scenario.spec.disaggregated:
        return _Plan(None, (0.8, 1.25), (1.0, 1.2), {})
    network = {"network": NetworkConfig(base=tuned[0])} if tuned else {}
    if scenario.objective == "goodput":
        return _Plan("counterfactual", (0.8, 1.6), (1.0, 1.3, 1.6), network)
    return _Plan("counterfactual", (0.6, 1.1), (1.0,), network)


def _verdicts(result: Evaluation) -> list[str]:
    """Say of each learned policy how it stands to the best rule."""
    objective, said = result.objective, []
    for load in result.loads:
        best = result.best_heuristic(load)
        said += [
            f"Load {load:g}: {objective.label} of {name} {objective.relation} that of {best}, the"
            f" best of these rules, tuned ones included: {result.against_text(name, best, load)}"
            for name in result.learned
        ]
    return said
