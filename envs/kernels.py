"""Stepping a batch of dispatch environments in one compiled call."""

from __future__ import annotations

from servegym.cluster.jit import inlined, kernel
from servegym.cluster.kernels import advance, apply
from servegym.cluster.state import DECISION, Params, State
from servegym.policy.observe import observe
from servegym.typing import BoolArray, Float32Array, FloatArray, Int8Array, IntArray


@inlined
def _core_action(p: Params, num_replicas: int, action: int) -> int:
    """Entry `action` of `policy.layout.scenario_actions`: an array would cost a call 0.8 us."""
    return action if action < num_replicas or p.allow_hold else action + 1


@kernel
def first_invalid(mask: Int8Array, actions: IntArray, active: BoolArray) -> int:
    """Return the first active environment whose action is not allowed, or -1."""
    for e in range(actions.shape[0]):
        if active[e]:
            if not 0 <= actions[e] < mask.shape[1] or mask[e, actions[e]] == 0:
                return e
    return -1


@kernel
def write_observation(
    p: Params,
    s: State,
    e: int,
    needs: int,
    num_rows: int,
    request: FloatArray,
    replicas_out: Float32Array,
    request_out: Float32Array,
    mask_out: Int8Array,
) -> None:
    """Write the observation of one pending decision, as `policy.layout.agent_arrays` would."""
    observe(p, s, e, needs, request)
    width = s.shown.shape[2]
    for f in range(num_rows):
        for r in range(width):
            replicas_out[e, r, f] = s.shown[e, f, r]
    for g in range(request.shape[0]):
        request_out[e, g] = request[g]
    for a in range(mask_out.shape[1]):
        mask_out[e, a] = s.allowed[e, _core_action(p, width, a)]


@kernel
def step_range(
    p: Params,
    s: State,
    first: int,
    stop: int,
    actions: IntArray,
    active: BoolArray,
    needs: int,
    num_rows: int,
    goodput: bool,
    scale: float,
    request: FloatArray,
    replicas_out: Float32Array,
    request_out: Float32Array,
    mask_out: Int8Array,
    reward_out: FloatArray,
    done_out: BoolArray,
    dt_out: FloatArray,
) -> None:
    """Apply, advance, reward and observe environments `first..stop-1` that are active."""
    width = s.shown.shape[2]
    for e in range(first, stop):
        if not active[e]:
            continue
        env = s.env[e]
        before_s = env.now_s
        earned = env.good if goodput else waited(s, e)
        apply(p, s, e, _core_action(p, width, actions[e]))
        reason = advance(p, s, e)
        dt_out[e] = env.now_s - before_s
        if goodput:
            reward_out[e] = (env.good - earned) / scale
        else:
            reward_out[e] = -(waited(s, e) - earned) / scale
        done_out[e] = reason != DECISION
        if reason == DECISION:
            write_observation(
                p, s, e, needs, num_rows, request, replicas_out, request_out, mask_out
            )
        else:
            replicas_out[e] = 0.0
            request_out[e] = 0.0
            mask_out[e] = 0
            mask_out[e, 0] = 1  # a mask without any action breaks samplers


@kernel
def waited(s: State, e: int) -> float:
    """Integral of the requests in the system up to now, request-seconds."""
    env = s.env[e]
    return env.area + env.in_system * (env.now_s - env.area_until_s)
