"""What a simulated engine says of its requests: rows of the contract in `policy.ordering`."""

from __future__ import annotations

from servegym.cluster.jit import inlined
from servegym.cluster.state import Params, State
from servegym.policy.ordering import NO_LIMIT_S, OrderingFeature
from servegym.typing import FloatArray, IntArray

_RUNNING = int(OrderingFeature["IS_RUNNING"])
_COMPUTED = int(OrderingFeature["COMPUTED_TOKENS"])
_GENERATED = int(OrderingFeature["GENERATED_TOKENS"])
_BLOCKS = int(OrderingFeature["KV_BLOCKS"])
_PRIORITY = int(OrderingFeature["CLIENT_PRIORITY"])
_PROMPT = int(OrderingFeature["PROMPT_TOKENS"])
_REMAINING = int(OrderingFeature["PREDICTED_REMAINING_TOKENS"])
_WAITED = int(OrderingFeature["WAITED_S"])
_IDLE = int(OrderingFeature["IDLE_S"])
_PREEMPTIONS = int(OrderingFeature["NUM_PREEMPTIONS"])
_TTFT_SLACK = int(OrderingFeature["TTFT_SLACK_S"])
_DEADLINE_SLACK = int(OrderingFeature["DEADLINE_SLACK_S"])
_NUM_RUNNING = int(OrderingFeature["NUM_RUNNING"])
_NUM_WAITING = int(OrderingFeature["NUM_WAITING"])
_KV_USAGE = int(OrderingFeature["KV_CACHE_USAGE"])
_STEP = int(OrderingFeature["STEP_S"])
_BUDGET = int(OrderingFeature["MAX_NUM_BATCHED_TOKENS"])


@inlined
def write_row(
    p: Params, s: State, e: int, r: int, request: int, running: bool, row: FloatArray
) -> None:
    """Write one request's features.

    A live engine is told its limits by the router (`serve.vllm.hints`): those of its SLO class,
    the E2E limit with the predicted length. Its client's priority is the number of that class.
    """
    q, v, f = s.request[e, request], s.replica[e, r], s.forming[e, r]
    now_s = s.env[e].now_s
    computed, generated = 0, q.generated
    if running:
        computed = q.computed
        if q.join_iter >= 0:
            computed += v.iteration - q.join_iter
            generated += v.iteration - q.join_iter
    row[_RUNNING] = 1.0 if running else 0.0
    row[_COMPUTED] = computed
    row[_GENERATED] = generated
    row[_BLOCKS] = (computed + p.block_size - 1) // p.block_size
    row[_PRIORITY] = q.slo_class
    row[_PROMPT] = q.prompt
    row[_REMAINING] = max(q.predicted - generated, 1.0)
    row[_WAITED] = now_s - q.arrival_s
    row[_IDLE] = 0.0 if running else now_s - s.order[e, request].idle_since_s
    row[_PREEMPTIONS] = q.num_preemptions
    ttft_s, tpot_s = p.slo_s[q.slo_class, 0], p.slo_s[q.slo_class, 1]
    row[_TTFT_SLACK] = NO_LIMIT_S
    row[_DEADLINE_SLACK] = NO_LIMIT_S
    if ttft_s < NO_LIMIT_S:
        if generated == 0:
            row[_TTFT_SLACK] = q.arrival_s + ttft_s - now_s
        limit_s = ttft_s + tpot_s * max(q.predicted - 1.0, 0.0)
        if limit_s < NO_LIMIT_S:
            row[_DEADLINE_SLACK] = q.arrival_s + limit_s - now_s
    blocks = p.num_blocks[v.type_idx]
    row[_NUM_RUNNING] = v.num_running
    row[_NUM_WAITING] = v.num_waiting
    row[_KV_USAGE] = (blocks - v.free_blocks) / blocks
    row[_STEP] = f.step_s
    row[_BUDGET] = p.max_num_batched_tokens[v.type_idx]


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
