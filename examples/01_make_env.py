"""Dispatch by hand, and by a rule of your own.

Covers: `gymnasium.make`, observation, action mask, episode metrics.
Scenario: `hetero-prefix`: an H100, two A100 and three A40 serve chat sessions.
"""

import gymnasium
import numpy as np

import servegym  # noqa: F401 - registers the environments
from servegym.policy.contract import OUTSTANDING_REQUESTS, RELATIVE_SPEED


def least_loaded(observation: dict[str, np.ndarray]) -> int:
    """Fewest outstanding requests for the replica's speed."""
    replicas, mask = observation["replicas"], observation["action_mask"]
    load = (replicas[:, OUTSTANDING_REQUESTS] + 1) / np.maximum(replicas[:, RELATIVE_SPEED], 1e-6)
    return int(np.where(mask > 0, load, np.inf).argmin())


def main() -> None:
    """Run the example."""
    env = gymnasium.make("servegym/Dispatch-v1", scenario="hetero-prefix", num_requests=500)
    for name in ("random", "least loaded"):
        rng = np.random.default_rng(0)
        observation, info = env.reset(seed=0)
        terminated, total = False, 0.0
        while not terminated:
            if name == "random":
                action = int(rng.choice(np.flatnonzero(info["action_mask"])))
            else:
                action = least_loaded(observation)
            observation, reward, terminated, _, info = env.step(action)
            total += float(reward)
        # minus the return is the sum of all times in the system
        mean_s = info["episode_metrics"]["mean_e2e_s"]
        assert abs(-total / 500 - mean_s) < 1e-6 * mean_s
        print(f"{name:12s}  mean end-to-end latency {mean_s:5.2f} s")


if __name__ == "__main__":
    main()
