"""Any Stable-Baselines3 algorithm, on any of the environments.

Covers: the SB3 vector environments, MaskablePPO with masks, A2C and DQN without (a forbidden
action is replaced by an allowed one), stock `VecNormalize`, a picture.
Scenarios: `hetero-prefix` and `kv-starved`, a few thousand steps: enough to see it run, not to
learn much.
"""

from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, DQN
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

import servegym  # noqa: F401 - registers the environments
from servegym.envs.sb3 import DispatchVecEnv, PreemptionVecEnv, make_vec


def main() -> None:
    """Run the example."""
    # stock algorithms with stock settings: the form with shaped rewards (docs/env-dispatch.md)
    envs = make_vec("servegym/DispatchShaped-v1", 4, num_requests=128)
    model = A2C("MlpPolicy", envs, seed=0, device="cpu").learn(1024)
    print(f"stock A2C: {model.num_timesteps} steps")
    envs.close()

    # one vector in raw units, over six orders of magnitude: a plain MLP needs it normalised
    inner = DispatchVecEnv(16, scenario="hetero-prefix", num_requests=128, flat=True)
    envs = VecNormalize(inner)
    model = MaskablePPO("MlpPolicy", envs, n_steps=32, seed=0, device="cpu")
    model.learn(2048)
    print(f"MaskablePPO: {model.num_timesteps} steps")
    envs.close()

    # or let the environment normalise, and keep the parts apart
    envs = PreemptionVecEnv(16, num_requests=64, normalise=True, invalid_action="resample")
    model = A2C("MultiInputPolicy", envs, n_steps=32, seed=0, device="cpu").learn(2048)
    print(f"A2C: {model.num_timesteps} steps")
    envs.close()

    settings = {"normalise": True, "flat": True, "invalid_action": "penalise", "num_requests": 64}
    envs = make_vec_env("servegym/Dispatch-v1", n_envs=2, env_kwargs=settings)
    model = DQN("MlpPolicy", envs, learning_starts=100, seed=0, device="cpu").learn(512)
    print(f"DQN: {model.num_timesteps} steps")
    envs.reset()
    print(f"a picture of all environments: {envs.render().shape}")
    envs.close()


if __name__ == "__main__":
    main()
