"""How much of an episode's return falls into its last step, plain and shaped.

`python benchmarks/last_step.py --open-loop`: three rules play the same episodes of
`servegym/Dispatch-v1` with and without `shaping`. What the last step holds is what no decision
before it is credited with. Where users wait for their answers it is next to nothing.
"""

from __future__ import annotations

import argparse

import gymnasium
import numpy as np

import servegym  # noqa: F401  # registers the environments
from servegym.baselines.registry import policy
from servegym.policy.observe import observe_batch
from servegym.scenario import load_scenario, open_loop


def share(rule: str, shaping: str, arguments: argparse.Namespace) -> float:
    """Play episodes by a rule; return the mean share of the last step's reward in the return."""
    scenario = load_scenario(arguments.scenario)
    env = gymnasium.make(
        "servegym/Dispatch-v1",
        scenario=open_loop(scenario) if arguments.open_loop else scenario,
        load=arguments.load,
        num_requests=arguments.num_requests,
        shaping=shaping,
    )
    made = policy(rule)
    shares = []
    for seed in range(arguments.episodes):
        env.reset(seed=seed)
        made.reset(1, seed)
        simulator = env.unwrapped.batch.simulator
        rewards, terminated = [], False
        while not terminated:
            seen, env_ids = observe_batch(simulator, made.needs)
            _, reward, terminated, _, _ = env.step(int(made.act(seen, env_ids)[0]))
            rewards.append(reward)
        shares.append(rewards[-1] / sum(rewards))
    return float(np.mean(shares))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenario", default="mixed-chat")
    parser.add_argument("--open-loop", action="store_true", help="users wait for no answer")
    parser.add_argument("--load", type=float, default=1.0)
    parser.add_argument("--num-requests", type=int, default=1500)
    parser.add_argument("--episodes", type=int, default=4)
    arguments = parser.parse_args()
    for rule in ("random", "least-outstanding", "added-delay"):
        plain, shaped = (share(rule, shaping, arguments) for shaping in ("none", "cost-to-go"))
        print(f"{rule}: {plain:.1%} plain, {shaped:.1%} shaped", flush=True)


if __name__ == "__main__":
    main()
