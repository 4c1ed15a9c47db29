"""How long a live decision takes: observation, guards and policy, in process.

Beside wall-clock time stands the thread's own time on the CPU: on a machine that does other things
the tail of the first is how long this program was not allowed to run.

    python benchmarks/live_decision.py [POLICY ...]

POLICY is a rule or the path of a policy.onnx; without one, some rules and a network of the size
that is trained by default, with random weights.
"""

from __future__ import annotations

import gc
import sys
import time
from collections import deque

import numpy as np

from servegym.export.manifest import Manifest
from servegym.policy.frozen import NumpyPolicy
from servegym.policy.numpy_network import FAMILY, NetworkShape, NumpyNetwork, num_inputs
from servegym.serve.facts import Rates, fleet_facts
from servegym.serve.live_request import LiveRequest
from servegym.serve.loaded_policy import LoadedPolicy, load_policy
from servegym.serve.ranges import Ranges
from servegym.serve.runtime import PolicyRuntime, RuntimeConfig
from servegym.serve.state import EngineMetrics, LiveState

RULES = ("least-outstanding", "added-delay", "added-delay-inferred", "class-aware", "llm-d")
FLEETS = (16, 128)
DECISIONS = 20_000
#: Requests at each replica.
OUTSTANDING = 32
HIDDEN = 32


def random_network(context: str) -> LoadedPolicy:
    """Make a network of the default size; what its weights are does not change its time."""
    rng = np.random.default_rng(0)
    sizes = {
        "actor.own.0": (HIDDEN, num_inputs(extended=False)),
        "actor.own.2": (HIDDEN, HIDDEN),
        "actor.mix": (HIDDEN, (2 if context == "attention" else 1) * HIDDEN),
        "actor.around": (HIDDEN, 2 * HIDDEN),
        "actor.query": (HIDDEN, HIDDEN),
        "score": (1, HIDDEN),
        "extra": (1, HIDDEN),
    }
    weights = {}
    for name, (rows, columns) in sizes.items():
        weights[f"{name}.weight"] = 0.1 * rng.standard_normal((rows, columns)).astype(np.float32)
        weights[f"{name}.bias"] = np.zeros(rows, np.float32)
    shape = NetworkShape(FAMILY, context, "added-delay", (1.0, 1.0), 10.0, 0)
    name = f"network, {context}"
    policy = NumpyPolicy(NumpyNetwork(shape, weights), information="predictive", name=name)
    # ranges as a manifest has them, so that the guard that looks at them is timed too
    ranges = Ranges(np.full(30, -1e12), np.full(30, 1e12))
    return LoadedPolicy(name, policy, Manifest(sha256=""), ranges)


def fleet(width: int, rng: np.random.Generator) -> LiveState:
    """Make a fleet under load."""
    rates = [
        Rates(prefill_tokens_per_s=p, decode_step_s=s, decode_seq_s=1e-4, kv_capacity_tokens=10**6)
        for p, s in zip(rng.uniform(5e3, 5e4, width), rng.uniform(0.01, 0.04, width), strict=True)
    ]
    state = LiveState(fleet_facts(rates))
    for r in range(width):
        running = float(rng.integers(1, 100))
        state.update_metrics(r, EngineMetrics(running, 2.0, 0.5), time.monotonic())
    return state


def measure(loaded: LoadedPolicy, width: int) -> np.ndarray:
    """Return wall-clock and CPU seconds of each decision, `float64[DECISIONS, 2]`."""
    rng = np.random.default_rng(width)
    runtime = PolicyRuntime(RuntimeConfig(max_metrics_age_s=1e6, timeout_s=60.0))
    runtime.install(loaded)
    state = fleet(width, rng)
    hits = rng.integers(0, 100, width).astype(np.float64)
    there: deque[LiveRequest] = deque()
    taken = np.empty((DECISIONS, 2))
    for i in range(-500, DECISIONS):  # the first ones are not counted
        now_s = time.monotonic()
        request = state.arrive(now_s, key="k", prompt_tokens=500.0, predicted_output_tokens=200.0)
        begin_s, begin_cpu_s = time.perf_counter(), time.thread_time()
        seen = state.observe(request, now_s, hit_tokens=hits, needs=loaded.policy.needs)
        decision = runtime.decide(seen, "k")
        taken[i] = time.perf_counter() - begin_s, time.thread_time() - begin_cpu_s
        state.dispatch(request, decision.action, now_s)
        there.append(request)
        if len(there) > OUTSTANDING * width:
            state.leave(there.popleft())
    assert runtime.counters.num_policy == DECISIONS + 500, runtime.counters.snapshot()
    return taken


def main() -> None:
    """Measure and print."""
    config = RuntimeConfig(max_metrics_age_s=1e6, timeout_s=60.0)
    texts = sys.argv[1:]
    policies = [load_policy(text, config) for text in texts or RULES]
    if not texts:
        policies += [random_network("mean"), random_network("attention")]
    gc.disable()
    print("| policy | replicas | p50 us | p99 us | p99 us on the CPU |")
    print("|---|---|---|---|---|")
    for loaded in policies:
        for width in FLEETS:
            taken = measure(loaded, width) * 1e6
            p50, p99 = np.quantile(taken[:, 0], (0.5, 0.99))
            cpu = np.quantile(taken[:, 1], 0.99)
            print(f"| {loaded.text} | {width} | {p50:.0f} | {p99:.0f} | {cpu:.0f} |")


if __name__ == "__main__":
    main()
