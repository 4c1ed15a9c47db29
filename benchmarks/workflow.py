"""Time the online simulator of jobs and its environment: `python benchmarks/workflow.py`.

CPU time of one core, after compiling. Rules run in the compiled loop; environments are stepped
through the vector API with a random allowed action, observations included, `--envs` at a time.
"""

from __future__ import annotations

import argparse
import time

import gymnasium
import numpy as np

from servegym.baselines.workflow.online.registry import online_rule
from servegym.workflow.job import JobBuilder
from servegym.workflow.online.run import run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import DeviceType, Episode, FleetSpec
from servegym.workflow_scenario import load_workflow_scenario

SCENARIOS = ("random-dags", "text-to-sql")
RULES = ("fifo", "heft-rt", "hexgen", "mct")
STEPS = 1500


def rule_speed(scenario_name: str, rule_name: str) -> float:
    """Stages a second under a rule, over 20 episodes."""
    scenario = load_workflow_scenario(scenario_name)
    episodes = [scenario.episode(seed) for seed in range(20)]
    run(Simulator(scenario.spec, episodes[:1]), online_rule(rule_name))
    simulator = Simulator(scenario.spec, episodes)
    begin = time.process_time()
    run(simulator, online_rule(rule_name))
    taken_s = time.process_time() - begin
    return float(simulator.state.env["num_stages"].sum()) / taken_s


def growth(num_stages: int, num_devices: int) -> float:
    """Stages a second of one layered job of this size under HEFT-RT."""
    builder = JobBuilder("layers", ("P",))
    width = 4 * num_devices
    rng = np.random.default_rng(0)
    for i in range(num_stages):
        builder.task(0, {"P": float(rng.uniform(0.5, 1.5))})
        for parent in {int(x) for x in rng.integers(max(0, i - width), i, 2)} if i else ():
            builder.edge(parent, i)
    episode = Episode.of([builder.build()], [0] * num_devices)
    simulator = Simulator(FleetSpec((DeviceType("P"),)), [episode])
    begin = time.process_time()
    run(simulator, online_rule("heft-rt"))
    return num_stages / (time.process_time() - begin)


def environment_speed(scenario: str, num_envs: int, *, placement: str, graph: bool) -> float:
    """Decisions a second through the vector API."""
    env = gymnasium.make_vec(
        "servegym/Workflow-v0",
        num_envs=num_envs,
        scenario=scenario,
        placement=placement,
        graph=graph,
        pool_size=64,
    )
    _, info = env.reset(seed=0)
    rng = np.random.default_rng(0)
    draws = rng.random((64, 1, info["action_mask"].shape[1]), np.float32) + np.float32(1e-6)
    begin, chosen_s = 0.0, 0.0
    for step in range(STEPS + 20):
        if step == 20:
            begin, chosen_s = time.process_time(), 0.0
        choosing = time.process_time()
        actions = (info["action_mask"] * draws[step % 64]).argmax(1)
        chosen_s += time.process_time() - choosing
        _, _, _, _, info = env.step(actions)
    return num_envs * STEPS / (time.process_time() - begin - chosen_s)


def main() -> None:
    """Print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=int, default=64)
    num_envs = parser.parse_args().envs
    print("| stages/s in the compiled loop |", *(f"{name} |" for name in RULES))
    print("|---" * (len(RULES) + 1) + "|")
    for scenario in SCENARIOS:
        cells = [f"{rule_speed(scenario, name):,.0f}" for name in RULES]
        print(f"| {scenario} |", *(f"{cell} |" for cell in cells))
    print("\n| stages of one job, heft-rt | stages/s, 8 devices | stages/s, 64 devices |")
    print("|---|---|---|")
    growth(100, 8)
    for size in (1_000, 10_000, 100_000):
        print(f"| {size:,} | {growth(size, 8):,.0f} | {growth(size, 64):,.0f} |")
    print(f"\n| decisions/s, {num_envs} environments | agent places | eft places | graph |")
    print("|---|---|---|---|")
    for scenario in SCENARIOS:
        cells = [
            environment_speed(scenario, num_envs, placement=placement, graph=graph)
            for placement, graph in (("agent", False), ("eft", False), ("agent", True))
        ]
        print(f"| {scenario} |", *(f"{cell:,.0f} |" for cell in cells))


if __name__ == "__main__":
    main()
