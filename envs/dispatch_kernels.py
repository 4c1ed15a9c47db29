"""Stepping a batch of dispatch environments in one compiled call."""

from __future__ import annotations

from typing import NamedTuple

from servegym.cluster.jit import inlined, kernel
from servegym.cluster.kernels import advance, apply
from servegym.cluster.state import DECISION, Params, State
from servegym.envs.kernels import waited
from servegym.policy.contract import FIRST_ROLE
from servegym.policy.observe import observe
from servegym.typing import BoolArray, Float32Array, FloatArray, Int8Array, IntArray


class KernelSettings(NamedTuple):
    """What is shown and rewarded.

    Attributes:
        needs: Groups of features that are filled, a sum of `policy.contract.Group`.
        goodput: Whether requests in time are rewarded, else times in the system are.
        scale: Divides rewards.
    """

    needs: int
    goodput: bool
    scale: float


class Output(NamedTuple):
    """What environments give; axes: E environments, R replica rows, A actions."""

    replicas: Float32Array  # [E, R, F], see contract.observed
    request: Float32Array  # [E, G]
    mask: Int8Array  # [E, A]
    reward: FloatArray  # [E]
    done: BoolArray  # [E]
    dt_s: FloatArray  # [E] simulated seconds since the last decision


@inlined
def core_action(p: Params, num_replicas: int, action: int) -> int:
    """Entry `action` of `policy.layout.scenario_actions`: an array would cost a call 0.8 us."""
    return action if action < num_replicas or p.allow_hold else action + 1


@inlined
def write_replicas(s: State, num_roles: int, e: int, replicas: Float32Array) -> None:
    """Write features of all replicas, the first ones, then those about roles: `float32[R, F]`."""
    first = replicas.shape[1] - num_roles
    for f in range(first):
        for r in range(replicas.shape[0]):
            replicas[r, f] = s.observation[e, f, r]
    for f in range(num_roles):
        for r in range(replicas.shape[0]):
            replicas[r, first + f] = s.observation[e, FIRST_ROLE + f, r]


@inlined
def write_observation(
    p: Params,
    s: State,
    needs: int,
    num_roles: int,
    e: int,
    replicas: Float32Array,
    request: Float32Array,
    mask: Int8Array,
    memory: FloatArray,
) -> None:
    """Write the observation of one pending decision, as `policy.layout.agent_arrays` would.

    Args:
        p: Constants.
        s: State.
        needs: Groups of features that are filled.
        num_roles: How many of a replica's features, the last, are those about roles.
        e: Environment.
        replicas: As `Output.replicas`.
        request: As `Output.request`.
        mask: As `Output.mask`.
        memory: Working memory, `float64[NUM_REQUEST_FEATURES]`.
    """
    observe(p, s, e, needs, memory)
    width = s.observation.shape[2]
    write_replicas(s, num_roles, e, replicas[e])
    for g in range(request.shape[1]):
        request[e, g] = memory[g]
    for a in range(mask.shape[1]):
        mask[e, a] = s.allowed[e, core_action(p, width, a)]


@kernel
def begin(p: Params, s: State, c: KernelSettings, o: Output, e: int, request: FloatArray) -> bool:
    """Run a new episode to its first decision and observe it; return False if it has none.

    Args:
        p: Constants.
        s: State.
        c: Settings.
        o: Written to.
        e: Environment.
        request: Working memory, `float64[NUM_REQUEST_FEATURES]`.
    """
    if advance(p, s, e) != DECISION:
        return False
    write_observation(p, s, c.needs, 0, e, o.replicas, o.request, o.mask, request)
    return True


@kernel
def step_range(
    p: Params,
    s: State,
    c: KernelSettings,
    o: Output,
    first: int,
    stop: int,
    actions: IntArray,
    active: BoolArray,
    request: FloatArray,
) -> None:
    """Apply, advance, reward and observe environments `first..stop-1` that are active."""
    width = s.observation.shape[2]
    for e in range(first, stop):
        if not active[e]:
            continue
        env = s.env[e]
        before_s = env.now_s
        earned = env.good if c.goodput else waited(s, e)
        apply(p, s, e, core_action(p, width, actions[e]))
        reason = advance(p, s, e)
        o.dt_s[e] = env.now_s - before_s
        if c.goodput:
            o.reward[e] = (env.good - earned) / c.scale
        else:
            o.reward[e] = -(waited(s, e) - earned) / c.scale
        o.done[e] = reason != DECISION
        if reason == DECISION:
            write_observation(p, s, c.needs, 0, e, o.replicas, o.request, o.mask, request)
        else:
            o.replicas[e] = 0.0
            o.request[e] = 0.0
            o.mask[e] = 0
            o.mask[e, 0] = 1  # a mask without any action breaks samplers
