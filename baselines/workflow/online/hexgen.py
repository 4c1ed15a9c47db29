"""Commit at readiness, then a queue a device: round robin, HexGen's balance, MCT."""

from __future__ import annotations

import math

import numpy as np

from servegym.baselines.workflow.online.choice import action_of, begin_s
from servegym.cluster.jit import inlined
from servegym.typing import FloatArray, UInt64Array
from servegym.workflow.online.policy import Rule, rule
from servegym.workflow.online.state import WAIT
from servegym.workflow.online.view import View, can_run, can_start, duration_s, free_s

#: How a stage is committed to a device, `params[0]`.
_ROUND_ROBIN, _CUMULATIVE, _OUTSTANDING, _COMPLETION = range(4)
#: In which order a device starts its stages, `params[1]`.
_FCFS, _URGENCY = range(2)
# Columns of `stage_memory`: device + 1, place in the order of commitment, time on that device
_DEVICE, _PLACE, _TIME = range(3)
# Columns of `device_memory`: work ever assigned, of running and of committed stages; stage to start
# next + 1, its key
_WORK, _RUNNING, _QUEUED, _NEXT, _KEY = range(5)
# Places of `memory`: commitments so far, device that round robin takes next
_COUNT, _TURN = range(2)


@inlined
def _own_s(w: View, v: int, d: int) -> float:
    """Time of a stage on a device beside a typical batch, whatever waits there."""
    return w.expected_s[v, w.device[d].type_idx] / w.device[d].speed


@inlined
def _add_up(w: View, stage_memory: FloatArray, device_memory: FloatArray) -> None:
    """Sum the times of the stages that run on each device, and of those committed to it."""
    for d in range(w.env[0].num_devices):
        device_memory[d, _RUNNING] = 0.0
        device_memory[d, _QUEUED] = 0.0
        for i in range(w.device[d].num_running):
            device_memory[d, _RUNNING] += stage_memory[w.running[d, i], _TIME]
    for i in range(w.env[0].num_ready):
        v = w.ready[i]
        d = int(stage_memory[v, _DEVICE]) - 1
        if d >= 0:
            device_memory[d, _QUEUED] += stage_memory[v, _TIME]


@inlined
def _next_in_turn(w: View, v: int, memory: FloatArray) -> int:
    num_devices = w.env[0].num_devices
    for k in range(num_devices):
        d = (int(memory[_TURN]) + k) % num_devices
        if can_run(w, v, d):
            memory[_TURN] = (d + 1) % num_devices
            return d
    return -1


@inlined
def _balanced(
    w: View,
    v: int,
    kind: int,
    alpha: float,
    device_memory: FloatArray,
) -> int:
    """Device with the best of speed on this stage against work, both relative to the first."""
    first, best, best_score = -1, -1, 0.0
    own_0, work_0 = 0.0, 0.0
    for d in range(w.env[0].num_devices):
        if not can_run(w, v, d):
            continue
        work = device_memory[d, _WORK]
        if kind == _OUTSTANDING:
            work = device_memory[d, _RUNNING] + device_memory[d, _QUEUED]
        own = _own_s(w, v, d)
        if first < 0:
            first, own_0, work_0 = d, own, work
            if work_0 <= 0.0:
                return first
        score = alpha * own_0 / own - (1.0 - alpha) * work / work_0
        if best < 0 or score > best_score:
            best, best_score = d, score
    return best


@inlined
def _earliest_completion(w: View, v: int, device_memory: FloatArray) -> int:
    """Device that is expected to end a stage first, behind those committed to it before."""
    best, best_s = -1, math.inf
    for d in range(w.env[0].num_devices):
        if can_run(w, v, d):
            from_s = free_s(w, d) + device_memory[d, _QUEUED] / w.device[d].slots
            finish_s = begin_s(w, v, d, from_s) + duration_s(w, v, d)
            if finish_s < best_s:
                best, best_s = d, finish_s
    return best


@inlined
def _commit(
    w: View,
    v: int,
    params: FloatArray,
    memory: FloatArray,
    stage_memory: FloatArray,
    device_memory: FloatArray,
) -> None:
    """Choose a device for a stage; none if all that could run it are down."""
    kind = int(params[0])
    if kind == _ROUND_ROBIN:
        d = _next_in_turn(w, v, memory)
    elif kind == _COMPLETION:
        d = _earliest_completion(w, v, device_memory)
    else:
        d = _balanced(w, v, kind, params[2], device_memory)
    if d < 0:
        return
    memory[_COUNT] += 1.0
    stage_memory[v, _DEVICE] = d + 1
    stage_memory[v, _PLACE] = memory[_COUNT]
    stage_memory[v, _TIME] = _own_s(w, v, d)
    device_memory[d, _WORK] += stage_memory[v, _TIME]
    device_memory[d, _QUEUED] += stage_memory[v, _TIME]


@inlined
def _urgency(w: View, v: int, d: int) -> float:
    """How far a stage is behind its share of the job's time limit, seconds; the more the sooner.

    The share is given out when the stage becomes ready: what is left of the limit, in proportion
    to the mean time of this stage in that of the way from here to the end of the job.
    """
    q, job = w.stage[v], w.job[w.stage[v].job]
    if job.deadline_s == math.inf or q.rank_s <= 0.0:
        return -math.inf
    left_s = job.deadline_s - (q.ready_s - job.arrival_s)
    share_s = left_s * q.mean_s / q.rank_s
    return _own_s(w, v, d) - (share_s - (w.env[0].now_s - q.ready_s))


@rule
def decide(
    w: View,
    params: FloatArray,
    memory: FloatArray,
    stage_memory: FloatArray,
    device_memory: FloatArray,
    rng: UInt64Array,
) -> int:
    """Decide; see `workflow.online.policy.rule`."""
    num_devices = w.env[0].num_devices
    for i in range(w.env[0].num_fresh):
        stage_memory[w.fresh[i], _DEVICE] = 0.0  # also of those that a failure gave back
    _add_up(w, stage_memory, device_memory)
    for i in range(w.env[0].num_fresh):
        _commit(w, w.fresh[i], params, memory, stage_memory, device_memory)
    for d in range(num_devices):
        device_memory[d, _NEXT] = 0.0
    for i in range(w.env[0].num_ready):
        v = w.ready[i]
        d = int(stage_memory[v, _DEVICE]) - 1
        if d < 0 or w.device[d].up == 0:
            stage_memory[v, _DEVICE] = 0.0
            _commit(w, v, params, memory, stage_memory, device_memory)
            d = int(stage_memory[v, _DEVICE]) - 1
            if d < 0:
                continue
        key = -stage_memory[v, _PLACE]
        if int(params[1]) == _URGENCY:
            key = _urgency(w, v, d)
        other = int(device_memory[d, _NEXT]) - 1
        if (
            other < 0
            or key > device_memory[d, _KEY]
            or (
                key == device_memory[d, _KEY]
                and stage_memory[v, _PLACE] < stage_memory[other, _PLACE]
            )
        ):
            device_memory[d, _NEXT] = v + 1
            device_memory[d, _KEY] = key
    for d in range(num_devices):
        v = int(device_memory[d, _NEXT]) - 1
        if v >= 0 and can_start(w, v, d):
            return action_of(w, v, d)
    return WAIT


def _rule(name: str, dispatch: int, queue: int, reference: str, alpha: float | None = None) -> Rule:
    information = "blind" if (dispatch, queue) == (_ROUND_ROBIN, _FCFS) else "predictive"
    return Rule(
        name=name,
        information=information,  # type: ignore[arg-type]
        decide=decide,
        params=np.array([dispatch, queue, alpha or 0.0]),
        param_names=() if alpha is None else ("", "", "alpha"),
        asks_when_ready=True,
        memory_size=2,
        stage_columns=3,
        device_columns=5,
        reference=reference,
    )


_HEXGEN = "HexGen-Text2SQL, without its factors for two GPU types"


def round_robin() -> Rule:
    """Each stage to the next device in turn; each device in order of arrival."""
    return _rule("round-robin", _ROUND_ROBIN, _FCFS, "vLLM behind round robin")


def round_robin_urgency() -> Rule:
    """Each stage to the next device in turn; each device by urgency."""
    return _rule("round-robin-urgency", _ROUND_ROBIN, _URGENCY, _HEXGEN)


def hexgen_fcfs(alpha: float = 0.2) -> Rule:
    """Speed against work outstanding, `alpha` to 1 - `alpha`; each device in order of arrival."""
    return _rule("hexgen-fcfs", _OUTSTANDING, _FCFS, _HEXGEN, alpha)


def hexgen(alpha: float = 0.2) -> Rule:
    """Speed against work outstanding, `alpha` to 1 - `alpha`; each device by urgency."""
    return _rule("hexgen", _OUTSTANDING, _URGENCY, _HEXGEN, alpha)


def hexgen_cumulative_fcfs(alpha: float = 0.2) -> Rule:
    """Speed against work ever assigned; each device in order of arrival."""
    return _rule("hexgen-cumulative-fcfs", _CUMULATIVE, _FCFS, _HEXGEN + ", as released", alpha)


def hexgen_cumulative(alpha: float = 0.2) -> Rule:
    """Speed against work ever assigned, as in the released code; each device by urgency."""
    return _rule("hexgen-cumulative", _CUMULATIVE, _URGENCY, _HEXGEN + ", as released", alpha)


def mct() -> Rule:
    """Each stage, when it is ready, to the device expected to end it first; then in that order."""
    return _rule("mct", _COMPLETION, _FCFS, "Maheswaran et al. 1999, immediate mode")
