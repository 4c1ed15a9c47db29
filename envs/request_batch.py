"""A batch of episodes of a scenario of requests: what all its environments share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.errors import ConfigError, InvalidAction, ResetNeeded
from servegym.scenario import Scenario, load_scenario
from servegym.typing import BoolArray, Float32Array, FloatArray, IntArray


class RequestBatch:
    """`num_envs` environments that play episodes of one scenario.

    Attributes:
        scenario: What episodes are drawn from.
        objective: What is rewarded, `latency` or `goodput`.
        num_envs: Environments.
        group_size: Environments that play the same requests.
        reward: Of the last step, `float32[num_envs]`.
        done: Whether the episode ended in the last step, `bool[num_envs]`.
        dt_s: Simulated seconds between the last two decisions, `float64[num_envs]`.
        input_id: Which arrival sequence an environment plays, `int64[num_envs]`.
    """

    def __init__(
        self,
        scenario: Scenario | str,
        num_envs: int,
        *,
        load: float | tuple[float, float] = 1.0,
        num_requests: int | None = None,
        objective: str | None = None,
        reward_scale: float = 1.0,
        group_size: int = 1,
        num_threads: int = 1,
    ) -> None:
        if num_envs < 1 or group_size < 1 or num_threads < 1:
            raise ConfigError("num_envs, group_size and num_threads must be at least 1")
        self.scenario = load_scenario(scenario) if isinstance(scenario, str) else scenario
        self.objective = objective or self.scenario.objective
        if self.objective not in ("latency", "goodput"):
            raise ConfigError(f"objective must be latency or goodput, got {self.objective!r}")
        if not reward_scale > 0:
            raise ConfigError(f"reward_scale must be above 0, got {reward_scale}")
        self.num_envs, self.group_size = num_envs, group_size
        self._load, self._num_requests, self._scale = load, num_requests, reward_scale
        self._pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None
        self._num_threads = num_threads
        self.reward: Float32Array = np.zeros(num_envs, np.float32)
        self.done: BoolArray = np.ones(num_envs, np.bool_)
        self.dt_s: FloatArray = np.zeros(num_envs)
        self.input_id: IntArray = np.zeros(num_envs, np.int64)
        self._seed = 0
        self._count = np.zeros(num_envs, np.int64)
        self._simulator: Simulator | None = None

    @property
    def simulator(self) -> Simulator:
        """The simulator; there is one after the first reset."""
        if self._simulator is None:
            raise ResetNeeded("call reset before step")
        return self._simulator

    def seed(self, seed: int) -> None:
        """Start the sequence of episodes anew."""
        self._seed = seed
        self._count[:] = 0

    def skip_to(self, episodes: IntArray) -> None:
        """Let the next reset begin these episodes of the sequences, `int64[num_envs]` from 0."""
        self._count[:] = episodes

    def draw(self, env: int) -> Episode:
        """Draw the next episode of one environment; its group plays the same requests."""
        group = env // self.group_size
        entropy = np.random.SeedSequence((self._seed, group, int(self._count[env])))
        seed, number = (int(x) for x in entropy.generate_state(2, np.uint64))
        load = self._load
        if not isinstance(load, float | int):
            load = load[0] + (load[1] - load[0]) * (number / 2.0**64)
        self.input_id[env] = group
        self._count[env] += 1
        return self.scenario.episode(seed, load=load, num_requests=self._num_requests)

    def checked(self, actions: IntArray) -> IntArray:
        """Return actions as `int64[num_envs]`.

        Raises:
            InvalidAction: If there is not one for each environment.
        """
        actions = np.ascontiguousarray(actions, np.int64)
        if actions.shape != (self.num_envs,):
            raise InvalidAction(
                f"there must be one action for each of {self.num_envs} environments, "
                f"got shape {actions.shape}"
            )
        return actions

    def in_ranges(self, step: Callable[[int, int], None]) -> None:
        """Call `step(first, stop)` for all environments, in as many ranges as there are threads."""
        if self._pool is None:
            step(0, self.num_envs)
            return
        edges = np.linspace(0, self.num_envs, self._num_threads + 1).astype(int).tolist()
        for job in [self._pool.submit(step, *pair) for pair in itertools.pairwise(edges)]:
            job.result()

    def summary(self, env: int) -> dict[str, float]:
        """Mean latencies of an episode that has ended."""
        done = self.simulator.outcomes(env)
        kept = done[~done["rejected"]]
        return {
            "mean_e2e_s": float(np.mean(kept["finish_s"] - kept["arrival_s"])) if len(kept) else 0,
            "mean_ttft_s": float(np.mean(kept["first_token_s"] - kept["arrival_s"]))
            if len(kept)
            else 0,
            "num_rejected": float(done["rejected"].sum()),
        }

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
