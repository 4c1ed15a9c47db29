"""`servegym/Preemption-v0` as a vector environment: all environments in one compiled call."""

from __future__ import annotations

from gymnasium.vector import AutoresetMode

from servegym.envs.preemption_batch import PreemptionBatch, QueueOrder
from servegym.envs.vector import BatchVectorEnv
from servegym.scenario import Scenario


class PreemptionVectorEnv(BatchVectorEnv[PreemptionBatch]):
    """`num_envs` preemption environments; see `PreemptionEnv` for spaces, rewards and arguments.

    Episodes depend on the seed, the environment's number (its group's, with `group_size` above 1)
    and how many it has played, not on `num_envs`. `info` holds `action_mask`, `dt_s` (simulated
    seconds since the last choice) and `input_id` (which arrival sequence is played; equal within
    a group). `num_threads` splits the environments over threads, with equal results.
    """

    def __init__(
        self,
        num_envs: int = 1,
        scenario: Scenario | str = "kv-starved",
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        load: float | tuple[float, float] = 1.0,
        num_requests: int | None = None,
        max_waiting: int = 64,
        queue_order: QueueOrder = "shortest",
        allow_none: bool = False,
        objective: str | None = None,
        reward_scale: float = 1.0,
        group_size: int = 1,
        num_threads: int = 1,
        render_mode: str | None = None,
    ) -> None:
        batch = PreemptionBatch(
            scenario,
            num_envs,
            load=load,
            num_requests=num_requests,
            max_waiting=max_waiting,
            queue_order=queue_order,
            allow_none=allow_none,
            objective=objective,
            reward_scale=reward_scale,
            group_size=group_size,
            num_threads=num_threads,
        )
        super().__init__(batch, autoreset_mode, render_mode)
