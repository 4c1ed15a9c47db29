"""PettingZoo's environment of a fleet of engines: a dispatcher, and a scheduler in each replica.

`dispatcher_0` says which replica gets a request; `scheduler_<r>` whom replica r admits and whom it
preempts. Actions and what is observed are those of `Dispatch-v1` and `Preemption-v0`, as one vector
and a mask each, `{"observation": float32[n], "action_mask": int8[actions]}`:

- the dispatcher sees the rows of `replicas`, one after the other, then `request` (0 where it is not
  asked);
- a scheduler the rows of `requests` (of its own engine), then `engine`, then 1 if it is asked whom
  to preempt.

One decision is due at a time, whoever's it is, in the order of simulated time. In `env`,
`agent_selection` is the agent that is asked. In `parallel_env` a round is one decision: the agent
that is asked acts, the others have one action more, the last, that does nothing, and their masks
allow that alone. Agents that learn with shared parameters need neither: `ClusterVectorEnv` gives
the decisions of all agents of many fleets as one batch.

Where some replicas only prefill or decode there is `dispatcher_0` alone, which is also asked where
a request decodes: then some replica's `has_prefill` is 1. Where requests migrate there is
`controller_0`, which chooses a pair of replicas or nobody and sees the rows of `moves` of
`Cluster-v0`; with engines that have no orders there are no schedulers.

Where there are tiers behind the GPUs' KV (or with `retention=True`) the scheduler of a replica is
asked what becomes of the KV of turns that have ended there. Its actions for that are behind the
others: drop, leave, offload, and a time each to keep it for. It sees, behind the rows of its engine
if that has orders, the features of `turn` (0 unless it is asked about one), those of `tiers`, and 1
if it is asked about a turn.

The scheduler of a replica that is down stays: an agent that leaves must not come back within an
episode in PettingZoo. Nobody asks it until the replica is up again, and `info["is_up"]` says so. An
episode whose fleet is smaller than the largest has fewer `agents` than `possible_agents`.

`rewards` says who earns what: `shared`, each agent what the whole fleet earned (the reward of
`Cluster-v0`, with its `objective`, `reward_scale` and `shaping`); `team`, an equal part of it, so
that all of them together earned that; `class`, dispatcher and controller what the fleet earned, a
scheduler the part that the requests at its replica are. `state()` shows a centralised critic all
replicas, engines, the request and who is asked.

With `max_cycles` an agent of `env` is truncated after so many decisions of its own (then a rule
decides in its place until nobody is left), and all of `parallel_env` after so many rounds.
Forbidden actions are replaced by allowed ones unless `invalid_action="raise"`: PettingZoo's own
tests sample without masks. Other arguments are those of `Cluster-v0`.
"""

from __future__ import annotations

from typing import Any

from pettingzoo.utils.wrappers import OrderEnforcingWrapper

from servegym.envs.agent_views import Observation
from servegym.envs.cluster_forms import ClusterAEC, ClusterParallel


def raw_env(scenario: Any = None, **settings: Any) -> ClusterAEC:
    """Make the environment of one agent at a time, without wrappers; see `ClusterAgents`."""
    return ClusterAEC(scenario, **settings)


def env(
    scenario: Any = None, **settings: Any
) -> OrderEnforcingWrapper[str, Observation, int | None]:
    """Make the environment of one agent at a time; what is called too early is refused."""
    return OrderEnforcingWrapper(raw_env(scenario, **settings))


def parallel_env(scenario: Any = None, **settings: Any) -> ClusterParallel:
    """Make the environment of rounds; see `ClusterAgents`."""
    return ClusterParallel(scenario, **settings)
