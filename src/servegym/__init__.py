"""servegym: train, judge and ship schedulers for LLM serving clusters."""

from importlib.util import find_spec

__version__ = "0.1.0"

if find_spec("gymnasium") is not None:  # inside a serving engine's environment it may be missing
    from gymnasium.envs.registration import register

    # strings, not callables: only these can be serialised, and nothing is compiled by the import
    register(
        id="servegym/Dispatch-v1",
        entry_point="servegym.envs.dispatch:DispatchEnv",
        vector_entry_point="servegym.envs.dispatch:DispatchVectorEnv",
    )
    register(
        id="servegym/Preemption-v0",
        entry_point="servegym.envs.preemption:PreemptionEnv",
        vector_entry_point="servegym.envs.preemption:PreemptionVectorEnv",
    )
    register(
        id="servegym/Workflow-v0",
        entry_point="servegym.envs.workflow:WorkflowEnv",
        vector_entry_point="servegym.envs.workflow:WorkflowVectorEnv",
    )
    register(
        id="servegym/Cluster-v0",
        entry_point="servegym.envs.cluster:ClusterEnv",
        vector_entry_point="servegym.envs.cluster:ClusterVectorEnv",
    )
    # what lets stock algorithms with stock settings learn; see docs/env-dispatch.md
    _SHAPED = {
        "shaping": "cost-to-go",
        "reward_scale": "auto",
        "normalise": True,
        "flat": True,
        "invalid_action": "resample",
    }
    register(
        id="servegym/DispatchShaped-v1",
        entry_point="servegym.envs.dispatch:DispatchEnv",
        vector_entry_point="servegym.envs.dispatch:DispatchVectorEnv",
        kwargs={**_SHAPED, "features": "costs", "num_requests": 1024},
    )
    register(
        id="servegym/PreemptionShaped-v0",
        entry_point="servegym.envs.preemption:PreemptionEnv",
        vector_entry_point="servegym.envs.preemption:PreemptionVectorEnv",
        kwargs=_SHAPED,
    )
    register(
        id="servegym/WorkflowShaped-v0",
        entry_point="servegym.envs.workflow:WorkflowEnv",
        vector_entry_point="servegym.envs.workflow:WorkflowVectorEnv",
        kwargs=_SHAPED,
    )
    register(
        id="servegym/ClusterShaped-v0",
        entry_point="servegym.envs.cluster:ClusterEnv",
        vector_entry_point="servegym.envs.cluster:ClusterVectorEnv",
        kwargs=_SHAPED,
    )
