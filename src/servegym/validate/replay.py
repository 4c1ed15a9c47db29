"""One engine played to the end: open loop by arrivals, or closed loop by completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, ReplicaType, TransferRules
from servegym.cluster.state import NEVER, Asks
from servegym.typing import FloatArray, IntArray
from servegym.validate.runs import tpot
from servegym.workloads.table import ANY_END, BY_ITSELF, RequestTable


@dataclass(frozen=True)
class Replay:
    """What a replayed engine did to each request, in order of arrival.

    Attributes:
        arrival_s: `float64[n]`.
        ttft_s: `float64[n]`.
        tpot_s: NaN for requests of one token, `float64[n]`.
        e2e_s: `float64[n]`.
        output_tokens: `int64[n]`.
        num_preemptions: Of all requests.
        steps: `STEP_DTYPE[m]`; empty unless recorded.
        num_blocks: KV blocks of all replicas.
    """

    arrival_s: FloatArray
    ttft_s: FloatArray
    tpot_s: FloatArray
    e2e_s: FloatArray
    output_tokens: IntArray
    num_preemptions: int
    steps: NDArray[np.void]
    num_blocks: int

    @property
    def makespan_s(self) -> float:
        """From the first arrival to the last end."""
        return float((self.arrival_s + self.e2e_s).max() - self.arrival_s.min())

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens of all requests over the makespan."""
        return float(self.output_tokens.sum()) / self.makespan_s

    def series(self, at_s: FloatArray) -> dict[str, FloatArray]:
        """Return running and waiting requests and KV use in percent at the given times."""
        waiting, used = np.zeros(len(at_s)), np.zeros(len(at_s))
        for replica in np.unique(self.steps["replica"]):
            steps = self.steps[self.steps["replica"] == replica]
            last = np.searchsorted(steps["begin_s"], at_s, side="right") - 1
            busy = (last >= 0) & (at_s <= steps["end_s"][last])
            waiting += np.where(busy, steps["num_waiting"][last], 0)
            used += np.where(busy, steps["used_blocks"][last], 0)
        ends = np.sort(self.arrival_s + self.e2e_s)
        arrived = np.searchsorted(self.arrival_s, at_s, side="right")
        inside = arrived - np.searchsorted(ends, at_s, side="right")
        return {
            "running": np.maximum(inside - waiting, 0.0),
            "waiting": waiting,
            "kv_cache_pct": 100.0 * used / self.num_blocks,
        }


def replay_open(
    replica: ReplicaType,
    arrival_s: FloatArray,
    prompt_tokens: IntArray,
    output_tokens: IntArray,
    *,
    block_size: int = 16,
    prefix_caching: bool = False,
    chunked_prefill: bool = True,
    num_replicas: int = 1,
    record: bool = False,
) -> Replay:
    """Replay requests that arrive at given times; all at 0 is a static batch.

    Several replicas are data-parallel ranks: a request goes to the one with the smallest sum of
    running and four times its waiting requests, as in vLLM's coordinator.

    Args:
        replica: The engine.
        arrival_s: Ascending, `float64[n]`.
        prompt_tokens: `int64[n]`.
        output_tokens: `int64[n]`.
        block_size: Tokens in a KV block.
        prefix_caching: Requests share no text; it lets a preempted one find its own blocks.
        chunked_prefill: Whether prompts are split over steps.
        num_replicas: Equal engines that share the requests.
        record: Keep the steps, which `Replay.series` needs.
    """
    spec = ClusterSpec(
        (replica,),
        block_size=block_size,
        prefix_caching=prefix_caching,
        chunked_prefill=chunked_prefill,
    )
    table = RequestTable.build(arrival_s, prompt_tokens, output_tokens)
    return _replay(spec, table, [num_replicas], record)


def replay_closed(
    fleet: Sequence[tuple[ReplicaType, int]],
    concurrency: int,
    prompt_tokens: IntArray,
    output_tokens: IntArray,
    *,
    block_size: int = 16,
    prefix_caching: bool = False,
    chunked_prefill: bool = True,
    kv_token_bytes: float = 0.0,
) -> Replay:
    """Replay clients that each send a request, wait for its end and send the next.

    A request arrives exactly when another one ends, so it misses the step that begins at that
    instant and is admitted to the next one.

    Args:
        fleet: Engines and how many there are of each; they share the requests as in `replay_open`,
            or prefill and decode for each other.
        concurrency: Number of clients.
        prompt_tokens: Of each request, in the order they are sent, `int64[n]`.
        output_tokens: Likewise.
        block_size: Tokens in a KV block.
        prefix_caching: As in `replay_open`.
        chunked_prefill: As in `replay_open`.
        kv_token_bytes: KV of one token, where some only prefill.
    """
    spec = ClusterSpec(
        tuple(kind for kind, _ in fleet),
        block_size=block_size,
        prefix_caching=prefix_caching,
        chunked_prefill=chunked_prefill,
        transfers=TransferRules(
            kv_token_bytes, max_num_held=min(2048, max(TransferRules.max_num_held, concurrency))
        ),
    )
    n = len(prompt_tokens)
    after = np.where(np.arange(n) < concurrency, BY_ITSELF, ANY_END)
    table = RequestTable.build(np.zeros(n), prompt_tokens, output_tokens, after=after)
    return _replay(spec, table, [count for _, count in fleet], record=False)


def _replay(spec: ClusterSpec, table: RequestTable, counts: Sequence[int], record: bool) -> Replay:
    type_idx = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    episode = Episode(table, type_idx, np.ones(len(type_idx)))
    simulator = Simulator(spec, [episode], record=record, asks=Asks(dispatch=NEVER))
    simulator.advance()
    out = simulator.outcomes()
    ttft, e2e = out["first_token_s"] - out["arrival_s"], out["finish_s"] - out["arrival_s"]
    output = out["output_tokens"].astype(np.int64)
    return Replay(
        arrival_s=out["arrival_s"].copy(),
        ttft_s=ttft,
        tpot_s=tpot(ttft, e2e, output),
        e2e_s=e2e,
        output_tokens=output,
        num_preemptions=int(out["num_preemptions"].sum()),
        steps=simulator.steps(),
        num_blocks=sum(
            kind.num_blocks * count for kind, count in zip(spec.types, counts, strict=True)
        ),
    )
