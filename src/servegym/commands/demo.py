"""`servegym demo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from servegym.commands.console import make_console, print_remarks
from servegym.commands.evaluate import evaluated, publish
from servegym.commands.sitting import trained
from servegym.commands.train import require_torch
from servegym.commands.workload import TRACE_OPTIONS, Played, chosen_scenario
from servegym.evaluate.document import write_json
from servegym.evaluate.report import write_report
from servegym.evaluate.table import comparison_table
from servegym.problems.registry import load_problem
from servegym.scenario import Scenario
from servegym.train.registry import TRAINERS

#: What dispatchers are also compared on, unless a trace is given.
_BUNDLED_TRACE = "azure-conv-fit"


@dataclass(frozen=True)
class Demo(Played):
    """Train a policy briefly, export and reload it, compare it with the rules on held-out seeds."""

    scenario: str = "slo-chat"
    """Bundled scenario name or YAML file, of any problem."""
    trace: str | None = None
    """Evaluate on this trace too; a dispatcher else on the bundled synthetic one."""
    minutes: float = 2.0
    """Training time, at most."""
    seeds: int = 5
    """Held-out episodes per load."""
    out: Path = field(default_factory=lambda: Path("runs/demo"))
    """Folder for everything."""

    def run(self) -> None:
        """Do it all."""
        require_torch()
        console = make_console()
        problem, scenario = load_problem(self.scenario)
        traced = self._traced(
            problem.name
        )  # what is wrong with it is said before minutes are spent
        entry = TRAINERS[problem.name]
        console.rule("1. train")
        console.print(f"{problem.name} on {self.scenario} for {self.minutes:g} minutes")
        settings = entry.settings(scenario=self.scenario, max_minutes=self.minutes, load=(0.8, 1.6))
        run_folder = self.out / entry.folder
        path = trained(entry.trainer(settings, run_folder))
        console.rule("2. export and reload")
        texts = (*problem.default_policies, str(path))
        policies = [problem.resolve(text) for text in texts]
        console.print(f"exported to {path}, verified, and reloaded as `servegym evaluate` does")
        console.rule("3. evaluate on held-out seeds")
        result = evaluated(scenario, policies, (1.0, 1.3, 1.6), self.seeds)
        publish(result, self.out / "results.json", self.out / "report.html")
        written = ["report.html", "results.json"]
        if traced is not None:
            console.rule("4. evaluate on " + (self.trace or "the bundled synthetic trace"))
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

    def _traced(self, problem: str) -> Scenario | None:
        """Load what is evaluated besides the scenario, if anything is."""
        if self.trace is None:
            self.refuse(TRACE_OPTIONS, "is for a trace, and none is given with --trace")
            return chosen_scenario(_BUNDLED_TRACE) if problem == "dispatch" else None
        _, traced = self.posed()
        found: Scenario = traced
        return found
