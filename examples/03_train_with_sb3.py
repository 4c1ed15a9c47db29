"""Any Stable-Baselines3 algorithm.

Covers: the SB3 vector environment, MaskablePPO with masks, A2C without (a forbidden action
raises, so the scenario must have none: all replicas are always up).
Scenario: `hetero-prefix`, a few thousand steps: enough to see it run, not to learn much.
"""

from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C
from stable_baselines3.common.vec_env import VecNormalize

from servegym.envs.sb3 import DispatchVecEnv


def main() -> None:
    """Run the example."""
    for algorithm in (MaskablePPO, A2C):
        inner = DispatchVecEnv(16, scenario="hetero-prefix", num_requests=128)
        # raw units span six orders of magnitude: a plain MLP needs them normalised
        envs = VecNormalize(inner, norm_obs_keys=["replicas", "request"])
        model = algorithm("MultiInputPolicy", envs, n_steps=32, seed=0, device="cpu")
        model.learn(2048)
        print(f"{algorithm.__name__}: {model.num_timesteps} steps")
        envs.close()


if __name__ == "__main__":
    main()
