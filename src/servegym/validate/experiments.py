"""Playing the experiments behind published measurements."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np

from servegym.cluster.spec import ReplicaType
from servegym.costs.uncertainty import World
from servegym.errors import ConfigError
from servegym.typing import IntArray
from servegym.validate.engine import EngineConstants
from servegym.validate.published import Experiment
from servegym.validate.reception import front_end_s
from servegym.validate.replay import Replay, replay_closed, replay_open


def play(
    plan: Experiment, constants: EngineConstants, world: World | None = None
) -> tuple[dict[str, float], Replay]:
    """Simulate what a row measured.

    Args:
        plan: The experiment.
        constants: Of the engine family.
        world: Whose kernels it has; None: as predicted.

    Returns:
        `tpot_s`, `ttft_s`, `e2e_s` (means) and `output_tokens_per_s`, and the replay.

    Raises:
        ConfigError: If the model does not fit the GPUs, or a request the KV cache.
    """
    fleet = _fleet(plan, constants, world)
    longest = min(kind.capacity_tokens(plan.setup.block_size) for kind, _ in fleet)
    prompt, output, rng = draw_lengths(plan)
    if plan.lengths == "spread":  # engines cut what is beyond their context
        prompt = np.minimum(prompt, max(1, longest // 2))
        output = np.minimum(output, max(1, longest // 2))
    if int((prompt + output).max()) - 1 > longest:
        raise ConfigError(
            f"a request of {int((prompt + output).max())} tokens does not fit the {longest} KV "
            "tokens beside the weights"
        )
    fleet = [(_covering(kind, plan, int((prompt + output).max())), count) for kind, count in fleet]
    if plan.loop == "closed":
        replay = replay_closed(
            fleet,
            plan.concurrency,
            prompt,
            output,
            block_size=plan.setup.block_size,
            prefix_caching=plan.setup.prefix_caching,
            chunked_prefill=plan.setup.chunked_prefill,
            kv_token_bytes=plan.setup.cost().kv_token_bytes if plan.prefill else 0.0,
        )
    elif plan.prefill:
        raise ConfigError("disaggregated, and not in a closed loop")
    else:
        arrival = np.zeros(plan.num_requests)
        if plan.loop == "open":
            arrival = np.cumsum(rng.exponential(1.0 / plan.rate_rps, plan.num_requests))
            arrival -= arrival[0]
        [(replica, num_replicas)] = fleet
        replay = replay_open(
            replica,
            arrival,
            prompt,
            output,
            block_size=plan.setup.block_size,
            prefix_caching=plan.setup.prefix_caching,
            chunked_prefill=plan.setup.chunked_prefill,
            num_replicas=num_replicas,
        )
    tpot = replay.tpot_s[~np.isnan(replay.tpot_s)]
    step_s = float(tpot.mean()) if len(tpot) else 0.0
    # benchmarks of batches and of maximum throughput call the engine, without a server between
    way_s = constants.request_s if plan.loop in ("closed", "open") else 0.0
    way_s += _received_s(plan, fleet[0][0], step_s)
    e2e_s = float(replay.e2e_s.mean())
    simulated = {
        "ttft_s": float(replay.ttft_s.mean()) + way_s,
        "e2e_s": e2e_s + way_s,
        "output_tokens_per_s": replay.output_tokens_per_s,
    }
    if plan.loop == "closed":  # a client sends its next request later by so much
        simulated["output_tokens_per_s"] *= e2e_s / (e2e_s + way_s)
    if len(tpot):
        simulated["tpot_s"] = step_s
    return simulated, replay


def _received_s(plan: Experiment, first: ReplicaType, step_s: float) -> float:
    """Return the mean seconds from a client to where the simulator's requests begin, and back.

    Args:
        plan: The experiment.
        first: The engine that prefills.
        step_s: A decode step.
    """
    if plan.loop not in ("closed", "open"):
        return 0.0
    front_s = front_end_s(plan.prompt_tokens)
    if plan.loop == "open":
        return front_s
    per_step = plan.concurrency / (plan.num_workers * plan.output_tokens)
    prompt_s = first.step_s([(round(plan.prompt_tokens), 0)])
    wait_s = plan.reception.wait_steps(per_step) * step_s
    wait_s += plan.reception.companions(per_step) * prompt_s
    # the first request of a client finds an idle engine
    return front_s + wait_s * (1.0 - plan.concurrency / plan.num_requests)


def _fleet(
    plan: Experiment, constants: EngineConstants, world: World | None
) -> list[tuple[ReplicaType, int]]:
    """Return the engines of an experiment, those that prefill for others first."""
    ranks = plan.setup.expert_ranks
    if plan.prefill is None:
        return [(plan.setup.replica(constants, world), ranks)]
    return [
        (
            plan.prefill.worker("prefill", constants, world),
            plan.num_prefill * plan.prefill.expert_ranks,
        ),
        (plan.setup.worker("decode", constants, world), plan.num_workers * ranks),
    ]


def _covering(replica: ReplicaType, plan: Experiment, tokens: int) -> ReplicaType:
    """Return an engine that can compute whole prompts, if it must: limits are set for the load."""
    whole = replica.needs_whole_prompts(plan.setup.chunked_prefill)
    if not whole or replica.computes_once:
        return replica
    budget = max(replica.max_num_batched_tokens, tokens)
    return replace(replica, max_num_batched_tokens=budget)


def draw_lengths(plan: Experiment) -> tuple[IntArray, IntArray, np.random.Generator]:
    """Draw prompt and output tokens of the requests of an experiment, `int64[n]` each.

    The same requests for the same experiment, whatever else is in the table. What else is drawn
    comes from the generator that is returned.
    """
    seed = zlib.crc32(repr((plan.prompt_tokens, plan.output_tokens, plan.num_requests)).encode())
    rng = np.random.default_rng(seed)
    prompt = _lengths(rng, plan, plan.prompt_tokens)
    return prompt, _lengths(rng, plan, plan.output_tokens), rng


def _lengths(rng: np.random.Generator, plan: Experiment, mean: float) -> IntArray:
    n = plan.num_requests
    if plan.lengths == "shortened":
        return np.maximum(1, rng.integers(round(0.8 * mean), round(mean) + 1, n))
    if plan.lengths == "spread":
        return np.maximum(1, np.rint(rng.exponential(mean, n))).astype(np.int64)
    return np.full(n, max(1, round(mean)), np.int64)
