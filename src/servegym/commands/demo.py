"""`servegym demo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from servegym.commands.console import make_console, print_remarks
from servegym.commands.evaluate import evaluated, publish
from servegym.commands.train import require_torch, trained
from servegym.commands.workload import TRACE_OPTIONS, Played, chosen_scenario
from servegym.evaluate.document import write_json
from servegym.evaluate.report import write_report
from servegym.evaluate.table import comparison_table
from servegym.export.resolve import resolve_policy

RULES = (
    "random",
    "round-robin",
    "least-outstanding",
    "power-of-two",
    "speed-family",
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


@dataclass(frozen=True)
class Demo(Played):
    """Train PPO briefly, compare it with the rules on held-out requests, export and reload it."""

    scenario: str = "slo-chat"
    """Bundled scenario name or YAML file; gives the fleet."""
    trace: str | None = None
    """Evaluate on this trace too, instead of the bundled synthetic one."""
    minutes: float = 2.0
    """Training time."""
    seeds: int = 5
    """Held-out episodes per load."""
    out: Path = field(default_factory=lambda: Path("runs/demo"))
    """Folder for everything."""

    def run(self) -> None:
        """Do it all."""
        require_torch()
        console = make_console()
        if self.trace is None:
            self.refuse(TRACE_OPTIONS, "is for a trace, and none is given with --trace")
            traced = chosen_scenario("azure-conv-fit")
        else:
            traced = self.chosen()  # what is wrong with it is said before minutes are spent
        console.rule("1. train")
        console.print(f"PPO on {self.scenario} for {self.minutes:g} minutes")
        path = trained(
            self.out / "ppo",
            base="added-delay",
            scenario=self.scenario,
            total_decisions=20_000_000,
            max_minutes=self.minutes,
            load=(0.8, 1.6),
        )
        console.rule("2. export and reload")
        policies = [resolve_policy(name) for name in RULES] + [resolve_policy(str(path))]
        console.print(f"exported to {path}, verified against PyTorch, reloaded with ONNX Runtime")
        console.rule("3. evaluate on held-out seeds")
        scenario = chosen_scenario(self.scenario)
        result = evaluated(scenario, policies, (1.0, 1.3, 1.6), self.seeds)
        publish(result, self.out / "results.json", self.out / "report.html")
        console.rule("4. evaluate on " + (self.trace or "the bundled synthetic trace"))
        on_trace = evaluated(traced, policies, (1.0,), self.seeds)
        print_remarks(console, on_trace.notes)
        console.print(comparison_table(on_trace, 1.0, console.width))
        write_json(on_trace, self.out / "results-trace.json")
        write_report(on_trace, self.out / "report-trace.html")
        console.rule("where everything is")
        for what in ("report.html", "report-trace.html", "results.json", "results-trace.json"):
            console.print(f"  {self.out / what}")
        console.print(f"  {path} and manifest.json: use it with --policies {path}")
        console.print(f"  tensorboard --logdir {self.out / 'ppo'}")
