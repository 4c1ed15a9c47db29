"""`servegym/Workflow-v0` as a vector environment: all environments in one compiled call."""

from __future__ import annotations

from gymnasium.vector import AutoresetMode

from servegym.envs.vector import BatchVectorEnv
from servegym.envs.workflow_batch import Objective, Placement, Shortlist, WorkflowBatch
from servegym.workflow_scenario import WorkflowScenario


class WorkflowVectorEnv(BatchVectorEnv[WorkflowBatch]):
    """`num_envs` workflow environments; see `WorkflowEnv` for spaces, rewards and arguments.

    Episodes depend on the seed, the environment's number (its group's, with `group_size` above 1)
    and how many it has played, not on `num_envs`. `info` holds `action_mask`, `dt_s` (simulated
    seconds since the last decision) and `input_id` (which arrival sequence is played; equal within
    a group). `num_threads` splits the environments over threads, with equal results.
    """

    def __init__(
        self,
        num_envs: int = 1,
        scenario: WorkflowScenario | str = "random-dags",
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        load: float | tuple[float, float] = 1.0,
        num_jobs: int | tuple[int, int] | None = None,
        max_stages: int = 16,
        placement: Placement = "agent",
        shortlist: Shortlist = "work-left",
        graph: bool = False,
        max_nodes: int = 256,
        max_edges: int = 512,
        objective: Objective | None = None,
        reward_scale: float = 1.0,
        pool_size: int | None = 256,
        pool_seed: int = 0,
        group_size: int = 1,
        num_threads: int = 1,
        render_mode: str | None = None,
    ) -> None:
        batch = WorkflowBatch(
            scenario,
            num_envs,
            load=load,
            num_jobs=num_jobs,
            max_stages=max_stages,
            placement=placement,
            shortlist=shortlist,
            graph=graph,
            max_nodes=max_nodes,
            max_edges=max_edges,
            objective=objective,
            reward_scale=reward_scale,
            pool_size=pool_size,
            pool_seed=pool_seed,
            group_size=group_size,
            num_threads=num_threads,
        )
        super().__init__(batch, autoreset_mode, render_mode)
