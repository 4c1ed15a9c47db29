"""Route requests through the real Ray Serve by a servegym policy.

    python check_ray.py

Three replicas of one deployment, one four times as fast as the slowest; each tells its rates and
load in its routing statistics.
"""

from __future__ import annotations

import asyncio
import collections
import gc
import time
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

NUM_REQUESTS = 300
CONCURRENT = 24
SECONDS = (0.02, 0.04, 0.08)


def rates(seconds: float) -> dict[str, float]:
    """Rates of a replica that takes so long for a request."""
    return {"prefill_tokens_per_s": 20.0 / seconds, "decode_step_s": seconds / 10}


@ray.remote
class Counter:
    """Hands out numbers, so that each replica gets a speed of its own."""

    def __init__(self) -> None:
        self.next = 0

    def take(self) -> int:
        """Return the next number."""
        self.next += 1
        return self.next - 1


@serve.deployment(
    num_replicas=len(SECONDS),
    max_ongoing_requests=32,
    ray_actor_options={"num_cpus": 0},
    request_router_config=RequestRouterConfig(
        request_router_class="servegym.serve.ray_serve.PolicyRequestRouter",
        request_router_kwargs={
            "replica": rates(SECONDS[0]),
            "dispatch": {"runtime": {"policy": "added-delay"}},
        },
        request_routing_stats_period_s=0.2,
    ),
)
class Engine:
    """Works on two requests at a time, each for so many seconds."""

    def __init__(self, counter: Any) -> None:
        self.idx = ray.get(counter.take.remote())
        self.slots = asyncio.Semaphore(2)
        self.num_running = self.num_waiting = 0

    async def __call__(self, request: dict[str, Any]) -> int:
        self.num_waiting += 1
        async with self.slots:
            self.num_waiting -= 1
            self.num_running += 1
            await asyncio.sleep(SECONDS[self.idx])
            self.num_running -= 1
        return self.idx

    def record_routing_stats(self) -> dict[str, Any]:
        """Say what this replica is and does; Ray Serve calls it."""
        return {
            "num_running": self.num_running,
            "num_waiting": self.num_waiting,
            "kv_cache_usage": 0.0,
            "rates": rates(SECONDS[self.idx]),
        }


async def drive(handle: Any) -> tuple[list[int], list[float]]:
    """Keep some requests under way; return who answered and when."""
    gate = asyncio.Semaphore(CONCURRENT)
    times: list[float] = []

    async def one(i: int) -> int:
        async with gate:
            begin_s = time.perf_counter()
            idx = await handle.remote({"prompt": f"question {i}", "max_tokens": 10})
            times.append(time.perf_counter() - begin_s)
            return int(idx)

    return list(await asyncio.gather(*(one(i) for i in range(NUM_REQUESTS)))), times


def main() -> None:
    """Deploy, warm up, drive, check the books."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    handle = serve.run(Engine.bind(Counter.remote()))
    asyncio.run(drive(handle))
    answered, times = asyncio.run(drive(handle))
    routers = [o for o in gc.get_objects() if type(o).__name__ == "PolicyRequestRouter"]
    (fleet,) = [router.fleet for router in routers if router.fleet._columns]
    runtime = fleet.dispatcher.runtime
    time.sleep(0.5)
    state = fleet.dispatcher.state
    left = sum(state.outstanding(c) for c in range(8))
    share = collections.Counter(answered)
    counts = runtime.counters.snapshot()
    print(f"ray {ray.__version__}: answered by {dict(sorted(share.items()))}, left in books {left}")
    print(f"mean {1e3 * np.mean(times):.0f} ms; decisions {counts['num_policy']} by the policy, "
          f"{counts['num_fallback']} by the fallback")  # fmt: skip
    serve.shutdown()
    ray.shutdown()
    assert len(answered) == NUM_REQUESTS
    assert left == 0
    assert counts["num_policy"] >= NUM_REQUESTS
    assert share[0] > 1.3 * share[1] > 1.3 * share[2] > 0, share


if __name__ == "__main__":
    main()
