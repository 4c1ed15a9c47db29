"""What a simulated engine says of its requests: rows of the contract in `policy.ordering`."""

from __future__ import annotations

from servegym.cluster.jit import inlined
from servegym.cluster.state import Params, State
from servegym.policy.ordering import (
    CLIENT_PRIORITY,
    COMPUTED_TOKENS,
    DEADLINE_SLACK_S,
    GENERATED_TOKENS,
    IDLE_S,
    IS_RUNNING,
    KV_BLOCKS,
    KV_CACHE_USAGE,
    MAX_NUM_BATCHED_TOKENS,
    NO_LIMIT_S,
    NUM_PREEMPTIONS,
    NUM_RUNNING,
    NUM_WAITING,
    PREDICTED_REMAINING_TOKENS,
    PROMPT_TOKENS,
    STEP_S,
    TTFT_SLACK_S,
    WAITED_S,
)
from servegym.typing import FloatArray, IntArray


@inlined
def write_engine_columns(p: Params, s: State, e: int, r: int, row: FloatArray) -> None:
    """Write what is the same in the rows of all requests of an engine."""
    v = s.replica[e, r]
    blocks = p.num_blocks[v.type_idx]
    row[NUM_RUNNING] = v.num_running
    row[NUM_WAITING] = v.num_waiting
    row[KV_CACHE_USAGE] = (blocks - v.free_blocks) / blocks
    row[STEP_S] = s.forming[e, r].step_s
    row[MAX_NUM_BATCHED_TOKENS] = p.max_num_batched_tokens[v.type_idx]


@inlined
def write_row(
    p: Params, s: State, e: int, r: int, request: int, running: bool, row: FloatArray
) -> None:
    """Write one request's features.

    A live engine is told its limits by the router (`serve.vllm.hints`): those of its SLO class,
    the E2E limit with the predicted length. Its client's priority is the number of that class.
    """
    q, v = s.request[e, request], s.replica[e, r]
    now_s = s.env[e].now_s
    computed, generated = 0, q.generated
    if running:
        computed = q.computed
        if q.join_iter >= 0:
            computed += v.iteration - q.join_iter
            generated += v.iteration - q.join_iter
    row[IS_RUNNING] = 1.0 if running else 0.0
    row[COMPUTED_TOKENS] = computed
    row[GENERATED_TOKENS] = generated
    row[KV_BLOCKS] = (computed + p.block_size - 1) // p.block_size
    row[CLIENT_PRIORITY] = q.slo_class
    row[PROMPT_TOKENS] = q.prompt
    row[PREDICTED_REMAINING_TOKENS] = max(q.predicted - generated, 1.0)
    row[WAITED_S] = now_s - q.arrival_s
    row[IDLE_S] = 0.0 if running else now_s - s.order[e, request].idle_since_s
    row[NUM_PREEMPTIONS] = q.num_preemptions
    ttft_s, tpot_s = p.slo_s[q.slo_class, 0], p.slo_s[q.slo_class, 1]
    row[TTFT_SLACK_S] = NO_LIMIT_S
    row[DEADLINE_SLACK_S] = NO_LIMIT_S
    if ttft_s < NO_LIMIT_S:
        if generated == 0:
            row[TTFT_SLACK_S] = q.arrival_s + ttft_s - now_s
        limit_s = ttft_s + tpot_s * max(q.predicted - 1.0, 0.0)
        if limit_s < NO_LIMIT_S:
            row[DEADLINE_SLACK_S] = q.arrival_s + limit_s - now_s
    write_engine_columns(p, s, e, r, row)


@inlined
def write_rows(
    p: Params, s: State, e: int, r: int, first: int, rows: FloatArray, requests: IntArray
) -> int:
    """Write the rows of all requests of an engine, the waiting ones first.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        r: Replica.
        first: Where to begin.
        rows: `float64[>= stop, NUM_ORDERING_FEATURES]`.
        requests: Whose they are, `int64[>= stop]`.

    Returns:
        Where the rows end.
    """
    v = s.replica[e, r]
    for running in range(2):
        request = v.run_head if running else v.wait_head
        while request >= 0:
            write_row(p, s, e, r, request, running > 0, rows[first])
            requests[first] = request
            first += 1
            request = s.request[e, request].next_request
    return first
