"""One engine whose requests nobody knows in advance, and of whose steps each is told.

The environment has one replica and no requests of its own; the caller keeps a place in
`State.request` for each request inside. Everything else is what the main loop calls.
"""

from __future__ import annotations

from servegym.cluster.emission import leave_system
from servegym.cluster.engine import end_step, form_step, stop_replica
from servegym.cluster.heap import set_event
from servegym.cluster.jit import inlined, kernel
from servegym.cluster.kernels import arrive, change_speed, reset_request
from servegym.cluster.running import blocks_for_steps
from servegym.cluster.state import ABORTED, DECODE, IDLE, WAKING, Params, State
from servegym.cluster.steptime import decode_span_s
from servegym.cluster.timers import remove_timer
from servegym.typing import FloatArray, IntArray
from servegym.workloads.table import BY_ITSELF

#: Places in a report of `turn`, before the requests whose prompts were computed in the step.
NUM_LOGGED, NUM_COMPUTED, NUM_SKIPPED, FORMED = range(4)
REPORT_HEAD = 4


@kernel
def come(
    p: Params,
    s: State,
    request: int,
    arrival_s: float,
    key: float,
    tokens: tuple[int, int, int, int],
    segments: tuple[int, int],
    now_s: float,
) -> None:
    """Let a request arrive.

    Args:
        p: Constants.
        s: State.
        request: Its place in `State.request`.
        arrival_s: Orders requests of equal keys, seconds.
        key: Its key where the engine goes by priorities.
        tokens: Of its prompt, of its answer, of that answer what it comes with, and those found in
            the cache at its first admission or -1.
        segments: First row in `State.segment`, and the one behind the last.
        now_s: Time, seconds.
    """
    q = s.request[0, request]
    q.arrival_s = arrival_s
    q.after = BY_ITSELF
    q.first_after = -1
    q.next_after = -1
    q.prompt = tokens[0]
    q.output = tokens[1]
    q.predicted = tokens[1]
    q.slo_class = 0
    q.segment_first = segments[0]
    q.segment_stop = segments[1]
    reset_request(s, 0, request)
    q.generated = tokens[2]
    q.cached = tokens[3]
    if q.generated > 0:
        q.first_token_s = now_s
    s.order[0, request].key = key
    s.env[0].now_s = now_s
    arrive(p, s, 0, request)
    _forget_logs(s)


@kernel
def turn(p: Params, s: State, report: IntArray) -> None:
    """Do what is due: end the step or stretch in progress, and begin the next one.

    Args:
        p: Constants; the run is recorded.
        s: State; its event log will hold what happened.
        report: `int64[REPORT_HEAD + max_num_seqs]`; how many events there are, how many requests
            whose prompts were computed, and who they are; of the step that begins how many running
            requests it leaves out, and what the engine does then.
    """
    v = s.replica[0, 0]
    now_s = s.due[0, 0].time_s
    s.env[0].now_s = now_s
    _forget_logs(s)
    computed = 0
    if v.mode != WAKING:
        request = v.first_prefill
        while request >= 0:
            q = s.request[0, request]
            if q.computed + q.chunk == q.prompt + q.generated:
                report[REPORT_HEAD + computed] = request
                computed += 1
            request = q.next_request
        end_step(p, s, 0, 0, now_s)
    form_step(p, s, 0, 0, now_s)
    report[NUM_LOGGED] = s.env[0].log_len
    report[NUM_COMPUTED] = computed
    report[NUM_SKIPPED] = s.forming[0, 0].num_skipped
    report[FORMED] = v.mode


@inlined
def _forget_logs(s: State) -> None:
    s.env[0].log_len = 0
    s.env[0].step_len = 0


@kernel
def foresee(p: Params, s: State, told: int, times_s: FloatArray) -> int:
    """Say when the steps of the stretch in progress end that nobody has been told of.

    Args:
        p: Constants.
        s: State.
        told: Steps of decoding requests that the caller knows to have ended.
        times_s: Is given their times, seconds, `float64[n]`; the first n if there are more.

    Returns:
        How many steps are ahead, and `turn` is due at the end of the last; 0: nothing is due.
    """
    v = s.replica[0, 0]
    due_s = s.due[0, 0].time_s
    if v.mode != DECODE:
        times_s[0] = due_s
        return 0 if v.mode == IDLE else 1
    last = v.iteration + v.stretch_steps
    batch = v.num_decodes
    for i in range(min(last - told, times_s.shape[0])):
        steps = told + i + 1 - v.iteration
        if steps == v.stretch_steps:
            times_s[i] = due_s
        elif steps <= 0:
            times_s[i] = v.stretch_begin_s
        else:
            span = decode_span_s(p, v.type_idx, batch, v.kv_tokens + batch, steps)
            times_s[i] = v.stretch_begin_s + v.stretch_factor * span
    return last - told


@kernel
def held_blocks(p: Params, s: State, told: int) -> int:
    """Count the blocks that are held when the caller knows so many steps to have ended."""
    v = s.replica[0, 0]
    held = p.num_blocks[v.type_idx] - v.free_blocks
    ahead = told - v.iteration
    if v.mode == DECODE and ahead > 0:
        held += blocks_for_steps(p, s, 0, 0, v.iteration + 1, ahead)
    return held


@kernel
def speed_up(p: Params, s: State, multiplier: float, now_s: float) -> None:
    """Let steps that begin from now on be faster than nominal by a factor."""
    change_speed(p, s, 0, 0, multiplier, now_s)


@kernel
def postpone(p: Params, s: State, next_s: float, until_s: float) -> None:
    """Let the step that would end at `next_s` end at `until_s`; those behind it, as much later."""
    by_s = until_s - next_s
    due_s = s.due[0, 0].time_s
    s.replica[0, 0].stretch_begin_s += by_s
    set_event(s, 0, 0, until_s if due_s == next_s else due_s + by_s)


@kernel
def fail(p: Params, s: State, now_s: float) -> None:
    """Lose all requests, the cache and the step in progress; the engine is idle then."""
    env = s.env[0]
    env.now_s = now_s
    stop_replica(p, s, 0, 0, now_s)
    while env.num_timers > 0:
        request = s.timer[0, 0].subject  # it waits for another replica, but there is none
        remove_timer(s, 0, 0)
        s.request[0, request].status = ABORTED
        leave_system(s, 0, request, now_s)
    s.replica[0, 0].mode = IDLE
    _forget_logs(s)
