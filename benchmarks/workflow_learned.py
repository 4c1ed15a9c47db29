"""Time a decision of a learned scheduler of jobs takes, by what its network consists of.

.venv/bin/python benchmarks/workflow_learned.py
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch

from servegym.agents.workflow_network import WorkflowNetwork
from servegym.agents.workflow_network_config import WorkflowNetworkConfig
from servegym.agents.workflow_policy import WorkflowWeights, learned_rule
from servegym.workflow.online.run import begin, run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import Episode, FleetSpec
from servegym.workflow.online.state import DECISION
from servegym.workflow_scenario import load_workflow_scenario

REPEATS = 5
#: Place in a rule's memory of how many jobs have been embedded.
KNOWN_JOBS = 0


def network(*, message_passing: bool) -> WorkflowWeights:
    """Draw the weights of an untrained network on shortest remaining work."""
    torch.manual_seed(0)
    config = WorkflowNetworkConfig(base="srpt-cp", message_passing=message_passing, tau_s=5.0)
    return WorkflowNetwork(config).weights()


def whole_us(spec: FleetSpec, episode: Episode, weights: WorkflowWeights) -> float:
    """Microseconds of a decision in the compiled loop, simulation included; the best of some."""
    best_s = np.inf
    for _ in range(REPEATS):
        simulator = Simulator(spec, [episode])
        begin_s = time.process_time()
        run(simulator, learned_rule(weights))
        best_s = min(best_s, time.process_time() - begin_s)
    return 1e6 * best_s / int(simulator.state.env[0]["num_decisions"])


def called_us(
    spec: FleetSpec, episode: Episode, weights: WorkflowWeights, *, forgets: bool
) -> float:
    """Microseconds of a decision called from Python; with `forgets` all jobs are embedded anew."""
    simulator, rule = Simulator(spec, [episode]), learned_rule(weights)
    begin(simulator, rule)
    taken_s, count, first = 0.0, 0, np.zeros(1, np.int64)
    while simulator.advance()[0] == DECISION:
        if forgets:
            rule.memory[0, KNOWN_JOBS] = 0.0
        begin_s = time.process_time()
        action = rule.act(simulator, first)
        taken_s += time.process_time() - begin_s
        simulator.apply(action)
        count += 1
    return 1e6 * taken_s / count


def main() -> None:
    """Print all times."""
    for name, load in (("text-to-sql", 2.0), ("random-dags", 1.0)):
        scenario = load_workflow_scenario(name)
        episode = scenario.episode(1, load=load, num_jobs=60)
        plain, passing = network(message_passing=False), network(message_passing=True)
        empty = {key: getattr(plain, key)[:0] for key in ("context", "pair", "bias", "out")}
        for label, weights in (
            ("linear", replace(plain, **empty)),
            ("hidden layer", plain),
            ("hidden layer, message passing", passing),
        ):
            print(f"{name}, {label}: {whole_us(scenario.spec, episode, weights):.1f} us")
        once, anew = (
            called_us(scenario.spec, episode, passing, forgets=forgets) for forgets in (False, True)
        )
        print(f"{name}, embedding all jobs anew each time: {anew - once:+.1f} us")


if __name__ == "__main__":
    main()
