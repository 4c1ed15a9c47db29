"""What problems of requests have in common: scenarios, episodes, metrics, figures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
from typing_extensions import override

from servegym.cluster.outcome import latencies, worth_in_time
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.costs.step import StepCost
from servegym.costs.uncertainty import World
from servegym.errors import ConfigError
from servegym.problems.keys import episode_key
from servegym.problems.objective import Objective
from servegym.problems.problem import (
    Column,
    Episodes,
    Played,
    Plot,
    Policy,
    Problem,
    Saturation,
)
from servegym.problems.request_figures import REQUEST_FIGURES, Trail, plot_replicas
from servegym.problems.request_metrics import measure
from servegym.problems.trace_windows import cut_off_notes, window_notes
from servegym.scenario import Scenario, load_scenario, scenario_names
from servegym.typing import FloatArray
from servegym.workflow_scenario import is_workflow_scenario
from servegym.workloads.config import TraceConfig
from servegym.workloads.trace import Trace

#: By the name in scenario files.
OBJECTIVES = {
    "latency": Objective(
        "latency",
        "e2e_mean_s",
        "mean E2E",
        loss_form="mean E2E {:.3f} s",
        better="faster than",
        worse="slower than",
    ),
    "tail": Objective(
        "tail",
        "ttft_p99_s",
        "p99 TTFT",
        loss_form="p99 TTFT {:.3f} s",
        better="faster than",
        worse="slower than",
    ),
    "goodput": Objective(
        "goodput",
        "goodput_rps",
        "goodput",
        more_is_better=True,
        loss_form="{:.1%} of requests within their limits",
        better="ahead of",
        worse="behind",
    ),
}

#: Beginnings of the names of metrics that depend on when first tokens are seen. How far E2E is off
#: is held against published rows without that: it belongs to TTFT.
_OF_FIRST_TOKENS = ("ttft_", "slo_attainment", "goodput_")

P = TypeVar("P", bound=Policy)


class RequestEpisodes(Episodes[P]):
    """Episodes of requests; subclasses say how a policy drives a simulator."""

    def __init__(
        self, scenario: Scenario, episodes: Sequence[Episode], *, ttft_factor: float = 1.0
    ) -> None:
        """Keep what is to be played.

        Args:
            scenario: What is played.
            episodes: Of its fleet.
            ttft_factor: On the TTFT that metrics see, for what lies between simulator and clients.
        """
        self.scenario = scenario
        self.episodes = list(episodes)
        self.ttft_factor = ttft_factor

    @abstractmethod
    def run(self, policy: P, *, seed: int = 0, record: bool = False) -> Simulator:
        """Play all episodes and return the simulator that did, with a log of steps if asked."""

    def play(self, policy: P, seed: int = 0) -> Played:
        """See `Episodes.play`; the trail is a `Trail`."""
        return self._played(self.run(policy, seed=seed, record=True))

    def _played(self, simulator: Simulator) -> Played:
        """Measure what a simulator with a record has played."""
        spec = self.scenario.spec
        metrics = [
            self._measured(simulator, env, episode) for env, episode in enumerate(self.episodes)
        ]
        replicas = tuple(spec.types[t].name for t in self.episodes[0].type_idx)
        return Played(metrics, Trail(simulator.outcomes(0), simulator.steps(0), replicas))

    def _measured(self, simulator: Simulator, env: int, episode: Episode) -> dict[str, float]:
        """Measure an episode; what first tokens decide as clients see them."""
        done, steps = simulator.outcomes(env), simulator.steps(env)
        histogram, spec = simulator.itl_histogram(env), self.scenario.spec
        found = measure(done, steps, histogram, spec, episode)
        if self.ttft_factor == 1.0:
            return found
        later_s = (self.ttft_factor - 1.0) * (done["first_token_s"] - done["arrival_s"])
        for column in ("first_token_s", "finish_s"):  # TPOT stays
            done[column] += np.nan_to_num(later_s)
        seen = measure(done, steps, histogram, spec, episode)
        return found | {key: seen[key] for key in seen if key.startswith(_OF_FIRST_TOKENS)}

    def _best_played(self, simulators: Sequence[Simulator]) -> Played:
        """Measure, of each episode, the best of several runs by the objective."""
        measured = [self._played(simulator) for simulator in simulators]
        objective = OBJECTIVES[self.scenario.objective]
        best = [
            min(measured, key=lambda m: objective.sign * m.metrics[env][objective.metric])
            for env in range(len(self.episodes))
        ]
        return Played([m.metrics[env] for env, m in enumerate(best)], best[0].trail)

    def losses(self, policy: P) -> FloatArray:
        """See `Episodes.losses`.

        Returns:
            Per episode the mean E2E latency in seconds; under `tail` the 99th percentile of TTFT;
            under `goodput` minus the (weighted) share of requests within their limits while
            requests arrive, `float64[num_episodes]`.
        """
        simulator = self.run(policy)
        losses = np.empty(len(self.episodes))
        for env, episode in enumerate(self.episodes):
            done = simulator.outcomes(env)
            if self.scenario.objective == "goodput":
                losses[env] = -worth_in_time(done, self.scenario.spec, episode.table)
            elif self.scenario.objective == "tail":
                losses[env] = np.nanpercentile(latencies(done)[0], 99)
            else:
                losses[env] = np.nanmean(done["finish_s"] - done["arrival_s"])
        return losses


class RequestProblem(Problem[Scenario, P]):
    """A problem on a fleet that serves requests."""

    unit = "requests"
    load = "the arrival rate, or the number of clients"
    columns = (
        Column("TTFT ms", "ttft_mean_s", 1e3, 0),
        Column("p99", "ttft_p99_s", 1e3, 0, dispensable=6),
        Column("TPOT ms", "tpot_mean_s", 1e3, 1, dispensable=4),
        Column("E2E s", "e2e_mean_s", 1, 2),
        Column("p99", "e2e_p99_s", 1, 1, dispensable=5),
        Column("SLO %", "slo_attainment", 100, 1),
        Column("goodput/s", "goodput_rps", 1, 1, dispensable=2),
        Column("preempted", "preemptions", 1, 0, dispensable=1),
        Column("hit %", "prefix_hit_rate", 100, 0, dispensable=3),
    )
    counted = "the first 20 % of the requests are left out, runs are drained"
    truth = "the true output lengths"
    figures = REQUEST_FIGURES
    plot = Plot(plot_replicas)
    takes_trace = True
    saturation = Saturation("slo_attainment", "requests within limits")
    episodes_class: ClassVar[type[RequestEpisodes[Any]]]

    def scenario_names(self) -> list[str]:
        """Names of the bundled scenarios."""
        return [name for name in scenario_names() if self.owns(load_scenario(name))]

    def find(self, name_or_path: str) -> Scenario | None:
        """Load a bundled scenario or a YAML file; `None` if it is of another problem."""
        if is_workflow_scenario(name_or_path):
            return None
        scenario = load_scenario(name_or_path)
        return scenario if self.owns(scenario) else None

    def objective(self, scenario: Scenario) -> Objective:
        """Mean E2E latency, p99 TTFT or goodput."""
        return OBJECTIVES[scenario.objective]

    def fleet(self, scenario: Scenario) -> str:
        """Replicas by GPU, with what they do if that is not all of a request."""
        return ", ".join(
            f"{entry.count} {entry.gpu}" + ("" if entry.role == "mixed" else f" ({entry.role})")
            for entry in scenario.fleet
        )

    def pace(self, scenario: Scenario) -> str:
        """Rate of arrivals, or clients."""
        return scenario.workload.pace

    def episodes(
        self,
        scenario: Scenario,
        seeds: Sequence[int],
        *,
        load: float = 1.0,
        num_units: int | None = None,
    ) -> Episodes[P]:
        """Draw the episodes of seeds at a load."""
        drawn = [scenario.episode(seed, load=load, num_requests=num_units) for seed in seeds]
        return self.episodes_class(scenario, drawn)

    @override
    def episodes_in(
        self,
        world: World,
        scenario: Scenario,
        seeds: Sequence[int],
        *,
        load: float = 1.0,
        num_units: int | None = None,
    ) -> Episodes[P]:
        drawn = [scenario.episode(seed, load=load, num_requests=num_units) for seed in seeds]
        factor = world.ttft_factor(scenario.fleet[0].engine)
        return self.episodes_class(scenario.in_world(world), drawn, ttft_factor=factor)

    def key(self, scenario: Scenario, seed: int, load: float, num_units: int | None) -> bytes:
        """Name an episode: those with equal keys are the same."""
        episode = scenario.episode(seed, load=load, num_requests=num_units)
        return episode_key(episode, noisy=scenario.disturbances.step_noise_sigma > 0)

    def notes(
        self,
        scenario: Scenario,
        seeds: Sequence[int],
        loads: Sequence[float],
        num_units: int | None,
    ) -> list[str]:
        """Say how far the windows of a trace are repeats, and what they cut off."""
        return [
            *window_notes(scenario, len(seeds), num_units),
            *cut_off_notes(scenario, seeds, loads, num_units),
        ]

    def trace(self, scenario: Scenario) -> Trace | None:
        """The trace that is played, if one is."""
        workload = scenario.played_workload
        return workload.read() if isinstance(workload, TraceConfig) else None

    def require_saturation(self, scenario: Scenario) -> Saturation:
        """Refuse a trace all of whose requests arrive together."""
        workload = scenario.played_workload
        if isinstance(workload, TraceConfig) and workload.is_batch:
            raise ConfigError(
                f"all requests of {workload.path} arrive at one time, so that there is no largest"
                " load: leave --saturation out"
            )
        return super().require_saturation(scenario)

    def step_costs(self, scenario: Scenario) -> dict[str, StepCost]:
        """What a step costs on each kind of replica, by its GPU."""
        return {entry.gpu: scenario.step_cost(entry) for entry in scenario.fleet}
