"""How far the coarse engine of jobs is from the one that goes step by step.

`python benchmarks/coarse_engine.py`:
Streams of independent requests, round robin over the fleet, no prefix cache, in both simulators;
the requests, engines and choices are the same. Means over three seeds of 2,000 requests.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from servegym.baselines.registry import policy
from servegym.baselines.workflow.online.registry import online_rule
from servegym.cluster.simulator import Simulator as EngineSimulator
from servegym.cluster.spec import Faults
from servegym.policy.run import run as run_engines
from servegym.scenario import load_scenario
from servegym.workflow.job import JobBuilder
from servegym.workflow.online.run import run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import DeviceType, Episode, FleetSpec

SCENARIOS = ("homogeneous-light", "azure-conv-fit", "mixed-chat", "hetero-prefix")
LOADS = (0.3, 0.6, 0.9)


def errors(name: str, load: float, seed: int) -> tuple[float, float, float]:
    """Relative errors of mean and p99 latency, and preemptions per request in the fine engine."""
    scenario = load_scenario(name)
    fine = replace(scenario.spec, prefix_caching=False, metrics_interval_s=0.0, noise_sigma=0.0)
    drawn = replace(scenario.episode(seed, load=load, num_requests=2000), faults=Faults())
    drawn = replace(drawn, table=drawn.table.open_loop())
    engines = EngineSimulator(fine, [drawn])
    run_engines(engines, policy("round-robin"))
    want = engines.outcomes()["finish_s"] - drawn.table.arrival_s
    jobs = []
    lengths = zip(drawn.table.prompt_tokens, drawn.table.output_tokens, strict=True)
    for prompt, output in lengths:
        builder = JobBuilder("request")
        builder.llm(0, int(prompt), int(output))
        jobs.append(builder.build())
    types = tuple(DeviceType(t.name, engine=t) for t in fine.types)
    episode = Episode.of(jobs, drawn.type_idx, drawn.table.arrival_s, speed=drawn.speed)
    simulator = Simulator(FleetSpec(types, block_size=fine.block_size), [episode])
    run(simulator, online_rule("round-robin"))
    got = simulator.jobs()["finish_s"] - drawn.table.arrival_s
    p99 = np.percentile(got, 99) / np.percentile(want, 99) - 1
    preempted = engines.outcomes()["num_preemptions"].mean()
    return float(got.mean() / want.mean() - 1), float(p99), float(preempted)


def main() -> None:
    """Print a table in Markdown."""
    print("| scenario | load | mean | p99 | preemptions per request |\n|---|---|---|---|---|")
    for name in SCENARIOS:
        for load in LOADS:
            mean, p99, preempted = np.mean([errors(name, load, seed) for seed in range(3)], axis=0)
            print(f"| {name} | {load:g} | {mean:+.1%} | {p99:+.1%} | {preempted:.3f} |")


if __name__ == "__main__":
    main()
