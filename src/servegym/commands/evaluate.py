"""`servegym evaluate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress, track

from servegym.commands.console import make_console, print_remarks, require_writable
from servegym.commands.schedule import ScheduleDag
from servegym.commands.workload import TRACE_OPTIONS, Played
from servegym.drawing import PLOT_SUFFIXES, save_figure
from servegym.errors import ConfigError
from servegym.evaluate.document import write_json
from servegym.evaluate.harness import Evaluation, evaluate
from servegym.evaluate.on_ray import evaluate_on_ray
from servegym.evaluate.saturation import saturation_load
from servegym.evaluate.stability import Stability, play_worlds
from servegym.evaluate.table import comparison_table, saturation_table, stability_table
from servegym.evaluate.tune import TUNED, resolve
from servegym.problems.problem import Policy, Scenario, Section

#: Instead of a scenario: Taillard's first 50, as `servegym schedule --benchmark` has them.
_JOB_SHOPS = "taillard"
_JOB_SHOP_RULES = ("spt", "lpt", "fifo", "mwkr", "lwkr", "mopnr", "lopnr", "heft")
#: Shares of an episode for which the largest load is searched.
_SHARES = (0.9, 0.99)


@dataclass(frozen=True)
class Evaluate(Played):
    """Compare policies on the same episodes: a table, JSON and a report page."""

    scenario: str = "mixed-chat"
    """Bundled scenario name or YAML file, of any problem. Also `taillard`: gaps of schedulers to
    the best known on 50 job shops."""
    policies: tuple[str, ...] | None = None
    """Rules (see `servegym policies`) and files of learned policies; by default the usual rules of
    the scenario's problem, pairs of them where a fleet takes two kinds of decisions. `NAME:tuned`
    is tuned on training episodes first, `NAME-oracle` knows the truth; `DISPATCH+ORDER` also orders
    requests in a fleet of engines that go by priorities, and so does the folder of a run that has
    trained both."""
    loads: tuple[float, ...] = (0.6, 0.8, 1.0)
    """Factors on the arrival rate, or on the number of clients."""
    seeds: int = 10
    """Episodes per load, the same for every policy."""
    num_requests: int | None = None
    """Requests (or jobs) per episode, instead of the scenario's own number."""
    json: Path | None = None
    """Write all numbers here; see docs/evaluation.md."""
    report: Path | None = None
    """Write a self-contained HTML page here."""
    plot: Path | None = None
    """Draw what replicas or devices do in a stretch of the first episode (png, pdf or svg)."""
    bound: bool = False
    """Also search offline for what is best, knowing the future: the row `clairvoyant`, and the
    share of the way from the best rule to it that each policy goes."""
    bound_budget: float = 3000.0
    """Simulation that the search may take for an episode, in whole episodes."""
    uncertainty: int = 0
    """Also play so many worlds in which kernels and engines are off as far as they may be: bands of
    the metrics, and how stable the ranking is."""
    ray: bool = False
    """Spread policies and loads over a Ray cluster: the one that RAY_ADDRESS names, else one that
    is started on this machine."""
    saturation: bool = False
    """Also find the largest load at which 90 % and 99 % of requests meet their limits (of jobs,
    their deadlines)."""

    def run(self) -> None:
        """Evaluate, print and write."""
        require_writable(self.json, self.report, self.plot)
        if self.scenario == _JOB_SHOPS:
            self._run_job_shops()
            return
        problem, scenario = self.posed()
        if not self.bound:
            self.refuse(("bound_budget",), "has no meaning without --bound")
        if not 0.0 < self.bound_budget < math.inf:
            raise ConfigError(
                "the search for the bound must have a budget above 0 and finite, got "
                f"--bound-budget {self.bound_budget:g}"
            )
        if self.ray:
            self.refuse(
                ("bound", "saturation", "uncertainty"), "is not spread over a cluster by --ray"
            )
        if self.saturation:
            problem.require_saturation(scenario)
        if self.plot and problem.plot is None:
            raise ConfigError(f"problem {problem.name} has no figure for --plot: leave it out")
        if self.plot and self.plot.suffix not in PLOT_SUFFIXES:
            raise ConfigError(f"{self.plot} must end in {', '.join(PLOT_SUFFIXES)}")
        texts = problem.compared(scenario) if self.policies is None else self.policies
        policies = [
            resolve(problem, scenario, text, self.loads, self.num_requests) for text in texts
        ]
        result = evaluated(
            scenario,
            policies,
            self.loads,
            self.seeds,
            num_units=self.num_requests,
            bound_budget=self.bound_budget if self.bound else 0.0,
            on_ray=_texts(texts, policies) if self.ray else (),
        )
        if self.saturation:
            for policy in track(policies, "saturation", transient=True):
                result.saturation[policy.name] = {
                    share: saturation_load(scenario, policy, share, num_units=self.num_requests)
                    for share in _SHARES
                }
        if self.uncertainty:
            result.stability = stability(result, policies, self.uncertainty, self.num_requests)
        said = differences(result, policies, self.num_requests) if self.report else []
        publish(result, self.json, self.report, said)
        if self.plot and problem.plot:
            save_figure(problem.plot.draw(result, result.loads[-1]), self.plot)
            make_console().print(f"chart: {self.plot}")

    def _run_job_shops(self) -> None:
        """Nothing is drawn there: no loads, no seeds, and the answer is a gap to the best known."""
        others = ("trace", "num_requests", "report", "plot", "saturation", "loads", "seeds")
        bound = ("bound", "bound_budget", "uncertainty")
        self.refuse((*others, *bound, *TRACE_OPTIONS), "has no meaning for job shops")
        policies = _JOB_SHOP_RULES if self.policies is None else self.policies
        ScheduleDag(benchmark="taillard", policies=policies, json=self.json).run()


def _texts(asked: Sequence[str], policies: Sequence[Policy]) -> list[str]:
    """Return the policies' texts, of those that were tuned with the parameters found."""
    pairs = zip(asked, policies, strict=True)
    return [policy.name if text.endswith(TUNED) else text for text, policy in pairs]


def evaluated(
    scenario: Scenario,
    policies: Sequence[Policy],
    loads: tuple[float, ...],
    seeds: int,
    *,
    num_units: int | None = None,
    bound_budget: float = 0.0,
    on_ray: Sequence[str] = (),
) -> Evaluation:
    """Evaluate with a progress bar; with `on_ray`, the policies' texts, over a Ray cluster."""
    with Progress(transient=True) as bar:
        task = bar.add_task("evaluate", total=1.0)
        if on_ray:
            return evaluate_on_ray(
                scenario,
                on_ray,
                loads=loads,
                num_seeds=seeds,
                num_units=num_units,
                progress=lambda text, share: bar.update(task, description=text, completed=share),
            )
        return evaluate(
            scenario,
            policies,
            loads=loads,
            num_seeds=seeds,
            num_units=num_units,
            bound_budget=bound_budget,
            progress=lambda text, share: bar.update(task, description=text, completed=share),
        )


def stability(
    result: Evaluation, policies: Sequence[Policy], num_worlds: int, num_units: int | None = None
) -> Stability:
    """Play a comparison again in other worlds, with a progress bar."""
    with Progress(transient=True) as bar:
        task = bar.add_task("worlds", total=1.0)
        return play_worlds(
            result.problem,
            result.scenario,
            policies,
            loads=result.loads,
            seeds=result.seeds,
            num_worlds=num_worlds,
            num_units=num_units,
            progress=lambda text, share: bar.update(task, description=text, completed=share),
        )


def differences(
    result: Evaluation, policies: Sequence[Policy], num_units: int | None = None
) -> list[Section]:
    """Say of each learned policy what it does otherwise than the best rule, at the largest load."""
    load, named = result.loads[-1], {policy.name: policy for policy in policies}
    rule = result.best_heuristic(load)
    found = [
        result.problem.differences(
            result.scenario,
            named[name],
            named[rule],
            seed=result.seeds[0],
            load=load,
            num_units=num_units,
        )
        for name in result.learned
        if rule != name
    ]
    return [section for section in found if section]


def publish(
    result: Evaluation,
    json: Path | None,
    report: Path | None,
    sections: Sequence[Section] = (),
) -> None:
    """Print the tables and write the files asked for."""
    console = make_console()
    print_remarks(console, result.notes)
    for load in result.loads:
        console.print(comparison_table(result, load, console.width))
    if result.stability:
        for load in result.loads:
            console.print(stability_table(result, load))
            print_remarks(console, result.stability.sentences(load))
    if result.saturation:
        console.print(saturation_table(result))
    if json:
        write_json(result, json)
        console.print(f"numbers: {json}")
    if report:
        from servegym.evaluate.report import write_report

        write_report(result, report, sections)
        console.print(f"report: {report}")
