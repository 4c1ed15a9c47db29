"""From raw observations to network inputs; part of the exported graph, so ONNX takes raw units."""

from __future__ import annotations

import torch
from torch import Tensor

from servegym.policy.contract import ReplicaFeature, RequestFeature
from servegym.policy.costs import (
    HELD_BASES,
    INFERRED_BASES,
    added_delay_s,
    delay_s,
    displaced_s,
    load_by_speed,
    prefix_load_s,
    step_s,
)

_R = {f.name: int(f) for f in ReplicaFeature}
_Q = {f.name: int(f) for f in RequestFeature}
_PUSHED_OVER = tuple(name for name in _R if name.startswith("PUSHED_OVER_"))


def column(replicas: Tensor, name: str) -> Tensor:
    """Return one raw feature of every replica, `float32[batch, R]`."""
    return replicas[..., _R[name]]


def entry(request: Tensor, name: str) -> Tensor:
    """Return one raw feature of the request beside every replica, `float32[batch, 1]`."""
    return request[..., _Q[name]].unsqueeze(-1)


def replica_inputs(
    replicas: Tensor,
    request: Tensor,
    *,
    extended: bool = False,
    arrivals: bool = False,
    holds: bool = False,
) -> Tensor:
    """Describe every (replica, request) pair by numbers of order one.

    Loads are stated in seconds of work at the replica's own speed, and latencies against the
    request's limits.

    Args:
        replicas: Raw features, `float32[batch, R, >= NUM_OBSERVED_FEATURES]`.
        request: Raw features, `float32[batch, >= NUM_OBSERVED_REQUEST_FEATURES]`.
        extended: Whether what a router infers is described, too.
        arrivals: Whether, besides, how much of the fleet's work is arriving is.
        holds: Whether, besides all that, who is on hold is.

    Returns:
        `float32[batch, R, N]` with N of `num_inputs`; rows of absent replicas are meaningless but
        finite.
    """
    outstanding = column(replicas, "OUTSTANDING_REQUESTS")
    rate = column(replicas, "PREFILL_TOKENS_PER_S").clamp(min=1.0)
    max_seqs = column(replicas, "MAX_NUM_SEQS").clamp(min=1.0)
    capacity = column(replicas, "KV_CAPACITY_TOKENS").clamp(min=1.0)
    prompt, predicted = entry(request, "PROMPT_TOKENS"), entry(request, "PREDICTED_OUTPUT_TOKENS")
    hit = column(replicas, "PREFIX_HIT_TOKENS")
    pending_s = column(replicas, "PENDING_PREFILL_TOKENS") / rate
    new_s = (prompt - hit).clamp(min=0.0) / rate
    batch = torch.minimum((outstanding + 1.0), max_seqs)
    seq_s = column(replicas, "DECODE_SEQ_S")
    each_s = step_s(column(replicas, "DECODE_STEP_S"), seq_s, batch - 1.0)
    left = column(replicas, "OUTSTANDING_PREDICTED_TOKENS") - column(replicas, "GENERATED_TOKENS")
    drain_s = left.clamp(min=0.0) / batch * each_s
    ttft_slo = entry(request, "TTFT_SLO_S").clamp(min=1e-3)
    tpot_slo = entry(request, "TPOT_SLO_S").clamp(min=1e-4)
    delayed_s = outstanding * new_s
    slowed_s = outstanding * seq_s * predicted
    own_s = pending_s + new_s + predicted * each_s
    ones = torch.ones_like(outstanding)
    inputs = [
        torch.log1p(outstanding),
        outstanding / max_seqs,
        torch.log1p(10.0 * pending_s),
        torch.log1p(10.0 * new_s),
        torch.log1p(drain_s),
        torch.log1p(10.0 * predicted * each_s) - 3.0,
        hit / prompt.clamp(min=1.0),
        100.0 * column(replicas, "DECODE_STEP_S"),
        column(replicas, "RELATIVE_SPEED"),
        torch.log1p(column(replicas, "NUM_WAITING")),
        column(replicas, "NUM_RUNNING") / max_seqs,
        column(replicas, "KV_CACHE_USAGE"),
        column(replicas, "OUTSTANDING_PROMPT_TOKENS") / capacity,
        (prompt + predicted) / capacity,
        torch.log1p(10.0 * column(replicas, "RECENT_TTFT_S")),
        torch.log1p(100.0 * column(replicas, "RECENT_TPOT_S")),
        torch.log1p(column(replicas, "SINCE_DISPATCH_S")).clamp(max=3.0),
        column(replicas, "METRICS_AGE_S").clamp(max=2.0),
        ((pending_s + new_s) / ttft_slo).clamp(max=4.0),
        (each_s / tpot_slo).clamp(max=4.0),
        torch.log1p(delayed_s),
        torch.log1p(slowed_s),
        torch.log1p(own_s) - 1.0,
        (torch.log1p(prompt) - 6.0) * ones,
        (torch.log1p(predicted) - 5.0) * ones,
    ]
    if extended:
        itl_s = column(replicas, "RECENT_ITL_S")
        expected = entry(request, "EXPECTED_TOKENS")
        expected_s = column(replicas, "EXPECTED_TOKENS_LEFT") / batch * each_s
        inputs += [
            column(replicas, "STEP_TIME_RATIO").clamp(0.05, 20.0).log(),
            (itl_s / tpot_slo).clamp(max=4.0),
            entry(request, "EXPECTED_TOKENS_SPREAD").clamp(max=4.0) * ones,
            (torch.log1p(expected) - 5.0) * ones,
            torch.log1p(100.0 * itl_s),
            torch.log1p(expected_s),
            torch.log1p(outstanding * seq_s * expected),
            torch.log1p(column(replicas, "OUTSTANDING_AS_TIGHT")),
            *(torch.log1p(column(replicas, name)) for name in _PUSHED_OVER),
        ]
    if arrivals or holds:
        inputs += [share * ones for share in arriving_shares(replicas, request)]
    if holds:
        inputs += [torch.log1p(entry(request, name)) * ones for name in ("NUM_HELD", "WAITED_S")]
    return torch.stack(inputs, -1)


def arriving_shares(replicas: Tensor, request: Tensor) -> tuple[Tensor, Tensor]:
    """State how much of what the fleet can do at most arrives, at most 4.

    Requests as long as those that are there, and this one, arriving as often as of late: their
    prompts over the fleet's prefill rate, and their outputs over the tokens that it could decode
    if only the part of a step counted that grows with the batch.

    Args:
        replicas: Raw features, `float32[batch, R, F]`.
        request: Raw features, `float32[batch, G]`.

    Returns:
        Both shares, `float32[batch, 1]`.
    """
    up = (column(replicas, "UP") > 0).to(replicas.dtype)
    rate_rps = entry(request, "ARRIVAL_RATE_RPS")

    def over_fleet(values: Tensor) -> Tensor:
        return (values * up).sum(-1, keepdim=True)

    count = over_fleet(column(replicas, "OUTSTANDING_REQUESTS")) + 1.0
    prompts = over_fleet(column(replicas, "OUTSTANDING_PROMPT_TOKENS"))
    outputs = over_fleet(column(replicas, "OUTSTANDING_PREDICTED_TOKENS"))
    prompt = (prompts + entry(request, "PROMPT_TOKENS")) / count
    output = (outputs + entry(request, "PREDICTED_OUTPUT_TOKENS")) / count
    prefill_rate = over_fleet(column(replicas, "PREFILL_TOKENS_PER_S")).clamp(min=1.0)
    decode_rate = over_fleet(1.0 / column(replicas, "DECODE_SEQ_S").clamp(min=1e-6)).clamp(min=1.0)
    return (
        (rate_rps * prompt / prefill_rate).clamp(max=4.0),
        (rate_rps * output / decode_rate).clamp(max=4.0),
    )


def base_cost(name: str, replicas: Tensor, request: Tensor, params: tuple[float, ...]) -> Tensor:
    """Cost per replica of the heuristic a residual policy starts from, `float32[batch, R]`.

    That of the rule in `servegym.baselines`, with its parameters in order; `added-delay` is summed
    in another order, which trained policies have learnt with.
    """
    load = column(replicas, "OUTSTANDING_REQUESTS")
    speed = column(replicas, "RELATIVE_SPEED").clamp(min=1e-6)
    if name == "least-outstanding":
        return load
    if name == "speed-family":
        return load_by_speed(load, speed, params[0])
    if name == "prefix-load":
        hit = column(replicas, "PREFIX_HIT_TOKENS")
        new = (entry(request, "PROMPT_TOKENS") - hit).clamp(min=0.0)
        rate = column(replicas, "PREFILL_TOKENS_PER_S").clamp(min=1.0)
        prefill_s = (column(replicas, "PENDING_PREFILL_TOKENS") + new) / rate
        return prefix_load_s(prefill_s, load, speed, *params)
    if name == "added-delay":
        hit = column(replicas, "PREFIX_HIT_TOKENS")
        rate = column(replicas, "PREFILL_TOKENS_PER_S").clamp(min=1.0)
        new_s = (entry(request, "PROMPT_TOKENS") - hit).clamp(min=0.0) / rate
        slowed_s = entry(request, "PREDICTED_OUTPUT_TOKENS") * column(replicas, "DECODE_SEQ_S")
        alone_s = entry(request, "PREDICTED_OUTPUT_TOKENS") * column(replicas, "DECODE_STEP_S")
        own_s = column(replicas, "PENDING_PREFILL_TOKENS") / rate + new_s + alone_s
        return own_s + load * (params[0] * new_s + (1.0 + params[1]) * slowed_s)
    if name in INFERRED_BASES:
        if name in HELD_BASES:
            (prefill, decode, _, _, shrink), observed, displaced = params, 0.0, 0.0
        else:  # policies of before `displaced` was a number of the rule have four
            prefill, decode, shrink, observed, displaced = (*params, 0.0)[:5]
        predicted = entry(request, "PREDICTED_OUTPUT_TOKENS")
        tokens = predicted + shrink * (entry(request, "EXPECTED_TOKENS") - predicted)
        hit = column(replicas, "PREFIX_HIT_TOKENS")
        rate = column(replicas, "PREFILL_TOKENS_PER_S").clamp(min=1.0)
        new = (entry(request, "PROMPT_TOKENS") - hit).clamp(min=0.0)
        new_s = new / rate
        seq_s = column(replicas, "DECODE_SEQ_S")
        cost = added_delay_s(
            column(replicas, "PENDING_PREFILL_TOKENS") / rate,
            new_s,
            tokens * step_s(column(replicas, "DECODE_STEP_S"), seq_s, load),
            delay_s(load, new_s, seq_s, tokens, prefill, decode),
        )
        if name not in HELD_BASES:
            cost = cost * column(replicas, "STEP_TIME_RATIO") ** observed
        if displaced == 0.0:  # a graph without it stays as it is
            return cost
        capacity = column(replicas, "KV_CAPACITY_TOKENS").clamp(min=1.0)
        return cost + displaced_s(new, capacity, displaced)
    raise ValueError(f"no base cost {name!r}")


def hold_gain(replicas: Tensor, request: Tensor, params: tuple[float, ...]) -> Tensor:
    """State what rule `added-delay-held` sees in a hold if a replica is the best there is.

    Args:
        replicas: Raw features, `float32[batch, R, F]`.
        request: Raw features, `float32[batch, G]`.
        params: The rule's.

    Returns:
        Seconds of prefill that wait there beyond those it allows, `float32[batch, R]`: it holds
        where they are above 0; -inf for a request that has waited as long as it may.
    """
    _, _, wait_s, most_s, _ = params
    rate = column(replicas, "PREFILL_TOKENS_PER_S").clamp(min=1.0)
    over_s = column(replicas, "PENDING_PREFILL_TOKENS") / rate - wait_s
    return over_s.masked_fill(entry(request, "WAITED_S") >= most_s, -torch.inf)
