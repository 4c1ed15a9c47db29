"""Time the vLLM plug-in takes for a step, without vLLM.

`python benchmarks/ordering.py`:
100 requests wait and 32 run; the policy is asked at every step. Once step after step, once with
10 ms of sleep in between, in which other processes use the caches, as between an engine's steps.
"""

from __future__ import annotations

import time
from itertools import pairwise
from types import SimpleNamespace

import numpy as np

from servegym.policy.learned_ordering import MlpOrdering, OrderingWeights
from servegym.policy.ordering import NUM_ORDERING_FEATURES, OrderingPolicy
from servegym.serve.vllm.config import PluginConfig
from servegym.serve.vllm.plugin import Plugin, load_policy

NUM_WAITING, NUM_RUNNING = 100, 32
STEPS = 400
OUTPUT = SimpleNamespace(
    total_num_scheduled_tokens=NUM_RUNNING,
    scheduled_new_reqs=[],
    scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
    preempted_req_ids=set(),
)


class Request:
    """As much of vLLM's `Request` as the plug-in reads."""

    def __init__(self, i: int, computed: int) -> None:
        self.request_id = str(i)
        self.arrival_time = time.time() + 1e-3 * i
        self.num_prompt_tokens = 100 + i
        self.num_computed_tokens = computed
        self.num_output_tokens = self.num_preemptions = self.priority = 0
        self.max_tokens = 10_000 + i % 37
        self.sampling_params = SimpleNamespace(extra_args=None)


def perceptron() -> MlpOrdering:
    """A learned order of the usual size, with random weights."""
    rng = np.random.default_rng(0)
    widths = (NUM_ORDERING_FEATURES, 64, 64, 2)
    weights = OrderingWeights(
        mean=np.zeros(widths[0], np.float32),
        scale=np.ones(widths[0], np.float32),
        weights=tuple(rng.normal(0, 0.1, (a, b)).astype(np.float32) for a, b in pairwise(widths)),
        biases=tuple(np.zeros(b, np.float32) for b in widths[1:]),
    )
    return MlpOrdering(weights, information="blind", name="learned, 64 x 64")


def measure(policy: OrderingPolicy, sleep_s: float) -> dict[str, float]:
    """Order as many steps; return percentiles."""
    plugin = Plugin(
        PluginConfig(),
        policy,
        block_size=16,
        max_num_batched_tokens=2048,
        priority_mode=True,
    )
    waiting = [Request(i, 0) for i in range(NUM_WAITING)]
    running = [Request(NUM_WAITING + i, 120) for i in range(NUM_RUNNING)]
    requests = {request.request_id: request for request in (*waiting, *running)}
    queue = SimpleNamespace(_heap=waiting)
    for _ in range(STEPS):
        begin_ns = time.perf_counter_ns()
        plugin.before(queue, running, requests, 0.5)
        ordered_ns = time.perf_counter_ns()
        plugin.after(
            OUTPUT, requests, begin_ns=begin_ns, ordered_ns=ordered_ns, scheduled_ns=ordered_ns
        )
        for request in running:
            request.num_computed_tokens += 1
            request.num_output_tokens += 1
        if sleep_s:
            time.sleep(sleep_s)
    assert not plugin.counts.num_faults
    return plugin.overhead.percentiles_us()


def main() -> None:
    """Print a table."""
    print("microseconds p50, p99 | step after step | 10 ms apart")
    for policy in (*map(load_policy, ("fcfs", "srpt", "least-slack", "ltr", "mlfq")), perceptron()):
        cells = [measure(policy, sleep_s) for sleep_s in (0.0, 0.01)]
        text = " | ".join(f"{c['policy_p50_us']:.0f}, {c['policy_p99_us']:.0f}" for c in cells)
        print(f"{policy.name} | {text}")


if __name__ == "__main__":
    main()
