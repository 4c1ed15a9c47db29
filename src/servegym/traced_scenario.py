"""A scenario whose workload is a trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from servegym.cluster.spec import ClusterSpec, Episode
from servegym.errors import ConfigError
from servegym.scenario import Scenario
from servegym.workloads.config import MAX_CONTEXT_TOKENS, TraceConfig
from servegym.workloads.dialect import TimeUnit
from servegym.workloads.readers import OnBadRow
from servegym.workloads.shortening import TooLong
from servegym.workloads.table import RequestTable


def with_trace(
    scenario: Scenario,
    path: str,
    rate_rps: float | None = None,
    on_bad_row: OnBadRow = "error",
    *,
    time_unit: TimeUnit | None = None,
    hash_block_tokens: int | None = None,
    max_context_tokens: int = MAX_CONTEXT_TOKENS,
    too_long: TooLong = "error",
    wait_for_answers: bool = True,
) -> Scenario:
    """Replace a scenario's workload by a trace.

    Args:
        scenario: Gives fleet, service levels and disturbances.
        path: The trace.
        rate_rps: Rate at load 1; without it 80 % of what the cost model says the fleet can bear
            of this trace, prefixes not counted. A trace whose requests all arrive at one time is
            played as the batch it is.
        on_bad_row: Refuse the file at a malformed row, or leave the row out.
        time_unit: Of the file's times, where its columns do not say.
        hash_block_tokens: Tokens of a prefix hash, likewise.
        max_context_tokens: Longest prompt and output together; at most what a replica can take.
        too_long: Refuse the file at a longer request, or cut it or leave it out.
        wait_for_answers: Whether requests wait for those that they followed, if the trace says so.

    Raises:
        ConfigError: If `rate_rps`, `hash_block_tokens` or `max_context_tokens` is impossible.
        WorkloadError: If the trace cannot be used.
    """
    if rate_rps is not None and not 0 < rate_rps < np.inf:
        raise ConfigError(f"rate_rps must be above 0 and finite, got {rate_rps}")
    if hash_block_tokens is not None and hash_block_tokens < 1:
        raise ConfigError(f"hash_block_tokens must be at least 1, got {hash_block_tokens}")
    if max_context_tokens < 2:
        raise ConfigError(f"max_context_tokens must be at least 2, got {max_context_tokens}")
    workload = TraceConfig(
        path=path,
        on_bad_row=on_bad_row,
        time_unit=time_unit,
        hash_block_tokens=hash_block_tokens,
        max_context_tokens=max_context_tokens,
        too_long=too_long,
        wait_for_answers=wait_for_answers,
    )
    name = f"{scenario.name} + {Path(path).name}"
    episode = scenario.episode(0, num_requests=1)
    traced = scenario.model_copy(update={"workload": workload, "name": name})
    played = traced.played_workload
    assert isinstance(played, TraceConfig)
    table = played.whole()
    if rate_rps is None and not played.is_batch:
        rate_rps = 0.8 * capacity_rps(scenario.spec, episode, table)
    workload = played.model_copy(update={"rate_rps": rate_rps})
    return scenario.model_copy(update={"workload": workload, "name": name})


def capacity_rps(spec: ClusterSpec, episode: Episode, table: RequestTable) -> float:
    """Rate that a fleet can bear of requests such as these, by the cost model.

    Args:
        spec: Its types of replicas.
        episode: Has the fleet.
        table: Requests; their mean lengths count, prefixes do not.
    """
    prompt, output = float(table.prompt_tokens.mean()), float(table.output_tokens.mean())
    capacity = 0.0
    for t, speed in zip(episode.type_idx, episode.speed, strict=True):
        replica = spec.types[t]
        fit = replica.num_blocks * spec.block_size / (prompt + output)
        batch = int(max(1, min(32, fit, replica.max_num_seqs)))
        step_s = replica.grid.step_s([], batch, int(batch * (prompt + output / 2)))
        budget = replica.max_num_batched_tokens
        prefill_s = prompt / budget * replica.grid.step_s([(budget, int(prompt / 2))])
        capacity += speed / (prefill_s + output * step_s / batch)
    return capacity
