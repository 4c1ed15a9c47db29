"""Stepping a batch of dispatch environments in one compiled call."""

from __future__ import annotations

from typing import NamedTuple

from servegym.cluster.jit import inlined, kernel
from servegym.cluster.kernels import advance, apply
from servegym.cluster.state import DECISION, Params, State
from servegym.envs.kernels import waited
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
def _core_action(p: Params, num_replicas: int, action: int) -> int:
    """Entry `action` of `policy.layout.scenario_actions`: an array would cost a call 0.8 us."""
    return action if action < num_replicas or p.allow_hold else action + 1


@inlined
def _write_observation(
    p: Params, s: State, c: KernelSettings, o: Output, e: int, request: FloatArray
) -> None:
    """Write the observation of one pending decision, as `policy.layout.agent_arrays` would."""
    observe(p, s, e, c.needs, request)
    width = s.shown.shape[2]
    for f in range(o.replicas.shape[2]):
        for r in range(width):
            o.replicas[e, r, f] = s.shown[e, f, r]
    for g in range(o.request.shape[1]):
        o.request[e, g] = request[g]
    for a in range(o.mask.shape[1]):
        o.mask[e, a] = s.allowed[e, _core_action(p, width, a)]


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
    _write_observation(p, s, c, o, e, request)
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
    width = s.shown.shape[2]
    for e in range(first, stop):
        if not active[e]:
            continue
        env = s.env[e]
        before_s = env.now_s
        earned = env.good if c.goodput else waited(s, e)
        apply(p, s, e, _core_action(p, width, actions[e]))
        reason = advance(p, s, e)
        o.dt_s[e] = env.now_s - before_s
        if c.goodput:
            o.reward[e] = (env.good - earned) / c.scale
        else:
            o.reward[e] = -(waited(s, e) - earned) / c.scale
        o.done[e] = reason != DECISION
        if reason == DECISION:
            _write_observation(p, s, c, o, e, request)
        else:
            o.replicas[e] = 0.0
            o.request[e] = 0.0
            o.mask[e] = 0
            o.mask[e, 0] = 1  # a mask without any action breaks samplers
