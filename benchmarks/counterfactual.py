"""How many decisions a minute have all their choices tried, as `servegym train` does it.

Environments of a scenario are played under a rule; every fourth decision is labelled, and labelling
alone is counted: its CPU time, which other work on the machine changes little, and that by the
clock. A row for each number of futures.

python benchmarks/counterfactual.py --scenario azure-conv-fit --threads 2
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from servegym.baselines.registry import policy
from servegym.cluster.simulator import Simulator
from servegym.cluster.state import OBSERVED_OUTSTANDING
from servegym.policy.counterfactual import Teacher, Worth, due
from servegym.policy.drawn_lengths import learn_lengths
from servegym.policy.observe import observe_batch
from servegym.scenario import load_scenario

_LABEL_EVERY = 4
#: Decisions of each environment before the first that counts: fleets are empty at the beginning.
_WARMUP = 200


def main() -> None:
    """Print a row a number of futures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", default="azure-conv-fit")
    parser.add_argument("--policy", default="added-delay")
    parser.add_argument("--load", type=float, default=1.0)
    parser.add_argument("--envs", type=int, default=32)
    parser.add_argument("--decisions", type=int, default=800, help="of each environment")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args()
    scenario, rule = load_scenario(options.scenario), policy(options.policy)
    lengths = learn_lengths(scenario)
    print("| futures | requests at a replica | a minute of CPU | of the clock |")
    print("|--:|--:|--:|--:|")
    for num_samples in options.samples:
        worth = Worth(num_samples, 1.0, 0.0, 1.0, 0.1, 1.0)
        teacher = Teacher(lengths, worth, num_threads=options.threads)
        num_requests = options.decisions + _WARMUP
        episodes = [
            scenario.episode(seed, load=options.load, num_requests=num_requests)
            for seed in range(options.envs)
        ]
        simulator = Simulator(scenario.spec, episodes)
        rule.reset(options.envs, 0)
        busy_s, spent_s, labelled, there = 0.0, 0.0, 0, []
        for step in range(num_requests):
            simulator.advance()
            observations, envs = observe_batch(simulator, rule.needs)
            if step >= _WARMUP and step % _LABEL_EVERY == 0:
                there.append(observations.replicas[:, OBSERVED_OUTSTANDING].mean())
                begin_s, busy_from_s = time.perf_counter(), time.process_time()
                teacher.values(simulator, due(simulator), step)
                if labelled or step > _WARMUP:  # the first call compiles
                    spent_s += time.perf_counter() - begin_s
                    busy_s += time.process_time() - busy_from_s
                    labelled += len(envs)
            actions = np.zeros(options.envs, np.int64)
            actions[envs] = rule.act(observations, envs)
            simulator.apply(actions)
        teacher.close()
        rates = f"{60 * labelled / busy_s:,.0f} | {60 * labelled / spent_s:,.0f}"
        print(f"| {num_samples} | {np.mean(there):.0f} | {rates} |", flush=True)


if __name__ == "__main__":
    main()
